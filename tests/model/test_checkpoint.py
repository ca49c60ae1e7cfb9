"""Checkpoints: round trips, the safetensors library as reader, the hash by hand, and damage that must be named."""

import hashlib
import pickle
import struct

import pytest
import safetensors.torch
import torch

from lifecycle_lib.core.records import read_json, write_json
from lifecycle_lib.model import checkpoint
from lifecycle_lib.model.checkpoint import load_checkpoint, save_checkpoint, weights_hash
from lifecycle_lib.model.gpt import GPT, GPTConfig
from lifecycle_lib.model.quantise import quantise_model

CFG = GPTConfig(vocab_size=50, block_size=16, n_layer=2, n_head=2, n_embd=32)
IDX = torch.arange(12).view(2, 6)


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    return GPT(CFG).eval()


@pytest.fixture
def folder(model, tmp_path):
    save_checkpoint(tmp_path, model)
    return tmp_path


def test_hash_by_hand():
    one = torch.nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        one.weight.copy_(torch.tensor([[1.0, -2.0]]))
    text = b"weighttorch.float32(1, 2)" + struct.pack("<2f", 1.0, -2.0)
    assert weights_hash(one) == hashlib.sha256(text).hexdigest()


def test_any_change_of_a_weight_changes_the_hash(model):
    seen = {weights_hash(model)}
    for p in model.parameters():
        with torch.no_grad():
            p.view(-1)[-1] += 1e-6 + 1e-6 * p.view(-1)[-1].abs()
        seen.add(weights_hash(model))
    assert len(seen) == 1 + len(list(model.parameters()))


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("n_layer, n_head", [(1, 1), (3, 4)])
def test_round_trip(tmp_path, shift, n_layer, n_head):
    cfg = GPTConfig(vocab_size=50, block_size=16, n_layer=n_layer, n_head=n_head, n_embd=32, token_shift=shift)
    model = GPT(cfg).eval()
    save_checkpoint(tmp_path, model)
    again = load_checkpoint(tmp_path, expect=cfg)
    assert again.cfg == cfg and not again.training
    assert weights_hash(again) == weights_hash(model)
    assert torch.equal(again(IDX), model(IDX))


@pytest.mark.parametrize("settings", [{"bits": 8}, {"bits": 4, "group_size": 32}])
def test_quantised_round_trip_stays_packed(model, tmp_path, settings):
    packed = quantise_model(model, **settings)
    save_checkpoint(tmp_path, packed, settings)
    again = load_checkpoint(tmp_path)
    assert weights_hash(again) == weights_hash(packed) != weights_hash(model)
    assert torch.equal(again(IDX), packed(IDX))
    full = sum(p.numel() for p in model.parameters()) * 4
    assert (tmp_path / "model.safetensors").stat().st_size < full * (settings["bits"] / 32 + 0.2)


def test_safetensors_reads_the_same_tensors(folder, model):
    theirs = safetensors.torch.load_file(folder / "model.safetensors")
    assert theirs.keys() == model.state_dict().keys()  # the tied head is stored once, the rotary tables not at all
    assert all(torch.equal(theirs[k], v) for k, v in model.state_dict().items())


def test_another_shape_is_refused(folder):
    other = GPTConfig(vocab_size=50, block_size=16, n_layer=3, n_head=2, n_embd=32)
    with pytest.raises(ValueError, match=r"n_layer=2 \(expected 3\)"):
        load_checkpoint(folder, expect=other)


def edit(folder, change) -> None:
    meta = read_json(folder / "config.json")
    change(meta)
    write_json(folder / "config.json", meta)


@pytest.mark.parametrize("change, message", [
    (lambda m: m.update(format="other"), "format is not"), (lambda m: m.pop("quantisation"), "damaged"),
    (lambda m: m["model"].update(wings=2), "damaged"), (lambda m: m.pop("model"), "damaged"),
    (lambda m: m["model"].update(n_head=0), "n_head=0"), (lambda m: m["model"].update(n_layer=1), "do not fit"),
    (lambda m: m["model"].update(token_shift=False), "do not fit")])
def test_a_damaged_config_is_named(folder, change, message):
    edit(folder, change)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(folder)


def resave(folder, change) -> None:
    state = safetensors.torch.load_file(folder / "model.safetensors")
    change(state)
    safetensors.torch.save_file(state, folder / "model.safetensors")


@pytest.mark.parametrize("change", [
    lambda s: s.pop("norm_f.weight"), lambda s: s.update(extra=torch.zeros(1)),
    lambda s: s.update({"wte.weight": s["wte.weight"][:-1].clone()}),
    lambda s: s.update({"wte.weight": s["wte.weight"].half()})], ids=["missing", "extra", "shape", "dtype"])
def test_foreign_tensors_are_refused(folder, change):
    resave(folder, change)
    with pytest.raises(ValueError, match="1 tensors do not fit"):
        load_checkpoint(folder)


def test_truncated_missing_and_pickled_files_are_refused(folder):
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="model.safetensors"):
        load_checkpoint(folder)

    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was executed",))

    weights.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match="model.safetensors"):
        load_checkpoint(folder)
    weights.unlink()
    with pytest.raises(ValueError, match="model.safetensors"):
        load_checkpoint(folder)
    with pytest.raises(ValueError, match="config.json"):
        load_checkpoint(folder / "nowhere")


def test_a_saver_that_drops_a_digit_is_caught(model, tmp_path, monkeypatch):
    """A checkpoint written in half precision comes back changed: the round-trip check must see it."""
    whole = checkpoint.save_tensors
    monkeypatch.setattr(checkpoint, "save_tensors", lambda path, state, meta: whole(
        path, {k: v.half().float() for k, v in state.items()}, meta))
    save_checkpoint(tmp_path, model)
    assert weights_hash(load_checkpoint(tmp_path)) != weights_hash(model)
