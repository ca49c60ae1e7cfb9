"""Scaling laws from a grid of runs: fit, optimum, isoFLOP minima, forecasts, intervals over seeds.

The law is L(N, D) = E + A N^-a + B D^-b (Hoffmann et al. 2022, approach 3), fitted to log L with Huber's loss from
several starts. With compute C = 6 N D (Kaplan et al. 2020) the best N for a budget follows by calculus, and the loss on
that frontier falls as C^-(ab / (a + b)). Approach 2 asks no law for N: a parabola in log N through each budget's runs,
and its minimum.

Different from the paper: residuals of a size of 1 % count as normal (delta 0.01; theirs 0.001), natural logs
throughout, and the seed is the unit of every interval, not the run.

A run is (n_params, tokens, loss). Losses in nats a counted token, compute in FLOP.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares

Run = tuple[float, float, float]
STARTS = ((0.4, 0.4, 0.5), (0.8, 0.3, 0.9), (0.3, 0.7, 0.9), (1.2, 0.5, 0.7))  # a, b, E as a share of the least loss


@dataclass(frozen=True, slots=True)
class Law:
    """L(N, D) = e + a_scale N^-a + b_scale D^-b."""

    e: float
    a_scale: float
    a: float
    b_scale: float
    b: float

    def loss(self, n_params, tokens):
        """Loss in nats at N parameters and D tokens (numbers or arrays)."""
        return self.e + self.a_scale * n_params**-self.a + self.b_scale * tokens**-self.b

    @property
    def compute_exponent(self) -> float:
        """c of the frontier L = e + const C^-c: ab / (a + b)."""
        return self.a * self.b / (self.a + self.b)

    def best_n(self, flop):
        """The N that minimises loss(N, C / 6N): (aA / bB)^(1/(a+b)) (C/6)^(b/(a+b))."""
        g = (self.a * self.a_scale / (self.b * self.b_scale)) ** (1 / (self.a + self.b))
        return g * (flop / 6) ** (self.b / (self.a + self.b))

    def frontier(self, flop):
        """The least loss that a budget buys."""
        n = self.best_n(flop)
        return self.loss(n, flop / (6 * n))

    def flop_for(self, loss: float) -> float:
        """The budget whose frontier is at `loss`. Raises ValueError at or below e, which no budget reaches."""
        if loss <= self.e:
            raise ValueError(f"loss {loss}: at or below the irreducible {self.e:.4f} of this law; no budget reaches it")
        unit = self.frontier(1.0) - self.e
        return (unit / (loss - self.e)) ** (1 / self.compute_exponent)


def fit_law(runs: Sequence[Run], e: float | None = None, starts: Sequence[tuple] = STARTS) -> Law:
    """The law of the runs. `e` fixes the irreducible loss (0 is the popular mistake).

    Raises ValueError for too few runs, for values that are not positive, or when N or D hardly vary."""
    n, d, loss = _columns(runs, 6)
    for name, x in (("n_params", n), ("tokens", d)):
        if x.max() < 2 * x.min():
            raise ValueError(f"{name} only from {x.min():g} to {x.max():g}: an exponent needs a spread of 2 at least")

    def residual(p: np.ndarray) -> np.ndarray:
        floor = np.exp(p[4]) if e is None else e
        return np.log(floor + np.exp(p[0] - p[1] * np.log(n)) + np.exp(p[2] - p[3] * np.log(d))) - np.log(loss)

    best = None
    bounds = (([-30, 1e-3, -30, 1e-3, -30], [60, 5, 60, 5, math.log(loss.min())]) if e is None else
              ([-30, 1e-3, -30, 1e-3], [60, 5, 60, 5]))
    for a, b, share in starts:
        floor = share * loss.min() if e is None else e
        rest = max(loss.max() - floor, 1e-3) / 2
        p0 = [math.log(rest) + a * math.log(n.min()), a, math.log(rest) + b * math.log(d.min()), b]
        free = least_squares(residual, p0 + ([math.log(floor)] if e is None else []), loss="huber", f_scale=0.01,
                             max_nfev=2000, bounds=bounds, x_scale=[1, 0.1, 1, 0.1, 1][:5 if e is None else 4])
        if best is None or free.cost < best.cost:
            best = free
    p = best.x
    return Law(float(np.exp(p[4])) if e is None else e, float(np.exp(p[0])), float(p[1]), float(np.exp(p[2])),
               float(p[3]))


@dataclass(frozen=True, slots=True)
class Minimum:
    """The bottom of one budget's parabola in log N. `interior`: the lowest run has a higher one on each side."""

    n_params: float
    loss: float
    curvature: float
    interior: bool


