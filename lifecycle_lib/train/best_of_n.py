"""Controls that take no policy gradient: best-of-n, and SFT on the winners, on as many rollouts as GRPO gets.

Best-of-n draws n answers and keeps the one a proxy scores highest. Its expected score, proxy or gold, is estimated
without bias from one pool of N answers a prompt (the order-statistic form that pass@k takes for a 0/1 score, Chen et
al. 2021): the answer of rank i wins among n of N with probability C(i - 1, n - 1) / C(N, n). Equal proxies share.
Its distance from the policy is log n - (n - 1)/n (Stiennon et al. 2020, appendix G.3): exact when no two answers tie,
an upper bound otherwise (Beirami et al. 2024), and a loose one where a proxy has few levels: `pool_kl`.

SFT on winners is rejection sampling (RFT, Yuan et al. 2023); again from the model it made, expert iteration (Anthony
et al. 2017). Left out: ranking by anything but the reward, deduplication of winners.

Shapes: P prompts, N answers each.
"""

import math
from collections.abc import Sequence

import numpy as np

from lifecycle_lib.desk.cases import Case
from lifecycle_lib.model.tokenizer import Tokenizer
from lifecycle_lib.train.grpo import GRPOConfig, RewardFn, collect


def best_of_n_kl(n: int) -> float:
    """KL(best-of-n || policy) in nats if no two answers tie: log n - (n - 1)/n. Raises ValueError for n < 1."""
    if n < 1:
        raise ValueError(f"n={n}: best-of-n draws at least 1 answer")
    return math.log(n) - (n - 1) / n


def best_of_n(proxy: np.ndarray, score: np.ndarray, n: int) -> np.ndarray:
    """Expected `score` of the answer that `proxy` picks among n, for each prompt: (P, N), (P, N) -> (P,).

    Raises ValueError for other shapes, n outside 1..N, or a value that is not finite."""
    proxy, score = np.asarray(proxy, dtype=float), np.asarray(score, dtype=float)
    if proxy.ndim != 2 or proxy.shape != score.shape:
        raise ValueError(f"proxy {proxy.shape} and score {score.shape} must both be (prompts, answers)")
    size = proxy.shape[1]
    if not 1 <= n <= size:
        raise ValueError(f"n={n} of a pool of {size}: n must be 1..{size}; draw more answers or lower n")
    if not (np.isfinite(proxy).all() and np.isfinite(score).all()):
        raise ValueError("a proxy or score is not finite; mend the reward function")
    wins = np.array([math.comb(i, n - 1) / math.comb(size, n) for i in range(size)])  # by rank, lowest first
    out = np.empty(len(proxy))
    for row, (p, s) in enumerate(zip(proxy, score)):
        order = p.argsort(kind="stable")
        _, group = np.unique(p[order], return_inverse=True)
        shared = np.bincount(group, wins) / np.bincount(group)  # tied answers are picked equally often
        out[row] = (shared[group] * s[order]).sum()
    return out


def pool_kl(proxy: np.ndarray, n: int) -> np.ndarray:
    """KL(best-of-n || policy) in nats of each prompt, ties and all, the policy taken to be the pool: (P, N) -> (P,).

    Answers a proxy cannot tell apart are picked in proportion, so that only its levels count: a level of share q whose
    betters have share b wins with p = (1 - b)^n - (1 - b - q)^n, and KL = sum p log(p/q). For a proxy of 0 and 1 it
    grows to -log(share paid) and no further. Never above best_of_n_kl(n). Raises ValueError for n < 1."""
    best_of_n_kl(n)
    out = np.zeros(len(proxy))
    for i, row in enumerate(np.asarray(proxy, dtype=float)):
        q = np.unique(row, return_counts=True)[1] / len(row)  # lowest level first
        reached = q.cumsum()
        p = reached**n - np.maximum(0.0, reached - q) ** n
        out[i] = (p * np.log(np.maximum(p, 1e-300) / q)).sum()
    return out


def winners(model, tok: Tokenizer, cases: Sequence[Case], reward_fn: RewardFn, cfg: GRPOConfig, seed: int, step: int,
            least: float = 1.0) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, answer ids) of the answers paid at least `least`, of one batch of rollouts.

    Raises ValueError when nobody won: there is nothing to imitate."""
    batch = collect(model, tok, cases, reward_fn, cfg, seed, step)
    kept = []
    for i, reward in enumerate(batch.rewards.tolist()):
        if reward >= least:
            case = cases[i // cfg.group_size]
            kept.append((tok.encode(case.prompt), batch.rows.ids[i][batch.rows.mask[i]].tolist()))
    if not kept:
        raise ValueError(f"none of {len(batch.texts)} answers was paid {least} or more; start from a model that wins "
                         "now and then")
    return kept
