"""Verifier rewards: group-relative policy optimisation (GRPO, Shao et al. 2024, eq. 3 and 4; DAPO, Yu et al. 2025).

For each prompt draw a group of G answers, score each with a reward function, and use how much better than its
group an answer did as its advantage: no value network. The policy gradient is PPO's clipped ratio per token.

The published variants are options. loss_type: "grpo" averages tokens within an answer, then answers; "bnpo" and "dapo"
average over all tokens of the batch (one and the same here, where a batch is never split); "dr_grpo" (Liu et al. 2025)
divides by a constant length. scale: by the group's std ("group" sample, "population" as numpy's default), by the
batch's, or not at all (Dr. GRPO). ratio_level: one a token, or one a sequence (GSPO, Zheng et al. 2025). clip_high over
clip_low is DAPO's clip-higher. The KL term: k1, k2 or k3 a token (Schulman 2020, "Approximating KL divergence").
A term a token has at best the gradient of each token's KL with the text before it held fixed. The gradient of the
answers' KL has a second part, how a token changes the KL of those after it; only a leash in the reward has both (Tang
& Munos 2025, "On a few pitfalls in KL divergence gradient estimation for RL"; train/reinforce.py).
The reward function is passed in: nothing here knows how an answer is judged. Left out: CISPO, SAPO, entropy bonuses.

Shapes: B answers (groups of G, one after another), T answer tokens.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lifecycle_lib.core.seeds import make_generator
from lifecycle_lib.core.seeds import rng as make_rng
from lifecycle_lib.desk.cases import Case
from lifecycle_lib.model.sampling import generate
from lifecycle_lib.model.tokenizer import Tokenizer
from lifecycle_lib.train.logprobs import Rows, shared_rows, token_logps

RewardFn = Callable[[Sequence[str], Sequence[Case]], Sequence[float]]
CHOICES = {"loss_type": ("grpo", "bnpo", "dapo", "dr_grpo"), "scale": ("group", "population", "batch", "none"),
           "ratio_level": ("token", "sequence"), "kl_kind": ("k1", "k2", "k3")}


def check_choice(name: str, value: str) -> None:
    """ValueError unless `value` is one of the published variants of `name`."""
    if value not in CHOICES[name]:
        raise ValueError(f"{name}={value!r} is unknown; use one of {', '.join(map(repr, CHOICES[name]))}")


def check_kl(kind: str, weighted: bool) -> None:
    """ValueError for the two KL terms whose gradient, in expectation, is that of no KL."""
    if (kind, weighted) in (("k1", False), ("k2", True)):
        why = "has gradient 0 in expectation" if kind == "k1" else "weighted by the ratio is the gradient of no KL"
        raise ValueError(f"kl_kind={kind!r} with weighted_kl={weighted} {why}; use weighted_kl={not weighted}")


@dataclass(frozen=True, slots=True, kw_only=True)
class GRPOConfig:
    """One step: `n_prompts` groups of `group_size` answers at `temperature`, then one update."""

    n_prompts: int = 32
    group_size: int = 8
    temperature: float = 1.0
    max_new_tokens: int = 40
    clip_low: float = 0.2
    clip_high: float = 0.2
    beta: float = 0.0
    loss_type: str = "dapo"
    scale: str = "group"
    ratio_level: str = "token"
    kl_kind: str = "k3"
    weighted_kl: bool = True

    def __post_init__(self) -> None:
        if self.n_prompts < 1 or self.group_size < 2:
            raise ValueError(f"n_prompts={self.n_prompts}, group_size={self.group_size}: "
                             "a group needs at least 2 answers")
        for name in CHOICES:
            check_choice(name, getattr(self, name))
        check_kl(self.kl_kind, self.weighted_kl)
        if not 0 <= self.beta < math.inf:
            raise ValueError(f"beta={self.beta} must be 0 (no KL term) or positive and finite; 0.04 is a common start")
        for name in ("clip_low", "clip_high"):
            if not 0 < getattr(self, name) < (1 if name == "clip_low" else math.inf):
                raise ValueError(f"{name}={getattr(self, name)} must be positive (clip_low under 1); 0.2 is usual")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} must be positive: a greedy group is uniform")


def group_advantages(rewards: Tensor, group_size: int, scale: str = "group", eps: float = 1e-4) -> Tensor:
    """(r - mean of its group) / (std + eps). rewards (B,) -> (B,).

    The std is the group's ("group": sample, n - 1; "population": n) or that of all rewards ("batch", sample); "none"
    leaves the division out. A group in which all rewards are equal gives exact zeros."""
    if rewards.ndim != 1:
        raise ValueError(f"rewards of shape {tuple(rewards.shape)} must be (B,), one an answer")
    if group_size < 2 or not len(rewards) or len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} rewards do not split into groups of {group_size} (at least 2 answers each)")
    check_choice("scale", scale)
    groups = rewards.view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    if scale != "none":
        std = rewards.std() if scale == "batch" else groups.std(1, correction=int(scale == "group"), keepdim=True)
        centred = centred / (std + eps)
    differs = (groups != groups[:, :1]).any(1, keepdim=True)  # rounding must not leak into a uniform group
    return (centred * differs).view(-1)


def kl_estimate(logps: Tensor, ref_logps: Tensor, kind: str = "k3") -> Tensor:
    """Estimates of KL(policy || reference) at each token sampled from the policy, in nats (Schulman 2020). Any shape.

    Value: the expectation of k1 = log(p/q) and k3 = q/p - 1 - log(q/p) is the token's KL given the text before it, so
    their sum over an answer has that of whole answers; k2 = log(p/q)^2 / 2 has another. k2 and k3 are never negative.
    Gradient, the text before the token held fixed: as a loss, k1 has 0, k2 that of the token's KL, k3 that of
    KL(reference || policy); weighted by the ratio, k1 and k3 that of the token's KL, k2 that of no KL. None of them
    has the gradient of the KL of whole answers (see the module's head)."""
    check_choice("kl_kind", kind)
    delta = ref_logps - logps
    return {"k1": lambda: -delta, "k2": lambda: delta**2 / 2, "k3": lambda: torch.exp(delta) - delta - 1}[kind]()


def grpo_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, *, clip_low: float = 0.2,
              clip_high: float = 0.2, loss_type: str = "dapo", max_tokens: int = 0, ref_logps: Tensor | None = None,
              beta: float = 0.0, weighted_kl: bool = True, ratio_level: str = "token",
              kl_kind: str = "k3") -> tuple[Tensor, dict[str, float]]:
    """Clipped policy-gradient loss. logps, old_logps, ref_logps, mask (B, T); advantages (B,).

    With one update a batch the ratio is 1 and the loss is minus the mean advantage, about 0: its gradient is what
    matters. A row with an empty mask adds nothing. `max_tokens` is the constant of dr_grpo. `ratio_level` "sequence":
    one ratio an answer, the geometric mean of its tokens' (its clip is usually a thousandth of the token's).
    `weighted_kl` weights the KL term by the token's ratio (DeepSeek-V3.2; TRL's `use_bias_correction_kl`, which takes
    the answer's where ratio_level is "sequence"): see `kl_estimate` for what that is the gradient of.
    Raises ValueError for an unknown variant, shapes that differ, dr_grpo without max_tokens, beta without ref_logps,
    and a KL term with the gradient of no KL."""
    check_choice("loss_type", loss_type)
    check_choice("ratio_level", ratio_level)
    check_choice("kl_kind", kl_kind)
    if beta:
        check_kl(kl_kind, weighted_kl)
        if ref_logps is None:
            raise ValueError(f"beta={beta} needs ref_logps, the log-probabilities under the reference model")
    wanted = {"old_logps": logps.shape, "mask": logps.shape, "ref_logps": logps.shape, "advantages": logps.shape[:1]}
    for name, given in {"old_logps": old_logps, "mask": mask, "ref_logps": ref_logps, "advantages": advantages}.items():
        if given is not None and (logps.ndim != 2 or given.shape != wanted[name]):
            raise ValueError(f"{name} {tuple(given.shape)} does not go with logps {tuple(logps.shape)}: logps, "
                             "old_logps, ref_logps and mask are (B, T), advantages (B,)")
    m = mask.float()
    log_ratio = (logps - old_logps) * m  # (B, T)
    token_ratio = ratio = torch.exp(log_ratio)
    if ratio_level == "sequence":
        ratio = torch.exp(log_ratio.sum(1, keepdim=True) / m.sum(1, keepdim=True).clamp(min=1))  # (B, 1)
    adv = advantages.unsqueeze(1)
    per_token = -torch.minimum(ratio * adv, ratio.clamp(1 - clip_low, 1 + clip_high) * adv)
    kl = torch.zeros_like(logps)
    if ref_logps is not None:
        kl = kl_estimate(logps * m, ref_logps * m, kl_kind)
        per_token = per_token + beta * (kl * token_ratio if weighted_kl else kl)
    if loss_type == "grpo":
        loss = ((per_token * m).sum(1) / m.sum(1).clamp(min=1)).mean()
    elif loss_type in ("bnpo", "dapo"):
        loss = (per_token * m).sum() / m.sum().clamp(min=1)
    else:
        if max_tokens < 1:
            raise ValueError(f"loss_type 'dr_grpo' needs max_tokens of at least 1, got {max_tokens}")
        loss = (per_token * m).sum() / (len(m) * max_tokens)
    clipped = ((ratio < 1 - clip_low) & (adv < 0)) | ((ratio > 1 + clip_high) & (adv > 0))
    n = m.sum().clamp(min=1)
    return loss, {"clip_share": float((clipped * m).sum() / n), "kl": float((kl.detach() * m).sum() / n)}


