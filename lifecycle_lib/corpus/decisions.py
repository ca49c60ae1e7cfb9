"""Questions to a finished gate: why this row, what changed between two runs, what comes out again under which rules.

All of them stream over the files of the folder: memory holds one row, hashes of ids, and a few examples a slice.

Left out: joins on anything but the id. A corpus whose ids are made anew for each run has no diff.
"""

import itertools
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lifecycle_lib.corpus.filters import Ruleset
from lifecycle_lib.corpus.gate import STAGES, GateConfig, run_gate
from lifecycle_lib.corpus.manifest import FIELDS, KEPT, facts_of, is_lost, read_manifest
from lifecycle_lib.corpus.rows import FirstSeen, Problem, read_rows, says


def stream(path: str | Path) -> Iterator[dict[str, Any]]:
    """The rows of one of the gate's own files, one at a time."""
    try:
        with open(path, "rb") as file:
            for number, raw in enumerate(file, start=1):  # noqa: B007
                yield json.loads(raw)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); run the gate again") from error
    except ValueError as error:
        raise ValueError(f"{path}:{number}: was changed after the gate wrote it ({error}); run the gate again"
                         ) from error


def lost_lines(folder: str | Path) -> Iterator[dict[str, Any]]:
    """The decisions of input lines of which no row could be made."""
    return (decision for decision in stream(Path(folder) / "decisions.jsonl") if is_lost(decision))


# ---- explain -------------------------------------------------------------------------------------------------------

def explain(folder: str | Path, row: str) -> list[dict[str, Any]]:
    """The decisions about one row: by its id, by "line:17", or, if no row has that id, by a bare line number.

    More than one where an id was used again. A decision about a copy has the other row's decision under "other"; a
    kept or quarantined one its log under "transformations". Raises ValueError if there is no such row."""
    folder, manifest = Path(folder), read_manifest(folder)
    number = row.removeprefix("line:")
    line = int(number) if number.isascii() and number.isdigit() and len(number) < 10 else 0
    found: list[dict[str, Any]] = []
    if not row.startswith("line:"):
        found = [d for d in stream(folder / "decisions.jsonl") if d["id"] == row]
    if not found and line:
        found = _at_lines(folder, {line})
    if not found:
        raise ValueError(f"{folder}: no decision about row {row!r}; give an id of the input, or line:NUMBER from 1 to "
                         f"{manifest['counts']['lines']}")
    others = {d["line"]: d for d in _at_lines(folder, {h["of_line"] for d in found for h in d["details"]
                                                       if "of_line" in h})}
    for decision in found:
        for hit in decision["details"]:
            if "of_line" in hit:
                decision["other"] = others[hit["of_line"]]
        if decision["verdict"] != "reject":
            name = "kept.jsonl" if decision["verdict"] in KEPT else "quarantine.jsonl"
            kept = next(r for r in stream(folder / name) if r["id"] == decision["id"])
            decision["transformations"] = kept["transformations"]
    return found


