"""MinHash: how alike two texts are, read off two short lists of numbers, and which pairs are worth a look.

A text is the set of its k-shingles (runs of k characters or k words). A hash function orders all shingles at random;
the chance that two sets have the same smallest one is their Jaccard similarity J = |A & B| / |A | B| (Broder 1997).
With P independent orders the share of equal minima is an average of P yes/no draws: mean J, standard error
sqrt(J (1 - J) / P), never above 1 / (2 sqrt(P)).

Banding (Leskovec, Rajaraman & Ullman, Mining of Massive Datasets, 3.4): P minima are cut into b bands of r; two rows
that agree on all of a band become a candidate pair, with chance 1 - (1 - J^r)^b. That S-curve is the recall; the
candidates are then compared exactly (dedupe.near_pairs), so what is returned has precision 1.

How it is fast: shingle hashes are polynomial hashes of a whole block of text at once (Horner's rule over shifted
views), rows are sorted by length and laid side by side, and each order is three numpy passes over a block that fits
the cache. Orders are a h + b modulo 2^32, a odd, over mixed 32-bit hashes (linear permutations: Bohman, Cooper &
Frieze 2000), not the truly random ones of the theory; the tests measure what that costs. Two shingles share a 32-bit
hash with chance 2^-32. Left out: weighted and one-permutation MinHash.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lifecycle_lib.core.seeds import derive_seed

UNITS = ("char", "word")
CHAR_BASE, WORD_BASE = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F  # odd: a polynomial in them loses nothing mod 2^64
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_CELLS = 1 << 16  # shingles in one cache block: 256 KiB of uint32


def shingles(text: str, k: int, unit: str) -> set[str]:
    """The set of runs of `k` characters, or of `k` words (joined by one space). A text shorter than k is its own
    single shingle, the empty text too, so no set is empty. Raises ValueError for k below 1 or an unknown unit."""
    _check(k, unit)
    if unit == "char":
        return {text[i:i + k] for i in range(max(1, len(text) - k + 1))}
    words = text.split()
    return {" ".join(words[i:i + k]) for i in range(max(1, len(words) - k + 1))}


def jaccard(a: set[str], b: set[str]) -> float:
    """|A & B| / |A | B|. Raises ValueError when both are empty: there is nothing to compare."""
    if not a and not b:
        raise ValueError("jaccard of two empty sets has no value; give sets made by shingles()")
    common = len(a & b)
    return common / (len(a) + len(b) - common)


def standard_error(j: float, permutations: int) -> float:
    """Of the estimate of a similarity `j`: the standard deviation of a mean of `permutations` yes/no draws."""
    return math.sqrt(j * (1 - j) / permutations)


def shingle_hash(shingle: str, k: int, unit: str) -> int:
    """The 32-bit hash of one shingle, by plain arithmetic: the reference for `shingle_hashes`.

    Horner over k characters (k word hashes); a text shorter than k is filled up with zeros at the end. So two texts
    under k characters that differ only in NULs at the end are taken for the same."""
    if unit == "char":
        values, base = [ord(c) for c in shingle], CHAR_BASE
    else:
        values, base = [_word_hash(word) for word in shingle.split()], WORD_BASE
    h = 0
    for value in values + [0] * (k - len(values)):
        h = (h * base + value) % 2**64
    h = (h ^ h >> 30) * _MIX[0] % 2**64  # the finaliser of splitmix64 (Steele, Lea & Flood 2014)
    h = (h ^ h >> 27) * _MIX[1] % 2**64
    return h >> 32


def _word_hash(word: str) -> int:
    return sum(ord(c) * pow(CHAR_BASE, i, 2**64) for i, c in enumerate(word)) % 2**64


def shingle_hashes(texts: Sequence[str], k: int, unit: str) -> tuple[np.ndarray, np.ndarray]:
    """(hashes uint32 (S,), counts int64 (N,)): every row's shingle hashes one after the other, repeats included."""
    _check(k, unit)
    if unit == "char":
        padded = [t if len(t) >= k else t + "\0" * (k - len(t)) for t in texts]
        lengths = np.fromiter(map(len, padded), np.int64, len(padded))
        values, base = _code_points("".join(padded)).astype(np.uint64), CHAR_BASE
    else:
        words = [t.split() for t in texts]
        words = [w if len(w) >= k else w + ["\0"] * (k - len(w)) for w in words]
        lengths = np.fromiter(map(len, words), np.int64, len(words))
        values, base = _word_hashes(_code_points(" ".join(map(" ".join, words)) + " ")), WORD_BASE
    windows = len(values) - k + 1
    h = values[:windows].copy()
    for j in range(1, k):
        h *= np.uint64(base)
        h += values[j:j + windows]
    h ^= h >> np.uint64(30)
    h *= np.uint64(_MIX[0])
    h ^= h >> np.uint64(27)
    h *= np.uint64(_MIX[1])
    inside = np.ones(windows, bool)  # not the windows that run over the end of a row
    ends = np.cumsum(lengths)[:-1]
    for j in range(1, k):
        inside[ends - j] = False
    return (h >> np.uint64(32)).astype(np.uint32)[inside], lengths - (k - 1)


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def _word_hashes(points: np.ndarray) -> np.ndarray:
    """One hash a word of `points` (each word ends with a space): sum of c_i base^i, i counted from the word's start."""
    ends = np.flatnonzero(points == 32)
    starts = np.concatenate(([0], ends[:-1] + 1))
    place = np.arange(len(points)) - np.repeat(starts, ends - starts + 1)
    powers = np.cumprod(np.full(place.max() + 1, CHAR_BASE, np.uint64)) * np.uint64(pow(CHAR_BASE, -1, 2**64))
    terms = powers[place] * points
    terms[ends] = 0
    return np.add.reduceat(terms, starts)


