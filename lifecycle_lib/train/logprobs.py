"""The one place that shifts targets and applies masks.

A batch of token rows is (ids, mask): ids (B, T) right-padded, mask (B, T) True on the tokens that count as targets
(the answer). Position t is predicted from positions before it, so the first column never counts.

Shapes: B rows, T tokens, V vocabulary, N counted targets.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rows:
    """Right-padded token rows with the mask of the tokens that count."""

    ids: Tensor  # (B, T) long
    mask: Tensor  # (B, T) bool

    def to(self, device: torch.device) -> "Rows":
        return Rows(self.ids.to(device), self.mask.to(device))


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


def token_logps(model, rows: Rows, temperature: float = 1.0) -> Tensor:
    """Log-probability of every counted token at `temperature`, 0 elsewhere. (B, T-1), aligned with rows.ids[:, 1:].

    Only counted positions go through the head, which is most of the cost at a small width."""
    mask = rows.mask[:, 1:]  # (B, T-1)
    h = model.hidden(rows.ids[:, :-1])[mask]  # (N, C)
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
