"""Seeds, devices and the memory clock: what every run states before it starts.

One integer seed makes everything; labels split it into independent streams
(`make_generator(seed, "rollouts", step)`), so adding a draw in one place never
moves the numbers of another.
"""

import hashlib
import os
import random
import sys

import numpy as np
import torch

DEVICES = ("cpu", "cuda", "mps")


def derive_seed(seed: int, *labels: object) -> int:
    """A 63-bit seed that depends on `seed` and every label, stable across processes and platforms."""
    text = repr((int(seed), *map(str, labels)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch. Call it before the model is made: a seed set after
    initialisation leaves the weights different on every run."""
    random.seed(derive_seed(seed, "python"))
    np.random.seed(derive_seed(seed, "numpy") % 2**32)
    torch.manual_seed(derive_seed(seed, "torch"))


def make_generator(seed: int, *labels: object) -> torch.Generator:
    """A CPU torch.Generator for one labelled stream of `seed`."""
    return torch.Generator().manual_seed(derive_seed(seed, *labels))


def rng(seed: int, *labels: object) -> random.Random:
    """A random.Random for one labelled stream of `seed`."""
    return random.Random(derive_seed(seed, *labels))


def pick_device(name: str | None = None) -> torch.device:
    """The device to run on: `name`, or the best there is (CUDA, then MPS, then CPU).

    Raises ValueError when the name is unknown or that device is not on this machine."""
    here = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name is None or name == "auto":
        return torch.device(next(d for d in ("cuda", "mps", "cpu") if here[d]))
    kind = name.split(":")[0]
    if kind not in DEVICES:
        raise ValueError(f"device {name!r} is unknown; use one of {', '.join(DEVICES)} (or leave it out)")
    if not here[kind]:
        found = ", ".join(d for d in DEVICES if here[d])
        raise ValueError(f"device {name!r} is not on this machine; found {found}. Leave --device out to pick the best")
    return torch.device(name)


def peak_memory_bytes() -> int:
    """Largest resident set of this process so far, in bytes (0 where the platform does not tell)."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def one_thread() -> None:
    """One torch thread for this process: two threads a process on a busy 2-core machine are many times slower."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
