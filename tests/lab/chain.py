"""One smoke chain for the tests that rebuild it: made once a test session, read only."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from lifecycle_lib.core.seeds import one_thread
from lifecycle_lib.core.store import Store
from lifecycle_lib.lab.stages import STAGES, Lab


@cache
def chain() -> Store:
    """A store with every stage of the smoke profile, seed 0, and an evaluation of the DPO checkpoint."""
    os.environ["LIFECYCLE_QUIET"] = "1"
    one_thread()
    root = Path(os.environ["LIFECYCLE_STORE"]) / "chain"
    root.parent.mkdir(exist_ok=True)
    lab = Lab("smoke", seed=0, device="cpu", store=Store(root))
    for name in STAGES:
        lab.stage(name)
    lab.evaluation(lab.dpo())
    return lab.store
