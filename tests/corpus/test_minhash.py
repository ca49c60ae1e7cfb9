"""MinHash: equal to the book version, as accurate as the theory says and as datasketch; bands as the S-curve."""

import itertools
import math

import numpy as np
import pytest
from datasketch import MinHash as TheirMinHash
from rensa import RMinHash

from lifecycle_lib.core.seeds import rng
from lifecycle_lib.corpus.minhash import (
    MinHash,
    band_keys,
    bands_for,
    bucket_pairs,
    buckets,
    estimate,
    jaccard,
    reference_signature,
    s_curve,
    shingles,
    sieve,
    standard_error,
)

PERMUTATIONS = 128
ODD_TEXTS = ["", "a", "ab", "abcd", "abcde", "a b c d e", "  two   spaces ", "tab\tand\nline", "héé ∂ 😀 ü", "x" * 300,
             "dup dup dup dup dup dup", "half a surrogate \ud800 here", "words " * 40]


def planted_pairs(n: int = 441, size: int = 120) -> tuple[list[str], list[str], np.ndarray]:
    """Word sets with a Jaccard known by construction, spread evenly over 0 to 1: `both` words in common of `size`."""
    left, right, truth = [], [], []
    for i in range(n):
        both = round(size * i / (n - 1))
        alone = size - both
        words = [f"w{i}-{j}" for j in range(size)]
        cut = both + alone // 2
        left.append(" ".join(words[:cut]))
        right.append(" ".join(words[:both] + words[cut:]) or "none")
        truth.append(both / size)
    return left, right, np.array(truth)


def random_texts(n: int, seed: int) -> list[str]:
    draw = rng(seed, "texts")
    return ["".join(draw.choices("abc é\n", k=draw.randrange(60))) for _ in range(n)]


def test_shingles_and_jaccard_by_hand():
    assert shingles("abcab", 3, "char") == {"abc", "bca", "cab"}
    assert shingles("the cat sat  on\nthe mat", 2, "word") == {"the cat", "cat sat", "sat on", "on the", "the mat"}
    assert shingles("ab", 3, "char") == {"ab"} and shingles("", 3, "word") == {""}
    assert jaccard({1, 2, 3}, {2, 3, 4}) == 2 / 4
    assert s_curve(0.5, bands=2, rows=1) == 0.75
    assert standard_error(0.5, 100) == pytest.approx(0.05)


@pytest.mark.parametrize(("unit", "k"), [("char", 1), ("char", 5), ("word", 1), ("word", 3)])
def test_fast_signatures_equal_the_book_version(unit, k):
    minhash = MinHash(permutations=16, k=k, unit=unit, seed=3)
    texts = ODD_TEXTS + random_texts(60, seed=k) + ["a long one, cut in no block " * 300]
    assert minhash.signatures(texts).tolist() == [reference_signature(t, minhash) for t in texts]
    assert minhash.signatures([]).shape == (0, 16)
    assert minhash.signatures(texts[:1]).tolist() == [reference_signature(texts[0], minhash)]


def test_signatures_depend_on_the_seed_and_on_nothing_else():
    one, two = MinHash(seed=1), MinHash(seed=2)
    assert np.array_equal(one.signatures(ODD_TEXTS), MinHash(seed=1).signatures(ODD_TEXTS))
    assert np.array_equal(one.signatures(ODD_TEXTS)[::-1], one.signatures(ODD_TEXTS[::-1]))
    assert not np.array_equal(one.signatures(ODD_TEXTS), two.signatures(ODD_TEXTS))


def errors(minhash: MinHash) -> tuple[np.ndarray, np.ndarray]:
    left, right, truth = planted_pairs()
    found = [jaccard(shingles(a, 1, "word"), shingles(b, 1, "word")) for a, b in zip(left, right)]
    assert np.allclose(found, truth)
    return estimate(minhash.signatures(left), minhash.signatures(right)) - truth, truth


def within(error: np.ndarray, truth: np.ndarray, n_standard_errors: float) -> float:
    allowed = n_standard_errors * np.sqrt(truth * (1 - truth) / PERMUTATIONS)
    return float((np.abs(error) <= allowed + 1e-12).mean())


def test_estimate_lies_within_one_over_root_permutations_of_the_truth():
    """441 planted pairs, Jaccard 0 to 1. 1 / sqrt(P) is two standard errors at J = 0.5 and more elsewhere: at least 95%
    of all pairs must lie inside, for three seeds; the mean absolute error must be below half of it, and the normal
    shares 68% and 95% must come out inside one and two standard errors."""
    bound = 1 / math.sqrt(PERMUTATIONS)
    for seed in range(3):
        error, truth = errors(MinHash(permutations=PERMUTATIONS, k=1, unit="word", seed=seed))
        assert (np.abs(error) <= bound).mean() >= 0.95
        assert np.abs(error).mean() < bound / 2
        assert 0.60 <= within(error, truth, 1) <= 0.78
        assert within(error, truth, 2) >= 0.92
        assert not error[truth == 0].any() and not error[truth == 1].any()


def test_spread_over_seeds_is_the_standard_error():
    """The same pair under 200 seeds: mean J, standard deviation sqrt(J (1 - J) / P)."""
    a, b = "a b c d e f g h i j k l", "a b c d e f g h x y z w"  # 8 of 16 words
    draws = [estimate(*MinHash(permutations=64, k=1, unit="word", seed=s).signatures([a, b])) for s in range(200)]
    assert np.mean(draws) == pytest.approx(0.5, abs=3 * 0.0625 / math.sqrt(200))
    assert np.std(draws) == pytest.approx(standard_error(0.5, 64), rel=0.2)


