"""The house's rules, read from the imports: floors, cycles, and sizes. Each is shown to catch a planted violation.

core is the ground; a file imports only folders on a strictly lower floor, or its own. Modules beside the folders
(lifecycle_lib/x.py) are doors to the house: they may import any folder, and no folder may import them.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

LIBRARY = Path(__file__).resolve().parent.parent / "lifecycle_lib"
PACKAGE = "lifecycle_lib"
FLOORS = {"core": 0, "desk": 1, "model": 1, "corpus": 2, "train": 2, "serve": 3, "judge": 3, "lab": 4}
DOOR = 5
MAX_FILE_LINES = 400
MAX_LIBRARY_LINES = 13000  # without the experiments
MAX_STUDIES_LINES = 5000  # lab/studies: each is read beside its notebook


def module_name(path: Path, library: Path) -> str:
    """lifecycle_lib/core/store.py as lifecycle_lib.core.store; a package's __init__.py as the package."""
    parts = path.relative_to(library.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def read_modules(library: Path) -> dict[str, Path]:
    """Every module of the library by name."""
    return {module_name(path, library): path for path in sorted(library.rglob("*.py"))}


def imported(name: str, path: Path, modules: dict[str, Path]) -> Iterator[str]:
    """The modules of the library that a file imports: anywhere in it, absolute, relative, or by import_module."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        wanted: list[str] = []
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            wanted = [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                wanted = [str(node.args[0].value)]
        for target in wanted:
            if target.split(".")[0] != PACKAGE:
                continue
            # `from a.b import c`: c is a module, or a name inside a.b
            yield target if target in modules or is_folder(target, modules) else target.rpartition(".")[0]


def is_folder(target: str, modules: dict[str, Path]) -> bool:
    """Is it a package, with or without an __init__.py?"""
    own = modules.get(target)
    return (own is not None and own.name == "__init__.py") or any(name.startswith(target + ".") for name in modules)


def folder_of(name: str, modules: dict[str, Path]) -> str | None:
    """core for lifecycle_lib.core.store; None for the package itself and the modules beside the folders."""
    parts = name.split(".")
    if len(parts) > 2:
        return parts[1]
    return parts[1] if len(parts) == 2 and is_folder(name, modules) else None


def floor_violations(library: Path) -> list[str]:
    """One line per import that goes sideways or up, and per folder that has no floor."""
    modules, found = read_modules(library), []
    for name, path in modules.items():
        home = folder_of(name, modules)
        if home is not None and home not in FLOORS:
            found.append(f"{name}: folder {home} has no floor")
            continue
        for target in imported(name, path, modules):
            room = folder_of(target, modules)
            if target == PACKAGE or room == home is not None or (home is None and room is not None):
                continue
            mine = DOOR if home is None else FLOORS[home]
            theirs = DOOR if room is None else FLOORS.get(room, DOOR)
            if theirs >= mine:
                found.append(f"{name} (floor {mine}) imports {target} (floor {theirs})")
    return found


def cycle(library: Path) -> list[str]:
    """The modules of one import cycle, in order; empty when there is none."""
    modules = read_modules(library)
    graph = {
        name: {target for target in imported(name, path, modules) if target in modules and target != name}
        for name, path in modules.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def code_lines(path: Path) -> int:
    """Lines of code: blank lines, comments and docstrings do not count. Explaining more must never cost anything."""
    source = path.read_text(encoding="utf-8")
    prose: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            prose |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return sum(1 for number, line in enumerate(source.splitlines(), 1)
               if line.strip() and not line.lstrip().startswith("#") and number not in prose)


def size_violations(library: Path) -> list[str]:
    """Files over 400 lines in all; a library, or its experiments, at or over their limit of lines of code."""
    paths = sorted(library.rglob("*.py"))
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    found = [f"{path.name}: {count} lines" for path, count in lines.items() if count > MAX_FILE_LINES]
    studies = [path for path in paths if path.parent == library / "lab" / "studies"]
    for name, part, limit in (("library", set(paths) - set(studies), MAX_LIBRARY_LINES),
                              ("studies", studies, MAX_STUDIES_LINES)):
        if (total := sum(map(code_lines, part))) >= limit:
            found.append(f"{name}: {total} lines")
    return found


def plant(tmp_path: Path, files: dict[str, str]) -> Path:
    """A small library with these files."""
    library = tmp_path / PACKAGE
    for name, source in {"__init__.py": "", "core/__init__.py": "", "core/a.py": "", **files}.items():
        path = library / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return library


def test_the_library_was_read():
    modules = read_modules(LIBRARY)
    edges = [(name, target) for name, path in modules.items() for target in imported(name, path, modules)]
    assert {folder_of(name, modules) for name in modules} - {None} == set(FLOORS)
    assert len(edges) > 20


def test_imports_go_down():
    assert floor_violations(LIBRARY) == []


def test_no_cycles():
    assert cycle(LIBRARY) == []


def test_sizes():
    assert size_violations(LIBRARY) == []


ALLOWED = {
    "down": {"train/x.py": "from lifecycle_lib.core.a import b\nfrom ..model import gpt", "model/gpt.py": ""},
    "own folder": {"core/b.py": "from . import a\nfrom lifecycle_lib.core import a\nfrom .a import q"},
    "door": {"evaluate.py": "from lifecycle_lib.lab import cli", "lab/cli.py": "from lifecycle_lib import __version__"},
    "elsewhere": {"core/b.py": "import torch\nfrom train import x\nimport lifecycle_lib_other"},
}
FORBIDDEN = {
    "up": {"core/b.py": "from lifecycle_lib.model.gpt import GPT", "model/gpt.py": ""},
    "sideways": {"train/x.py": "import lifecycle_lib.corpus.y", "corpus/y.py": ""},
    "by folder": {"model/x.py": "from lifecycle_lib import train", "train/y.py": ""},
    "relative": {"train/x.py": "from ..serve import y", "serve/y.py": ""},
    "relative in a package": {"train/__init__.py": "from ..judge.y import z", "judge/y.py": ""},
    "inside a function": {"train/x.py": "def f():\n    from lifecycle_lib.judge import y", "judge/y.py": ""},
    "by name": {"core/b.py": "import importlib\nimportlib.import_module('lifecycle_lib.lab.y')", "lab/y.py": ""},
    "the door": {"lab/x.py": "from lifecycle_lib import evaluate", "evaluate.py": ""},
    "the door's inside": {"lab/x.py": "from lifecycle_lib.evaluate import main", "evaluate.py": ""},
    "no floor": {"attic/x.py": ""},
}


@pytest.mark.parametrize("files", ALLOWED.values(), ids=ALLOWED)
def test_allowed_imports_pass(tmp_path, files):
    assert floor_violations(plant(tmp_path, files)) == []


@pytest.mark.parametrize("files", FORBIDDEN.values(), ids=FORBIDDEN)
def test_planted_imports_are_caught(tmp_path, files):
    assert len(floor_violations(plant(tmp_path, files))) == 1


def test_planted_cycle_is_caught(tmp_path):
    files = {
        "core/b.py": "from lifecycle_lib.core.c import x",
        "core/c.py": "def f():\n    from .d import x",
        "core/d.py": "from lifecycle_lib.core import b",
    }
    assert set(cycle(plant(tmp_path, files))) == {f"{PACKAGE}.core.{x}" for x in "bcd"}
    assert cycle(plant(tmp_path / "mended", {**files, "core/d.py": ""})) == []


def test_planted_sizes_are_caught(tmp_path):
    assert size_violations(plant(tmp_path, {"core/b.py": "x = 1\n" * 400})) == []
    assert size_violations(plant(tmp_path, {"core/b.py": "x = 1\n" * 401})) == ["b.py: 401 lines"]
    many = {f"core/m{n}.py": "x = 1\n" * 400 for n in range(33)}
    assert size_violations(plant(tmp_path / "large", many)) == ["library: 13200 lines"]
    studies = {f"lab/studies/m{n}.py": "x = 1\n" * 400 for n in range(13)}
    assert size_violations(plant(tmp_path / "experiments", studies)) == ["studies: 5200 lines"]
