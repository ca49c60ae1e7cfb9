"""The statistics a claim needs: an estimate, an interval, a verdict.

- `wilson`: interval for a proportion (Wilson 1927). Never empty at 0/n or n/n, unlike p +- z sqrt(p(1-p)/n).
- `paired_effect`: mean difference over seeds with a paired t interval (Student 1908). The seed is the unit:
  a thousand items scored on one seed are one training run, not a thousand.
- `hierarchical_bootstrap`: the same difference from per-item scores. Every seed answers the same items, so
  seeds and items are crossed and each draw resamples both (Owen 2007, the pigeonhole bootstrap).
- `mcnemar_exact`: two models on the same items (McNemar 1947), exact binomial on the items they disagree on.
- `pass_at_k`: unbiased pass@k (Chen et al. 2021, equation 1).
- `verdict`: supported, refuted or inconclusive against the smallest effect worth having.

Left out: corrections for many comparisons, unpaired designs, sequential stopping. An effect is always
treatment minus control with "larger is better"; for a quantity that should fall, swap the two.
"""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import bdtr, ndtri, stdtrit

VERDICTS = ("supported", "refuted", "inconclusive")


@dataclass(frozen=True, slots=True)
class Effect:
    """treatment - control with its interval [low, high]; `n` is the number of seeds."""

    estimate: float
    low: float
    high: float
    n: int

    def __post_init__(self) -> None:
        if not self.low <= self.estimate <= self.high:  # also refuses NaN
            raise ValueError(f"effect {self.estimate} with interval [{self.low}, {self.high}]: the estimate "
                             "must lie inside, and none may be NaN; check the scores it was computed from")

    def as_dict(self, name: str, unit: str) -> dict[str, str | float]:
        """A row for a report: name, estimate, low, high, unit."""
        return {"name": name, "estimate": self.estimate, "low": self.low, "high": self.high, "unit": unit}


def wilson(k: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """(low, high), within [0, 1], for k of n trials. ValueError for n < 1 or k outside 0..n."""
    k, n = _count("k", k), _count("n", n)
    if n < 1:
        raise ValueError(f"n={n} trials: there is no evidence; evaluate at least one item")
    if k > n:
        raise ValueError(f"k={k} successes in n={n} trials: k must be 0..{n}; check that k and n "
                         "count the same items")
    z = ndtri(0.5 + _confidence(confidence) / 2)
    centre = (k + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(k * (n - k) / n + z * z / 4)
    low = 0.0 if k == 0 else float(centre - half)  # exact ends: rounding would leave 1e-17
    high = 1.0 if k == n else float(centre + half)
    return low, high


def paired_effect(treatment: Sequence[float], control: Sequence[float],
                  confidence: float = 0.95) -> Effect:
    """Mean of treatment - control over seeds, with the paired t interval.

    One score per seed, the same seeds in the same order. If every seed shows the same difference the interval
    has width zero: that says the seeds do not vary, not that the effect is certain.
    Raises ValueError for other than 1-D input, unequal lengths, fewer than 2 seeds, NaN or infinity.
    """
    a, b = _scores("treatment", treatment, 1), _scores("control", control, 1)
    _same_shape(a, b)
    _enough_seeds(len(a))
    difference = a - b
    n = len(difference)
    half = stdtrit(n - 1, 0.5 + _confidence(confidence) / 2) * difference.std(ddof=1) / math.sqrt(n)
    mean = difference.mean()
    return Effect(float(mean), float(mean - half), float(mean + half), n)


def hierarchical_bootstrap(treatment: Any, control: Any, n_boot: int = 10_000, seed: int = 0,
                           confidence: float = 0.95) -> Effect:
    """Mean of treatment - control with a percentile bootstrap interval over seeds and items.

    Both are (seeds, items) arrays of scores; column j is the same item in every row. Each of the `n_boot`
    draws picks seeds with replacement and items with replacement. With under about 8 seeds the percentile
    interval is too narrow (at 3 seeds, one draw in nine is a single seed three times): use `paired_effect`.
    Raises ValueError for other shapes, fewer than 2 seeds or items, n_boot < 100, NaN or infinity.
    """
    a, b = _scores("treatment", treatment, 2), _scores("control", control, 2)
    _same_shape(a, b)
    n_seeds, n_items = a.shape
    _enough_seeds(n_seeds)
    if n_items < 2:
        raise ValueError(f"{n_items} item per seed: give at least 2; for one score a seed use paired_effect")
    if _count("n_boot", n_boot) < 100:
        raise ValueError(f"n_boot={n_boot}: an interval needs at least 100 draws; 10000 takes a moment")
    tail = 50 * (1 - _confidence(confidence))
    random = np.random.default_rng(seed)
    difference = a - b  # (S, I)
    means = np.empty(n_boot)
    for start in range(0, n_boot, 1000):  # blocks bound the memory
        size = min(1000, n_boot - start)
        # how often each seed and each item is drawn, as weights that sum to 1
        seeds = random.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), size) / n_seeds  # (size, S)
        items = random.multinomial(n_items, np.full(n_items, 1 / n_items), size) / n_items  # (size, I)
        means[start:start + size] = (seeds @ difference * items).sum(axis=1)
    estimate = float(difference.mean())
    low, high = (float(x) for x in np.percentile(means, [tail, 100 - tail]))
    # a percentile interval of few, skewed draws may miss the estimate: widen it to hold it
    return Effect(estimate, min(low, estimate), max(high, estimate), n_seeds)


