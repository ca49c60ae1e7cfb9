"""Notebook 01 on other people's text: two public files, run by papermill in the smoke profile.

The reference number is not ours: a bigram counted on makemore's names.txt, lines as names with a start and an end
token, costs 2.4540 nats a character. `count` states it a second way, in plain Python, and the notebook must print it.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "notebooks" / "01_bigram_to_gpt.ipynb"
PRINTED = re.compile(r"count-bigram NLL over all ([\d,]+) documents: (\d\.\d{4}) nats per byte")


def file(data: Path, name: str) -> Path:
    path = data / "corpora" / name
    if not path.is_file():
        pytest.skip(f"{name} is not in the public data: put it into {data.name}/corpora")
    return path


def count(path: Path, ends: bool = True) -> float:
    """Mean -ln p of a count bigram over the lines of a file; each line starts and ends with the same token."""
    edge = "\n" if ends else ""
    lines = [edge + line.strip() + edge for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    pairs = Counter(pair for line in lines for pair in pairwise(line))
    rows: Counter = Counter()
    for (left, _), n in pairs.items():
        rows[left] += n
    return -sum(n * math.log(n / rows[left]) for (left, _), n in pairs.items()) / sum(pairs.values())


def run(corpus: Path, tmp_path: Path) -> str:
    """Everything the notebook prints with `corpus` as its text; papermill raises when a cell does."""
    papermill = pytest.importorskip("papermill")
    if not NOTEBOOK.is_file():
        pytest.skip("notebooks/01_bigram_to_gpt.ipynb is not built: run `make notebooks`")
    target = tmp_path / "out.ipynb"
    kept = {key: os.environ.get(key) for key in ("MPLBACKEND", "PYTHONPATH")}
    os.environ.pop("MPLBACKEND", None)
    os.environ["PYTHONPATH"] = str(ROOT)
    try:
        papermill.execute_notebook(str(NOTEBOOK), str(target), cwd=str(NOTEBOOK.parent), progress_bar=False,
                                   log_output=False, parameters={"profile": "smoke", "seed": 1, "corpus": str(corpus)})
    finally:
        os.environ.update({key: value for key, value in kept.items() if value is not None})
        if kept["PYTHONPATH"] is None:
            os.environ.pop("PYTHONPATH")
    cells = nbformat.read(target, as_version=4).cells
    return "".join(out.get("text", "") for cell in cells for out in cell.get("outputs", []))


def test_names_cost_what_the_reference_says(real_data, tmp_path):
    path = file(real_data, "names.txt")
    assert f"{count(path):.4f}" == "2.4540"
    documents, nll = PRINTED.search(run(path, tmp_path)).groups()
    assert (documents, nll) == ("32,033", "2.4540")


def test_without_start_and_end_the_number_is_another(real_data):
    """The planted fault: leave the ends out and the number is another, so 2.4540 proves that they are counted."""
    assert abs(count(file(real_data, "names.txt"), ends=False) - 2.4540) > 0.01


def test_shakespeare_is_read_too(real_data, tmp_path):
    path = file(real_data, "tinyshakespeare.txt")
    shown = run(path, tmp_path)
    assert PRINTED.search(shown).group(2) == f"{count(path):.4f}"
    assert "your text holds no ledgers: skipped" in shown
