"""Reading JSONL: every line once, each kind of bad line by its code, bounded tables, the log of a row."""

import hashlib
import json
import random
import tracemalloc
from array import array
from collections import Counter

import pytest

from lifecycle_lib.corpus import rows as rows_module
from lifecycle_lib.corpus.rows import FirstSeen, Problem, add_transformation, assign, check_chain, read_rows, says

GOOD = {"id": "a", "text": "a line of text", "source": "S", "licence": "CC0-1.0"}


def dump(**more):
    return json.dumps(GOOD | more).encode()


def read(tmp_path, data, **options):
    path = tmp_path / "in.jsonl"
    path.write_bytes(data)
    return list(read_rows(path, **options))


def codes(tmp_path, data, **options):
    return [row.code if isinstance(row, Problem) else "row" for _, row in read(tmp_path, data, **options)]


BAD = {  # bytes of one line: the code it must get
    b'{"id": "x", "text": ': "not_json", b"nonsense": "not_json", b'{"id": "x"} trailing': "not_json",
    b"[1, 2]": "not_an_object", b'"text"': "not_an_object", b"null": "not_an_object", b"3": "not_an_object",
    b'{"id": "x", "id": "y", "text": "t"}': "key_twice", b'{"id":"x","text":"t","a":{"b":1,"b":2}}': "key_twice",
    b'{"id": "x", "text": "caf\xe9"}': "not_utf8", b'{"id": "x", "text": "\xed\xa0\x80"}': "not_utf8",
    b'{"id": "x", "text": "a\x00b"}': "not_json", b"\x00": "not_json",
    b'{"id": "x", "text": "\\ud800"}': "lone_surrogate", b'{"id":"x","text":"t","m":{"n":["\\udfff"]}}':
    "lone_surrogate", b'{"id":"x\\ud800","text":"t"}': "lone_surrogate",
    b'{"text": "t"}': "missing_field", b'{"id": "x"}': "missing_field", b"{}": "missing_field",
    b'{"id": 7, "text": "t"}': "mistyped_field", b'{"id": "x", "text": null}': "mistyped_field",
    b'{"id": "x", "text": ["t"]}': "mistyped_field", b'{"id": " ", "text": "t"}': "mistyped_field",
    b'{"id": "x", "text": "t", "licence": 3}': "mistyped_field", b'{"id":"x","text":"t","source":{}}': "mistyped_field",
    b'{"id":"x","text":"t","transformations":"strip"}': "mistyped_field",
    b'{"id":"x","text":"t","transformations":[{"when":1}]}': "mistyped_field",
    b'{"id":"x","text":"t","score":NaN}': "not_json", b'{"id":"x","text":"t","score":1e999}': "not_json",
    b'{"id":"x","text":"t","n":' + b"9" * 5000 + b"}": "not_json", b"[" * 100_000: "not_json",
    b'{"a":' * 50_000: "not_json", b"   ": "blank_line", b"": "blank_line",
    b'{"id":"x","text":"' + b"y" * 5_000_000 + b'"}': "too_many_bytes"}


@pytest.mark.parametrize("line, code", BAD.items(), ids=lambda v: v if isinstance(v, str) else "")
def test_a_bad_line_is_reported_and_the_next_is_read(tmp_path, line, code):
    found = read(tmp_path, dump() + b"\n" + line + b"\n" + dump(id="b") + b"\n")
    assert [n for n, _ in found] == [1, 2, 3]
    assert [r["id"] for _, r in (found[0], found[2])] == ["a", "b"]
    problem = found[1][1]
    assert problem.code == code and problem.message and len(problem.message) < 250
    assert problem.message.isprintable() and problem.message.encode()  # one line, and no half characters


@pytest.mark.parametrize("depth, code", [(90, "row"), (97, "row"), (110, "not_json"), (990, "not_json"),
                                         (100_000, "not_json")])
@pytest.mark.parametrize("field", ["origin", "more", "transformations"])
def test_depth_of_a_row(tmp_path, depth, code, field):
    """Anything that is let through can be written, hashed and read again."""
    inner = b"[" * depth + b"]" * depth
    value = b'[{"op": "x", "y": ' + inner + b"}]" if field == "transformations" else inner
    line = b'{"id": "a", "text": "t", "' + field.encode() + b'": ' + value + b"}"
    [(_, row)] = read(tmp_path, line)
    assert (row.code if isinstance(row, Problem) else "row") == code
    if code == "row":
        assert json.loads(json.dumps(new := add_transformation(row, "gate"))) == new and check_chain(new) == 1


