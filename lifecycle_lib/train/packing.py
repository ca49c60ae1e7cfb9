"""Packing: several rows in one block, so that a batch holds tokens and not padding, and no row sees another.

Three things could let it: attention (closed by a block-diagonal mask), the token shift of our GPT, which hands each
token its left neighbour's features whatever the mask says (closed by one pad token between rows), and positions, which
go on counting (harmless: rotary attention depends on distances alone). Then the loss equals that of padded rows in
value and gradient. Bins are filled best fit, longest row first (Johnson 1974), as TRL's "bfd" does.

Left out: splitting a row over two blocks; models other than GPT, which must take the mask themselves; variable-length
attention kernels, without which a CPU computes the masked products too.

Shapes: B blocks, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lifecycle_lib.model.gpt import GPT


@dataclass(frozen=True, slots=True)
class Packed:
    """Blocks of rows. `owner` (B, T): which row of its block a token belongs to, -1 on padding."""

    ids: Tensor  # (B, T) long
    mask: Tensor  # (B, T) bool: the tokens that count
    owner: Tensor  # (B, T) long

    @property
    def used(self) -> float:
        """Share of places that hold a token of a row."""
        return (self.owner >= 0).float().mean().item()

    def to(self, device: torch.device) -> "Packed":
        return Packed(self.ids.to(device), self.mask.to(device), self.owner.to(device))


def fill_bins(lengths: Sequence[int], size: int, gap: int = 0) -> list[list[int]]:
    """Row numbers a block, best fit: longest row first, each into the fullest block with room; `gap` between rows.

    Raises ValueError for no rows or a row over `size`."""
    if not lengths or max(lengths) > size:
        raise ValueError(f"{len(lengths)} rows, the longest of {max(lengths, default=0)} tokens: a block of {size} "
                         "needs at least one row and room for each; give rows, or a larger block")
    bins: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = [b for b in range(len(bins)) if room[b] >= lengths[i] + gap]
        if fits:
            best = min(fits, key=room.__getitem__)
        else:
            best = len(bins)
            bins.append([])
            room.append(size + gap)
        bins[best].append(i)
        room[best] -= lengths[i] + gap
    return bins


def pack_rows(rows: Sequence[tuple[Sequence[int], Sequence[bool]]], block: int, pad_id: int, gap: int = 1) -> Packed:
    """Blocks of at most `block` tokens from rows of (ids, which of them count), `gap` pad tokens between rows.

    `gap` 0 is for models without token shift. The first token of a row never counts: nothing stands before it."""
    bins = fill_bins([len(ids) for ids, _ in rows], block, gap)
    width = max(sum(len(rows[i][0]) + gap for i in group) for group in bins) - gap
    ids = torch.full((len(bins), width), pad_id, dtype=torch.long)
    mask, owner = torch.zeros_like(ids, dtype=torch.bool), torch.full_like(ids, -1)
    for b, group in enumerate(bins):
        at = 0
        for number, i in enumerate(group):
            end = at + len(rows[i][0])
            ids[b, at:end], mask[b, at:end] = torch.tensor(rows[i][0]), torch.tensor(rows[i][1], dtype=torch.bool)
            mask[b, at] = False
            owner[b, at:end] = number
            at = end + gap
    return Packed(ids, mask, owner)


def own_row(owner: Tensor) -> Tensor:
    """Who may look at whom: earlier tokens of the same row, and oneself. (B, T) -> (B, 1, T, T) bool."""
    T = owner.shape[1]
    before = torch.ones(T, T, dtype=torch.bool, device=owner.device).tril()
    same = (owner[:, :, None] == owner[:, None, :]) & (owner >= 0)[:, None, :]
    return ((same & before) | torch.eye(T, dtype=torch.bool, device=owner.device))[:, None]


def packed_hidden(model: GPT, packed: Packed, isolate: bool = True) -> Tensor:
    """Final features (B, T, C): the model's own blocks under the block-diagonal mask. `isolate=False` lets every token
    see all before it in its block, as packing without a mask does: the broken variant. The loop repeats that of
    GPT.hidden, which knows left padding only and takes no mask of pairs; one row in a block gives equal features."""
    T = packed.ids.shape[1]
    if T > model.cfg.block_size:
        raise ValueError(f"{T} tokens do not fit block_size={model.cfg.block_size}; pack smaller blocks")
    real = packed.owner >= 0
    bias = own_row(packed.owner if isolate else torch.where(real, 0, -1))
    x = model.wte(packed.ids)
    for block in model.blocks:
        x = block(x, real.unsqueeze(-1).to(x.dtype), model.cos[:T], model.sin[:T], bias, None)
    return model.norm_f(x)


def packed_loss(model: GPT, packed: Packed, isolate: bool = True) -> tuple[Tensor, dict[str, float]]:
    """Mean negative log-probability over counted tokens, as logprobs.answer_loss gives for the same rows padded."""
    counts = packed.mask[:, 1:]
    h = packed_hidden(model, Packed(packed.ids[:, :-1], packed.mask[:, :-1], packed.owner[:, :-1]), isolate)[counts]
    n = counts.sum().clamp(min=1)
    loss = F.cross_entropy(model.head(h).float(), packed.ids[:, 1:][counts], reduction="sum") / n
    return loss, {"target_tokens": float(n)}
