"""Cases: the golden one by hand, the rule against a table, prompts parsed back, held-out pairs, stable draws."""

import json
import re
from collections import Counter

import pytest
from scipy import stats

from lifecycle_lib.desk import cases, world
from lifecycle_lib.judge.evals import EVAL_SEED
from lifecycle_lib.train.dpo import make_pairs
from lifecycle_lib.train.sft import make_demonstrations

PROMPT = re.compile(r"<bos>((?:<policy>[a-z]+ P-[1-9] \d\dd)+)<order>(A\d{5}) (\w+) (\d\d)d (confirmed|unconfirmed)"
                    r"<user>([^<>{}]+)<bot>")


def read(prompt: str) -> dict:
    """What a prompt says, parsed from its text alone."""
    match = PROMPT.fullmatch(prompt)
    assert match, prompt
    lines = [re.fullmatch(r"(\w+) (P-\d) (\d\d)d", x).groups() for x in match[1].split("<policy>")[1:]]
    return {"policies": [(r, p, int(w)) for r, p, w in lines], "order_id": match[2], "item": match[3],
            "days": int(match[4]), "confirmed": match[5] == "confirmed", "message": match[6]}


def reason_of(message: str, item: str) -> str:
    """The reason that a customer's message gives, from the phrase book."""
    (reason,) = {r for r, phrases in world.PHRASES.items() for p in phrases if p.format(item=item) == message}
    return reason


@pytest.fixture(scope="module")
def train() -> list[cases.Case]:
    return cases.draw_cases(3000, 0, "sft")


@pytest.fixture(scope="module")
def unseen() -> list[cases.Case]:
    return cases.draw_cases(512, EVAL_SEED, "eval")


def test_the_golden_case():
    case = cases.golden_case()
    assert case.prompt == ("<bos><policy>damaged P-7 30d<policy>unwanted P-3 14d<order>A10234 mug 12d confirmed"
                           "<user>my mug arrived cracked<bot>")
    assert case.answer == '{"evidence":"damaged P-7 30d, 12d confirmed","policy_id":"P-7","eligible":true}'
    assert (case.days, case.window_days, case.eligible, case.slice) == (12, 30, True, "plain")
    assert cases.with_label_claim(case.answer) == case.answer[:-1] + ',"label_created":true}'


def test_the_answer_is_what_a_reader_of_the_prompt_alone_would_give(train, unseen):
    """An independent reading: the prompt's text, the phrase book and the rule, none of the case's fields."""
    for case in train[:600] + unseen:
        said = read(case.prompt)
        reason = reason_of(said["message"], said["item"])
        lines = [(p, w) for r, p, w in said["policies"] if r == reason]
        assert len(lines) <= 1 and len({r for r, _, _ in said["policies"]}) == len(said["policies"]) == 2
        if not lines:
            want = {"evidence": None, "policy_id": None, "eligible": None}
        else:
            (policy_id, window), days = lines[0], said["days"]
            ok = days <= window and (reason != "damaged" or said["confirmed"])
            want = {"evidence": f"{reason} {policy_id} {window:02d}d, {days:02d}d "
                                f"{'confirmed' if said['confirmed'] else 'unconfirmed'}",
                    "policy_id": policy_id, "eligible": ok}
        assert case.answer == json.dumps(want, separators=(",", ":"))
        assert (case.evidence, case.policy_id, case.eligible) == tuple(want.values()) and case.reason == reason


@pytest.mark.parametrize(("reason", "days", "window", "confirmed", "eligible"), [
    ("damaged", 30, 30, True, True), ("damaged", 31, 30, True, False), ("damaged", 1, 30, False, False),
    ("late", 30, 30, False, True), ("unwanted", 31, 30, True, False), ("wrong", 0, 0, False, True),
])
def test_the_rule(reason, days, window, confirmed, eligible):
    policy = world.Policy(reason=reason, policy_id="P-1", window_days=window)
    order = world.Order(order_id="A10000", item="mug", days=days, damage_confirmed=confirmed)
    assert world.is_eligible(policy, order) is eligible


def shown_pairs(text: str) -> list[tuple[int, int]]:
    """Every (days, window) that a text puts side by side: the order's days with each policy line."""
    order = re.search(r"<order>A\d{5} \w+ (\d+)d", text)
    return [(int(order[1]), int(w)) for w in re.findall(r"<policy>\w+ P-\d (\d+)d", text)] if order else []


