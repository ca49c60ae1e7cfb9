"""The kin of DPO: one batch of pairs, other losses. Each keeps the two answers' log-probabilities and changes what is
asked of them.

With d = [(log pi - log ref)(chosen)] - [(log pi - log ref)(rejected)]:
- cDPO (Mitchell 2023): (1 - e) * -log sigmoid(beta d) + e * -log sigmoid(-beta d). Some labels may be wrong: a finite
  gap is best.
- robust DPO (Chowdhury et al. 2024, eq. 12): the same with -e, over 1 - 2e. Unbiased: its mean over labels flipped at
  rate e is the DPO loss of the clean ones.
- IPO (Azar et al. 2024, eq. 17): (d - 1 / (2 beta))^2. A gap is asked for, and no more than that. The paper has sums of
  log-probabilities; TRL divides each answer's by its length (`lengths`), and its beta then counts nats a token.
- length-normalised DPO (TRL's sigmoid_norm): d of means over tokens. R-DPO (Park et al. 2024): the optimum of reward
  - alpha |y| - beta KL has reward = beta log(pi / ref) + alpha |y| + constant, so a vote's logit is beta d + alpha *
  (|chosen| - |rejected|): what length explains of a vote need not be learnt.
- KTO (Ethayarajh et al. 2024, eq. 7): no pairs, only good and bad answers, each against a common zero: the KL that
  mismatched answers estimate. ORPO (Hong et al. 2024, eq. 6): no reference; answer loss plus lambda times -log sigmoid
  of the log odds ratio, of mean log-probabilities. TRL's answer loss counts the prompt as well; ours does not.

Left out: SimPO, RPO, hinge, listwise losses. KTO's zero is TRL's (answers moved on by one within the batch).

Shapes: B pairs, T tokens.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lifecycle_lib.core.seeds import rng as make_rng
from lifecycle_lib.train.dpo import PairBatch, dpo_loss, one_each
from lifecycle_lib.train.logprobs import Prefix, Rows, sum_logps
from lifecycle_lib.train.loop import LossFn

KINDS = ("dpo", "cdpo", "robust", "ipo", "ipo_mean", "norm", "rdpo", "kto", "orpo")


def smoothed_loss(gap: Tensor, beta: float, smoothing: float, robust: bool = False) -> Tensor:
    """Mean cDPO loss, or robust DPO, of d (B,) when a share `smoothing` of the labels is thought to be flipped."""
    one_each(gap=gap)
    if not 0 <= smoothing < 0.5:
        raise ValueError(f"smoothing={smoothing} must be 0 to under 0.5: at one half the labels say nothing")
    kept, flipped = -F.logsigmoid(beta * gap), -F.logsigmoid(-beta * gap)
    if robust:
        return ((1 - smoothing) * kept - smoothing * flipped).mean() / (1 - 2 * smoothing)
    return ((1 - smoothing) * kept + smoothing * flipped).mean()


def ipo_loss(chosen_score: Tensor, rejected_score: Tensor, beta: float,
             lengths: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Mean IPO loss of log-ratios (B,): summed as in the paper, or per token of `lengths` as in TRL."""
    one_each(chosen_score=chosen_score, rejected_score=rejected_score)
    if lengths is not None:
        one_each(chosen_score=chosen_score, chosen_length=lengths[0], rejected_length=lengths[1])
        chosen_score, rejected_score = chosen_score / lengths[0], rejected_score / lengths[1]
    return (chosen_score - rejected_score - 1 / (2 * beta)).square().mean()


def rdpo_loss(gap: Tensor, extra_tokens: Tensor, beta: float, alpha: float) -> Tensor:
    """Mean R-DPO loss of d (B,) and |chosen| - |rejected| (B,): `alpha` nats of a vote's log-odds a token of length."""
    one_each(gap=gap, extra_tokens=extra_tokens)
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha={alpha} must be positive and finite: 0 is DPO, and below 0 length is rewarded")
    return -F.logsigmoid(beta * gap + alpha * extra_tokens).mean()


def kto_loss(chosen_score: Tensor, rejected_score: Tensor, zero: Tensor, beta: float) -> Tensor:
    """Mean over all answers of 1 - value: sigmoid(beta (score - zero)) of a good one, its mirror of a bad one.

    Scores are log-ratios of good and bad answers, any number of each; `zero` is the (detached) KL estimate."""
    one_each(chosen_score=chosen_score)
    one_each(rejected_score=rejected_score)
    if zero.dim():
        raise ValueError(f"zero has shape {tuple(zero.shape)}: all answers share one zero, a scalar")
    good = 1 - torch.sigmoid(beta * (chosen_score - zero))
    bad = 1 - torch.sigmoid(beta * (zero - rejected_score))
    return torch.cat((good, bad)).mean()


