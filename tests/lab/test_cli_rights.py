"""data rights on a user's own file: exit status, one line an error, no leftovers."""

from __future__ import annotations

import json

import pytest

from lifecycle_lib.core.records import read_json, write_json, write_jsonl
from lifecycle_lib.core.store import Store
from lifecycle_lib.lab.cli import main
from lifecycle_lib.lab.lineage import sources_of
from lifecycle_lib.lab.notebook import ROOT

JOB = str(ROOT / "data" / "rights" / "job_open.json")
CLAIMS = str(ROOT / "data" / "rights" / "claims_example.jsonl")


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("LIFECYCLE_QUIET", "1")


@pytest.fixture
def files(tmp_path):
    """A file that complies, and one with a non-commercial source in it."""
    rows = [{"id": f"r{i}", "text": f"text {i}", "source": "MANUAL", "licence": "MIT"} for i in range(4)]
    write_jsonl(tmp_path / "good.jsonl", rows)
    photo = {"id": "n1", "text": "no", "source": "PHOTO", "licence": "CC-BY-NC-4.0"}
    write_jsonl(tmp_path / "bad.jsonl", [*rows, photo])
    return tmp_path


def rights(*words: object) -> int:
    return main(["data", "rights", *map(str, words)])


def test_prove_then_check_then_forge(files, capsys):
    good, proof = files / "good.jsonl", files / "proof.json"
    assert rights("prove", good, "--job", JOB, "--out", proof) == 0
    assert rights("check", proof, good) == 0 and rights("check", proof, good, "--job", JOB) == 0
    assert "open weights: complies" in capsys.readouterr().out
    good.write_text(good.read_text().replace("text 2", "text 7"))
    assert rights("check", proof, good) == 1
    assert "not as recomputed: a row" in capsys.readouterr().out
    good.write_text(good.read_text().replace("text 7", "text 2"))
    write_json(proof, read_json(proof) | {"rows": 3})
    assert rights("check", proof, good) == 1


def test_refusals_name_rows_and_exit_1(files, capsys):
    assert rights("prove", files / "bad.jsonl", "--job", JOB, "--out", files / "p.json") == 1
    out = capsys.readouterr().out
    assert "refused n1 (PHOTO, CC-BY-NC-4.0): plan OPEN does not admit non-commercial" in out
    assert rights("check", files / "p.json", files / "bad.jsonl") == 1  # a true proof of a refusal
    assert "is REFUSED" in capsys.readouterr().out
    assert rights("compose", files / "bad.jsonl", "--job", JOB) == 1
    out = capsys.readouterr().out
    assert "remove   PHOTO [CC-BY-NC-4.0]: 1 rows, 1 tokens" in out and "keep     8 of 9 tokens" in out
    assert rights("compose", files / "good.jsonl", "--job", JOB) == 0


def test_a_key_signs(files, capsys):
    key, proof = files / "key", files / "proof.json"
    key.write_bytes(b"0123456789abcdef\n")
    assert rights("prove", files / "good.jsonl", "--job", JOB, "--out", proof, "--key", key) == 0
    assert rights("check", proof, files / "good.jsonl", "--key", key) == 0
    key.write_bytes(b"another key, 16 b")
    assert rights("check", proof, files / "good.jsonl", "--key", key) == 1
    assert "not signed with this key" in capsys.readouterr().out


def test_a_claim_revoked_before_the_job_refuses_it(files, capsys):
    granted = {"source": "MANUAL", "date": "2026-01-01", "event": "granted", "licence": "MIT"}
    write_jsonl(files / "claims.jsonl", [granted, {"source": "MANUAL", "date": "2026-09-01", "event": "revoked"}])
    words = ("prove", files / "good.jsonl", "--job", JOB, "--out", files / "p.json")
    assert rights(*words) == 0
    assert rights(*words, "--claims", files / "claims.jsonl") == 1
    assert "source revoked since 2026-09-01" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["job_open", "job_restricted", "job_partner_adapter", "job_research"])
def test_the_example_jobs_can_be_used(files, name):
    job = ROOT / "data" / "rights" / f"{name}.json"
    assert rights("compose", files / "good.jsonl", "--job", job) == 0


@pytest.mark.parametrize("content, message", [
    ('{"id": "a", "text": "x"}\n{"id": "b", "te', "bad.jsonl:2:"),
    ('{"id": "a", "text": "x"}\n{"id": "a", "text": "y"}\n', "bad.jsonl:2:"),
    ("", "empty"), ("\n", "no rows"),
])
def test_a_file_that_cannot_be_used_exits_2_with_one_line(files, capsys, content, message):
    (files / "bad.jsonl").write_text(content)
    assert rights("prove", files / "bad.jsonl", "--job", JOB, "--out", files / "p.json") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (files / "p.json").exists()


