"""The repository's own rules: one environment, no machine's folders or registries in it, nothing unpickled.

Each rule is a function that is also run on a planted violation. The strings it looks for are put together from parts,
so that this file keeps the rules it checks.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import run_all
import yaml
from check_env import canonical, differences, read_lock, torch_pin
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
PYPROJECT = ROOT / "pyproject.toml"
OUTSIDE_LOCK = {"torch", "playwright"}  # torch: its build differs by machine; playwright: the extra `browser`

MACHINE_PATH = re.compile(r"(?<![\w.)\]}-])/(?:" + "|".join(["wo" + "rk", "ro" + "ot", "ho" + "me", "op" + "t"]) + ")/")
REGISTRY = re.compile(
    "|".join(
        map(
            re.escape,
            ["pypi" + ".org/simple", "files.python" + "hosted.org", "download.py" + "torch.org"]
            + ["registry.npm" + "js.org", "file:" + "///"],
        )
    )
)
CUDA = re.compile(r"nvidia|cuda|triton|\+cu\d|\+cpu", re.IGNORECASE)
PICKLES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


# --- one environment ---------------------------------------------------------------------------------------------


def pins(pyproject: dict) -> dict[str, str]:
    """Every exact pin of pyproject.toml, extras included; ValueError for a requirement that is not one."""
    project, found = pyproject["project"], {}
    for text in [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]:
        requirement = Requirement(text)
        [spec] = list(requirement.specifier) or [None]
        if spec is None or spec.operator != "==" or requirement.marker or requirement.url:
            raise ValueError(f"pyproject.toml: {text!r} is not name==version")
        found[canonical(requirement.name)] = spec.version
    return found


def pin_disagreements(declared: dict[str, str], locked: dict[str, str], environment: dict) -> list[str]:
    """Where pyproject.toml, requirements.lock and environment.yml would give different environments."""
    found = [f"{name} stands in the lock" for name in OUTSIDE_LOCK & set(locked)]
    for name, version in declared.items():
        if name not in OUTSIDE_LOCK and locked.get(name) != version:
            found.append(f"{name}: {version} in pyproject.toml, {locked.get(name)} in the lock")
    outer = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    [inner] = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    if outer != ["python=3.11", "pip"]:
        found.append(f"environment.yml: {outer}, not python=3.11 and pip")
    if inner != [f"torch=={declared['torch']}", "-r requirements.lock", "-e ."]:
        found.append(f"environment.yml: pip installs {inner}")
    return found


def needed(names: list[str]) -> set[str]:
    """Everything that the installed distributions of these names need here, themselves included."""
    seen: set[tuple[str, str]] = set()
    todo = [(canonical(name), "") for name in names]
    while todo:
        name, extra = todo.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            requires = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        for requirement in map(Requirement, requires):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                todo += [(canonical(requirement.name), each) for each in ("", *requirement.extras)]
    return {name for name, _ in seen}


def lock_line_problems(text: str) -> list[str]:
    """Lines of a lock that are not name==version, or that tie it to one kind of machine."""
    found = []
    for line in text.splitlines():
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*==[\w.!]+", line):
            found.append(f"not name==version: {line}")
        if CUDA.search(line):
            found.append(f"tied to a kind of machine: {line}")
    return found


def test_pyproject_lock_and_environment_agree():
    declared = pins(tomllib.loads(PYPROJECT.read_text()))
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert pin_disagreements(declared, read_lock(LOCK), environment) == []
    assert declared["torch"] == torch_pin(PYPROJECT) == "2.13.0"


def test_lock_is_the_whole_closure_and_no_more():
    declared = pins(tomllib.loads(PYPROJECT.read_text()))
    closure = needed([name for name in declared if name != "playwright"])
    locked = set(read_lock(LOCK))
    on_cuda = {name for name in closure if CUDA.search(name)}  # what a CUDA build of torch brings with it
    assert closure - locked - on_cuda == {"torch"}
    assert locked - closure == set()


def test_lock_lines():
    assert lock_line_problems(LOCK.read_text()) == []


def test_installed_is_what_the_lock_says():
    assert differences({**read_lock(LOCK), "torch": torch_pin(PYPROJECT)}) == []


def test_python_versions_agree():
    assert tomllib.loads(PYPROJECT.read_text())["project"]["requires-python"] == ">=3.11"


def test_planted_pins_are_caught(tmp_path):
    good = {"dependencies": ["python=3.11", "pip", {"pip": ["torch==2.13.0", "-r requirements.lock", "-e ."]}]}
    declared, locked = {"torch": "2.13.0", "numpy": "2.4.6"}, {"numpy": "2.4.6"}
    assert pin_disagreements(declared, locked, good) == []
    assert len(pin_disagreements(declared, {"numpy": "2.4.5"}, good)) == 1
    assert len(pin_disagreements(declared, {}, good)) == 1
    assert len(pin_disagreements(declared, {**locked, "torch": "2.13.0"}, good)) == 1
    assert len(pin_disagreements({**declared, "torch": "2.12.0"}, locked, good)) == 1
    older = {"dependencies": ["python=3.10", "pip", good["dependencies"][2]]}
    assert len(pin_disagreements(declared, locked, older)) == 1
    loose = {"project": {"dependencies": ["numpy>=2"], "optional-dependencies": {}}}
    with pytest.raises(ValueError, match="numpy>=2"):
        pins(loose)
    for line in ("-e .", "numpy @ " + REGISTRY.pattern[-5:] + "x", "--index-url x", "numpy>=2", "torch==2.13.0+cpu"):
        assert lock_line_problems(line), line
    assert lock_line_problems("nvidia-cublas==13.1") and lock_line_problems("triton==3.5.0")
    assert differences({"numpy": metadata.version("numpy"), "torch": "2.13.0"}) == []
    assert len(differences({"numpy": "0.0.1", "no-such-distribution": "1"})) == 2
    for text, message in (("numpy>=2\n", ":1:"), ("a==1\nA==1\n", ":2:"), ("# nothing\n", "no pins")):
        (tmp_path / "bad.lock").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_lock(tmp_path / "bad.lock")


# --- no machine in it ----------------------------------------------------------------------------------------------


def tracked(root: Path = ROOT) -> list[Path]:
    """The files that git tracks and that are there."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, check=True, text=True)
    return [path for name in listed.stdout.split("\0") if name and (path := root / name).is_file()]


