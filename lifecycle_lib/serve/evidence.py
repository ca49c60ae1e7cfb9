"""Answer from the policy text in context: new evidence changes the answer, the weights stay (row S1-36).

The smallest picture of retrieval-augmented generation (Lewis et al. 2020): the checkpoint is a fixed name,
the policy text is an input. Here the reading is done by a parser instead of a network, so the result is
exact; the trained GPT does the same reading from its prompt. Left out: finding the text (retrieval) and
permission to see it.
"""

import json
import re
from dataclasses import dataclass
from typing import Protocol

# "P-7: damage reported within 30 days", or the desk's own "damaged P-7 30d"
POLICY_LINE = re.compile(r"\b(P-[1-9][0-9]*)(?:\b[^.\n]*?\bwithin ([0-9]{1,3}) days\b| ([0-9]{1,3})d\b)")


class OrderFacts(Protocol):
    """Facts from the order store; judge/verifiers.TrustedOrder has them."""

    order_id: str
    reason: str
    days: int
    damage_confirmed: bool | None


@dataclass(frozen=True, slots=True)
class ContextAnswer:
    """`decision`: "eligible" or "escalate for review". `policy_id` is None when nothing was granted."""

    decision: str
    policy_id: str | None
    window_days: int
    evidence: str
    checkpoint: str

    def as_json(self) -> str:
        """The answer in the form of the desk, with eligible null where a human decides."""
        granted = self.decision == "eligible"
        return json.dumps({"evidence": self.evidence if granted else None, "policy_id": self.policy_id,
                           "eligible": True if granted else None}, separators=(",", ":"))


def read_policy(policy_text: str, reason: str) -> tuple[str, int, str]:
    """(policy_id, window_days, the line quoted) of the one line that covers `reason`.

    A line reads like "P-7: damage reported within 30 days"; it covers a reason when it names it (damage and
    damaged count as one). Raises ValueError when no line or more than one does, or the window is not there.
    """
    if not isinstance(policy_text, str) or not policy_text.strip():
        raise ValueError("policy_text is empty: without evidence there is no answer; pass the current policy")
    stem = re.escape(reason) + ("?" if reason.endswith("ed") else "")  # damaged, damage
    word = re.compile(rf"\b{stem}\b", re.IGNORECASE)
    found = [(m, line.strip()) for line in policy_text.splitlines() if word.search(line)
             for m in [POLICY_LINE.search(line)] if m]
    if len(found) != 1:
        raise ValueError(f"{len(found)} policy lines cover {reason!r}; exactly one must, like "
                         f'"P-7: {reason} items, reported within 30 days"')
    match, line = found[0]
    return match[1], int(match[2] or match[3]), line


def answer_from_policy(order: OrderFacts, policy_text: str,
                       checkpoint: str = "returns-assistant-v3") -> ContextAnswer:
    """Decide one order from the policy text in context; `checkpoint` is only named, never changed.

    Inside the window (and, for damage, confirmed by the store): eligible under the policy. Otherwise a human
    reviews. Raises ValueError for an empty checkpoint or a policy text without exactly one line for the
    reason.
    """
    if not checkpoint:
        raise ValueError("checkpoint is empty; name the frozen weights that answer")
    policy_id, window_days, line = read_policy(policy_text, order.reason)
    confirmed = order.reason != "damaged" or order.damage_confirmed is True
    if order.days <= window_days and confirmed:
        return ContextAnswer("eligible", policy_id, window_days, line, checkpoint)
    return ContextAnswer("escalate for review", None, window_days, line, checkpoint)
