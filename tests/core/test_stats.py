"""core/stats.py against hand values, scipy, statsmodels and brute force."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
from statsmodels.stats.proportion import proportion_confint

from lifecycle_lib.core.stats import (
    Effect,
    hierarchical_bootstrap,
    mcnemar_exact,
    paired_effect,
    pass_at_k,
    verdict,
    wilson,
)

# ---- Wilson


def test_wilson_by_hand():
    """5 of 10, z = 1.96: centre (5 + 1.92) / (10 + 3.84) = 0.5, half width 0.2634."""
    assert wilson(5, 10) == pytest.approx((0.236593, 0.763407), abs=1e-6)


def test_wilson_agrees_with_statsmodels():
    for n, confidence in itertools.product((1, 2, 7, 40, 1000), (0.8, 0.95, 0.99)):
        for k in {0, 1, n // 3, n - 1, n}:
            oracle = proportion_confint(k, n, alpha=1 - confidence, method="wilson")
            assert wilson(k, n, confidence) == pytest.approx(oracle, abs=1e-9)


def test_wilson_properties_and_the_wald_interval_fails_them():
    def sound(interval):
        for n in (1, 5, 30):
            for k in range(n + 1):
                low, high = interval(k, n)
                mirrored = interval(n - k, n)
                if not (0 <= low <= k / n <= high <= 1 and low < high):
                    return False
                if not math.isclose(low, 1 - mirrored[1], abs_tol=1e-12):
                    return False
        return True

    def wald(k, n):
        half = 1.96 * math.sqrt(k / n * (1 - k / n) / n)
        return k / n - half, k / n + half

    assert sound(wilson) and not sound(wald)  # 0/30 is not certainty


# ---- paired t


def test_paired_effect_by_hand():
    """Differences 1, 2, 3: mean 2, sd 1, t(2) = 4.302653, half width 4.302653 / sqrt(3)."""
    effect = paired_effect([2, 4, 6], [1, 2, 3])
    assert (effect.estimate, effect.n) == (2.0, 3)
    assert effect.high - 2 == pytest.approx(4.302653 / math.sqrt(3), abs=1e-6)


def paired_matches_scipy(function):
    random = np.random.default_rng(1)
    for n, confidence in ((2, 0.95), (3, 0.9), (5, 0.95), (30, 0.99)):
        base = random.normal(size=n) * 5  # seeds differ far more than arms: pairing matters
        a, b = base + 0.3 + 0.1 * random.normal(size=n), base
        oracle = scipy.stats.ttest_rel(a, b).confidence_interval(confidence)
        effect = function(a, b, confidence)
        if not np.allclose([effect.low, effect.high], [oracle.low, oracle.high], atol=1e-9, rtol=0):
            return False
    return True


def test_paired_effect_agrees_with_scipy_and_the_unpaired_one_does_not():
    def unpaired(a, b, confidence):
        ci = scipy.stats.ttest_ind(a, b).confidence_interval(confidence)
        return Effect(float(np.mean(a) - np.mean(b)), ci.low, ci.high, len(a))

    assert paired_matches_scipy(paired_effect)
    assert not paired_matches_scipy(unpaired)


def test_paired_effect_properties():
    a, b = [0.9, 0.7, 0.8, 0.95], [0.5, 0.6, 0.4, 0.7]
    forward, backward = paired_effect(a, b), paired_effect(b, a)
    assert (forward.low, forward.high) == pytest.approx((-backward.high, -backward.low))
    shifted = paired_effect([x + 3 for x in a], [x + 3 for x in b])
    assert (shifted.low, shifted.high) == pytest.approx((forward.low, forward.high))
    flat = paired_effect([1.0, 1.0], [1.0, 1.0])
    assert (flat.low, flat.estimate, flat.high) == (0, 0, 0)


# ---- bootstrap


def exact_quantiles(difference, q):
    """Brute force: every draw of seeds and of items, all equally likely."""
    s, n = difference.shape
    means = [difference[np.ix_(rows, columns)].mean()
             for rows in itertools.product(range(s), repeat=s)
             for columns in itertools.product(range(n), repeat=n)]
    return np.percentile(means, [100 * x for x in q])


def test_bootstrap_agrees_with_brute_force_and_the_item_only_one_does_not():
    """3 seeds x 3 items of distinct primes: 729 equally likely draws, quantiles by enumeration."""
    difference = np.array([[2.0, 3, 31], [5, 7, 37], [11, 13, 41]])
    oracle = exact_quantiles(difference, (0.05, 0.95))
    effect = hierarchical_bootstrap(difference, np.zeros((3, 3)), 40_000, seed=3, confidence=0.9)
    assert effect.estimate == pytest.approx(150 / 9)
    # the distribution is discrete, its atoms near these quantiles are under 1 apart
    assert np.abs(np.array([effect.low, effect.high]) - oracle).max() < 1.0

    pooled = np.random.default_rng(0).choice(difference.ravel(), (40_000, 9)).mean(axis=1)  # seeds ignored
    assert np.abs(np.percentile(pooled, [5, 95]) - oracle).max() > 1.0


def test_bootstrap_width_does_not_shrink_with_items_when_seeds_disagree():
    """Seeds that differ by more than their items: 1000 more items buy nothing, which pooling would deny."""
    random = np.random.default_rng(0)

    def width(items):
        scores = np.array([[0.1], [0.5], [0.9], [0.3]]) + 0.01 * random.normal(size=(4, items))
        effect = hierarchical_bootstrap(scores, np.zeros_like(scores), 2000, 0)
        return effect.high - effect.low

    assert width(2000) > 0.9 * width(20)


def test_bootstrap_is_a_function_of_its_seed_and_matches_scipy_on_one_level():
    random = np.random.default_rng(5)
    per_seed = random.normal(size=(12, 1)) * np.ones((1, 3))  # all items equal: only the seeds vary
    zero = np.zeros_like(per_seed)
    first = hierarchical_bootstrap(per_seed, zero, 20_000, 1)
    assert first == hierarchical_bootstrap(per_seed, zero, 20_000, 1)
    assert first != hierarchical_bootstrap(per_seed, zero, 20_000, 2)
    oracle = scipy.stats.bootstrap((per_seed[:, 0],), np.mean, n_resamples=20_000, method="percentile",
                                   rng=np.random.default_rng(9)).confidence_interval
    noise = 0.05 * (oracle.high - oracle.low)  # Monte Carlo error of two independent runs
    assert abs(first.low - oracle.low) < noise and abs(first.high - oracle.high) < noise


# ---- McNemar, pass@k


def test_mcnemar():
    assert mcnemar_exact(1, 5) == pytest.approx(2 * (1 + 6) / 2**6)  # by hand
    assert mcnemar_exact(0, 0) == 1.0
    for b, c in itertools.product((0, 1, 2, 9, 40), (0, 1, 3, 9, 200)):
        if b + c:
            assert mcnemar_exact(b, c) == pytest.approx(scipy.stats.binomtest(b, b + c).pvalue, rel=1e-9)
        assert mcnemar_exact(b, c) == mcnemar_exact(c, b) <= 1


def matches_enumeration(function):
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
            if not math.isclose(function(n, c, k), sum(map(any, draws)) / len(draws), abs_tol=1e-12):
                return False
    return True


def test_pass_at_k_agrees_with_enumeration_and_the_biased_form_does_not():
    assert pass_at_k(4, 2, 2) == pytest.approx(5 / 6)  # by hand: of 6 pairs, one holds no pass
    assert matches_enumeration(pass_at_k)
    assert not matches_enumeration(lambda n, c, k: 1 - (1 - c / n) ** k)


def test_pass_at_k_large_and_monotone():
    assert pass_at_k(10_000, 1, 100) == pytest.approx(0.01)
    values = [pass_at_k(200, 10, k) for k in range(1, 201)]
    assert values == sorted(values) and values[0] == pytest.approx(0.05) and values[-1] == 1.0


# ---- verdict


@pytest.mark.parametrize(("estimate", "low", "high", "wanted"), [
    (0.20, 0.12, 0.28, "supported"),
    (0.12, 0.01, 0.23, "supported"),
    (0.10, 0.01, 0.19, "supported"),      # the estimate just reaches the smallest effect
    (0.12, 0.00, 0.24, "inconclusive"),   # zero is not excluded
    (0.09, 0.01, 0.17, "inconclusive"),   # real, and perhaps too small
    (0.04, 0.01, 0.07, "refuted"),        # real, and certainly too small
    (0.00, -0.05, 0.05, "refuted"),
    (-0.3, -0.40, -0.2, "refuted"),       # the other direction
    (0.00, -0.50, 0.50, "inconclusive"),
    (0.05, 0.00, 0.10, "inconclusive"),   # high touches the smallest effect
])
def test_verdict(estimate, low, high, wanted):
    assert verdict(Effect(estimate, low, high, 5), 0.1) == wanted


def test_verdict_keeps_its_error_rate_and_one_that_reads_the_estimate_alone_does_not():
    """Under no effect, at most 2.5 % of experiments may come out supported."""
    random = np.random.default_rng(0)
    effects = [paired_effect(random.normal(size=5), random.normal(size=5)) for _ in range(1000)]

    def false_claims(judge):
        return sum(judge(effect, 0.1) == "supported" for effect in effects) / len(effects)

    limit = scipy.stats.binom.ppf(0.999, 1000, 0.025) / 1000
    assert false_claims(verdict) <= limit
    assert false_claims(lambda e, s: "supported" if e.estimate >= s else "refuted") > limit


def test_as_dict():
    row = Effect(0.1, 0.0, 0.2, 3).as_dict("accuracy", "fraction")
    assert row == {"name": "accuracy", "estimate": 0.1, "low": 0.0, "high": 0.2, "unit": "fraction"}


# ---- what is refused

ONES = np.ones((3, 4))


@pytest.mark.parametrize(("call", "value", "fix"), [
    (lambda: wilson(0, 0), "n=0", "at least one item"),
    (lambda: wilson(3, 2), "k=3", "0..2"),
    (lambda: wilson(-1, 2), "k=-1", "never negative"),
    (lambda: wilson(0.5, 2), "k=0.5", "not a rate"),
    (lambda: wilson(1, 2, 95), "confidence=95", "0.95"),
    (lambda: paired_effect([], []), "no scores", "2 seeds"),
    (lambda: paired_effect([1], [1]), "1 seed", "more seeds"),
    (lambda: paired_effect([1, 2], [1]), r"\(2,\)", "same seeds"),
    (lambda: paired_effect([1, math.nan], [1, 2]), r"nan at index \[1\]", "finite"),
    (lambda: paired_effect(ONES, ONES), r"shape \(3, 4\)", "one score per seed"),
    (lambda: paired_effect(["a", "b"], [1, 2]), "treatment", "numbers"),
    (lambda: hierarchical_bootstrap([[1, 2], [3]], ONES), "treatment", "rectangular"),
    (lambda: hierarchical_bootstrap(ONES[:1], ONES[:1]), "1 seed", "more seeds"),
    (lambda: hierarchical_bootstrap(ONES[:, :1], ONES[:, :1]), "1 item", "paired_effect"),
    (lambda: hierarchical_bootstrap(ONES, ONES, n_boot=5), "n_boot=5", "at least 100"),
    (lambda: hierarchical_bootstrap(ONES, ONES[:2]), r"\(2, 4\)", "same seeds and items"),
    (lambda: mcnemar_exact(-1, 2), "b=-1", "never negative"),
    (lambda: pass_at_k(0, 0, 1), "n=0", "at least one"),
    (lambda: pass_at_k(5, 2, 6), "k=6", "1..5"),
    (lambda: pass_at_k(5, 2, 0), "k=0", "1..5"),
    (lambda: pass_at_k(5, 6, 2), "c=6", "0..5"),
    (lambda: verdict(Effect(0, 0, 0, 2), 0), "smallest=0", "above 0"),
    (lambda: verdict(Effect(0, 0, 0, 2), math.nan), "smallest=nan", "above 0"),
    (lambda: Effect(math.nan, 0, 1, 2), "nan", "check the scores"),
    (lambda: Effect(2, 0, 1, 2), "effect 2", "lie inside"),
])
def test_refused(call, value, fix):
    with pytest.raises(ValueError, match=value) as error:
        call()
    assert fix in str(error.value)
