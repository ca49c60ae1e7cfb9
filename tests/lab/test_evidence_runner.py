"""The evidence runner's arithmetic: effects paired by seed, verdicts, and what the committed files say."""

import dataclasses
import json
from pathlib import Path

import pytest
from scipy import stats

from lifecycle_lib.core.stats import Effect
from lifecycle_lib.lab import evidence
from lifecycle_lib.lab.design import equivalence, summarise
from lifecycle_lib.lab.evidence import DESIGNS, cheated, conclude_again, run

RESULTS = Path(__file__).resolve().parents[2] / "data" / "results"
KEYS = {"id", "claim", "notebook", "rows", "seeds", "effects", "verdict", "falsifier", "run_cards", "device", "seconds"}


def small_design(**changes):
    design = dataclasses.replace(DESIGNS["rlvr_gain"], effects=(("gain", "after", "before", "share"),), also=())
    return dataclasses.replace(design, **changes)


def test_effects_are_paired_by_seed_as_scipy_pairs_them():
    rows = [{"before": b, "after": a} for b, a in ((0.60, 0.85), (0.70, 0.90), (0.65, 0.93))]
    effects, verdict = summarise(small_design(), rows)
    oracle = stats.ttest_rel([0.85, 0.90, 0.93], [0.60, 0.70, 0.65]).confidence_interval(0.95)
    assert effects[0]["estimate"] == pytest.approx(0.73 / 3)
    assert (effects[0]["low"], effects[0]["high"]) == pytest.approx((oracle.low, oracle.high), abs=1e-9)
    assert verdict == "supported"
    shuffled = [{"before": r["before"], "after": rows[i - 1]["after"]} for i, r in enumerate(rows)]
    broken, _ = summarise(small_design(), shuffled)  # pairing the wrong seeds keeps the mean and moves the interval
    assert broken[0]["estimate"] == pytest.approx(effects[0]["estimate"]) and broken[0]["low"] != effects[0]["low"]


def test_equivalence_needs_the_whole_interval_inside_the_margin():
    assert equivalence(Effect(0.001, -0.004, 0.006, 5), 0.01) == "supported"
    assert equivalence(Effect(0.001, -0.014, 0.016, 5), 0.01) == "inconclusive"
    assert equivalence(Effect(-0.05, -0.06, -0.04, 5), 0.01) == "refuted"


def test_a_verifier_is_cheated_only_if_its_reward_rose_and_the_truth_fell():
    def rows(gain, loss):
        return [{"v.proxy_before": 0.3, "v.proxy_after": 0.3 + gain + e, "sft.exact_pass": 0.6,
                 "v.exact_pass": 0.6 - loss - e} for e in (-0.01, 0.0, 0.01, 0.005)]
    assert cheated("v", rows(0.4, 0.3))["verdict"] == "supported"
    assert cheated("v", rows(0.4, -0.2))["verdict"] == "refuted"  # an honest verifier: both rise
    assert cheated("v", rows(0.0, 0.3))["verdict"] == "refuted"  # drift, not cheating: nothing was gained


@pytest.mark.parametrize("fall, expected", [(0.0, "supported"), (0.03, "inconclusive"), (0.2, "refuted")])
def test_every_clause_of_a_falsifier_can_lower_the_verdict(fall, expected):
    rows = [{"before": 0.6, "after": 0.9 + e, "v1": 0.99 - fall + 2 * e, "v0": 0.99} for e in (-0.02, 0.0, 0.02)]
    effects = (("gain", "after", "before", "share"), ("validity", "v1", "v0", "share"))
    design = small_design(effects=effects, also=(("validity", -0.1),))
    assert summarise(design, rows)[1] == expected
    assert summarise(dataclasses.replace(design, also=()), rows)[1] == "supported"  # the clause left out: not caught


def test_shares_of_seeds_have_wilson_intervals():
    design = small_design(effects=(("blocked", "after", None, "share of seeds"),), smallest=0.5)
    effects, _ = summarise(design, [{"after": 1.0}] * 5)
    assert (effects[0]["low"], effects[0]["high"]) == pytest.approx((0.5655, 1.0), abs=1e-4)


