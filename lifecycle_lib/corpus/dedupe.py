"""Duplicates of a corpus: found exactly, found nearly, and the choice of which copy stays.

Order of the layers: boilerplate lines, exact copies, near copies. The first two are hygiene; a similarity threshold
with a keep-rule is a choice of what the model sees, so every removal names the row that stands for it and its
similarity, and `removal_diff` shows the smallest slices first (Lee et al. 2022 show the gain; the diff shows the cost).

Near pairs come from MinHash bands (corpus/minhash) and are then compared as true shingle sets: precision is 1 at the
threshold, recall is the S-curve. Clusters are the transitive closure of pairs, so two rows of a cluster can lie below
the threshold. For a million rows see corpus/near_index. Left out: embeddings, suffix arrays for repeated substrings.
"""

import hashlib
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableSequence, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from lifecycle_lib.core.seeds import rng
from lifecycle_lib.corpus.minhash import (
    MinHash,
    band_keys,
    bands_for,
    bucket_pairs,
    buckets,
    jaccard,
    shingles,
    sieve,
)

RULES = ("first", "shortest", "longest", "random", "medoid", "hardest")
HEADERS = ("from", "to", "cc", "date", "sent", "subject", "message-id", "reply-to")
COMMENTS = {"python": "#", "sql": "--", "c": "//"}
_WORD = re.compile(r"[$€£]?\d+(?:[.,]\d+)*%?\w*|\w+")
_HEADER = re.compile(rf"(?:{'|'.join(HEADERS)})\s*:", re.IGNORECASE)
_SENTENCE = re.compile(r"(?<=[.!?])\s+")

Pair = tuple[int, int, float]


def normalise(text: str) -> str:
    """The words of `text`, lower case, one space between: the key of exact copies and the text of word shingles.

    Case, spacing and punctuation go. Digits stay, with their decimal point, currency and percent sign: without them
    "refund in 14 days" and "refund in 30 days", or "$5" and "5%", would be one policy. So would they under a
    normalisation that drops stop words ("not"), or NFKC ("10²" becomes "102"); this one composes accents only (NFC).
    It still merges what differs only in signs: "C++" and "C", "-5" and "5"."""
    return " ".join(_WORD.findall(unicodedata.normalize("NFC", text).casefold()))


def bare_words(text: str) -> str:
    """The looser key many corpora report: lower-case runs of letters and digits, every sign gone. It merges
    "an extra €1 charge" with "an extra £1 charge" (two rows of BANKING77), and "1.5" with "1 5"."""
    return " ".join(re.findall(r"\w+", text.lower()))


def strip_header(text: str) -> str:
    """`text` without the mail header lines it starts with (From:, Date:, Subject: ..., see HEADERS)."""
    lines = text.split("\n")
    while lines and (_HEADER.match(lines[0]) or not lines[0].strip()):
        lines.pop(0)
    return "\n".join(lines)


def normalise_code(source: str, language: str) -> str:
    """Source text without comments, blank lines and layout; strings, names and numbers stay as they are.

    Raises ValueError for a language not in COMMENTS. Renamed variables are not seen through."""
    if language not in COMMENTS:
        raise ValueError(f"language {language!r} has no comment rule; use one of {', '.join(COMMENTS)}")
    mark = re.escape(COMMENTS[language])
    token = re.compile(rf"""("(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')|/\*.*?\*/|{mark}[^\n]*""", re.DOTALL)
    return " ".join(token.sub(lambda m: m.group(1) or " ", source).split())


def boilerplate(texts: Iterable[str], min_documents: int, unit: str = "line") -> set[str]:
    """The lines (or sentences), normalised, that stand in `min_documents` texts or more."""
    counts = Counter(piece for text in texts for piece in {normalise(p) for p in _pieces(text, unit)} if piece)
    return {piece for piece, n in counts.items() if n >= min_documents}


def strip_boilerplate(text: str, repeated: set[str], unit: str = "line") -> str:
    """`text` without the lines (or sentences) in `repeated`. What is left can be empty: all of it repeated."""
    kept = [p for p in _pieces(text, unit) if normalise(p) not in repeated]
    return ("\n" if unit == "line" else " ").join(kept)


def _pieces(text: str, unit: str) -> list[str]:
    if unit not in ("line", "sentence"):
        raise ValueError(f"unit {unit!r}: boilerplate goes by 'line' or 'sentence'")
    return text.split("\n") if unit == "line" else _SENTENCE.split(text)


