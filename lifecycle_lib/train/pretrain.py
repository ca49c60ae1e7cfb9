"""Pretraining: next-token prediction on a packed stream of documents.

Documents are joined end to end and cut into rows of block_size tokens; every token counts as a target.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lifecycle_lib.core.seeds import make_generator
from lifecycle_lib.train.logprobs import Rows, answer_loss


def pack(documents: Sequence[list[int]], n_hold_out: int = 0) -> tuple[Tensor, Tensor]:
    """(train stream, held-out stream) of token ids; the last `n_hold_out` documents are held out."""
    cut = len(documents) - n_hold_out
    if cut < 1:
        raise ValueError(f"{len(documents)} documents, {n_hold_out} held out: nothing is left to train on")
    join = [torch.tensor([t for d in part for t in d], dtype=torch.long) for part in (documents[:cut], documents[cut:])]
    return join[0], join[1]


def lm_rows(stream: Tensor, starts: Tensor, length: int) -> Rows:
    """Rows of `length` tokens of the stream at `starts`; every token after the first is a target."""
    ids = torch.stack([stream[s:s + length] for s in starts.tolist()])  # (B, T)
    return Rows(ids, torch.ones_like(ids, dtype=torch.bool))


def lm_batches(stream: Tensor, batch_size: int, length: int, seed: int) -> Callable[[int], Rows]:
    """batches(step): random windows of the stream, a pure function of (seed, step)."""
    if len(stream) < length:
        raise ValueError(f"the corpus has {len(stream)} tokens, fewer than a block of {length}; "
                         "give more text or a smaller block_size")

    def batches(step: int) -> Rows:
        starts = torch.randint(len(stream) - length + 1, (batch_size,), generator=make_generator(seed, "lm", step))
        return lm_rows(stream, starts, length)

    return batches


@torch.no_grad()
def lm_loss(model, stream: Tensor, length: int, max_rows: int = 256) -> float:
    """Mean loss in nats per token over consecutive blocks of a held-out stream."""
    if len(stream) < 2:
        raise ValueError("the held-out part has no token to predict; hold out more text")
    length = min(length, len(stream))
    starts = torch.arange(0, len(stream) - length + 1, length)[:max_rows]
    total = count = 0.0
    for part in starts.split(32):
        rows = lm_rows(stream, part, length).to(model.device)
        n = rows.mask[:, 1:].sum().item()
        total += float(answer_loss(model, rows)[0]) * n
        count += n
    return total / count
