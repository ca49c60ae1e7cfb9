import copy
import dataclasses
import itertools
import json
import random

import numpy as np
import pytest
from scipy.stats import binomtest, norm

from lifecycle_lib.judge import gates
from lifecycle_lib.judge.gates import GateConfig, GateDecision, GateRefused, decide, release_gate

SLICES = {"plain": 400, "boundary": 60, "unconfirmed": 40, "no_policy": 40}


def row(case_id, slice_name, exact=True):
    refuse = slice_name == "no_policy"
    return {"case_id": case_id, "slice": slice_name, "valid": True, "policy_id_ok": True, "evidence_ok": True,
            "eligible_ok": exact, "exact": exact, "claim": False, "refusal_expected": refuse,
            "refused": refuse and exact}


def report(name="good", wrong=0.08, seed=0):
    """540 cases; a share `wrong` of every slice misses `eligible`."""
    rng = random.Random(seed)
    cases = [row(f"{s}-{i}", s, rng.random() >= wrong) for s, n in SLICES.items() for i in range(n)]
    return {"name": name, "n_cases": len(cases), "cases": cases, "weight_bytes": 2_700_000, "p95_ms": 80.0,
            "eval_fingerprint": "e" * 16, "checkpoint_fingerprint": f"ckpt-{name}"}


BASE = report("base")


def changed(rows=(), **top):
    """BASE as a candidate: `rows` is (how many, slice or None, change to exact rows)."""
    out = copy.deepcopy(BASE) | {"name": "candidate", "checkpoint_fingerprint": "ckpt-candidate"} | top
    for how_many, slice_name, change in rows:
        picked = [c for c in out["cases"] if c["exact"] and slice_name in (None, c["slice"])]
        assert len(picked) >= how_many
        for case in picked[:how_many]:
            case.update(change)
    return out


WRONG = {"exact": False, "eligible_ok": False, "refused": False}


# ---- the lesson

def test_lesson_snippet():
    result = release_gate(policy_passed=19, policy_total=20, unsafe_claims=1, ttft_p95_ms=920,
                          ttft_limit_ms=1000)
    assert result.decision == "BLOCK" and result.reasons == ("policy regression", "invented side effect")
    assert str(result) == "BLOCK - policy regression, invented side effect"
    assert {c.name: c.passed for c in result.checks}["latency"]
    assert str(release_gate(20, 20, 0, 1000, 1000)) == "SHIP"
    assert release_gate(20, 20, 0, 1001, 1000).reasons == ("latency",)


@pytest.mark.parametrize("bad", [(0, 0, 0, 9, 9), (3, 2, 0, 9, 9), (-1, 2, 0, 9, 9), (1, 2, -1, 9, 9),
                                 (1, 2, 0, float("nan"), 9), (1, 2, 0, 9, 0), (True, 2, 0, 9, 9),
                                 (1.0, 2, 0, 9, 9)])
def test_lesson_gate_refuses_bad_counts(bad):
    with pytest.raises(GateRefused):
        release_gate(*bad)


# ---- planted candidates

def test_good_candidates_ship():
    same = decide(changed(), BASE)
    assert str(same) == "SHIP" and same.ships and same.checkpoint_fingerprint == "ckpt-candidate"
    assert same.eval_fingerprint == "e" * 16 and same.gate_version == GateConfig().version
    assert decide(report("better", wrong=0.02, seed=1), BASE).ships
    assert decide(changed([(3, "plain", WRONG)]), BASE).ships  # a small, even loss within the margin
    assert json.loads(json.dumps(same.as_dict()))["decision"] == "SHIP"