def orpo_loss(chosen_mean: Tensor, rejected_mean: Tensor, answer_nll: Tensor, weight: float) -> Tensor:
    """answer_nll - weight * mean log sigmoid(log odds ratio), from mean log-probabilities (B,) under 0."""
    one_each(chosen_mean=chosen_mean, rejected_mean=rejected_mean)
    log_odds = chosen_mean - rejected_mean - (log1mexp(chosen_mean) - log1mexp(rejected_mean))
    return answer_nll - weight * F.logsigmoid(log_odds).mean()


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0, without cancellation on either side."""
    return torch.where(x < -math.log(2), torch.log1p(-torch.exp(x)), torch.log(-torch.expm1(x)))


def kin_loss(kind: str, beta: float, *, smoothing: float = 0.0, alpha: float = 0.0, reference=None) -> LossFn:
    """loss_fn(model, PairBatch) of one of KINDS. `alpha`: nats that a token of extra length explains (rdpo).
    For orpo, `beta` is the weight of its odds ratio. KTO scores mismatched answers too: it needs the `reference` model.

    Raises ValueError for an unknown kind, a beta that is not positive, or KTO without a reference."""
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is unknown; use one of {', '.join(KINDS)}")
    if not 0 < beta < math.inf:
        raise ValueError(f"beta={beta} must be positive and finite; 0.1 is a common start")
    if kind == "kto" and reference is None:
        raise ValueError("KTO needs the frozen reference model: its zero is a KL of answers that no pair holds")

    def loss_fn(model, batch: PairBatch) -> tuple[Tensor, dict[str, float]]:
        logp = sum_logps(model, batch.rows)
        n = answer_lengths(batch.rows)
        lengths = n.chunk(2)
        if kind == "norm":
            return dpo_loss(*(logp / n).chunk(2), *(batch.ref_logp / n).chunk(2), beta)
        (chosen, rejected), (ref_chosen, ref_rejected) = logp.chunk(2), batch.ref_logp.chunk(2)
        loss, metrics = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta)  # its metrics serve every kind
        score = chosen - ref_chosen, rejected - ref_rejected
        if kind in ("cdpo", "robust"):
            loss = smoothed_loss(score[0] - score[1], beta, smoothing, kind == "robust")
        elif kind in ("ipo", "ipo_mean"):
            loss = ipo_loss(*score, beta, lengths if kind == "ipo_mean" else None)
        elif kind == "rdpo":
            loss = rdpo_loss(score[0] - score[1], lengths[0] - lengths[1], beta, alpha)
        elif kind == "kto":
            loss = kto_loss(*score, mismatched_kl(model, reference, batch.rows), beta)
        elif kind == "orpo":
            loss = orpo_loss(chosen / lengths[0], rejected / lengths[1], -chosen.sum() / lengths[0].sum(), beta)
        return loss, metrics

    return loss_fn


def answer_lengths(rows: Rows) -> Tensor:
    """Counted tokens of each row. (B,)"""
    return rows.mask[:, 1:].sum(1).clamp(min=1)


@torch.no_grad()
def mismatched_kl(model, reference, rows: Rows) -> Tensor:
    """KTO's zero: mean log-ratio, at least 0, of every answer after the prompt of the next row. A scalar.

    Raises ValueError for rows that do not share their prompts, or a batch of one prompt."""
    p = rows.prefix
    if p is None:
        raise ValueError("KTO needs rows that share their prompts (pair_rows): without them none can be exchanged")
    if len(p.ids) < 2:
        raise ValueError("KTO got a batch of 1 pair: its zero comes from answers after another pair's prompt; use 2 or "
                         "more")
    after = torch.arange(len(rows.ids), device=rows.ids.device).roll(-1)
    ids = rows.ids.clone()
    ids[:, 0] = rows.ids[after, 0]  # the last token of the other prompt
    moved = Rows(ids, rows.mask, Prefix(p.ids, p.mask, p.owner[after]))
    return (sum_logps(model, moved) - sum_logps(reference, moved)).mean().clamp(min=0)


@torch.no_grad()
def implicit_rewards(model, batch: PairBatch, beta: float) -> tuple[Tensor, Tensor]:
    """beta * (log pi - log ref) of the chosen and of the rejected answers, (B,) each: the policy as a reward model."""
    return (beta * (sum_logps(model, batch.rows) - batch.ref_logp)).chunk(2)


def with_label_noise(pairs: Sequence[dict], share: float, seed: int) -> list[dict]:
    """The same pairs, exactly round(share * n) of them with chosen and rejected exchanged."""
    if not 0 <= share <= 1:
        raise ValueError(f"share={share} must be 0 to 1")
    flip = set(make_rng(seed, "label noise").sample(range(len(pairs)), round(share * len(pairs))))
    return [p | {"chosen": p["rejected"], "rejected": p["chosen"]} if i in flip else p for i, p in enumerate(pairs)]


def audit_pairs(pairs: Sequence[dict], passes: Callable[[dict, str], bool]) -> list[int]:
    """Pairs that look swapped: `passes(pair, answer)` refuses the chosen answer and accepts the rejected one.

    Training cannot tell: swapped labels give as smooth a loss and as high an accuracy. Raises ValueError when nothing
    was compared."""
    if not pairs:
        raise ValueError("no pairs to audit: an empty file proves nothing")
    return [i for i, p in enumerate(pairs) if not passes(p, p["chosen"]) and passes(p, p["rejected"])]