def test_other_bad_input_exits_2(files, capsys):
    good = files / "good.jsonl"
    write_json(files / "job.json", {"name": "x"})
    for words in (("prove", good, "--job", files / "job.json", "--out", files / "p"), ("check", JOB, good),
                  ("compose", files / "none.jsonl", "--job", JOB), ("who", "A", "--store", files / "nowhere"),
                  ("compose", good, "--job", JOB, "--table", files / "job.json"), ("notice", good, "--date", "today"),
                  ("prove", good, "--job", JOB, "--out", files / "p", "--key", files / "no-key")):
        assert rights(*words) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_who_and_notice_from_the_store(tmp_path, capsys):
    store = Store(tmp_path / "store")
    row = {"id": "a", "text": "x", "source": "MANUAL", "licence": "MIT"}

    def make(folder):
        (folder / "model.safetensors").write_bytes(b"w")
        return {"sources": sources_of([row])}
    base = store.get_or_make("base", {}, {}, make)
    store.get_or_make("old", {}, {}, lambda folder: {"steps": 1})
    assert rights("who", "MANUAL", "--store", store.root) == 0
    out = capsys.readouterr().out
    assert f"{base.fingerprint}  weights     retrain without it" in out
    assert "held by 1, not by 0, not recorded for 1 (0 with weights)" in out
    assert rights("who", "MANAUL", "--store", store.root) == 0
    assert "no card names 'MANAUL'; the cards name MANUAL" in capsys.readouterr().out
    words = ("notice", base.fingerprint, "--store", store.root, "--date", "2026-11-25")
    assert rights(*words, "--claims", CLAIMS) == 0
    assert "## MANUAL\n- licence: MIT\n- rows: 1\n" in capsys.readouterr().out
    assert rights(*words, "--out", tmp_path / "NOTICE") == 1  # who to name is in the claims log
    assert "not complete: MANUAL" in capsys.readouterr().err and "NOT ON FILE" in (tmp_path / "NOTICE").read_text()


def test_checkpoints_that_do_not_say_are_no_clean_answer(tmp_path, capsys):
    store = Store(tmp_path / "store")
    row = {"id": "a", "text": "x", "source": "MANUAL", "licence": "MIT"}
    store.get_or_make("base", {}, {}, lambda folder: {"sources": sources_of([row])})
    store.get_or_make("old", {}, {}, lambda folder: (folder / "model.safetensors").write_bytes(b"w") and {})
    assert rights("who", "MANUAL", "--store", store.root) == 1
    assert "weights     does not say what it holds" in capsys.readouterr().out


@pytest.mark.parametrize("words", [("prove", "good.jsonl", "--job", "job.json"), ("notice", "good.jsonl")])
def test_a_result_never_takes_the_place_of_what_it_is_made_from(files, capsys, words):
    job, good = files / "job.json", files / "good.jsonl"
    job.write_bytes((ROOT / "data" / "rights" / "job_open.json").read_bytes())
    before = [good.read_bytes(), job.read_bytes()]
    words = [files / word if "." in word else word for word in words]
    (files / "link").symlink_to(good)
    for out in (good, files / "link", files, *words[3:]):
        assert rights(*words, "--out", out) == 2
        assert "--out" in capsys.readouterr().err
    assert [good.read_bytes(), job.read_bytes()] == before


def test_errors_name_the_file(files, capsys):
    good, bad = files / "good.jsonl", files / "p.json"
    cut = {"format": "lifecycle-rights-proof-1"}
    for content, message in (([], "p.json: not a rights proof"), (cut, "p.json: job")):
        write_json(bad, content)
        assert rights("check", bad, good) == 2
        assert message in capsys.readouterr().err
    (files / "key").write_bytes(b"short")
    for key, message in (("key", "key: a key of 5 bytes"), ("none", "none: cannot be read")):
        assert rights("prove", good, "--job", JOB, "--out", files / "q", "--key", files / key) == 2
        assert message in capsys.readouterr().err
    (files / "blank.jsonl").write_text("\n\n")
    assert rights("compose", files / "blank.jsonl", "--job", JOB) == 2
    assert "blank.jsonl: no rows" in capsys.readouterr().err


def test_other_peoples_text_cannot_move_the_cursor(files, capsys):
    write_jsonl(files / "bad.jsonl", [{"id": "a\x1b[2J", "text": "x", "source": "\x9b2J", "licence": "\x07"}])
    assert rights("prove", files / "bad.jsonl", "--job", JOB, "--out", files / "p.json") == 1
    assert rights("compose", files / "bad.jsonl", "--job", JOB) == 1
    assert rights("notice", files / "bad.jsonl") == 1
    shown = "".join(capsys.readouterr())
    assert "refused a?[2J" in shown and not set(shown) & set("\x1b\x9b\x07")


def test_notice_of_a_file(files, capsys):
    assert rights("notice", files / "good.jsonl", "--claims", CLAIMS) == 0
    assert "by: the desk" in capsys.readouterr().out


def test_a_long_file_is_read_once_and_proved(files):
    path = files / "long.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for i in range(20_000):
            row = {"id": f"r{i}", "text": f"text {i}", "source": f"S{i % 50}", "licence": "MIT"}
            file.write(json.dumps(row) + "\n")
    assert rights("prove", path, "--job", JOB, "--out", files / "p.json") == 0
    assert read_json(files / "p.json")["rows"] == 20_000
