"""Prefix tuning (Li & Liang 2021): learned keys and values in front of every layer, the network frozen.

A layer's attention sees P extra keys and values that no token produced. They are put where keys and values already
live, in the cache (model/gpt.Cache), so real tokens start at position P and everything that reads a cache (training
through shared prompts, decoding) works unchanged. As in peft, the keys are stored as attention reads them: rotary
positions are not applied to them again. A row padded by n places on the left has its tokens n places further on, so
its prefix keys are turned by n places too: padding changes nothing (peft leaves that to the caller's positions).

There is no neutral start: a prefix takes attention from the first step on, whatever it holds. `from_tokens` begins with
the keys and values of real tokens, the paper's "initialise with real words".

Left out: the paper's MLP that produces the prefix while training (`prefix_projection` in peft).

Shapes: L layers, H heads, P prefix tokens, D head width.
"""

import torch
from torch import Tensor, nn

from lifecycle_lib.model.gpt import GPT, Cache, GPTConfig, rotate


class PrefixTuning(nn.Module):
    """A GPT behind a learned prefix; the same face as GPT (hidden, head, new_cache, forward), P tokens less of room.

    `k`, `v` (L, H, P, D) are the only trained numbers: 2 * L * P * n_embd. Raises ValueError for a prefix that leaves
    no room in block_size."""

    def __init__(self, model: GPT, n_tokens: int, generator: torch.Generator | None = None, std: float = 0.02) -> None:
        super().__init__()
        if not 1 <= n_tokens < model.cfg.block_size:
            raise ValueError(f"n_tokens={n_tokens} must be 1 to {model.cfg.block_size - 1}: a prefix uses up places "
                             f"of block_size={model.cfg.block_size}")
        model.requires_grad_(False)
        self.model, self.n_tokens = model, n_tokens
        shape = (model.cfg.n_layer, model.cfg.n_head, n_tokens, model.cfg.n_embd // model.cfg.n_head)
        self.k, self.v = (nn.Parameter((std * torch.randn(shape, generator=generator)).to(model.wte.weight))
                          for _ in range(2))

    @classmethod
    @torch.no_grad()
    def from_tokens(cls, model: GPT, ids: list[int]) -> "PrefixTuning":
        """A prefix of len(ids) tokens that starts as their keys and values: the model after having read them."""
        prefix, cache = cls(model, len(ids)), model.new_cache(1, len(ids))
        model.hidden(torch.tensor([ids], device=model.device), cache=cache)
        for own, read in ((prefix.k, cache.k), (prefix.v, cache.v)):
            own.copy_(torch.cat(read))  # L of (1, H, P, D)
        return prefix

    @property
    def cfg(self) -> GPTConfig:
        """The model's shape with the room that is left."""
        return GPTConfig(**{**self.model.cfg.as_dict(), "block_size": self.model.cfg.block_size - self.n_tokens})

    @property
    def device(self) -> torch.device:
        return self.model.device

    def new_cache(self, batch: int, size: int) -> Cache:
        """A cache of `batch` rows with the prefix in it and room for `size` tokens more."""
        cache = self.model.new_cache(batch, self.n_tokens + size)
        for i in range(self.model.cfg.n_layer):
            for own, room in ((self.k[i], cache.k), (self.v[i], cache.v)):
                room[i][:, :, :self.n_tokens] = own  # the gradient flows through this assignment
        cache.mask[:, :self.n_tokens] = True
        cache.length = self.n_tokens
        return cache

    def hidden(self, idx: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Final features (B, T, C), as GPT.hidden."""
        cache = self.new_cache(*idx.shape) if cache is None else cache
        if mask is not None and cache.length == self.n_tokens:
            pads = (~mask).sum(1)  # (B,)
            cos, sin = (table[pads][:, None, None] for table in (self.model.cos, self.model.sin))  # (B, 1, 1, D)
            cache.k = [torch.cat((rotate(k[:, :, :self.n_tokens], cos, sin), k[:, :, self.n_tokens:]), dim=2)
                       for k in cache.k]
        return self.model.hidden(idx, mask, cache)

    def head(self, h: Tensor) -> Tensor:
        return self.model.head(h)

    def forward(self, idx: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Logits (B, T, V)."""
        return self.head(self.hidden(idx, mask, cache))
