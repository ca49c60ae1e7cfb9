"""A user's own text as training documents: one document a line (or a "text" field a JSONL row)."""

from dataclasses import dataclass
from pathlib import Path

from lifecycle_lib.core.records import read_jsonl

MIN_BYTES = 1000


@dataclass(frozen=True, slots=True)
class TextCorpus:
    """Documents of a file, split: every tenth line is held out and never trained on."""

    path: str
    train: list[str]
    held_out: list[str]


def read_corpus(path: str | Path, min_bytes: int = MIN_BYTES) -> TextCorpus:
    """Read a UTF-8 text file (.txt, .csv, .tsv: a line is a document) or .jsonl (field "text").

    Raises ValueError naming file, line and fix: missing, empty, binary, not UTF-8, shorter than `min_bytes`."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give --corpus a text file")
    raw = path.read_bytes()
    if not raw.strip():
        raise ValueError(f"{path}: the file is empty; give --corpus a file with text in it")
    if b"\0" in raw:
        line = raw[:raw.index(b"\0")].count(b"\n") + 1
        raise ValueError(f"{path}:{line}: a zero byte: this is a binary file; give --corpus plain UTF-8 text")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as err:
        line = raw[:err.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line}: byte 0x{raw[err.start]:02x} is not UTF-8; save the file as UTF-8") from None
    if path.suffix == ".jsonl":
        documents = [row["text"].strip() for row in read_jsonl(path, required={"text": str})]
    else:
        documents = [line.strip() for line in text.splitlines()]
    documents = [d for d in documents if d]
    size = sum(len(d.encode()) for d in documents)
    if size < min_bytes or len(documents) < 2:
        raise ValueError(f"{path}: {size} bytes of text in {len(documents)} lines is shorter than a block; "
                         f"give at least {min_bytes} bytes in 2 lines")
    held_out = documents[9::10] or documents[-1:]
    keep = [d for i, d in enumerate(documents) if i % 10 != 9] if len(documents) >= 10 else documents[:-1]
    return TextCorpus(str(path), keep, held_out)
