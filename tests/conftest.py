"""What every test shares: one thread, no network, no window, and a store that is not the checkout's own."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

# Set before torch or matplotlib is imported anywhere.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

ROOT = Path(__file__).resolve().parent.parent
_store = tempfile.TemporaryDirectory(prefix="lifecycle-store-")
os.environ["LIFECYCLE_STORE"] = _store.name


def pytest_unconfigure(config: pytest.Config) -> None:
    _store.cleanup()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of public data that some tests compare with; the test is skipped where it is missing."""
    given = os.environ.get("LIFECYCLE_DATA")
    folder = Path(given) if given else ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        where = "LIFECYCLE_DATA" if given else "../shared/data, next to the checkout,"
        pytest.skip(f"{where} is not a folder: put the public data there or point LIFECYCLE_DATA at it")
    return folder
