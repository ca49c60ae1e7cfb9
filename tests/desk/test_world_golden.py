"""The world may not drift by accident: hashes of what seed 0 draws, kept in golden.json beside this file.

After a deliberate change of the world (raise WORLD_VERSION with it):  python tests/desk/test_world_golden.py
writes golden.json anew; the commit then shows which streams moved.
"""

# ruff: noqa: E402  (run as a script, it first finds the library)
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from lifecycle_lib.core.fingerprints import fingerprint
from lifecycle_lib.desk import cases, documents, world
from lifecycle_lib.judge.evals import eval_fingerprint, frozen_cases
from lifecycle_lib.train import dpo, sft

GOLDEN = Path(__file__).with_name("golden.json")


def hashes() -> dict[str, str]:
    """The version of the world and a fingerprint of each stream."""
    return {
        "world_version": world.WORLD_VERSION,
        "documents": fingerprint(documents.draw_documents(200, 0)),
        "tokenizer_corpus": fingerprint(documents.tokenizer_corpus(0)),
        "demonstrations": fingerprint(sft.make_demonstrations(cases.draw_cases(200, 0, "sft"), 0.3, 0)),
        "pairs": fingerprint(dpo.make_pairs(cases.draw_cases(100, 0, "dpo"))),
        "rl_cases": fingerprint([c.as_row() for c in cases.draw_cases(100, 0, "rlvr")]),
        "frozen_evaluation": eval_fingerprint(frozen_cases()),
    }


def test_the_world_is_the_recorded_one():
    want = json.loads(GOLDEN.read_text())
    got = hashes()
    moved = sorted(k for k in want.keys() | got.keys() if want.get(k) != got.get(k))
    assert not moved, f"{', '.join(moved)} changed; if that was meant: python tests/desk/test_world_golden.py"


def test_another_process_draws_the_same():
    """With another hash seed, so that no set or dict order can leak into a draw."""
    code = "import test_world_golden, json; print(json.dumps(test_world_golden.hashes()))"
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                         env={**os.environ, "PYTHONHASHSEED": "4242", "PYTHONPATH": path})
    assert json.loads(out.stdout) == hashes()


def test_drift_is_seen(monkeypatch):
    before = hashes()
    monkeypatch.setattr(world, "held_out", lambda days, window: (days * 31 + window * 17 + 1) % 5 == 0)
    after = hashes()
    assert {k for k in before if before[k] == after[k]} == {"world_version"}


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(hashes(), indent=2) + "\n")
    print(f"wrote {GOLDEN.name}")
