"""The data gate: every line of a JSONL file gets one verdict, and the counts are checked before anything is shown.

    read -> rights -> source -> filters -> exact copies -> personal data -> near copies

A row ends as admit, accept_with_risk (kept, and counted as a risk), quarantine or reject, with the reason, what was
measured and the version of the rules. A row without a licence or a source is quarantined, whatever the rules say, and
so is one whose log (corpus/rows) says that its text, licence or source was changed behind its back. One whose licence
is no SPDX expression is quarantined unless the rules say otherwise. A quarantined or rejected row goes no further: it
can never be the copy that another row is thrown out for, so a text is remembered only once personal data was looked for
in it, and near copies come last. `truth` is never read.

A run writes kept.jsonl, quarantine.jsonl, decisions.jsonl (one line for every input line) and, last, manifest.json,
whose hash covers the input's bytes, the configuration, the counts and the other files: same input and configuration,
same hash, no clocks. They are made in a hidden folder and moved at the end; a folder without manifest.json holds no
result, and an interrupted run starts over. Memory is bounded: one row, the tables of ids and of text hashes (at most 36
MB per million rows each), counts for the first 10,000 names of a field, and, if near copies are searched, what
corpus/near_index needs (measured: 90 MB, and 170 MB per million rows); the rows wait on the disk meanwhile.

Left out: what a licence permits (see corpus/rights) and evaluation sets in the text (see
corpus/contamination).
"""

import contextlib
import json
import os
import shutil
import sys
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from lifecycle_lib.core.progress import bar
from lifecycle_lib.core.records import write_json
from lifecycle_lib.corpus import dedupe, privacy
from lifecycle_lib.corpus.filters import VERDICTS, Ruleset, apply_filters
from lifecycle_lib.corpus.licences import policy
from lifecycle_lib.corpus.manifest import FIELDS, KEPT, Seen, Tally, check_accounting, facts_of, manifest_hash
from lifecycle_lib.corpus.minhash import MinHash
from lifecycle_lib.corpus.near_index import JsonlTexts, near_clusters
from lifecycle_lib.corpus.rows import (
    MAX_LINE_BYTES,
    FirstSeen,
    Problem,
    add_transformation,
    captured,
    check_chain,
    read_rows,
    says,
)

STAGES = ("read", "rights", "source", "filters", "exact", "pii", "near")
FILES = ("kept.jsonl", "quarantine.jsonl", "decisions.jsonl")
PII_KINDS = ("EMAIL", "SECRET", "IBAN", "CARD", "IP", "US_SSN", "BIRTH_DATE", "PHONE", "ADDRESS")


