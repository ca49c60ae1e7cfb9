"""Named tensors on disk: safetensors, nothing pickled, written atomically.

`save_tensors` stores a state dict with a little text beside it (`meta`: step, config, format). Tensors that
share memory (a tied head and its embedding) are stored once each: the file loads without knowing the tie.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save

from lifecycle_lib.core.records import write_bytes


def save_tensors(path: str | Path, state_dict: Mapping[str, torch.Tensor],
                 meta: Mapping[str, str] | None = None) -> None:
    """Write the tensors (copied to the CPU) and `meta` to one safetensors file, atomically.

    Raises ValueError for an empty state dict, a value that is no dense tensor, or meta that is not text.
    """
    if not state_dict:
        raise ValueError(f"{path}: the state dict is empty; pass model.state_dict()")
    for name, tensor in state_dict.items():
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            kind = tensor.layout if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise ValueError(f"{path}: entry {name!r} is a {kind}; save dense tensors, and text in `meta`")
    for key, value in (meta or {}).items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise ValueError(f"{path}: meta {key!r} = {value!r}; give strings (json.dumps the value)")
    # a fresh copy each: safetensors refuses shared memory, and a view would drag its whole storage along
    copies = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
              for name, tensor in state_dict.items()}
    write_bytes(path, save(copies, metadata=dict(meta) if meta else None))


def load_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, on the CPU, in memory of their own (no map of the file is kept).

    Raises ValueError naming the path if the file is missing, cut short or no safetensors file.
    """
    data = _read(path)
    try:
        return load(data)
    except SafetensorError as error:
        raise _damaged(path, error) from error


def load_meta(path: str | Path) -> dict[str, str]:
    """The text saved beside the tensors, {} if there is none. Raises ValueError as `load_tensors` does."""
    _read(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error


def _read(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); check the path, or make the artifact "
                         "first") from error


def _damaged(path: str | Path, error: Exception) -> ValueError:
    return ValueError(f"{path}: damaged, not a whole safetensors file ({error}); delete it and make it again")
