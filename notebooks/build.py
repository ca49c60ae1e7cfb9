"""Build executed notebooks, one way: notebooks/src/NN_topic.py (percent format) to notebooks/NN_topic.ipynb.

    python notebooks/build.py [PREFIX ...] [--jobs N]   execute and write those whose names start so
    python notebooks/build.py --check [PREFIX ...]      run nothing: do sources and notebooks say the same?

A source begins with the rows of the curriculum that its notebook covers, as a YAML header, then its cells:

    # ---
    # jupyter:
    #   lifecycle:
    #     rows: [S1-12, S1-13]
    # ---
    # %% [markdown]
    # # A question for a title
    # %% tags=["parameters"]
    profile = "laptop"

What is written: cell ids are a hash of the cell's kind and source (a repeat gets -2, -3 ...), so rebuilding
changes no id; of a cell's metadata only `tags` and `nbgrader` stay; the notebook's metadata are the kernel
with its language (papermill asks for it), the rows, and the state of the widgets shown, under ids that do not
change. Cells run in a kernel whose folder is notebooks/, with one thread. When a cell fails it is printed with
its traceback and the old notebook stays; a notebook is replaced whole or not at all.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

HERE = Path(__file__).resolve().parent
CELL_LIMIT_S = 1800
KEPT = ("tags", "nbgrader")
ROW = re.compile(r"S\d+-\d+(\.\d+)?[a-o]?|D\d+")
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
ANSI = re.compile(r"\x1b\[[0-9;]*m")


class BuildError(Exception):
    """A source that cannot become a notebook; the message says where and what to do."""


def read_source(path: Path) -> nbformat.NotebookNode:
    """The notebook a source describes, not executed: cells with stable ids, kept metadata, kernel and rows.

    Raises BuildError when the source has no rows, a row id is not one, or there is no code cell.
    """
    raw = jupytext.read(path, fmt="py:percent")
    rows = raw.metadata.get("lifecycle", {}).get("rows", [])
    if not rows:
        raise BuildError(f"{path.name}: no curriculum rows; add the YAML header shown in notebooks/build.py")
    if wrong := [row for row in rows if not ROW.fullmatch(str(row))]:
        raise BuildError(f"{path.name}: {wrong[0]!r} is not a row id such as S1-12 or S3-7.01")
    if len(set(rows)) != len(rows):
        raise BuildError(f"{path.name}: a row is named twice; name each once")
    if not any(cell.cell_type == "code" for cell in raw.cells):
        raise BuildError(f"{path.name}: no code cell; start one with a line '# %%'")
    book = nbformat.v4.new_notebook(metadata={"kernelspec": dict(KERNEL), "lifecycle": {"rows": list(rows)}})
    book.metadata["language_info"] = {"name": "python", "file_extension": ".py", "mimetype": "text/x-python"}
    seen: dict[str, int] = {}
    for cell in raw.cells:
        digest = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:12]
        seen[digest] = seen.get(digest, 0) + 1
        cell_id = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
        metadata = {key: cell.metadata[key] for key in KEPT if key in cell.metadata}
        make = nbformat.v4.new_code_cell if cell.cell_type == "code" else nbformat.v4.new_markdown_cell
        book.cells.append(make(source=cell.source, metadata=metadata, id=cell_id))
    return book


def execute(book: nbformat.NotebookNode, folder: Path) -> None:
    """Run the cells in order, in place, in a fresh kernel in `folder`; the first failing cell raises."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    env.pop("MPLBACKEND", None)  # set, it would keep the figures out of the outputs
    env["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    env.setdefault("LIFECYCLE_STORE", str(HERE.parent / "store"))
    client = NotebookClient(
        book,
        timeout=CELL_LIMIT_S,
        kernel_name=KERNEL["name"],
        record_timing=False,
        extra_arguments=["--log-level=40"],  # ipykernel 7.4 warns of its own transport at every start
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env=env)


def tidy(book: nbformat.NotebookNode, planned: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The executed notebook with the planned metadata and nothing that changes from one run to the next."""
    widgets = book.metadata.get("widgets", {})
    book.metadata = planned.metadata
    if widgets:
        book.metadata["widgets"] = widgets
    for cell, plan in zip(book.cells, planned.cells, strict=True):
        cell.metadata = plan.metadata
    states = [view.get("state", {}) for view in widgets.values()]
    return rename_widgets(book, [model for state in states for model in state])


def rename_widgets(book: nbformat.NotebookNode, models: list[str]) -> nbformat.NotebookNode:
    """Widget models carry random ids: number them in the order in which the notebook first names them."""
    text = json.dumps(book)
    for number, model in enumerate(sorted(models, key=text.index)):
        text = text.replace(model, hashlib.sha256(f"widget {number}".encode()).hexdigest()[:32])
    return nbformat.from_dict(json.loads(text))


def write(book: nbformat.NotebookNode, path: Path) -> None:
    """Validate, then replace the file in one step."""
    nbformat.validate(book)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(nbformat.writes(book) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def build(source: Path, folder: Path = HERE) -> Path:
    """Execute one source and write its notebook into `folder`; BuildError names the failing cell."""
    planned = read_source(source)
    book = nbformat.from_dict(json.loads(json.dumps(planned)))
    try:
        execute(book, folder)
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        raise BuildError(describe_failure(source, book, error)) from error
    target = folder / f"{source.stem}.ipynb"
    write(tidy(book, planned), target)
    return target


def describe_failure(source: Path, book: nbformat.NotebookNode, error: Exception) -> str:
    """The failing cell (the last one that was started), its source, and its traceback where it left one."""
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    number = max((n for n, cell in enumerate(code) if cell.execution_count is not None), default=0)
    cell = code[number]
    traceback = [line for out in cell.outputs if out.output_type == "error" for line in out.traceback]
    shown = ANSI.sub("", "\n".join(traceback or [str(error)]))
    return f"{source.name}: code cell {number + 1} failed\n--- cell\n{cell.source}\n--- traceback\n{shown}"


def drift(source: Path, notebook: Path) -> list[str]:
    """What a source and its notebook say differently, one line each, seen from both sides."""
    if not source.exists():
        return [f"{notebook.name}: no source {source.name}"]
    if not notebook.exists():
        return [f"{source.name}: no notebook {notebook.name}; run `make notebooks`"]
    planned, book = read_source(source), nbformat.read(notebook, as_version=4)
    found = []
    if len(planned.cells) != len(book.cells):
        found.append(f"{notebook.name}: {len(book.cells)} cells, its source has {len(planned.cells)}")
    for number, (want, have) in enumerate(zip(planned.cells, book.cells, strict=False), 1):
        for what in ("cell_type", "source", "id", "metadata"):
            if want[what] != have[what]:
                found.append(f"{notebook.name}: cell {number} has another {what} than its source")
                break
    for key, value in planned.metadata.items():
        if book.metadata.get(key) != value:
            found.append(f"{notebook.name}: metadata {key!r} is not what its source says")
    return found


def check(folder: Path = HERE, prefixes: tuple[str, ...] = ()) -> list[str]:
    """Every difference between folder/src/*.py and folder/*.ipynb, either one missing included."""
    stems = {path.stem for path in [*(folder / "src").glob("*.py"), *folder.glob("*.ipynb")]}
    if prefixes:
        stems = {stem for stem in stems if stem.startswith(prefixes)}
    return [line for stem in sorted(stems) for line in check_one(folder, stem)]


def check_one(folder: Path, stem: str) -> list[str]:
    """`drift` for one notebook, a source that cannot be read included."""
    try:
        return drift(folder / "src" / f"{stem}.py", folder / f"{stem}.ipynb")
    except BuildError as error:
        return [str(error)]


def attempt(source: Path) -> str | None:
    """Build one; None when it worked, otherwise what to tell."""
    try:
        build(source)
    except BuildError as error:
        return str(error)
    return None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build notebooks/*.ipynb from notebooks/src/*.py.")
    parser.add_argument("prefix", nargs="*", help="build only the notebooks whose name starts so, such as 07")
    parser.add_argument("--check", action="store_true", help="compare, run nothing")
    parser.add_argument("--jobs", type=int, default=1, help="notebooks at a time (default 1)")
    args = parser.parse_args(argv)
    prefixes = tuple(Path(given).stem for given in args.prefix)
    sources = [s for s in sorted((HERE / "src").glob("*.py")) if not prefixes or s.stem.startswith(prefixes)]
    if not sources:
        print(f"no source in notebooks/src starts with {' or '.join(prefixes) or 'it'}", file=sys.stderr)
        return 1
    if args.check:
        problems = check(HERE, prefixes)
        print("\n".join(problems) or f"{len(sources)} notebooks say what their sources say")
        return 1 if problems else 0
    failures = 0
    with ProcessPoolExecutor(max_workers=max(1, args.jobs)) as pool:
        for source, problem in zip(sources, pool.map(attempt, sources), strict=True):
            failures += problem is not None
            print(f"built {source.stem}.ipynb" if problem is None else f"FAILED {problem}", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
