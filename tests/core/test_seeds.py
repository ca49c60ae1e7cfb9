"""Seeds: streams by label, the same in every process; devices by name; numpy and torch as they are."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lifecycle_lib.core import seeds


def test_by_hand():
    """A seed is the first 63 bits of SHA-256 over the tuple of seed and labels, as Python prints it."""
    digest = hashlib.sha256(b"(7, 'rollouts', '3')").digest()
    want = int(bin(int.from_bytes(digest, "big"))[2:].zfill(256)[:63], 2)
    assert seeds.derive_seed(7, "rollouts", 3) == want == seeds.derive_seed(7, "rollouts", "3")


def test_labels_do_not_run_together():
    names = [(0, "a", "b"), (0, "ab"), (0, "b", "a"), (0, "a"), (1, "a"), (0,), (0, "a, b"), (0, "a', 'b"), (10, "a")]
    assert len({seeds.derive_seed(*n) for n in names}) == len(names)


def test_streams_are_independent_of_each_other():
    first = seeds.make_generator(0, "x")
    torch.rand(5, generator=seeds.make_generator(0, "y"))
    a = torch.rand(3, generator=first)
    assert torch.equal(a, torch.rand(3, generator=seeds.make_generator(0, "x")))
    peer = torch.Generator().manual_seed(seeds.derive_seed(0, "x"))
    assert torch.equal(a, torch.rand(3, generator=peer))
    assert seeds.rng(0, "x").random() == seeds.rng(0, "x").random() != seeds.rng(0, "y").random()


def test_every_global_generator_is_seeded():
    import random

    def draws() -> tuple:
        return random.random(), np.random.rand(), torch.rand(1).item()

    seeds.seed_everything(5)
    first = draws()
    assert all(a != b for a, b in zip(first, draws()))
    seeds.seed_everything(5)
    assert draws() == first
    seeds.seed_everything(6)
    assert all(a != b for a, b in zip(first, draws()))
    torch.manual_seed(1)  # broken: torch only
    a = draws()
    torch.manual_seed(1)
    b = draws()
    assert a[2] == b[2] and a[0] != b[0] and a[1] != b[1]


def test_the_same_in_another_process():
    code = ("from lifecycle_lib.core import seeds; import torch; print(seeds.derive_seed(3, 'a', 1), "
            "seeds.rng(3, 'a').random(), torch.rand(1, generator=seeds.make_generator(3, 'a')).item())")
    runs = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                           env={**os.environ, "PYTHONHASHSEED": h, "PYTHONPATH": os.getcwd()}).stdout
            for h in ("1", "2")}
    here = (seeds.derive_seed(3, "a", 1), seeds.rng(3, "a").random(),
            torch.rand(1, generator=seeds.make_generator(3, "a")).item())
    assert runs == {" ".join(map(str, here)) + "\n"}


def test_devices(monkeypatch):
    assert seeds.pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert seeds.pick_device(None) == seeds.pick_device("auto") == torch.device("cpu")
    for name, message in (("gpu", "'gpu' is unknown; use one of cpu, cuda, mps"),
                          ("cuda:1", "'cuda:1' is not on this machine; found cpu"), ("mps", "'mps' is not on")):
        with pytest.raises(ValueError, match=message):
            seeds.pick_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert seeds.pick_device() == torch.device("cuda") and seeds.pick_device("cuda:1") == torch.device("cuda:1")


def test_peak_memory_is_the_systems():
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("no /proc on this system to compare with")
    block = np.ones(8_000_000)
    peak = seeds.peak_memory_bytes()
    high_water = next(int(x.split()[1]) for x in status.read_text().splitlines() if x.startswith("VmHWM")) * 1024
    assert peak == pytest.approx(high_water, rel=0.02) and peak > block.nbytes
