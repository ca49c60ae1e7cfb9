"""Several adapters on one base: swap, switch off, route row by row, add up, keep in a folder.

The base's weights are never written to and, while an adapter is worn or routed, never train; off, the base trains what
it trained before. `use` wears one adapter or none; with none the base's own layers are in place
and its logits come back bit for bit. `route` answers each row of a batch with the adapter that the row names: the base
multiplies the whole batch once, each adapter only its own rows (as Punica's and S-LoRA's kernels do, Chen et al. 2023,
Sheng et al. 2023, without the kernels).

`combine` adds adapters up. "cat" stacks their factors and is exactly the weighted sum of their deltas, at the sum of
their ranks. "linear" adds A to A and B to B, as peft does under that name: same rank, but (B1 + B2)(A1 + A2) has cross
terms that neither adapter was trained with.

Left out: TIES, DARE, truncation by SVD, routing while rows leave the batch (generate for each adapter by itself).
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lifecycle_lib.core.records import read_json, write_json
from lifecycle_lib.model.checkpoint import weights_hash
from lifecycle_lib.model.lora import (
    Adapter,
    LoRAConfig,
    LoRALinear,
    attach,
    detach,
    freeze,
    load_lora,
    save_lora,
    thaw,
)

REGISTRY = "portfolio.json"


class RoutedLinear(nn.Module):
    """base(x), plus for each row the part of the adapter that the row names."""

    def __init__(self, layers: Mapping[str, LoRALinear], rows: Mapping[str, Tensor], n_rows: int) -> None:
        super().__init__()
        self.base = next(iter(layers.values())).base
        self.layers, self.rows, self.n_rows = layers, rows, n_rows

    def forward(self, x: Tensor) -> Tensor:
        if len(x) != self.n_rows:
            raise ValueError(f"a batch of {len(x)} rows under a route of {self.n_rows}; route each batch by itself")
        y = self.base(x)
        for name, layer in self.layers.items():
            y = y.index_add(0, self.rows[name], layer.part(x[self.rows[name]]))
        return y


class Portfolio:
    """Named adapters of one base model. `wearing`: the adapter in use, None for the bare base, "routed" for a route."""

    def __init__(self, model: nn.Module, adapters: Mapping[str, Adapter] | None = None) -> None:
        self.model, self.adapters = model, {}
        self.base = weights_hash(model)
        self.wearing: str | None = None
        for name, adapter in (adapters or {}).items():
            self.add(name, adapter)

    def add(self, name: str, adapter: Adapter) -> None:
        """Register an adapter. ValueError for a name that is taken, or an adapter around another model's layers."""
        if name in self.adapters or name == "routed":
            raise ValueError(f"adapter name {name!r} is taken; use another")
        self.use(None)
        attach(self.model, adapter)  # refuses what does not fit
        detach(self.model)
        self.adapters[name] = adapter

    def use(self, name: str | None) -> None:
        """Wear this adapter; None switches off, and the base answers as it always did, bit for bit."""
        self._known([name])
        if self.wearing == "routed":
            for path, layer in self._routed:
                self.model.set_submodule(path, layer.base)
            thaw(self.model)
        elif self.wearing:
            detach(self.model)
        self.wearing = name
        if name is not None:
            attach(self.model, self.adapters[name])

    def route(self, names: Sequence[str | None]) -> None:
        """Until the next `use` or `route`: row i of every batch is answered by adapter names[i], None by the base.

        Raises ValueError for an adapter that is not registered, naming the row."""
        self._known(names)
        self.use(None)
        used = sorted({n for n in names if n is not None})
        if not used:
            return
        device = next(self.model.parameters()).device
        rows = {n: torch.tensor([i for i, other in enumerate(names) if other == n], device=device) for n in used}
        freeze(self.model)
        for path in {path for n in used for path in self.adapters[n]}:
            layers = {n: self.adapters[n][path] for n in used if path in self.adapters[n]}
            self.model.set_submodule(path, RoutedLinear(layers, rows, len(names)))
        self.wearing = "routed"

    @property
    def _routed(self) -> list[tuple[str, RoutedLinear]]:
        return [(path, m) for path, m in self.model.named_modules() if isinstance(m, RoutedLinear)]

    def _known(self, names: Sequence[str | None]) -> None:
        for row, name in enumerate(names):
            if name is not None and name not in self.adapters:
                raise ValueError(f"row {row}: no adapter {name!r}; registered: {', '.join(self.adapters) or 'none'}")

    def save(self, folder: Path, cards: Mapping[str, Mapping] | None = None) -> None:
        """One file an adapter and a registry, portfolio.json: the base's hash, and each adapter's file, bytes and card
        (owner, purpose, what it was trained on: whatever `cards` says)."""
        self.use(None)
        entries = {}
        for name, adapter in self.adapters.items():
            file = Path(folder) / f"{name}.safetensors"
            save_lora(file, self.model, adapter, config_of(adapter))
            entries[name] = {"file": file.name, "bytes": file.stat().st_size, "card": dict((cards or {}).get(name, {}))}
        write_json(Path(folder) / REGISTRY, {"base": self.base, "adapters": entries})


