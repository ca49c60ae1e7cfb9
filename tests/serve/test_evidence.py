import json
import random

import pytest

from lifecycle_lib.desk.cases import draw_cases, golden_case
from lifecycle_lib.judge.verifiers import TrustedOrder, verify_decision
from lifecycle_lib.serve.evidence import answer_from_policy, read_policy

OLD = "P-7: damage reported within 7 days"
NOW = "P-3: unwanted items reported within 14 days\nP-7: damage reported within 30 days"
A10234 = TrustedOrder("A10234", "damaged", 12, True)


def test_lesson_snippet_same_checkpoint_new_evidence():
    before, after = answer_from_policy(A10234, OLD), answer_from_policy(A10234, NOW)
    assert (before.decision, before.policy_id) == ("escalate for review", None)
    assert (after.decision, after.policy_id) == ("eligible", "P-7")
    assert before.checkpoint == after.checkpoint == "returns-assistant-v3"
    assert after.evidence == "P-7: damage reported within 30 days" and after.window_days == 30


def test_the_answer_satisfies_the_verifier():
    after = answer_from_policy(A10234, NOW)
    assert verify_decision(after.as_json(), A10234, 30, "P-7", after.evidence).reward == 1
    assert verify_decision(after.as_json(), A10234, 7, "P-7").reward == 0  # stale facts: the same answer is wrong
    escalated = json.loads(answer_from_policy(A10234, OLD).as_json())
    assert escalated == {"evidence": None, "policy_id": None, "eligible": None}


@pytest.mark.parametrize(("days", "confirmed", "decision"), [
    (30, True, "eligible"), (31, True, "escalate for review"), (0, True, "eligible"),
    (12, False, "escalate for review"), (12, None, "escalate for review")])
def test_boundary_and_confirmation(days, confirmed, decision):
    assert answer_from_policy(TrustedOrder("A10234", "damaged", days, confirmed), NOW).decision == decision


def test_agrees_with_the_desk_on_its_own_policy_lines():
    seen = set()
    for case in draw_cases(200, seed=5, split="eval"):
        order = TrustedOrder(case.order.order_id, case.reason, case.days, case.damage_confirmed)
        text = "\n".join(policy.line() for policy in case.policies)
        if case.policy is None:
            with pytest.raises(ValueError, match="0 policy lines"):
                answer_from_policy(order, text)
            continue
        answer = answer_from_policy(order, text)
        assert (answer.decision == "eligible") == case.eligible and answer.window_days == case.window_days
        seen.add(case.eligible)
    assert seen == {True, False}


def test_a_wider_window_never_takes_a_grant_away():
    rng = random.Random(2)
    for _ in range(100):
        order = TrustedOrder("A1", "late", rng.randint(0, 60))
        window = rng.randint(0, 60)
        narrow = answer_from_policy(order, f"P-2: late parcels reported within {window} days").decision
        wide = answer_from_policy(order, f"P-2: late parcels reported within {window + 9} days").decision
        assert wide == "eligible" or narrow != "eligible"


def test_an_answer_from_memory_is_caught():
    """The broken variant: weights that remember 7 days and never read the text cannot match both policies."""
    def remembered(order, text):
        return answer_from_policy(order, OLD)

    assert [remembered(A10234, t).decision for t in (OLD, NOW)] == ["escalate for review"] * 2
    assert [answer_from_policy(A10234, t).decision for t in (OLD, NOW)] == ["escalate for review", "eligible"]


@pytest.mark.parametrize(("text", "says"), [
    ("", "empty"), (" \n", "empty"), ("P-3: unwanted items reported within 14 days", "0 policy lines"),
    (f"{OLD}\n{NOW}", "2 policy lines"), ("P-7: damage is sad", "0 policy lines"),
    ("damage reported within 30 days", "0 policy lines"), ("P-7: damage reported within thirty days", "0 policy")])
def test_unusable_evidence_raises(text, says):
    with pytest.raises(ValueError, match=says):
        answer_from_policy(A10234, text)


def test_reads_both_layouts_and_names_the_checkpoint():
    assert read_policy("damaged P-7 30d", "damaged") == ("P-7", 30, "damaged P-7 30d")
    assert read_policy("P-4: wrong item, reported within 05 days", "wrong")[:2] == ("P-4", 5)
    with pytest.raises(ValueError, match="checkpoint"):
        answer_from_policy(A10234, NOW, checkpoint="")
    case = golden_case()
    assert answer_from_policy(A10234, case.policies[0].line()).decision == "eligible"
