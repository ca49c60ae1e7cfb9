"""core/fingerprints.py: equal inputs, equal names; any other input, another name."""

import ast
import hashlib
import importlib
import itertools
import json
import subprocess
import sys
import types
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath

import numpy as np
import pytest
import torch

from lifecycle_lib.core.fingerprints import (
    canonical_json,
    code_fingerprint,
    data_hashes,
    file_sha256,
    fingerprint,
    source_fingerprint,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Adam:
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lion:
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)


def test_by_hand():
    text = '{"a":[1,2.5,true,null],"b":{"__dataclass__":"Adam","betas":[0.9,0.95],"lr":0.001},"p":"x/y"}'
    value = {"p": PureWindowsPath("x\\y"), "b": Adam(), "a": (1, 2.5, True, None)}
    assert canonical_json(value) == text
    assert fingerprint(value) == hashlib.sha256(text.encode()).hexdigest()[:16]
    assert fingerprint({"text": "é\u2028"}) == hashlib.sha256(b'{"text":"\\u00e9\\u2028"}').hexdigest()[:16]


def different(function):
    """Values that must have different fingerprints, pairwise."""
    values = [1, 1.0, True, "1", None, "", [], {}, [[]], [1], [1, 1], "null", 0.1, 0.1 + 2**-56, 0.30000000000000004,
              0.3, Adam(), Lion(), replace(Adam(), lr=2e-3), {"a": 1, "b": 2}, {"a": 2, "b": 1}, {"a": {"b": 1}},
              {"a": None}, "a", "á", "a\u0301"]
    return all(function(a) != function(b) for a, b in itertools.combinations(values, 2))


def test_different_values_differ_and_naive_hashes_confuse_some():
    assert different(fingerprint)
    assert not different(lambda v: hash(v) if isinstance(v, (int, float)) else fingerprint(v))  # 1 == 1.0 == True
    assert not different(lambda v: json.dumps(v, default=lambda o: [o.lr, o.betas]))  # forgets the class


def test_same_value_same_fingerprint():
    assert fingerprint({"a": 1, "b": (1, 2)}) == fingerprint({"b": [1, 2], "a": 1})
    assert fingerprint(np.float32(0.5)) == fingerprint(torch.tensor(0.5)) == fingerprint(0.5)
    assert fingerprint({"n": np.int64(3)}) == fingerprint({"n": 3})


def test_stable_across_processes():
    code = "from lifecycle_lib.core.fingerprints import *; print(fingerprint({'b': [0.1, 'é'], 'a': None}))"
    root = Path(__file__).resolve().parents[2]
    for hash_seed in ("1", "2"):
        out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True,
                             env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(root)})
        assert out.stdout.strip() == fingerprint({"a": None, "b": [0.1, "é"]})


@pytest.mark.parametrize(("value", "where"), [
    ({"optim": {"betas": [0.9, {1}]}}, r"value\.optim\.betas\[1\]: a set"),
    ({"f": len}, r"value\.f: a builtin_function"),
    ({"x": float("nan")}, r"value\.x: nan"),
    ({"x": np.zeros(3)}, r"value\.x: a ndarray"),
    ({1: "a"}, "key 1 is a int"),
    (Adam, "a type cannot"),
    ({"b": b"bytes"}, r"value\.b: a bytes"),
])
def test_refused(value, where):
    with pytest.raises(ValueError, match=where) as error:
        fingerprint(value)
    assert "use " in str(error.value)


BASE = '''
"""Module docstring."""
import math

def area(r, *, k: float = 2.0):
    """Old words."""
    return math.pi * r ** k  # a comment

class Ring:
    """Class docstring."""
    note = "a"
'''
SAME = [("Old words.", "New words."), ("  # a comment", ""), ('    """Old words."""\n', ""), ("r ** k", "(r\n ** k)"),
        ('"""Module docstring."""', "# none"), ("math.pi * r", "math.pi*r"), ('"a"', "'a'")]
OTHER = [("r ** k", "k ** r"), ("2.0", "2.5"), ("2.0", "2"), ("area", "Area"), ("*, k", "k"), (": float", ""),
         ('note = "a"', 'note = "b"'), ("import math", "import cmath as math"), ("return ", ""), ("** k", "* k")]


def tells_edits_apart(function):
    same = all(function(BASE.replace(*edit)) == function(BASE) for edit in SAME)
    other = all(function(BASE.replace(*edit)) != function(BASE) for edit in OTHER)
    return same and other


def test_code_edits():
    assert all(old in BASE for old, _ in SAME + OTHER)
    assert tells_edits_apart(source_fingerprint)
    assert not tells_edits_apart(lambda s: hashlib.sha256(s.encode()).hexdigest())  # a comment makes a new artifact
    assert not tells_edits_apart(lambda s: ast.dump(ast.parse(s)))                  # so does a docstring
    assert not tells_edits_apart(lambda s: [type(n) for n in ast.walk(ast.parse(s))])  # values are lost


def test_agrees_with_ast_dump_on_this_library():
    """Oracle: two sources have one fingerprint exactly if ast.dump of them, docstrings removed, is equal."""
    may_hold_docstring = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

    def dump(source):
        tree = ast.parse(source)
        for node in ast.walk(tree):
            if isinstance(node, may_hold_docstring) and ast.get_docstring(node) is not None:
                del node.body[0]
        return ast.dump(tree)

    sources = [p.read_text() for p in sorted(Path(source_fingerprint.__code__.co_filename).parent.glob("*.py"))]
    sources += [BASE.replace(*edit) for edit in SAME + OTHER]
    for a, b in itertools.combinations(sources, 2):
        assert (source_fingerprint(a) == source_fingerprint(b)) == (dump(a) == dump(b))


def module(tmp_path, name, source):
    made = types.ModuleType(name)
    made.__file__ = str(tmp_path / f"{name}.py")
    Path(made.__file__).write_text(source)
    return made


def test_code_fingerprint_of_modules(tmp_path):
    one, two = module(tmp_path, "one", "x = 1"), module(tmp_path, "two", "x = 2")
    assert code_fingerprint([one, two]) == code_fingerprint((two, one)) != code_fingerprint([one])
    assert code_fingerprint(one) == code_fingerprint([one])
    before = code_fingerprint([one])
    Path(one.__file__).write_text("x = 3")
    assert code_fingerprint([one]) != before
    for bad in (sys, "one", len):
        with pytest.raises(ValueError, match="not a module with a source file"):
            code_fingerprint([bad])


def test_an_edit_under_a_running_process_counts_from_the_reload_on(tmp_path, monkeypatch):
    """Else a notebook with the old code in memory would file its result under the new code's name."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "stage_under_edit.py").write_text("x = 1")
    stage = importlib.import_module("stage_under_edit")
    before = code_fingerprint(stage)
    (tmp_path / "stage_under_edit.py").write_text("x = 20")
    assert stage.x == 1 and code_fingerprint(stage) == before
    importlib.reload(stage)
    assert stage.x == 20 and code_fingerprint(stage) != before


def test_data(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, example B.1
    assert file_sha256(path) == known and data_hashes([path]) == data_hashes(path) == [["d.jsonl", known]]
    with pytest.raises(ValueError, match="absent: not found"):
        data_hashes([tmp_path / "absent"])
    with pytest.raises(ValueError, match="is a folder"):
        data_hashes([tmp_path])