def readable(path: Path) -> str:
    """A file's text: of a notebook everything but its pictures, whose letters mean nothing; nothing of a binary."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""
    if path.suffix != ".ipynb":
        return text
    book = json.loads(text)
    for cell in book["cells"]:
        for output in cell.get("outputs", []):
            for kind in [kind for kind in output.get("data", {}) if kind in ("image/png", "image/jpeg")]:
                del output["data"][kind]
    return json.dumps(book, indent=0, ensure_ascii=False)


def places(path: Path) -> list[str]:
    """Machine folders and registry addresses that a file names."""
    text = readable(path)
    return [f"{path.name}: {hit.group()}" for rule in (MACHINE_PATH, REGISTRY) for hit in rule.finditer(text)]


def test_no_machine_path_or_registry_in_tracked_files():
    files = tracked()
    assert len(files) > 30
    assert [hit for path in files for hit in places(path)] == []


def test_planted_places_are_caught(tmp_path):
    path = tmp_path / "a.txt"
    for folder in ("wo" + "rk", "ro" + "ot", "ho" + "me", "op" + "t"):
        path.write_text(f'see "/{folder}/me/data"')
        assert len(places(path)) == 1
        path.write_text(f"docs/{folder}/x, ../{folder}/x, $(CURDIR)/{folder}/x")
        assert places(path) == []
    for address in ("https://pypi" + ".org/simple/x", "file:" + "///x"):
        path.write_text(address)
        assert len(places(path)) == 1
    hit = "/op" + "t/x"
    book = tmp_path / "a.ipynb"
    for kind, count in (("image/png", 0), ("text/plain", 1)):
        book.write_text(json.dumps({"cells": [{"outputs": [{"data": {kind: hit}}]}]}))
        assert len(places(book)) == count


def test_made_files_are_ignored():
    made = [".venv/x", "store/a/card.json", "work/notebooks/00.ipynb", "runs/lifecycle.log", "tests/__pycache__/a.pyc"]
    listed = subprocess.run(["git", "check-ignore", *made], cwd=ROOT, capture_output=True, text=True)
    assert listed.stdout.split() == made
    kept = ["lifecycle_lib/core/store.py", "requirements.lock", "notebooks/00_map.ipynb", "data/world.jsonl"]
    assert subprocess.run(["git", "check-ignore", *kept], cwd=ROOT, capture_output=True).returncode == 1


# --- nothing unpickled -----------------------------------------------------------------------------------------------


def unpickling(source: str) -> list[str]:
    """What could run code from a file that is read: pickles and their kin, and torch's and numpy's use of them."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in PICKLES]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module] if (node.module or "").split(".")[0] in PICKLES else []
            found += ["torch.load"] if node.module == "torch" and "load" in {a.name for a in node.names} else []
        elif isinstance(node, ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            found += [f"{owner}.{node.attr}"] if (owner, node.attr) == ("torch", "load") else []
            found += [node.attr] if node.attr in ("read_pickle", "to_pickle", "unsafe_load", "joblib") else []
        elif isinstance(node, ast.keyword):
            allows = isinstance(node.value, ast.Constant) and node.value.value
            found += [node.arg] if node.arg == "allow_pickle" and allows else []
    return found


def test_nothing_is_unpickled():
    files = sorted((ROOT / "lifecycle_lib").rglob("*.py"))
    assert len(files) > 15
    assert [f"{path.name}: {hit}" for path in files for hit in unpickling(path.read_text())] == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x', weights_only=True)",
        "from torch import load",
        "import joblib",
        "import sklearn; sklearn.externals.joblib.load('x')",
        "np.load('x', allow_pickle=True)",
        "def f():\n    import dill",
        "pd.read_pickle('x')",
    ],
)
def test_planted_pickles_are_caught(source):
    assert len(unpickling(source)) == 1