@dataclass(frozen=True, slots=True, kw_only=True)
class GateConfig:
    """What a gate does. `from_dict` reads it from JSON."""

    ruleset: Ruleset = field(default_factory=Ruleset)
    allowed_sources: tuple[str, ...] | None = None  # others are quarantined as unseen; None: every source has been seen
    exact: bool = True  # a copy of an earlier row, by dedupe.normalise, is rejected
    pii: str = "quarantine"  # or mask, or off
    pii_kinds: tuple[str, ...] = PII_KINDS  # names, dates, ages, URLs are not among them by default
    near_threshold: float = 0.0  # Jaccard of word shingles of normalised texts; 0: no search for near copies
    near_k: int = 5  # words a shingle
    near_rule: str = "first"  # which copy stays, see dedupe.RULES
    near_per_cluster: int = 1
    protect_under: int = 0  # rows of slices with fewer open rows than this are never removed as near copies
    max_line_bytes: int = MAX_LINE_BYTES

    def __post_init__(self) -> None:
        rules = [r for r in dedupe.RULES if r != "hardest"]
        wrong = [f"{name}={getattr(self, name)!r}: give {allowed}" for name, fits, allowed in (
            ("ruleset", isinstance(self.ruleset, Ruleset), "a Ruleset (in JSON: an object of its fields)"),
            ("allowed_sources", self.allowed_sources is None or _texts(self.allowed_sources), "a list of source names"),
            ("exact", isinstance(self.exact, bool), "true or false"),
            ("pii", self.pii in ("quarantine", "mask", "off"), "quarantine, mask or off"),
            ("pii_kinds", _texts(self.pii_kinds) and set(self.pii_kinds) <= set(privacy.DETECTORS),
             f"a list out of {', '.join(privacy.DETECTORS)}"),
            ("near_threshold", _number(self.near_threshold, 0, 1), "0 (off) or a Jaccard up to 1, such as 0.8"),
            ("near_k", _whole(self.near_k, 1), "1 or more"),
            ("near_rule", self.near_rule in rules, f"one of {', '.join(rules)}"),
            ("near_per_cluster", _whole(self.near_per_cluster, 1), "1 or more"),
            ("protect_under", _whole(self.protect_under, 0), "0 or more rows"),
            ("max_line_bytes", _whole(self.max_line_bytes, 2), "2 or more")) if not fits]
        if wrong:
            raise ValueError(wrong[0])

    @classmethod
    def from_dict(cls, given: Any, where: str = "config") -> "GateConfig":
        """From parsed JSON. Raises ValueError naming `where`, the field, and what is allowed."""
        try:
            made = dict(_known(given, cls))
            for name in ("allowed_sources", "pii_kinds"):
                if isinstance(made.get(name), list):
                    made[name] = tuple(made[name])
            if "ruleset" in made:
                made["ruleset"] = Ruleset(**_known(made["ruleset"], Ruleset))
            return cls(**made)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error


