"""Byte counts: the lesson's numbers, and real modules, caches and optimisers measured beside them."""

import pytest
import torch
from torch import nn

from lifecycle_lib.model.memory import (
    LEAVES_OUT,
    gib_for_weights,
    ideal_bytes,
    kv_cache_bytes,
    training_bytes,
    weight_bytes,
)


def test_eight_billion_parameters():
    assert round(gib_for_weights(8e9, 2), 1) == 14.9
    assert round(gib_for_weights(8e9, 0.5), 1) == 3.7
    assert gib_for_weights(8e9, 2).leaves_out == LEAVES_OUT == ("KV cache", "buffers", "metadata")
    assert str(gib_for_weights(8e9, 2)) == "14.9 GiB of weights, without KV cache, buffers, metadata"


def test_decimal_gigabytes_are_caught():
    assert round(8e9 * 2 / 1e9, 1) != round(gib_for_weights(8e9, 2), 1)  # broken: GB is not GiB


def test_ideal_bytes():
    assert ideal_bytes(1000, 4) == 500
    assert ideal_bytes(3, 4) == 2  # half a byte still takes a whole one
    assert ideal_bytes(2**30, 4) / 2**30 == gib_for_weights(2**30, 0.5)


def test_kv_cache_by_hand():
    # Llama-3-8B: 32 layers, 8 KV heads of 128, 8192 tokens in bf16: exactly 1 GiB
    assert kv_cache_bytes(32, 8, 128, 8192, 1, 2) == 2**30


def test_kv_cache_is_linear_in_each_term():
    base = dict(n_layer=2, n_kv_head=3, head_dim=8, seq_len=5, batch=7, bytes_each=2)
    for name in base:
        assert kv_cache_bytes(**{**base, name: 2 * base[name]}) == 2 * kv_cache_bytes(**base)


def test_kv_cache_equals_the_cache_of_transformers():
    from transformers import LlamaConfig, LlamaForCausalLM
    shape = dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=32, **shape)).float()
    cache = model(torch.zeros(3, 7, dtype=torch.long), use_cache=True).past_key_values
    measured = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert kv_cache_bytes(2, 2, 8, 7, 3, 4) == measured
    assert kv_cache_bytes(2, 4, 8, 7, 3, 4) != measured  # broken: query heads instead of KV heads


@pytest.mark.parametrize(("name", "make"), [
    ("adamw", torch.optim.AdamW),
    ("muon", torch.optim.Muon),
    ("sgd", torch.optim.SGD),
])
def test_training_bytes_equal_a_real_optimiser(name, make):
    layer = nn.Linear(16, 24, bias=False)
    optimizer = make(layer.parameters(), lr=0.01)
    layer(torch.ones(2, 16)).sum().backward()
    optimizer.step()
    state = [t for entry in optimizer.state.values() for t in entry.values()
             if torch.is_tensor(t) and t.dim()]  # without AdamW's scalar step counter
    tensors = [layer.weight, layer.weight.grad, *state]
    assert training_bytes(16 * 24, name) == sum(t.numel() * t.element_size() for t in tensors)


def test_weight_bytes_measured():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2, bias=False).half())
    assert weight_bytes(model) == 4 * (12 + 3) + 2 * 6
    assert weight_bytes(model.state_dict()) == weight_bytes(model)


def test_tied_weights_count_once():
    model = nn.ModuleDict(dict(wte=nn.Embedding(10, 4), head=nn.Linear(4, 10, bias=False)))
    assert weight_bytes(model) == 4 * 80
    model["head"].weight = model["wte"].weight
    assert weight_bytes(model) == 4 * 40
    twice = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert twice != weight_bytes(model)  # broken: a plain sum counts the tied table twice


@pytest.mark.parametrize(("call", "message"), [
    (lambda: gib_for_weights(0, 2), "n_params=0"),
    (lambda: gib_for_weights(8e9, float("inf")), "bytes_each=inf"),
    (lambda: ideal_bytes(10, -1), "bits=-1"),
    (lambda: kv_cache_bytes(1, 1, 1, 0), "seq_len=0"),
    (lambda: training_bytes(10, "lion"), "'lion'"),
    (lambda: weight_bytes({}), "no tensors"),
    (lambda: weight_bytes(nn.ReLU()), "no tensors"),
    (lambda: weight_bytes(nn.Linear(2, 2, device="meta")), "meta"),
])
def test_bad_input_raises(call, message):
    with pytest.raises(ValueError, match=message):
        call()
