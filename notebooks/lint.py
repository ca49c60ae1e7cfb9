"""The rules a committed notebook keeps, from its anatomy and from what nbval and papermill cannot see.

    python notebooks/lint.py [PREFIX ...]       one line per broken rule; exit 1 if there is any

Each rule is a function of the notebook that returns what is wrong, and RULES lists them all. Words and lines are
bounded because a learner reads one idea at a time; the rest keeps the check honest: nbval compares nothing in a cell
that was never run, and nothing of a picture, so every cell is run and every figure has its numbers printed beside it.
"""

from __future__ import annotations

import ast
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
from build import HERE, ROW, check

MEDIAN_LINES = 6
CAP_LINES = 30
CAP_ALGORITHM_LINES = 40
CAP_WORDS = 120  # fewer than this between two runnable cells
# Cells of one notebook whose output nbval may ignore: clocks and raw losses. This number may only fall.
MAX_IGNORED_OUTPUTS = 4
FORBIDDEN_TAGS = {
    "nbval-skip": "nbval would not run it",
    "skip": "nbval would not run it",
    "raises-exception": "papermill exits 1 on it; catch the error in the cell",
}
NBVAL_COMMENT = re.compile(r"^\s*#\s*(NBVAL_\w+|PYTEST_VALIDATE_IGNORE_OUTPUT)", re.MULTILINE)
MACHINE_PATH = re.compile(r"(?<![\w.)\]}-])(?:/(?:work|root|home|opt|tmp|Users|mnt)/|[A-Z]:\\\\?Users)")


def code_cells(book: dict) -> Iterator[tuple[int, dict]]:
    """Each code cell with its position among all cells, from 1."""
    for position, cell in enumerate(book["cells"], 1):
        if cell["cell_type"] == "code":
            yield position, cell


def tags(cell: dict) -> list[str]:
    """The tags of a cell."""
    return cell["metadata"].get("tags", [])


def line_count(cell: dict) -> int:
    """Lines of a cell's source, blank ones included."""
    return len(cell["source"].strip().splitlines())


def texts(cell: dict) -> Iterator[str]:
    """Every piece of text that a code cell's outputs show: streams, and each text form of what they display."""
    for output in cell["outputs"]:
        if output["output_type"] == "stream":
            yield output["text"]
        for kind, value in output.get("data", {}).items():
            if kind.startswith("text/") or kind == "image/svg+xml":
                yield value


def prints_numbers(cell: dict) -> bool:
    """Does the cell show text with a digit in it? The repr of a figure does not count."""
    shown = []
    for output in cell["outputs"]:
        data = output.get("data", {})
        if output["output_type"] == "stream" and output["name"] == "stdout":
            shown.append(output["text"])
        elif not any(kind.startswith("image/") for kind in data):
            shown.append(data.get("text/plain", ""))
    return any(re.search(r"\d", text) for text in shown)


def executed(book: dict) -> list[str]:
    """Every code cell has code, and was run once, in order, in one kernel."""
    found, expected = [], 1
    for position, cell in code_cells(book):
        if not cell["source"].strip():
            found.append(f"cell {position}: an empty code cell")
        elif cell.get("execution_count") is None:
            found.append(f"cell {position}: never run (nbval would compare nothing)")
        elif cell["execution_count"] != expected:
            found.append(f"cell {position}: run as number {cell['execution_count']}, not {expected}")
        expected += 1
    return found if expected > 1 else ["no code cell"]


def clean_outputs(book: dict) -> list[str]:
    """No error and no stderr stands in the outputs."""
    found = []
    for position, cell in code_cells(book):
        for output in cell["outputs"]:
            if output["output_type"] == "error":
                found.append(f"cell {position}: an error stands in the outputs: {output['ename']}")
            if output["output_type"] == "stream" and output["name"] == "stderr":
                found.append(f"cell {position}: stderr output: {output['text'].strip()[:60]!r}")
    return found


def parameters(book: dict) -> list[str]:
    """One `parameters` cell of 3 to 6 flat scalars, `profile` and `seed` among them: what papermill sets."""
    cells = [(position, cell) for position, cell in code_cells(book) if "parameters" in tags(cell)]
    if len(cells) != 1:
        return [f"{len(cells)} cells tagged parameters, not 1"]
    position, cell = cells[0]
    names = []
    for statement in ast.parse(cell["source"]).body:
        target = statement.targets[0] if isinstance(statement, ast.Assign) else None
        if not isinstance(target, ast.Name):
            return [f"cell {position}: parameters are lines NAME = VALUE and nothing else"]
        try:
            value = ast.literal_eval(statement.value)
        except ValueError:
            return [f"cell {position}: parameter {target.id} is not a plain value"]
        if not isinstance(value, str | int | float | bool):
            return [f"cell {position}: parameter {target.id} is not a scalar"]
        names.append(target.id)
    found = [f"cell {position}: no parameter {name}" for name in ("profile", "seed") if name not in names]
    if not 3 <= len(names) <= 6:
        found.append(f"cell {position}: {len(names)} parameters, not 3 to 6")
    return found


