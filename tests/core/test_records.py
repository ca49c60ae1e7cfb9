"""core/records.py: strict reading, atomic writing."""

import json
import os
import threading

import pytest

from lifecycle_lib.core import records
from lifecycle_lib.core.records import read_json, read_jsonl, write_bytes, write_json, write_jsonl, write_text

CASES = {"id": int, "prompt": str, "score": float, "note": (str, type(None))}
ROW = '{"id": 1, "prompt": "p", "score": 0.5, "note": null}'


def put(tmp_path, text, name="rows.jsonl"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_bytes_by_hand(tmp_path):
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [{"b": 1, "a": "é"}, {"x": None}])
    assert path.read_bytes() == b'{"b": 1, "a": "\xc3\xa9"}\n{"x": null}\n'
    write_json(tmp_path / "a.json", {"k": [1]})
    assert (tmp_path / "a.json").read_bytes() == b'{\n  "k": [\n    1\n  ]\n}\n'


def test_round_trip_keeps_every_line_separator(tmp_path):
    """U+2028, U+0085 and \\x0b end a line for str.splitlines; in JSONL only the newline byte does."""
    rows = [{"text": "a\u2028b\u0085c\x0bd\re\nf", "n": i} for i in range(3)]
    write_jsonl(tmp_path / "r.jsonl", rows)
    assert read_jsonl(tmp_path / "r.jsonl", {"text": str, "n": int}) == rows
    naive = (tmp_path / "r.jsonl").read_text().splitlines()
    assert len(naive) != len(rows)  # the broken variant that the data above is chosen to catch


def test_agrees_with_json_line_by_line(tmp_path):
    rows = [{"i": i, "f": i / 7, "s": "é\t\"" * i, "l": [1, {"x": None}], "t": i % 2 == 0} for i in range(20)]
    path = put(tmp_path, "\r\n".join(json.dumps(row) for row in rows))  # CRLF, no last newline
    assert read_jsonl(path) == [json.loads(line) for line in path.read_bytes().split(b"\n")] == rows


@pytest.mark.parametrize(("second", "wanted"), [
    ("{\"id\": 1, \"prom", "not valid JSON"),
    ("", "blank line"),
    ("[1]", "a list where an object"),
    ('{"id": 1, "prompt": "p", "score": 1.0}', "'note' is missing"),
    ('{"id": true, "prompt": "p", "score": 1.0, "note": null}', "'id' is True"),
    ('{"id": 1.0, "prompt": "p", "score": 1.0, "note": null}', "'id' is 1.0"),
    ('{"id": 1, "prompt": null, "score": 1.0, "note": null}', "give a string"),
    ('{"id": 1, "prompt": "p", "score": false, "note": null}', "'score' is False"),
    ('{"id": 1, "prompt": "p", "score": 1.0, "note": 3}', "string or null"),
    ('{"id": 1, "id": 2, "prompt": "p", "score": 1.0, "note": null}', "'id' appears twice"),
    ('{"id": 1, "prompt": "p", "score": NaN, "note": null}', "NaN is not JSON"),
    ('{"id": 1, "prompt": "p", "score": 1e999, "note": null}', "1e999"),
    (b'{"id": 1, "prompt": "\xff"}', "not UTF-8"),
])
def test_bad_second_line_is_named(tmp_path, second, wanted):
    second = second if isinstance(second, bytes) else second.encode()
    path = put(tmp_path, ROW.encode() + b"\n" + second + b"\n" + ROW.encode() + b"\n")
    with pytest.raises(ValueError, match=wanted) as error:
        read_jsonl(path, CASES)
    assert f"{path}:2:" in str(error.value) and ";" in str(error.value)


def test_integer_counts_as_number(tmp_path):
    assert read_jsonl(put(tmp_path, ROW.replace("0.5", "1")), CASES)[0]["score"] == 1


def test_every_cut_inside_a_row_is_noticed(tmp_path):
    """Property: a file cut anywhere but at a row's end raises; at a row's end it holds whole rows."""
    whole = (ROW + "\n" + ROW + "\n").encode()
    for cut in range(len(whole)):
        path = put(tmp_path, whole[:cut])
        try:
            rows = read_jsonl(path, CASES)
        except ValueError:
            continue
        assert cut in (len(ROW), len(ROW) + 1, 2 * len(ROW) + 1)
        assert all(row == json.loads(ROW) for row in rows)


def test_empty_and_missing(tmp_path):
    empty = put(tmp_path, "")
    with pytest.raises(ValueError, match="no rows"):
        read_jsonl(empty)
    assert read_jsonl(empty, allow_empty=True) == []
    with pytest.raises(ValueError, match="absent.jsonl: cannot be read"):
        read_jsonl(tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match="cut short"):
        read_json(empty)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), {1, 2}, object()])
def test_unwritable_value_leaves_the_old_file(tmp_path, bad):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(ValueError, match="a.json: cannot be written as JSON"):
        write_json(path, {"new": bad})
    with pytest.raises(ValueError, match="b.jsonl:2"):
        write_jsonl(tmp_path / "b.jsonl", [{"ok": 1}, {"new": bad}])
    assert read_json(path) == {"old": 1} and sorted(os.listdir(tmp_path)) == ["a.json"]


def test_lone_surrogate_and_bad_targets(tmp_path):
    with pytest.raises(ValueError, match="UTF-8"):
        write_text(tmp_path / "t", "\ud800")
    with pytest.raises(ValueError, match="row is a list"):
        write_jsonl(tmp_path / "t", [["no"]])
    with pytest.raises(ValueError, match="cannot be written"):
        write_text(tmp_path, "a folder")
    write_text(tmp_path / "file", "x")
    with pytest.raises(ValueError, match="cannot be written"):
        write_text(tmp_path / "file" / "below", "x")
    assert sorted(os.listdir(tmp_path)) == ["file"]


def test_permissions_follow_the_umask(tmp_path):
    write_text(tmp_path / "ours", "x")
    (tmp_path / "plain").write_text("x")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    """A write that dies half way leaves the old bytes; an in-place writer does not (the check notices)."""
    def dies(*_):
        raise OSError(28, "No space left on device")

    def in_place(path, data):
        with open(path, "wb") as file:
            file.write(data[:2])
            dies()

    def old_survives(writer):
        path = tmp_path / "f"
        path.write_bytes(b"old")
        with pytest.raises((ValueError, OSError)):
            writer(path, b"new bytes")
        return path.read_bytes() == b"old" and os.listdir(tmp_path) == ["f"]

    monkeypatch.setattr(records.os, "fsync", dies)
    assert old_survives(write_bytes)
    assert not old_survives(in_place)


def test_reader_never_sees_a_half_written_file(tmp_path):
    path = tmp_path / "f"
    sizes = {b"a" * 20_000, b"b" * 30_000}
    write_bytes(path, b"a" * 20_000)
    seen, done = set(), threading.Event()

    def read():
        while not done.is_set():
            seen.add(path.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(30):
        for data in sizes:
            write_bytes(path, data)
    done.set()
    reader.join()
    assert seen and seen <= sizes
