"""Evaluation items as hashes, and the lookup that finds them in a row of text. `contamination.py` does the audit.

Each part of an item (prompt, answer) becomes 64-bit hashes: of the whole part, of its n-grams of words, of its 3-word
shingles, over lower-case words without punctuation (`dedupe.bare_words`). Four screens:
- exact: all words of a part in a row, in one run;
- n-gram: one run of n words (8 is a question to look at, 13 as in Brown et al. 2020, appendix C);
- fuzzy: the share of a part's 3-word shingles in the row (containment, Broder 1997; not Jaccard, which a long document
  around a leak pulls down);
- canary: a marker string that has no business in any corpus.

Templates: a layout that many items share is no leak. An n-gram in more than `max_items` items of the set, or found in
a `background` of text known to be clean, is dropped, and how many were dropped is kept. What then has nothing left to
find is counted as unscreened, never as clean.

Left out: embeddings and translations (a rewording with other words passes), suffix arrays.
"""

import base64
import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from lifecycle_lib.corpus.dedupe import bare_words

NGRAMS = (8, 13)
SHINGLE, MIN_SHINGLES, MIN_WORDS = 3, 4, 5
BASE = 0x9E3779B97F4A7C15
INVERSE = pow(BASE, -1, 2**64)  # BASE is odd


class Words:
    """Hashes of runs of words: a run w_0 ... w_(n-1) has sum of h(w_i) BASE^(n-1-i) modulo 2^64, at any n in O(1) a
    run from one prefix sum. Two different runs agree with chance 2^-64."""

    def __init__(self, text: str) -> None:
        values = np.array([_word_hash(w) for w in bare_words(text).split()], dtype=np.uint64)
        self.n = len(values)
        self.sums = np.zeros(self.n + 1, dtype=np.uint64)
        np.cumsum(values * _powers(INVERSE, self.n), out=self.sums[1:])

    def runs(self, n: int) -> np.ndarray:
        """(words - n + 1,) uint64, one a run of n words; none where the text is shorter."""
        if n > self.n or n < 1:
            return np.zeros(0, dtype=np.uint64)
        return (self.sums[n:] - self.sums[:-n]) * _powers(BASE, self.n)[n - 1:]

    def run(self, start: int, n: int) -> int | None:
        if start + n > self.n:
            return None
        return (int(self.sums[start + n]) - int(self.sums[start])) * pow(BASE, start + n - 1, 2**64) % 2**64


@lru_cache(maxsize=1 << 17)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def _powers(base: int, n: int) -> np.ndarray:
    return _power_table(base, max(1024, 1 << (n - 1).bit_length() if n else 0))[:n]


@lru_cache(maxsize=64)
def _power_table(base: int, n: int) -> np.ndarray:
    table = np.full(n, base, dtype=np.uint64)
    table[0] = 1
    return np.cumprod(table, dtype=np.uint64)


@dataclass(slots=True, kw_only=True)
class Part:
    """The prompt or the answer of one item, as hashes. `whole` is None where other items or the background share it."""

    item: str
    part: str
    words: int
    anchor: int | None  # of the first MIN_WORDS words
    whole: int | None
    grams: dict[int, np.ndarray]  # n -> sorted distinct uint64

    def as_json(self) -> dict[str, Any]:
        packed = {str(n): base64.b64encode(g.astype("<u8").tobytes()).decode() for n, g in self.grams.items()}
        return {"item": self.item, "part": self.part, "words": self.words, "anchor": as_hex(self.anchor),
                "whole": as_hex(self.whole), "grams": packed}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "Part":
        grams = {int(n): np.frombuffer(base64.b64decode(g), dtype="<u8").astype(np.uint64)
                 for n, g in row["grams"].items()}
        return cls(item=row["item"], part=row["part"], words=row["words"], grams=grams,
                   **{k: None if row[k] is None else int(row[k], 16) for k in ("anchor", "whole")})


def as_hex(value: int | None) -> str | None:
    return None if value is None else f"{value:016x}"  # JSON readers elsewhere round integers above 2^53