def mcnemar_exact(b: int, c: int) -> float:
    """Two-sided p for b items only the first model got right and c items only the second did.

    Items that both got right, or both wrong, say nothing about which is better. With b = c = 0 the models
    never disagreed and p is 1. Raises ValueError for a negative or fractional count.
    """
    b, c = _count("b", b), _count("c", c)
    return min(1.0, 2 * float(bdtr(min(b, c), b + c, 0.5)))


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that at least one of k samples passes, from n samples of which c passed: unbiased.

    1 - C(n-c, k) / C(n, k), as a product so that no binomial overflows. Averaging 1 - (1 - c/n)^k instead is
    biased low. Raises ValueError for n < 1, k outside 1..n, c outside 0..n.
    """
    n, c, k = _count("n", n), _count("c", c), _count("k", k)
    if n < 1:
        raise ValueError(f"n={n} samples: there is no evidence; draw at least one")
    if not 1 <= k <= n:
        raise ValueError(f"k={k} with n={n} samples: k must be 1..{n}; draw more samples or lower k")
    if c > n:
        raise ValueError(f"c={c} passed of n={n} samples: c must be 0..{n}; count these samples only")
    if n - c < k:
        return 1.0  # any k samples hold a passing one
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def verdict(effect: Effect, smallest: float) -> str:
    """What the interval says about the claim "there is an effect, and it is worth having", smallest > 0.

    - "supported": the interval lies above zero and the estimate reaches `smallest`. That is weaker than "the effect is
      at least `smallest`", which would need the whole interval above it: read the interval beside the verdict;
    - "refuted": the whole interval lies below `smallest`;
    - "inconclusive": neither. More seeds may decide it.

    Raises ValueError unless smallest is a finite number above 0.
    """
    if not (math.isfinite(smallest) and smallest > 0):
        raise ValueError(f"smallest={smallest}: must be a number above 0; state the claim so that larger is "
                         "better (swap treatment and control for a quantity that should fall)")
    if effect.low > 0 and effect.estimate >= smallest:
        return "supported"
    return "refuted" if effect.high < smallest else "inconclusive"


def _count(name: str, value: int) -> int:
    try:
        count = operator.index(value)  # takes numpy integers, refuses 3.0
    except TypeError as error:
        raise ValueError(f"{name}={value!r}: must be a whole number; give a count, not a rate") from error
    if count < 0:
        raise ValueError(f"{name}={count}: must be 0 or more; counts are never negative")
    return count


def _confidence(value: float) -> float:
    if not 0 < value < 1:
        raise ValueError(f"confidence={value}: must lie between 0 and 1; 0.95 is usual")
    return value


def _scores(name: str, values: Any, ndim: int) -> np.ndarray:
    shape = {1: "one score per seed", 2: "a (seeds, items) array"}[ndim]
    try:
        array = np.asarray(values, dtype=float)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: not a rectangular array of numbers ({error}); give {shape}") from error
    if array.ndim != ndim:
        raise ValueError(f"{name}: shape {array.shape}; give {shape}")
    if array.size == 0:
        raise ValueError(f"{name}: shape {array.shape} holds no scores; run at least 2 seeds")
    if not np.isfinite(array).all():
        index = np.argwhere(~np.isfinite(array))[0].tolist()
        raise ValueError(f"{name}: {array[tuple(index)]} at index {index}; every score must be finite, rerun "
                         "or drop that seed in both arms")
    return array


def _same_shape(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape != b.shape:
        raise ValueError(f"treatment has shape {a.shape} and control {b.shape}: they are paired; score both "
                         "arms on the same seeds and items, in the same order")


def _enough_seeds(n: int) -> None:
    if n < 2:
        raise ValueError(f"{n} seed: an interval needs at least 2; run more seeds (3 to 5 is usual)")
