"""What the model reads, as a versioned object: sampling levers, a lock file, a log of what was drawn, and drift.

The levers, in the order they apply to the groups of a corpus (by source, domain, dialect ...):

1. natural shares: rows or tokens of each group over the total (`unit`), or `weights` given in their place;
2. temperature alpha: share_i ~ share_i ** alpha. 1 leaves them, 0 makes them equal (Conneau & Lample 2019, section 3.1,
   where alpha 0.5 lifts rare languages);
3. caps: no group above its cap; what is cut goes to the uncapped groups in proportion (water-filling);
4. phases: other weights from a point of training on, abrupt or over a ramp (a curriculum).

Population stability index, sum (q - p) ln(q / p), is the symmetrised Kullback-Leibler divergence of two compositions;
the habit of credit scoring calls 0.1 worth a look and 0.25 a shift. Groups in one composition alone count with a floor.

Left out: weights learnt from a proxy model (DoReMi, Xie et al. 2023), deduplication and filters (they come before).
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from lifecycle_lib.core.fingerprints import fingerprint
from lifecycle_lib.core.records import read_json, write_json
from lifecycle_lib.core.seeds import derive_seed

Rows = Sequence[Mapping]
PSI_FLOOR = 1e-4
FORMAT = "lifecycle-mixture-1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """From `start` (share of training, 0 to 1) on, these weights; reached over `ramp` of training, 0 is a jump."""

    start: float
    weights: Mapping[str, float]
    ramp: float = 0.0

    def __post_init__(self) -> None:
        if not (0 < self.start < 1 and 0 <= self.ramp <= 1 - self.start):
            raise ValueError(f"phase start={self.start}, ramp={self.ramp}: start must lie between 0 and 1, "
                             "and start + ramp must not pass 1")
        _check_weights(self.weights, "phase weights")


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureSpec:
    """The levers. `group` is the field rows are grouped by; `unit` "row" counts documents, "token" their length.

    With "token" a draw picks rows in proportion to their length, so short texts do not dominate."""

    group: str = "source"
    unit: str = "row"
    weights: Mapping[str, float] | None = None
    temperature: float = 1.0
    caps: Mapping[str, float] = field(default_factory=dict)
    phases: tuple[Phase, ...] = ()

    def __post_init__(self) -> None:
        if self.unit not in ("row", "token"):
            raise ValueError(f"unit={self.unit!r}: use 'row' or 'token'")
        if not 0 <= self.temperature <= 1:
            raise ValueError(f"temperature={self.temperature}: use 0 (all groups equal) to 1 (natural shares)")
        for name, cap in self.caps.items():
            if not 0 < cap <= 1:
                raise ValueError(f"cap of {name!r} is {cap}: a share above 0 and at most 1")
        if self.weights is not None:
            _check_weights(self.weights, "weights")
        starts = [p.start for p in self.phases]
        if any(b.start < a.start + a.ramp for a, b in zip(self.phases, self.phases[1:])):
            raise ValueError(f"phases start at {starts}: each must begin after the one before has ended its ramp")


def _check_weights(weights: Mapping[str, float], what: str) -> None:
    bad = {k: w for k, w in weights.items() if not (math.isfinite(w) and w >= 0)}
    if bad or not sum(weights.values()) > 0:
        raise ValueError(f"{what} {bad or dict(weights)}: give numbers of 0 or more, at least one above 0")


def tokens_of(row: Mapping) -> int:
    """Length of a row in words: enough to weigh texts by. Pass another counter where it matters."""
    return max(1, len(row["text"].split()))


def counts(rows: Rows, spec: MixtureSpec, length: Callable[[Mapping], int] = tokens_of) -> dict[str, float]:
    """Rows or tokens of each group, in order of first appearance. ValueError for no rows, or one without the field."""
    if not rows:
        raise ValueError("no rows to mix; a mixture of nothing is no corpus")
    out: dict[str, float] = {}
    for i, row in enumerate(rows):
        name = row.get(spec.group)
        if not isinstance(name, str):
            raise ValueError(f"row {i} ({row.get('id')}): field {spec.group!r} is {name!r}; every row needs one to be "
                             "grouped by")
        out[name] = out.get(name, 0) + (length(row) if spec.unit == "token" else 1)
    return out


def shares(sizes: Mapping[str, float], spec: MixtureSpec, progress: float = 0.0) -> dict[str, float]:
    """Sampling share of each group at `progress` of training (0 to 1); they sum to 1.

    counts 900, 90, 10 at temperature 0.5: sqrt gives 30, 9.487, 3.162, so .703, .222, .074. Raises ValueError for a
    weight or cap of a group that is not there, and for caps that leave no room (they sum to less than 1)."""
    if not 0 <= progress <= 1:
        raise ValueError(f"progress={progress}: a share of training, 0 to 1")
    now = _levers(sizes, spec, spec.weights)
    for phase in spec.phases:
        if progress < phase.start:
            break
        then = _levers(sizes, spec, phase.weights)
        mix = 1.0 if phase.ramp == 0 else min(1.0, (progress - phase.start) / phase.ramp)
        now = {k: (1 - mix) * now[k] + mix * then[k] for k in sizes}
    return now


def _levers(sizes: Mapping[str, float], spec: MixtureSpec, weights: Mapping[str, float] | None) -> dict[str, float]:
    for what, given in (("weight", weights or {}), ("cap", spec.caps)):
        if unknown := sorted(set(given) - set(sizes)):
            raise ValueError(f"{what} of {unknown[0]!r}: no such {spec.group}; the corpus has {', '.join(sizes)}")
    raw = {k: weights.get(k, 0.0) for k in sizes} if weights is not None else dict(sizes)
    total = sum(raw.values())
    powered = {k: (v / total) ** spec.temperature if v > 0 else 0.0 for k, v in raw.items()}
    total = sum(powered.values())
    return cap_shares({k: v / total for k, v in powered.items()}, spec.caps)


def cap_shares(given: Mapping[str, float], caps: Mapping[str, float]) -> dict[str, float]:
    """`given` shares with none above its cap, the excess spread over the uncapped groups in proportion."""
    out, fixed = dict(given), {}
    while over := {k: caps[k] for k, v in out.items() if k in caps and k not in fixed and v > caps[k] + 1e-12}:
        fixed |= over
        free = {k: given[k] for k in given if k not in fixed}
        room, total = 1 - sum(fixed.values()), sum(free.values())
        if room < -1e-12 or (total == 0 and room > 1e-12):
            raise ValueError(f"caps {dict(caps)} leave {room:.3f} of the mixture to no group; raise one of them")
        out = fixed | {k: v / total * room if total else 0.0 for k, v in free.items()}
    return {k: out[k] for k in given}


def row_weights(rows: Rows, spec: MixtureSpec, progress: float = 0.0,
                length: Callable[[Mapping], int] = tokens_of) -> np.ndarray:
    """Probability of drawing each row. (N,), sums to 1; inside a group rows are equal, or weighed by length."""
    share = shares(sizes := counts(rows, spec, length), spec, progress)
    size = np.array([length(r) if spec.unit == "token" else 1 for r in rows], dtype=float)
    return np.array([share[r[spec.group]] / sizes[r[spec.group]] for r in rows]) * size


def draw(rows: Rows, spec: MixtureSpec, n: int, seed: int, blocks: int = 1) -> tuple[np.ndarray, list[dict]]:
    """(row indices (n,), log): draws with replacement in `blocks` equal parts of training, each at its own progress.

    The log has a row a block: its progress, the shares asked for, and how often each group was drawn."""
    if not 1 <= blocks <= n:
        raise ValueError(f"blocks={blocks} of n={n} draws: use 1 to {n}")
    names = [r[spec.group] for r in rows]
    picked, log, sizes = [], [], counts(rows, spec)
    for block, part in enumerate(np.array_split(np.arange(n), blocks)):
        progress = block / blocks
        random = np.random.default_rng(derive_seed(seed, "mixture", block))
        pick = random.choice(len(rows), len(part), p=row_weights(rows, spec, progress))
        picked.append(pick)
        drawn = {k: 0 for k in sizes}
        for i in pick:
            drawn[names[i]] += 1
        log.append({"block": block, "progress": progress, "shares": shares(sizes, spec, progress), "drawn": drawn})
    return np.concatenate(picked), log


def psi(expected: Mapping[str, float], actual: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """Population stability index of two compositions (counts or shares) and each group's part of it, largest first."""
    if not sum(expected.values()) > 0 or not sum(actual.values()) > 0:
        raise ValueError("a composition is empty; drift against nothing is not 0")
    parts = {}
    for k in dict.fromkeys([*expected, *actual]):
        p, q = (max(c.get(k, 0) / sum(c.values()), PSI_FLOOR) for c in (expected, actual))
        parts[k] = (q - p) * math.log(q / p)
    return sum(parts.values()), dict(sorted(parts.items(), key=lambda kv: -kv[1]))