@dataclass(frozen=True, slots=True, kw_only=True)
class MinHash:
    """`permutations` orders over k-shingles. The same seed gives the same orders on every machine."""

    permutations: int = 128
    k: int = 5
    unit: str = "char"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.permutations <= 4096:
            raise ValueError(f"permutations={self.permutations} is outside 1 to 4096; 128 gives a standard error "
                             "of at most 0.045")
        _check(self.k, self.unit)

    def coefficients(self) -> tuple[np.ndarray, np.ndarray]:
        """(a, b), each uint32 (P,): order p sorts shingles by a[p] h + b[p] mod 2^32. a is odd."""
        draw = np.random.Generator(np.random.PCG64(derive_seed(self.seed, "minhash")))
        a, b = draw.integers(0, 2**32, (2, self.permutations), dtype=np.uint32)
        return a | np.uint32(1), b

    def signatures(self, texts: Sequence[str]) -> np.ndarray:
        """The minima, uint32 (N, P). Equal to `reference_signature` of each text, number for number."""
        hashes, counts = shingle_hashes(texts, self.k, self.unit) if len(texts) else (None, np.zeros(0, np.int64))
        out = np.empty((self.permutations, len(texts)), np.uint32)
        for rows, cells in _rectangles(counts):
            block = hashes[cells.T.copy()]  # (longest, rows): a minimum over the first axis runs along the rows
            scratch = np.empty_like(block)
            for p, (a, b) in enumerate(zip(*self.coefficients())):
                np.multiply(block, a, out=scratch)
                np.add(scratch, b, out=scratch)
                out[p, rows] = scratch.min(axis=0)
        return out.T


def reference_signature(text: str, minhash: MinHash) -> list[int]:
    """MinHash as one reads it in a book: for each order the smallest number that any shingle gets."""
    hashes = {shingle_hash(s, minhash.k, minhash.unit) for s in shingles(text, minhash.k, minhash.unit)}
    return [min((a * h + b) % 2**32 for h in hashes) for a, b in zip(*(c.tolist() for c in minhash.coefficients()))]


