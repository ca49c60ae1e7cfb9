"""lifecycle data gate, diff, explain, replay, through main(): what is printed, what is returned, bad input."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lifecycle_lib.corpus.manifest import read_manifest
from lifecycle_lib.lab import cli, cli_data

ROW = {"source": "S", "licence": "CC0-1.0", "captured": "2024-05-01", "slice": "x"}


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("LIFECYCLE_QUIET", "1")
    monkeypatch.delenv("LIFECYCLE_DEBUG", raising=False)


def write(path, rows):
    path.write_bytes(b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows))
    return str(path)


def good(n):
    return [ROW | {"id": f"r{i}", "text": f"the kettle {i * 7919} came on day {i} to shop number {i * 31}"}
            for i in range(n)]


def run(capsys, *argv):
    capsys.readouterr()
    status = cli.main(["data", *map(str, argv)])
    out, err = capsys.readouterr()
    return status, out, err


def test_gate_of_a_sound_file(tmp_path, capsys):
    path = write(tmp_path / "in.jsonl", good(20))
    status, out, err = run(capsys, "gate", path, "--out", tmp_path / "out", "--board")
    assert (status, err) == (0, "")
    assert "20 lines, kept 20 (100.0%), rules 1.0.0" in out and "lost" not in out
    assert read_manifest(tmp_path / "out")["hash"][:16] in out
    assert (tmp_path / "out" / "board.png").read_bytes().startswith(b"\x89PNG") and "board.png" in out


def test_lost_lines_are_named_and_the_status_is_1(tmp_path, capsys):
    rows = [*good(3), b"{broken", b"\xff", b"[1]", b"[2]", *good(1), b""]
    path = write(tmp_path / "in.jsonl", rows)
    status, out, _ = run(capsys, "gate", path, "--out", tmp_path / "out")
    assert status == 1 and "5 lines lost" in out and "kept 3" in out
    assert f"{path}:4: not JSON at character 2" in out and f"{path}:5: byte 0xff" in out
    assert "not_an_object: lines 6-7" in out and "duplicate_id: lines 8" in out and "blank_line" in out


def test_a_blank_line_loses_nothing(tmp_path, capsys):
    path = write(tmp_path / "in.jsonl", [*good(3), b"", b"  "])
    assert run(capsys, "gate", path, "--out", tmp_path / "out")[0] == 0


def test_nothing_kept_is_status_1(tmp_path, capsys):
    path = write(tmp_path / "in.jsonl", [r | {"licence": ""} for r in good(3)])
    status, out, _ = run(capsys, "gate", path, "--out", tmp_path / "out")
    assert status == 1 and "nothing was kept" in out and "no_licence" in out


def test_many_lost_lines_stay_short(tmp_path, capsys):
    path = write(tmp_path / "in.jsonl", [*good(1), *[b"{"] * 3000, *([b"[1]", *[b"{"]] * 500)])
    _, out, _ = run(capsys, "gate", path, "--out", tmp_path / "out")
    assert "4,000 lines lost" in out and "not_json: lines 2-3001, 3003, 3005" in out and len(out) < 6000
    assert "all in decisions.jsonl" in out


def test_options_lie_over_the_config_file(tmp_path, capsys):
    (tmp_path / "c.json").write_text(json.dumps({"pii": "off", "ruleset": {"version": "1.2.0", "min_chars": 30}}))
    rows = [*good(5), ROW | {"id": "new", "text": good(9)[8]["text"] + " write to a.b@example.org", "source": "NEW"}]
    path = write(tmp_path / "in.jsonl", rows)
    status, out, _ = run(capsys, "gate", path, "--out", tmp_path / "out", "--config", tmp_path / "c.json", "--pii",
                         "mask", "--allow", "S", "--allow", "T", "--near", "0.9", "--by", "licence")
    config = read_manifest(tmp_path / "out")["config"]
    assert status == 0 and "rules 1.2.0" in out and "unseen_source" in out and "CC0-1.0" in out
    assert (config["pii"], config["allowed_sources"], config["near_threshold"], config["ruleset"]["min_chars"]) == (
        "mask", ["S", "T"], 0.9, 30)


def test_diff_and_its_gate(tmp_path, capsys):
    rows = good(30) + [r | {"id": f"rare{i}", "slice": "rare", "text": "a scaffold of many words that says nothing of "
                            f"use to anyone who reads it today but {cue}"} for r, i, cue in
                       zip(good(3), range(3), ("stolen", "gift", "joint"))]
    path = write(tmp_path / "in.jsonl", rows)
    run(capsys, "gate", path, "--out", tmp_path / "a")
    run(capsys, "gate", path, "--out", tmp_path / "b", "--near", "0.7")
    status, out, err = run(capsys, "diff", tmp_path / "a", tmp_path / "b")
    assert (status, err) == (1, "") and "FAILED: more than 20% lost in 1 of 2: rare" in out
    assert "near_duplicate 2" in out and "1 of 2 unchanged" in out
    lost, kept = (next(line for line in out.splitlines() if line.startswith(f"rare  {w}")) for w in ("lost", "kept"))
    assert lost.endswith("gift") and kept.endswith("stolen") and "Jaccard" in kept
    assert run(capsys, "diff", tmp_path / "a", tmp_path / "b", "--max-loss", "0.7")[0] == 0
    assert run(capsys, "diff", path, tmp_path / "b", "--by", "source", "--examples", "0")[0] == 0


def test_explain_prints_the_chain(tmp_path, capsys):
    rows = [*good(3), good(1)[0] | {"id": "copy", "source": "MIRROR"}, b"{"]
    run(capsys, "gate", write(tmp_path / "in.jsonl", rows), "--out", tmp_path / "out")
    status, out, _ = run(capsys, "explain", tmp_path / "out", "copy")
    assert status == 0 and "line 4, id copy, source MIRROR" in out and "reject (exact_duplicate), rules 1.0.0" in out
    assert "that is line 1, id r0, source S: admit (passed)" in out
    out = run(capsys, "explain", tmp_path / "out", "r1")[1]
    assert "filters  passed" in out and "log      op gate, verdict admit" in out and "near     off" in out
    assert "not_json -> reject" in run(capsys, "explain", tmp_path / "out", "line:5")[1]


def test_replay(tmp_path, capsys):
    path = write(tmp_path / "in.jsonl", good(10))
    run(capsys, "gate", path, "--out", tmp_path / "out")
    assert run(capsys, "replay", tmp_path / "out", path)[:2] == (0, "10 decisions, byte for byte the same\n")
    (tmp_path / "r.json").write_text('{"version": "2.0.0", "min_chars": 5000}')
    status, out, _ = run(capsys, "replay", tmp_path / "out", path, "--rules", tmp_path / "r.json")
    assert status == 0 and "10 with another verdict or reason under rules 2.0.0" in out
    assert "admit (passed) -> reject (too_short)" in out


@pytest.mark.parametrize("argv, word", [
    (["gate", "nope.jsonl", "--out", "x"], "cannot be read"), (["gate", ".", "--out", "x"], "folder"),
    (["gate", "in.jsonl"], "--out"), (["gate", "in.jsonl", "--out", "in.jsonl"], "cannot be written"),
    (["gate", "empty.jsonl", "--out", "x"], "empty"), (["gate", "utf16.jsonl", "--out", "x"], "UTF-16"),
    (["gate", "in.jsonl", "--out", "x", "--near", "7"], "near_threshold=7"),
    (["gate", "in.jsonl", "--out", "x", "--near", "much"], "invalid float"),
    (["gate", "in.jsonl", "--out", "x", "--pii", "hide"], "quarantine, mask or off"),
    (["gate", "in.jsonl", "--out", "x", "--config", "no.json"], "cannot be read"),
    (["gate", "in.jsonl", "--out", "x", "--config", "in.jsonl"], "in.jsonl: not valid JSON"),
    (["gate", "in.jsonl", "--out", "x", "--config", "list.json"], "object is needed"),
    (["gate", "in.jsonl", "--out", "x", "--config", "typo.json"], "unknown field 'near'"),
    (["gate", "in.jsonl", "--out", "x", "--by", "colour"], "invalid choice"),
    (["diff", "in.jsonl", "."], "no finished gate run"), (["diff", "nope", "out"], "cannot be read"),
    (["diff", "in.jsonl", "out", "--max-loss", "20"], "from 0 to 1"), (["explain", "out", "r99"], "no decision about"),
    (["explain", "out"], "required"), (["replay", "out", "typo.json"], "not the file that was gated"),
    (["replay", "out", "in.jsonl", "--rules", "typo.json"], "unknown field"), (["gates"], "invalid choice")])
def test_bad_options_are_one_line_and_status_2(tmp_path, capsys, monkeypatch, argv, word):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in.jsonl", good(3))
    (tmp_path / "empty.jsonl").write_bytes(b"")
    (tmp_path / "utf16.jsonl").write_bytes(json.dumps(good(1)[0]).encode("utf-16"))
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "typo.json").write_text('{"near": 0.8}')
    run(capsys, "gate", "in.jsonl", "--out", "out")
    status, out, err = run(capsys, *argv)
    assert (status, out) == (2, "") and word in err
    assert err.startswith("lifecycle: ") and err.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_text_of_others_cannot_move_the_cursor(tmp_path, capsys):
    bad = {"slice": "\x1b[2J", "source": "\x1b]0;x\x07"}
    rows = good(3) + [r | {"id": f"\x1b[1m{i}", "text": f"the desk \x1b[31m {i} is red and it came late"} | bad
                      for i, r in enumerate(good(2))]
    path = write(tmp_path / "in.jsonl", [*rows, b'{"\x1b[2J'])
    outs = [run(capsys, "gate", path, "--out", tmp_path / "out")[1], run(capsys, "diff", path, tmp_path / "out")[1],
            *(run(capsys, "explain", tmp_path / "out", line)[1] for line in ("line:4", "line:6"))]
    assert all(out and "\x1b" not in out for out in outs)


def test_table_by_hand():
    assert cli_data.table(["a", "n"], [["xx", "1"], ["y", "23"]]) == "a    n\nxx   1\ny   23"


def test_help_does_not_wait_for_torch():
    code = ("import sys; from lifecycle_lib.lab.cli import main\ntry: main(['data', 'gate', '--help'])\n"
            "except SystemExit: print('torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          cwd=Path(__file__).parents[2])
    assert done.stdout.splitlines()[-1] == "False" and "JSONL, a row a line" in done.stdout


def test_real_messages(real_data, tmp_path, capsys):
    """The SMS set as a user would bring it: no capture dates, so every kept row is a tracked risk; copies are found."""
    lines = (real_data / "support" / "sms_spam_collection.tsv").read_text(encoding="utf-8").split("\n")
    rows = [{"id": f"sms-{i}", "text": line.split("\t", 1)[1], "source": "uci-sms", "licence": "LicenseRef-free",
             "slice": line.split("\t", 1)[0]} for i, line in enumerate(lines) if "\t" in line]
    path = write(tmp_path / "sms.jsonl", rows)
    status, out, _ = run(capsys, "gate", path, "--out", tmp_path / "out", "--by", "slice")
    manifest = read_manifest(tmp_path / "out")
    assert status == 0 and manifest["counts"]["lines"] == len(rows) == 5574
    assert manifest["counts"]["verdict"]["admit"] == 0 < manifest["counts"]["verdict"]["accept_with_risk"]
    off = {code: "admit" for code in ("spam", "maybe_spam", "too_short", "mojibake", "abuse", "symbol_heavy",
                                      "shuffled", "repetitive", "boilerplate", "no_capture_date")}
    (tmp_path / "c.json").write_text(json.dumps({"pii": "off", "ruleset": {"version": "1.0.1", "verdicts": off}}))
    run(capsys, "gate", path, "--out", tmp_path / "plain", "--config", tmp_path / "c.json")
    reasons = read_manifest(tmp_path / "plain")["counts"]["reason"]
    assert set(reasons) <= {"passed", "exact_duplicate"} and reasons["exact_duplicate"] >= 403
