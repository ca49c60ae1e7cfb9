"""A gate's manifest: counts that must add up, and a folder that was changed afterwards answers no question."""

import json

import pytest

from lifecycle_lib.core.records import read_json
from lifecycle_lib.corpus.decisions import diff, explain
from lifecycle_lib.corpus.manifest import check_accounting, read_manifest
from lifecycle_lib.lab.data_board import read_board
from tests.corpus.test_gate import gated, row


def test_accounting_looks_at_every_count(tmp_path):
    manifest, _ = gated(tmp_path, [row(1), row(2, licence=""), b"{", row(4)])
    for path in (("input", "lines"), ("counts", "lines"), ("counts", "kept"), ("counts", "verdict", "admit"),
                 ("counts", "reason", "passed"), ("by", "source", "S", "quarantine"), ("by", "slice", "x", "admit"),
                 ("files", "kept.jsonl", "lines"), ("files", "quarantine.jsonl", "lines"),
                 ("files", "decisions.jsonl", "lines")):
        wrong = json.loads(json.dumps(manifest))
        at = wrong
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] += 1
        with pytest.raises(ValueError, match="does not add up"):
            check_accounting(wrong)


def test_changed_results_are_noticed(tmp_path):
    gated(tmp_path, [row(1), row(2)])
    path = tmp_path / "out" / "manifest.json"
    manifest = read_json(path)
    path.write_text(json.dumps(manifest | {"counts": manifest["counts"] | {"kept": 3}}))
    with pytest.raises(ValueError, match="changed after"):
        read_manifest(tmp_path / "out")
    path.write_text(json.dumps(manifest))
    (tmp_path / "out" / "kept.jsonl").write_text("")
    assert read_manifest(tmp_path / "out", files=False)
    with pytest.raises(ValueError, match=r"kept\.jsonl: missing, or changed"):
        read_manifest(tmp_path / "out")
    for text in ("[]", "{}", "nonsense"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"manifest\.json"):
            read_manifest(tmp_path / "out")


def test_no_answer_from_decisions_that_were_changed(tmp_path):
    gated(tmp_path, [row(1), row(2, licence="")])
    out, path = tmp_path / "out", tmp_path / "out" / "decisions.jsonl"
    asked = (lambda: explain(out, "r1"), lambda: diff(tmp_path / "in.jsonl", out), lambda: read_board(out))
    assert all(ask() for ask in asked)
    path.write_text(path.read_text().replace('"admit"', '"reject"'))
    for ask in asked:
        with pytest.raises(ValueError, match=r"decisions\.jsonl: missing, or changed after the gate wrote it"):
            ask()
