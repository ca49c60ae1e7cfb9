"""Rows of a JSONL file of any size: every line comes out once, as a row or as a problem, in bounded memory.

A bad line never stops the run and never disappears: it is yielded as a `Problem` with its line number and a code that
can be counted. What is kept in memory is one line (at most `max_line_bytes`; the rest of a longer line is read past)
and `FirstSeen`, the table that finds a second use of an id: 8 bytes of hash and 4 of line number a slot. Measured, it
costs 18 to 36 MB per million rows, and 1.5 times the larger number for a moment while it grows.

The history of a row is a list of transformations that is only added to. Each entry carries a chain hash over the entry
before it, as Haber and Stornetta (1991) link time stamps: an entry, or the text, changed afterwards breaks the chain.

Left out: gzip and CSV (unpack or convert first), and a proof against chance. Two different ids share an 8-byte hash
with probability n^2 / 2^65 (3e-8 for a million rows); the later row would be reported as a duplicate id.
"""

import hashlib
import json
import math
import re
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_LINE_BYTES = 1 << 20
MAX_DEPTH = 100  # of lists and objects in a row: what everything after the gate reads without trouble
SAID_NOTHING = ("", "unknown", "none", "null", "n/a", "na", "tbd", "noassertion", "?")
"""What stands in a licence or source field of people who did not know: the same as no field."""
_OPTIONAL_TEXT = ("licence", "source")
_PACKED = {b"\x1f\x8b": "gzip; unpack it", b"PK\x03\x04": "zip; unpack it", b"PAR1": "Parquet; export it as JSONL",
           **dict.fromkeys((b"\xff\xfe", b"\xfe\xff", b"{\0", b"\0{"), "UTF-16; save it as UTF-8")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A line that is no row: a code to count, what is wrong and what to do, and the row's id where it had one.

    `code`: blank_line, too_many_bytes, not_utf8, not_json, not_an_object, key_twice, lone_surrogate, missing_field,
    mistyped_field, duplicate_id."""

    code: str
    message: str
    row_id: str | None = None


class FirstSeen:
    """The line on which a key was first seen, by 8-byte hash: open addressing in two flat arrays, at most 2/3 full."""

    def __init__(self) -> None:
        self._count = 0
        self._keys = array("Q", bytes(8 << 10))
        self._lines = array("I", bytes(4 << 10))

    def __len__(self) -> int:
        return self._count

    def line_of(self, key: str) -> int:
        """The line that was remembered for this key; 0 for a key not seen."""
        return self._lines[self._slot(_hash8(key))]

    def remember(self, key: str, line: int) -> int:
        """The line on which this key was first seen; 0 if this is the first, and it is remembered (line >= 1)."""
        key8 = _hash8(key)
        slot = self._slot(key8)
        if self._keys[slot]:
            return self._lines[slot]
        self._keys[slot], self._lines[slot] = key8, line
        self._count += 1
        if 3 * self._count > 2 * len(self._keys):
            self._grow()
        return 0

    def _slot(self, key8: int) -> int:
        keys, mask = self._keys, len(self._keys) - 1
        slot = key8 & mask
        while keys[slot] and keys[slot] != key8:
            slot = (slot + 1) & mask
        return slot

    def _grow(self) -> None:
        keys, lines, n = self._keys, self._lines, 2 * len(self._keys)
        self._keys, self._lines = array("Q", bytes(8 * n)), array("I", bytes(4 * n))
        for key8, line in zip(keys, lines):
            if key8:
                slot = self._slot(key8)
                self._keys[slot], self._lines[slot] = key8, line


def _hash8(key: str) -> int:
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1  # 0 is an empty slot


def read_rows(path: str | Path, max_line_bytes: int = MAX_LINE_BYTES,
              on_bytes: Callable[[bytes], object] | None = None) -> Iterator[tuple[int, dict[str, Any] | Problem]]:
    """(line number from 1, row or `Problem`) for every line of a JSONL file, in order, each once.

    A row is an object with an `id` and a `text` (strings), whose id no earlier row has, and whose `licence` and
    `source`, where given, are strings. Lines end with a newline (a carriage return before it is ignored; the last line
    needs none). `on_bytes` is given every byte of the file in order: for a hash, a progress bar.

    Raises ValueError, when the first line is asked for, if the file is missing, a folder, unreadable, empty, or
    evidently not UTF-8 text (UTF-16, gzip, zip, Parquet).
    """
    ids = FirstSeen()
    for number, raw in lines_of(path, max_line_bytes, on_bytes):
        if raw is None:
            yield number, Problem(code="too_many_bytes", message=f"longer than {max_line_bytes:,} bytes; split the "
                                  "document, or raise max_line_bytes")
            continue
        row = parse_object(raw)
        if isinstance(row, dict):
            row = _check(row, raw)
        if isinstance(row, dict) and (first := ids.remember(row["id"], number)):
            row = Problem(code="duplicate_id", row_id=row["id"], message=f"id {_short(row['id'])} was used on line "
                          f"{first}; give each row an id of its own")
        yield number, row


def lines_of(path: str | Path, max_line_bytes: int = MAX_LINE_BYTES,
             on_bytes: Callable[[bytes], object] | None = None) -> Iterator[tuple[int, bytes | None]]:
    """(line number from 1, its bytes) of a file, None for a line over the limit. Raises as `read_rows` does."""
    if max_line_bytes < 2:
        raise ValueError(f"max_line_bytes={max_line_bytes}: give 2 or more; {MAX_LINE_BYTES} is the default")
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: is a {'folder' if path.is_dir() else 'device or pipe'}; give one JSONL file")
    try:
        file = open(path, "rb")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    with file:
        for number, raw in enumerate(_lines(file, path, max_line_bytes, on_bytes), start=1):
            yield number, raw[3:] if number == 1 and raw and raw.startswith(b"\xef\xbb\xbf") else raw


def _lines(file: Any, path: Path, max_bytes: int, on_bytes: Callable[[bytes], object] | None) -> Iterator[bytes | None]:
    """Each line with its newline, or None for one that is too long."""
    tell = on_bytes or (lambda piece: None)
    first = file.read(4)
    if not first:
        raise ValueError(f"{path}: the file is empty; give a JSONL file with rows")
    for magic, what in _PACKED.items():
        if first.startswith(magic):
            raise ValueError(f"{path}: not UTF-8 text but {what} first")
    if path.suffix.lower() in (".csv", ".tsv") and first.lstrip()[:1] != b"{":
        raise ValueError(f"{path}: this is {path.suffix[1:].upper()}; write it as JSONL first, one "
                         '{"id", "text", "source", "licence"} a line')
    file.seek(0)
    while line := file.readline(max_bytes + 1):
        tell(line)
        if len(line) <= max_bytes or line.endswith(b"\n"):
            yield line
            continue
        while not line.endswith(b"\n") and (line := file.readline(max_bytes)):
            tell(line)
        yield None


def parse_object(raw: bytes) -> dict[str, Any] | Problem:
    """The JSON object of a line, read strictly; its fields are anybody's."""
    try:
        text = raw.decode("utf-8").rstrip("\r\n")  # a line cut short is an unterminated string, no control character
    except UnicodeDecodeError as error:
        return Problem(code="not_utf8", message=f"byte 0x{raw[error.start]:02x} at {error.start + 1} is not UTF-8; "
                       "save the file as UTF-8")
    if not text.strip():
        return Problem(code="blank_line", message="blank line; nothing to do")
    try:
        row = json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant, parse_float=_finite)
    except json.JSONDecodeError as error:
        near = _short(text[max(0, error.pos - 15):error.pos + 15].strip())
        return Problem(code="not_json", message=f"not JSON at character {error.pos + 1} ({error.msg}), near {near}; "
                       "write one whole object a line")
    except _KeyTwice as error:
        return Problem(code="key_twice", message=f"key {error} stands twice in one object; keep one")
    except RecursionError:
        return Problem(code="not_json", message=f"nested deeper than {MAX_DEPTH}; flatten the row")
    except ValueError as error:
        return Problem(code="not_json", message=f"{_short(str(error))}; write a finite number or null")
    if not isinstance(row, dict):
        return Problem(code="not_an_object", message=f"a {type(row).__name__} where an object is needed; write "
                       '{"id": ..., "text": ...}')
    return row


