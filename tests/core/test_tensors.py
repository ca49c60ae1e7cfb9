"""core/tensors.py: safetensors in, the same tensors out, and no damaged file accepted."""

import json
import os
import pickle
import struct

import pytest
import torch
from safetensors.torch import load_file

from lifecycle_lib.core.tensors import load_meta, load_tensors, save_tensors


def state():
    g = torch.Generator().manual_seed(0)
    half = torch.randn(2, generator=g).bfloat16()
    return {"w": torch.randn(3, 4, generator=g), "b": torch.arange(5), "half": half}


def test_header_by_hand(tmp_path):
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"x": torch.tensor([1.0, 2.0])}, {"step": "7"})
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8:8 + length])
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    assert header == {"__metadata__": {"step": "7"}, "x": entry}
    assert struct.unpack("<2f", data[8 + length:]) == (1.0, 2.0)


def test_round_trip_and_the_safetensors_library(tmp_path):
    path = tmp_path / "a.safetensors"
    save_tensors(path, state())
    assert load_meta(path) == {} and os.listdir(tmp_path) == ["a.safetensors"]
    for loaded in (load_tensors(path), load_file(path)):
        assert loaded.keys() == state().keys()
        assert all(torch.equal(loaded[k], v) and loaded[k].dtype == v.dtype for k, v in state().items())


def test_tied_transposed_and_sliced_tensors(tmp_path):
    big = torch.randn(1000, 8)
    save_tensors(tmp_path / "a", {"wte": big, "head": big, "t": big[:4].T, "row": big[0]}, {})
    loaded = load_tensors(tmp_path / "a")
    assert torch.equal(loaded["wte"], loaded["head"]) and torch.equal(loaded["t"], big[:4].T)
    save_tensors(tmp_path / "row", {"row": big[0]})
    assert (tmp_path / "row").stat().st_size < 200  # the row alone, not the table it is a view of


def test_every_cut_is_noticed(tmp_path):
    """Property: no prefix of a file loads; a loader without the size check (broken on purpose) takes some."""
    path = tmp_path / "a.safetensors"
    save_tensors(path, state(), {"k": "v"})
    data = path.read_bytes()

    def careless(raw):
        (length,) = struct.unpack("<Q", raw[:8])
        return json.loads(raw[8:8 + length])

    accepted_by_careless = 0
    for cut in range(len(data)):
        path.write_bytes(data[:cut])
        for reader in (load_tensors, load_meta):
            with pytest.raises(ValueError, match="a.safetensors: damaged"):
                reader(path)
        try:
            careless(data[:cut])
            accepted_by_careless += 1
        except (ValueError, struct.error):
            pass
    assert accepted_by_careless > 0


def test_what_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match="empty"):
        save_tensors(path, {})
    with pytest.raises(ValueError, match="'step' is a int"):
        save_tensors(path, {"step": 3})
    with pytest.raises(ValueError, match="dense"):
        save_tensors(path, {"s": torch.eye(2).to_sparse()})
    with pytest.raises(ValueError, match="give strings"):
        save_tensors(path, state(), {"step": 3})
    with pytest.raises(ValueError, match="a.safetensors: cannot be read"):
        load_tensors(path)
    path.write_bytes(pickle.dumps({"w": 1}))
    with pytest.raises(ValueError, match="damaged"):
        load_tensors(path)
