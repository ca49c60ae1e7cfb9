"""The release registry: ship in steps, each of which can be taken back (rows S0-56, S0-57, S3-9.30, S3-9.33).

A release pins checkpoint, index, prompt and gate versions together, so a rollback restores all four at once.

    candidate -> shadow -> canary -> full        any of the last three -> rolled_back, which is final

Plain files under one folder: - releases/ID.json   immutable; ID is the hash of its content - history.jsonl
one row an event, each holding the hash of the row before: an edit or a cut shows - pointer.json       what is
served now, replaced by one `os.replace`: a reader sees the old release or the new one

A crash between the history and the pointer leaves the old release served; `repair()` finishes the move.
Left out: several writers at once, and moving the traffic itself.
"""

import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lifecycle_lib.core.fingerprints import file_sha256, fingerprint
from lifecycle_lib.core.records import read_json, read_jsonl, write_json, write_jsonl
from lifecycle_lib.judge.gates import GateDecision

STATES = ("candidate", "shadow", "canary", "full", "rolled_back")
MOVES = {"candidate": ("shadow",), "shadow": ("canary", "rolled_back"), "canary": ("full", "rolled_back"),
         "full": ("rolled_back",), "rolled_back": ()}
HISTORY_FIELDS = {"seq": int, "event": str, "release_id": str, "at_s": float, "detail": dict, "before": str,
                  "fingerprint": str}


class IllegalMove(ValueError):
    """The state machine or a precondition of the release forbids this step; nothing was changed."""


def _file_hash(path: str | Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); build the artifact again") from error


@dataclass(frozen=True, slots=True)
class Release:
    """What is shipped together. The four versions are fingerprints; `files` maps a path to the SHA-256 of its
    bytes.

    Raises ValueError for an empty name or version, or no file: what is not pinned cannot be restored.
    """

    name: str
    checkpoint: str
    index: str
    prompt: str
    gate: str
    files: dict[str, str]

    def __post_init__(self) -> None:
        for field in ("name", "checkpoint", "index", "prompt", "gate"):
            value = getattr(self, field)
            if type(value) is not str or not value:
                raise ValueError(f"{field}={value!r}: a release pins every part; give its name or fingerprint")
        if not isinstance(self.files, Mapping) or not self.files:
            raise ValueError("files is empty: a release without files has nothing to restore; use Release.of(...)")
        for path, digest in self.files.items():
            if type(path) is not str or type(digest) is not str or len(digest) != 64:
                raise ValueError(f"files[{path!r}]={digest!r}: give the SHA-256 of the file; use Release.of(...)")

    @classmethod
    def of(cls, name: str, checkpoint: str, index: str, prompt: str, gate: str,
           paths: Iterable[str | Path]) -> "Release":
        """Hash the artifact files and pin them with the versions."""
        files = {str(Path(path).resolve()): _file_hash(path) for path in paths}
        return cls(name, checkpoint, index, prompt, gate, files)

    @property
    def release_id(self) -> str:
        """16 hex characters of the content's hash."""
        return fingerprint(self)

    def check_files(self) -> None:
        """Raise ValueError, naming the file, unless every artifact file has the bytes that were released."""
        for path, digest in self.files.items():
            if _file_hash(path) != digest:
                raise ValueError(f"{path}: its bytes are not those of release {self.name!r}; restore the file")


@dataclass(frozen=True, slots=True)
class Drill:
    """A rehearsed rollback: from `release_id` back to `target_id` in `seconds`, on a copy of the registry."""

    release_id: str
    target_id: str
    seconds: float