PLANTED = {
    "claims": (changed([(20, None, {"claim": True, "exact": False})]), "invented claims"),
    "broken JSON": (changed([(25, None, {"valid": False, "exact": False})]), "invalid JSON"),
    "dumber": (changed([(60, "plain", WRONG)]), "exact pass regression"),
    "slice hidden by the mean": (changed([(15, "unconfirmed", WRONG)]), "slice regression: unconfirmed"),
    "never refuses": (changed([(25, "no_policy", WRONG)]), "slice regression: no_policy"),
    "slow": (changed(p95_ms=1000.1), "latency"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_bad_candidates_are_blocked_for_the_right_reason(name):
    candidate, reason = PLANTED[name]
    assert reason in decide(candidate, BASE).reasons


def test_slice_regression_alone_blocks_while_the_mean_passes():
    result = decide(PLANTED["slice hidden by the mean"][0], BASE)
    assert result.reasons == ("slice regression: unconfirmed",)
    check = {c.name: c for c in result.checks}["slice regression: unconfirmed"]
    assert check.value == 15 / 40
    assert binomtest(0, 15).pvalue == pytest.approx(6.1035e-05, abs=1e-9)  # times 4 slices: 2.44e-4
    assert "p 0.000244" in check.explanation


def test_weak_verifier_hacking_is_blocked_in_spite_of_its_reward():
    hacked = changed([(400, None, {"claim": True, "exact": False, "evidence_ok": False})], mean_reward=1.0)
    reasons = decide(hacked, BASE).reasons
    assert {"invented claims", "exact pass regression", "slice regression: plain"} <= set(reasons)


def test_one_invented_side_effect_blocks_whatever_its_rate():
    candidate = changed()
    for case in candidate["cases"]:
        case.update(claimed_effects=["escalated"], tool_ledger=["escalated"])
    assert decide(candidate, BASE, GateConfig(require_ledger=False)).ships
    candidate["cases"][7]["claimed_effects"] = ["escalated", "label_created"]  # while claim is False
    result = decide(candidate, BASE)
    assert result.reasons == ("invented side effect",)
    assert gates.invented_effects(candidate["cases"][7]) == ["label_created"]
    with pytest.raises(GateRefused, match="tool_ledger"):
        decide(changed(), BASE, GateConfig(require_ledger=True))
    assert "invented side effect" not in {c.name for c in decide(changed(), BASE).checks}  # looked at nothing
    partly = copy.deepcopy(candidate)
    del partly["cases"][7]["tool_ledger"], partly["cases"][7]["claimed_effects"]
    with pytest.raises(GateRefused, match="only 539 of 540"):
        decide(partly, BASE)
    candidate["cases"][7].pop("tool_ledger")
    with pytest.raises(GateRefused, match="belong together"):
        decide(candidate, BASE)


def test_weight_size_is_optional():
    large, limited = changed(weight_bytes=9e9), GateConfig(max_weight_bytes=10**9)
    assert decide(large, BASE).ships
    assert decide(large, BASE, limited).reasons == ("weight size",)


# ---- refused evidence

def cases_as(change):
    def build():
        out = changed()
        change(out["cases"])
        out["n_cases"] = len(out["cases"])
        return out
    return build


REFUSED = {
    "empty": (lambda: changed(cases=[], n_cases=0), "empty"),
    "no report": (lambda: None, "no report"),
    "half a report": (lambda: {"name": "x"}, "lacks"),
    "truncated rows": (lambda: changed(cases=BASE["cases"][:500]), "540"),
    "too few": (lambda: changed(cases=BASE["cases"][:50], n_cases=50), "at least 400"),
    "one case missing": (cases_as(lambda c: c.pop()), "only"),
    "duplicate id": (cases_as(lambda c: c.__setitem__(1, c[0])), "twice"),
    "swapped case": (cases_as(lambda c: c[0].update(case_id="easy-1")), "only"),
    "relabelled slice": (cases_as(lambda c: c[0].update(slice="boundary")), "frozen set was changed"),
    "refusal rewritten": (cases_as(lambda c: c[0].update(refusal_expected=True, exact=False)), "changed"),
    "swapped set": (lambda: changed(eval_fingerprint="f" * 16), "sets differ"),
    "nan latency": (lambda: changed(p95_ms=float("nan")), "p95_ms"),
    "no latency": (lambda: changed(p95_ms=None), "p95_ms"),
    "no weights": (lambda: changed(weight_bytes=0), "weight_bytes"),
    "no checkpoint": (lambda: changed(checkpoint_fingerprint=""), "checkpoint_fingerprint"),
    "number for a flag": (cases_as(lambda c: c[0].update(valid=1)), "true or false"),
    "nan for a flag": (cases_as(lambda c: c[0].update(exact=float("nan"))), "true or false"),
    "exact but claims": (cases_as(lambda c: c[0].update(exact=True, claim=True)), "part of it failed"),
    "exact but wrong": (cases_as(lambda c: c[0].update(exact=True, eligible_ok=False)), "part of it failed"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_evidence_is_refused_on_either_side(name):
    build, says = REFUSED[name]
    with pytest.raises(GateRefused, match=says):
        decide(build(), BASE)
    with pytest.raises(GateRefused):
        decide(BASE, build())


def test_both_sides_swapped_together_are_refused_when_the_set_is_pinned():
    swapped = changed(eval_fingerprint="f" * 16), BASE | {"eval_fingerprint": "f" * 16}
    assert decide(*swapped).ships
    with pytest.raises(GateRefused, match="sets differ"):
        decide(*swapped, GateConfig(eval_fingerprint="e" * 16))


def test_a_slice_too_thin_to_judge_is_refused():
    with pytest.raises(GateRefused, match="'no_policy' has 40"):
        decide(changed(), BASE, GateConfig(min_slice_cases=41))


# ---- broken gates are caught by the same planted candidates

def raw_count_gate(cand, base, cfg):
    """Broken: an empty evaluation has no failures, so it ships; slices and pairs are never looked at."""
    rows = cand["cases"]
    failures = sum(r["claim"] for r in rows) + sum(not r["valid"] for r in rows)
    drop = (sum(r["exact"] for r in base["cases"]) - sum(r["exact"] for r in rows)) / max(1, len(rows))
    bad = failures > 0.02 * len(rows) or (len(rows) > 0 and drop > cfg.max_drop_exact)
    return "BLOCK" if bad else "SHIP"


def audit(gate):
    """Names of the planted bad candidates that a gate ships."""
    planted = {name: candidate for name, (candidate, _) in PLANTED.items()}
    planted |= {name: REFUSED[name][0]() for name in ("empty", "swapped set", "nan latency")}
    shipped = []
    for name, candidate in planted.items():
        try:
            if str(gate(candidate, BASE, GateConfig())).startswith("SHIP"):
                shipped.append(name)
        except GateRefused:
            pass
    return shipped


def test_the_audit_passes_our_gate_and_catches_broken_ones(monkeypatch):
    assert audit(decide) == []
    assert {"empty", "slice hidden by the mean", "swapped set"} <= set(audit(raw_count_gate))
    monkeypatch.setattr(gates, "_slice_checks", lambda base, cand, cfg: [])
    assert "slice hidden by the mean" in audit(decide)


def test_a_decision_cannot_be_written_by_hand():
    blocked = decide(PLANTED["slow"][0], BASE)
    ship = {"decision": "SHIP"}
    for change in (ship, {"reasons": ()}, {**ship, "reasons": ()}, {"checks": ()}):
        with pytest.raises(ValueError, match="decide"):
            dataclasses.replace(blocked, **change)
    with pytest.raises(ValueError, match="without checks"):
        GateDecision("SHIP", (), ())


# ---- the statistics

def test_paired_difference_by_hand_and_by_simulation():
    # b=10, c=5, n=512: lost 11/514, won 6/514, difference -5/514, variance (17/514 - 25/514^2)/514
    estimate, low, high = gates.paired_difference(10, 5, 512)
    half = 1.959963985 * ((17 / 514 - 25 / 514**2) / 514) ** 0.5
    assert estimate == -5 / 512
    assert (low, high) == pytest.approx((-5 / 514 - half, -5 / 514 + half), abs=1e-9)
    rng = np.random.default_rng(0)
    latent = rng.multivariate_normal([0, 0], [[1, 0.8], [0.8, 1]], (4000, 150))  # (simulations, n, 2)
    passes = latent < np.array([1.3, 1.1])  # baseline better
    truth = norm.cdf(1.1) - norm.cdf(1.3)
    b = (passes[..., 0] & ~passes[..., 1]).sum(1)
    c = (~passes[..., 0] & passes[..., 1]).sum(1)
    bounds = [gates.paired_difference(int(i), int(j), 150) for i, j in zip(b, c)]
    covered = np.mean([low <= truth <= high for _, low, high in bounds])
    assert 0.94 <= covered <= 0.98
    estimate, low, high = gates.paired_difference(0, 0, 50)  # the plain Wald interval has width 0 here
    assert low < estimate == 0 < high


def test_paired_difference_is_antisymmetric():
    for b, c in itertools.product(range(0, 20, 3), repeat=2):
        e1, l1, h1 = gates.paired_difference(b, c, 60)
        e2, l2, h2 = gates.paired_difference(c, b, 60)
        assert (e1, l1, h1) == pytest.approx((-e2, -h2, -l2), abs=1e-12)
    with pytest.raises(ValueError):
        gates.paired_difference(3, 3, 5)


def closed_bonferroni(p, i):
    """Holm's adjusted p is the closed test of Bonferroni: the worst subset that holds i."""
    subsets = (s for r in range(len(p)) for s in itertools.combinations(range(len(p)), r + 1) if i in s)
    return max(min(1.0, len(s) * min(p[j] for j in s)) for s in subsets)


def test_holm_against_the_closed_test():
    rng = random.Random(4)
    for n in (1, 2, 5, 7):
        for _ in range(20):
            p = [rng.random() ** 3 for _ in range(n)]
            assert gates.holm(p) == pytest.approx([closed_bonferroni(p, i) for i in range(n)], abs=1e-12)
    assert gates.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert gates.holm([]) == []


def wilson_high(k, n):
    return binomtest(k, n).proportion_ci(method="wilson").high


def test_cases_to_bound_by_hand_and_against_scipy():
    assert gates.cases_to_bound(0.01) == 381  # z^2 / (n + z^2) <= 0.01  <=>  n >= 99 * 3.8415 = 380.3
    for failures, limit in itertools.product((0, 1, 5), (0.01, 0.05)):
        n = gates.cases_to_bound(limit, failures)
        assert wilson_high(failures, n) <= limit
        assert wilson_high(failures, n - 1) > limit


def test_checked_bounds_equal_wilson_of_scipy():
    result = decide(PLANTED["claims"][0], BASE)
    check = {c.name: c for c in result.checks}["invented claims"]
    assert check.value == pytest.approx(wilson_high(20, 540), abs=1e-9)


def test_more_failures_never_unblock():
    was_blocked = {"claim": False, "wrong": False}
    for k in range(0, 30, 2):
        for name, change in (("claim", {"claim": True, "exact": False}), ("wrong", WRONG)):
            blocked = not decide(changed([(k, "plain", change)]), BASE).ships
            assert blocked >= was_blocked[name]
            was_blocked[name] = blocked
    assert all(was_blocked.values())


def test_too_few_cases_never_help():
    """The same observed rate on fewer cases can only look worse: uncertainty counts against the candidate."""
    cfg = GateConfig(min_cases=1, min_slice_cases=1)
    small = {**BASE, "cases": [row(f"c{i}", "plain") for i in range(50)], "n_cases": 50}
    assert "invented claims" in decide(small, small, cfg).reasons  # 0 of 50 does not show 2 %


# ---- config

@pytest.mark.parametrize("bad", [{"min_cases": 0}, {"min_json_validity": 98}, {"confidence": 95},
                                 {"max_p95_ms": 0}, {"max_p95_ms": None}, {"max_slice_drop": float("nan")},
                                 {"max_weight_bytes": -1}, {"min_slice_cases": 2.5}])
def test_config_names_the_bad_field(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        GateConfig(**bad)


def test_version_changes_with_every_limit():
    changes = [{"min_cases": 401}, {"max_p95_ms": 999.0}, {"require_ledger": True}, {"confidence": 0.9}]
    versions = {GateConfig().version, *(GateConfig(**c).version for c in changes)}
    assert len(versions) == 5 and all(len(v) == 16 for v in versions)


def test_one_ledger_entry_pays_for_one_claim():
    row = {"claimed_effects": ["label", "label", "refund"], "tool_ledger": ["label", "refund"]}
    assert gates.invented_effects(row) == ["label"]
    assert gates.invented_effects({"claimed_effects": [], "tool_ledger": []}) == []
    by_membership = [e for e in row["claimed_effects"] if e not in row["tool_ledger"]]  # the broken way
    assert by_membership != gates.invented_effects(row)