@dataclass(slots=True, kw_only=True)
class EvalSet:
    """One evaluation set. `file` is relative to the registry's folder, or None for texts that live nowhere else."""

    name: str
    file: str | None
    sha256: str | None
    n_items: int
    ngrams: tuple[int, ...]
    max_items: int
    dropped: dict[str, int]  # n-grams dropped as "template" and as "background"
    parts: list[Part]
    canaries: list[tuple[int, int]] = field(default_factory=list)  # words, hash

    def unscreened(self) -> dict[str, int]:
        """Items that a screen cannot find: too short, or all of it template."""
        seen: dict[str, set] = defaultdict(set)
        for p in self.parts:
            for n in self.ngrams:
                if len(p.grams[n]):
                    seen[f"{n}-gram"].add(p.item)
            if len(p.grams[SHINGLE]) >= MIN_SHINGLES:
                seen["fuzzy"].add(p.item)
            if p.whole is not None:
                seen["exact"].add(p.item)
        return {s: self.n_items - len(seen[s]) for s in ("exact", *(f"{n}-gram" for n in self.ngrams), "fuzzy")}


def make_set(name: str, items: Sequence[Mapping[str, str]], *, ngrams: Sequence[int] = NGRAMS, max_items: int = 3,
             background: Iterable[str] = (), canaries: Sequence[str] = ()) -> EvalSet:
    """Hash `items`: {"id", then parts by name: "prompt", "answer", ...}. See the top for templates and background.

    Raises ValueError for no items, a repeated id, an n below 4, a canary under 8 characters."""
    if not items:
        raise ValueError(f"{name}: no items to register; an empty evaluation set protects nothing")
    ids = Counter(str(item["id"]) for item in items)
    if ids.most_common(1)[0][1] > 1:
        raise ValueError(f"{name}: id {ids.most_common(1)[0][0]!r} appears twice; every item needs its own")
    if not ngrams or min(ngrams) <= SHINGLE or max_items < 1:
        raise ValueError(f"{name}: ngrams={list(ngrams)}, max_items={max_items}: n must be {SHINGLE + 1} or more, "
                         "max_items 1 or more")
    if bad := [c for c in canaries if len(bare_words(c).replace(" ", "")) < 8]:
        raise ValueError(f"{name}: canary {bad[0]!r} has under 8 letters or digits; ordinary text would contain it")
    parts, sizes = [], (SHINGLE, *sorted(set(ngrams)))
    for item in items:
        for part, text in item.items():
            words = Words(text) if part != "id" else None
            if words and words.n:
                parts.append(Part(item=str(item["id"]), part=part, words=words.n, anchor=words.run(0, MIN_WORDS),
                                  whole=words.run(0, words.n), grams={n: np.unique(words.runs(n)) for n in sizes}))
    dropped = _drop_shared(parts, max_items)
    made = EvalSet(name=name, file=None, sha256=None, n_items=len(items), ngrams=sizes[1:], max_items=max_items,
                   dropped=dropped, parts=parts,
                   canaries=[(w.n, w.run(0, w.n)) for w in map(Words, canaries)])
    _drop_background(made, background)
    return made


def _drop_shared(parts: Sequence[Part], max_items: int) -> dict[str, int]:
    """Empty out of `parts` what more than `max_items` items share."""
    dropped = 0
    for n in parts[0].grams if parts else ():
        owners = Counter(g for _, g in {(p.item, g) for p in parts for g in p.grams[n].tolist()})
        shared = np.array([g for g, k in owners.items() if k > max_items], dtype=np.uint64)
        dropped += len(shared)
        for p in parts:
            p.grams[n] = np.setdiff1d(p.grams[n], shared)
    wholes = Counter(whole for _, whole in {(p.item, p.whole) for p in parts})
    for p in parts:
        if wholes[p.whole] > max_items:
            p.whole = None
    return {"template": dropped, "background": 0}