def exact_clusters(texts: Iterable[str], key: Callable[[str], str] = normalise) -> list[list[int]]:
    """Rows whose `key` is the same (key=str: the same text), clusters of 2 and more, in order of their first row."""
    groups: dict[bytes, list[int]] = defaultdict(list)
    for i, text in enumerate(texts):
        groups[hashlib.blake2b(key(text).encode("utf-8", "surrogatepass"), digest_size=16).digest()].append(i)
    return [rows for rows in groups.values() if len(rows) > 1]


def near_pairs(texts: Sequence[str], threshold: float, k: int = 5, unit: str = "word", *, permutations: int = 128,
               recall: float = 0.999, seed: int = 0) -> list[Pair]:
    """All (i, j, Jaccard), i < j, with Jaccard of k-shingles >= threshold that share a band, sorted.

    The texts are taken as they are: give normalised ones to look past case and punctuation. The Jaccard is exact;
    a pair right at the threshold is missed with chance 1 - recall at most. Every pair comes out, so n equal rows are
    n (n - 1) / 2 pairs: near_index is for corpora where that hurts."""
    rows_of: dict[str, list[int]] = defaultdict(list)
    for i, text in enumerate(texts):
        rows_of[text].append(i)
    distinct, copies = list(rows_of), list(rows_of.values())
    bands, rows = bands_for(threshold, permutations, recall)
    signatures = MinHash(permutations=permutations, k=k, unit=unit, seed=seed).signatures(distinct)
    buckets_of = [bucket_pairs(*buckets(keys)) for keys in band_keys(signatures, bands, rows)]
    found = [batch @ (len(distinct), 1) for batches in buckets_of for batch in batches]
    candidates = np.stack(divmod(np.unique(np.concatenate(found or [np.empty(0, np.int64)])), len(distinct) or 1), 1)
    pairs = [(i, j, 1.0) for same in copies for n, i in enumerate(same) for j in same[n + 1:]]
    for a, b, j in verified(distinct, sieve(signatures, candidates, threshold).tolist(), threshold, k, unit):
        pairs += [(min(x, y), max(x, y), j) for x in copies[a] for y in copies[b]]
    return sorted(pairs)


def verified(texts: Sequence[str], pairs: Iterable[Sequence[int]], threshold: float, k: int, unit: str
             ) -> Iterator[Pair]:
    """Those of `pairs` (i, j) whose Jaccard reaches the threshold, compared as sets of strings: no hash can let a
    false pair through."""
    shingled = lru_cache(256)(lambda i: shingles(texts[i], k, unit))
    for i, j in pairs:
        value = jaccard(shingled(i), shingled(j))
        if value >= threshold:
            yield i, j, value


def pairs_by_domain(pairs: Iterable[Pair], domains: Sequence[str], thresholds: Mapping[str, float]) -> list[Pair]:
    """The pairs that reach the threshold of their domain; across two domains, the higher one. A threshold above 1
    leaves a domain alone. `pairs` must have been found at the lowest threshold. Raises ValueError for a domain
    without a threshold."""
    if missing := sorted(set(domains) - set(thresholds)):
        raise ValueError(f"domain {missing[0]!r} has no threshold; add it (there are {', '.join(sorted(thresholds))})")
    return [p for p in pairs if p[2] >= max(thresholds[domains[p[0]]], thresholds[domains[p[1]]])]


def join(parent: MutableSequence[int], i: int, j: int) -> bool:
    """Unite the sets of i and j; the lower root stays. False if they were one already. Union-find (Tarjan 1975) with
    path halving: `parent` starts as 0 .. n-1."""
    while parent[i] != i:
        parent[i] = parent[parent[i]]
        i = parent[i]
    while parent[j] != j:
        parent[j] = parent[parent[j]]
        j = parent[j]
    parent[max(i, j)] = min(i, j)
    return i != j