def isoflop_minimum(n_params: Sequence[float], losses: Sequence[float], points: int = 5) -> Minimum:
    """Fit loss = c0 + c1 x + c2 x^2, x = log N, to the `points` runs around the lowest. The minimum is only read where
    there were runs: outside them, or with c2 <= 0, it is the lowest run itself and not interior.

    Raises ValueError for fewer than 4 runs or values that are not positive."""
    n, _, loss = _columns([(a, 1.0, b) for a, b in zip(n_params, losses, strict=True)], 4)
    order = np.argsort(n)
    n, loss = n[order], loss[order]
    low = int(loss.argmin())
    inside = 0 < low < len(n) - 1
    start = min(max(0, low - points // 2), max(0, len(n) - points))
    x, y = np.log(n[start:start + points]), loss[start:start + points]
    c2, c1, c0 = np.polyfit(x - x.mean(), y, 2)
    at = -c1 / (2 * c2) if c2 > 0 else np.inf
    if not inside or not x[0] <= at + x.mean() <= x[-1]:
        return Minimum(float(n[low]), float(loss[low]), float(c2), False)
    return Minimum(float(np.exp(at + x.mean())), float(c0 + c1 * at + c2 * at * at), float(c2), True)


def line_forecast(x: Sequence[float], y: Sequence[float], at: Sequence[float]) -> list[float]:
    """A straight line through (x, y) by least squares, read off at `at`."""
    slope, intercept = np.polyfit(x, y, 1)
    return [float(slope * v + intercept) for v in at]


def over_seeds(rows: Sequence[Mapping], what: Callable[[Sequence[Mapping]], Mapping[str, float]], n_boot: int = 400,
               seed: int = 0) -> dict[str, list[float]]:
    """{name: [value on all seeds, 2.5 %, 97.5 %]}: `what` of seeds drawn with replacement, percentile interval.

    `what` makes numbers of a list of seeds' rows; a draw on which it raises ValueError is left out. With under about 8
    seeds such an interval is too narrow; the effects of the file, by paired t, are the ones to quote.
    Raises ValueError for fewer than 2 seeds, or when over a tenth of the draws fail."""
    if len(rows) < 2:
        raise ValueError(f"{len(rows)} seed: an interval needs at least 2")
    random, whole, drawn = np.random.default_rng(seed), what(rows), []
    for _ in range(n_boot):
        try:
            drawn.append(what([rows[i] for i in random.integers(0, len(rows), len(rows))]))
        except ValueError:
            continue
    if len(drawn) < 0.9 * n_boot:
        raise ValueError(f"{n_boot - len(drawn)} of {n_boot} draws over seeds failed; the grid cannot carry this fit")
    ends = {k: np.percentile([d[k] for d in drawn], [2.5, 97.5]) for k in whole}
    return {k: [float(v), float(min(v, ends[k][0])), float(max(v, ends[k][1]))] for k, v in whole.items()}


def _columns(runs: Sequence[Run], at_least: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    table = np.asarray(runs, dtype=float)
    if table.ndim != 2 or table.shape[1] != 3 or len(table) < at_least:
        raise ValueError(f"{len(runs)} runs: give at least {at_least} of (n_params, tokens, loss)")
    if not (np.isfinite(table).all() and (table > 0).all()):
        raise ValueError(f"runs hold {table[~(np.isfinite(table) & (table > 0))][0]}: all must be positive and finite")
    return table[:, 0], table[:, 1], table[:, 2]
