"""REINFORCE with a KL leash: the second half of classic RLHF (Ouyang et al. 2022; Ahmadian et al. 2024, RLOO).

objective = E[r(x, y)] - beta * KL(policy || reference). Its gradient is E[(R - baseline) * grad log pi(y)] with
R = r - beta * (log pi(y) - log ref(y)): the leash goes into the reward, as the log-ratio of the sampled answer (k1).
The baseline of an answer is the mean of its group's other answers, which does not depend on it.

`kl_in="loss"` is what GRPO code does: the leash as a term of its own, k3 a token, differentiated as it stands. That is
a good estimate of the KL and another gradient: not that of the leash above. The tests enumerate a policy small enough
to see both.

Left out: the value network and clipping of PPO (one update a batch needs neither).

Shapes: B answers (groups of G, one after another), T answer tokens.
"""

from dataclasses import replace

import torch
from torch import Tensor

from lifecycle_lib.train.dpo import one_each
from lifecycle_lib.train.grpo import GRPOConfig, Rollouts, kl_estimate
from lifecycle_lib.train.logprobs import token_logps
from lifecycle_lib.train.loop import LossFn


def leave_one_out(returns: Tensor, group_size: int) -> Tensor:
    """Each return minus the mean of the others in its group. (B,) -> (B,)."""
    if group_size < 2 or not len(returns) or len(returns) % group_size:
        raise ValueError(f"{len(returns)} returns do not split into groups of {group_size} (at least 2 answers each)")
    groups = returns.view(-1, group_size)
    others = (groups.sum(1, keepdim=True) - groups) / (group_size - 1)
    return (groups - others).view(-1)


def leashed_returns(rewards: Tensor, logps: Tensor, ref_logps: Tensor, mask: Tensor, beta: float) -> Tensor:
    """R = reward - beta * sum of log-ratios over the answer (k1), without gradient. (B,)

    Raises ValueError for rewards that are not one an answer."""
    ratio = ((logps - ref_logps).detach() * mask).sum(1)
    one_each(rewards=rewards, log_ratio=ratio)
    return rewards - beta * ratio


def reinforce_loss(logps: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """-mean over answers of advantage * log pi(answer). Its value says nothing; its gradient is the policy gradient.

    Raises ValueError for advantages that are not one an answer."""
    answer_logp = (logps * mask).sum(1)
    one_each(advantages=advantages, answer_logp=answer_logp)
    return -(advantages.detach() * answer_logp).mean()


def reinforce_kl(reference, cfg: GRPOConfig, kl_in: str = "reward") -> LossFn:
    """loss_fn(model, Rollouts) of one on-policy update. cfg.beta is the leash, in reward per nat; cfg.scale must be
    "none" and cfg.temperature 1: rewards are not rescaled, and the KL is that of the policy that is trained.

    Raises ValueError for another scale, another temperature or an unknown place of the KL."""
    if cfg.scale != "none" or cfg.temperature != 1.0:
        raise ValueError(f"scale={cfg.scale!r}, temperature={cfg.temperature}: REINFORCE with a leash needs 'none' and "
                         "1.0, or beta would mean something else in every batch")
    if kl_in not in ("reward", "loss"):
        raise ValueError(f"kl_in={kl_in!r} is unknown; use 'reward' (k1) or 'loss' (k3)")

    def loss_fn(model, batch: Rollouts) -> tuple[Tensor, dict[str, float]]:
        mask = batch.rows.mask[:, 1:].float()
        logps = token_logps(model, batch.rows)
        with torch.no_grad():
            ref_logps = token_logps(reference, batch.rows)
        leash = cfg.beta if kl_in == "reward" else 0.0  # batch.advantages are rewards, centred within each group
        returns = leashed_returns(batch.advantages, logps, ref_logps, mask, leash)
        loss = reinforce_loss(logps, leave_one_out(returns, cfg.group_size), mask)
        if kl_in == "loss":
            loss = loss + cfg.beta * (kl_estimate(logps, ref_logps) * mask).sum(1).mean()
        return loss, batch.metrics | {"kl": float(((logps - ref_logps).detach() * mask).sum(1).mean())}

    return loss_fn


def leashed(cfg: GRPOConfig, beta: float) -> GRPOConfig:
    """`cfg` as REINFORCE wants it: rewards as they are, a leash of `beta` reward per nat."""
    return replace(cfg, scale="none", temperature=1.0, beta=beta)