def sheet(rows: Rows, group: str = "source") -> list[dict]:
    """One row a group: rows, tokens, bytes, share of exact repeats, licences. What a weight multiplies."""
    parts: dict[str, list[Mapping]] = {}
    for row in rows:
        parts.setdefault(row[group], []).append(row)
    return [{group: name, "rows": len(part), "tokens": sum(map(tokens_of, part)),
             "bytes": sum(len(r["text"].encode()) for r in part),
             "repeats": 1 - len({r["text"] for r in part}) / len(part),
             "licences": sorted({str(r.get("licence")) for r in part})} for name, part in parts.items()]


def group_hash(rows: Rows) -> str:
    """SHA-256 over ids and texts, whatever their order: the same rows give the same sum."""
    each = sorted(hashlib.sha256(json.dumps([r["id"], r["text"]]).encode()).hexdigest() for r in rows)
    return hashlib.sha256("".join(each).encode()).hexdigest()


def make_lock(rows: Rows, spec: MixtureSpec, seed: int, holdout: Rows, made_with: Mapping[str, str]) -> dict:
    """What determines the mixture: levers, seed, the content of every group, the held-out rows, and `made_with` (names
    and versions of what shaped the rows, such as {"dedupe": "word-5 @ .8", "filters": "1.2.0"}).

    Raises ValueError when a held-out id or text stands among the rows."""
    ids, texts = {r["id"] for r in holdout}, {r["text"] for r in holdout}
    if leak := next((r["id"] for r in rows if r["id"] in ids or r["text"] in texts), None):
        raise ValueError(f"row {leak!r} stands in the mixture and in the held-out rows; remove it from one of them")
    groups = {name: [r for r in rows if r[spec.group] == name] for name in counts(rows, spec)}
    lock = {"format": FORMAT, "spec": asdict(spec) | {"phases": [asdict(p) for p in spec.phases]}, "seed": seed,
            "groups": {k: {"rows": len(v), "sha256": group_hash(v)} for k, v in groups.items()},
            "shares": shares(counts(rows, spec), spec),
            "holdout": {"rows": len(holdout), "sha256": group_hash(holdout)},
            "made_with": dict(made_with)}
    return lock | {"fingerprint": fingerprint(lock)}


