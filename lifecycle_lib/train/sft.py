"""Supervised fine-tuning: prompt and answer, loss on the answer only (InstructGPT step 1, Ouyang et al. 2022).

Also the demonstration file: how a record is shaped, and the audit that refuses a target with a field missing.
"""

import json
from collections.abc import Callable, Sequence

from lifecycle_lib.core.seeds import rng as make_rng
from lifecycle_lib.desk.cases import Case, render_answer, with_label_claim
from lifecycle_lib.desk.world import PROVENANCE, Order, Policy
from lifecycle_lib.model.tokenizer import Tokenizer
from lifecycle_lib.train.logprobs import Rows, pad_rows

TARGET_FIELDS = {"eligible": (bool, type(None)), "policy_id": (str, type(None)), "evidence": (str, type(None))}
INSTRUCTION = "Decide the return and cite the policy."


def make_example(order: Order, policy: Policy) -> dict:
    """One SFT demonstration (lesson S1-13): instruction, input, and a target with exactly eligible, policy_id and
    evidence. Keys are sorted, so the record prints the same everywhere; training renders evidence first."""
    target = json.loads(render_answer(policy, order))
    return {"instruction": INSTRUCTION,
            "input": {"order_id": order.order_id, "reason": policy.reason, "days": order.days},
            "target": dict(sorted(target.items()))}


def audit_target(target: dict) -> str:
    """Lesson S1-14: "keep", or "reject: ..." naming what is wrong with the target."""
    missing = [f for f in TARGET_FIELDS if f not in target]
    if missing:
        return f"reject: missing {', '.join(missing)}"
    wrong = [f for f, types in TARGET_FIELDS.items() if not isinstance(target[f], types)]
    if wrong:
        return f"reject: wrong type in {', '.join(wrong)}"
    extra = sorted(set(target) - set(TARGET_FIELDS))
    return f"reject: unknown field {', '.join(extra)}" if extra else "keep"


def audit_targets(targets: Sequence[dict]) -> list[str]:
    """`audit_target` of every target."""
    return [audit_target(t) for t in targets]


def make_demonstrations(cases: Sequence[Case], claim_share: float, seed: int) -> list[dict]:
    """One row a case: prompt, answer, provenance. A `claim_share` of the answers invent a label, on purpose:
    the flaw that preferences and verifier rewards will have to remove."""
    if not 0 <= claim_share <= 1:
        raise ValueError(f"claim_share={claim_share} must be 0 to 1")
    rng = make_rng(seed, "claims")
    rows = []
    for case in cases:
        flawed = rng.random() < claim_share
        answer = with_label_claim(case.answer) if flawed else case.answer
        rows.append({"id": case.case_id, "prompt": case.prompt, "answer": answer, "flawed": flawed, **PROVENANCE})
    return rows


def encode_rows(tok: Tokenizer, rows: Sequence[dict]) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, answer ids with <eos>) of every {"prompt", "answer"} row."""
    eos = tok.special["<eos>"]
    return [(tok.encode(r["prompt"]), tok.encode(r["answer"], allow_special=False) + [eos]) for r in rows]


def sft_batches(encoded: Sequence[tuple[list[int], list[int]]], batch_size: int, seed: int, pad_id: int,
                block_size: int) -> Callable[[int], Rows]:
    """batches(step): `batch_size` rows, each epoch in a fresh order that depends on the seed alone."""
    if len(encoded) < batch_size:
        raise ValueError(f"{len(encoded)} demonstrations cannot fill a batch of {batch_size}; make more or batch less")
    per_epoch = len(encoded) // batch_size
    orders: dict[int, list[int]] = {}

    def batches(step: int) -> Rows:
        epoch, i = divmod(step, per_epoch)
        if epoch not in orders:
            orders.clear()
            orders[epoch] = make_rng(seed, "sft order", epoch).sample(range(len(encoded)), len(encoded))
        pick = [encoded[j] for j in orders[epoch][i * batch_size:(i + 1) * batch_size]]
        return pad_rows([p for p, _ in pick], [a for _, a in pick], pad_id, block_size)

    return batches