def _check(row: dict[str, Any], raw: bytes) -> dict[str, Any] | Problem:
    """The row if its fields have the right types and it can be written again; else the problem."""
    row_id = row["id"] if isinstance(row.get("id"), str) else None
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH and _deeper(row, MAX_DEPTH):
        return Problem(code="not_json", row_id=row_id, message=f"nested deeper than {MAX_DEPTH}; flatten the row")
    if b"\\u" in raw:  # only an escape can hold half a character
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            row_id = row_id and row_id.encode("utf-8", "replace").decode()
            return Problem(code="lone_surrogate", row_id=row_id, message=f"half a character ({half}) that no UTF-8 "
                           "file can hold; write the text again from its source")
    for field in ("id", "text"):
        if field not in row:
            return Problem(code="missing_field", row_id=row_id, message=f"field {field!r} is missing; the row has "
                           f"{_short(', '.join(row) or 'no fields')}")
    for field in ("id", "text", *_OPTIONAL_TEXT):
        value = row.get(field, "")
        if not isinstance(value, str) and not (value is None and field in _OPTIONAL_TEXT):
            return Problem(code="mistyped_field", row_id=row_id,
                           message=f"field {field!r} is {_short(value)} ({type(value).__name__}); give a string")
    if not row["id"].strip():
        return Problem(code="mistyped_field", message="field 'id' is blank; give the row a name")
    log = row.get("transformations", [])
    if not isinstance(log, list) or not all(isinstance(e, dict) and isinstance(e.get("op"), str) for e in log):
        return Problem(code="mistyped_field", row_id=row_id, message=f"field 'transformations' is {_short(log)}; give "
                       'a list of {"op": name, ...}')
    return row


