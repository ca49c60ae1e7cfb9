import json
import math
import random
import subprocess
import sys

import pytest
from scipy.stats import binom

from lifecycle_lib.judge import trace_router as tr

PROMISE = {"trace_id": "t0", "symptom": "promised label", "checkpoint": "dpo-3", "claimed_effects": ["label"],
           "tool_ledger": [], "policy_version_shown": "v2", "policy_version_current": "v2"}


def promises(n, **change):
    return [{**PROMISE, "trace_id": f"t{i}", **change} for i in range(n)]


@pytest.mark.parametrize(("symptom", "owner"), [
    ("stale policy", "retrieval index"),
    ("missing policy_id", "prompt contract or SFT data"),
    ("promised label", "preference data and safety eval"),
    ("slow first token", "inference serving"),
    ("release regression", "evaluation gate and rollback"),
    ("the tone is odd", "investigate with a labelled trace"),
    ("not a stale policy at all", "investigate with a labelled trace"),
])
def test_lesson_owners(symptom, owner):
    assert tr.owner_for_failure(symptom) == owner
    assert tr.owner_for_failure(f"  {symptom.upper()} ") == owner


@pytest.mark.parametrize(("symptom", "action"), [
    ("stale policy", "refresh the document and rerun policy evals"),
    ("invalid schema", "tighten the output contract and rerun format evals"),
    ("slow first token", "profile queue and KV-cache pressure"),
    ("a ghost", "investigate with a labelled trace"),
])
def test_lesson_actions(symptom, action):
    assert tr.action_for({"trace_id": "t", "symptom": symptom}) == tr.action_for(symptom) == action


def test_failures_needed_against_the_binomial():
    assert tr.failures_needed() == 5  # 0.5**5 = 0.031 <= 0.05 < 0.0625 = 0.5**4
    for background in (0.05, 0.1, 0.3, 0.5, 0.9):
        for alarm in (0.001, 0.05, 0.1, 0.5):
            k = tr.failures_needed(background, alarm)
            assert binom.pmf(k, k, background) <= alarm * (1 + 1e-9)
            assert k == 1 or binom.pmf(k - 1, k - 1, background) > alarm * (1 - 1e-9)
    assert tr.failures_needed(0.1, 0.001) == 3  # exact power, no rounding up
    for bad in (0, 1, math.nan):
        with pytest.raises(ValueError, match="between 0 and 1"):
            tr.failures_needed(bad)


@pytest.mark.parametrize(("fields", "shown"), [
    ({"symptom": "stale policy", "policy_version_shown": "v1", "policy_version_current": "v2"}, True),
    ({"symptom": "stale policy", "policy_version_shown": "v2", "policy_version_current": "v2"}, False),
    ({"symptom": "missing policy_id", "missing_fields": ["policy_id"]}, True),
    ({"symptom": "missing policy_id", "missing_fields": []}, False),
    ({"symptom": "invalid schema", "schema_valid": False}, True),
    ({"symptom": "invalid schema", "schema_valid": True}, False),
    ({"symptom": "promised label", "claimed_effects": ["label"], "tool_ledger": []}, True),
    ({"symptom": "promised label", "claimed_effects": ["label"], "tool_ledger": ["label"]}, False),
    ({"symptom": "slow first token", "ttft_ms": 1001, "ttft_limit_ms": 1000}, True),
    ({"symptom": "slow first token", "ttft_ms": 1000, "ttft_limit_ms": 1000.0}, False),
    ({"symptom": "release regression", "previous_passes": True, "candidate_passes": False}, True),
    ({"symptom": "release regression", "previous_passes": False, "candidate_passes": False}, False),
    ({"symptom": "wrong decision", "decision_correct": False}, True),
    ({"symptom": "wrong decision", "decision_correct": True}, False),
])
def test_the_trace_itself_confirms_or_contradicts(fields, shown):
    routing = tr.route({"trace_id": "t", **fields})
    assert routing.confidence == ("measured" if shown else "none")
    assert routing.owner == (tr.owner_for_failure(fields["symptom"]) if shown else tr.INVESTIGATE)
    assert not routing.changes_weights  # one trace never moves a weight


def test_label_without_measurement_is_only_reported():
    routing = tr.route({"trace_id": "t", "symptom": "stale policy", "policy_version_current": "v2"})
    assert routing.confidence == "reported"
    assert routing.evidence == ("policy_version_current='v2'", "not recorded: policy_version_shown")


