"""What to buy with a budget: seconds of this machine into (N, D), a serving limit into a size, a ledger for the rest.

`plan` reads a fitted law at what the machine can do: D = seconds * tokens_per_s(N), with a measured speed in place of
6 N D FLOP (small models are slower than their FLOP say). `largest_n` goes the other way, from what a user will wait
for: one generated token reads every weight once, so latency bounds N, as memory does. `Ledger` is the bookkeeping that
keeps exploration from eating the confirmation.

Left out: the price of parallel machines, prefill, batches, the KV cache (model/memory.py counts it).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lifecycle_lib.lab.studies.scaling_fit import Law


@dataclass(frozen=True, slots=True)
class Proposal:
    """One way to spend a budget: `loss` is the law's, in nats a counted token."""

    n_params: float
    tokens: float
    loss: float


def plan(law: Law, seconds: float, tokens_per_s: Callable[[float], float], sizes: Sequence[float]) -> list[Proposal]:
    """A proposal for each size, the best first. ValueError for a budget or a speed that is not positive, or no size."""
    if not seconds > 0 or not sizes:
        raise ValueError(f"seconds={seconds} and {len(sizes)} sizes: give a positive time and at least one size")
    found = []
    for n in sizes:
        if not (speed := tokens_per_s(n)) > 0:
            raise ValueError(f"tokens_per_s({n}) is {speed}; measure it, it must be positive")
        found.append(Proposal(n, seconds * speed, float(law.loss(n, seconds * speed))))
    return sorted(found, key=lambda p: p.loss)


def largest_n(*, latency_s: float, bytes_per_s: float, memory_bytes: float, bytes_each: float = 4) -> int:
    """The largest N that yields a token within `latency_s` where weights stream at `bytes_per_s`, and fits in memory.

    Raises ValueError unless all are positive."""
    given = {"latency_s": latency_s, "bytes_per_s": bytes_per_s, "memory_bytes": memory_bytes, "bytes_each": bytes_each}
    for name, value in given.items():
        if not value > 0:
            raise ValueError(f"{name}={value} must be positive")
    return int(min(latency_s * bytes_per_s, memory_bytes) // bytes_each)


def tokens_for(law: Law, n_params: float, loss: float) -> float:
    """Tokens that bring a model of N parameters to `loss`. Raises ValueError where no number of tokens does."""
    left = loss - law.loss(n_params, float("inf"))
    if left <= 0:
        raise ValueError(f"loss {loss}: {n_params:g} parameters end at {law.loss(n_params, float('inf')):.4f} on any "
                         "number of tokens; take a larger model or a higher loss")
    return (law.b_scale / left) ** (1 / law.b)


@dataclass(slots=True)
class Ledger:
    """Seconds set aside by purpose, and what was spent of them. A purpose that is spent is refused."""

    caps_s: dict[str, float]
    entries: list[tuple[str, str, float]] = field(default_factory=list)

    def left_s(self, purpose: str) -> float:
        """Seconds left for `purpose`. Raises ValueError for a purpose that was never given any."""
        if purpose not in self.caps_s:
            raise ValueError(f"purpose {purpose!r} has no budget; it is one of {', '.join(self.caps_s)}")
        return self.caps_s[purpose] - sum(s for p, _, s in self.entries if p == purpose)

    def ask(self, purpose: str, label: str, seconds: float) -> None:
        """Before a run of about `seconds`: raises ValueError when it would overdraw its purpose."""
        if seconds > self.left_s(purpose):
            raise ValueError(f"{label}: about {seconds:.0f} s, and {self.left_s(purpose):.0f} s are left to {purpose}; "
                             "leave it out, or move the cap and write down why")

    def debit(self, purpose: str, label: str, seconds: float) -> None:
        """After a run: what it took, even when that overdraws."""
        self.left_s(purpose)
        self.entries.append((purpose, label, seconds))