def write_lock(path: str | Path, lock: Mapping) -> None:
    """Write mixture.lock.json atomically."""
    write_json(path, lock)


def read_lock(path: str | Path) -> dict:
    """A lock file whose fingerprint is that of its content, else ValueError."""
    lock = read_json(path)
    if not isinstance(lock, dict) or lock.get("format") != FORMAT:
        raise ValueError(f"{path}: not a mixture lock ({FORMAT}); write one with make_lock")
    if fingerprint({k: v for k, v in lock.items() if k != "fingerprint"}) != lock.get("fingerprint"):
        raise ValueError(f"{path}: changed since it was written; make the lock again from its rows")
    return lock


def moved(old: Mapping, new: Mapping) -> list[str]:
    """What two locks say differently, one line each, the cause before its consequence; [] when nothing moved."""
    said = []
    for name in dict.fromkeys([*old["groups"], *new["groups"]]):
        a, b = old["groups"].get(name), new["groups"].get(name)
        if a is None or b is None:
            said.append(f"group {name}: {'appeared' if a is None else 'disappeared'} ({(a or b)['rows']} rows)")
        elif a != b:
            said.append(f"group {name}: content changed, {a['rows']} -> {b['rows']} rows")
    for key in dict.fromkeys([*old["made_with"], *new["made_with"]]):
        if (a := old["made_with"].get(key)) != (b := new["made_with"].get(key)):
            said.append(f"{key}: {a} -> {b}")
    levers = ((k, old["spec"][k], new["spec"][k]) for k in old["spec"])
    said += [f"lever {k}: {a} -> {b}" for k, a, b in levers if a != b]
    if old["seed"] != new["seed"]:
        said.append(f"seed: {old['seed']} -> {new['seed']}")
    if old["holdout"] != new["holdout"]:
        said.append("held-out rows: changed; scores before and after do not compare")
    return said
