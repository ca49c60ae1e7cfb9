"""A gate's manifest: counts that must add up, sums of the files, and a hash over both.

`check_accounting` is run by the gate before any result is moved into place. It does not trust the gate: the input's
lines are counted from the newlines of its bytes, the results' from the files as they are on the disk.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lifecycle_lib.core.fingerprints import canonical_json
from lifecycle_lib.core.records import read_json
from lifecycle_lib.corpus.filters import VERDICTS

KEPT = ("admit", "accept_with_risk")
FIELDS = ("source", "domain", "slice", "licence")  # counted in the manifest, copied into the decisions
MAX_NAMES = 10_000  # of a field, counted one by one


class Tally:
    """Counts by verdict, reason, and verdict within source, domain, slice, licence."""

    def __init__(self) -> None:
        self.verdict, self.reason, self.lost, self.bytes_kept = Counter(), Counter(), 0, 0
        self.by: dict[str, dict[str, Counter]] = {f: {} for f in FIELDS}

    def add(self, decision: Mapping[str, Any]) -> None:
        """Count one line of decisions.jsonl."""
        verdict = decision["verdict"]
        self.verdict[verdict] += 1
        self.reason[decision["reason"]] += 1
        self.lost += is_lost(decision)
        self.bytes_kept += decision["text_bytes"] if verdict in KEPT else 0
        for f, names in self.by.items():
            name = decision[f] if decision[f] in names or len(names) < MAX_NAMES else "(others)"
            names.setdefault(name, Counter())[verdict] += 1

    def facts(self) -> dict[str, Any]:
        counts = {"lines": sum(self.verdict.values()), "kept": sum(self.verdict[v] for v in KEPT), "lost": self.lost,
                  "bytes_kept": self.bytes_kept, "verdict": {v: self.verdict[v] for v in VERDICTS},
                  "reason": dict(sorted(self.reason.items()))}
        return {"counts": counts, "by": {f: {name: {v: c[v] for v in VERDICTS} for name, c in sorted(names.items())}
                                         for f, names in self.by.items()}}


def is_lost(decision: Mapping[str, Any]) -> bool:
    """Was this line lost, that is, could no row be made of it? A blank line loses nothing."""
    return decision["stage"] == "read" and decision["reason"] != "blank_line"


def check_accounting(manifest: Mapping[str, Any]) -> None:
    """Raise ValueError unless every input line is accounted for once: in the counts, and in the files as they are on
    the disk. `input.lines` is counted from the bytes, apart from the reader."""
    counts, files = manifest["counts"], {name: f["lines"] for name, f in manifest["files"].items()}
    verdict, lines = counts["verdict"], manifest["input"]["lines"]
    kept = sum(verdict[v] for v in KEPT)
    pairs = [("verdicts", sum(verdict.values()), lines), ("reasons", sum(counts["reason"].values()), lines),
             ("counted lines", counts["lines"], lines), ("decisions.jsonl", files["decisions.jsonl"], lines),
             ("kept.jsonl", files["kept.jsonl"], kept), ("counted kept rows", counts["kept"], kept),
             ("quarantine.jsonl", files["quarantine.jsonl"], verdict["quarantine"])]
    for f, names in manifest["by"].items():
        pairs += [(f"{v} by {f}", sum(c[v] for c in names.values()), verdict[v]) for v in VERDICTS]
    for what, got, wanted in pairs:
        if got != wanted:
            raise ValueError(f"the gate does not add up: {what} say {got:,} where {wanted:,} were expected; this is a "
                             "fault of the gate, no result was written")


def manifest_hash(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest without its own hash."""
    return hashlib.sha256(canonical_json({k: v for k, v in manifest.items() if k != "hash"}).encode()).hexdigest()


def read_manifest(folder: str | Path, files: bool = True) -> dict[str, Any]:
    """The manifest of a gate's folder, its hash checked, and (with `files`) the sums of the files it speaks of.

    Raises ValueError if there is no finished result, or one that was changed afterwards."""
    path = Path(folder) / "manifest.json"
    if not path.is_file():
        raise ValueError(f"{folder}: no manifest.json, so no finished gate run; make one with: lifecycle data gate "
                         f"FILE --out {folder}")
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("hash") != manifest_hash(manifest) or "counts" not in manifest:
        raise ValueError(f"{path}: is no gate's manifest, or was changed after it was written; run the gate again")
    for name, facts in manifest["files"].items() if files else ():
        if not (path.parent / name).is_file() or facts_of(path.parent / name) != facts:
            raise ValueError(f"{path.parent / name}: missing, or changed after the gate wrote it; run the gate again")
    return manifest


def facts_of(path: Path) -> dict[str, Any]:
    """Sum, size and number of lines of a file on the disk."""
    seen = Seen()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            seen.take(piece)
    return seen.facts()


class Seen:
    """Bytes that went by: sum, size and lines, counted from the newlines."""

    def __init__(self) -> None:
        self.sha, self.size, self.newlines, self.last = hashlib.sha256(), 0, 0, b"\n"

    def take(self, piece: bytes) -> None:
        self.sha.update(piece)
        self.size += len(piece)
        self.newlines += piece.count(b"\n")
        self.last = piece[-1:]

    def facts(self) -> dict[str, Any]:
        return {"sha256": self.sha.hexdigest(), "bytes": self.size, "lines": self.newlines + (self.last != b"\n")}