def estimate(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Estimated Jaccard of signatures a and b, (..., P) each: the share of equal minima, (...)."""
    return (a == b).mean(axis=-1)


def s_curve(j: float, bands: int, rows: int) -> float:
    """The chance that a pair of similarity `j` meets in a band: 1 - (1 - j^rows)^bands."""
    return 1 - (1 - j**rows) ** bands


def bands_for(threshold: float, permutations: int, recall: float = 0.999) -> tuple[int, int]:
    """(bands, rows): the longest bands, so the fewest candidates, that still find a pair of similarity `threshold`
    with chance `recall` or more. More alike pairs are found more surely.

    Raises ValueError if even bands of one row cannot, or a number is out of range."""
    if not 0 < threshold <= 1 or not 0 < recall < 1:
        raise ValueError(f"threshold={threshold}, recall={recall}: give 0 < threshold <= 1 and 0 < recall < 1")
    fits = [r for r in range(1, permutations + 1) if s_curve(threshold, permutations // r, r) >= recall]
    if not fits:
        raise ValueError(f"{permutations} permutations cannot find pairs of Jaccard {threshold} with recall {recall}; "
                         "raise permutations or the threshold")
    return permutations // max(fits), max(fits)


def band_keys(signatures: np.ndarray, bands: int, rows: int) -> np.ndarray:
    """One uint64 key a band and row, (bands, N): equal keys mean equal minima in the band (up to 2^-64)."""
    keys = np.zeros((bands, len(signatures)), np.uint64)
    for r in range(rows):
        keys *= np.uint64(WORD_BASE)
        keys += signatures[:, r:bands * rows:rows].T
        keys ^= keys >> np.uint64(29)
    return keys


def buckets(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(keys, rows): rows of one band (N,) sorted so that equal keys are neighbours, rows ascending among equals.

    One sort of one integer: the row number takes the low bits of the mixed key. That leaves 64 - log2 N bits of key,
    44 for a million rows: a chance meeting is one more candidate, no more."""
    bits = np.uint64(max(1, (len(keys) - 1).bit_length()))
    packed = np.sort(keys * np.uint64(CHAR_BASE) >> bits << bits | np.arange(len(keys), dtype=np.uint64))
    return packed >> bits, (packed & np.uint64((1 << int(bits)) - 1)).astype(np.int64)


def bucket_pairs(keys: np.ndarray, rows: np.ndarray, window: int | None = None) -> Iterator[np.ndarray]:
    """Pairs (M, 2), i < j, of equal `keys` (from `buckets`): batch d pairs each row with the d-th after it in its
    bucket. Every pair of a bucket comes exactly once; with `window`, a row meets only the next `window` rows."""
    at = np.arange(len(keys))
    for d in range(1, len(keys) if window is None else min(window + 1, len(keys))):
        at = at[:np.searchsorted(at, len(keys) - d)]
        at = at[keys[at] == keys[at + d]]
        if not len(at):
            return
        yield np.stack((rows[at], rows[at + d]), axis=1)


def sieve(minima: np.ndarray, pairs: np.ndarray, threshold: float) -> np.ndarray:
    """Those of `pairs` (M, 2) whose estimate is not four standard errors or more below the threshold: a true pair is
    lost with chance 3e-5. `minima` (N, P): signatures, or their low bytes, which agree by chance at most 1/256 more
    often (b-bit minwise hashing, Li & Koenig 2010) and take a quarter of the room."""
    permutations = minima.shape[1]
    least = (threshold - 4 * standard_error(threshold, permutations)) * permutations
    if least <= 0 or not len(pairs):
        return pairs
    step = max(1, (1 << 22) // permutations)
    return np.concatenate([some[np.count_nonzero(minima[some[:, 0]] == minima[some[:, 1]], axis=1) >= least]
                           for some in (pairs[at:at + step] for at in range(0, len(pairs), step))])


def _rectangles(counts: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Ragged rows of `counts` items, one after the other, as rectangles of about _CELLS: (rows (M,), places (M, L)).

    Longest rows first. A shorter row repeats its last item: a set does not mind."""
    starts = np.cumsum(counts) - counts
    order = np.argsort(-counts, kind="stable")
    at = 0
    while at < len(order):
        longest = int(counts[order[at]])
        rows = order[at:at + max(1, _CELLS // longest)]
        yield rows, starts[rows, None] + np.minimum(np.arange(longest), counts[rows, None] - 1)
        at += len(rows)


def _check(k: int, unit: str) -> None:
    if k < 1 or unit not in UNITS:
        raise ValueError(f"k={k}, unit={unit!r}: k must be 1 or more and unit one of {', '.join(UNITS)}")