def test_other_loads_pass():
    source = "'''torch.load'''\nimport json\njson.load(f)\nnp.load('x', allow_pickle=False)\nTokenizer.load(p)"
    assert unpickling(source) == []


# --- the front door ---------------------------------------------------------------------------------------------------


def make_targets(makefile: str) -> set[str]:
    """The targets a Makefile has by name."""
    return set(re.findall(r"^([a-z][a-z-]*):(?!=)", makefile, re.MULTILINE))


def commands(readme: str) -> set[str]:
    """The targets a README tells its reader to make: `make x` at a line's start in a fence, or in backticks."""
    fenced = "\n".join(re.findall(r"^```[a-z]*\n(.*?)^```", readme, re.MULTILINE | re.DOTALL))
    return set(re.findall(r"^(?:\$ )?make ([a-z-]+)", fenced, re.MULTILINE)) | set(
        re.findall(r"`(?:[A-Z_]+=\S+ )*make ([a-z-]+)[^`]*`", readme)
    )


def test_readme_commands_exist():
    told = commands((ROOT / "README.md").read_text())
    assert {"run", "test", "lab"} <= told
    assert told - make_targets((ROOT / "Makefile").read_text()) == set()


def test_planted_readme_command_is_caught():
    makefile = "VENV := x\nrun: $(READY)\n\techo\ntest:\n"
    assert make_targets(makefile) == {"run", "test"}
    assert commands("text `make run PROFILE=smoke`, make sense\n```sh\nmake test\n$ make fly  # high\n```\n") == {
        "run",
        "test",
        "fly",
    }


def test_ci_runs_make_test():
    script = (ROOT / ".ci" / "run").read_text()
    assert "set -euo pipefail" in script
    assert script.rstrip().endswith("make test")


STEP_SCRIPTS = {"ruff": "lint", "tests": "unit", "run": "lifecycle", "--nbval": "notebooks"}


@pytest.mark.parametrize("broken", [None, *STEP_SCRIPTS.values()])
def test_make_test_fails_when_a_step_does(monkeypatch, capfd, tmp_path, broken):
    """Each step is replaced by a process that works, or by one that does not; no notebook runs on a broken base."""
    started = []

    def start(command, log=None, filtered=False):
        [step] = [name for word, name in STEP_SCRIPTS.items() if word in command]
        started.append(step)
        if log is not None:
            log.write_text("the log of the run")
        return subprocess.Popen([sys.executable, "-c", f"raise SystemExit({int(step == broken)})"])

    monkeypatch.setattr(run_all, "ROOT", tmp_path)
    monkeypatch.setattr(run_all, "start", start)
    (tmp_path / "runs").mkdir()
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "00_map.ipynb").write_text("{}")
    assert run_all.main([]) == (broken is not None)
    last = capfd.readouterr().out.splitlines()[-1]
    assert ("FAILED" in last and broken in last) if broken else "everything asked for passed" in last
    assert ("notebooks" in started) == (broken != "lifecycle")
    (tmp_path / "notebooks" / "00_map.ipynb").unlink()
    assert run_all.main(["--only", "notebooks"]) == 1  # nothing to check is a failure


def test_a_step_that_hangs_is_ended():
    process = run_all.start([sys.executable, "-c", "import time; time.sleep(60)"])
    assert run_all.finish(process, limit_s=0.5) == 124
    assert process.poll() is not None


def test_licences():
    apache, cc = (ROOT / "LICENSE").read_text(), (ROOT / "LICENSE-CC-BY-4.0").read_text()
    assert "Version 2.0, January 2004" in apache and "END OF TERMS AND CONDITIONS" in apache
    assert "Section 8 -- Interpretation." in cc and "creativecommons.org/licenses/by/4.0" in cc


def test_importing_the_package_is_free():
    loaded = "'torch' in sys.modules, 'numpy' in sys.modules"
    script = f"import sys, lifecycle_lib; print(lifecycle_lib.__version__, {loaded})"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0.1.0", "False", "False"]