def _drop_background(made: EvalSet, background: Iterable[str]) -> None:
    screen = Screen([made])
    found: dict[int, set[int]] = {n: set() for n in (SHINGLE, *made.ngrams)}
    wholes: set[int] = set()
    for text in background:
        words = Words(text)
        for n, seen in found.items():
            seen.update(screen.known(words, n).tolist())
        wholes.update(made.parts[i].whole for i in screen.verbatim(words))
    for p in made.parts:
        p.whole = None if p.whole in wholes else p.whole
        for n, seen in found.items():
            p.grams[n] = np.setdiff1d(p.grams[n], np.array(sorted(seen), dtype=np.uint64))
    made.dropped["background"] = sum(map(len, found.values()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """A row touches a part of an item. `score`: 1 for exact and canary, else the share of its n-grams in the row."""

    set: str
    item: str
    part: str
    screen: str
    score: float


def among(values: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Which values are among the sorted keys; np.isin would sort the keys again for every row."""
    if not len(keys):
        return np.zeros(len(values), dtype=bool)
    return keys[np.minimum(np.searchsorted(keys, values), len(keys) - 1)] == values


class Screen:
    """The hashes of some evaluation sets, laid out for lookup. Memory follows the sets, not the rows."""

    def __init__(self, sets: Sequence[EvalSet]) -> None:
        self.sets = list(sets)
        self.parts = [p for s in sets for p in s.parts]
        self.set_of = [s for s in sets for _ in s.parts]
        self.keys: dict[int, np.ndarray] = {}
        self.owners: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for n in sorted({n for p in self.parts for n in p.grams}):
            sizes = [len(p.grams.get(n, ())) for p in self.parts]
            grams = np.concatenate([p.grams.get(n, np.zeros(0, dtype=np.uint64)) for p in self.parts])
            order = np.argsort(grams, kind="stable")
            self.keys[n], starts = np.unique(grams[order], return_index=True)
            self.owners[n] = (np.append(starts, len(grams)), np.repeat(np.arange(len(sizes)), sizes)[order])
        self.long: dict[int, dict[tuple[int, int], list[int]]] = defaultdict(lambda: defaultdict(list))
        self.short: dict[tuple[int, int], list[int]] = defaultdict(list)
        for i, p in enumerate(self.parts):
            if p.whole is not None and p.words >= MIN_WORDS:
                self.long[p.anchor][p.words, p.whole].append(i)
            elif p.whole is not None:
                self.short[p.words, p.whole].append(i)
        self.anchors = np.array(sorted(self.long), dtype=np.uint64)

    def known(self, words: Words, n: int) -> np.ndarray:
        """The distinct n-grams of a row that are registered."""
        runs = words.runs(n)
        return np.unique(runs[among(runs, self.keys[n])]) if n in self.keys else runs[:0]

    def verbatim(self, words: Words) -> set[int]:
        """Parts whose words stand in the row in one run; of fewer than MIN_WORDS words, only if they are the row."""
        found = set(self.short.get((words.n, words.run(0, words.n)), ()))
        runs = words.runs(MIN_WORDS)
        for start in np.flatnonzero(among(runs, self.anchors)).tolist():
            by_length = self.long[int(runs[start])]
            for length in {n for n, _ in by_length}:
                found.update(by_length.get((length, words.run(start, length)), ()))
        return found

    def match(self, text: str) -> list[Match]:
        """Everything a row shares with the sets; `audit` says which scores count."""
        words = Words(text)
        out = [self._made(i, "exact", 1.0) for i in self.verbatim(words)]
        for n in self.keys:
            starts, owners = self.owners[n]
            at = np.searchsorted(self.keys[n], self.known(words, n))
            counts = Counter(i for a in at.tolist() for i in owners[starts[a]:starts[a + 1]].tolist())
            for i, k in counts.items():
                size = len(self.parts[i].grams[n])
                if n != SHINGLE or size >= MIN_SHINGLES:
                    out.append(self._made(i, "fuzzy" if n == SHINGLE else f"{n}-gram", k / size))
        for s in self.sets:
            out += [Match(set=s.name, item=f"canary {i}", part="canary", screen="canary", score=1.0)
                    for i, (n, value) in enumerate(s.canaries) if np.isin(np.uint64(value), words.runs(n))]
        return out

    def _made(self, i: int, screen: str, score: float) -> Match:
        return Match(set=self.set_of[i].name, item=self.parts[i].item, part=self.parts[i].part, screen=screen,
                     score=score)
