"""Where the bytes go: predicted from the shape, and measured on a real module.

Plain arithmetic, one function a term:
  weights   n_params * bytes_each
  KV cache  2 * n_layer * n_kv_head * head_dim * seq_len * batch * bytes_each   (keys and values)
  training  weights + gradients + optimiser state: AdamW keeps two numbers a parameter, Muon one

Leaves out: activations, buffers of the allocator and of the kernels, fragmentation, file metadata.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn

GIB = 2**30
LEAVES_OUT = ("KV cache", "buffers", "metadata")
STATE_PER_PARAM = {"adamw": 2, "muon": 1, "sgd": 0}


class WeightGiB(float):
    """GiB of the weights alone: a float that remembers what it leaves out."""

    leaves_out = LEAVES_OUT

    def __repr__(self) -> str:
        return f"{float(self):.1f} GiB of weights, without {', '.join(self.leaves_out)}"

    __str__ = __repr__


def gib_for_weights(n_params: float, bytes_each: float) -> WeightGiB:
    """GiB (2**30 bytes) for `n_params` weights of `bytes_each` bytes; 0.5 bytes is four bits.

    Raises ValueError for a number that is not positive and finite.
    """
    _check_positive(n_params=n_params, bytes_each=bytes_each)
    return WeightGiB(n_params * bytes_each / GIB)


def ideal_bytes(n_params: int, bits: float) -> int:
    """Bytes of `n_params` codes of `bits` bits and nothing else: no scales, nothing kept in float."""
    _check_positive(n_params=n_params, bits=bits)
    return math.ceil(n_params * bits / 8)


def kv_cache_bytes(n_layer: int, n_kv_head: int, head_dim: int, seq_len: int, batch: int = 1,
                   bytes_each: float = 2) -> int:
    """Bytes of keys and values for `batch` sequences of `seq_len` tokens. ValueError unless all positive."""
    _check_positive(n_layer=n_layer, n_kv_head=n_kv_head, head_dim=head_dim, seq_len=seq_len, batch=batch,
                    bytes_each=bytes_each)
    return math.ceil(2 * n_layer * n_kv_head * head_dim * seq_len * batch * bytes_each)


def training_bytes(n_params: int, optimizer: str = "adamw", bytes_each: int = 4) -> int:
    """Bytes of weights, gradients and optimiser state, before any activation.

    optimizer: "adamw" (4 numbers a parameter), "muon" (3) or "sgd" without momentum (2). `bytes_each` is the
    size of each number (4 for float32). A model trained with Muon on the matrices and AdamW on the rest is the
    sum of two calls. Raises ValueError for another optimizer.
    """
    if optimizer not in STATE_PER_PARAM:
        raise ValueError(f"optimizer={optimizer!r} is unknown; use one of {', '.join(STATE_PER_PARAM)}")
    _check_positive(n_params=n_params, bytes_each=bytes_each)
    return n_params * bytes_each * (2 + STATE_PER_PARAM[optimizer])


def weight_bytes(source: nn.Module | Mapping[str, Tensor]) -> int:
    """Measured bytes of a module's saved tensors, or of a state dict; tied tensors count once.

    Counts the memory that is held (whole storages). Raises ValueError when there is no tensor to measure, or
    one on the meta device, which holds no bytes.
    """
    tensors = (source.state_dict() if isinstance(source, nn.Module) else source).values()
    storages = {}
    for tensor in tensors:
        if tensor.is_meta:
            raise ValueError("a tensor is on the meta device and holds no bytes; load the weights first")
        storage = tensor.untyped_storage()
        storages[tensor.device, storage.data_ptr()] = storage.nbytes()
    if not storages:
        raise ValueError("no tensors to measure; pass a module with weights or a state dict")
    return sum(storages.values())


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}={value} must be a positive, finite number")