def test_many_brackets_are_not_depth(tmp_path):
    assert codes(tmp_path, dump(more=[[[1]]] * 500)) == ["row"]


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_line_ends_and_a_last_line_without_one(tmp_path, end, last):
    data = end.join(dump(id=i) for i in "abc") + (end if last else b"")
    assert [r["id"] for _, r in read(tmp_path, data)] == ["a", "b", "c"]


def test_byte_order_mark_goes_and_utf8_stays(tmp_path):
    line = json.dumps(GOOD | {"text": "naïve 5 € 😀\u2028"}, ensure_ascii=False).encode()
    assert read(tmp_path, b"\xef\xbb\xbf" + line) == [(1, GOOD | {"text": "naïve 5 € 😀\u2028"})]
    assert codes(tmp_path, dump() + b"\n\xef\xbb\xbf" + dump(id="b")) == ["row", "not_json"]


def test_an_escaped_pair_is_a_character(tmp_path):
    assert read(tmp_path, dump(text="x 😀"))[0][1]["text"] == "x 😀"


@pytest.mark.parametrize("data, word", [
    (b"", "empty"), ('{"id": "a"}'.encode("utf-16"), "UTF-16"), (b"\xfe\xff\0{", "UTF-16"),
    ('{"id": "a"}'.encode("utf-16-le"), "UTF-16"), ('{"id": "a"}'.encode("utf-16-be"), "UTF-16"),
    (b"\x1f\x8b\x08\x00", "gzip"), (b"PK\x03\x04", "zip"), (b"PAR1....", "Parquet")])
def test_files_that_are_no_text_are_refused_whole(tmp_path, data, word):
    with pytest.raises(ValueError, match=word):
        read(tmp_path, data)


def test_missing_file_folder_and_bad_limit(tmp_path):
    for path, word in ((tmp_path / "nope", "cannot be read"), (tmp_path, "folder")):
        with pytest.raises(ValueError, match=word):
            next(read_rows(path))
    with pytest.raises(ValueError, match="max_line_bytes=0"):
        read(tmp_path, dump(), max_line_bytes=0)


def test_the_limit_counts_a_line_and_its_newline_by_hand(tmp_path):
    n = len(dump())
    assert codes(tmp_path, dump() + b"\n" + dump(id="b"), max_line_bytes=n + 1) == ["row", "row"]
    assert codes(tmp_path, dump() + b"\n" + dump(id="b") + b"\n", max_line_bytes=n) == ["row", "row"]
    assert codes(tmp_path, dump() + b"\n" + dump(id="b"), max_line_bytes=n - 1) == ["too_many_bytes"] * 2
    assert codes(tmp_path, b"x" * 1000 + b"\n" + dump(), max_line_bytes=100) == ["too_many_bytes", "row"]


def test_duplicate_id_names_the_first_line(tmp_path):
    found = read(tmp_path, b"\n".join([dump(), b"junk", dump(text="other"), dump(id="b")]))
    assert isinstance(found[2][1], Problem) and found[2][1].code == "duplicate_id" and found[2][1].row_id == "a"
    assert "line 1" in found[2][1].message and found[3][1]["id"] == "b"


@pytest.mark.parametrize("seed", range(10))
def test_every_line_comes_once_and_every_byte_is_told(tmp_path, seed):
    draw = random.Random(seed)
    lines = [draw.choice([dump(id=str(i)), *[b for b in BAD if len(b) < 6000]]) for i in range(200)]
    lines = [line for line in lines if not line.startswith((b"\xff\xfe", b"\xfe\xff"))]
    data = b"\n".join(lines) + draw.choice([b"", b"\n"])
    heard = []
    found = read(tmp_path, data, on_bytes=heard.append)
    assert b"".join(heard) == data
    wanted = len(lines) if lines[-1] or data.endswith(b"\n\n") else len(lines) - 1
    assert [n for n, _ in found] == list(range(1, wanted + 1))
    for (_, row), line in zip(found, lines):
        if not isinstance(row, Problem):
            assert row == json.loads(line)  # the outside reader agrees


def test_first_seen_agrees_with_a_dict_and_stays_small():
    seen, oracle, draw = FirstSeen(), {}, random.Random(0)
    for line in range(1, 20_001):
        key = str(draw.randrange(12_000))
        assert seen.remember(key, line) == oracle.get(key, 0)
        oracle.setdefault(key, line)
    assert len(seen) == len(oracle) and seen.line_of("none") == 0
    assert all(seen.line_of(k) == v for k, v in oracle.items())
    slots = len(seen._keys)
    assert 12 * slots / len(seen) <= 36 and isinstance(seen._keys, array)  # bytes a row