def test_an_effect_over_the_seeds_that_got_there_says_its_n():
    """Four seeds, the third never reached the skill: scipy on the other three; without the fifth entry it counts."""
    rows = [{"before": b, "after": a, "hit": h} for b, a, h in ((.6, .85, 1), (.7, .9, 1), (.6, 0., 0), (.65, .93, 1.))]
    there = ("gain", "after", "before", "share", ("hit",))
    effects, verdict = summarise(small_design(effects=(there,)), rows)
    oracle = stats.ttest_rel([0.85, 0.90, 0.93], [0.60, 0.70, 0.65]).confidence_interval(0.95)
    assert (effects[0]["low"], effects[0]["high"]) == pytest.approx((oracle.low, oracle.high), abs=1e-9)
    assert effects[0]["n"] == 3 and verdict == "supported"
    broken, unsure = summarise(small_design(effects=(there[:4],)), rows)
    assert broken[0]["estimate"] < effects[0]["estimate"] and "n" not in broken[0] and unsure == "inconclusive"
    few, verdict = summarise(small_design(effects=(there, ("plain", "after", None, "share"))), rows[1:3])
    assert [e["name"] for e in few] == ["plain"] and verdict == "inconclusive"  # one seed: no effect, no verdict


def test_bad_requests_are_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown; use one of sft_room"):
        run("no_such", [0, 1], tmp_path)
    with pytest.raises(ValueError, match="at least 2 different"):
        run("sft_room", [3, 3], tmp_path)


@pytest.mark.parametrize("name", DESIGNS)
def test_the_committed_file_follows_from_its_own_rows(name):
    """Recorded effects and verdict are recomputed from the recorded per-seed rows: nobody typed them in."""
    recorded = json.loads((RESULTS / f"{name}.json").read_text())
    assert recorded.keys() >= KEYS and len(recorded["seeds"]) >= 3
    assert recorded["n_cases"] >= (DESIGNS[name].n_items or 400)
    effects, verdict = summarise(DESIGNS[name], recorded["per_seed"])
    assert [e["name"] for e in effects] == [e["name"] for e in recorded["effects"]]
    for mine, kept in zip(effects, recorded["effects"]):
        assert (mine["estimate"], mine["low"], mine["high"]) == pytest.approx(
            (kept["estimate"], kept["low"], kept["high"]), abs=1e-12)
    assert verdict == recorded["verdict"]
    if DESIGNS[name].extra:
        assert json.loads(json.dumps(DESIGNS[name].extra(recorded["per_seed"]))) == recorded["extra"]
    assert recorded["run_cards"] and evidence.DESIGNS[name].claim == recorded["claim"]


def test_what_follows_from_a_row_lands_in_it_and_replaces_an_older_value(monkeypatch):
    design = small_design(derive=lambda r: {"after": 2 * r["half"]})
    monkeypatch.setitem(DESIGNS, "rlvr_gain", design)
    rows = [{"seed": s, "before": 0.5, "half": h, "after": 0.0} for s, h in enumerate((0.4, 0.42))]
    told = evidence.concluded("rlvr_gain", "smoke", rows)
    assert [r["after"] for r in told["per_seed"]] == [0.8, 0.84] and rows[0]["after"] == 0.0
    assert told["effects"][0]["estimate"] == pytest.approx(0.32)


def test_a_recorded_file_can_be_concluded_again_without_training(tmp_path):
    kept = json.loads((RESULTS / "D5.json").read_text())
    stale = kept | {"verdict": "refuted", "effects": []}
    (tmp_path / "D5.json").write_text(json.dumps(stale))
    conclude_again("D5", tmp_path)
    assert json.loads((tmp_path / "D5.json").read_text()) == kept
    with pytest.raises(ValueError, match="measure it with: lifecycle evidence D2"):
        conclude_again("D2", tmp_path)