def cell_lengths(book: dict) -> list[str]:
    """Short cells: median at most 6 lines, none over 30, but one tagged `algorithm` may have 40."""
    lengths = [line_count(cell) for _, cell in code_cells(book)]
    found = []
    if lengths and statistics.median(lengths) > MEDIAN_LINES:
        found.append(f"median code cell of {statistics.median(lengths):g} lines, at most {MEDIAN_LINES}")
    algorithms = [position for position, cell in code_cells(book) if "algorithm" in tags(cell)]
    if len(algorithms) > 1:
        found.append(f"cells {algorithms}: more than one tagged algorithm")
    for position, cell in code_cells(book):
        cap = CAP_ALGORITHM_LINES if "algorithm" in tags(cell) else CAP_LINES
        if line_count(cell) > cap:
            found.append(f"cell {position}: {line_count(cell)} lines, at most {cap}")
    return found


def word_count(markdown: str) -> int:
    """Words a reader reads: not the addresses of links and pictures, not rules of tables, not tags."""
    text = re.sub(r"\]\([^)]*\)|<[^>]*>", " ", markdown)
    return sum(bool(re.search(r"\w", token)) for token in text.split())


def prose(book: dict) -> list[str]:
    """Under 120 words between two runnable cells (before the first and after the last one there is no bound)."""
    found, words, since = [], 0, None
    for position, cell in enumerate(book["cells"], 1):
        if cell["cell_type"] == "markdown":
            words += word_count(cell["source"])
        elif cell["cell_type"] == "code":
            if since is not None and words >= CAP_WORDS:
                found.append(f"cells {since} to {position}: {words} words between them, under {CAP_WORDS}")
            words, since = 0, position
    return found


def metadata(book: dict) -> list[str]:
    """The kernel names its language (papermill needs it) and the notebook its curriculum rows."""
    found = []
    if book["metadata"].get("kernelspec", {}).get("language") != "python":
        found.append("metadata kernelspec.language is not python")
    rows = book["metadata"].get("lifecycle", {}).get("rows", [])
    if not rows or not all(ROW.fullmatch(row) for row in rows):
        found.append("metadata lifecycle.rows names no curriculum rows, or something that is not one")
    return found


def ignored_outputs(book: dict) -> list[str]:
    """Few outputs that nbval ignores, by tag only, and no cell that it skips."""
    found, ignored = [], 0
    for position, cell in code_cells(book):
        ignored += "nbval-ignore-output" in tags(cell)
        found += [f"cell {position}: tag {tag}: {FORBIDDEN_TAGS[tag]}" for tag in tags(cell) if tag in FORBIDDEN_TAGS]
        if NBVAL_COMMENT.search(cell["source"]):
            found.append(f"cell {position}: an nbval comment; use the tag nbval-ignore-output, which is counted")
    if ignored > MAX_IGNORED_OUTPUTS:
        found.append(f"{ignored} cells tagged nbval-ignore-output, at most {MAX_IGNORED_OUTPUTS}")
    return found


def figures(book: dict) -> list[str]:
    """A figure has its numbers printed, by its own cell or by the next code cell."""
    cells, found = list(code_cells(book)), []
    for index, (position, cell) in enumerate(cells):
        kinds = [kind for output in cell["outputs"] for kind in output.get("data", {})]
        if any(kind.startswith("image/") for kind in kinds):
            if not any(prints_numbers(near) for _, near in cells[index : index + 2]):
                found.append(f"cell {position}: a figure whose numbers are printed neither there nor in the next cell")
    return found


def machine_paths(book: dict) -> list[str]:
    """No folder of the machine it was built on stands in an output."""
    found = []
    for position, cell in code_cells(book):
        hits = [match.group() for text in texts(cell) for match in MACHINE_PATH.finditer(text)]
        if hits:
            found.append(f"cell {position}: an output names a folder of this machine, under {hits[0]}")
    return found


RULES: tuple[Callable[[dict], list[str]], ...] = (
    executed,
    clean_outputs,
    parameters,
    cell_lengths,
    prose,
    metadata,
    ignored_outputs,
    figures,
    machine_paths,
)


def lint(book: dict) -> dict[str, list[str]]:
    """What each broken rule says of a notebook (nbformat 4, sources as strings); empty when it keeps them all."""
    return {rule.__name__: said for rule in RULES if (said := rule(book))}


def lint_folder(folder: Path = HERE, prefixes: tuple[str, ...] = ()) -> list[str]:
    """One line per broken rule of every notebook of a folder, its agreement with its source included."""
    paths = [p for p in sorted(folder.glob("*.ipynb")) if not prefixes or p.stem.startswith(prefixes)]
    lines = [
        f"{path.name}: {rule}: {said}"
        for path in paths
        for rule, all_said in lint(nbformat.read(path, as_version=4)).items()
        for said in all_said
    ]
    if not paths:
        lines.append(f"no notebook in {folder.name}/ to look at")
    return lines + check(folder, prefixes)


if __name__ == "__main__":
    problems = lint_folder(prefixes=tuple(Path(given).stem for given in sys.argv[1:]))
    print("\n".join(problems) or "every notebook keeps the rules")
    sys.exit(1 if problems else 0)
