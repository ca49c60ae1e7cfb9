"""Names from content: equal inputs get equal fingerprints, on every machine and Python version.

A value is turned into canonical JSON (sorted keys, shortest exact float, tuples as lists, dataclasses with their
class name) and hashed with SHA-256. Code is hashed as its syntax tree without docstrings, so a comment, a
docstring or a line break changes nothing and any other edit does.

Left out: code is followed no further than the modules named. A stage names every module that can change what it
makes.
"""

import ast
import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from types import ModuleType
from typing import Any

_imported: dict[str, tuple[Any, str]] = {}  # module name: (its import spec, the sum of its source)


def fingerprint(obj: Any) -> str:
    """16 hex digits for a value of dicts, lists, tuples, dataclasses, paths, text, numbers, booleans and None.

    1, 1.0 and True differ; a tuple equals the list of its items; two dataclasses with the same fields differ.
    Raises ValueError, naming the place inside `obj`, for anything else (sets, functions, arrays, NaN).
    """
    return _sha256(canonical_json(obj))[:16]


def canonical_json(obj: Any) -> str:
    """The text that `fingerprint` hashes."""
    return json.dumps(plain(obj, tag=True), sort_keys=True, separators=(",", ":"), allow_nan=False)


def plain(obj: Any, where: str = "value", tag: bool = False) -> Any:
    """`obj` as JSON values; dataclasses become dicts (with their class name if `tag`), numpy scalars numbers.

    Raises ValueError starting with the place inside `obj`, e.g. "value.optim.betas[1]: ...".
    """
    if obj is None or isinstance(obj, (bool, int, str)):
        return obj
    if isinstance(obj, float):
        if not math.isfinite(obj):
            raise ValueError(f"{where}: {obj} has no JSON form; use a finite number or None")
        return float(obj)
    if isinstance(obj, PurePath):
        return obj.as_posix()
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        fields = {f.name: getattr(obj, f.name) for f in dataclasses.fields(obj)}
        name = {"__dataclass__": type(obj).__name__} if tag else {}
        return name | plain(fields, where, tag)
    if isinstance(obj, Mapping):
        for key in obj:
            if not isinstance(key, str):
                raise ValueError(f"{where}: key {key!r} is a {type(key).__name__}; use text keys")
        return {key: plain(value, f"{where}.{key}", tag) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [plain(value, f"{where}[{i}]", tag) for i, value in enumerate(obj)]
    if getattr(obj, "ndim", None) == 0 and hasattr(obj, "item"):  # numpy and torch scalars
        return plain(obj.item(), where, tag)
    raise ValueError(f"{where}: a {type(obj).__name__} cannot be fingerprinted; use text, numbers, lists, dicts, "
                     "paths or dataclasses (a sorted list for a set, a name for a function)")


def code_fingerprint(modules: ModuleType | Iterable[ModuleType]) -> str:
    """SHA-256 (64 hex digits) of what the modules' source does; their order is free.

    A file is read once for each import: edited under a running notebook, it still counts as the code that was
    imported, which is the code that runs, until the module is reloaded or the process restarts.
    Raises ValueError for something that is not a module with a source file.
    """
    parts = []
    modules = (modules,) if isinstance(modules, ModuleType) else modules
    for module in sorted(modules, key=lambda m: getattr(m, "__name__", "")):
        file = getattr(module, "__file__", None)
        if not isinstance(module, ModuleType) or not file or not file.endswith(".py"):
            raise ValueError(f"code={module!r}: not a module with a source file; pass the imported module itself")
        spec, digest = _imported.get(module.__name__, (None, ""))
        if spec is None or spec is not module.__spec__:  # a reload makes a new spec
            digest = source_fingerprint(Path(file).read_text(encoding="utf-8"))
            _imported[module.__name__] = (module.__spec__, digest)
        parts.append([module.__name__, digest])
    return _sha256(json.dumps(parts))


def source_fingerprint(source: str) -> str:
    """SHA-256 of Python source without comments, layout and docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:]
    return _sha256(repr(_tree(tree)))


def file_sha256(path: str | Path) -> str:
    """SHA-256 (64 hex digits) of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def data_hashes(paths: str | Path | Iterable[str | Path]) -> list[list[str]]:
    """[file name, SHA-256] of each data file, in the order given. ValueError if one is not a readable file."""
    hashes = []
    for path in map(Path, (paths,) if isinstance(paths, (str, Path)) else paths):
        if not path.is_file():
            raise ValueError(f"data file {path}: {'is a folder, list its files' if path.is_dir() else 'not found'}; "
                             "check the path, or generate the data first")
        hashes.append([path.name, file_sha256(path)])
    return hashes


def _tree(node: Any) -> Any:
    """A syntax tree as nested tuples. Empty fields are dropped: newer Pythons add fields, and those are empty."""
    if isinstance(node, ast.AST):
        fields = [(name, _tree(value)) for name, value in ast.iter_fields(node) if value is not None and value != []]
        return (type(node).__name__, *fields)
    if isinstance(node, list):
        return tuple(_tree(item) for item in node)
    return (type(node).__name__, repr(node))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
