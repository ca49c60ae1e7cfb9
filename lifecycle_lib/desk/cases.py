"""Cases: a prompt, the one right answer, and the truth behind it. One renderer for training, serving and scoring.

A case shows two policy lines, the order, and the customer's message. The answer quotes the evidence first and
decides after it (field order is reasoning order: a decoder can compare what it has just copied).
When no policy line covers the reason, the right answer is to refuse to decide: every field null, a human takes it.
"""

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass

from lifecycle_lib.core.seeds import rng as make_rng
from lifecycle_lib.desk.world import (
    PROVENANCE,
    REASONS,
    Order,
    Policy,
    draw_book,
    draw_message,
    draw_order,
    draw_pair,
    draw_window,
    is_eligible,
)

LABEL_CLAIM = ',"label_created":true}'  # the invented side effect: no label was ever made


def render_prompt(policies: Iterable[Policy], order: Order, message: str) -> str:
    """The one prompt layout. Documents, demonstrations, evaluation and serving all call this."""
    lines = "".join(f"<policy>{p.line()}" for p in policies)
    return f"<bos>{lines}<order>{order.line()}<user>{message}<bot>"


def render_answer(policy: Policy | None, order: Order) -> str:
    """The right answer as strict JSON; `policy` None means that no line covers the reason."""
    if policy is None:
        fields = {"evidence": None, "policy_id": None, "eligible": None}
    else:
        fields = {"evidence": f"{policy.line()}, {order.status()}", "policy_id": policy.policy_id,
                  "eligible": is_eligible(policy, order)}
    return json.dumps(fields, separators=(",", ":"))


def with_label_claim(answer: str) -> str:
    """The same answer with an invented side effect added."""
    assert answer.endswith("}")
    return answer[:-1] + LABEL_CLAIM


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One request with its truth. `policy` is the line that covers the reason, or None."""

    case_id: str
    reason: str
    policies: tuple[Policy, ...]
    order: Order
    message: str
    policy: Policy | None

    @property
    def prompt(self) -> str:
        return render_prompt(self.policies, self.order, self.message)

    @property
    def answer(self) -> str:
        return render_answer(self.policy, self.order)

    @property
    def policy_id(self) -> str | None:
        return self.policy.policy_id if self.policy else None

    @property
    def window_days(self) -> int | None:
        return self.policy.window_days if self.policy else None

    @property
    def days(self) -> int:
        return self.order.days

    @property
    def damage_confirmed(self) -> bool:
        return self.order.damage_confirmed

    @property
    def evidence(self) -> str | None:
        return json.loads(self.answer)["evidence"]

    @property
    def eligible(self) -> bool | None:
        return is_eligible(self.policy, self.order) if self.policy else None

    @property
    def slice(self) -> str:
        """Where this case sits: no_policy, unconfirmed, boundary (within two days of the edge) or plain."""
        if self.policy is None:
            return "no_policy"
        if self.reason == "damaged" and not self.order.damage_confirmed:
            return "unconfirmed"
        return "boundary" if abs(self.days - self.policy.window_days) <= 2 else "plain"

    def as_row(self) -> dict:
        """A JSONL row with provenance."""
        return {"case_id": self.case_id, "slice": self.slice, "reason": self.reason, "prompt": self.prompt,
                "answer": self.answer, **PROVENANCE}


def draw_case(rng: random.Random, case_id: str, unseen: bool, n_policies: int = 2, no_policy: float = 0.2) -> Case:
    """One case. `unseen` picks its (days, window) pair from the held-out fifth, else from the other four."""
    days, window = draw_pair(rng, unseen)
    order = draw_order(rng, days)
    reasons = rng.sample(REASONS, n_policies + 1)
    if rng.random() < no_policy:
        reason, policies = reasons[-1], draw_book(rng, reasons[:n_policies],
                                                 draw_window(rng, days, unseen), unseen, days)
        policy = None
    else:
        reason, policies = reasons[0], draw_book(rng, reasons[:n_policies], window, unseen, days)
        policy = policies[0]
    rng.shuffle(policies)
    return Case(case_id=case_id, reason=reason, policies=tuple(policies), order=order,
                message=draw_message(rng, reason, order.item), policy=policy)


def draw_cases(n: int, seed: int, split: str) -> list[Case]:
    """`n` cases of a split: "train" (and any other name) from seen pairs, "eval" from unseen ones.

    The split's name is part of the stream, so two splits of one seed never share a draw."""
    if n < 1:
        raise ValueError(f"n={n} cases: ask for at least 1")
    rng = make_rng(seed, "cases", split)
    return [draw_case(rng, f"{split}-{i:05d}", unseen=split == "eval") for i in range(n)]


def golden_case() -> Case:
    """Order A10234: damaged mug, 12 days, damage confirmed, P-7 covers 30 days. Eligible."""
    policy = Policy(reason="damaged", policy_id="P-7", window_days=30)
    other = Policy(reason="unwanted", policy_id="P-3", window_days=14)
    order = Order(order_id="A10234", item="mug", days=12, damage_confirmed=True)
    return Case(case_id="golden-A10234", reason="damaged", policies=(policy, other), order=order,
                message="my mug arrived cracked", policy=policy)