def chain(decision: Mapping[str, Any], config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(stage, what happened there) for each stage, for a line of decisions.jsonl; `config` as the manifest has it."""
    order, filters = STAGES.index, STAGES.index("filters")
    stop = min((order(h["stage"]) for h in decision["details"] if h["verdict"] not in KEPT), default=len(STAGES))
    stop = filters if 0 < stop < filters else stop  # all filters see a row, so that a reviewer sees every reason
    off = {"exact": not config["exact"], "pii": config["pii"] == "off", "near": not config["near_threshold"],
           "source": config["allowed_sources"] is None}
    told = []
    for stage in STAGES:
        hits = "; ".join(_hit_text(h) for h in decision["details"] if h["stage"] == stage)
        told.append((stage, hits or ("not reached" if order(stage) > stop else "off" if off.get(stage) else "passed")))
    return told


def _hit_text(hit: Mapping[str, Any]) -> str:
    facts = [f"{key} {hit[key]}" for key in hit if key not in ("stage", "reason", "verdict", "message")]
    return f"{hit['reason']} -> {hit['verdict']}" + (f" ({', '.join(facts)})" if facts else "") + (
        f": {hit['message']}" if "message" in hit else "")


def _at_lines(folder: Path, lines: set[int]) -> list[dict[str, Any]]:
    top = max(lines, default=0)
    return [d for d in itertools.islice(stream(folder / "decisions.jsonl"), top) if d["line"] in lines]


# ---- diff ----------------------------------------------------------------------------------------------------------

@dataclass(slots=True)
class SliceLoss:
    """What one slice had before, what is still kept after, why the rest went, and what came in besides."""

    name: str
    before: int = 0
    kept: int = 0
    gained: int = 0
    reasons: Counter = field(default_factory=Counter)
    examples: list[dict[str, Any]] = field(default_factory=list)

    @property
    def lost(self) -> int:
        return self.before - self.kept

    @property
    def lost_share(self) -> float:
        """Of the rows there were before; 0 for a slice that had none."""
        return self.lost / self.before if self.before else 0.0


def diff(before: str | Path, after: str | Path, by: str = "slice", examples: int = 2) -> list[SliceLoss]:
    """By slice (or source, domain, licence), smallest first: which rows of `before` are not kept in `after`, and why.

    `before` is a gate's folder (its kept rows) or a JSONL file (its readable rows), `after` a gate's folder. Rows are
    matched by id. An example holds the lost row and, for a copy, the row that stands for it: read them side by side.
    Raises ValueError for a folder without a finished run, an unknown `by`, or nothing to compare."""
    if by not in FIELDS:
        raise ValueError(f"by={by!r}: give one of {', '.join(FIELDS)}")
    before, after = Path(before), Path(after)
    read_manifest(after)
    here = FirstSeen()
    for n, row in enumerate(stream(after / "kept.jsonl"), start=1):
        here.remember(row["id"], n)
    slices: dict[str, SliceLoss] = {}
    there, victims = FirstSeen(), FirstSeen()
    for n, row in enumerate(_rows_of(before), start=1):
        part = _part(slices, row, by)
        there.remember(row["id"], n)
        part.before += 1
        if here.line_of(row["id"]):
            part.kept += 1
            continue
        victims.remember(row["id"], n)
        if len(part.examples) < examples:
            part.examples.append({"id": row["id"], "text": row["text"]})
    if not there:
        raise ValueError(f"{before}: no rows to compare; gate a file with rows that can be kept")
    for row in stream(after / "kept.jsonl"):
        _part(slices, row, by).gained += not there.line_of(row["id"])
    _add_reasons(slices, victims, after, by)
    return sorted(slices.values(), key=lambda part: (part.before, part.name))


def _rows_of(before: Path) -> Iterator[dict[str, Any]]:
    if before.is_dir():
        read_manifest(before)
        return stream(before / "kept.jsonl")
    return (row for _, row in read_rows(before) if not isinstance(row, Problem))


def _part(slices: dict[str, SliceLoss], row: Mapping[str, Any], by: str) -> SliceLoss:
    name = says(row, by) or "(none)"
    return slices.setdefault(name, SliceLoss(name))


def _add_reasons(slices: dict[str, SliceLoss], victims: FirstSeen, after: Path, by: str) -> None:
    """Why `after` did not keep them, from its decisions, and the text of the rows that stand for copies."""
    example_of = {e["id"]: e for part in slices.values() for e in part.examples}
    for d in stream(after / "decisions.jsonl"):
        if d["verdict"] not in KEPT and d["id"] is not None and d["stage"] != "read" and victims.line_of(d["id"]):
            slices.setdefault(d[by], SliceLoss(d[by])).reasons[d["reason"]] += 1
            if d["id"] in example_of:
                example_of[d["id"]] |= {"reason": d["reason"]} | {k: h[k] for h in d["details"] for k in
                                                                  ("of_line", "jaccard") if k in h}
    for part in slices.values():
        if unknown := part.lost - sum(part.reasons.values()):
            part.reasons["(not in the input of the second run)"] += unknown
    wanted = {e["of_line"]: None for e in example_of.values() if "of_line" in e}
    for row in stream(after / "kept.jsonl") if wanted else ():
        if (line := row["transformations"][-1]["line"]) in wanted:
            wanted[line] = row
    for e in example_of.values():
        if "of_line" in e:
            other = wanted[e["of_line"]]
            e["representative"] = {"id": other["id"], "text": other["text"]} if other else None


def too_much_lost(parts: Sequence[SliceLoss], max_loss: float) -> list[SliceLoss]:
    """The slices that lost more than `max_loss` of their rows: a release should fail when there are any.

    In a slice of 4 rows one row is a quarter: set it so that you would look at the rows. ValueError outside 0 to 1."""
    if not 0 <= max_loss <= 1:
        raise ValueError(f"max loss {max_loss}: give a share from 0 to 1, such as 0.1")
    if not parts:
        raise ValueError("no slices: there is nothing to judge; run diff first")
    return [part for part in parts if part.lost_share > max_loss]


# ---- replay --------------------------------------------------------------------------------------------------------

@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """`identical`: decisions.jsonl came out again byte for byte. Else how verdicts moved, and the first examples."""

    lines: int
    identical: bool
    changes: Mapping[tuple[str, str], int]
    examples: Sequence[tuple[int, str | None, str, str]]  # line, id, "verdict (reason)" then and now


def replay(folder: str | Path, in_path: str | Path, ruleset: Ruleset | None = None, examples: int = 20) -> Replay:
    """Gate the input again with the recorded configuration, or with other rules, and compare the decisions.

    Raises ValueError if the input is not the one that was gated, or if `ruleset` has the recorded version and other
    thresholds: one version means one set of rules."""
    manifest = read_manifest(folder)
    if not Path(in_path).is_file() or facts_of(Path(in_path)) != manifest["input"]:
        raise ValueError(f"{in_path}: is not the file that was gated: its sum is not the manifest's; give that file")
    config = GateConfig.from_dict(manifest["config"], f"{folder}/manifest.json")
    if ruleset:
        same = ruleset.version == config.ruleset.version
        if same and ruleset.fingerprint() != config.ruleset.fingerprint():
            raise ValueError(f"ruleset {ruleset.version} has other thresholds than the recorded {ruleset.version}; "
                             "give changed rules a new version")
        config = replace(config, ruleset=ruleset)
    changes, shown = Counter(), []
    with tempfile.TemporaryDirectory() as scratch:
        again = run_gate(in_path, scratch, config)
        for then, now in zip(stream(Path(folder) / "decisions.jsonl"), stream(Path(scratch) / "decisions.jsonl"),
                             strict=True):
            old, new = (f"{d['verdict']} ({d['reason']})" for d in (then, now))
            if old != new:
                changes[old, new] += 1
                if len(shown) < examples:
                    shown.append((then["line"], then["id"], old, new))
    identical = again["files"]["decisions.jsonl"] == manifest["files"]["decisions.jsonl"]
    return Replay(lines=manifest["counts"]["lines"], identical=identical, changes=dict(changes.most_common()),
                  examples=tuple(shown))