def test_memory_does_not_grow_with_the_file(tmp_path):
    """15,000 rows of 1 kB and one line of 20 MB: the peak stays at the table of ids and one line."""
    path = tmp_path / "big.jsonl"
    with open(path, "wb") as file:
        for i in range(15_000):
            file.write(b'{"id": "row-%d", "text": "%s"}\n' % (i, b"word " * 200))
        file.write(b"x" * 20_000_000 + b"\n")
    tracemalloc.start()
    kinds = Counter(type(row).__name__ for _, row in read_rows(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert kinds == {"dict": 15_000, "Problem": 1} and path.stat().st_size > 30_000_000
    assert peak < 6_000_000, peak


def test_a_table_without_comparison_of_keys_is_caught(monkeypatch):
    """Broken on purpose: a slot is taken for the key without looking at it."""
    monkeypatch.setattr(FirstSeen, "_slot", lambda self, key8: key8 & (len(self._keys) - 1))
    seen = FirstSeen()
    assert any(seen.remember(str(i), i + 1) for i in range(1000))


@pytest.mark.parametrize("value", ["", " ", None, "unknown", "NOASSERTION", "None", "n/a", 3, "?"])
def test_a_field_that_says_nothing(value):
    assert says({"licence": value}, "licence") == ""
    assert says({"licence": " MIT "}, "licence") == "MIT"


@pytest.mark.parametrize("value, good", [("2024-02-29", True), ("2024-13-01", False), ("yesterday", False),
                                         ("2024-1-1", False), (None, False), (20240101, False)])
def test_capture_dates(value, good):
    assert rows_module.captured({"captured": value}) == (value if good else "")


# ---- the log of a row

def test_log_is_added_to_and_the_row_given_stays():
    row = GOOD | {"transformations": [{"op": "crawl"}]}
    new = add_transformation(add_transformation(row, "strip", what="footer", text="a line"), "split", part=2)
    assert row == GOOD | {"transformations": [{"op": "crawl"}]}
    assert [e["op"] for e in new["transformations"]] == ["crawl", "strip", "split"]
    assert new["text"] == "a line" and new["transformations"][1]["what"] == "footer"
    assert new["transformations"][1]["text_sha"] == hashlib.sha256(b"a line").hexdigest()[:16]
    assert check_chain(new) == 2 and check_chain(row) == 0
    assert check_chain(json.loads(json.dumps(new))) == 2


def tampered(row):
    log = row["transformations"]
    yield "text", row | {"text": "a line!"}
    yield "source", row | {"source": "MIRROR"}
    yield "licence", row | {"licence": "MIT"}
    yield "captured", row | {"captured": "2020-01-01"}
    yield "parameter", row | {"transformations": [log[0], log[1] | {"what": "header"}, *log[2:]]}
    yield "entry gone", row | {"transformations": [log[0], *log[2:]]}
    yield "last entry gone, text not undone", row | {"transformations": log[:2], "text": "other"}
    yield "order", row | {"transformations": [log[0], log[2], log[1]]}
    yield "first entry", row | {"transformations": [{"op": "copy"}, *log[1:]]}
    yield "hash gone", row | {"transformations": [*log[:2], {k: v for k, v in log[2].items() if k != "chain"}]}


def test_tampering_breaks_the_chain():
    row = GOOD | {"transformations": [{"op": "crawl"}], "captured": "2024-01-01"}
    row = add_transformation(add_transformation(row, "strip", what="footer", text="a line"), "split", part=2)
    assert check_chain(row) == 2
    for what, other in tampered(row):
        with pytest.raises(ValueError, match="was changed"):
            check_chain(other)
            pytest.fail(what)


def test_assigned_fields_are_logged_and_can_be_taken_back():
    row = add_transformation({**GOOD, "licence": ""}, "crawl")
    new = add_transformation(assign(assign(row, "licence", "MIT"), "licence", "CC0-1.0"), "gate")
    assert new["licence"] == "CC0-1.0" and check_chain(new) == 4
    assert [e.get("was") for e in new["transformations"]] == [None, "", "MIT", None]
    with pytest.raises(ValueError, match="'licence' was changed"):
        check_chain(new | {"licence": "MIT"})
    with pytest.raises(ValueError, match="not assigned"):
        assign(row, "text", "x")


@pytest.mark.parametrize("op, params", [(" ", {}), ("strip", {"chain": 1}), ("strip", {"x": {1}}),
                                        ("strip", {"x": float("nan")})])
def test_log_refuses(op, params):
    with pytest.raises(ValueError):
        add_transformation(GOOD, op, **params)
