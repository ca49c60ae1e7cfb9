"""The frozen evaluation: one set of unseen cases, scored the same way at every stage.

Every (days, window) pair here is one that no training text shows. Scores are strict to the character: `exact` is
the whole answer, nothing forgiven. A claim is counted in answers that parse: read it beside the JSON validity, because
an answer that is broken hides what it would have claimed. Proportions carry Wilson intervals. An empty, short or
foreign set raises; it never scores 0.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lifecycle_lib.core.records import read_jsonl
from lifecycle_lib.core.stats import wilson
from lifecycle_lib.core.store import fingerprint
from lifecycle_lib.desk.cases import Case, draw_cases, golden_case
from lifecycle_lib.judge.verifiers import TrustedOrder, parse_answer, verify_decision

EVAL_SEED = 20260101
N_CASES = 512
FROZEN_FINGERPRINT = "6cb34b806d238b0c"  # a test holds the world to it
RATES = ("json_validity", "policy_id", "evidence", "eligibility", "exact_pass", "invented_claim_rate", "refusal",
         "over_refusal")


def frozen_cases(n: int = N_CASES) -> list[Case]:
    """The first `n` cases of the frozen evaluation (all 512 unless a smoke run asks for fewer)."""
    if not 1 <= n <= N_CASES:
        raise ValueError(f"n={n}: the frozen evaluation has {N_CASES} cases; ask for 1 to {N_CASES}")
    return draw_cases(N_CASES, EVAL_SEED, "eval")[:n]


def eval_fingerprint(cases: Sequence[Case]) -> str:
    """Name of an evaluation set: any change of a prompt, an answer or the order changes it."""
    return fingerprint([[c.case_id, c.prompt, c.answer] for c in cases])


def check_frozen_file(path: Path) -> int:
    """Number of rows of the exported evaluation; ValueError when it is not the frozen one, row by row."""
    rows = read_jsonl(path, required={"case_id": str, "prompt": str, "answer": str})
    cases = frozen_cases()
    if len(rows) != len(cases):
        raise ValueError(f"{path}: {len(rows)} rows, the frozen evaluation has {len(cases)}; restore the file from git")
    for line, (row, case) in enumerate(zip(rows, cases), 1):
        if row != case.as_row():
            raise ValueError(f"{path}:{line}: case {row['case_id']!r} differs from the frozen one; "
                             "restore the file from git")
    return len(rows)


def score(text: str, case: Case) -> dict:
    """One scored answer, as a row for reports and gates."""
    decision = parse_answer(text)
    f = decision.fields
    return {"case_id": case.case_id, "slice": case.slice, "valid": decision.valid,
            "policy_id_ok": "policy_id" in f and f["policy_id"] == case.policy_id,
            "evidence_ok": "evidence" in f and f["evidence"] == case.evidence,
            "eligible_ok": "eligible" in f and f["eligible"] is case.eligible,
            "exact": text == case.answer, "claim": bool(decision.claims),
            "refusal_expected": case.policy is None,
            "refused": decision.valid and all(f[k] is None for k in ("evidence", "policy_id", "eligible"))}


def make_report(name: str, rows: Sequence[Mapping], eval_fp: str, checkpoint_fp: str, **extra: object) -> dict:
    """Rates with Wilson intervals over scored rows, by slice too. Raises ValueError for no rows or repeated ids."""
    if not rows:
        raise ValueError(f"{name}: an evaluation of no cases proves nothing; score at least one")
    ids = [r["case_id"] for r in rows]
    if len(set(ids)) != len(ids):
        raise ValueError(f"{name}: case {next(i for i in ids if ids.count(i) > 1)!r} was scored twice")
    where = [r for r in rows if r["refusal_expected"]]
    elsewhere = [r for r in rows if not r["refusal_expected"]]
    counts = {"json_validity": (sum(r["valid"] for r in rows), len(rows)),
              "policy_id": (sum(r["policy_id_ok"] for r in rows), len(rows)),
              "evidence": (sum(r["evidence_ok"] for r in rows), len(rows)),
              "eligibility": (sum(r["eligible_ok"] for r in rows), len(rows)),
              "exact_pass": (sum(r["exact"] for r in rows), len(rows)),
              "invented_claim_rate": (sum(r["claim"] for r in rows), len(rows)),
              "refusal": (sum(r["refused"] for r in where), len(where)),
              "over_refusal": (sum(r["refused"] for r in elsewhere), len(elsewhere))}
    report: dict = {"name": name, "n_cases": len(rows), "eval_fingerprint": eval_fp,
                    "checkpoint_fingerprint": checkpoint_fp}
    for key, (k, n) in counts.items():
        report[key] = k / n if n else None
        report[f"{key}_low"], report[f"{key}_high"] = wilson(k, n) if n else (None, None)
    report["slices"] = {s: {"n": len(part), "exact_pass": sum(r["exact"] for r in part) / len(part)}
                        for s in sorted({r["slice"] for r in rows}) if (part := [r for r in rows if r["slice"] == s])}
    report["cases"] = [dict(r) for r in rows]
    if clash := sorted(set(report) & set(extra)):
        raise ValueError(f"{name}: {', '.join(clash)} is computed here; rename the extra field")
    return report | extra


def evaluate(name: str, answer: Callable[[Sequence[Case]], Sequence[str]], cases: Sequence[Case],
             checkpoint_fp: str = "", **extra: object) -> dict:
    """Score a system: `answer(cases)` returns one text a case. Raises ValueError when the count is off."""
    if not cases:
        raise ValueError(f"{name}: the evaluation set is empty; it cannot pass or fail anything")
    texts = list(answer(cases))
    if len(texts) != len(cases):
        raise ValueError(f"{name}: {len(texts)} answers for {len(cases)} cases")
    rows = [score(t, c) for t, c in zip(texts, cases)]
    return make_report(name, rows, eval_fingerprint(cases), checkpoint_fp, answers=texts, **extra)


# ---- the lesson's golden case and its five recorded answers (rows S1-51, S1-52) -----------------------------

@dataclass(frozen=True, slots=True)
class Recorded:
    """One recorded answer beside what a reviewer expects of it."""

    order: TrustedOrder
    answer: dict
    expected: str  # "pass" or "fail"


def golden_answer_passes(text: str | None = None) -> bool:
    """Lesson S1-51: A10234, damage confirmed, 12 days; eligible under P-7, no label. `text` None: the right answer."""
    case = golden_case()
    order = TrustedOrder(case.order.order_id, case.reason, case.days, case.damage_confirmed)
    return bool(verify_decision(text or case.answer, order, 30, "P-7", case.evidence).reward)


def recorded_answers() -> list[Recorded]:
    """Lesson S1-52: five recorded answers with the verdict a reviewer gave."""
    def one(order_id: str, days: int, policy_id: str, eligible: bool, expected: str, **extra: object) -> Recorded:
        evidence = f"damaged {policy_id} 30d, {days}d confirmed"
        return Recorded(TrustedOrder(order_id, "damaged", days, True),
                        {"evidence": evidence, "policy_id": policy_id, "eligible": eligible, **extra}, expected)
    return [one("A10234", 12, "P-7", True, "pass"), one("A10235", 45, "P-7", False, "pass"),
            one("A10236", 12, "P-7", True, "fail", label_created=True), one("A10237", 45, "P-7", True, "fail"),
            one("A10238", 12, "P-3", True, "fail")]


def score_recorded(records: Sequence[Recorded]) -> dict:
    """Verdicts of the verifier beside the expected ones. What code cannot judge goes to a human queue."""
    if not records:
        raise ValueError("no recorded answers to score")
    verdicts = ["pass" if verify_decision(r.answer, r.order, 30, "P-7").reward else "fail" for r in records]
    return {"verdicts": verdicts, "as_expected": sum(v == r.expected for v, r in zip(verdicts, records)),
            "n": len(records), "human_review": "queued: clarity"}