@dataclass(frozen=True, slots=True)
class Rollouts:
    """One batch of scored answers, ready for the loss."""

    rows: Rows  # ids, mask (B, T): the last prompt token and the answer
    old_logps: Tensor  # (B, T-1)
    rewards: Tensor  # (B,), as paid (a shuffled control: as dealt)
    advantages: Tensor  # (B,)
    metrics: dict[str, float]
    texts: list[str]


def check_rewards(rewards: Sequence[float], n: int, texts: Sequence[str] = (), cases: Sequence[Case] = ()) -> Tensor:
    """Rewards as a tensor (n,), or ValueError naming what is wrong with the reward function, and on which answer."""
    if isinstance(rewards, str | dict | set) or not hasattr(rewards, "__len__") or getattr(rewards, "ndim", 1) < 1:
        raise ValueError(f"the reward function returned {rewards!r} for {n} answers; it must return one number each")
    if len(rewards) != n:
        raise ValueError(f"the reward function returned {len(rewards)} values for {n} answers")
    values = []
    for i, r in enumerate(rewards):
        try:
            value = math.nan if isinstance(r, str) else float(r)
        except (TypeError, ValueError, RuntimeError, OverflowError):  # a list, a dict, None, a tensor of several
            value = math.nan
        if not abs(value) <= torch.finfo(torch.float32).max:
            raise ValueError(f"the reward function returned {r!r} for {_which(i, texts, cases)}; "
                             "every reward must be one finite number")
        values.append(value)
    return torch.tensor(values)


