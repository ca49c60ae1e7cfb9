"""Typed records: JSON and JSONL files that are read strictly and written atomically.

Reading refuses what a permissive reader would let through: a truncated line, a missing field, `true` where
a number is meant, the same key twice, NaN, a blank line, an empty file. Every message names the file and the
line and says what to do. Writing goes to a temporary file in the same folder, is flushed to the disk, and
takes the place of the old file in one `os.replace`: a reader sees the old file or the new one, never a half.

Left out: nested schemas (only the types of top-level fields are checked) and streaming (files are small).
"""

import contextlib
import itertools
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

FieldType = type | tuple[type, ...]
_JSON_NAMES = {str: "string", int: "integer", float: "number", bool: "true/false", list: "list",
               dict: "object", type(None): "null"}
_counter = itertools.count()


def read_json(path: str | Path) -> Any:
    """The value in a JSON file. Raises ValueError naming the file if it is missing or not strict JSON."""
    return _parse(_read_bytes(path), str(path))


def read_jsonl(path: str | Path, required: Mapping[str, FieldType] | None = None,
               allow_empty: bool = False) -> list[dict[str, Any]]:
    """The rows of a JSONL file, one JSON object per line.

    `required` maps a field to its type, or to a tuple of types (`(str, type(None))` allows null). `int`
    refuses true/false; `float` takes an integer as well. Other fields pass through unchecked.

    Raises ValueError, as "FILE:LINE: what is wrong; fix", for a missing file, a line that is not one strict
    JSON object, a missing or mistyped field, a blank line, and a file without rows (unless `allow_empty`).
    """
    lines = _read_bytes(path).split(b"\n")
    if lines[-1] == b"":  # what follows the last newline
        lines.pop()
    rows = []
    for number, line in enumerate(lines, start=1):
        where = f"{path}:{number}"
        if not line.strip():
            raise ValueError(f"{where}: blank line; remove it, every line is one JSON object")
        row = _parse(line, where)
        if not isinstance(row, dict):
            raise ValueError(f"{where}: a {_json_name(row)} where an object is needed; "
                             "write the row as {...}")
        check_fields(row, required or {}, where)
        rows.append(row)
    if not rows and not allow_empty:
        raise ValueError(f"{path}: no rows; write the file again, an empty file is no evidence")
    return rows


def check_fields(row: Mapping[str, Any], required: Mapping[str, FieldType], where: str) -> None:
    """Raise ValueError, starting with `where`, if `row` lacks a required field or has another type in it."""
    for field, wanted in required.items():
        if field not in row:
            raise ValueError(f"{where}: field {field!r} is missing; add it "
                             f"(the row has {', '.join(sorted(row))})")
        types = wanted if isinstance(wanted, tuple) else (wanted,)
        if not any(_is_a(row[field], t) for t in types):
            names = " or ".join(_JSON_NAMES.get(t, t.__name__) for t in types)
            raise ValueError(f"{where}: field {field!r} is {_short(row[field])} ({_json_name(row[field])}); "
                             f"give a {names}")


def write_json(path: str | Path, obj: Any) -> None:
    """Write `obj` as indented JSON, atomically. Raises ValueError for NaN and what JSON cannot hold."""
    write_text(path, _dump(obj, str(path), indent=2) + "\n")


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line, atomically, keys in order. Raises ValueError naming FILE:LINE."""
    lines = []
    for number, row in enumerate(rows, start=1):
        where = f"{path}:{number}"
        if not isinstance(row, Mapping):
            raise ValueError(f"{where}: row is a {type(row).__name__}; give a dict")
        lines.append(_dump(dict(row), where) + "\n")
    write_text(path, "".join(lines))


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8 with its newlines as they are, atomically."""
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{path}: the text cannot be written as UTF-8 ({error.reason}); "
                         f"remove the character {text[error.start]!r}") from error
    write_bytes(path, data)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write `data` atomically (temporary file, fsync, os.replace), making the folder if needed.

    Raises ValueError if the folder cannot be made or written, or if `path` is a folder.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{next(_counter)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror}); give a file path in a folder "
                         "you may write to, on a disk with room") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _read_bytes(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); check the path, or make the file first"
                         ) from error


def _parse(data: bytes, where: str) -> Any:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 at byte {error.start}; save the file as UTF-8") from error
    try:
        return json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant,
                          parse_float=_finite)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON at character {error.pos} ({error.msg}), near "
                         f"{_short(text[max(0, error.pos - 20):error.pos + 20])}; the file may be cut short, "
                         "write it again") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {twice!r} appears twice in one object; keep one")
    return row


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON; write null, or leave the field out")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"number {text} is too large for a float; write a finite number")
    return value


def _dump(obj: Any, where: str, indent: int | None = None) -> str:
    try:
        return json.dumps(obj, ensure_ascii=False, allow_nan=False, indent=indent)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: cannot be written as JSON ({error}); use strings, finite numbers, "
                         "true/false, null, lists and dicts") from error


def _is_a(value: Any, wanted: type) -> bool:
    if isinstance(value, bool):
        return wanted is bool
    return isinstance(value, (int, float) if wanted is float else wanted)


def _json_name(value: Any) -> str:
    return _JSON_NAMES.get(type(value), type(value).__name__)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
