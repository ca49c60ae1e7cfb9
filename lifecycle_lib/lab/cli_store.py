"""Which store a command means, without importing torch before it is needed."""

import os
from pathlib import Path


def store_root(given: str | None) -> Path:
    """The store's folder: `given`, else LIFECYCLE_STORE, else ./store."""
    return Path(given or os.environ.get("LIFECYCLE_STORE") or "store").absolute()


def existing_store(given: str | None) -> "Store":  # noqa: F821
    """The store, which must be there: looking makes no folder."""
    root = store_root(given)
    if not root.is_dir():
        raise ValueError(f"{root}: there is no store; give --store, or make one with: lifecycle run")
    from lifecycle_lib.core.store import Store
    return Store(root)
