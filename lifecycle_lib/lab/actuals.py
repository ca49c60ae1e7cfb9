"""What a training run really did, written beside what was intended (curriculum S3-6.24).

A config says: 40 steps of 32 rows, peak rate 1e-3. `watch` counts instead of believing: rows and target tokens of the
batches handed out, optimiser steps, and the learning rates the optimisers held when they stepped (through torch's own
step hook, so no loop has to cooperate). `mismatches` compares the two.

Left out: what an interrupted attempt did before its checkpoint (the count starts with the process that finished, and
`first_step` says where), loss scaling (there is none).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from lifecycle_lib.train.loop import FitConfig, schedule

STAGE_FIT = {"base": "pretrain", "sft": "sft", "dpo": "dpo", "rlvr": "rlvr"}  # stage: its FitConfig in the config


@dataclass(slots=True)
class Actuals:
    """Counts of one run; `lr` holds one list a kind of optimiser (AdamW, Muon, SGD), one rate a step."""

    first_step: int | None = None
    rows: list[int] = field(default_factory=list)
    tokens: int = 0
    lr: dict[str, list[float]] = field(default_factory=dict)

    def counted(self, batches: Callable[[int], Any]) -> Callable[[int], Any]:
        """The same batches, counted as they are handed out."""
        def batch_of(step: int) -> Any:
            batch = batches(step)
            rows = getattr(batch, "rows", batch)  # a pair batch and rollouts hold their rows
            if self.first_step is None:
                self.first_step = step
            self.rows.append(len(rows.ids))
            self.tokens += int(rows.mask[:, 1:].sum())
            return batch
        return batch_of

    def as_card(self) -> dict[str, Any]:
        """Card fields. `rows_per_step` is [fewest, most]; `lr_peak` and `lr_last` go by kind of optimiser."""
        return {"first_step": self.first_step or 0, "batches": len(self.rows),
                "optimizer_steps": max((len(v) for v in self.lr.values()), default=0),
                "rows_per_step": [min(self.rows, default=0), max(self.rows, default=0)], "target_tokens": self.tokens,
                "lr_peak": {k: max(v) for k, v in sorted(self.lr.items())},
                "lr_last": {k: v[-1] for k, v in sorted(self.lr.items())}}


@contextmanager
def watch() -> Iterator[Actuals]:
    """Counts every optimiser step inside the block."""
    seen = Actuals()

    def note(optimizer: Optimizer, *_: object) -> None:
        seen.lr.setdefault(type(optimizer).__name__, []).append(float(optimizer.param_groups[0]["lr"]))

    handle = register_optimizer_step_post_hook(note)
    try:
        yield seen
    finally:
        handle.remove()


def intended(card: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the card's config asks for, in the words of `Actuals.as_card`; None for a stage that does not train."""
    config, name = card["config"], card["name"]
    if name not in STAGE_FIT:
        return None
    cfg = FitConfig(**config[STAGE_FIT[name]])
    rows = {"base": lambda: config["pretrain_batch"], "sft": lambda: config["sft_batch"],
            "dpo": lambda: 2 * config["dpo_batch"],  # chosen and rejected
            "rlvr": lambda: config["grpo"]["n_prompts"] * config["grpo"]["group_size"]}[name]()
    shares = [schedule(s, cfg) for s in range(cfg.steps)]
    rates = {"muon": {"AdamW": cfg.lr, "Muon": cfg.lr_matrix}, "adamw": {"AdamW": cfg.lr},
             "sgd": {"SGD": cfg.lr}}[cfg.optimizer]
    return {"optimizer_steps": cfg.steps, "rows_per_step": [rows, rows],
            "lr_peak": {k: v * max(shares) for k, v in rates.items()},
            "lr_last": {k: v * shares[-1] for k, v in rates.items()}}


def mismatches(card: Mapping[str, Any]) -> list[str]:
    """Where a card's actuals are not what its config asked for, one line each; [] if they agree or nothing trains.

    Raises ValueError for a training stage whose card has no actuals: it cannot say what it did."""
    wanted = intended(card)
    if wanted is None:
        return []
    if not isinstance(card.get("actual"), Mapping):
        raise ValueError(f"card of {card['name']}-{card['fingerprint']}: field 'actual' is missing; the run was made "
                         "before actuals were recorded, make it again in a fresh store")
    actual = card["actual"]
    # a resumed run was watched from its checkpoint on
    wanted["optimizer_steps"] -= actual["first_step"]
    return [f"{key}: intended {_show(wanted[key])}, was {_show(actual.get(key))}" for key in wanted
            if not _same(wanted[key], actual.get(key))]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return set(a) == set(b) and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, float) and isinstance(b, (int, float)):
        return abs(a - b) <= 1e-9 * max(abs(a), abs(b))
    return a == b


def _show(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_show(v)}" for k, v in value.items())
    if isinstance(value, list) and len(set(value)) == 1:
        return str(value[0])
    return f"{value:.3g}" if isinstance(value, float) else str(value)