def clusters_of(n: int, pairs: Iterable[Sequence]) -> list[list[int]]:
    """Connected rows of 0 .. n-1, clusters of 2 and more, in order of their first row. Pairs start with (i, j)."""
    parent = list(range(n))
    for i, j, *_ in pairs:
        join(parent, i, j)
    groups = defaultdict(list)
    for i in range(n):  # a root is the lowest row of its cluster, so parents come before their children
        parent[i] = parent[parent[i]]
        groups[parent[i]].append(i)
    return [rows for rows in groups.values() if len(rows) > 1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Removed:
    """A removed row, the kept row of its cluster most like it, and their Jaccard."""

    row: int
    representative: int
    jaccard: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """`kept` rows in order (rows of no cluster are all kept) and the `removed` ones."""

    kept: tuple[int, ...]
    removed: tuple[Removed, ...]
    rule: str


def tail(slices: Sequence[str], smaller_than: int) -> set[int]:
    """The rows of slices with fewer than `smaller_than` rows: what `choose(protect=...)` then leaves alone."""
    counts = Counter(slices)
    return {i for i, name in enumerate(slices) if counts[name] < smaller_than}


def choose(clusters: Sequence[Sequence[int]], texts: Sequence[str], rule: str, per_cluster: int = 1,
           scores: Sequence[float] | None = None, protect: Iterable[int] | None = None, seed: int = 0, *,
           k: int = 5, unit: str = "word") -> Choice:
    """Keep `per_cluster` rows of each cluster by `rule`, and every row of `protect` besides.

    Rules: first, shortest, longest (characters), random (by seed), medoid (the row most like the rest on average),
    hardest (highest of `scores`, say the loss). Ties go to the lower row number.
    Raises ValueError for an unknown rule, per_cluster below 1, hardest without scores, a row in two clusters."""
    if rule not in RULES or per_cluster < 1:
        raise ValueError(f"rule={rule!r}, per_cluster={per_cluster}: rule is one of {', '.join(RULES)}; keep 1 or more")
    if rule == "hardest" and (scores is None or len(scores) != len(texts)):
        raise ValueError(f"rule 'hardest' needs one score a text, {len(texts)} of them; pass scores=")
    members = Counter(i for rows in clusters for i in rows)
    if members and members.most_common(1)[0][1] > 1:
        raise ValueError(f"row {members.most_common(1)[0][0]} is in two clusters; merge them with clusters_of")
    protected, removed = set(protect or ()), []
    for rows in clusters:
        sets = {i: shingles(texts[i], k, unit) for i in rows}
        if rule == "random":
            worth = dict.fromkeys(rows, 0.0) | {i: rng(seed, "choose", i).random() for i in rows}
        elif rule == "medoid":
            worth = {i: sum(jaccard(sets[i], sets[j]) for j in rows) for i in rows}
        else:
            worth = {i: {"first": -i, "shortest": -len(texts[i]), "longest": len(texts[i])}[rule]
                     if rule != "hardest" else scores[i] for i in rows}
        ranked = sorted(rows, key=lambda i: (-worth[i], i))
        kept = [i for n, i in enumerate(ranked) if n < per_cluster or i in protected]
        for i in sorted(set(rows) - set(kept)):
            j, near = max((jaccard(sets[i], sets[r]), -r) for r in kept)
            removed.append(Removed(row=i, representative=-near, jaccard=j))
    gone = {r.row for r in removed}
    return Choice(kept=tuple(i for i in range(len(texts)) if i not in gone),
                  removed=tuple(sorted(removed, key=lambda r: r.row)), rule=rule)


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceDiff:
    """What a choice did to one slice; `pairs` holds (representative row, removed row, Jaccard), least alike first."""

    slice: str
    before: int
    removed: int
    pairs: tuple[tuple[int, int, float], ...]

    @property
    def kept(self) -> int:
        return self.before - self.removed

    @property
    def lost_share(self) -> float:
        return self.removed / self.before


def removal_diff(rows: Sequence[Mapping], choice: Choice, by: str | Callable[[Mapping], str]) -> list[SliceDiff]:
    """Per slice (field `by` of a row, or a function of it) what was there and what went, smallest slices first."""
    if not rows:
        raise ValueError("removal_diff got no rows; give the rows that choose() saw")
    names = [str(by(row) if callable(by) else row[by]) for row in rows]
    pairs = defaultdict(list)
    for r in choice.removed:
        pairs[names[r.row]].append((r.representative, r.row, r.jaccard))
    return [SliceDiff(slice=name, before=n, removed=len(pairs[name]),
                      pairs=tuple(sorted(pairs[name], key=lambda p: (p[2], p[1]))))
            for name, n in sorted(Counter(names).items(), key=lambda item: (item[1], item[0]))]


def check_losses(diff: Sequence[SliceDiff], max_lost_share: float) -> list[SliceDiff]:
    """The slices that lose more than `max_lost_share` of their rows; a gate fails when there are any.

    Raises ValueError for an empty diff (no evidence) or a share outside 0 to 1."""
    if not diff:
        raise ValueError("check_losses got an empty diff; run removal_diff on the rows first")
    if not 0 <= max_lost_share <= 1:
        raise ValueError(f"max_lost_share={max_lost_share} is outside 0 to 1; 0.2 fails a slice losing over a fifth")
    return [s for s in diff if s.lost_share > max_lost_share]
