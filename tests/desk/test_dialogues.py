"""Dialogues: every right answer follows from what the customer said last about the reason, and from nothing else."""

import json

import pytest

from lifecycle_lib.desk.cases import render_answer
from lifecycle_lib.desk.dialogues import AGAIN, ASK, KINDS, draw_dialogues
from lifecycle_lib.desk.world import PHRASES, held_out

TALKS = draw_dialogues(300, 0, "train")


def reason_of(message: str, item: str) -> str:
    """The reason whose phrase ends the message: read from the words, not from the dialogue."""
    return next(r for r, phrases in PHRASES.items() if any(message.endswith(p.format(item=item)) for p in phrases))


def test_the_last_stated_reason_decides():
    for d in TALKS:
        said, lines = None, {p.reason: p for p in d.case.policies}
        for user, answer in d.turns:
            if user not in AGAIN and not (d.kind == "ask" and answer == ASK):
                said = reason_of(user, d.case.order.item)
            want = ASK if said is None else render_answer(lines.get(said), d.case.order)
            assert answer == want, d
        assert reason_of(d.slot, d.case.order.item) == said and d.turns[2][0] in AGAIN


def test_corrections_change_the_answer_and_kinds_come_in_turn():
    assert [d.kind for d in TALKS[:4]] == ["keep", "correct", "ask", "keep"]
    for d in TALKS:
        first, second, third = (a for _, a in d.turns)
        assert second == third and (first == second) == (d.kind == "keep")
        assert all(json.loads(a) for a in (first, second))


def test_messages_up_to_a_turn():
    d = TALKS[1]
    assert [m["role"] for m in d.messages()][-6:] == ["user", "bot"] * 3
    asked = d.messages(["mine"])
    assert asked[-1]["content"] == d.turns[1][0] and asked[-2]["content"] == "mine"
    assert d.messages([])[-1]["content"] == d.turns[0][0]


def test_splits_hold_pairs_out():
    for split, unseen in (("train", False), ("eval", True)):
        for d in draw_dialogues(60, 3, split):
            assert all(held_out(d.case.days, p.window_days) == unseen for p in d.case.policies)


def test_bad_asks():
    assert len(draw_dialogues(5, 0, "train", ("keep",))) == 5 and set(KINDS) == {"keep", "correct", "ask"}
    for n, kinds in ((0, KINDS), (3, ("chat",)), (3, ())):
        with pytest.raises(ValueError, match=f"n={n} dialogues"):
            draw_dialogues(n, 0, "train", kinds)
