"""Low-rank adapters: few trained numbers beside frozen ones (Hu et al. 2021, LoRA).

A wrapped layer computes  W x + (alpha / rank) B A x  with W frozen, A drawn at random and B zero, so an untrained
adapter changes nothing. `detach` takes the adapter off and leaves the base as it was, bit for bit, and as trainable or
frozen as it was; `merge` adds it into W instead, which rounds: `unmerge` subtracts it again and comes close. An adapter
is a plain dict {layer name: LoRALinear}; several on one base are kept, routed and combined in model/portfolio. W may be
packed (model/quantise): it is then unpacked in every forward and stays frozen, with A and B in float beside it (as
QLoRA, Dettmers et al. 2023, without its 4-bit float format, double quantisation and paging).

Left out: dropout on the adapter's input, biases, adapters on the embedding.

Shapes: W (O, I), A (R, I), B (O, R).
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lifecycle_lib.core.seeds import make_generator
from lifecycle_lib.core.tensors import load_meta, load_tensors, save_tensors
from lifecycle_lib.model.checkpoint import weights_hash
from lifecycle_lib.model.quantise import QuantisedLinear

FORMAT = "lifecycle-lora-1"
LINEAR = (nn.Linear, QuantisedLinear)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoRAConfig:
    """`targets`: last names of the linear layers to wrap. `alpha / rank` scales the adapter's part."""

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down")

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank={self.rank} must be at least 1; 4 to 16 is usual")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha={self.alpha} must be positive and finite; twice the rank is usual")


