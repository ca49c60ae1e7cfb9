"""One progress bar for everything: what it is doing, and how long is left."""

import os

from tqdm.auto import tqdm


class bar:
    """Context manager around tqdm.auto. LIFECYCLE_QUIET=1 turns it off (tests, worker processes)."""

    def __init__(self, label: str, total: int, initial: int = 0) -> None:
        self.tqdm = tqdm(total=total, initial=initial, desc=label, disable=os.environ.get("LIFECYCLE_QUIET") == "1",
                         mininterval=0.5, leave=False, dynamic_ncols=True)

    def update(self, n: int = 1, **numbers: float) -> None:
        if numbers:
            self.tqdm.set_postfix({k: f"{v:.3f}" for k, v in numbers.items()}, refresh=False)
        self.tqdm.update(n)

    def __enter__(self) -> "bar":
        return self

    def __exit__(self, *exc: object) -> None:
        self.tqdm.close()
