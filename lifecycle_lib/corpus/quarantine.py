"""Ways out of quarantine, and what people say of a sample.

A quarantined row leaves by one of three doors, once: `release` (a reviewer takes the responsibility), `reprocess`
(repaired, and through the gate again), `red_team` (for robustness tests only: the row is marked, and every gate rejects
it from then on, since a row that was trained on tests nothing). exits.jsonl holds who, why and when; quarantine.jsonl
itself is never changed. Dates are given, not read from a clock.

Left out: queues for many reviewers, and a clock that ages them: exits.jsonl has the dates to draw it from.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lifecycle_lib.core.records import read_jsonl, write_jsonl
from lifecycle_lib.core.seeds import rng
from lifecycle_lib.corpus.decisions import stream
from lifecycle_lib.corpus.filters import NEVER_KEPT
from lifecycle_lib.corpus.manifest import read_manifest
from lifecycle_lib.corpus.rows import add_transformation, assign, captured

EXITS = ("release", "reprocess", "red_team")


def send(folder: str | Path, ids: Sequence[str], door: str, *, reviewer: str, why: str, on: str) -> int:
    """Note in exits.jsonl that these quarantined rows leave by `door`; how many have left so far.

    Raises ValueError, and notes nothing, for an unknown door or id, a row that has left already, no reviewer, no
    reason, a date that is none, and a release of a row without licence or source: reprocess it with the licence found.
    """
    folder = Path(folder)
    if door not in EXITS or not reviewer.strip() or not why.strip() or not captured({"captured": on}):
        raise ValueError(f"door={door!r}, reviewer={reviewer!r}, why={why!r}, on={on!r}: give one of "
                         f"{', '.join(EXITS)}, a name, a reason and a date YYYY-MM-DD")
    read_manifest(folder)
    left = exits(folder)
    wanted = set(ids)
    reasons = {d["id"]: [h["reason"] for h in d["details"]] for d in stream(folder / "decisions.jsonl")
               if d["verdict"] == "quarantine" and d["id"] in wanted}
    for row_id in ids:
        if row_id not in reasons:
            raise ValueError(f"{folder}: row {row_id!r} is not in quarantine; ids are in quarantine.jsonl")
        if row_id in left or ids.count(row_id) > 1:
            raise ValueError(f"{folder}: row {row_id!r} leaves twice; each row has one role")
        if door == "release" and set(reasons[row_id]) & set(NEVER_KEPT):
            raise ValueError(f"{folder}: row {row_id!r} cannot be released ({', '.join(reasons[row_id])}); reprocess "
                             "it with the licence and source that were found, or leave it")
    notes = [{"id": i, "door": door, "reviewer": reviewer, "why": why, "on": on} for i in ids]
    write_jsonl(folder / "exits.jsonl", [*left.values(), *notes])
    return len(left) + len(notes)


def exits(folder: str | Path) -> dict[str, dict[str, Any]]:
    """What was noted so far, by id; empty when nothing has left."""
    path = Path(folder) / "exits.jsonl"
    if not path.exists():
        return {}
    return {row["id"]: row for row in read_jsonl(path, {"id": str, "door": str, "reviewer": str, "on": str},
                                                 allow_empty=True)}


def leaving(folder: str | Path, door: str, repair: Mapping[str, str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows that leave by `door`, logged, ready to be written: released ones for training, reprocess ones as the
    gate's next input (`repair`: fields to set, say {"licence": "CC0-1.0"}), red_team ones with role "red-team"."""
    if door not in EXITS or (repair and door != "reprocess"):
        raise ValueError(f"door={door!r}: give one of {', '.join(EXITS)}; only reprocess takes repairs")
    read_manifest(folder)
    notes = exits(folder)
    for row in stream(Path(folder) / "quarantine.jsonl"):
        note = notes.get(row["id"])
        if note and note["door"] == door:
            if door == "red_team":
                row = assign(row, "role", "red-team")
            for name, value in (repair or {}).items():
                row = assign(row, name, value)
            yield add_transformation(row, door, reviewer=note["reviewer"], why=note["why"], on=note["on"])


def sample(folder: str | Path, n: int, seed: int, of: str = "kept") -> list[dict[str, Any]]:
    """`n` random rows of kept.jsonl (or quarantine.jsonl) for people to look at, by one pass (reservoir sampling,
    Vitter 1985). Raises ValueError for n below 1 or a file without rows."""
    if n < 1 or of not in ("kept", "quarantine"):
        raise ValueError(f"n={n}, of={of!r}: give 1 or more rows of 'kept' or 'quarantine'")
    read_manifest(folder)
    random, drawn = rng(seed, "review", of), []
    for i, row in enumerate(stream(Path(folder) / f"{of}.jsonl")):
        if i < n:
            drawn.append(row)
        elif (j := random.randrange(i + 1)) < n:
            drawn[j] = row
    if not drawn:
        raise ValueError(f"{folder}: {of}.jsonl has no rows to sample; there is nothing to review")
    return drawn


def kappa(a: Sequence[Any], b: Sequence[Any]) -> tuple[float, float, float]:
    """Cohen's kappa (1960) of two reviewers' labels of the same rows, with its large-sample 95 % interval:
    (agreement - chance) / (1 - chance). Raises ValueError for unequal lengths, fewer than 2 rows, or if both gave
    every row the same label: then chance explains all, and kappa has no value."""
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"{len(a)} and {len(b)} labels: give two labels each for at least 2 rows")
    n = len(a)
    agree = sum(x == y for x, y in zip(a, b)) / n
    share = {k: (sum(x == k for x in a) / n, sum(y == k for y in b) / n) for k in {*a, *b}}
    chance = sum(p * q for p, q in share.values())
    if chance == 1:
        raise ValueError(f"both reviewers gave all {n} rows the label {a[0]!r}: review rows of more than one kind")
    value = (agree - chance) / (1 - chance)
    # variance: Fleiss, Cohen & Everitt (1969)
    same = sum(sum(x == k and y == k for x, y in zip(a, b)) / n * (1 - (p + q) * (1 - value)) ** 2
               for k, (p, q) in share.items())
    cross = sum((share[x][1] + share[y][0]) ** 2 for x, y in zip(a, b) if x != y) / n * (1 - value) ** 2
    variance = (same + cross - (value - chance * (1 - value)) ** 2) / (n * (1 - chance) ** 2)
    half = 1.959963985 * math.sqrt(max(0.0, variance))
    return value, value - half, value + half
