"""Quarantine: three doors, one role a row, never into what was kept; samples and agreement."""

import json

import numpy as np
import pytest
from statsmodels.stats.inter_rater import cohens_kappa

from lifecycle_lib.corpus import quarantine as Q
from lifecycle_lib.corpus.decisions import stream
from lifecycle_lib.corpus.gate import run_gate
from lifecycle_lib.corpus.rows import check_chain

ROW = {"source": "S", "licence": "MIT", "captured": "2024-05-01"}
SAY = {"reviewer": "Ada", "why": "looked at it", "on": "2024-06-01"}


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("LIFECYCLE_QUIET", "1")


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture
def folder(tmp_path):
    rows = [ROW | {"id": f"ok{i}", "text": f"the kettle number {i * 37} came late to the shop"} for i in range(30)]
    rows += [ROW | {"id": f"bad{i}", "text": f"you useless idiots , number {i} came late again"} for i in range(4)]
    rows += [ROW | {"id": f"nolicence{i}", "text": f"the lamp {i} came with no paper", "licence": ""} for i in range(3)]
    run_gate(write(tmp_path / "in.jsonl", rows), tmp_path / "out")
    return tmp_path / "out"


def ids(rows):
    return {r["id"] for r in rows}


def test_the_three_doors(folder):
    assert Q.send(folder, ["bad0"], "release", **SAY) == 1
    assert Q.send(folder, ["nolicence0", "bad1"], "reprocess", **SAY) == 3
    assert Q.send(folder, ["bad2"], "red_team", **SAY) == 4
    assert {i: n["door"] for i, n in Q.exits(folder).items()} == {
        "bad0": "release", "nolicence0": "reprocess", "bad1": "reprocess", "bad2": "red_team"}
    [released] = Q.leaving(folder, "release")
    assert [e["op"] for e in released["transformations"]] == ["gate", "release"] and check_chain(released) == 2
    assert released["transformations"][-1]["reviewer"] == "Ada"  # who admitted this record?
    [red] = Q.leaving(folder, "red_team")
    assert red["role"] == "red-team" and check_chain(red) == 3


def test_reprocess_with_the_licence_found_is_kept(folder, tmp_path):
    Q.send(folder, ["nolicence0"], "reprocess", **SAY)
    again = list(Q.leaving(folder, "reprocess", repair={"licence": "CC-BY-4.0"}))
    manifest = run_gate(write(tmp_path / "again.jsonl", again), tmp_path / "again")
    [kept] = stream(tmp_path / "again" / "kept.jsonl")
    assert manifest["counts"]["kept"] == 1 and kept["licence"] == "CC-BY-4.0"
    assert [e["op"] for e in kept["transformations"]] == ["gate", "assign", "reprocess", "gate"]
    assert check_chain(kept) == 4
    Q.send(folder, ["nolicence1"], "reprocess", **SAY)
    not_repaired = [r for r in Q.leaving(folder, "reprocess") if r["id"] == "nolicence1"]
    assert run_gate(write(tmp_path / "b.jsonl", not_repaired), tmp_path / "b")["counts"]["kept"] == 0


def test_quarantined_ids_never_enter_what_is_kept(folder, tmp_path):
    held, kept = ids(stream(folder / "quarantine.jsonl")), ids(stream(folder / "kept.jsonl"))
    assert len(held) == 7 and not held & kept
    Q.send(folder, ["bad2", "bad3"], "red_team", **SAY)
    everything = [*stream(folder / "kept.jsonl"), *Q.leaving(folder, "red_team"), *(
        r for r in stream(folder / "quarantine.jsonl") if r["id"] not in ("bad2", "bad3"))]
    run_gate(write(tmp_path / "all.jsonl", everything), tmp_path / "all")
    assert ids(stream(tmp_path / "all" / "kept.jsonl")) == kept  # not by the front door either
    assert not {"bad2", "bad3"} & ids(stream(tmp_path / "all" / "quarantine.jsonl"))  # red-team rows are rejected


@pytest.mark.parametrize("given, door, say, word", [
    (["bad0"], "bin", {}, "give one of"), (["ok1"], "release", {}, "not in quarantine"),
    (["nope"], "release", {}, "not in quarantine"), (["bad0", "bad0"], "release", {}, "leaves twice"),
    (["nolicence0"], "release", {}, "cannot be released"), (["bad0"], "release", {"reviewer": " "}, "a name"),
    (["bad0"], "release", {"why": ""}, "a reason"), (["bad0"], "release", {"on": "today"}, "a date")])
def test_refusals_note_nothing(folder, given, door, say, word):
    with pytest.raises(ValueError, match=word):
        Q.send(folder, given, door, **(SAY | say))
    assert Q.exits(folder) == {} and not (folder / "exits.jsonl").exists()


def test_a_row_has_one_role(folder):
    Q.send(folder, ["bad0"], "red_team", **SAY)
    with pytest.raises(ValueError, match="leaves twice"):
        Q.send(folder, ["bad0"], "release", **SAY)
    with pytest.raises(ValueError, match="only reprocess"):
        list(Q.leaving(folder, "red_team", repair={"licence": "MIT"}))


def test_sample_is_fair_and_repeats(folder):
    assert Q.sample(folder, 5, 0) == Q.sample(folder, 5, 0) != Q.sample(folder, 5, 1)
    drawn = [r["id"] for seed in range(300) for r in Q.sample(folder, 5, seed)]
    counts = [drawn.count(f"ok{i}") for i in range(30)]
    assert sum(counts) == 1500 and 20 < min(counts) and max(counts) < 85  # 50 expected, sd 6.5
    assert len(Q.sample(folder, 100, 0, of="quarantine")) == 7
    for n, of in ((0, "kept"), (1, "all")):
        with pytest.raises(ValueError, match="n="):
            Q.sample(folder, n, 0, of)


def test_kappa_by_hand_and_by_statsmodels():
    # 20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no: agreement .7, chance .5 * .6 + .5 * .4 = .5
    a = ["y"] * 25 + ["n"] * 25
    b = ["y"] * 20 + ["n"] * 5 + ["y"] * 10 + ["n"] * 15
    assert Q.kappa(a, b)[0] == pytest.approx(0.4)
    for seed in range(10):
        draw = np.random.default_rng(seed)
        a, b = draw.integers(0, 3, 80), draw.integers(0, 3, 80)
        b = np.where(draw.random(80) < .6, a, b)
        peer = cohens_kappa(np.array([[((a == i) & (b == j)).sum() for j in range(3)] for i in range(3)]))
        assert Q.kappa(a.tolist(), b.tolist()) == pytest.approx((peer.kappa, peer.kappa_low, peer.kappa_upp))


@pytest.mark.parametrize("a, b, word", [([], [], "at least 2"), ([1], [1], "at least 2"), ([1, 2], [1], "2 and 1"),
                                        ([1, 1], [1, 1], "more than one kind")])
def test_kappa_refuses(a, b, word):
    with pytest.raises(ValueError, match=word):
        Q.kappa(a, b)
