"""The gate: verdicts by hand, counts that partition the lines, the same hash again, broken gates that are caught."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import jsonschema
import pytest

from lifecycle_lib.core.records import read_jsonl
from lifecycle_lib.corpus import gate
from lifecycle_lib.corpus.filters import VERDICTS, Ruleset
from lifecycle_lib.corpus.gate import GateConfig, run_gate
from lifecycle_lib.corpus.manifest import KEPT, manifest_hash, read_manifest
from lifecycle_lib.corpus.rows import check_chain

ROOT = Path(__file__).resolve().parents[2]
WORDS = "kettle mug lamp courier label refund shop order window parcel desk clerk note day week box form page".split()


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("LIFECYCLE_QUIET", "1")


def row(i, **more):
    text = " ".join(random.Random(i).choices(WORDS, k=12))
    return {"id": f"r{i}", "text": text, "source": "S", "licence": "CC0-1.0", "captured": "2024-05-01", "slice": "x",
            "domain": "d"} | more


def write(path, rows):
    path.write_bytes(b"\n".join(r if isinstance(r, bytes) else json.dumps(r).encode() for r in rows) + b"\n")
    return path


def gated(tmp_path, rows, config=None, out="out"):
    manifest = run_gate(write(tmp_path / "in.jsonl", rows), tmp_path / out, config)
    return manifest, decisions(tmp_path / out)


def decisions(folder):
    return read_jsonl(folder / "decisions.jsonl")


def verdict_of(tmp_path, one, config=None):
    _, [decision] = gated(tmp_path, [one], config)
    return decision["verdict"], decision["reason"]


@pytest.mark.parametrize("change, config, wanted", [
    ({}, {}, ("admit", "passed")),
    ({"licence": None}, {}, ("quarantine", "no_licence")), ({"licence": ""}, {}, ("quarantine", "no_licence")),
    ({"licence": "NOASSERTION"}, {}, ("quarantine", "no_licence")),
    ({"source": "unknown"}, {}, ("quarantine", "no_source")),
    ({"captured": "spring"}, {}, ("accept_with_risk", "no_capture_date")),
    ({"role": "red-team"}, {}, ("reject", "eval_only")),
    ({"source": "NEW"}, {"allowed_sources": ("S",)}, ("quarantine", "unseen_source")),
    ({}, {"allowed_sources": ("S",)}, ("admit", "passed")),
    ({"text": "ok"}, {}, ("reject", "too_short")),
    ({"text": "ok", "licence": ""}, {}, ("reject", "too_short")),  # the strictest decides
    ({"text": "the kettle of mr. x: write to a.b@example.org"}, {}, ("quarantine", "pii")),
    ({"text": "the kettle of mr. x: write to a.b@example.org"}, {"pii": "mask"}, ("accept_with_risk", "pii_masked")),
    ({"text": "the kettle of mr. x: write to a.b@example.org"}, {"pii": "off"}, ("admit", "passed")),
    ({"text": "the kettle came on 2024-05-01 and it is broken"}, {}, ("admit", "passed")),
    ({"text": "you useless idiots , send me the label"},
     {"ruleset": Ruleset(version="1.1.0", verdicts={"abuse": "accept_with_risk"})}, ("accept_with_risk", "abuse"))])
def test_verdicts(tmp_path, change, config, wanted):
    assert verdict_of(tmp_path, row(1, **change), GateConfig(**config)) == wanted


@pytest.mark.parametrize("field", ["licence", "source"])
def test_a_row_without_the_field_is_quarantined_never_kept(tmp_path, field):
    bare = {k: v for k, v in row(1).items() if k != field}
    assert verdict_of(tmp_path, bare) == ("quarantine", f"no_{field}")
    assert (tmp_path / "out" / "kept.jsonl").read_bytes() == b""


def test_a_small_file_by_hand(tmp_path):
    rows = [row(1), row(2, licence=""), b"{broken", row(1, id="copy"), row(3, text="ok"), row(4, captured=None), b"",
            row(5, id="r1"), b"caf\xe9", row(6)]
    manifest, log = gated(tmp_path, rows)
    assert [d["line"] for d in log] == list(range(1, 11))
    assert [(d["verdict"], d["reason"]) for d in log] == [
        ("admit", "passed"), ("quarantine", "no_licence"), ("reject", "not_json"), ("reject", "exact_duplicate"),
        ("reject", "too_short"), ("accept_with_risk", "no_capture_date"), ("reject", "blank_line"),
        ("reject", "duplicate_id"), ("reject", "not_utf8"), ("admit", "passed")]
    assert log[3]["details"] == [{"stage": "exact", "reason": "exact_duplicate", "verdict": "reject", "of_line": 1}]
    assert log[4]["details"][0]["measured"] == 2 and {d["rules"] for d in log} == {"1.0.0"}
    counts = manifest["counts"]
    assert counts["verdict"] == {"admit": 2, "accept_with_risk": 1, "quarantine": 1, "reject": 6}
    assert (counts["lines"], counts["kept"], counts["lost"]) == (10, 3, 3)  # a blank line loses nothing
    assert manifest["by"]["source"] == {"(unreadable)": dict(zip(VERDICTS, (0, 0, 0, 4))),
                                        "S": dict(zip(VERDICTS, (2, 1, 1, 2)))}
    kept = read_jsonl(tmp_path / "out" / "kept.jsonl")
    assert [r["id"] for r in kept] == ["r1", "r4", "r6"]
    for r in kept:
        original = {k: v for k, v in r.items() if k != "transformations"}
        assert original in rows and check_chain(r) == 1
    assert [r["id"] for r in read_jsonl(tmp_path / "out" / "quarantine.jsonl")] == ["r2"]


def test_a_quarantined_or_rejected_row_is_never_the_copy_that_counts(tmp_path):
    email = "the kettle is broken, write to a.b@example.org and to no one else at the desk"
    near = "the kettle is broken, write to a friend and to no one else at the desk today please"
    rows = [row(1, licence=""), row(1, id="licensed"), row(2, text=email), row(3, text=near)]
    _, log = gated(tmp_path, rows, GateConfig(near_threshold=0.3, near_k=2))
    assert [d["verdict"] for d in log] == ["quarantine", "admit", "quarantine", "admit"]


def test_a_row_held_for_personal_data_is_never_the_exact_copy_that_counts(tmp_path):
    email = row(1, text="the kettle is broken, write to a.b@example.org")
    plain = row(2, text="the kettle is broken, write to a b example org")  # the same words, nobody's address
    again = row(3, text="The kettle is broken; write to a.b@example.org!")
    _, log = gated(tmp_path, [email, plain, again, row(4, text=plain["text"])])
    assert [d["reason"] for d in log] == ["pii", "passed", "exact_duplicate", "exact_duplicate"]
    assert [d["details"][0]["of_line"] for d in log[2:]] == [2, 2]
    masked, log = gated(tmp_path, [email, again], GateConfig(pii="mask"), out="masked")
    assert [d["reason"] for d in log] == ["pii_masked", "exact_duplicate"]


@pytest.mark.parametrize("change", [{"licence": "MIT"}, {"source": "MIRROR"}, {"text": "another text of the same row"}])
def test_a_row_changed_behind_its_log_is_quarantined(tmp_path, change):
    gated(tmp_path, [row(1)])
    [kept] = read_jsonl(tmp_path / "out" / "kept.jsonl")
    _, log = gated(tmp_path, [kept, row(2, id="other")], out="again")
    assert [d["verdict"] for d in log] == ["admit", "admit"]  # as it was: through
    _, [decision] = gated(tmp_path, [kept | change], out="changed")
    assert (decision["verdict"], decision["reason"]) == ("quarantine", "broken_log")
    assert "was changed after" in decision["details"][0]["message"]


def test_near_copies_and_protected_slices(tmp_path):
    long = " ".join(WORDS)
    rows = [row(1, text=long), row(2, text=long + " again"), row(3, text=long + " today", slice="rare"), row(4)]
    _, log = gated(tmp_path, rows, GateConfig(near_threshold=0.7))
    assert [d["reason"] for d in log] == ["passed", "near_duplicate", "near_duplicate", "passed"]
    # 18 words are 14 shingles of 5; one word more adds one
    assert log[1]["details"] == [{"stage": "near", "reason": "near_duplicate", "verdict": "reject", "limit": 0.7,
                                  "jaccard": round(14 / 15, 4), "of_line": 1}]
    _, log = gated(tmp_path, rows, GateConfig(near_threshold=0.7, protect_under=2))
    assert [d["reason"] for d in log] == ["passed", "near_duplicate", "passed", "passed"]
    _, log = gated(tmp_path, rows, GateConfig(near_threshold=0.7, near_per_cluster=3))
    assert {d["reason"] for d in log} == {"passed"}


@pytest.mark.parametrize("seed", range(3))
def test_near_copies_are_those_of_brute_force(tmp_path, seed):
    """Outside oracle: all pairs by sets, components by search, the first of each stays."""
    draw, rows = random.Random(seed), []
    for i in range(60):
        words = rows[draw.randrange(len(rows))]["text"].split() if rows and draw.random() < .6 else [
            "".join(draw.choices("abcdefghijkl", k=5)) for _ in range(14)]
        words[draw.randrange(14)] = f"word{chr(97 + i % 26)}{chr(97 + i // 26)}"
        rows.append(row(i, text=" ".join(words)))
    sets = [{tuple(w[j:j + 3]) for j in range(12)} for w in (r["text"].split() for r in rows)]
    edges = {i: [j for j in range(60) if len(sets[i] & sets[j]) / len(sets[i] | sets[j]) >= 0.5] for i in range(60)}
    first = {}
    for i in range(60):
        todo = [i]
        while todo:
            if (j := todo.pop()) not in first:
                first[j] = i
                todo += edges[j]
    _, log = gated(tmp_path, rows, GateConfig(near_threshold=0.5, near_k=3))
    assert [d["reason"] == "near_duplicate" for d in log] == [first[i] != i for i in range(60)]
    assert all(d["details"][0]["of_line"] == first[d["line"] - 1] + 1 for d in log if d["details"])
    assert 5 < sum(first[i] != i for i in first) < 55


def test_masked_text_is_what_is_kept_and_the_log_says_so(tmp_path):
    gated(tmp_path, [row(1, text="write to a.b@example.org about the kettle")], GateConfig(pii="mask"))
    [kept] = read_jsonl(tmp_path / "out" / "kept.jsonl")
    assert kept["text"] == "write to [EMAIL] about the kettle"
    assert [e["op"] for e in kept["transformations"]] == ["mask", "gate"] and check_chain(kept) == 2
    assert "example.org" not in (tmp_path / "out" / "decisions.jsonl").read_text()


def test_no_verdict_reads_the_truth(tmp_path):
    rows = [row(i) for i in range(30)]
    plain, _ = gated(tmp_path, rows, out="a")
    told, _ = gated(tmp_path, [r | {"truth": {"defect": "spam", "cluster": "c"}} for r in rows], out="b")
    assert plain["counts"]["verdict"] == told["counts"]["verdict"]
    assert plain["files"]["decisions.jsonl"] == told["files"]["decisions.jsonl"]


# ---- accounting

def mixed(draw, n):
    """Random good and bad lines."""
    makers = (lambda i: row(i), lambda i: row(i), lambda i: row(i % 7, id=f"copy{i}"), lambda i: row(i, licence=""),
              lambda i: b"{" + b"x" * draw.randint(0, 50), lambda i: b"\xff\xfe" * draw.randint(1, 9), lambda i: b"",
              lambda i: row(i, id="r0"), lambda i: row(i, text="x"), lambda i: row(i, captured=None),
              lambda i: b"[%d]" % i, lambda i: row(i, text="y" * 3000),
              lambda i: row(i, text="call +1 202 555 0142 now"),
              lambda i: b'{"id":"u%d","text":"\\ud800 %d"}' % (i, i))
    return [row(999), *(draw.choice(makers)(i) for i in range(n))]


@pytest.mark.parametrize("seed", range(8))
def test_counts_partition_the_lines(tmp_path, seed):
    draw = random.Random(seed)
    lines = mixed(draw, draw.randint(1, 120))
    config = GateConfig(max_line_bytes=2000, pii=draw.choice(("mask", "off")), near_threshold=draw.choice((0, 0.8)))
    manifest, log = gated(tmp_path, lines, config)
    assert [d["line"] for d in log] == list(range(1, len(lines) + 1))  # each exactly once
    by_verdict = {v: [d["id"] for d in log if d["verdict"] == v] for v in VERDICTS}
    assert sum(map(len, by_verdict.values())) == manifest["counts"]["lines"] == len(lines)
    kept = [json.loads(s) for s in (tmp_path / "out" / "kept.jsonl").read_text().splitlines()]
    held = [json.loads(s) for s in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert [r["id"] for r in kept] == [d["id"] for d in log if d["verdict"] in KEPT]
    assert [r["id"] for r in held] == by_verdict["quarantine"]
    assert not {r["id"] for r in kept} & {r["id"] for r in held}
    assert all(r["licence"] and r["source"] for r in kept)
    assert Counter(d["reason"] for d in log) == manifest["counts"]["reason"]
    again = run_gate(tmp_path / "in.jsonl", tmp_path / "again", config)
    assert again == manifest == read_manifest(tmp_path / "again")


def broken(monkeypatch, name):
    if name == "forgets quarantined rows":
        put = gate._Out._put
        monkeypatch.setattr(gate._Out, "_put", lambda self, file, r: file == "quarantine.jsonl" or put(self, file, r))
    elif name == "skips a decision":
        write = gate._Out.write
        monkeypatch.setattr(gate._Out, "write", lambda self, r, d: d["line"] == 3 or write(self, r, d))
    elif name == "reader swallows bad lines":
        read = gate.read_rows
        monkeypatch.setattr(gate, "read_rows", lambda *a: ((n, r) for n, r in read(*a) if isinstance(r, dict)))
    elif name == "counts a row twice":
        add = gate.Tally.add
        monkeypatch.setattr(gate.Tally, "add", lambda self, d: [add(self, d) for _ in range(1 + (d["line"] == 2))])
    elif name == "keeps a row twice":
        put = gate._Out._put
        monkeypatch.setattr(gate._Out, "_put", lambda self, file, r: [
            put(self, file, r) for _ in range(1 + (file == "kept.jsonl" and r["id"] == "r1"))])


@pytest.mark.parametrize("name", ["forgets quarantined rows", "skips a decision", "reader swallows bad lines",
                                  "counts a row twice", "keeps a row twice"])
def test_a_broken_gate_does_not_add_up_and_leaves_nothing(tmp_path, monkeypatch, name):
    rows = [row(1), row(2, licence=""), b"{", row(4)]
    gated(tmp_path, rows)  # the sound gate passes
    broken(monkeypatch, name)
    with pytest.raises(ValueError, match="does not add up"):
        gated(tmp_path, rows, out="bad")
    assert not (tmp_path / "bad").exists()


# ---- the hash

def test_hash_says_input_config_and_rules_and_nothing_else(tmp_path):
    rows = [row(i) for i in range(5)]
    first, _ = gated(tmp_path, rows)
    time.sleep(0.01)
    (tmp_path / "moved").mkdir()
    path = write(tmp_path / "moved" / "other name.jsonl", rows)
    assert run_gate(path, tmp_path / "b")["hash"] == first["hash"] == manifest_hash(first)
    assert run_gate(path, tmp_path / "b", GateConfig(near_k=3))["hash"] != first["hash"]
    assert run_gate(path, tmp_path / "b", GateConfig(ruleset=Ruleset(version="1.0.1")))["hash"] != first["hash"]
    assert gated(tmp_path, rows[::-1], out="c")[0]["hash"] != first["hash"]
    assert str(tmp_path) not in (tmp_path / "out" / "manifest.json").read_text()


def test_kept_rows_fit_the_schema_and_others_do_not(tmp_path):
    schema = json.loads((ROOT / "data" / "schemas" / "provenance.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    check = jsonschema.Draft202012Validator(schema).is_valid
    gated(tmp_path, mixed(random.Random(0), 80), GateConfig(pii="mask"))
    kept = read_jsonl(tmp_path / "out" / "kept.jsonl")
    assert len(kept) > 10 and all(map(check, kept))
    for change in ({"licence": ""}, {"licence": "NoAssertion"}, {"source": " "}, {"id": 7}, {"role": "red-team"},
                   {"transformations": []}, {"transformations": [{"op": "crawl"}]}):
        assert not check(kept[0] | change)
    assert not any(map(check, read_jsonl(tmp_path / "out" / "quarantine.jsonl")))


# ---- bad input, interruption

@pytest.mark.parametrize("data, word", [(b"", "empty"), (None, "cannot be read"), ("{}".encode("utf-16"), "UTF-16")])
def test_files_of_no_use_leave_no_folder(tmp_path, data, word):
    path = tmp_path / "in.jsonl"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ValueError, match=word):
        run_gate(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="folder"):
        run_gate(tmp_path, tmp_path / "out")


def test_the_input_is_never_overwritten_nor_what_reviewers_said(tmp_path):
    gated(tmp_path, [row(1)])
    for path in (tmp_path / "out" / "kept.jsonl", tmp_path / "out" / ".." / "out" / "kept.jsonl"):
        with pytest.raises(ValueError, match="would be overwritten"):
            run_gate(path, tmp_path / "out")
    again = run_gate(tmp_path / "out" / "kept.jsonl", tmp_path / "twice")
    assert again["counts"]["verdict"]["admit"] == 1  # gating what was kept keeps it
    (tmp_path / "out" / "exits.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="reviewers"):
        run_gate(tmp_path / "in.jsonl", tmp_path / "out")


def test_unwritable_places(tmp_path):
    path = write(tmp_path / "in.jsonl", [row(1)])
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "deeper", Path("/proc/nothing")):
        with pytest.raises(ValueError, match="cannot be written"):
            run_gate(path, out)
    if os.geteuid():
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(ValueError, match="cannot be written"):
            run_gate(path, tmp_path / "closed")


def test_an_error_on_the_way_leaves_the_old_result(tmp_path, monkeypatch):
    manifest, _ = gated(tmp_path, [row(i) for i in range(50)])
    (tmp_path / "out" / "notes.txt").write_text("mine")
    for error in (KeyboardInterrupt(), OSError(28, "No space left on device"), RuntimeError()):
        def fail(*args, error=error):
            raise error
        with monkeypatch.context() as patch:
            patch.setattr(gate, "apply_filters", fail)
            with pytest.raises((KeyboardInterrupt, ValueError, RuntimeError)):
                run_gate(tmp_path / "in.jsonl", tmp_path / "out")
        assert read_manifest(tmp_path / "out") == manifest
        assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
            "decisions.jsonl", "kept.jsonl", "manifest.json", "notes.txt", "quarantine.jsonl"]


def test_a_killed_run_leaves_no_result_and_the_next_one_starts_over(tmp_path):
    path = write(tmp_path / "in.jsonl", [row(i) for i in range(20_000)])
    code = f"from lifecycle_lib.corpus.gate import run_gate; run_gate({str(path)!r}, {str(tmp_path / 'out')!r})"
    env = os.environ | {"PYTHONPATH": str(ROOT), "LIFECYCLE_QUIET": "1"}
    process = subprocess.Popen([sys.executable, "-c", code], env=env)
    limit = time.monotonic() + 30
    while not list(tmp_path.glob("out/.gate-*/kept.jsonl")) and time.monotonic() < limit:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert [p.name[:6] for p in (tmp_path / "out").iterdir()] == [".gate-"]
    with pytest.raises(ValueError, match="no finished gate run"):
        read_manifest(tmp_path / "out")
    write(path, [row(1)])
    run_gate(path, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "decisions.jsonl", "kept.jsonl", "manifest.json", "quarantine.jsonl"]


@pytest.mark.parametrize("given, word", [
    ([], "object is needed"), ({"rules": {}}, "unknown field 'rules'"), ({"ruleset": 3}, "object is needed"),
    ({"ruleset": {"version": "1"}}, "semantic version"), ({"ruleset": {"spam": 1}}, "unknown field 'spam'"),
    ({"pii": "no"}, "quarantine, mask or off"), ({"pii_kinds": ["NAME"]}, "pii_kinds"), ({"pii_kinds": "PHONE"}, "pii"),
    ({"near_threshold": 2}, "near_threshold=2"), ({"near_threshold": True}, "near_thr"), ({"near_k": 0}, "near_k"),
    ({"near_rule": "hardest"}, "near_rule"), ({"near_per_cluster": 1.5}, "near_per"),
    ({"allowed_sources": "S"}, "allowed_sources"), ({"allowed_sources": [1]}, "allowed_sources"),
    ({"exact": 1}, "exact"), ({"max_line_bytes": 1}, "max_line_bytes"), ({"protect_under": -1}, "protect_under")])
def test_config_refuses(given, word):
    with pytest.raises(ValueError, match=word) as error:
        GateConfig.from_dict(given, "my.json")
    assert str(error.value).startswith("my.json: ")


def test_config_comes_back_from_the_manifest(tmp_path):
    config = GateConfig(allowed_sources=("S",), near_threshold=0.5, ruleset=Ruleset(version="2.0.0", min_chars=1,
                                                                                   verdicts={"spam": "quarantine"}))
    manifest, _ = gated(tmp_path, [row(1)], config)
    assert GateConfig.from_dict(manifest["config"]) == config
    assert {f.name for f in dataclasses.fields(GateConfig)} == set(manifest["config"])


def test_counts_of_many_names_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("lifecycle_lib.corpus.manifest.MAX_NAMES", 3)
    manifest, _ = gated(tmp_path, [row(i, source=f"s{i}") for i in range(9)])
    assert {k: sum(v.values()) for k, v in manifest["by"]["source"].items()} == {"s0": 1, "s1": 1, "s2": 1,
                                                                                 "(others)": 6}


@pytest.mark.parametrize("said, reason", [("CC BY 4.0", "licence_not_spdx"), ("MIT or so", "licence_not_spdx"),
                                          ("mit", None), ("LicenseRef-partner", None), ("MIT OR CC0-1.0", None)])
def test_a_licence_that_is_no_spdx_expression_is_set_aside(tmp_path, said, reason):
    manifest, _ = gated(tmp_path, [row(1), row(2, licence=said)])
    assert manifest["counts"]["reason"].get("licence_not_spdx", 0) == (reason is not None)


def test_the_american_spelling_is_pointed_at(tmp_path):
    american = {k: v for k, v in row(2).items() if k != "licence"} | {"license": "MIT"}
    gated(tmp_path, [row(1), american])
    [_, second] = read_jsonl(tmp_path / "out" / "decisions.jsonl")
    assert "spell it" in json.dumps(second)


def test_a_csv_is_refused_by_name(tmp_path):
    (tmp_path / "in.csv").write_text("text,category\nhello,a\n")
    with pytest.raises(ValueError, match="this is CSV; write it as JSONL first"):
        run_gate(tmp_path / "in.csv", tmp_path / "out")
