"""The frozen evaluation: each wrong kind of answer, rates against a plain recount and statsmodels, damaged files."""

import json

import pytest
from statsmodels.stats.proportion import proportion_confint

from lifecycle_lib.core.records import write_jsonl
from lifecycle_lib.desk.cases import Case, golden_case, with_label_claim
from lifecycle_lib.judge import evals

GOLDEN = golden_case()
FLAGS = ("valid", "policy_id_ok", "evidence_ok", "eligible_ok", "exact", "claim", "refused")


@pytest.fixture(scope="module")
def frozen() -> list[Case]:
    return evals.frozen_cases()


def answer(**change: object) -> str:
    return json.dumps(json.loads(GOLDEN.answer) | change, separators=(",", ":"))


NULLS = {"evidence": None, "policy_id": None, "eligible": None}


@pytest.mark.parametrize(("text", "flags"), [  # valid, policy_id, evidence, eligible, exact, claim, refused
    (GOLDEN.answer, "1111100"),
    (with_label_claim(GOLDEN.answer), "1111010"),
    (answer(eligible=False), "1110000"),
    (answer(policy_id="P-3"), "1011000"),
    (answer(evidence="damaged P-7 30d, 12d unconfirmed"), "1101000"),
    (answer(**NULLS), "1000001"),
    (with_label_claim(answer(**NULLS)), "1000011"),
    (GOLDEN.answer.replace(":true", ": true"), "1111000"),  # right, but not to the character
    (answer(eligible=1), "0110000"),  # 1 is not true
    (answer(label_created=False), "0111000"),  # denies the label, but the field is unknown
    (GOLDEN.answer[:-1], "0000000"),
    (GOLDEN.answer + " ", "1111000"),
    (GOLDEN.answer + "}", "0000000"),
    ("Sure! " + GOLDEN.answer, "0000000"),
    (GOLDEN.answer[:-1] + ',"policy_id":"P-7"}', "0000000"),  # the same key twice
    ('{"policy_id":"P-7"}', "0100000"),
    ("", "0000000"), ("null", "0000000"), ("[]", "0000000"),
])
def test_score_of_each_kind(text, flags):
    row = evals.score(text, GOLDEN)
    assert "".join(str(int(row[f])) for f in FLAGS) == flags
    assert row["case_id"] == "golden-A10234" and row["slice"] == "plain" and row["refusal_expected"] is False


def test_a_case_without_a_policy_wants_nulls(frozen):
    case = next(c for c in frozen if c.policy is None)
    right = evals.score(case.answer, case)
    assert right["exact"] and right["refused"] and right["refusal_expected"]
    wrong = evals.score(GOLDEN.answer, case)
    assert not any(wrong[f] for f in ("policy_id_ok", "evidence_ok", "eligible_ok", "exact", "refused"))
    missing = evals.score("{}", case)  # a missing field is not a null
    assert not any(missing[f] for f in FLAGS)


def right_answers(cases):
    return [c.answer for c in cases]


def test_the_right_answers_pass_everything(frozen):
    report = evals.evaluate("right", right_answers, frozen, "abc", seed=1)
    for key in ("json_validity", "policy_id", "evidence", "eligibility", "exact_pass", "refusal"):
        assert report[key] == 1
    assert report["invented_claim_rate"] == report["over_refusal"] == 0
    assert report["n_cases"] == 512 and report["seed"] == 1 and report["checkpoint_fingerprint"] == "abc"
    assert sum(s["n"] for s in report["slices"].values()) == 512
    assert all(s["exact_pass"] == 1 for s in report["slices"].values())
    json.dumps(report, allow_nan=False)


def test_rates_are_a_plain_recount_with_statsmodels_intervals(frozen):
    def mixed(cases):
        return [with_label_claim(c.answer) if i % 4 == 0 else "{" if i % 4 == 1 else c.answer
                for i, c in enumerate(cases)]

    report = evals.evaluate("mixed", mixed, frozen)
    counts = {"invented_claim_rate": 128, "json_validity": 384, "exact_pass": 256, "eligibility": 384}
    for key, k in counts.items():
        assert report[key] == k / 512
        low, high = proportion_confint(k, 512, method="wilson")
        assert report[f"{key}_low"] == pytest.approx(low, abs=1e-9)
        assert report[f"{key}_high"] == pytest.approx(high, abs=1e-9)
    where = [i for i, c in enumerate(frozen) if c.policy is None]
    assert report["refusal"] == sum(i % 4 != 1 for i in where) / len(where)
    normal, _ = proportion_confint(128, 512, method="normal")
    assert abs(report["invented_claim_rate_low"] - normal) > 1e-3, "a normal interval would be caught"