class LoRALinear(nn.Module):
    """base(x) + scale * (x A^T) B^T; only `a` and `b` train."""

    def __init__(self, base: nn.Linear | QuantisedLinear, cfg: LoRAConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.base, self.scale = base, cfg.alpha / cfg.rank
        bound = 1 / math.sqrt(base.in_features)  # as peft draws it: kaiming uniform with a = sqrt(5)
        a = (2 * torch.rand(cfg.rank, base.in_features, generator=generator) - 1) * bound
        self.a = nn.Parameter(a.to(base.weight))
        self.b = nn.Parameter(base.weight.new_zeros(base.out_features, cfg.rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.part(x)

    def part(self, x: Tensor) -> Tensor:
        """The adapter's share of the output alone. (..., I) -> (..., O)"""
        return self.scale * F.linear(F.linear(x, self.a), self.b)

    def delta(self) -> Tensor:
        """What the adapter adds to W. (O, I)"""
        return self.scale * self.b @ self.a


Adapter = dict[str, LoRALinear]


def freeze(model: nn.Module) -> None:
    """Stop training in every parameter, and remember on the model which of them trained: `thaw` gives that back.

    Raises ValueError if what froze it last is still on."""
    _bare(model)
    model.trained_before = {n: p.requires_grad for n, p in model.named_parameters()}
    model.requires_grad_(False)


def thaw(model: nn.Module) -> None:
    """Undo `freeze`: what trained before trains again, what was frozen before stays frozen."""
    for name, p in model.named_parameters():
        p.requires_grad_(model.trained_before[name])
    del model.trained_before


def worn(model: nn.Module) -> Adapter:
    """The adapter that the model wears; empty if it wears none."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}


def make_adapter(model: nn.Module, cfg: LoRAConfig, seed: int) -> Adapter:
    """A fresh adapter for the linear layers of `model` whose last name is in cfg.targets; not attached yet.

    Raises ValueError when a target names no linear layer, or the model wears an adapter already."""
    _bare(model)
    linear = {n: m for n, m in model.named_modules() if isinstance(m, LINEAR)}
    if missing := [t for t in cfg.targets if t not in {n.rpartition(".")[2] for n in linear}]:
        raise ValueError(f"targets {missing}: no linear layer has this name; the model has "
                         f"{', '.join(sorted({n.rpartition('.')[2] for n in linear})) or 'none'}")
    return {n: LoRALinear(m, cfg, make_generator(seed, "lora", n)) for n, m in linear.items()
            if n.rpartition(".")[2] in cfg.targets}


def attach(model: nn.Module, adapter: Adapter) -> None:
    """Put the adapter on, in place, and freeze everything else. ValueError if the model wears one already, or if
    the adapter wraps layers of another model object."""
    _bare(model)
    for name, layer in adapter.items():
        if model.get_submodule(name) is not layer.base:
            raise ValueError(f"{name}: the adapter wraps another model's layer; load it for this model with load_lora")
    freeze(model)
    for name, layer in adapter.items():
        model.set_submodule(name, layer)


def detach(model: nn.Module) -> Adapter:
    """Take the adapter off, in place, and return it; the base is as before, bit for bit, and trains what it trained
    before `attach`. Raises ValueError if there is none."""
    if not (adapter := worn(model)):
        raise ValueError("the model wears no adapter; attach one first")
    for name, layer in adapter.items():
        model.set_submodule(name, layer.base)
    thaw(model)
    return adapter


@torch.no_grad()
def merge(model: nn.Module) -> Adapter:
    """Add the adapter into the weights, in place, take it off and return it. The old weights are gone: adding rounds.

    Raises ValueError for a packed base, and leaves the adapter on: its codes cannot hold the sum."""
    if packed := [n for n, m in worn(model).items() if isinstance(m.base, QuantisedLinear)]:
        raise ValueError(f"{packed[0]}: its base is packed, and packing the sum again would round the adapter away; "
                         "serve it unmerged, or merge into the float checkpoint and quantise (and test) that")
    adapter = detach(model)
    for layer in adapter.values():
        layer.base.weight += layer.delta().to(layer.base.weight)
    return adapter


@torch.no_grad()
def unmerge(model: nn.Module, adapter: Adapter) -> None:
    """Subtract a merged adapter from the weights, in place, and put it back on. The base comes back up to rounding:
    its hash is another. Nothing can check that `adapter` is the one that was merged last."""
    attach(model, adapter)
    for layer in adapter.values():
        layer.base.weight -= layer.delta().to(layer.base.weight)


def save_lora(path: Path, model: nn.Module, adapter: Adapter, cfg: LoRAConfig) -> None:
    """Write the adapter with the hash of its bare base. ValueError if the model still wears it, or it is empty."""
    _bare(model)
    state = {f"{name}.{part}": getattr(layer, part) for name, layer in adapter.items() for part in "ab"}
    save_tensors(path, state, {"format": FORMAT, "base": weights_hash(model), "config": json.dumps(asdict(cfg))})


def load_lora(path: Path, model: nn.Module) -> Adapter:
    """The adapter of a file, for `model`, not attached yet. ValueError if it was trained on another base, or if the
    file is damaged or no adapter."""
    meta = load_meta(path)
    if meta.get("format") != FORMAT:
        raise ValueError(f"{path}: format is not {FORMAT!r}; this file holds no adapter of this library")
    _bare(model)
    if meta["base"] != (here := weights_hash(model)):
        raise ValueError(f"{path}: trained on base {meta['base'][:12]}, this model is {here[:12]}; an adapter is a "
                         "difference to one base and means nothing on another: load that base")
    given = json.loads(meta["config"])
    cfg = LoRAConfig(**{**given, "targets": tuple(given["targets"])})
    adapter, state = make_adapter(model, cfg, seed=0), load_tensors(path)
    own = {f"{n}.{part}": getattr(layer, part) for n, layer in adapter.items() for part in "ab"}
    if {n: t.shape for n, t in own.items()} != {n: t.shape for n, t in state.items()}:
        raise ValueError(f"{path}: its tensors do not fit its config; save the adapter again")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])
    return adapter


def n_trained(adapter: Adapter) -> int:
    """Trained numbers: rank * (I + O) a layer."""
    return sum(layer.a.numel() + layer.b.numel() for layer in adapter.values())


def _bare(model: nn.Module) -> None:
    if worn(model) or hasattr(model, "trained_before"):
        raise ValueError("the model wears an adapter (or gates, bottlenecks, a route); detach or merge it first")
