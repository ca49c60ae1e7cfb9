"""What a run ran on, as far as it can change a result: processor, vector instructions, threads, GPU, libraries.

Two machines that agree in all of it may still differ (driver, BLAS build); two that differ need not give other numbers.
"""

import importlib.metadata
import os
import platform
from functools import cache
from pathlib import Path

import torch


def hardware() -> dict[str, str | int | None]:
    """machine (x86_64, arm64), cpu (its model name), cores, simd (the kernels torch picks), threads (of torch, now) and
    gpu (its name, or None)."""
    return {"machine": platform.machine(), "cpu": _cpu(), "cores": os.cpu_count(),
            "simd": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}


def versions() -> dict[str, str | None]:
    """Python and the libraries that compute, here and now; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("torch", "numpy", "transformers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


@cache
def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