def test_a_rate_of_nothing_is_none_and_not_zero(frozen):
    covered = [c for c in frozen if c.policy][:5]
    report = evals.evaluate("covered", right_answers, covered)
    assert report["refusal"] is None and report["refusal_low"] is None and report["refusal_high"] is None
    assert report["over_refusal"] == 0.0
    refusals = evals.evaluate("none", right_answers, [c for c in frozen if not c.policy][:5])
    assert refusals["over_refusal"] is None and refusals["refusal"] == 1.0


def test_refused(frozen):
    with pytest.raises(ValueError, match="no cases proves nothing"):
        evals.make_report("x", [], "", "")
    with pytest.raises(ValueError, match="set is empty"):
        evals.evaluate("x", right_answers, [])
    for n, texts in ((2, lambda cases: ["{}"]), (2, lambda cases: ["{}"] * 3), (2, lambda cases: [])):
        with pytest.raises(ValueError, match=r"answers for 2 cases"):
            evals.evaluate("x", texts, frozen[:n])
    with pytest.raises(ValueError, match=f"case {frozen[1].case_id!r} was scored twice"):
        evals.evaluate("x", right_answers, [frozen[0], frozen[1], frozen[1]])
    with pytest.raises(ValueError, match="exact_pass is computed here"):
        evals.evaluate("x", right_answers, frozen[:2], exact_pass=1.0)
    for n in (0, -1, 513):
        with pytest.raises(ValueError, match=f"n={n}: the frozen evaluation has 512"):
            evals.frozen_cases(n)


def test_fewer_frozen_cases_are_the_first_ones(frozen):
    assert [c.prompt for c in evals.frozen_cases(40)] == [c.prompt for c in frozen[:40]]


def test_the_fingerprint_sees_every_change(frozen):
    name = evals.eval_fingerprint(frozen[:6])
    assert name == evals.eval_fingerprint(evals.frozen_cases(6)) and len(name) == 16
    others = [frozen[:5], [*frozen[1:6], frozen[0]], [*frozen[:5], frozen[6]], [GOLDEN, *frozen[1:6]]]
    assert len({name, *map(evals.eval_fingerprint, others)}) == 5


def test_the_exported_file_has_to_be_the_frozen_one(frozen, tmp_path):
    path = tmp_path / "eval.jsonl"
    rows = [c.as_row() for c in frozen]
    write_jsonl(path, rows)
    assert evals.check_frozen_file(path) == 512
    for i, change, message in ((6, {"answer": rows[7]["answer"]}, ":7: case"), (0, {"prompt": "<bos>"}, ":1: case"),
                               (511, {"licence": "MIT"}, ":512: case"), (3, {"note": "extra"}, ":4: case")):
        write_jsonl(path, [*rows[:i], rows[i] | change, *rows[i + 1:]])
        with pytest.raises(ValueError, match="differs from the frozen one") as error:
            evals.check_frozen_file(path)
        assert message in str(error.value)
    for short in (rows[:-1], [*rows, rows[0]]):
        write_jsonl(path, short)
        with pytest.raises(ValueError, match=f"{len(short)} rows, the frozen evaluation has 512"):
            evals.check_frozen_file(path)
    write_jsonl(path, [rows[1], rows[0], *rows[2:]])
    with pytest.raises(ValueError, match=":1: case"):
        evals.check_frozen_file(path)


def test_the_lessons_recorded_answers():
    assert evals.golden_answer_passes() is True
    assert evals.golden_answer_passes(with_label_claim(GOLDEN.answer)) is False
    assert evals.golden_answer_passes(answer(eligible=False)) is False
    records = evals.recorded_answers()
    result = evals.score_recorded(records)
    assert result == {"verdicts": ["pass", "pass", "fail", "fail", "fail"], "as_expected": 5, "n": 5,
                      "human_review": "queued: clarity"}
    with pytest.raises(ValueError, match="no recorded answers"):
        evals.score_recorded([])


def test_the_frozen_evaluation_is_the_frozen_one(frozen):
    """Any change of the world that moves one case must be a decision: freeze again and rerun all evidence."""
    assert evals.eval_fingerprint(frozen) == evals.FROZEN_FINGERPRINT
    assert evals.eval_fingerprint(frozen[::-1]) != evals.FROZEN_FINGERPRINT
