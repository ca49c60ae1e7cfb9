"""Span-masked loss: the model reads a stretch of a demonstration and is not taught to write it.

A token that touches a marked span (characters of the answer) stays in the input and leaves the loss. What decides is
the first token of a span: that is where the stretch begins or does not. `late` skips it, on purpose: the classic
off-by-one, which masks nearly every token of a habit and keeps the habit.

Left out: weights between 0 and 1, and a push against the masked tokens (unlikelihood, Welleck et al. 2020).
"""

from collections.abc import Sequence

from torch import Tensor

from lifecycle_lib.model.tokenizer import Tokenizer
from lifecycle_lib.train.logprobs import Rows, pad_rows
from lifecycle_lib.train.sft import encode_rows

Span = tuple[int, int]


def tokens_in(pieces: Sequence[str], spans: Sequence[Span], late: int = 0) -> list[bool]:
    """Which tokens touch a span? `pieces` are the tokens' texts, end to end; `late` tokens at a span's start do not
    count. Raises ValueError for a span outside the text."""
    ends, at = [], 0
    for piece in pieces:
        ends.append((at, at := at + len(piece)))
    inside = [False] * len(pieces)
    for start, end in spans:
        if not 0 <= start < end <= at:
            raise ValueError(f"span ({start}, {end}) lies outside the answer's {at} characters; find the span again")
        touched = [i for i, (a, b) in enumerate(ends) if a < end and b > start]
        for i in touched[late:]:
            inside[i] = True
    return inside


def masked_rows(tok: Tokenizer, rows: Sequence[dict], spans: Sequence[Sequence[Span]], late: int = 0) -> Rows:
    """{"prompt", "answer"} rows with the loss on the answer, but not on its spans (characters of the answer).

    Raises ValueError when spans and rows differ in number, or a span lies outside its answer."""
    if len(rows) != len(spans):
        raise ValueError(f"{len(rows)} rows and {len(spans)} lists of spans: give one list a row, empty where none")
    encoded = encode_rows(tok, rows)
    made = pad_rows([p for p, _ in encoded], [a for _, a in encoded], tok.special["<pad>"])
    mask: Tensor = made.mask.clone()
    for i, ((prompt, answer), found) in enumerate(zip(encoded, spans)):
        for j, out in enumerate(tokens_in([tok.decode([t]) for t in answer[:-1]], found, late)):
            if out:
                mask[i, len(prompt) + j] = False
    return Rows(made.ids, mask)
