"""The glossary: every entry says something, and the terms that notebook 00 sets in bold are in it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lifecycle_lib.core.records import read_json
from lifecycle_lib.lab.notebook import NOTEBOOKS

ROOT = Path(__file__).resolve().parents[2]
BOLD = re.compile(r"\*\*([a-z][a-z ]+)\*\*")


def problems(glossary: dict) -> list[str]:
    """What is wrong with the entries of a glossary."""
    found = []
    for term, entry in glossary.items():
        if set(entry) != {"meaning", "notebook"} or entry["notebook"] not in NOTEBOOKS:
            found.append(f"{term}: needs a meaning and the number of a notebook")
        elif not entry["meaning"].endswith((".", "?")) or not 4 <= len(entry["meaning"].split()) <= 30:
            found.append(f"{term}: the meaning is one sentence or two, 4 to 30 words")
        elif re.match(rf"(an? |the )?{re.escape(term)}\b", entry["meaning"], re.IGNORECASE):
            found.append(f"{term}: defined by itself")
    return found


def undefined(source: str, glossary: dict) -> list[str]:
    """Terms in bold that no entry defines; "manner (probe)" defines manner."""
    known = {re.sub(r" \(.*\)", "", term).lower() for term in glossary}
    return [term for term in BOLD.findall(source) if term not in known]


def test_the_glossary():
    glossary = read_json(ROOT / "data" / "glossary.json")
    assert len(glossary) >= 50 and list(glossary) == sorted(glossary, key=str.lower)
    assert {"model", "system", "agent", "tool", "pipeline"} <= set(glossary)
    assert problems(glossary) == []


def test_bold_terms_of_the_map_are_defined():
    source = ROOT / "notebooks" / "src" / "00_map_and_world.py"
    if not source.is_file():
        pytest.skip("notebooks/src/00_map_and_world.py is not in this checkout")
    assert BOLD.findall(source.read_text())
    assert undefined(source.read_text(), read_json(ROOT / "data" / "glossary.json")) == []


def test_planted_faults_are_caught():
    good = {"meaning": "The numbers that training changes.", "notebook": "00"}
    assert problems({"weights": good}) == []
    for bad in (good | {"notebook": "42"}, {"meaning": "x."}, good | {"meaning": "Numbers."},
                good | {"meaning": "Weights are the weights of it."}):
        assert len(problems({"weights": bad})) == 1, bad
    assert undefined("# the **inner loop** turns", {"outer loop": good}) == ["inner loop"]
