"""The data gate's cost: CPU time beside reading and writing the same file with json, and memory at two sizes.

Prints one JSON line: rows per CPU second of the gate (filters, exact copies, personal data) and of the peer, a plain
json.loads / json.dumps loop, their ratio (how much of the time is not JSON), and the peak memory of a process that
gates a short and a long file, with the extra bytes a row. Random words, 22 a row.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

GATE = """
import resource, sys, time
from lifecycle_lib.corpus.gate import run_gate
start = time.process_time()
run_gate(sys.argv[1], sys.argv[2])
unit = 1 if sys.platform == "darwin" else 1024
print(time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
"""


def write_rows(path: Path, n: int) -> None:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(5000)]
    with open(path, "w") as file:
        for i in range(n):
            file.write(json.dumps({"id": f"row-{i}", "text": " ".join(draw.choices(words, k=22)), "source": f"S{i % 9}",
                                   "licence": "CC0-1.0", "captured": "2024-05-01", "slice": f"s{i % 5}"}) + "\n")


def peer_s(path: Path, out: Path) -> float:
    start = time.process_time()
    with open(path, "rb") as file, open(out, "wb") as copy:
        for line in file:
            copy.write(json.dumps(json.loads(line)).encode() + b"\n")
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two short files: shows that it runs, not the speed")
    sizes = (500, 1000) if parser.parse_args().quick else (3000, 100_000)
    with tempfile.TemporaryDirectory() as folder:
        cpu_s, peak_bytes = {}, {}
        for n in sizes:
            path = Path(folder) / f"{n}.jsonl"
            write_rows(path, n)
            done = subprocess.run([sys.executable, "-c", GATE, str(path), str(Path(folder) / "out")], check=True,
                                  text=True, capture_output=True, env=os.environ | {"LIFECYCLE_QUIET": "1"})
            cpu_s[n], peak_bytes[n] = map(float, done.stdout.split())
        n = sizes[1]
        plain = peer_s(Path(folder) / f"{n}.jsonl", Path(folder) / "copy")
    print(json.dumps({"benchmark": "gate", "rows": n, "gate_rows_per_cpu_s": round(n / cpu_s[n]),
                      "json_rows_per_cpu_s": round(n / plain), "gate_over_json": round(cpu_s[n] / plain, 1),
                      "peak_mb": {m: round(b / 1e6) for m, b in peak_bytes.items()},
                      "extra_bytes_a_row": round((peak_bytes[n] - peak_bytes[sizes[0]]) / (n - sizes[0]))}))


if __name__ == "__main__":
    main()
