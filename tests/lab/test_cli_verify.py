"""The commands of rebuilding: exit status 0, 1 and 2, and one line on stderr for bad input."""

from __future__ import annotations

import json

import pytest

from lifecycle_lib.lab import cli, closure
from lifecycle_lib.lab.rebuild import pick
from tests.lab.chain import chain


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("LIFECYCLE_QUIET", "1")
    monkeypatch.delenv("LIFECYCLE_DEBUG", raising=False)


@pytest.fixture(scope="module")
def root() -> str:
    return str(chain().root)


def test_verify_says_what_to_expect_before_what_it_found(root, capsys):
    assert cli.main(["verify", "dpo", "--store", root, "--cases", "48"]) == 0
    out = capsys.readouterr().out
    assert out.index("expect: exact") < out.index("weights equal, logits equal") < out.index("holds: exact")
    assert out.endswith("PASS\n")
    assert cli.main(["verify", "sft", "--store", root, "--cases", "16"]) == 1  # nobody evaluated it
    assert capsys.readouterr().out.endswith("FAILED: the card lacks a report of its evaluation\n")


def test_verify_json_by_prefix_and_exit_1_for_a_missing_field(root, capsys):
    prefix = pick(chain(), "sft").fingerprint[:8]
    assert cli.main(["verify", prefix, "--store", root, "--cases", "48", "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert "exact" in result["held"] and "evaluation and prompts" in result["missing"]


@pytest.mark.parametrize("argv", [
    ["verify", "nosuch"], ["verify", "tokenizer"], ["verify", "dpo", "--cases", "1"], ["verify", "dpo", "--seed", "-1"],
    ["verify", "dpo", "--margin", "0"], ["verify", "dpo", "--corpus", "none.txt"],
    ["closure", "check", "dpo", "--budget-s", "0"], ["recipe", "check", "nosuch"],
    ["recipe", "diary", "--name", "nosuch"]])
def test_bad_input_is_one_line_and_status_2(root, argv, capsys):
    where = [] if argv[:2] == ["recipe", "check"] else ["--store", root]
    assert cli.main([*argv, *where]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("lifecycle: ") and captured.err.count("\n") == 1


def test_no_store_is_made_by_looking(tmp_path, capsys):
    assert cli.main(["verify", "dpo", "--store", str(tmp_path / "none")]) == 2
    assert not (tmp_path / "none").exists() and "there is no store" in capsys.readouterr().err


def test_freeze_check_diary(root, tmp_path, capsys):
    bundle = tmp_path / "bundle"
    assert cli.main(["recipe", "freeze", "int8", "--store", root, "--out", str(bundle), "--cases", "16"]) == 0
    assert "seal" in capsys.readouterr().out
    assert cli.main(["recipe", "check", str(bundle), "--store", root]) == 0
    assert capsys.readouterr().out.count("as frozen") == 4
    (bundle / "evals.json").write_text("{}\n")
    assert cli.main(["recipe", "check", str(bundle), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["evals"] == ["evals.json was changed"]
    assert cli.main(["recipe", "freeze", "int8", "--store", root, "--out", str(bundle)]) == 2
    capsys.readouterr()
    assert cli.main(["recipe", "diary", "--store", root, "--name", "eval"]) == 0
    assert "first of its name" in capsys.readouterr().out


def test_closure_check_passes_on_the_result_of_the_clean_room(root, monkeypatch, capsys):
    """The clean room itself is tested in test_closure.py."""
    for ok, code, word in ((True, 0, "PASS: because"), (False, 1, "REFUSED: because")):
        monkeypatch.setattr(closure, "gate", lambda *a, ok=ok, **k: {"ok": ok, "why": "because"})
        assert cli.main(["closure", "check", "dpo", "--store", root]) == code
        assert word in capsys.readouterr().out
