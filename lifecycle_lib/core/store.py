"""The artifact store: a checkpoint is a closure.

An artifact is what a stage made from a frozen config and its parent artifacts. Its name carries the fingerprint
of all that went in: config, parents, data files, code. So asking for it again finds it, changing any input makes
another one, and its card names its whole ancestry (the idea of Nix, Dolstra 2006, for checkpoints).

    <root>/<name>-<fingerprint>/card.json   what went in, what came out, SHA-256 of every file
    <root>/partial/<name>-<fingerprint>/    being built, or interrupted
    <root>/locks/                           one lock per artifact: two processes never build the same one
    <root>/damaged-.../                     failed its check, set aside

Crash safety: everything is written and flushed under partial/ and appears under its final name by one rename.
An attempt that starts in an interrupted workdir keeps only what is named `resume*` there (what training resumes
from) and deletes the rest, so a half-written file is never taken for a whole one.

Left out: garbage collection, a remote store, following imports of the `code` modules. The SHA-256 sums catch
accidents, not an author who rewrites files and card together.
"""

import contextlib
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

from filelock import FileLock, Timeout

from lifecycle_lib.core.fingerprints import (
    code_fingerprint,
    data_hashes,
    file_sha256,
    fingerprint,
    plain,
)
from lifecycle_lib.core.hardware import hardware, versions
from lifecycle_lib.core.records import read_json, write_json
from lifecycle_lib.core.seeds import peak_memory_bytes

__all__ = ["Artifact", "Store", "code_fingerprint", "fingerprint"]

CARD = "card.json"
CLOCK = "resume-clock.json"
IDENTITY = ("format", "name", "config_fingerprint", "parents", "data", "code")  # what the fingerprint is made of
STORE_WRITES = (*IDENTITY, "fingerprint", "config", "versions", "wall_s", "cpu_s", "attempts", "attempts_clocked",
                "created", "files", "card_fingerprint")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_FOLDER = re.compile(r"(?!damaged-)(.+)-([0-9a-f]{16})")
_checked: dict[Path, list[tuple[int, ...]]] = {}  # file stamps of artifacts whose sums this process has checked
_building = threading.local()


@dataclass(frozen=True, slots=True)
class Artifact:
    """A finished artifact: `path` is its folder, `card` the content of its card.json."""

    name: str
    fingerprint: str
    path: Path
    card: dict[str, Any] = field(compare=False, repr=False)

    def file(self, name: str) -> Path:
        """The path of one of its files. Raises ValueError if the artifact was not made with it, or has lost it."""
        path = self.path / name
        if name not in self.card["files"]:
            raise ValueError(f"artifact {self.name}-{self.fingerprint} has no file {name!r}; "
                             f"it has {', '.join(self.card['files']) or 'none'}")
        if not path.is_file():
            raise ValueError(f"artifact {self.name}-{self.fingerprint} has lost its file {name!r}; "
                             "ask the store for it again with get_or_make, which rebuilds it")
        return path


Artifacts = list[Artifact]  # named here because Store.list hides the builtin inside the class
Problems = list[str]
Folders = list[Path]


