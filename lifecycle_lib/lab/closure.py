"""The closure gate: rebuild a checkpoint in a clean room before it may be pushed (curriculum S2-01d, S2-01e).

A tag and good scores hide that nobody could make the checkpoint again. So the gate freezes a bundle, starts another
process that sees only the bundle (its code, its store, an empty home, no notebook variables), lets it rebuild within a
budget of seconds, and compares. A document can be out of date; a rebuild cannot.

Left out: a container (packages outside the bundle are the present ones; their versions are compared), other machines.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from lifecycle_lib.core.store import Artifact, Store


def clean_room(bundle: str | Path, *, budget_s: float = 600, deep: bool = False, n_cases: int = 512) -> dict[str, Any]:
    """Rebuild a bundle's checkpoint in a process that sees nothing else: {"ok", "why", ...}, and the result of `verify`
    where there is one. Over the budget, or stopped by an error, it is not ok.

    Raises ValueError for a folder without a manifest."""
    bundle = Path(bundle).absolute()
    if not (bundle / "manifest.json").is_file():
        raise ValueError(f"{bundle}: no manifest.json; make a bundle with: lifecycle recipe freeze")
    with tempfile.TemporaryDirectory(prefix="lifecycle-clean-") as home:
        env = {"PATH": os.defpath, "HOME": home, "TMPDIR": home, "PYTHONPATH": str(bundle / "code"),
               "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "HF_HUB_OFFLINE": "1", "LIFECYCLE_QUIET": "1",
               "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-P", "-m", "lifecycle_lib.lab.closure", str(bundle), str(n_cases), str(int(deep))]
        try:
            done = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True, timeout=budget_s)
        except subprocess.TimeoutExpired:
            return {"ok": False, "why": f"not rebuilt within {budget_s:g} s"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"ok": False, "why": last.removeprefix("ValueError: ").replace(str(bundle), bundle.name)}
    return json.loads(done.stdout.strip().splitlines()[-1])


def gate(store: Store, artifact: Artifact, *, budget_s: float = 600, deep: bool = False, n_cases: int = 512,
         corpus: str | Path | None = None) -> dict[str, Any]:
    """Freeze a bundle of `artifact` in a scratch folder and rebuild it in a clean room."""
    from lifecycle_lib.lab import recipe
    with tempfile.TemporaryDirectory(prefix="lifecycle-bundle-") as folder:
        recipe.freeze(store, artifact, Path(folder) / "bundle", corpus=corpus, n_cases=n_cases)
        return clean_room(Path(folder) / "bundle", budget_s=budget_s, deep=deep, n_cases=n_cases)


def inside(bundle: Path, n_cases: int, deep: bool) -> dict[str, Any]:
    """What runs in the clean room. Raises ValueError when its code is not the bundle's, or a piece is missing."""
    import lifecycle_lib
    from lifecycle_lib.core.seeds import one_thread
    from lifecycle_lib.lab import recipe
    from lifecycle_lib.lab.rebuild import VerifyConfig, verify, why_not
    one_thread()
    if not Path(lifecycle_lib.__file__).is_relative_to(bundle / "code"):
        raise ValueError("the clean room imported other code than the bundle's; its code/ is missing or broken")
    _, artifact, store = recipe.open_bundle(bundle)
    corpus = next(iter(sorted((bundle / "data").glob("*"))), None) if (bundle / "data").is_dir() else None
    result = verify(store, artifact, deep=deep, corpus=corpus, cfg=VerifyConfig(n_cases=n_cases))
    result["missing"].pop("evaluation and prompts", None)  # the bundle has them in evals.json
    why = [f"built {result['rebuilt']} instead"] if result["rebuilt"] != result["artifact"] else []
    why += why_not(result)
    return result | {"ok": not why, "why": "; ".join(why) or "rebuilt"}


if __name__ == "__main__":
    print(json.dumps(inside(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "1")))
