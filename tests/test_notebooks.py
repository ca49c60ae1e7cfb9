"""The notebooks: present, executed, in step with their sources, and within the rules of notebooks/lint.py.

The linter, the builder and nbval are each shown to fail on a planted fault. What the cells compute is compared by
`pytest --nbval` (tests/run_all.py); `make papermill` reruns every notebook in the smoke profile with another seed.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import build
import lint
import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
REQUIRED = {"00", "01", "02", "03", "04", "05", "06", "07", "08", "09", "10", "11", "12", "15", "16", "18"}
OTHER_SEED = 7

HEADER = "# ---\n# jupyter:\n#   lifecycle:\n#     rows: [S1-12, S3-7.01]\n# ---\n"
TINY = (
    HEADER
    + """# %% [markdown]
# # Is one and one two?
# %% tags=["parameters"]
profile = "laptop"
seed = 3
steps = 2
# %% editable=false tags=["algorithm"]
total = sum(range(steps + 1))
print("total", total)
# %% [markdown]
# The same again:
# %%
total * 2
# %%
import matplotlib.pyplot as plt
plt.plot([1, 2])
plt.show()
print("from", 1, "to", 2)
"""
)


@pytest.fixture(autouse=True)
def kernels_draw(monkeypatch):
    """Unit tests draw into nothing (conftest.py); a kernel draws into its notebook."""
    monkeypatch.delenv("MPLBACKEND", raising=False)


def good_book() -> dict:
    """A notebook, as nbformat reads it, that keeps every rule."""
    new = nbformat.v4
    book = new.new_notebook(metadata={"kernelspec": dict(build.KERNEL), "lifecycle": {"rows": ["S1-12"]}})
    sources = ['profile = "laptop"\nseed = 0\nsteps = 2', "draw()", "print(score)"]
    outputs = [
        [],
        [new.new_output("display_data", {"image/png": "aW1hZ2U=", "text/plain": "<Figure size 640x480 with 1 Axes>"})],
        [new.new_output("stream", name="stdout", text="score 0.98\n")],
    ]
    for count, (source, shown) in enumerate(zip(sources, outputs, strict=True), 1):
        book.cells.append(new.new_markdown_cell("word " * (lint.CAP_WORDS - 1)))
        book.cells.append(new.new_code_cell(source, execution_count=count, outputs=shown))
    book.cells[1].metadata["tags"] = ["parameters"]
    return book


def stream(text: str, name: str = "stdout") -> nbformat.NotebookNode:
    return nbformat.v4.new_output("stream", name=name, text=text)


def set_cell(index: int, **fields) -> Callable[[dict], None]:
    """A fault: the cell with these fields changed."""
    return lambda book: book.cells[index].update(fields)


def tag_cell(index: int, *names: str) -> Callable[[dict], None]:
    """A fault: the cell with these tags added."""
    return lambda book: book.cells[index].metadata.setdefault("tags", []).extend(names)


def append_cells(*sources: str, tag: str | None = None) -> Callable[[dict], None]:
    """A fault: these cells at the end, executed, without outputs."""

    def fault(book: dict) -> None:
        for source in sources:
            count = 1 + sum(cell.cell_type == "code" for cell in book.cells)
            book.cells.append(nbformat.v4.new_code_cell(source, execution_count=count))
            if tag:
                book.cells[-1].metadata["tags"] = [tag]

    return fault


FAULTS: dict[str, tuple[str, Callable[[dict], None]]] = {
    "a cell never run": ("executed", set_cell(3, execution_count=None)),
    "run out of order": ("executed", set_cell(3, execution_count=5)),
    "an empty cell": ("executed", set_cell(3, source=" ")),
    "an error": ("clean_outputs", set_cell(3, outputs=[nbformat.v4.new_output("error", ename="E", evalue="")])),
    "stderr": ("clean_outputs", set_cell(1, outputs=[stream("warning", "stderr")])),
    "no parameters": ("parameters", lambda book: book.cells[1].metadata.pop("tags")),
    "parameters twice": ("parameters", tag_cell(3, "parameters")),
    "no seed": ("parameters", set_cell(1, source='profile = "a"\nn_seeds = 2\nsteps = 3')),
    "two parameters": ("parameters", set_cell(1, source='profile = "a"\nseed = 2')),
    "a computed parameter": ("parameters", set_cell(1, source='profile = "a"\nseed = 2\nsteps = 2 * seed')),
    "a list parameter": ("parameters", set_cell(1, source='profile = "a"\nseed = 2\nsteps = [1, 2]')),
    "an import among them": ("parameters", set_cell(1, source='import os\nprofile = "a"\nseed = 2\nsteps = 1')),
    "long cells": ("cell_lengths", lambda book: [set_cell(i, source="x = 1\n" * 7)(book) for i in (3, 5)]),
    "one long cell": ("cell_lengths", set_cell(3, source="x = 1\n" * 31)),
    "a long algorithm": ("cell_lengths", append_cells("x = 1\n" * 41, tag="algorithm")),
    "two algorithms": ("cell_lengths", append_cells("x = 1", "x = 2", tag="algorithm")),
    "120 words": ("prose", set_cell(2, source="word " * lint.CAP_WORDS)),
    "120 words in two cells": ("prose", lambda book: book.cells.insert(3, nbformat.v4.new_markdown_cell("one"))),
    "no language": ("metadata", lambda book: book.metadata.kernelspec.pop("language")),
    "no kernel": ("metadata", lambda book: book.metadata.pop("kernelspec")),
    "no rows": ("metadata", lambda book: book.metadata.pop("lifecycle")),
    "not a row": ("metadata", lambda book: book.metadata.lifecycle.update(rows=["seven"])),
    "skipped": ("ignored_outputs", tag_cell(3, "nbval-skip")),
    "raises": ("ignored_outputs", tag_cell(3, "raises-exception")),
    "ignored by comment": ("ignored_outputs", set_cell(3, source="# NBVAL_IGNORE_OUTPUT\ndraw()")),
    "ignored too often": (
        "ignored_outputs",
        append_cells(*["x = 1"] * (lint.MAX_IGNORED_OUTPUTS + 1), tag="nbval-ignore-output"),
    ),
    "a figure alone": ("figures", set_cell(5, outputs=[])),
    "a figure with words": ("figures", set_cell(5, outputs=[stream("see how it falls")])),
    "a machine path": ("machine_paths", set_cell(5, outputs=[stream("1 saved to /" + "home/me/x")])),
    "a path in a repr": (
        "machine_paths",
        set_cell(5, outputs=[nbformat.v4.new_output("execute_result", {"text/plain": "'file://" + "/" + "root/1'"})]),
    ),
}


def test_a_good_notebook_keeps_every_rule():
    assert lint.lint(good_book()) == {}


@pytest.mark.parametrize(("rule", "fault"), FAULTS.values(), ids=FAULTS)
def test_linter_catches(rule, fault):
    book = copy.deepcopy(good_book())
    fault(book)
    assert set(lint.lint(book)) == {rule}


def test_linter_catches_a_notebook_without_code():
    assert lint.lint({**good_book(), "cells": []})["executed"] == ["no code cell"]


def test_every_rule_has_a_planted_fault():
    assert {rule for rule, _ in FAULTS.values()} == {rule.__name__ for rule in lint.RULES}


def test_what_is_allowed_passes():
    book = good_book()
    append_cells("x = 1\n" * 40, tag="algorithm")(book)
    append_cells(*["x = 1"] * lint.MAX_IGNORED_OUTPUTS, tag="nbval-ignore-output")(book)
    book.cells[0].source = "word " * 500  # before the first cell, and after the last, prose is free
    book.cells.append(nbformat.v4.new_markdown_cell("word " * 500))
    assert lint.lint(book) == {}


def test_words_are_what_is_read():
    assert lint.word_count("# A [link here](https://x.y/a b) and ![a figure](x.png)\n\n| a | b |\n|---|---|") == 8


def test_the_bound_on_ignored_outputs_only_falls():
    assert lint.MAX_IGNORED_OUTPUTS <= 4


def test_required_notebooks_are_there():
    assert REQUIRED <= {path.name[:2] for path in NOTEBOOKS}


def test_sources_and_notebooks_agree():
    assert build.check() == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_keeps_the_rules(path):
    assert lint.lint(nbformat.read(path, as_version=4)) == {}


# --- the builder -----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder of notebooks with one source, inside a name that is no machine's."""
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "90_tiny.py").write_text(TINY)
    return tmp_path


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The same, built once; tests that change it copy it."""
    folder = tmp_path_factory.mktemp("built")
    (folder / "src").mkdir()
    (folder / "src" / "90_tiny.py").write_text(TINY)
    build.build(folder / "src" / "90_tiny.py", folder)
    return folder


def test_source_is_read_the_same_each_time(folder):
    source = folder / "src" / "90_tiny.py"
    first, second = build.read_source(source), build.read_source(source)
    assert first == second
    assert first.metadata.lifecycle.rows == ["S1-12", "S3-7.01"]
    assert first.metadata.kernelspec.language == "python"
    assert first.cells[2].metadata == {"tags": ["algorithm"]}  # `editable` is dropped
    source.write_text(TINY + "# %%\ntotal * 2\n# %% [markdown]\n# total * 2\n")
    ids = [cell.id for cell in build.read_source(source).cells]
    assert ids[:6] == [cell.id for cell in first.cells]
    assert len(set(ids)) == 8 and ids[6] == f"{ids[4]}-2" and not ids[7].startswith(ids[4])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (TINY.removeprefix(HEADER), "no curriculum rows"),
        (TINY.replace("S1-12", "seven"), "'seven' is not a row id"),
        (TINY.replace("S3-7.01", "S1-12"), "named twice"),
        (HEADER + "# %% [markdown]\n# words\n", "no code cell"),
    ],
)
def test_bad_sources_are_refused(folder, source, message):
    (folder / "src" / "90_tiny.py").write_text(source)
    with pytest.raises(build.BuildError, match=message):
        build.read_source(folder / "src" / "90_tiny.py")


def test_built_notebook_is_executed_and_clean(built):
    book = nbformat.read(built / "90_tiny.ipynb", as_version=4)
    assert lint.lint(book) == {} and build.check(built) == []
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert code[1].outputs[0].text == "total 3\n" and code[2].outputs[0].data["text/plain"] == "6"
    assert [set(cell.metadata) <= set(build.KEPT) for cell in book.cells] == [True] * 6
    assert "image/png" in code[3].outputs[0].data
    assert [path.name for path in built.iterdir() if path.name.endswith(".tmp")] == []


def test_failing_cell_is_told_and_the_old_notebook_stays(folder):
    source, target = folder / "src" / "90_tiny.py", folder / "90_tiny.ipynb"
    target.write_text("the old one")
    source.write_text(TINY.replace("total * 2", "total / 0"))
    with pytest.raises(build.BuildError) as caught:
        build.build(source, folder)
    assert "code cell 3 failed" in str(caught.value)
    assert "total / 0" in str(caught.value) and "ZeroDivisionError" in str(caught.value)
    assert target.read_text() == "the old one"


def edited(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def test_drift_is_seen_from_both_sides(built, tmp_path):
    def fresh(name: str) -> tuple[Path, Path, Path]:
        folder = tmp_path / name
        (folder / "src").mkdir(parents=True)
        source, target = folder / "src" / "90_tiny.py", folder / "90_tiny.ipynb"
        source.write_text(TINY)
        target.write_text((built / "90_tiny.ipynb").read_text())
        assert build.check(folder) == []
        return folder, source, target

    folder, source, _ = fresh("source edited")
    edited(source, "total * 2", "total * 3")
    assert "another source" in build.check(folder)[0]
    folder, _, target = fresh("notebook edited")
    edited(target, "total * 2", "total * 3")
    assert "another source" in build.check(folder)[0]
    folder, _, target = fresh("tag lost")
    edited(target, '"algorithm"', '"other"')
    assert "another metadata" in build.check(folder)[0]
    folder, source, _ = fresh("cell added")
    source.write_text(TINY + "# %%\n1\n")
    assert "6 cells, its source has 7" in build.check(folder)[0]
    folder, source, _ = fresh("rows changed")
    edited(source, "S3-7.01", "S3-7.02")
    assert "'lifecycle'" in build.check(folder)[0]
    folder, source, _ = fresh("source gone")
    source.unlink()
    assert "no source" in build.check(folder)[0]
    folder, _, target = fresh("notebook gone")
    target.unlink()
    assert "no notebook" in build.check(folder)[0]


def test_widget_ids_do_not_change():
    def shown(first: str, second: str) -> dict:
        view = {"application/vnd.jupyter.widget-view+json": {"model_id": second}}
        state = {first: {}, second: {"layout": first}}
        book = nbformat.v4.new_notebook(metadata={"widgets": {"json": {"state": state}}})
        book.cells = [nbformat.v4.new_code_cell("w", id="a", outputs=[nbformat.v4.new_output("display_data", view)])]
        return build.rename_widgets(book, [first, second])

    assert shown("a" * 32, "b" * 32) == shown("d" * 32, "c" * 32)


# --- nbval and papermill ---------------------------------------------------------------------------------------------


def nbval(path: Path) -> subprocess.CompletedProcess:
    """What run_all.py does with the notebooks, for one of them, in its own folder."""
    sanitize = ROOT / "tests" / "nbval_sanitize.cfg"
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--nbval", "-p", "no:cacheprovider", "--rootdir", str(path.parent)]
        + ["--nbval-sanitize-with", str(sanitize), str(path)],
        cwd=path.parent,
        capture_output=True,
        text=True,
    )


def test_nbval_compares_committed_outputs(built, tmp_path):
    """It passes what is right, and fails a wrong number, though not a clock: the sanitizer knows those."""
    path = tmp_path / "90_tiny.ipynb"
    path.write_text((built / "90_tiny.ipynb").read_text())
    assert "4 passed" in nbval(path).stdout
    edited(path, "total 3", "total 4")
    wrong = nbval(path)
    assert wrong.returncode == 1 and "1 failed, 3 passed" in wrong.stdout


def test_sanitizer_hides_clocks_and_keeps_results():
    import configparser
    import re

    rules = configparser.RawConfigParser()
    rules.read(ROOT / "tests" / "nbval_sanitize.cfg")

    def clean(text: str) -> str:
        for section in rules.sections():
            text = re.sub(rules[section]["regex"], rules[section]["replace"], text, flags=re.DOTALL)
        return text

    same = [
        ("took 12.5 s", "took 3 s"),
        ("11,400 tokens/s", "9 tokens/s"),
        ("peak memory 812.5 MB", "peak memory 9 MB"),
        ("<x at 0x7f00aa11bb22>", "<x at 0x7f00aa11bb33>"),
        ("stage 0123456789abcdef", "stage fedcba9876543210"),
        ("100%|###| 3/3 [00:00<00:00, 187.91it/s]", "100%|###| 3/3 [00:01<00:00, 2.1it/s]"),
    ]
    for left, right in same:
        assert clean(left) == clean(right) != left
    for result in ("exact .98 on 512 cases", "int8 0.98x", "30d window, 12d", "712 KB of weights", "loss 0.693"):
        assert clean(result) == result


@pytest.mark.skipif(not os.environ.get("LIFECYCLE_PAPERMILL"), reason="make papermill sets LIFECYCLE_PAPERMILL=1")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_papermill_reruns_in_the_smoke_profile(path, tmp_path):
    """Another seed and the smallest profile: every cell still runs, whatever the numbers."""
    run_with_papermill(path, tmp_path / path.name, profile="smoke", seed=OTHER_SEED)


def run_with_papermill(path: Path, target: Path, **parameters) -> nbformat.NotebookNode:
    """Rerun a notebook with other parameters; papermill raises when a cell does."""
    import papermill

    papermill.execute_notebook(
        str(path), str(target), parameters=parameters, cwd=str(path.parent), progress_bar=False, log_output=False
    )
    return nbformat.read(target, as_version=4)


def test_papermill_sets_parameters(built, tmp_path):
    """On the tiny notebook: the injected value reaches the cells, and a cell that fails is not passed over."""
    import papermill

    ran = run_with_papermill(built / "90_tiny.ipynb", tmp_path / "out.ipynb", steps=4)
    assert any(out.get("text") == "total 10\n" for cell in ran.cells for out in cell.get("outputs", []))
    with pytest.raises(papermill.PapermillExecutionError):
        run_with_papermill(built / "90_tiny.ipynb", tmp_path / "bad.ipynb", steps="four")