class Registry:
    """The registry in folder `root`. `clock` gives the time of an event in seconds since 1970."""

    def __init__(self, root: str | Path, clock: Callable[[], float] = time.time) -> None:
        self.root = Path(root)
        self.clock = clock

    # ---- reading

    def history(self) -> list[dict[str, Any]]:
        """All events, oldest first. Raises ValueError (FILE:LINE) for a damaged, edited, cut or unfinished
        record."""
        rows = self._chain()
        head = rows[-1]["fingerprint"] if rows else ""
        seen = self._pointer()["head"]
        if seen != head:
            if seen in ("", *(row["fingerprint"] for row in rows)):
                raise ValueError(f"{self.root / 'pointer.json'}: it is behind the history, a move was interrupted; "
                                 "call repair()")
            raise ValueError(f"{self.root / 'history.jsonl'}: rows are missing at its end; restore it from a backup")
        return rows

    def current(self) -> Release | None:
        """The release served now, None before the first. Reads the pointer alone, so it is never half of
        two."""
        served = self._pointer()["release_id"]
        return self.load(served) if served else None

    def load(self, release_id: str) -> Release:
        """A registered release. Raises ValueError when it is unknown or its record was changed."""
        path = self.root / "releases" / f"{release_id}.json"
        record = read_json(path)
        try:
            release = Release(**record)
        except TypeError as error:
            raise ValueError(f"{path}: not a release record ({error}); restore it from a backup") from error
        if release.release_id != release_id:
            raise ValueError(f"{path}: the record was changed, its hash is {release.release_id}; restore the file")
        return release

    def states(self) -> dict[str, str]:
        """State of every release, in order of registration. An older "full" one is a rollback target."""
        return self._states(self.history())

    def state(self, release_id: str) -> str:
        states = self.states()
        if release_id not in states:
            raise ValueError(f"release {release_id!r} is not registered; call register() first")
        return states[release_id]

    # ---- moving

    def register(self, release: Release) -> str:
        """Add a candidate after checking its files. Returns its id. Raises IllegalMove when it is already
        there."""
        states = self.states()
        if release.release_id in states:
            raise IllegalMove(f"release {release.name!r} is already there as {states[release.release_id]}; "
                              "a changed release gets a new id by itself")
        release.check_files()
        write_json(self.root / "releases" / f"{release.release_id}.json", asdict(release))
        self._append("candidate", release.release_id, {})
        return release.release_id

    def promote(self, release_id: str, decision: GateDecision | None = None) -> str:
        """One step up; returns the new state. Raises IllegalMove, or ValueError for damaged files.

        To shadow: needs a SHIP decision on this checkpoint by the pinned gate. To canary and to full: needs a
        drill whose rollback target is the release now served (only the very first release has none).
        """
        state, release = self.state(release_id), self.load(release_id)
        ups = [to for to in MOVES[state] if to != "rolled_back"]
        if not ups:
            raise IllegalMove(f"release {release.name!r} is {state}: there is no step up from there")
        release.check_files()
        if decision is not None or ups[0] == "shadow":
            self._require_ship(release, decision)
        served = self.current()
        if ups[0] != "shadow" and served is not None and not self._drilled(release_id, served.release_id):
            raise IllegalMove(f"no tested way back: call drill({release_id!r}) before {ups[0]}; it rehearses the "
                              f"rollback to {served.name!r}")
        self._append(ups[0], release_id, {} if decision is None else {"gate": decision.as_dict()})
        return ups[0]

    def rollback(self, reason: str, release_id: str | None = None) -> Release | None:
        """Withdraw a release (None: the one served) and return the release served afterwards.

        Rolling back the served one restores the last full release before it, after checking its files. Raises
        IllegalMove when there is nothing to withdraw or to return to, ValueError for damaged files.
        """
        if not reason.strip():
            raise ValueError("reason is empty; say what was seen, the next person reads it")
        rows = self.history()
        states, full = self._states(rows), self._full(rows)
        release_id = release_id or (full[-1] if full else None)
        if release_id is None or "rolled_back" not in MOVES[states.get(release_id, "rolled_back")]:
            found = states.get(release_id, "not registered") if release_id else "nothing"
            raise IllegalMove(f"cannot roll back {release_id!r}: it is {found}; only shadow, canary and full can")
        if release_id in full:
            if len(full) < 2:
                raise IllegalMove("the first release has nothing to roll back to; fix forward")
            if release_id == full[-1]:
                self.load(full[-2]).check_files()
        self._append("rolled_back", release_id, {"reason": reason})
        return self.current()

    def drill(self, release_id: str, probe: Callable[[Release], bool] | None = None) -> Drill:
        """Rehearse: on a copy of the registry make `release_id` full, roll it back, compare, and time the way
        back.

        `probe` (for example: load the target and answer one golden case) is part of the time. Raises
        IllegalMove unless the release is in shadow or canary and there is a release to return to; ValueError
        when it fails.
        """
        state, served = self.state(release_id), self.current()
        if state not in ("shadow", "canary") or served is None:
            raise IllegalMove(f"release {release_id!r} is {state} and {'nothing' if served is None else served.name} "
                              "is served: a drill needs a shadow or canary, and a release to return to")
        with tempfile.TemporaryDirectory() as folder:
            copy = Registry(shutil.copytree(self.root, Path(folder) / "registry"), self.clock)
            for step in ("canary", "full")[state == "canary":]:
                copy._append(step, release_id, {})
            start = time.perf_counter()
            back = copy.rollback("drill")
            if back != served or (probe is not None and not probe(served)):
                raise ValueError(f"the drill failed: {served.name!r} did not come back; mend it before promoting")
            seconds = time.perf_counter() - start
        self._append("drill", release_id, {"target_id": served.release_id, "seconds": seconds})
        return Drill(release_id, served.release_id, seconds)

    def repair(self) -> Release | None:
        """Finish a move that a crash cut between history and pointer; returns the release served now.

        Raises ValueError when the history is damaged: that is not an interruption.
        """
        rows = self._chain()
        seen = self._pointer()["head"]
        if seen not in ("", *(row["fingerprint"] for row in rows)):
            raise ValueError(f"{self.root / 'history.jsonl'}: rows are missing at its end; restore it from a backup")
        if rows:
            self._point(rows)
        return self.current()

    # ---- inside

    def _require_ship(self, release: Release, decision: GateDecision | None) -> None:
        if not isinstance(decision, GateDecision) or not decision.ships:
            raise IllegalMove(f"release {release.name!r}: the gate says {decision}; only SHIP goes on")
        if decision.checkpoint_fingerprint != release.checkpoint:
            raise IllegalMove(f"the gate judged checkpoint {decision.checkpoint_fingerprint!r}, the release ships "
                              f"{release.checkpoint!r}; judge the one that ships")
        if decision.gate_version != release.gate:
            raise IllegalMove(f"the gate's version is {decision.gate_version!r}, the release pins {release.gate!r}; "
                              "judge it with the pinned gate")

    def _drilled(self, release_id: str, target_id: str) -> bool:
        return any(row["event"] == "drill" and row["release_id"] == release_id
                   and row["detail"].get("target_id") == target_id for row in self.history())

    @staticmethod
    def _states(rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
        return {row["release_id"]: row["event"] for row in rows if row["event"] != "drill"}

    @classmethod
    def _full(cls, rows: list[dict[str, Any]]) -> list[str]:
        """Releases that reached full and were not rolled back, oldest first; the last one is served."""
        states = cls._states(rows)
        return [row["release_id"] for row in rows if row["event"] == "full" and states[row["release_id"]] == "full"]

    def _chain(self) -> list[dict[str, Any]]:
        path = self.root / "history.jsonl"
        if not path.exists():
            return []
        rows = read_jsonl(path, HISTORY_FIELDS)
        before, states = "", {}
        for line, row in enumerate(rows, start=1):
            body = {key: value for key, value in row.items() if key != "fingerprint"}
            if row["seq"] != line or row["before"] != before or row["fingerprint"] != fingerprint(body):
                raise ValueError(f"{path}:{line}: the row was edited, moved or removed; restore it from a backup")
            was, event = states.get(row["release_id"]), row["event"]
            legal = event == "candidate" if was is None else event == "drill" or event in MOVES[was]
            if not legal:
                raise ValueError(f"{path}:{line}: {was} -> {event} is not a legal move; restore it from a backup")
            if event != "drill":
                states[row["release_id"]] = event
            before = row["fingerprint"]
        return rows

    def _pointer(self) -> dict[str, Any]:
        path = self.root / "pointer.json"
        if not path.exists():
            return {"release_id": None, "head": ""}
        pointer = read_json(path)
        if (not isinstance(pointer, dict) or set(pointer) != {"release_id", "head"} or type(pointer["head"]) is not str
                or not isinstance(pointer["release_id"], str | None)):
            raise ValueError(f"{path}: not a pointer; delete it and call repair(), the history has the truth")
        return pointer

    def _append(self, event: str, release_id: str, detail: Mapping[str, Any]) -> None:
        rows = self.history()
        at_s = float(self.clock())
        assert math.isfinite(at_s)
        row = {"seq": len(rows) + 1, "event": event, "release_id": release_id, "at_s": at_s,
               "detail": json.loads(json.dumps(detail)), "before": rows[-1]["fingerprint"] if rows else ""}
        rows.append({**row, "fingerprint": fingerprint(row)})
        write_jsonl(self.root / "history.jsonl", rows)
        self._point(rows)

    def _point(self, rows: list[dict[str, Any]]) -> None:
        full = self._full(rows)
        served = full[-1] if full else None
        write_json(self.root / "pointer.json", {"release_id": served, "head": rows[-1]["fingerprint"]})
