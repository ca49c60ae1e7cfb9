"""The one place that shifts targets and applies masks.

A batch of token rows is (ids, mask): ids (B, T) right-padded, mask (B, T) True on the tokens that count as targets
(the answer). Position t is predicted from positions before it, so the first column never counts.
Rows that begin with the same prompt (the answers of a group, the two answers of a pair) can share one reading of it:
`shared_rows` keeps each prompt once, and gradients flow through the shared keys and values.

Shapes: B rows, T tokens, P distinct prompts, V vocabulary, N counted targets.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Prefix:
    """Prompts read once each, without their last token, flush right."""

    ids: Tensor  # (P, L) long
    mask: Tensor  # (P, L) bool, False on left padding
    owner: Tensor  # (B,) long: the prompt of each row


@dataclass(frozen=True, slots=True)
class Rows:
    """Right-padded token rows with the mask of the tokens that count, after an optional shared prefix."""

    ids: Tensor  # (B, T) long
    mask: Tensor  # (B, T) bool
    prefix: Prefix | None = None

    def to(self, device: torch.device) -> "Rows":
        p = self.prefix
        return Rows(self.ids.to(device), self.mask.to(device),
                    p and Prefix(p.ids.to(device), p.mask.to(device), p.owner.to(device)))


def pad_rows(prompts: list[list[int]], answers: list[list[int]], pad_id: int, max_len: int | None = None) -> Rows:
    """Rows of prompt + answer, right-padded with `pad_id`; only answer tokens count.

    Raises ValueError for an empty prompt (nothing predicts the first answer token) and for a row over max_len."""
    if not prompts or len(prompts) != len(answers):
        raise ValueError(f"{len(prompts)} prompts and {len(answers)} answers: give as many of each, at least one")
    lengths = [len(p) + len(a) for p, a in zip(prompts, answers)]
    if min(map(len, prompts)) == 0:
        raise ValueError(f"row {[len(p) for p in prompts].index(0)} has an empty prompt")
    if max_len is not None and max(lengths) > max_len:
        raise ValueError(f"row {lengths.index(max(lengths))} has {max(lengths)} tokens, over the limit of {max_len}")
    ids = torch.full((len(prompts), max(lengths)), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for i, (p, a) in enumerate(zip(prompts, answers)):
        ids[i, :len(p) + len(a)] = torch.tensor(p + a)
        mask[i, len(p):len(p) + len(a)] = True
    return Rows(ids, mask)


def shared_rows(prompts: list[list[int]], answers: list[list[int]], owner: list[int], pad_id: int) -> Rows:
    """Rows of answers, answers[i] after prompts[owner[i]]; each prompt is kept once.

    Row i holds the last prompt token and the answer: log-probabilities are those of `pad_rows`, at less cost.
    Raises ValueError for an empty prompt or an owner that is not one of the prompts."""
    if not prompts or min(map(len, prompts)) == 0:
        raise ValueError("give at least one prompt, and no empty one: nothing predicts the first answer token")
    if len(owner) != len(answers) or not all(0 <= i < len(prompts) for i in owner):
        raise ValueError(f"{len(answers)} answers need as many owners, each 0 to {len(prompts) - 1}; got {owner}")
    rows = pad_rows([prompts[i][-1:] for i in owner], answers, pad_id)
    width = max(map(len, prompts)) - 1
    if width == 0:
        return rows
    left = [width + 1 - len(p) for p in prompts]  # places of padding
    ids = torch.tensor([[pad_id] * n + p[:-1] for n, p in zip(left, prompts)])
    return Rows(rows.ids, rows.mask, Prefix(ids, torch.arange(width) >= torch.tensor(left)[:, None],
                                            torch.tensor(owner)))


def token_logps(model, rows: Rows, temperature: float = 1.0) -> Tensor:
    """Log-probability of every counted token at `temperature`, 0 elsewhere. (B, T-1), aligned with rows.ids[:, 1:].

    Only counted positions go through the head, which is most of the cost at a small width."""
    mask = rows.mask[:, 1:]  # (B, T-1)
    cache = None
    if rows.prefix is not None:
        ids, valid, owner = rows.prefix.ids, rows.prefix.mask, rows.prefix.owner
        cache = model.new_cache(len(ids), ids.shape[1] + mask.shape[1])
        model.hidden(ids, valid, cache)
        cache.select(owner)
    h = model.hidden(rows.ids[:, :-1], cache=cache)[mask]  # (N, C)
    logps = -F.cross_entropy(model.head(h).float() / temperature, rows.ids[:, 1:][mask], reduction="none")  # (N,)
    return torch.zeros(mask.shape, device=logps.device).masked_scatter(mask, logps)


def sum_logps(model, rows: Rows) -> Tensor:
    """Sum log-probability of each row's answer. (B,). A row with no counted token gives 0."""
    return token_logps(model, rows).sum(-1)


def answer_loss(model, rows: Rows) -> tuple[Tensor, dict[str, float]]:
    """Mean negative log-probability over counted tokens: the SFT loss, and the LM loss when all tokens count.

    A batch with nothing to count gives 0 with zero gradients, not NaN."""
    n = rows.mask[:, 1:].sum().clamp(min=1)
    loss = -token_logps(model, rows).sum() / n
    return loss, {"target_tokens": float(n)}
