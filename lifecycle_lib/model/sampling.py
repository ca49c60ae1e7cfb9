"""Batched token-by-token decoding with a key-value cache.

Prompts of different lengths share a batch by left padding (rotary positions are relative, so padding on the
left changes nothing). Each prompt is read once and its cache repeated for `n_samples` continuations; rows that
have ended leave the batch. Temperature 0 is greedy.

The model is a GPT, or anything with its `hidden`, `head`, `new_cache`, `device` and `cfg.block_size`.

Shapes: P prompts, S samples a prompt, B = P * S rows, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lifecycle_lib.model.gpt import GPT


@dataclass(frozen=True, slots=True)
class Samples:
    """Continuations in prompt order (row p * S + s), end token included, with the log-probability of each token
    under the sampling distribution (temperature applied)."""

    ids: list[list[int]]
    logps: list[list[float]]
    ended: list[bool]
    tokens: int  # decoded tokens in all

    def texts(self, tok) -> list[str]:
        """Each continuation as text, without its end token. `tok` needs `decode`."""
        return [tok.decode(ids[:-1] if end else ids) for ids, end in zip(self.ids, self.ended)]


def left_pad(prompts: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """(ids, mask), both (P, T), prompts flush right."""
    if not prompts or min(map(len, prompts)) == 0:
        raise ValueError("generate needs at least one prompt, and no empty one")
    width = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts])
    return ids, mask


def draw(logits: Tensor, temperature: float, generator: torch.Generator | None = None,
         uniform: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One token a row and its log-probability. logits (B, V) -> (B,), (B,).

    `uniform` (B,) in [0, 1) decides each row's token by inverse transform; without it, it is drawn from `generator`.
    A token of probability 0 is never drawn."""
    if temperature == 0:
        logps = torch.log_softmax(logits.float(), -1)
        token = logits.argmax(-1)
    else:
        logps = torch.log_softmax(logits.float() / temperature, -1)
        if uniform is None:  # made on the CPU: the same draw on every device
            uniform = torch.rand(len(logits), generator=generator)
        mass = logps.exp().cumsum(-1)  # (B, V); the last one is 1 up to rounding
        u = uniform.to(logits.device).unsqueeze(-1) * mass[:, -1:]
        token = torch.searchsorted(mass, u, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)
    return token, logps.gather(-1, token.unsqueeze(-1)).squeeze(-1)


@torch.inference_mode()
def generate(model: GPT, prompts: list[list[int]], *, eos_id: int, pad_id: int, max_new_tokens: int = 40,
             temperature: float = 1.0, n_samples: int = 1, generator: torch.Generator | None = None,
             batch_rows: int = 512) -> Samples:
    """Continue every prompt `n_samples` times until eos_id or max_new_tokens.

    Raises ValueError for an empty prompt, a temperature under 0, or a prompt that leaves no room in block_size."""
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature} must be 0 (greedy) or more")
    if n_samples < 1 or max_new_tokens < 1:
        raise ValueError(f"n_samples={n_samples} and max_new_tokens={max_new_tokens} must be at least 1")
    ids: list[list[int]] = []
    logps: list[list[float]] = []
    step = max(1, batch_rows // n_samples)
    for start in range(0, len(prompts), step) or [0]:
        part = decode(model, prompts[start:start + step], eos_id, pad_id, max_new_tokens, temperature, n_samples,
                      generator)
        ids += part[0]
        logps += part[1]
    return Samples(ids, logps, [bool(x) and x[-1] == eos_id for x in ids], sum(map(len, ids)))


def decode(model: GPT, prompts: list[list[int]], eos_id: int, pad_id: int, max_new: int, temperature: float,
           n_samples: int, generator: torch.Generator | None) -> tuple[list[list[int]], list[list[float]]]:
    """One batch of `generate`."""
    idx, mask = left_pad(prompts, pad_id)
    idx, mask = idx.to(model.device), mask.to(model.device)
    width = idx.shape[1]
    room = model.cfg.block_size - width
    if room < 1:
        raise ValueError(f"a prompt of {width} tokens leaves no room in block_size={model.cfg.block_size}; shorten it")
    steps = min(max_new, room)
    cache = model.new_cache(len(prompts), width + steps)
    last = model.head(model.hidden(idx, mask, cache)[:, -1])  # (P, V)
    rows = torch.arange(len(prompts), device=idx.device).repeat_interleave(n_samples)
    cache.select(rows)
    logits = last[rows]  # (B, V)
    live = torch.arange(len(rows), device=idx.device)  # original row of every row still in the batch
    out = torch.full((len(rows), steps), pad_id, device=idx.device)
    out_logp = torch.zeros(len(rows), steps, device=idx.device)
    going = torch.ones_like(live, dtype=torch.bool)  # of the live rows, those that have not ended
    for t in range(steps):
        # a number for every row, finished or not: what one row draws does not depend on when others end
        uniform = torch.rand(len(rows), generator=generator).to(idx.device)[live] if temperature else None
        token, logp = draw(logits, temperature, uniform=uniform)
        out[live, t], out_logp[live, t] = token, logp
        going &= token != eos_id  # a row that ended may stay a while, and sample on past its end
        if t + 1 == steps or not bool(going.any()):
            break
        if int(going.sum()) < 0.8 * len(going):  # finished rows leave, a few at a time
            live, token = live[going], token[going]
            cache.select(going.nonzero().squeeze(-1))
            going = going[going]
        logits = model(token.unsqueeze(-1), None, cache)[:, -1]
    ids, logps = [], []
    for row, lp in zip(out.tolist(), out_logp.tolist()):
        end = row.index(eos_id) + 1 if eos_id in row else len(row)
        ids.append(row[:end])
        logps.append(lp[:end])
    return ids, logps
