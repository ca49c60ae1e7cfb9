"""A user's own text: what is read, how it is split, and what is refused with file and line."""

import json

import pytest

from lifecycle_lib.corpus.text import MIN_BYTES, read_corpus

LINES = [f"line {i:02d} " + "words " * 20 for i in range(30)]


def test_by_hand(tmp_path):
    path = tmp_path / "own.txt"
    path.write_text("\n".join(LINES) + "\n\n", encoding="utf-8")
    corpus = read_corpus(path)
    assert corpus.path == str(path)
    assert corpus.held_out == [LINES[9].strip(), LINES[19].strip(), LINES[29].strip()]
    assert len(corpus.train) == 27 and not set(corpus.train) & set(corpus.held_out)
    assert sorted(corpus.train + corpus.held_out) == [x.strip() for x in LINES]


@pytest.mark.parametrize("n", [2, 9, 10, 11, 40])
def test_every_document_is_on_exactly_one_side(tmp_path, n):
    path = tmp_path / "own.csv"
    documents = [f"{i}," + "x" * MIN_BYTES for i in range(n)]
    path.write_text("\r\n".join(documents), encoding="utf-8")
    corpus = read_corpus(path)
    assert sorted(corpus.train + corpus.held_out) == sorted(documents)
    assert corpus.train and corpus.held_out and not set(corpus.train) & set(corpus.held_out)


def test_jsonl_and_a_byte_order_mark(tmp_path):
    rows = tmp_path / "own.jsonl"
    rows.write_text("".join(json.dumps({"text": line, "id": i}) + "\n" for i, line in enumerate(LINES)))
    plain = tmp_path / "own.txt"
    plain.write_bytes(b"\xef\xbb\xbf" + "\n".join(LINES).encode())
    a, b = read_corpus(rows), read_corpus(plain)
    assert a.train == b.train and a.held_out == b.held_out and a.train[0] == LINES[0].strip()
    rows.write_text('{"text": "fine"}\n{"txt": "not"}\n')
    with pytest.raises(ValueError, match=r"own.jsonl:2: field 'text' is missing"):
        read_corpus(rows)


@pytest.mark.parametrize(("content", "message"), [
    (b"", "is empty"), (b" \n\t\n", "is empty"),
    (b"one\ntwo\nth\0ree", ":3: a zero byte"),
    ("\n".join(LINES).encode() + b"\nna\xefve", ":31: byte 0xef is not UTF-8"),
    ("naïve\n".encode("latin-1"), ":1: byte 0xef is not UTF-8"),
    (b"short\ntext", "9 bytes of text in 2 lines is shorter than a block"),
    (b"x" * 5000, "5000 bytes of text in 1 lines is shorter"),
])
def test_refused(tmp_path, content, message):
    path = tmp_path / "own.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_corpus(path)
    assert str(error.value).startswith(str(path)) and message in str(error.value)


def test_missing_or_a_folder(tmp_path):
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(ValueError, match="no such file; give --corpus"):
            read_corpus(path)


def test_the_limit_is_the_callers(tmp_path):
    path = tmp_path / "own.txt"
    path.write_text("one\ntwo")
    assert read_corpus(path, min_bytes=6).train == ["one"]
    with pytest.raises(ValueError, match="at least 7 bytes"):
        read_corpus(path, min_bytes=7)


def test_real_text(real_data):
    path = next((p for p in sorted(real_data.rglob("*.txt")) if "shakespeare" in p.name.lower() or
                 "shakespeare" in p.parent.name.lower()), None)
    if path is None:
        pytest.skip("no tinyshakespeare text in the data folder")
    corpus = read_corpus(path)
    lines = [x.strip() for x in path.read_text(encoding="utf-8").splitlines() if x.strip()]
    assert len(corpus.train) + len(corpus.held_out) == len(lines) and len(corpus.held_out) == len(lines) // 10
