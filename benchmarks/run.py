"""Every benchmark of this folder, one after the other, each in its own process: `make bench`.

Prints each one's JSON line as it comes (what else it says goes to stderr). The exit status is 1 when one failed.
--quick is passed on.
"""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> int:
    env = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | os.environ
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(HERE.parent), env.get("PYTHONPATH"))))
    failed = []
    for script in sorted(HERE.glob("*.py")):
        if script.samefile(__file__):
            continue
        done = subprocess.run([sys.executable, str(script), *sys.argv[1:]], env=env, capture_output=True, text=True)
        if done.returncode:
            failed.append(script.name)
            print(done.stderr[-2000:], file=sys.stderr)
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        print("\n".join(lines) if lines else f"{script.name}: no result", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
