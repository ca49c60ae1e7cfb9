"""Staying close to where training started: three leashes on a fine-tune.

- KL to a frozen reference, over the counted tokens (R = reference, P = policy, both over the vocabulary):
  forward  mean_t sum_v R (log R - log P)   punishes P for dropping what the reference would say (covers all modes);
  reverse  mean_t sum_v P (log P - log R)   punishes P for saying what the reference would not (the RLHF direction).
  On the new task's own rows this is learning without forgetting (Li & Hoiem 2016).
- L2-SP (Li, Grandvalet & Davoine 2018):  alpha / 2 * sum_i (theta_i - theta0_i)^2, a spring to the starting point.
- Replay (rehearsal, Robins 1995): a share of every batch comes from an earlier stage's rows.

Left out: Fisher weights (EWC), per-layer strengths, a schedule for beta.

Shapes: B rows, T tokens, N counted tokens, V vocabulary, K replayed rows.
"""

import math
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lifecycle_lib.core.seeds import make_generator
from lifecycle_lib.train.logprobs import Rows, answer_loss
from lifecycle_lib.train.loop import LossFn

DIRECTIONS = ("forward", "reverse")


def kl_tokens(policy: Tensor, reference: Tensor, direction: str = "forward") -> Tensor:
    """KL in nats at every token, from logits (N, V) of both. (N,). The gradient flows into `policy` alone."""
    if direction not in DIRECTIONS:
        raise ValueError(f"direction={direction!r} is unknown; use 'forward' (R over P) or 'reverse' (P over R)")
    if policy.shape != reference.shape:
        raise ValueError(f"policy logits {tuple(policy.shape)} and reference logits {tuple(reference.shape)}: "
                         "the same tokens of the same vocabulary must be compared")
    p, r = F.log_softmax(policy.float(), -1), F.log_softmax(reference.detach().float(), -1)
    return ((r.exp() * (r - p)) if direction == "forward" else (p.exp() * (p - r))).sum(-1)


def counted_logits(model: nn.Module, rows: Rows) -> Tensor:
    """Logits that predict the counted tokens, after the shared prompt where rows have one. (N, V)"""
    cache = None
    if rows.prefix is not None:  # as logprobs.token_logps reads it
        ids, valid, owner = rows.prefix.ids, rows.prefix.mask, rows.prefix.owner
        cache = model.new_cache(len(ids), ids.shape[1] + rows.ids.shape[1] - 1)
        model.hidden(ids, valid, cache)
        cache.select(owner)
    return model.head(model.hidden(rows.ids[:, :-1], cache=cache)[rows.mask[:, 1:]])


def frozen(model: nn.Module) -> nn.Module:
    """The same model, ready to be a reference: no gradient, evaluation mode."""
    return model.requires_grad_(False).eval()


def kl_loss(reference: nn.Module, beta: float, direction: str = "forward",
            elsewhere: Iterator[Rows] | None = None) -> LossFn:
    """loss_fn(model, rows) = answer loss + beta * mean KL to `reference` over the counted tokens: of the same rows, or
    of next(elsewhere), where the two are to agree although nothing is learnt there."""
    _strength("beta", beta)

    def loss_fn(model: nn.Module, rows: Rows) -> tuple[Tensor, dict[str, float]]:
        logits = counted_logits(model, rows)
        task = F.cross_entropy(logits.float(), rows.ids[:, 1:][rows.mask[:, 1:]])
        if elsewhere is not None:
            rows = next(elsewhere).to(rows.ids.device)
            logits = counted_logits(model, rows)
        with torch.no_grad():
            held = counted_logits(reference, rows)
        kl = kl_tokens(logits, held, direction).mean()
        return task + beta * kl, {"task": float(task.detach()), "kl": float(kl.detach())}

    return loss_fn


def l2_sp(model: nn.Module, start: Mapping[str, Tensor]) -> Tensor:
    """Half the squared distance of the trained parameters from `start` (name -> tensor). A scalar.

    Raises ValueError when a trained parameter is not in `start`."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if missing := sorted(set(named) - set(start)):
        raise ValueError(f"{missing[0]}: no starting value; take `start` from this model before training")
    return sum((p - start[n]).square().sum() for n, p in named.items()) / 2


def l2_sp_loss(model: nn.Module, alpha: float) -> LossFn:
    """loss_fn(model, rows) = answer loss + alpha * l2_sp to where `model` stands now (copied here)."""
    _strength("alpha", alpha)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}

    def loss_fn(model: nn.Module, rows: Rows) -> tuple[Tensor, dict[str, float]]:
        task, metrics = answer_loss(model, rows)
        spring = l2_sp(model, start)
        return task + alpha * spring, {**metrics, "task": float(task.detach()), "l2_sp": float(spring.detach())}

    return loss_fn


def replayed(step: int, batch: int, share: float) -> int:
    """Rows of this step's batch that come from before: whole numbers whose running mean is the share, so that
    1 % of 32 is one row in every third batch or so, not none."""
    return math.floor(share * batch * (step + 1) + 1e-9) - math.floor(share * batch * step + 1e-9)


def replay(new: Callable[[int], Rows], old: Rows, share: float, seed: int, pad_id: int = 0) -> Callable[[int], Rows]:
    """batches(step): the batch of `new` with its last K rows replaced by rows of `old`, drawn with replacement.

    The batch keeps its size, so replay costs new rows, not steps. Raises ValueError for a share outside [0, 1], or
    rows with a shared prompt."""
    whole_rows(old)
    if not 0 <= share <= 1:
        raise ValueError(f"share={share} must be 0 to 1; 0.05 replaces one row in twenty")

    def batches(step: int) -> Rows:
        rows = whole_rows(new(step))
        n = len(rows.ids)
        k = replayed(step, n, share)
        if k == 0:
            return rows
        pick = torch.randint(len(old.ids), (k,), generator=make_generator(seed, "replay", step))
        kept = Rows(rows.ids[:n - k], rows.mask[:n - k])
        return stack(kept, Rows(old.ids[pick], old.mask[pick]), pad_id)

    return batches


def stack(first: Rows, second: Rows, pad_id: int = 0) -> Rows:
    """Rows of both, right-padded to one width, without columns of padding alone.

    Raises ValueError for rows with a shared prompt."""
    whole_rows(first), whole_rows(second)
    width = max(first.ids.shape[1], second.ids.shape[1])
    ids = torch.cat([F.pad(r.ids, (0, width - r.ids.shape[1]), value=pad_id) for r in (first, second)])
    mask = torch.cat([F.pad(r.mask, (0, width - r.mask.shape[1]), value=False) for r in (first, second)])
    used = int((ids != pad_id).any(0).nonzero().max()) + 1
    return Rows(ids[:, :used], mask[:, :used])


def whole_rows(rows: Rows) -> Rows:
    """The same rows, each with its own prompt. Raises ValueError where they share one, which slicing would lose."""
    if rows.prefix is not None:
        raise ValueError("rows that share a prefix would lose it when picked, sliced or stacked: these share their "
                         "prompts (logprobs.shared_rows); use pad_rows")
    return rows


def _strength(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}={value} must be 0 or more and finite; 0 is no leash at all")