class Store:
    """Artifacts below one folder: `root`, else the environment's LIFECYCLE_STORE, else ./store.

    Raises ValueError if the root is a file, cannot be written, or its parent folder does not exist.
    """

    def __init__(self, root: str | Path | None = None) -> None:
        self.root = Path(root or os.environ.get("LIFECYCLE_STORE") or "store").absolute()
        _make_root(self.root)

    def get_or_make(self, name: str, config: Any, parents: Mapping[str, Artifact] | None,
                    make: Callable[[Path], Mapping[str, Any] | None], code: Sequence[ModuleType] = (),
                    data: Sequence[str | Path] = ()) -> Artifact:
        """The artifact that `config`, `parents`, `code` and `data` determine: found, or made now.

        `make(workdir)` writes its files into `workdir` and returns more card fields (`device`, `steps`, metrics), or
        None. Files and folders named `resume*` survive an interrupted attempt and are deleted at the end. A found
        artifact is checked against the sums in its card, once per process; a damaged one is set aside, with a line
        on stderr, and made again. The card's wall_s and cpu_s (this process) add up over interrupted attempts; an
        attempt killed outright could not write its time and is missing from `attempts_clocked`.

        Raises ValueError for a bad name, an input that has no fingerprint, a missing data file, and a make that
        leaves nothing, leaves a link, or returns a field the store itself writes.
        """
        identity, config_card = _identity(name, config, parents or {}, code, data)
        path = self.root / f"{name}-{fingerprint(identity)}"
        if (found := _open(path)) is not None:
            return found
        with _locked(self.root / "locks" / f"{path.name}.lock", path.name):
            if (found := _open(path)) is not None:  # another process made it while this one waited
                return found
            if path.exists():
                self._set_aside(path)
            return self._build(path, identity, config_card, make)

    def list(self) -> Artifacts:
        """Every artifact whose card is whole, oldest first. File sums are not checked here; see `verify`."""
        found = []
        for path in self._folders(""):
            try:
                found.append(_artifact(path))
            except ValueError as error:
                print(f"store: {path.name} skipped: {error}", file=sys.stderr)
        return sorted(found, key=lambda a: (a.card["created"], a.name))

    def find(self, prefix: str) -> Artifact:
        """The artifact whose fingerprint is, or starts with, `prefix`, checked against its sums.

        Raises ValueError if there is none, if several match, or if it is damaged.
        """
        paths = self._folders(prefix) if prefix else []
        if len(paths) != 1:
            many = f"matches {', '.join(p.name for p in paths)}; give more digits"
            none = f"matches nothing in {self.root}; Store.list() shows what is there"
            raise ValueError(f"fingerprint {prefix!r} {many if paths else none}")
        if problems := _problems(paths[0], cached=True):
            raise ValueError(f"artifact {paths[0].name} is damaged: {problems[0]}; make it again with get_or_make")
        return _artifact(paths[0])

    def lineage(self, artifact: Artifact) -> Artifacts:
        """Every ancestor once, each after its own parents. ValueError if one is missing or damaged."""
        order: dict[str, Artifact] = {}

        def visit(child: Artifact) -> None:
            for role, parent in sorted(child.card["parents"].items()):
                if parent not in order:
                    try:
                        ancestor = self.find(parent)
                    except ValueError as error:
                        raise ValueError(f"{child.name}-{child.fingerprint}: parent {role!r}: {error}") from error
                    visit(ancestor)
                    order[parent] = ancestor

        visit(artifact)
        return list(order.values())

    def verify(self, artifact: Artifact) -> Problems:
        """What is wrong with it on disk, every sum computed afresh; [] if nothing is."""
        return _problems(artifact.path, cached=False)

    def _folders(self, prefix: str) -> Folders:
        matches = ((_FOLDER.fullmatch(path.name), path) for path in sorted(self.root.iterdir()) if path.is_dir())
        return [path for match, path in matches if match and match[2].startswith(prefix)]

    def _set_aside(self, path: Path) -> None:
        number = 1
        while (aside := self.root / f"damaged-{path.name}-{number}").exists():
            number += 1
        problem = _problems(path, cached=False)[0]
        print(f"store: {path.name} is damaged ({problem}): set aside as {aside.name}, rebuilding", file=sys.stderr)
        os.rename(path, aside)

    def _build(self, path: Path, identity: dict[str, Any], config: Any,
               make: Callable[[Path], Mapping[str, Any] | None]) -> Artifact:
        workdir = self.root / "partial" / path.name
        workdir.mkdir(parents=True, exist_ok=True)
        for leftover in workdir.iterdir():
            if not leftover.name.startswith("resume"):
                _delete(leftover)
        with _clock(workdir) as clock:
            returned = make(workdir)
        extra = _extra_fields(path.name, returned)
        for resume in sorted(workdir.rglob("resume*"), reverse=True):  # a folder's content before the folder
            _delete(resume)
        files = _list_files(workdir, path.name)
        if not files and not extra:
            raise ValueError(f"{path.name}: make left no file and returned nothing; write into the folder it is given")
        card = identity | {
            "fingerprint": fingerprint(identity), "config": config, "versions": versions(), "device": None,
            "hardware": hardware(), "peak_memory_bytes": peak_memory_bytes(),
            "created": datetime.now(UTC).isoformat(), "files": files,
        } | clock | extra
        write_json(workdir / CARD, card | {"card_fingerprint": _seal(card)})
        for item in (*workdir.rglob("*"), workdir):
            _flush(item)
        os.rename(workdir, path)  # the one step that makes it exist
        _flush(self.root)
        return _artifact(path)


def _identity(name: str, config: Any, parents: Mapping[str, Artifact], code: Sequence[ModuleType],
              data: Sequence[str | Path]) -> tuple[dict[str, Any], Any]:
    """What the fingerprint is made of, and the config as the card shows it."""
    if not _NAME.fullmatch(name) or name.startswith("damaged-"):
        raise ValueError(f"artifact name {name!r}: use letters, digits, '.', '_' and '-', not starting 'damaged-'")
    for role, parent in parents.items():
        if not isinstance(parent, Artifact):
            raise ValueError(f"{name}: parent {role!r} is a {type(parent).__name__}; pass the Artifact that "
                             "get_or_make returned")
    return plain({
        "format": 1, "name": name, "config_fingerprint": fingerprint(config),
        "parents": {role: parent.fingerprint for role, parent in parents.items()},
        "data": data_hashes(data), "code": code_fingerprint(code),
    }), plain(config)


