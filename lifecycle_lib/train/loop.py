"""The one training loop: pretraining, SFT, DPO and verifier rewards all call `fit`.

Muon (Jordan et al. 2024; torch.optim.Muon) for the weight matrices, AdamW (Loshchilov & Hutter 2019) for
embeddings, norms and vectors; or AdamW for everything; or SGD with momentum, for preference pairs (see train/dpo.py).
Linear warm-up, cosine decay, gradient clipping.
`batches(step)` and `loss_fn(model, batch)` are pure in `step`, so a run stopped at any moment resumes from its
last checkpoint and ends with the same weights.

Left out: gradient accumulation, parameter groups by depth, mixed precision on the CPU.
"""

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lifecycle_lib.core.progress import bar
from lifecycle_lib.core.records import read_json, write_json
from lifecycle_lib.core.tensors import load_tensors, save_tensors

LossFn = Callable[[nn.Module, Any], tuple[Tensor, dict[str, float]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class FitConfig:
    """How to train. `lr` drives AdamW or SGD; `lr_matrix` drives Muon and is ignored by the other two."""

    steps: int
    lr: float = 3e-3
    lr_matrix: float = 0.02
    optimizer: str = "muon"
    weight_decay: float = 0.0
    beta2: float = 0.95
    warmup_steps: int = 10
    min_lr_share: float = 0.1
    clip: float = 1.0
    checkpoint_every: int = 50
    bf16: bool = False  # autocast, for CUDA

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1")
        if self.optimizer not in ("muon", "adamw", "sgd"):
            raise ValueError(f"optimizer={self.optimizer!r} is unknown; use 'muon', 'adamw' or 'sgd'")
        for name in ("lr", "lr_matrix", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be positive and finite")
        if not 0 <= self.min_lr_share <= 1:
            raise ValueError(f"min_lr_share={self.min_lr_share} must be 0 to 1")
        if not (0 <= self.weight_decay < math.inf and 0 <= self.beta2 < 1):
            raise ValueError(f"weight_decay={self.weight_decay} must be 0 or more, beta2={self.beta2} 0 to under 1")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps={self.warmup_steps} must be 0 or more")
        if self.checkpoint_every < 1:
            raise ValueError(f"checkpoint_every={self.checkpoint_every} must be at least 1")


@dataclass(slots=True)
class FitResult:
    """What happened: one row of `history` a step, actual steps, and the clocks of this process."""

    history: list[dict] = field(default_factory=list)
    steps: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0

    @property
    def losses(self) -> list[float]:
        return [row["loss"] for row in self.history]


def schedule(step: int, cfg: FitConfig) -> float:
    """Share of the peak learning rate at `step`: linear warm-up, then cosine down to min_lr_share."""
    if step < cfg.warmup_steps:
        return (step + 1) / (cfg.warmup_steps + 1)
    progress = (step - cfg.warmup_steps) / max(1, cfg.steps - cfg.warmup_steps)
    return cfg.min_lr_share + (1 - cfg.min_lr_share) * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizers(model: nn.Module, cfg: FitConfig) -> list[torch.optim.Optimizer]:
    """Muon over the hidden matrices and AdamW over the rest, or AdamW or SGD over all trainable parameters."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError("the model has no trainable parameter; set requires_grad on those to train")
    hidden = [p for n, p in named if p.dim() == 2 and "wte" not in n and "embed" not in n and "lm_head" not in n]
    matrices = hidden if cfg.optimizer == "muon" else []
    ids = {id(p) for p in matrices}
    rest = [p for _, p in named if id(p) not in ids]
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=cfg.lr_matrix, weight_decay=cfg.weight_decay))
    if rest and cfg.optimizer == "sgd":
        optimizers.append(torch.optim.SGD(rest, lr=cfg.lr, momentum=0.9, weight_decay=cfg.weight_decay))
    elif rest:
        optimizers.append(torch.optim.AdamW(rest, lr=cfg.lr, betas=(0.9, cfg.beta2), weight_decay=cfg.weight_decay))
    for opt in optimizers:
        for group in opt.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def save_progress(folder: Path, step: int, model: nn.Module, optimizers: list, history: list[dict]) -> None:
    """Write weights and optimiser state of `step` into one file, then point to it: a kill leaves the older one."""
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    for i, opt in enumerate(optimizers):
        for j, state in opt.state_dict()["state"].items():
            tensors |= {f"opt.{i}.{j}.{k}": torch.as_tensor(v) for k, v in state.items()}
    name = f"resume-{step:06d}.safetensors"
    save_tensors(folder / name, {k: v.detach().cpu().contiguous() for k, v in tensors.items()}, {"step": str(step)})
    write_json(folder / "resume.json", {"step": step, "file": name, "history": history})
    for old in folder.glob("resume-*.safetensors"):
        if old.name != name:
            old.unlink()


def load_progress(folder: Path, model: nn.Module, optimizers: list) -> tuple[int, list[dict]]:
    """Restore what `save_progress` wrote; (0, []) when there is nothing."""
    if not (folder / "resume.json").exists():
        return 0, []
    meta = read_json(folder / "resume.json")
    tensors = load_tensors(folder / meta["file"])
    model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
    for i, opt in enumerate(optimizers):
        full = opt.state_dict()
        for key, value in tensors.items():
            if key.startswith(f"opt.{i}."):
                _, _, j, name = key.split(".", 3)
                full["state"].setdefault(int(j), {})[name] = value
        opt.load_state_dict(full)
    return meta["step"], meta["history"]


def fit(model: nn.Module, batches: Callable[[int], Any], loss_fn: LossFn, cfg: FitConfig,
        folder: Path | None = None, label: str = "training") -> FitResult:
    """Train `model` in place for cfg.steps steps.

    batches(step) gives the batch of a step; loss_fn(model, batch) gives (scalar loss, metrics).
    With `folder`, progress is saved every cfg.checkpoint_every steps and picked up again.
    Raises ValueError when the loss is not finite: the step, the value and the first thing to try."""
    optimizers = make_optimizers(model, cfg)
    start, history = load_progress(folder, model, optimizers) if folder else (0, [])
    trainable = [p for p in model.parameters() if p.requires_grad]
    device = trainable[0].device
    amp = torch.autocast(device.type, torch.bfloat16) if cfg.bf16 else contextlib.nullcontext()
    wall, cpu = time.perf_counter(), time.process_time()
    model.train()
    with bar(label, total=cfg.steps, initial=start) as progress:
        for step in range(start, cfg.steps):
            share = schedule(step, cfg)
            for opt in optimizers:
                for group in opt.param_groups:
                    group["lr"] = group["peak_lr"] * share
            batch = batches(step)
            with amp:
                loss, metrics = loss_fn(model, batch)
            value = loss.item()
            if not math.isfinite(value):
                raise ValueError(f"{label}: loss is {value} at step {step}; lower lr={cfg.lr} "
                                 f"or lr_matrix={cfg.lr_matrix}, or look for an empty batch")
            for opt in optimizers:
                opt.zero_grad(set_to_none=True)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(trainable, cfg.clip)
            for opt in optimizers:
                opt.step()
            history.append({"step": step, "loss": value, "grad_norm": float(norm), **metrics})
            progress.update(1, loss=value)
            if folder and (step + 1) % cfg.checkpoint_every == 0 and step + 1 < cfg.steps:
                save_progress(folder, step + 1, model, optimizers, history)
    model.eval()
    return FitResult(history=history, steps=len(history), wall_s=time.perf_counter() - wall,
                     cpu_s=time.process_time() - cpu)