def _deeper(value: Any, most: int) -> bool:
    """Are lists and objects in `value` nested deeper than `most`? Level by level, so no depth is too deep to see."""
    level = [value]
    for _ in range(most + 1):
        level = [v for part in level for v in (part.values() if isinstance(part, dict) else part)
                 if isinstance(v, (dict, list))]
        if not level:
            return False
    return True


class _KeyTwice(Exception):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        keys = [key for key, _ in pairs]
        raise _KeyTwice(_short(next(key for key in keys if keys.count(key) > 1)))
    return row


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"number {text} is too large")
    return value


def _short(value: Any) -> str:
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# ---- what a row says of itself ------------------------------------------------------------------------------------

def says(row: Mapping[str, Any], field: str) -> str:
    """The licence, source, domain... of a row, stripped; "" when it is missing, no string, or says "unknown"."""
    value = row.get(field)
    value = value.strip() if isinstance(value, str) else ""
    return "" if value.lower() in SAID_NOTHING else value


def captured(row: Mapping[str, Any]) -> str:
    """The capture date "YYYY-MM-DD" of a row; "" when it is missing or no such date."""
    value = says(row, "captured")
    return value if re.fullmatch(r"\d{4}-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12]\d|3[01])", value) else ""


def add_transformation(row: Mapping[str, Any], op: str, *, text: str | None = None, **params: Any) -> dict[str, Any]:
    """A copy of the row with one more entry in `transformations`, and with the new `text` if there is one.

    The entry is {"op": op, **params, "text_sha": of the text afterwards, "chain": hash}; the row given is not changed.
    Raises ValueError for an op without a name, and for parameters that JSON cannot hold or that use a reserved name.
    """
    if not op.strip():
        raise ValueError(f"op={op!r}: name the transformation, for example 'strip'")
    if reserved := {"op", "text_sha", "chain"} & set(params):
        raise ValueError(f"parameter {sorted(reserved)[0]!r} is written by the log itself; use another name")
    new = dict(row) | ({} if text is None else {"text": text})
    log = list(row.get("transformations", []))
    entry = {"op": op, **params, "text_sha": _sha(new["text"])}
    stand = dict(row) | ({params["field"]: params["was"]} if op == "assign" else {})
    new["transformations"] = [*log, entry | {"chain": _link(stand, log, entry)}]
    return new


def assign(row: Mapping[str, Any], field: str, value: str) -> dict[str, Any]:
    """A copy of the row with a field set, say a licence that was found out, and the old value in the log."""
    if field in ("id", "text", "transformations"):
        raise ValueError(f"field {field!r} is not assigned; a changed text is add_transformation(row, op, text=...)")
    return add_transformation(dict(row) | {field: value}, "assign", field=field, value=value, was=row.get(field))


def check_chain(row: Mapping[str, Any]) -> int:
    """The number of chained entries of a row. Raises ValueError naming the first entry, or the text, that was changed.

    Origin fields (id, source, origin, licence, captured) are what the first link stands on: a silently swapped mirror
    or licence breaks it too. What this cannot see: a whole chain made again by someone who also has this function;
    keep the last hash somewhere else (the gate's manifest holds the sum of the file).
    """
    log, n, row = row.get("transformations", []), 0, dict(row)
    for i in range(len(log) - 1, -1, -1):  # take assignments back, newest first
        if log[i].get("op") == "assign" and "chain" in log[i]:
            field = str(log[i].get("field"))
            if row.get(field) != log[i].get("value"):
                raise ValueError(f"row {row['id']!r}: field {field!r} was changed after transformation {i + 1} set "
                                 "it; take the row from its source again")
            row[field] = log[i].get("was")
    for i, entry in enumerate(log):
        if "chain" not in entry and not n:
            continue  # written by someone else, before the first link, which covers it
        bare = {k: v for k, v in entry.items() if k != "chain"}
        if entry.get("chain") != _link(row, log[:i], bare):
            raise ValueError(f"row {row['id']!r}: transformation {i + 1} ({entry.get('op')}) or what it stands on was "
                             "changed after it was written; take the row from its source again")
        n += 1
    if n and log[-1].get("text_sha") != _sha(row["text"]):
        raise ValueError(f"row {row['id']!r}: the text was changed after transformation {len(log)} "
                         f"({log[-1]['op']}) and the log does not say how; take the row from its source again")
    return n


def _link(row: Mapping[str, Any], before: list[dict[str, Any]], entry: dict[str, Any]) -> str:
    if before and "chain" in before[-1]:
        stand: Any = before[-1]["chain"]
    else:
        stand = [[row.get(f) for f in ("id", "source", "origin", "licence", "captured")], before]
    try:
        return _sha(json.dumps([stand, entry], sort_keys=True, separators=(",", ":"), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"transformation {entry['op']!r}: its parameters have no JSON form ({error}); use strings, "
                         "finite numbers, true/false, null, lists and dicts") from error


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