def _open(path: Path) -> Artifact | None:
    """The artifact in `path` if it is there and intact."""
    return None if not path.exists() or _problems(path, cached=True) else _artifact(path)


def _artifact(path: Path) -> Artifact:
    card = _read_card(path)
    return Artifact(card["name"], card["fingerprint"], path, card)


def _read_card(path: Path) -> dict[str, Any]:
    """card.json, if it is whole, unchanged since it was written, and belongs to this folder; else ValueError."""
    card = read_json(path / CARD)
    if not isinstance(card, dict) or card.pop("card_fingerprint", None) != _seal(card):
        raise ValueError(f"{path / CARD}: changed since it was written; make the artifact again")
    expected = fingerprint({key: card[key] for key in IDENTITY})
    if path.name != f"{card['name']}-{card['fingerprint']}" or card["fingerprint"] != expected:
        raise ValueError(f"{path / CARD}: is the card of {card['name']}-{expected}; make the artifact again")
    return card


def _problems(path: Path, cached: bool) -> Problems:
    """What is wrong in an artifact folder. With `cached`, files unchanged since this process last summed them
    (same size, times and inode) are not read again."""
    try:
        files = _read_card(path)["files"]
    except ValueError as error:
        return [str(error)]
    problems, stamps = [], []
    for name, entry in files.items():
        try:
            stat = (path / name).stat()
        except OSError:
            problems.append(f"{path / name}: missing")
            continue
        stamps.append((stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino))
        if stat.st_size != entry["bytes"]:
            problems.append(f"{path / name}: {stat.st_size} bytes instead of {entry['bytes']}")
    if problems or (cached and _checked.get(path) == stamps):
        return problems
    for name, entry in files.items():
        if file_sha256(path / name) != entry["sha256"]:
            problems.append(f"{path / name}: its bytes changed")
    if not problems:
        _checked[path] = stamps
    return problems


def _seal(card: Mapping[str, Any]) -> str:
    return fingerprint({"card": card})


def _extra_fields(name: str, returned: Mapping[str, Any] | None) -> dict[str, Any]:
    if returned is not None and not isinstance(returned, Mapping):
        raise ValueError(f"{name}: make returned a {type(returned).__name__}; return a dict of card fields, or None")
    extra = plain(dict(returned or {}), "card")
    if clash := sorted(set(extra) & set(STORE_WRITES)):
        raise ValueError(f"{name}: make returned {', '.join(clash)}, which the store itself writes; rename them")
    return extra


def _list_files(workdir: Path, name: str) -> dict[str, dict[str, Any]]:
    files = {}
    for path in sorted(workdir.rglob("*")):
        relative = path.relative_to(workdir).as_posix()
        if path.is_symlink() or relative == CARD:
            raise ValueError(f"{name}: make left {relative!r}, which is "
                             f"{'a link; copy the file' if path.is_symlink() else 'the name of the card; rename it'}")
        if path.is_file():
            files[relative] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    return files


@contextlib.contextmanager
def _clock(workdir: Path) -> Iterator[dict[str, Any]]:
    """Times the block and adds what earlier attempts in this workdir took; filled in when the block ends."""
    total = {"wall_s": 0.0, "cpu_s": 0.0, "attempts": 0, "attempts_clocked": 0}
    with contextlib.suppress(ValueError):  # none yet; and a damaged clock must not stop a build
        total |= read_json(workdir / CLOCK)
    total["attempts"] += 1
    write_json(workdir / CLOCK, total)
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        yield total
    finally:
        total["wall_s"] += time.perf_counter() - wall
        total["cpu_s"] += time.process_time() - cpu
        total["attempts_clocked"] += 1
        write_json(workdir / CLOCK, total)


@contextlib.contextmanager
def _locked(path: Path, name: str) -> Iterator[None]:
    """Hold the artifact's lock; the system releases it when a process dies."""
    held = _building.__dict__.setdefault("paths", set())
    if path in held:
        raise ValueError(f"{name}: its make asks the store for {name} itself; pass what it needs as a parent")
    lock = FileLock(path)
    try:
        lock.acquire(timeout=1)
    except Timeout:
        print(f"store: waiting for {name}, which another process is building", file=sys.stderr)
        lock.acquire()
    held.add(path)
    try:
        yield
    finally:
        held.discard(path)
        lock.release()


def _make_root(root: Path) -> None:
    fix = "give another folder, or set LIFECYCLE_STORE"
    if root.exists() and not root.is_dir():
        raise ValueError(f"store root {root}: is a file; {fix}")
    if not root.parent.is_dir():
        raise ValueError(f"store root {root}: its parent folder does not exist; make {root.parent} first, or {fix}")
    try:
        for folder in (root, root / "partial", root / "locks"):
            folder.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        raise ValueError(f"store root {root}: cannot be written ({error.strerror}); {fix}") from error


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
