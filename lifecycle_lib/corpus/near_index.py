"""Near-duplicate clusters of a million rows in bounded memory.

One pass computes MinHash signatures block by block. Band keys go to disk, band after band; one byte of each minimum
stays in memory. Then one band is read at a time: its keys are sorted, rows with equal keys are candidates, the bytes
sieve out those far below the threshold, and what is left is compared exactly and joined by union-find over one array.
Memory is one byte a row and minimum, about 60 bytes a row more, and one block; the disk holds 8 bytes a row and band.
Texts are fetched by row when a pair is compared, so they may stay in a file (`JsonlTexts`).

Differs from dedupe.near_pairs: exact copies are joined first and enter once; pairs already joined are not compared, so
the result is a spanning forest of verified edges and not every pair; in a bucket a row meets the next `window` rows
only, and how often that cut in is counted. Left out: more than one machine (bands are independent: shard by them).
"""

import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lifecycle_lib.core.progress import bar
from lifecycle_lib.corpus.dedupe import join, verified
from lifecycle_lib.corpus.minhash import MinHash, band_keys, bands_for, bucket_pairs, buckets, sieve

BLOCK_CHARACTERS = 1 << 21
REMEMBERED_PAIRS = 1 << 18  # not compared again; about 150 bytes each


class JsonlTexts(Sequence):
    """The field "text" of the rows of a JSONL file, read from disk when asked for: 8 bytes of memory a row."""

    def __init__(self, path: str | Path) -> None:
        self.path = path
        self.file = open(path, "rb")
        ends = np.cumsum(np.fromiter(map(len, self.file), np.int64))
        self.starts = np.concatenate(([0], ends[:-1]))

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: int) -> str:
        self.file.seek(self.starts[i])
        return self._text(self.file.readline(), i)

    def __iter__(self) -> Iterator[str]:
        with open(self.path, "rb") as file:
            for i, line in enumerate(file):
                yield self._text(line, i)

    def _text(self, line: bytes, i: int) -> str:
        try:
            text = json.loads(str(line, "utf-8"))["text"]
        except (ValueError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise ValueError(f"{self.path}:{i + 1}: no field \"text\" with a string; run the gate on the file first")
        return text


@dataclass(frozen=True, slots=True, kw_only=True)
class NearClusters:
    """`labels` int64 (N,): the lowest row of each row's cluster. `edges` (E, 2) with exact `jaccards` (E,) join them:
    a forest, every edge at the threshold or above. `candidates`: pairs of a band that were not in one cluster yet;
    `compared`: those left by the sieve, compared exactly.
    `beyond_window`: how often a row of a band had more rows after it in its bucket than `window`."""

    labels: np.ndarray
    edges: np.ndarray
    jaccards: np.ndarray
    candidates: int
    compared: int
    beyond_window: int

    def clusters(self) -> list[list[int]]:
        """The clusters of 2 and more, in order of their first row."""
        order = np.argsort(self.labels, kind="stable")
        starts = np.flatnonzero(np.diff(self.labels[order], prepend=-1))
        return [part.tolist() for part in np.split(order, starts[1:]) if len(part) > 1]


def near_clusters(texts: Sequence[str], threshold: float, minhash: MinHash | None = None, *, recall: float = 0.999,
                  window: int = 100, folder: str | Path | None = None) -> NearClusters:
    """Clusters of rows linked by exact k-shingle Jaccard >= threshold. `folder`: where the band keys lie (a
    temporary file without a name). Raises ValueError for no texts or a threshold out of reach (see bands_for)."""
    n, minhash = len(texts), minhash or MinHash()
    if not n:
        raise ValueError("near_clusters got no texts; an empty corpus has no duplicates to count")
    bands, rows = bands_for(threshold, minhash.permutations, recall)
    minhash = replace(minhash, permutations=bands * rows)
    parent, edges, seen = np.arange(n), [], set()
    candidates = compared = beyond = 0
    with tempfile.TemporaryFile(dir=folder) as file, bar("near duplicates", n * (1 + bands)) as progress:
        digests, minima, start = np.empty(n, np.uint64), np.empty((n, bands * rows), np.uint8), 0
        for block in _blocks(texts):
            digests[start:start + len(block)] = [_digest(text) for text in block]
            signatures = minhash.signatures(block)
            minima[start:start + len(block)] = signatures & 255
            for band, keys in enumerate(band_keys(signatures, bands, rows)):
                file.seek((band * n + start) * 8)
                file.write(keys)
            start += len(block)
            progress.update(len(block))
        file.flush()
        # Exact copies: one link from each to the next is enough, then the first stands for all.
        for pairs in bucket_pairs(*buckets(digests), window=1):
            edges += [(i, j, 1.0) for i, j in pairs.tolist() if texts[i] == texts[j] and join(parent, i, j)]
        distinct = np.flatnonzero(parent == np.arange(n))
        for band in range(bands):
            file.seek(band * n * 8)
            keys, order = buckets(np.fromfile(file, np.uint64, n)[distinct])
            beyond += int((keys[window + 1:] == keys[:-window - 1]).sum())
            for batch in bucket_pairs(keys, distinct[order], window):
                pairs = batch[_roots(parent, batch[:, 0]) != _roots(parent, batch[:, 1])]
                candidates += len(pairs)
                likely = [p for p in map(tuple, sieve(minima, pairs, threshold).tolist()) if p not in seen]
                compared += len(likely)
                if len(seen) > REMEMBERED_PAIRS:
                    seen.clear()
                seen.update(likely)
                for i, j, value in verified(texts, likely, threshold, minhash.k, minhash.unit):
                    if join(parent, i, j):
                        edges.append((i, j, value))
            progress.update(n)
    return NearClusters(labels=_roots(parent, np.arange(n)), edges=np.array([e[:2] for e in edges]).reshape(-1, 2),
                        jaccards=np.array([e[2] for e in edges]), candidates=candidates, compared=compared,
                        beyond_window=beyond)


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def _blocks(texts: Sequence[str]) -> Iterator[list[str]]:
    block, characters = [], 0
    for text in texts:
        block.append(text)
        characters += len(text)
        if characters >= BLOCK_CHARACTERS:
            yield block
            block, characters = [], 0
    if block:
        yield block


def _roots(parent: np.ndarray, rows: np.ndarray) -> np.ndarray:
    while not np.array_equal(above := parent[rows], rows):
        rows = above
    return rows
