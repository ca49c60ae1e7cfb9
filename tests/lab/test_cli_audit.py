"""lifecycle data audit, register and suspect: exit status, output, and one line for what cannot be used."""

import json

import pytest

from lifecycle_lib.core.records import write_json, write_jsonl
from lifecycle_lib.lab import cli

ITEM = "the customer bought a green lamp on monday and it broke after nine days of careful use"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LIFECYCLE_QUIET", "1")
    monkeypatch.delenv("LIFECYCLE_DEBUG", raising=False)
    write_jsonl(tmp_path / "evals" / "own.jsonl", [{"id": "q1", "prompt": ITEM, "answer": "eligible"}])
    write_jsonl(tmp_path / "clean.jsonl", [{"id": "a", "text": "a red chair"}, {"id": "b", "text": "a blue chair"}])
    write_jsonl(tmp_path / "leaky.jsonl", [{"id": "a", "text": "a red chair"}, {"id": "b", "text": f"Quote: {ITEM}."}])
    assert run(tmp_path, "register", "own", "evals/own.jsonl") == 0
    return tmp_path


def run(folder, command, *args) -> int:
    files = [str(folder / a) if a.endswith(".jsonl") or a == "evals" else a for a in args]
    return cli.main(["data", command, "--registry", str(folder / "evals" / "registry.json"), *files])


def test_clean_contaminated_and_why(folder, capsys):
    capsys.readouterr()
    assert run(folder, "audit", "clean.jsonl") == 0
    assert "no overlap found" in capsys.readouterr().out
    assert run(folder, "audit", "leaky.jsonl") == 1
    out = capsys.readouterr().out
    assert "1 of 2 rows hold an item: CONTAMINATED" in out and "row 2 (id b): exact of own q1 prompt" in out
    assert run(folder, "audit", "leaky.jsonl", "--json", "--set", "own") == 1
    report = json.loads(capsys.readouterr().out)
    assert report["sets"]["own"]["screens"]["exact"]["items_hit"] == 1
    assert report["hits"][0]["id"] == "b"


def test_shorter_overlap_alone_is_shown_and_passes(folder, capsys):
    write_jsonl(folder / "near.jsonl", [{"text": "it broke after nine days of careful use of a mug"}])
    capsys.readouterr()
    assert run(folder, "audit", "near.jsonl") == 0
    out = capsys.readouterr().out
    assert "8-gram" in out and "shorter overlaps are above" in out
    assert run(folder, "audit", "near.jsonl", "--ngram", "8") == 1  # then 8 is the largest


def test_a_suspect_stops_the_next_corpus(folder, capsys):
    write_jsonl(folder / "next.jsonl", [{"text": "they say case q1 is to be answered with eligible"}])
    assert run(folder, "audit", "next.jsonl") == 0
    assert run(folder, "suspect", "case q1 is to be answered with eligible", "--why", "FORUM-2") == 0
    assert run(folder, "audit", "next.jsonl") == 1
    assert "FORUM-2" in capsys.readouterr().out


def test_background_and_canary(folder, capsys):
    write_jsonl(folder / "background.jsonl", [{"text": ITEM}])
    assert run(folder, "register", "own", "evals/own.jsonl", "--background", "background.jsonl", "--canary",
               "canary 26b5c67b86b7") == 0
    assert run(folder, "audit", "leaky.jsonl") == 0  # what clean text holds is no leak
    write_jsonl(folder / "marked.jsonl", [{"text": "x canary 26b5c67b86b7"}])
    capsys.readouterr()
    assert run(folder, "audit", "marked.jsonl") == 1
    assert "canary" in capsys.readouterr().out


@pytest.mark.parametrize(("args", "message"), [
    (["audit", "gone.jsonl"], "cannot be read"),
    (["audit", "clean.jsonl", "--set", "other"], "'other' is not registered"),
    (["audit", "clean.jsonl", "--ngram", "9"], "holds [8, 13]"),
    (["audit", "clean.jsonl", "--fuzzy", "2"], "fuzzy=2.0"),
    (["audit", "clean.jsonl", "--field", "prompt"], "clean.jsonl:1: field 'prompt' is missing"),
    (["register", "own", "gone.jsonl"], "cannot be read"),
    (["register", "own", "clean.jsonl"], "clean.jsonl:1: field 'prompt' is missing"),
    (["suspect", "too short", "--why", "x"], "2 words"),
    (["register", "suspects", "evals/own.jsonl"], "is kept for texts noted with data suspect"),
    (["audit", "clean.jsonl", "--evals", "no-such-folder"], "no-such-folder: no such folder"),
])
def test_one_line_for_what_cannot_be_used(folder, capsys, args, message):
    capsys.readouterr()
    assert run(folder, *args) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error and error.startswith("lifecycle: ")


def test_an_evaluation_set_that_is_not_registered_stops_the_audit(folder, capsys):
    write_jsonl(folder / "evals" / "new.jsonl", [{"prompt": "x", "answer": "y"}])
    assert run(folder, "audit", "clean.jsonl") == 2
    assert "new.jsonl: this evaluation set is not in" in capsys.readouterr().err
    write_jsonl(folder / "evals" / "own.jsonl", [{"id": "q1", "prompt": "edited", "answer": "y"}])
    (folder / "evals" / "new.jsonl").unlink()
    assert run(folder, "audit", "clean.jsonl") == 2
    assert "changed since" in capsys.readouterr().err


def test_a_broken_line_is_named(folder, capsys):
    (folder / "clean.jsonl").write_text('{"text": "a"}\n{"text": \n')
    assert run(folder, "audit", "clean.jsonl") == 2
    assert "clean.jsonl:2" in capsys.readouterr().err
    (folder / "clean.jsonl").write_text("")
    assert run(folder, "audit", "clean.jsonl") == 2
    assert "the file is empty" in capsys.readouterr().err


@pytest.mark.parametrize("content", [{"sets": []}, {}, {"sets": {"own": {}}}, {"sets": {"own": 3}}])
def test_a_broken_registry_is_no_verdict(folder, capsys, content):
    """Status 1 would say "contaminated"."""
    write_json(folder / "evals" / "registry.json", {"format": "lifecycle-registry-1"} | content)
    capsys.readouterr()
    assert run(folder, "audit", "clean.jsonl") == 2
    error = capsys.readouterr().err
    assert "registry.json: an entry is missing or of another kind" in error and error.count("\n") == 1
