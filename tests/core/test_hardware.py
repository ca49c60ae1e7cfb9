"""The hardware a card names."""

from __future__ import annotations

import json
import os
import platform

import torch

from lifecycle_lib.core.hardware import hardware


def test_it_says_what_torch_and_the_system_say():
    found = hardware()
    assert found["machine"] == platform.machine() and found["cores"] == os.cpu_count()
    assert found["threads"] == torch.get_num_threads() and found["cpu"]
    json.dumps(found)


def test_threads_are_read_each_time():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        assert hardware()["threads"] == before + 1
    finally:
        torch.set_num_threads(before)