def _which(i: int, texts: Sequence[str], cases: Sequence[Case]) -> str:
    return f"answer {i}" + (f" (case {cases[i].case_id}): {texts[i]!r}" if texts and cases else "")


def rewards_of(reward_fn: RewardFn, texts: Sequence[str], cases: Sequence[Case]) -> Tensor:
    """Rewards (n,) of one answer a case. A reward function that raises, or returns the wrong number of values or one
    that is not finite, is refused with ValueError naming the answer and its case."""
    try:
        rewards = reward_fn(texts, cases)
    except Exception as error:
        for i, (text, case) in enumerate(zip(texts, cases)):  # which one? ask again, one by one
            try:
                reward_fn([text], [case])
            except Exception as alone:
                raise ValueError(f"the reward function raised {type(alone).__name__} ({alone}) for "
                                 f"{_which(i, texts, cases)}; a bad answer must score, not raise") from alone
        raise ValueError(f"the reward function raised {type(error).__name__} ({error}) on {len(texts)} answers "
                         "together, and on none of them alone") from error
    return check_rewards(rewards, len(texts), texts, cases)


def collect(model, tok: Tokenizer, cases: Sequence[Case], reward_fn: RewardFn, cfg: GRPOConfig, seed: int,
            step: int, shuffle: bool = False) -> Rollouts:
    """Sample a group of answers for each case, score them, and lay them out for the update.

    `shuffle` deals each group's rewards out at random: the control in which a reward says nothing about its answer. The
    updates are as large as ever, so a shuffled run drifts; it does not stand still."""
    prompts = [tok.encode(c.prompt) for c in cases]
    out = generate(model, prompts, eos_id=tok.special["<eos>"], pad_id=tok.special["<pad>"],
                   max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature, n_samples=cfg.group_size,
                   generator=make_generator(seed, "rollouts", step))
    texts = out.texts(tok)
    repeated = [c for c in cases for _ in range(cfg.group_size)]
    rewards = rewards_of(reward_fn, texts, repeated)
    spread = rewards.view(-1, cfg.group_size).std(1)
    if shuffle:
        deal = torch.rand(len(cases), cfg.group_size, generator=make_generator(seed, "shuffle", step)).argsort(1)
        rewards = rewards.view(-1, cfg.group_size).gather(1, deal).view(-1)
    owner = [i for i in range(len(prompts)) for _ in range(cfg.group_size)]
    rows = shared_rows(prompts, out.ids, owner, tok.special["<pad>"])
    old = torch.zeros(rows.ids.shape)
    old[rows.mask] = torch.tensor([lp for row in out.logps for lp in row])
    metrics = {"reward": float(rewards.mean()), "reward_std": float(spread.mean()),
               "uniform_groups": float((spread == 0).float().mean()),
               "answer_tokens": out.tokens / len(texts)}
    return Rollouts(rows.to(model.device), old[:, 1:].to(model.device), rewards.to(model.device),
                    group_advantages(rewards, cfg.group_size, cfg.scale).to(model.device), metrics, texts)


