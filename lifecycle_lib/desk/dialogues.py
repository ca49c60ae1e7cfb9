"""Conversations of three turns at the returns desk, each user turn with its one right answer.

keep     the reason comes first; then the customer asks again, twice, and names nothing
correct  the customer takes the first reason back and gives another: from then on the new one holds
ask      the first message names no reason: the right answer asks for it, in one JSON object
So the last turn never says what it is about: who answers it must have kept the goal, and the correction.

Left out: two corrections, a change of order or item, customers who come back to the first reason.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lifecycle_lib.core.seeds import rng as make_rng
from lifecycle_lib.desk.cases import Case, draw_case
from lifecycle_lib.desk.world import draw_message

KINDS = ("keep", "correct", "ask")
AGAIN = ("are you sure", "and now", "please repeat it", "so what now", "is that final", "say it again")
TAKE_BACK = ("sorry, {m}", "no, {m}", "i mean {m}", "wait, {m}")
VAGUE = ("i want to return my {item}", "it is about my {item}", "please look at the {item}", "help me with my {item}")
ASK = '{"ask":"reason"}'


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialogue:
    """`turns`: (what the customer says, the right answer). `slot`: the message that states the reason in force."""

    kind: str
    case: Case
    turns: tuple[tuple[str, str], ...]
    slot: str

    def messages(self, said: Sequence[str] | None = None) -> list[dict]:
        """The conversation as messages (train/chat.py): with the right answers, or up to the user turn that follows
        the answers `said`."""
        answers = [a for _, a in self.turns] if said is None else list(said)
        out = [*({"role": "policy", "content": p.line()} for p in self.case.policies),
               {"role": "order", "content": self.case.order.line()}]
        for i, (user, _) in enumerate(self.turns[:len(answers) + 1]):
            out.append({"role": "user", "content": user})
            if i < len(answers):
                out.append({"role": "bot", "content": answers[i]})
        return out


def draw_dialogues(n: int, seed: int, split: str, kinds: Sequence[str] = KINDS) -> list[Dialogue]:
    """`n` dialogues, the kinds in turn; "eval" has unseen (days, window) pairs. Raises ValueError for n < 1 or an
    unknown kind."""
    if n < 1 or not kinds or set(kinds) - set(KINDS):
        raise ValueError(f"n={n} dialogues of kinds {list(kinds)}: ask for at least 1, of {', '.join(KINDS)}")
    rng = make_rng(seed, "dialogues", split)
    out = []
    for i in range(n):
        kind = kinds[i % len(kinds)]
        case = draw_case(rng, f"{split}-{kind}-{i:05d}", unseen=split == "eval")
        answer, item, slot = case.answer, case.order.item, case.message
        first, second = (slot, answer), (rng.choice(AGAIN), answer)
        if kind == "correct":
            policy = rng.choice([p for p in case.policies if p.reason != case.reason])
            answer = replace(case, reason=policy.reason, policy=policy).answer
            slot = draw_message(rng, policy.reason, item)
            second = (rng.choice(TAKE_BACK).format(m=slot), answer)
        elif kind == "ask":
            first, second = (rng.choice(VAGUE).format(item=item), ASK), first
        third = (rng.choice([a for a in AGAIN if a != second[0]]), answer)
        out.append(Dialogue(kind=kind, case=case, turns=(first, second, third), slot=slot))
    return out