def load_portfolio(folder: Path, model: nn.Module) -> Portfolio:
    """The portfolio of a folder, for `model`. Raises ValueError for another base, naming both hashes."""
    path = Path(folder) / REGISTRY
    registry, here = read_json(path), weights_hash(model)
    if registry.get("base") != here:
        raise ValueError(f"{path}: a portfolio for base {str(registry.get('base'))[:12]}, this model is {here[:12]}; "
                         "load that base, or train and test the adapters again on this one")
    return Portfolio(model, {name: load_lora(Path(folder) / entry["file"], model)
                             for name, entry in registry["adapters"].items()})


def config_of(adapter: Adapter) -> LoRAConfig:
    """Rank, alpha and targets of an adapter as it is."""
    layer = next(iter(adapter.values()))
    targets = tuple(dict.fromkeys(path.rpartition(".")[2] for path in adapter))
    return LoRAConfig(rank=len(layer.a), alpha=layer.scale * len(layer.a), targets=targets)


@torch.no_grad()
def combine(parts: Sequence[tuple[Adapter, float]], how: str = "cat") -> Adapter:
    """A new adapter from (adapter, weight) pairs on the same layers of one model; weights may be negative.

    "cat": the weighted sum of the deltas, exactly. "linear": weighted sums of A and of B. Raises ValueError for another
    `how`, adapters around different layers, or "linear" over different ranks."""
    if how not in ("cat", "linear"):
        raise ValueError(f"how={how!r} is unknown; use 'cat' (exact) or 'linear' (of peft)")
    first = parts[0][0]
    for adapter, _ in parts:
        if [(n, id(x.base)) for n, x in adapter.items()] != [(n, id(x.base)) for n, x in first.items()]:
            raise ValueError("the adapters wrap different layers; combine adapters of one model and one target list")
    combined = {}
    for path, like in first.items():
        layers = [(adapter[path], weight * adapter[path].scale) for adapter, weight in parts]
        if how == "cat":
            a, b = torch.cat([w * x.a for x, w in layers]), torch.cat([x.b for x, _ in layers], dim=1)
        elif len({len(x.a) for x, _ in layers}) > 1:
            raise ValueError(f"{path}: ranks {[len(x.a) for x, _ in layers]} cannot be added; use 'cat'")
        else:
            a = sum(math.copysign(abs(w) ** 0.5, w) * x.a for x, w in layers)
            b = sum(abs(w) ** 0.5 * x.b for x, w in layers)
        combined[path] = LoRALinear(like.base, LoRAConfig(rank=len(a), alpha=len(a)), torch.Generator())
        combined[path].a.copy_(a)
        combined[path].b.copy_(b)
    return combined