def run_gate(in_path: str | Path, out_folder: str | Path, config: GateConfig | None = None) -> dict[str, Any]:
    """Gate a JSONL file into a folder and return the manifest (see the top of this file).

    Bad lines do not stop the run; they are counts["lost"] in the manifest. Raises ValueError for a file that is
    missing, empty or no text, a folder that cannot be written or would overwrite the input, a full disk, and if the
    counts do not add up (a fault of ours; nothing is written then).
    """
    config, in_path, out = config or GateConfig(), Path(in_path), Path(out_folder)
    with _workplace(out, in_path) as work:
        tally, seen = Tally(), Seen()
        with bar(f"gate {in_path.name} (kB)", -(-in_path.stat().st_size // 1000)) as progress, _Out(work) as files:
            def tell(piece: bytes) -> None:
                kilobytes = seen.size // 1000
                seen.take(piece)
                progress.update(seen.size // 1000 - kilobytes)

            lines = judge(read_rows(in_path, config.max_line_bytes, tell), config)
            for line in _without_near_copies(lines, work, config) if config.near_threshold else lines:
                decision = line.decision(config.ruleset.version)
                tally.add(decision)
                files.write(line.row, decision)
        manifest = {"format": 1, "input": seen.facts(), "config": asdict(config),
                    "rules": {"version": config.ruleset.version, "fingerprint": config.ruleset.fingerprint()},
                    **tally.facts(), "files": {name: facts_of(work / name) for name in FILES}}
        manifest = json.loads(json.dumps(manifest))  # tuples as lists, as a reader gets it
        manifest["hash"] = manifest_hash(manifest)
        check_accounting(manifest)
        write_json(work / "manifest.json", manifest)
        _move(work, out)
    return manifest


@dataclass(slots=True)
class Line:
    """One line on its way through the stages: the row (None if it could not be read) and what it ran into."""

    number: int
    row: dict[str, Any] | None
    row_id: str | None
    hits: list[dict[str, Any]]

    def hit(self, stage: str, reason: str, verdict: str, **measured: Any) -> None:
        if verdict != "admit":
            self.hits.append({"stage": stage, "reason": reason, "verdict": verdict, **measured})

    @property
    def verdict(self) -> str:
        return max((h["verdict"] for h in self.hits), key=VERDICTS.index, default="admit")

    def name(self, of: str) -> str:
        return "(unreadable)" if self.row is None else says(self.row, of) or "(none)"

    def decision(self, version: str) -> dict[str, Any]:
        """The line of decisions.jsonl."""
        verdict = self.verdict
        first = next((h for h in self.hits if h["verdict"] == verdict), {"stage": "done", "reason": "passed"})
        return {"line": self.number, "id": self.row_id, "verdict": verdict, "stage": first["stage"],
                "reason": first["reason"], "rules": version, "details": self.hits,
                **{f: self.name(f) for f in FIELDS}, "captured": captured(self.row or {}),
                "text_bytes": len(self.row["text"].encode()) if self.row else 0}


def judge(rows: Iterable[tuple[int, dict[str, Any] | Problem]], config: GateConfig) -> Iterator[Line]:
    """All stages but the last, for what `read_rows` gives, in order. Remembers the hash of every text it lets through.
    """
    texts = FirstSeen()
    for number, row in rows:
        if isinstance(row, Problem):
            line = Line(number, None, row.row_id, [])
            line.hit("read", row.code, "reject", message=row.message)
        else:
            line = Line(number, row, row["id"], [])
            _judge_one(line, texts, config)
        yield line


def _without_near_copies(lines: Iterable[Line], work: Path, config: GateConfig) -> Iterator[Line]:
    """The lines again, near copies among the open ones marked: spooled to the disk, searched, and read back."""
    numbers, slices = array("Q"), []
    with open(work / "spool", "wb") as spool, open(work / "words", "wb") as words:
        for line in lines:
            spool.write(json.dumps([line.number, line.row, line.row_id, line.hits]).encode() + b"\n")
            if line.verdict in KEPT:
                numbers.append(line.number)
                slices.append(sys.intern(line.name("slice")))
                words.write(json.dumps({"text": dedupe.normalise(line.row["text"])}).encode() + b"\n")
    gone: dict[int, dict[str, Any]] = {}
    if numbers:
        texts = JsonlTexts(work / "words")
        found = near_clusters(texts, config.near_threshold, MinHash(k=config.near_k, unit="word"), folder=work)
        choice = dedupe.choose(found.clusters(), texts, config.near_rule, config.near_per_cluster,
                               protect=dedupe.tail(slices, config.protect_under), k=config.near_k, unit="word")
        gone = {numbers[r.row]: {"jaccard": round(r.jaccard, 4), "of_line": numbers[r.representative]}
                for r in choice.removed}
    with open(work / "spool", "rb") as spool:
        for raw in spool:
            line = Line(*json.loads(raw))
            if line.number in gone:
                line.hit("near", "near_duplicate", config.ruleset.verdict("near_duplicate"),
                         limit=config.near_threshold, **gone[line.number])
            yield line


def _judge_one(line: Line, texts: FirstSeen, config: GateConfig) -> None:
    row, verdict = line.row, config.ruleset.verdict
    for name in ("licence", "source"):
        if not says(row, name):
            hint = {"instead": '"license": spell it "licence"'} if name == "licence" and "license" in row else {}
            line.hit("rights", f"no_{name}", verdict(f"no_{name}"), found=row.get(name), **hint)
    if (stated := says(row, "licence")) and (read := policy().parse(stated)).expression == "NOASSERTION":
        line.hit("rights", "licence_not_spdx", verdict("licence_not_spdx"), found=stated, message=read.problem)
    if row.get("role") == "red-team":
        line.hit("rights", "eval_only", verdict("eval_only"))
    try:
        check_chain(row)
    except ValueError as error:
        line.hit("rights", "broken_log", "quarantine", message=str(error))
    if not captured(row):
        line.hit("rights", "no_capture_date", verdict("no_capture_date"))
    source = says(row, "source")
    if source and config.allowed_sources is not None and source not in config.allowed_sources:
        line.hit("source", "unseen_source", verdict("unseen_source"), found=source)
    for reason in apply_filters(row, config.ruleset):
        line.hit("filters", reason.code, verdict(reason.code), measured=reason.measured, limit=reason.limit)
    if line.verdict not in KEPT:
        return
    words = dedupe.normalise(row["text"]) if config.exact else ""
    if words and (first := texts.line_of(words)):
        line.hit("exact", "exact_duplicate", verdict("exact_duplicate"), of_line=first)
        if line.verdict not in KEPT:
            return
    if config.pii != "off":
        spans = [s for s in privacy.find_pii(row["text"]) if s.kind in config.pii_kinds]
        kinds = dict(sorted(Counter(s.kind for s in spans).items()))
        if spans and config.pii == "mask":
            line.row = add_transformation(row, "mask", text=privacy.mask(row["text"], spans), kinds=kinds)
            line.hit("pii", "pii_masked", verdict("pii_masked"), kinds=kinds)
        elif spans:
            line.hit("pii", "pii", verdict("pii"), kinds=kinds)
    if words and line.verdict in KEPT:
        texts.remember(words, line.number)


# ---- files -------------------------------------------------------------------------------------------------------

class _Out:
    """The three files of a run, being written."""

    def __init__(self, work: Path) -> None:
        self.files = {name: open(work / name, "xb") for name in FILES}

    def write(self, row: dict[str, Any] | None, decision: dict[str, Any]) -> None:
        self._put("decisions.jsonl", decision)
        if (verdict := decision["verdict"]) != "reject":
            logged = add_transformation(row, "gate", **{k: decision[k] for k in ("verdict", "reason", "rules", "line")})
            self._put("quarantine.jsonl" if verdict == "quarantine" else "kept.jsonl", logged)

    def _put(self, name: str, row: dict[str, Any]) -> None:
        self.files[name].write(json.dumps(row, ensure_ascii=False).encode() + b"\n")

    def __enter__(self) -> "_Out":
        return self

    def __exit__(self, *exc: object) -> None:
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()


@contextlib.contextmanager
def _workplace(out: Path, in_path: Path) -> Iterator[Path]:
    """A hidden folder inside `out`, gone afterwards whatever happens; what a killed run left there goes first."""
    if not in_path.is_file():
        next(read_rows(in_path))  # says what is wrong with it
    if in_path.exists() and any(f.exists() and f.samefile(in_path) for f in (out / name for name in FILES)):
        raise ValueError(f"{in_path}: would be overwritten by the result; give another folder than {out}")
    if (out / "exits.jsonl").exists():
        raise ValueError(f"{out}: holds what reviewers decided (exits.jsonl); give a new folder")
    new, work = not out.exists(), None
    try:
        out.mkdir(parents=True, exist_ok=True)
        for old in out.glob(".gate-*"):
            if not _running(old.name.split("-")[1]):
                shutil.rmtree(old, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=f".gate-{os.getpid()}-", dir=out))
        yield work
    except OSError as error:
        raise ValueError(f"{error.filename or out}: cannot be written ({error.strerror}); give --out a folder you may "
                         "write to, on a disk with room") from error
    finally:
        if work:
            shutil.rmtree(work, ignore_errors=True)
        if new:
            with contextlib.suppress(OSError):
                out.rmdir()  # only if nothing came of it


def _running(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except OSError:
        pass  # someone else's
    return True


def _move(work: Path, out: Path) -> None:
    """Old manifest away, files in, new manifest last: whoever finds a manifest finds the files it speaks of."""
    for stale in ("manifest.json", "board.png"):
        (out / stale).unlink(missing_ok=True)
    for name in (*FILES, "manifest.json"):
        os.replace(work / name, out / name)


def _known(given: Any, cls: type) -> Mapping[str, Any]:
    names = [f.name for f in fields(cls)]
    if not isinstance(given, Mapping):
        raise ValueError(f"a {type(given).__name__} where an object is needed; give {{...}} with fields of "
                         f"{', '.join(names)}")
    if unknown := sorted(set(given) - set(names)):
        raise ValueError(f"unknown field {unknown[0]!r}; there are {', '.join(names)}")
    return given


def _texts(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(item, str) for item in value)


def _number(value: Any, low: float, high: float) -> bool:
    return not isinstance(value, bool) and isinstance(value, (int, float)) and low <= value <= high


def _whole(value: Any, low: int) -> bool:
    return not isinstance(value, bool) and isinstance(value, int) and low <= value