def grpo_batches(model, tok: Tokenizer, cases: Sequence[Case], reward_fn: RewardFn, cfg: GRPOConfig, seed: int,
                 shuffle: bool = False) -> Callable[[int], Rollouts]:
    """batches(step): rollouts of the current policy on `n_prompts` cases, drawn by (seed, step)."""
    if len(cases) < cfg.n_prompts:
        raise ValueError(f"{len(cases)} cases cannot fill {cfg.n_prompts} prompts; make more")
    return lambda step: collect(model, tok, make_rng(seed, "prompts", step).sample(list(cases), cfg.n_prompts),
                                reward_fn, cfg, seed, step, shuffle)


def rollout_loss(model, batch: Rollouts, cfg: GRPOConfig, ref=None) -> tuple[Tensor, dict[str, float]]:
    """`grpo_loss` of a Rollouts batch under the current policy; `ref` is the frozen model that cfg.beta holds it to."""
    logps = token_logps(model, batch.rows, cfg.temperature)
    ref_logps = None
    if cfg.beta and ref is not None:
        with torch.no_grad():
            ref_logps = token_logps(ref, batch.rows, cfg.temperature)
    loss, metrics = grpo_loss(logps, batch.old_logps, batch.advantages, batch.rows.mask[:, 1:], clip_low=cfg.clip_low,
                              clip_high=cfg.clip_high, loss_type=cfg.loss_type, max_tokens=cfg.max_new_tokens,
                              ref_logps=ref_logps, beta=cfg.beta, weighted_kl=cfg.weighted_kl,
                              ratio_level=cfg.ratio_level, kl_kind=cfg.kl_kind)
    return loss, metrics | batch.metrics