def test_weights_move_only_after_k_failures_with_correct_evidence():
    assert not tr.route(promises(5)[4], promises(3)).changes_weights  # 4 of 5
    routing = tr.route(promises(5)[4], promises(4))
    assert routing.changes_weights and routing.evidence[-1] == "5 of 5 failures with correct evidence"
    now = promises(1)[0]
    for spoiled in (promises(9, policy_version_shown="v1"), promises(9, checkpoint="sft-1"),
                    promises(9, symptom="slow first token"), promises(9, tool_ledger=["label"]), [now] * 9):
        assert not tr.route(now, [t for t in spoiled if t is now or t["trace_id"] != "t0"]).changes_weights
    stale_now = {**now, "trace_id": "now", "policy_version_shown": "v1"}
    assert not tr.route(stale_now, promises(9)).changes_weights


def test_owners_outside_training_never_move_weights():
    for symptom, fields in [("stale policy", {"policy_version_shown": "v1", "policy_version_current": "v2"}),
                            ("slow first token", {"ttft_ms": 9, "ttft_limit_ms": 1}),
                            ("release regression", {"previous_passes": True, "candidate_passes": False})]:
        traces = [{"trace_id": f"t{i}", "symptom": symptom, "checkpoint": "c", **fields} for i in range(50)]
        assert not tr.route(traces[-1], traces, k=1).changes_weights


def test_more_evidence_never_takes_permission_away():
    rng = random.Random(1)
    for _ in range(30):
        log = promises(rng.randint(0, 8)) + promises(4, policy_version_shown="v1")
        rng.shuffle(log)
        for i, past in enumerate(log):
            log[i] = {**past, "trace_id": f"p{i}"}
        n = rng.randint(0, len(log))
        fewer, more = tr.route(PROMISE, log[:n], k=4), tr.route(PROMISE, log, k=4)
        assert more.changes_weights or not fewer.changes_weights


def test_a_router_that_counts_everything_is_caught():
    """The broken variant: five failures, whatever the model was shown. Stale context must not retrain the
    model."""
    log = promises(9, policy_version_shown="v1")
    careless = len(log) >= tr.failures_needed()
    assert careless and not tr.route(log[-1], log[:-1]).changes_weights


@pytest.mark.parametrize(("bad", "says"), [
    ({"symptom": "stale policy"}, "trace_id"), ({"trace_id": "t"}, "symptom"),
    ({"trace_id": "t", "symptom": " "}, "empty"), ({"trace_id": "", "symptom": "x"}, "empty"),
    ({"trace_id": "t", "symptom": "x", "tfft_ms": 3}, "tfft_ms"),
    ({"trace_id": "t", "symptom": "x", "ttft_ms": "3"}, "ttft_ms"),
    ({"trace_id": "t", "symptom": "x", "ttft_ms": math.nan}, "ttft_ms"),
    ({"trace_id": "t", "symptom": "x", "schema_valid": 1}, "schema_valid"), ([], "object"),
])
def test_malformed_traces_raise(bad, says):
    with pytest.raises(ValueError, match=says):
        tr.route(bad)


def test_k_below_one_and_empty_symptom_raise():
    with pytest.raises(ValueError, match="at least 1"):
        tr.route(PROMISE, k=0)
    for empty in ("", " ", None):
        with pytest.raises(ValueError, match="empty"):
            tr.owner_for_failure(empty)
    with pytest.raises(ValueError, match="empty"):
        tr.action_for({})


def test_file_errors_name_the_line(tmp_path):
    path = tmp_path / "traces.jsonl"

    def write(*rows):
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))

    write(*promises(6))
    assert [r.changes_weights for r in tr.route_file(path)] == [False] * 4 + [True] * 2
    write(PROMISE, {**PROMISE, "trace_id": "t1", "ttft_ms": "fast"})
    with pytest.raises(ValueError, match=r"traces\.jsonl:2: .*ttft_ms"):
        tr.route_file(path)
    write(PROMISE, PROMISE)
    with pytest.raises(ValueError, match=r"traces\.jsonl:2: .*line 1"):
        tr.route_file(path)
    write(PROMISE, '{"trace_id": ')
    with pytest.raises(ValueError, match=r"traces\.jsonl:2: "):
        tr.route_file(path)
    path.write_text("")
    with pytest.raises(ValueError, match="no rows"):
        tr.route_file(path)


def test_command_line(tmp_path):
    path = tmp_path / "traces.jsonl"
    path.write_text(json.dumps(PROMISE) + "\n")
    command = [sys.executable, "-m", "lifecycle_lib.judge.trace_router"]
    done = subprocess.run([*command, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("1: preference data and safety eval -> block on the tool ledger")
    failed = subprocess.run([*command, str(tmp_path / "none")], capture_output=True, text=True, check=False)
    assert failed.returncode == 2 and "none" in failed.stderr and "Traceback" not in failed.stderr