def test_as_accurate_as_datasketch_and_not_far_from_rensa():
    """Mean absolute error over 441 pairs, P = 128: ours 0.027, datasketch 0.028. rensa 0.020, less than P
    independent minima can reach: its numbers are made another way."""
    left, right, truth = planted_pairs()

    def theirs(text: str) -> TheirMinHash:
        out = TheirMinHash(num_perm=PERMUTATIONS, seed=1)
        out.update_batch([w.encode() for w in shingles(text, 1, "word")])
        return out

    def rensa(text: str) -> RMinHash:
        out = RMinHash(num_perm=PERMUTATIONS, seed=1)
        out.update(sorted(shingles(text, 1, "word")))
        return out

    minhash = MinHash(permutations=PERMUTATIONS, k=1, unit="word")
    ours = np.abs(estimate(minhash.signatures(left), minhash.signatures(right)) - truth).mean()
    for make, at_most in ((theirs, 1.1), (rensa, 1.5)):
        peer = np.abs([make(a).jaccard(make(b)) - t for a, b, t in zip(left, right, truth)]).mean()
        assert ours < at_most * peer, (make.__name__, ours, peer)


def test_broken_one_permutation_in_all_places_is_caught(monkeypatch):
    """With equal permutations the estimate is 0 or 1: the bound of the accuracy test must not hold."""
    good = MinHash.coefficients
    monkeypatch.setattr(MinHash, "coefficients", lambda self: tuple(np.full_like(c, c[0]) for c in good(self)))
    error, truth = errors(MinHash(permutations=PERMUTATIONS, k=1, unit="word"))
    assert (np.abs(error) <= 1 / math.sqrt(PERMUTATIONS)).mean() < 0.5
    assert within(error, truth, 2) < 0.5


def test_sieve_keeps_true_pairs_and_drops_far_ones():
    left, right, truth = planted_pairs()
    signatures = MinHash(permutations=PERMUTATIONS, k=1, unit="word").signatures(left + right)
    pairs = np.stack((np.arange(len(left)), np.arange(len(left)) + len(left)), axis=1)
    for minima in (signatures, (signatures & 255).astype(np.uint8)):
        kept = sieve(minima, pairs, threshold=0.8)[:, 0]
        assert set(np.flatnonzero(truth >= 0.8)) <= set(kept)  # all of 89
        assert truth[kept].min() > 0.5  # 0.66 plus noise
    assert len(sieve(signatures, pairs, threshold=0.01)) == len(pairs)
    assert len(sieve(signatures, pairs[:0], threshold=0.8)) == 0


def test_bucket_pairs_are_all_pairs_of_equal_keys_once():
    draw = rng(0, "keys")
    for n in (0, 1, 2, 50, 200):
        keys = np.array([draw.randrange(n // 4 + 1) for _ in range(n)], np.uint64)
        pairs = [tuple(p) for batch in bucket_pairs(*buckets(keys)) for p in batch.tolist()]
        assert sorted(pairs) == [p for p in itertools.combinations(range(n), 2) if keys[p[0]] == keys[p[1]]]
    same = buckets(np.zeros(6, np.uint64))
    assert sum(len(batch) for batch in bucket_pairs(*same, window=2)) == 5 + 4


def test_bands_meet_as_often_as_the_s_curve_says():
    """A pair of each of three similarities under 300 seeds: the share that meets, beside 1 - (1 - J^r)^b. Looking at
    one band only, the broken variant, finds far fewer."""
    left, right, truth = planted_pairs(61)
    for j in (0.5, 0.7, 0.9):
        at = int(np.argmin(np.abs(truth - j)))
        met, met_in_one = [], []
        for seed in range(300):
            signatures = MinHash(permutations=32, k=1, unit="word", seed=seed).signatures([left[at], right[at]])
            keys = band_keys(signatures, bands=8, rows=4)
            met.append((keys[:, 0] == keys[:, 1]).any())
            met_in_one.append(keys[0, 0] == keys[0, 1])
        expected = s_curve(float(truth[at]), 8, 4)
        spread = math.sqrt(expected * (1 - expected) / len(met))
        assert np.mean(met) == pytest.approx(expected, abs=4 * spread + 1e-9)
        assert np.mean(met_in_one) == pytest.approx(truth[at] ** 4, abs=4 * math.sqrt(0.25 / len(met)))
        assert np.mean(met_in_one) < np.mean(met) - 0.15


def test_bands_for_is_the_longest_band_that_reaches_the_recall():
    for threshold in (0.3, 0.6, 0.8, 0.95):
        bands, rows = bands_for(threshold, 128, recall=0.99)
        assert s_curve(threshold, bands, rows) >= 0.99
        assert all(s_curve(threshold, 128 // r, r) < 0.99 for r in range(rows + 1, 129))


@pytest.mark.parametrize(("make", "message"), [
    (lambda: MinHash(permutations=0), "permutations=0"),
    (lambda: MinHash(k=0), "k=0"),
    (lambda: MinHash(unit="byte"), "unit='byte'"),
    (lambda: bands_for(0.0, 128), "threshold=0.0"),
    (lambda: bands_for(0.01, 16), "raise permutations"),
    (lambda: jaccard(set(), set()), "empty sets"),
])
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
