"""The whole check, as `make test` and continuous integration run it: four steps on two cores.

    lint       ruff
    unit       pytest on tests/, in one process ...
    lifecycle  ... while every stage of the profile runs in another, filling store/
    notebooks  pytest --nbval, two notebooks at a time, on the warm store: each cell against its output

    python tests/run_all.py [--profile laptop] [--only lint,unit]

A step that fails does not stop the others, except that the notebooks wait for a lifecycle that worked. The
last line says what passed and what did not; the exit status is 0 only when every step asked for passed.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEPS = ("lint", "unit", "lifecycle", "notebooks")
LIMIT_S = 2400  # a step that takes longer hangs
CELL_LIMIT_S = 900
KERNEL_NOISE = "Kernel is running over TCP without encryption"
CLI = "import sys; from lifecycle_lib.lab.cli import main; sys.exit(main())"


def environment() -> dict[str, str]:
    """This process's environment with one thread a process, this checkout first, its store, no network."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    env.pop("MPLBACKEND", None)  # set, it would keep figures out of the notebooks' outputs
    env["PYTHONPATH"] = str(ROOT)
    env.setdefault("LIFECYCLE_STORE", str(ROOT / "store"))
    return env


def start(command: list[str], log: Path | None = None, filtered: bool = False) -> subprocess.Popen:
    """Start a command in the repository's root, in a process group of its own.

    Its output goes to `log` if given; `filtered` drops the kernels' own warning from what it says on stderr.
    """
    env = environment()
    if filtered:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, start_new_session=True, stderr=subprocess.PIPE, text=True
        )
        threading.Thread(target=pass_on, args=(process.stderr,), daemon=True).start()
        return process
    if log is None:
        return subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        return subprocess.Popen(
            command, cwd=ROOT, env=env, start_new_session=True, stdout=file, stderr=subprocess.STDOUT
        )


def pass_on(lines: Iterable[str]) -> None:
    """Copy lines to stderr, but not what every ipykernel 7.4 says of its transport when it starts."""
    for line in lines:
        if KERNEL_NOISE not in line:
            sys.stderr.write(line)
            sys.stderr.flush()


def finish(process: subprocess.Popen, limit_s: float = LIMIT_S) -> int:
    """Wait for a process; past the limit, or when this script is interrupted, end it and all it started."""
    try:
        return process.wait(timeout=limit_s)
    except subprocess.TimeoutExpired:
        print(f"still running after {limit_s:.0f} s: ended", flush=True)
        return 124
    finally:
        if process.poll() is None:
            end(process)


def end(process: subprocess.Popen) -> None:
    """End a process group that this script started."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
            process.wait(timeout=10)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def notebook_command(paths: list[Path]) -> list[str]:
    """pytest --nbval on exactly these notebooks, one file to a worker."""
    return [
        sys.executable, "-m", "pytest", "-q", "--nbval", "-n", "2", "--dist", "loadfile",
        "--nbval-sanitize-with", str(ROOT / "tests/nbval_sanitize.cfg"),
        f"--nbval-cell-timeout={CELL_LIMIT_S}", *map(str, paths),
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Lint, unit tests, the whole lifecycle, every notebook.")
    parser.add_argument("--profile", default="laptop", help="profile of the lifecycle run (default: laptop)")
    parser.add_argument("--only", default=",".join(STEPS), help=f"comma-separated, of: {','.join(STEPS)}")
    args = parser.parse_args(argv)
    asked = args.only.split(",")
    if unknown := [step for step in asked if step not in STEPS]:
        parser.error(f"unknown step {unknown[0]!r}; the steps are {', '.join(STEPS)}")

    began = time.monotonic()
    results: dict[str, tuple[bool, float]] = {}

    def record(step: str, code: int, since: float) -> None:
        results[step] = (code == 0, time.monotonic() - since)

    lifecycle, log = None, ROOT / "runs" / "lifecycle.log"
    try:
        if "lint" in asked:
            since = time.monotonic()
            print("== lint", flush=True)
            record("lint", finish(start([sys.executable, "-m", "ruff", "check", "."])), since)
        lifecycle_since = time.monotonic()
        if "lifecycle" in asked:
            print(f"== lifecycle ({args.profile}) started, its log is {log.relative_to(ROOT)}", flush=True)
            lifecycle = start([sys.executable, "-u", "-c", CLI, "run", "--profile", args.profile], log)
        if "unit" in asked:
            since = time.monotonic()
            print("== unit", flush=True)
            record("unit", finish(start([sys.executable, "-m", "pytest", "-q", "tests"])), since)
        if lifecycle is not None:
            print("== lifecycle", flush=True)
            code = finish(lifecycle, LIMIT_S - (time.monotonic() - lifecycle_since))
            record("lifecycle", code, lifecycle_since)
            lines = log.read_text(errors="replace").splitlines()
            print("\n".join(lines[-(25 if code == 0 else 200) :]), flush=True)
        if "notebooks" in asked:
            since = time.monotonic()
            print("== notebooks", flush=True)
            paths = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
            if not results.get("lifecycle", (True, 0.0))[0]:
                print("not run: the lifecycle they stand on failed", flush=True)
                record("notebooks", 1, since)
            elif not paths:
                print("there are no notebooks", flush=True)
                record("notebooks", 1, since)
            else:
                record("notebooks", finish(start(notebook_command(paths), filtered=True)), since)
    finally:
        if lifecycle is not None and lifecycle.poll() is None:
            end(lifecycle)

    print()
    for step, (passed, seconds) in results.items():
        print(f"{'ok    ' if passed else 'FAILED'} {step:<10} {seconds:6.0f} s")
    failed = [step for step, (passed, _) in results.items() if not passed]
    verdict = f"FAILED: {', '.join(failed)}" if failed else "everything asked for passed"
    print(f"make test: {verdict} ({time.monotonic() - began:.0f} s)", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
