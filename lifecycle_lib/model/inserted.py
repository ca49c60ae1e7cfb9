"""Two more ways to train little beside a frozen network: a bottleneck after each branch, and gates on activations.

Bottleneck (Houlsby et al. 2019): y + W_up gelu(W_down y) behind the attention's and the MLP's output layer, W_up zero
at the start. It holds a nonlinearity, so it cannot be merged. IA3 (Liu et al. 2022): one learned factor, 1 at the
start, for each key, value and MLP channel; it can be merged, as a row or column scale.

Left out: biases and the trained layer norms of the first paper.

Shapes: W (O, I), b the bottleneck's width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lifecycle_lib.model.lora import freeze, thaw


class Bottleneck(nn.Module):
    """base(x), then a residual bottleneck: 2 * b * O trained numbers."""

    def __init__(self, base: nn.Linear, width: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.base, out = base, base.out_features
        self.down = nn.Parameter(torch.randn(width, out, generator=generator).to(base.weight) / out**0.5)
        self.up = nn.Parameter(base.weight.new_zeros(out, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y + F.linear(F.gelu(F.linear(y, self.down)), self.up)


class Gate(nn.Module):
    """base(x) * g on the output, or base(x * g) for an MLP's last layer: O or I trained numbers."""

    def __init__(self, base: nn.Linear, on_input: bool = False) -> None:
        super().__init__()
        self.base, self.on_input = base, on_input
        self.gate = nn.Parameter(torch.ones(base.in_features if on_input else base.out_features).to(base.weight))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x * self.gate) if self.on_input else self.base(x) * self.gate


def insert(model: nn.Module, targets: tuple[str, ...], wrap: Callable[[str, nn.Linear], nn.Module]) -> int:
    """Freeze the model and wrap each linear layer whose last name is in `targets`, in place; returns how many numbers
    train now. `remove` takes them out again. Raises ValueError when nothing is called so."""
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.rpartition(".")[2] in targets]
    if not found:
        raise ValueError(f"targets {targets}: no linear layer has one of these names")
    freeze(model)
    for name, layer in found:
        model.set_submodule(name, wrap(name.rpartition(".")[2], layer))
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def insert_bottlenecks(model: nn.Module, width: int, generator: torch.Generator | None = None) -> int:
    """Bottlenecks behind the attention and the MLP of every block."""
    return insert(model, ("wo", "w_down"), lambda _, layer: Bottleneck(layer, width, generator))


def insert_gates(model: nn.Module) -> int:
    """IA3: gates on keys, on values, and on the channels inside the MLP."""
    return insert(model, ("wk", "wv", "w_down"), lambda name, layer: Gate(layer, on_input=name == "w_down"))


def remove(model: nn.Module) -> None:
    """Take bottlenecks and gates out, in place: the base is as before, bit for bit, and trains what it trained before.

    Raises ValueError if there are none."""
    if not (found := [(n, m) for n, m in model.named_modules() if isinstance(m, (Bottleneck, Gate))]):
        raise ValueError("the model holds no bottleneck and no gate; insert them first")
    for name, module in found:
        model.set_submodule(name, module.base)
    thaw(model)