def test_no_training_text_shows_a_held_out_pair(train):
    rows = make_demonstrations(train, 0.3, seed=0)
    texts = [r["prompt"] + r["answer"] for r in rows]
    texts += [r["prompt"] + r["chosen"] for r in make_pairs(cases.draw_cases(640, 0, "dpo"))]
    texts += [c.prompt for c in cases.draw_cases(1500, 0, "rlvr")]
    pairs = [p for t in texts for p in shown_pairs(t)]
    assert len(pairs) == 2 * len(texts)
    assert not [p for p in pairs if world.held_out(*p)]


def test_every_evaluation_case_is_made_of_unseen_pairs(unseen, train):
    assert len(unseen) == 512 == len({c.prompt for c in unseen})
    assert all(world.held_out(*p) for c in unseen for p in shown_pairs(c.prompt))
    assert not {c.prompt for c in unseen} & {c.prompt for c in train}
    leaky = cases.draw_cases(512, EVAL_SEED, "evaluation")  # a split by another name draws seen pairs
    assert not any(world.held_out(*p) for c in leaky for p in shown_pairs(c.prompt)), "the check would catch a leak"


def test_one_pair_in_five_is_held_out_and_every_window_has_some():
    days, windows = range(1, 100), world.WINDOWS
    share = sum(world.held_out(d, w) for d in days for w in windows) / (len(days) * len(windows))
    assert share == pytest.approx(0.2, abs=0.002)
    assert all(any(world.held_out(d, w) for w in windows) for d in days)


def test_the_draws_follow_their_shares(train):
    """Exact binomial tests against the stated shares."""
    n = len(train)
    none = sum(c.policy is None for c in train)
    assert stats.binomtest(none, n, 0.2).pvalue > 1e-4
    confirmed = sum(c.damage_confirmed for c in train)
    assert stats.binomtest(confirmed, n, 0.7).pvalue > 1e-4
    first = sum(c.policies[0] == c.policy for c in train if c.policy)
    assert stats.binomtest(first, n - none, 0.5).pvalue > 1e-4, "the covering line is as often the second"
    assert stats.chisquare(list(Counter(c.reason for c in train).values())).pvalue > 1e-4
    assert stats.chisquare(list(Counter(c.policy_id for c in train if c.policy).values())).pvalue > 1e-4
    assert stats.binomtest(first, n - none, 0.6).pvalue < 1e-4, "the test sees a share that is off by a tenth"


def test_splits_and_seeds_do_not_share_draws(train):
    prompts = {c.prompt for c in train}
    for seed, split in ((0, "dpo"), (1, "sft"), (0, "rlvr")):
        assert not prompts & {c.prompt for c in cases.draw_cases(300, seed, split)}
    assert [c.prompt for c in cases.draw_cases(50, 0, "sft")] == [c.prompt for c in train[:50]]
    assert len({c.case_id for c in train}) == len(train)


def test_slices_cover_every_case(unseen):
    count = Counter(c.slice for c in unseen)
    assert set(count) == {"no_policy", "unconfirmed", "boundary", "plain"} and min(count.values()) >= 15
    for case in unseen:
        assert (case.slice == "no_policy") == (case.policy is None) == (case.eligible is None)
        if case.slice == "unconfirmed":
            assert case.eligible is False
        if case.slice == "boundary":
            assert abs(case.days - case.window_days) <= 2


def test_rows_have_provenance_and_licence(unseen):
    for case in unseen[:50]:
        row = case.as_row()
        assert row["licence"] == "CC-BY-4.0" and row["source"] and row["world_version"] == world.WORLD_VERSION
        assert row["prompt"] == case.prompt and row["answer"] == case.answer and row["case_id"] == case.case_id


@pytest.mark.parametrize(("make", "message"), [
    (lambda: cases.draw_cases(0, 0, "sft"), "n=0 cases"),
    (lambda: world.Policy(reason="broken", policy_id="P-1", window_days=3), "reason 'broken' is unknown"),
    (lambda: world.Policy(reason="late", policy_id="P-0", window_days=3), "policy_id 'P-0' is unknown"),
    (lambda: world.Policy(reason="late", policy_id="P-1", window_days=100), "window_days=100"),
    (lambda: world.Order(order_id="10234", item="mug", days=3, damage_confirmed=True), "order_id '10234'"),
    (lambda: world.Order(order_id="A1O234", item="mug", days=3, damage_confirmed=True), "order_id 'A1O234'"),
    (lambda: world.Order(order_id="A10234", item="mug", days=-1, damage_confirmed=True), "days=-1"),
])
def test_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
