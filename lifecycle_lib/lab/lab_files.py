"""The data files of the lab artifact: demonstrations, preference pairs and the frozen evaluation, as JSONL.

Generated from the desk and committed, so that a learner can open what the model is fed and a test can make them again
byte for byte: python -m lifecycle_lib.lab.lab_files
"""

import json
import sys
from pathlib import Path

from lifecycle_lib.core.records import write_jsonl
from lifecycle_lib.desk.cases import Case, draw_cases, render_answer
from lifecycle_lib.desk.world import PROVENANCE
from lifecycle_lib.judge.evals import frozen_cases
from lifecycle_lib.judge.verifiers import CLAIM_FIELD, FIELDS
from lifecycle_lib.train.dpo import make_pair, make_pairs
from lifecycle_lib.train.sft import INSTRUCTION, audit_target

N_EXAMPLES, N_PAIRS, N_HARD_PAIRS = 60, 40, 10
FLAWS = (lambda t: t | {CLAIM_FIELD: True}, lambda t: {k: v for k, v in t.items() if k != "policy_id"},
         lambda t: t | {"eligible": "yes"})


def sft_example(case: Case, target: dict | None = None) -> dict:
    """One demonstration with its audit; `target` None gives the right one (eligible, evidence, policy_id)."""
    right = {"eligible": case.eligible, "evidence": case.evidence, "policy_id": case.policy_id}
    target = right if target is None else target
    return {"id": case.case_id, "instruction": INSTRUCTION,
            "input": {"order_id": case.order.order_id, "reason": case.reason, "days": case.days,
                      "damage_confirmed": case.damage_confirmed},
            "target": target, "audit": audit_target(target), "prompt": case.prompt,
            "answer": json.dumps({k: target[k] for k in (*FIELDS, CLAIM_FIELD) if k in target}, separators=(",", ":")),
            **PROVENANCE}


def sft_examples() -> list[dict]:
    """60 demonstrations that pass the audit, then six that must not: two of each flaw, flagged by the audit."""
    cases = draw_cases(N_EXAMPLES + 2 * len(FLAWS), 0, "sft")
    rows = [sft_example(c) for c in cases[:N_EXAMPLES]]
    return rows + [sft_example(c, FLAWS[i % len(FLAWS)](sft_example(c)["target"]))
                   for i, c in enumerate(cases[N_EXAMPLES:])]


def preference_pairs() -> list[dict]:
    """30 pairs about the invented label, as trained on, and 10 hard ones: the rejected answer cites the other line."""
    cases = draw_cases(4 * N_PAIRS, 0, "dpo")
    covered = [c for c in cases[N_PAIRS:] if c.policy][:N_HARD_PAIRS]
    hard = [make_pair(c.prompt, c.answer, render_answer(next(p for p in c.policies if p != c.policy), c.order),
                      "wrong_policy") | {"id": c.case_id} | PROVENANCE for c in covered]
    return make_pairs(cases[:N_PAIRS - N_HARD_PAIRS]) + hard


def export_lab_files(folder: Path) -> list[Path]:
    """Write the three files below `folder` (the repository's data/) and return their paths; same bytes every time."""
    files = {"sft_examples.jsonl": sft_examples(), "preference_pairs.jsonl": preference_pairs(),
             "evals/policy_cases.jsonl": [c.as_row() for c in frozen_cases()]}
    for name, rows in files.items():
        write_jsonl(Path(folder) / name, rows)
    return [Path(folder) / name for name in files]


if __name__ == "__main__":
    for path in export_lab_files(Path(sys.argv[1] if len(sys.argv) > 1 else "data")):
        print(path)
