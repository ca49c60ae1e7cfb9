"""Packed weights: codes by hand, ggml and torchao as oracles, bounds on the error, bytes, files, broken variants."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from lifecycle_lib.core.seeds import make_generator
from lifecycle_lib.core.tensors import load_tensors, save_tensors
from lifecycle_lib.model import quantise as module
from lifecycle_lib.model.gpt import GPT, GPTConfig
from lifecycle_lib.model.memory import ideal_bytes, weight_bytes
from lifecycle_lib.model.quantise import (
    RULES,
    PackedWeight,
    QuantisedEmbedding,
    QuantisedLinear,
    dequantise_weight,
    pack_nibbles,
    quantise_model,
    quantise_weight,
    simulate_model,
    simulate_weight,
    size_report,
    unpack_nibbles,
)

GGML = ["q8_0", "q4_0", "q4_1"]


def weights(rows=12, width=96, seed=0):
    """Rows of different sizes, with a row and a block of zeros."""
    generator = make_generator(seed, "weights")
    w = torch.randn(rows, width, generator=generator) * torch.logspace(-2, 1, rows).unsqueeze(1)
    w[0], w[1, 32:64] = 0, 0
    return w


def rounded(w, rule, group_size=32):
    return dequantise_weight(*quantise_weight(w, rule, group_size), rule)


def ggml(w, rule):
    """(bytes of each block, dequantised weight) from the numpy reference in the gguf package."""
    gguf = pytest.importorskip("gguf", reason="the gguf package (extra 'peers') is not installed")
    kind = gguf.GGMLQuantizationType[rule.upper()]
    data = gguf.quants.quantize(w.numpy(), kind)
    return data.reshape(-1, gguf.GGML_QUANT_SIZES[kind][1]), torch.from_numpy(gguf.quants.dequantize(data, kind))


def tiny_gpt(seed=0, n_hidden=96):
    torch.manual_seed(seed)
    return GPT(GPTConfig(vocab_size=50, block_size=16, n_layer=2, n_head=2, n_embd=64, n_hidden=n_hidden)).eval()


IDX = torch.arange(30).view(2, 15)


# ---------------------------------------------------------------- by hand

def test_int8_by_hand():
    codes, scale, minimum = quantise_weight(torch.tensor([[2.55, -0.02, 0.034, 0.0]]), "int8")
    assert scale.item() == pytest.approx(0.02)
    assert codes.tolist() == [[127, -1, 2, 0]]
    assert minimum is None


def test_q4_0_by_hand():
    # largest weight -4: scale 0.5, and w / 0.5 + 8 rounded: 0, 16 -> 15 (clipped), 9, 8
    codes, scale, _ = quantise_weight(torch.tensor([[-4.0, 4.0, 0.5, 0.0]]), "q4_0", 4)
    assert scale.tolist() == [[0.5]]
    assert codes.tolist() == [[0 | 9 << 4, 15 | 8 << 4]]
    assert rounded(torch.tensor([[-4.0, 4.0, 0.5, 0.0]]), "q4_0", 4).tolist() == [[-4.0, 3.5, 0.5, 0.0]]


def test_q4_1_by_hand():
    codes, scale, minimum = quantise_weight(torch.tensor([[1.0, 16.0, 2.4, 7.6]]), "q4_1", 4)
    assert (scale.item(), minimum.item()) == (1.0, 1.0)
    assert codes.tolist() == [[0 | 1 << 4, 15 | 7 << 4]]  # 1.4 -> 1 and 6.6 -> 7


def test_nibbles():
    codes = torch.randint(0, 16, (5, 3, 8), dtype=torch.uint8)
    assert pack_nibbles(codes).shape == (5, 3, 4)
    assert torch.equal(unpack_nibbles(pack_nibbles(codes)), codes)


# ---------------------------------------------------------------- oracles

@pytest.mark.parametrize("rule", GGML)
@pytest.mark.parametrize("seed", [0, 1])
def test_bytes_and_values_equal_ggml(rule, seed):
    w = weights(seed=seed)
    blocks, values = ggml(w, rule)
    codes, scale, minimum = quantise_weight(w, rule)
    header = [t.numpy().view(np.uint8).reshape(-1, 2) for t in (scale, minimum) if t is not None]
    mine = np.concatenate([*header, codes.numpy().view(np.uint8).reshape(len(blocks), -1)], axis=1)
    assert np.array_equal(mine, blocks)
    assert torch.allclose(rounded(w, rule), values, rtol=0, atol=1e-5)


def test_ties_round_away_from_zero_as_ggml():
    w = torch.arange(-16, 16).float().view(1, 32) / 2
    w[0, 0] = 127  # scale 1: the others lie halfway between codes
    assert torch.equal(rounded(w, "q8_0"), ggml(w, "q8_0")[1])
    assert rounded(w, "q8_0")[0, 1].item() == -8  # -7.5


def test_int8_equals_torchao():
    quantization = pytest.importorskip("torchao.quantization", reason="torchao (extra 'peers') is not installed")
    layer = nn.Linear(96, 12, bias=False)
    layer.weight.data = weights(13)[1:] / 10
    x = torch.randn(4, 96, generator=make_generator(0, "x"))
    mine = QuantisedLinear(layer, "int8")
    peer = nn.Sequential(copy.deepcopy(layer))
    quantization.quantize_(peer, quantization.Int8WeightOnlyConfig())
    assert torch.equal(mine.codes, peer[0].weight.qdata)
    assert torch.allclose(mine.weight, peer[0].weight.dequantize(), rtol=0, atol=1e-5)
    assert torch.allclose(mine(x), peer(x), rtol=0, atol=1e-5)


# ---------------------------------------------------------------- the error is bounded

def excess(w, back, rule, group_size=32):
    """Largest error beyond half a step and the float16 rounding of scale and minimum; at most 0 when right."""
    rows, width = w.shape
    size = width if rule == "int8" else group_size
    blocks, back = w.view(rows, -1, size).double(), back.view(rows, -1, size).double()
    top = blocks.abs().amax(-1, keepdim=True)
    spread = blocks.amax(-1, keepdim=True) - blocks.amin(-1, keepdim=True)
    step = {"int8": top / 127.5, "q8_0": top / 127, "q4_0": top / 8, "q4_1": spread / 15}[rule]
    half_float = 0 if rule == "int8" else 2**-11 * (spread + top if rule == "q4_1" else top) + 2**-20
    bound = step / 2 + half_float
    if rule == "q4_0":  # code 16 does not exist: past 7.5 steps on the side opposite to the largest weight
        largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
        bound = torch.where(blocks * -largest.sign() > 7.5 * step, step + half_float, bound)
    return float(((blocks - back).abs() - bound - 1e-6 * top).max())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("group_size", [16, 32, 96])
def test_error_is_within_half_a_step(rule, group_size):
    for seed in range(5):
        w = weights(seed=seed)
        assert excess(w, rounded(w, rule, group_size), rule, group_size) <= 0
        assert torch.equal(rounded(w, rule, group_size)[0], torch.zeros(96))


def test_swapped_nibbles_are_caught(monkeypatch):
    w = weights()
    right = rounded(w, "q4_0")
    monkeypatch.setattr(module, "unpack_nibbles", lambda p: torch.cat((p >> 4, p & 15), dim=-1))
    assert excess(w, rounded(w, "q4_0"), "q4_0") > 0
    assert not torch.allclose(rounded(w, "q4_0"), right)


@pytest.mark.parametrize("rule", GGML)
def test_scale_of_the_wrong_group_is_caught(rule):
    w = weights()
    codes, scale, minimum = quantise_weight(w, rule)
    wrong = dequantise_weight(codes, scale.roll(1, dims=1), minimum, rule)
    assert excess(w, wrong, rule) > 0


def test_truncation_instead_of_rounding_is_caught(monkeypatch):
    w = weights()
    monkeypatch.setattr(module, "_round_half_away", torch.trunc)
    assert excess(w, rounded(w, "q8_0"), "q8_0") > 0


def test_smaller_groups_and_more_bits_err_less():
    w = weights()
    def error(rule, group_size=32):
        return float((rounded(w, rule, group_size) - w).square().mean())
    assert error("q4_0", 16) < error("q4_0", 32) < error("q4_0", 96)
    assert error("q8_0") < error("int8") < error("q4_1") < error("q4_0")


# ---------------------------------------------------------------- modules

@pytest.mark.parametrize("rule", RULES)
def test_modules_equal_plain_layers_with_the_rounded_weight(rule):
    linear, embedding = nn.Linear(96, 12), nn.Embedding(12, 96)
    linear.weight.data = embedding.weight.data = weights()
    x = torch.randn(2, 3, 96, requires_grad=True)
    quantised = QuantisedLinear(linear, rule)
    assert torch.allclose(quantised(x), nn.functional.linear(x, rounded(weights(), rule), linear.bias))
    quantised(x).sum().backward()  # gradients pass through to the input: a LoRA can train on top
    assert x.grad.abs().sum() > 0
    table = QuantisedEmbedding(embedding, rule)
    idx = torch.tensor([[1, 5], [11, 0]])
    assert torch.equal(table(idx), rounded(weights(), rule)[idx])
    assert torch.equal(table.weight, rounded(weights(), rule))
    assert [name for name, _ in table.named_parameters()] == []


@pytest.mark.parametrize(("bits", "rule"), [(8, None), (4, None), (8, "q8_0"), (4, "q4_1")])
def test_quantised_gpt_equals_the_gpt_with_rounded_weights(bits, rule):
    model = tiny_gpt()
    small = quantise_model(model, bits, rule=rule)
    by_hand = copy.deepcopy(model)
    for name, p in by_hand.named_parameters():
        if p.dim() == 2:
            p.data = rounded(p.data, "int8" if name.startswith("wte") else rule or {8: "int8", 4: "q4_0"}[bits])
    assert torch.allclose(small(IDX), by_hand(IDX), atol=1e-5)
    assert not torch.equal(small(IDX), model(IDX))
    assert sum(isinstance(m, QuantisedLinear) for m in small.modules()) == 14
    assert type(model.wte) is nn.Embedding  # the original is left alone


def test_int4_is_packed_in_memory():
    model = tiny_gpt()
    small = quantise_model(model, 4, embedding_bits=4)
    n = sum(m.weight.numel() for m in model.modules() if isinstance(m, (nn.Linear, nn.Embedding)))
    assert sum(m.codes.nbytes for m in small.modules() if isinstance(m, PackedWeight)) == n // 2
    assert weight_bytes(small) < 0.17 * weight_bytes(model)


def test_keep_and_embedding_bits():
    small = quantise_model(tiny_gpt(), 4, keep=("norm", "blocks.1.", "wo"), embedding_bits=None)
    assert type(small.wte) is nn.Embedding
    assert type(small.blocks[0].attn.wo) is nn.Linear
    assert type(small.blocks[1].attn.wq) is nn.Linear
    assert type(small.blocks[0].attn.wq) is QuantisedLinear


def test_tied_head_shares_the_packed_table():
    torch.manual_seed(0)
    model = nn.ModuleDict(dict(wte=nn.Embedding(10, 32), head=nn.Linear(32, 10, bias=False)))
    model["head"].weight = model["wte"].weight
    small = quantise_model(model, 4)
    assert small["head"].codes is small["wte"].codes
    assert (small["head"].rule, small["head"].bits) == ("int8", 8)
    assert torch.equal(small["head"].weight, small["wte"].weight)
    assert weight_bytes(small) == size_report(small)["total_bytes"] == 320 + 40
    with pytest.raises(ValueError, match="nothing to quantise"):
        quantise_model(model, 4, embedding_bits=None)  # a kept table keeps its tied head


@pytest.mark.parametrize("bits", [8, 4])
def test_state_dict_round_trip_through_safetensors(bits, tmp_path):
    small = quantise_model(tiny_gpt(0), bits)
    save_tensors(tmp_path / "small.safetensors", small.state_dict())
    other = quantise_model(tiny_gpt(1), bits)
    before = other(IDX)
    other.load_state_dict(load_tensors(tmp_path / "small.safetensors"))
    assert torch.equal(other(IDX), small(IDX))
    assert not torch.equal(other(IDX), before)
    assert other.blocks[0].attn.wq.codes.dtype == {8: torch.int8, 4: torch.uint8}[bits]


def test_bfloat16_model():
    small = quantise_model(tiny_gpt().bfloat16(), 4)
    assert small.wte.weight.dtype == torch.bfloat16
    assert small(IDX).dtype == torch.bfloat16


# ---------------------------------------------------------------- bytes

@pytest.mark.parametrize("group_size", [16, 32, 64])
def test_size_report_follows_the_group_law(group_size):
    model = tiny_gpt(n_hidden=128)
    small = quantise_model(model, 4, group_size=group_size, embedding_bits=4)
    report = size_report(small)
    n = sum(m.weight.numel() for m in model.modules() if isinstance(m, (nn.Linear, nn.Embedding)))
    assert report["scale_bytes"] / report["packed_bytes"] == 16 / (group_size * 4)
    assert report["packed_bytes"] == ideal_bytes(n, 4)
    assert report["ideal_bytes"] == ideal_bytes(model.n_params(), 4)
    assert report["total_bytes"] == weight_bytes(small)
    assert report["overhead"] == pytest.approx(report["total_bytes"] / report["ideal_bytes"] - 1)


def test_size_report_by_hand():
    model = nn.Sequential(nn.Embedding(8, 32), nn.LayerNorm(32), nn.Linear(32, 4))
    report = size_report(quantise_model(model, 4))
    assert report["packed_bytes"] == 8 * 32 + 4 * 32 // 2  # embedding int8, linear int4
    assert report["scale_bytes"] == 8 * 4 + 4 * 2
    assert report["kept_bytes"] == 4 * (64 + 4)
    assert report["ideal_bytes"] == (8 * 32 + 4 * 32 + 64 + 4) / 2


# ---------------------------------------------------------------- simulated widths

def test_simulated_weight():
    w = weights()
    for bits in (2, 3, 4, 8):
        q = simulate_weight(w, bits)
        assert max(len(row.unique()) for row in q) <= 2**bits - 1
        step = w.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        assert ((q - w).abs() <= step * 0.5001).all()
    assert torch.equal(simulate_weight(torch.tensor([[3.0, 1.4, -0.4], [0.3, 0.1, 0.2]]), 3, 0),
                       torch.tensor([[3.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))  # one scale in all: the small row is lost


def test_simulated_model_keeps_its_size():
    model = tiny_gpt()
    simulated = simulate_model(model, 3, group_size=32)
    assert weight_bytes(simulated) == weight_bytes(model)
    assert torch.equal(simulated.blocks[0].attn.wq.weight, simulate_weight(model.blocks[0].attn.wq.weight, 3, 32))
    assert not torch.equal(simulated.wte.weight, model.wte.weight)
    assert torch.equal(simulate_model(model, 3, embedding_bits=None).wte.weight, model.wte.weight)


# ---------------------------------------------------------------- bad input

def poisoned(value):
    model = tiny_gpt()
    model.blocks[1].attn.wv.weight.data[3, 3] = value
    return model


@pytest.mark.parametrize(("call", "message"), [
    (lambda: quantise_model(tiny_gpt(), 3), "bits=3"),
    (lambda: quantise_model(tiny_gpt(), 4, embedding_bits=2), "embedding_bits=2"),
    (lambda: quantise_model(tiny_gpt(), 4, rule="q8_0"), "does not have 4 bits"),
    (lambda: quantise_model(tiny_gpt(), 4, group_size=48), r"'blocks.0.attn.wq': group_size=48"),
    (lambda: quantise_model(tiny_gpt(), 4, group_size=0), "group_size=0"),
    (lambda: quantise_model(tiny_gpt(), 4, group_size=1), "must be even"),
    (lambda: quantise_model(poisoned(float("nan")), 8), "'blocks.1.attn.wv': the weight holds NaN"),
    (lambda: quantise_model(poisoned(float("inf")), 4), "NaN or infinity"),
    (lambda: quantise_model(poisoned(1e6), 4), "does not fit float16"),
    (lambda: quantise_model(nn.ReLU(), 4), "nothing to quantise"),
    (lambda: quantise_model(tiny_gpt(), 4, keep=("w",)), "nothing to quantise"),
    (lambda: quantise_weight(torch.ones(2, 32), "q5_0"), "'q5_0'"),
    (lambda: quantise_weight(torch.ones(32), "int8"), "only a matrix"),
    (lambda: size_report(tiny_gpt()), "no packed layers"),
    (lambda: simulate_weight(torch.ones(2, 32), 1), "bits=1"),
    (lambda: simulate_weight(torch.ones(2, 32), 4, 5), "does not divide"),
    (lambda: simulate_model(poisoned(float("nan")), 3), "'blocks.1.attn.wv'"),
])
def test_bad_input_raises(call, message):
    with pytest.raises(ValueError, match=message):
        call()
