"""Packed post-training quantisation: int8 and int4 weights that stay small in memory.

Four rounding rules, each  weight ~ scale * code (+ minimum):

  int8   one float32 scale a row (output channel), scale = max|w| / 127.5, codes -128..127, round half to even:
         the rule of torchao's int8 weight-only
  q8_0   one float16 scale a group, scale = max|w| / 127, codes -127..127, round half away from zero
  q4_0   one float16 scale a group, scale = (the w of largest |w|) / -8, codes 0..15 stand for -8..7
  q4_1   one float16 scale and one float16 minimum a group (asymmetric), scale = (max - min) / 15, codes 0..15

q8_0, q4_0 and q4_1 with groups of 32 are the formats of ggml under those names, codes and nibble order included.
Codes are computed with the scale before it is rounded to float16, as there. The error of a weight is at most half a
step, plus the float16 rounding of scale and minimum; in q4_0 up to one whole step at the end opposite to the largest
weight, where code 16 is missing.

Two 4-bit codes share a byte: in each group the first half lies in the low nibbles, the second half in the high ones.
Weights are unpacked in each forward: this saves memory, not time; a real kernel fuses the two.

`simulate_weight` and `simulate_model` round to any width from 2 to 8 bits but keep float32: nothing is packed.

Leaves out: activations, calibration (GPTQ, AWQ), double quantisation of scales.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RULES = {"int8": 8, "q8_0": 8, "q4_0": 4, "q4_1": 4}  # rule -> bits a code
DEFAULT_RULE = {8: "int8", 4: "q4_0"}

# O = out_features (or num_embeddings), I = in_features (or embedding_dim), N = groups in a row, G = group size


def pack_nibbles(codes: Tensor) -> Tensor:
    """Codes 0..15 (..., G) uint8, G even -> bytes (..., G/2): first half low nibbles, second half high."""
    low, high = codes.chunk(2, dim=-1)
    return low | high << 4


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Bytes (..., G/2) -> codes 0..15 (..., G) uint8, the inverse of pack_nibbles."""
    return torch.cat((packed & 15, packed >> 4), dim=-1)


def quantise_weight(weight: Tensor, rule: str, group_size: int = 32) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scale and minimum of a weight (O, I) under one of RULES.

    Returns codes int8 (O, I), or packed uint8 (O, I/2) for the 4-bit rules; scale (O, N) and minimum (O, N) or
    None. "int8" ignores group_size: N = 1. Raises ValueError for an unknown rule, a weight that is not a matrix
    or holds NaN or infinity, a group size that is odd or does not divide I, and a scale too large for float16.
    """
    _check(weight, rule, group_size)
    rows, width = weight.shape
    blocks = weight.detach().float().view(rows, -1, width if rule == "int8" else group_size)  # (O, N, G)
    minimum = None
    if rule == "int8":
        scale = blocks.abs().amax(-1, keepdim=True) / 127.5
        codes = (blocks * _inverse(scale)).round().clamp(-128, 127).to(torch.int8)
    elif rule == "q8_0":
        scale = blocks.abs().amax(-1, keepdim=True) / 127
        codes = _round_half_away(blocks * _inverse(scale)).to(torch.int8)
    elif rule == "q4_0":
        largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
        scale = largest / -8
        codes = (blocks * _inverse(scale) + 8.5).trunc().clamp(0, 15).to(torch.uint8)
    else:
        minimum = blocks.amin(-1, keepdim=True)
        scale = (blocks.amax(-1, keepdim=True) - minimum) / 15
        codes = ((blocks - minimum) * _inverse(scale) + 0.5).trunc().clamp(0, 15).to(torch.uint8)
    if RULES[rule] == 4:
        codes = pack_nibbles(codes)
    if rule != "int8":
        scale, minimum = _half(scale), None if minimum is None else _half(minimum)
    return codes.reshape(rows, -1), scale.squeeze(-1), None if minimum is None else minimum.squeeze(-1)


def dequantise_weight(codes: Tensor, scale: Tensor, minimum: Tensor | None, rule: str) -> Tensor:
    """The float32 weight (O, I) that codes, scale and minimum stand for; any leading shape (..., I) works."""
    blocks = codes.unflatten(-1, (scale.shape[-1], -1))  # (O, N, G) or (O, N, G/2)
    if RULES[rule] == 4:
        blocks = unpack_nibbles(blocks)
    values = blocks.float()
    if rule == "q4_0":
        values = values - 8
    values = values * scale.float().unsqueeze(-1)
    if minimum is not None:
        values = values + minimum.float().unsqueeze(-1)
    return values.flatten(-2)


class PackedWeight(nn.Module):
    """Buffers `codes`, `scale`, `minimum` of one matrix; `weight` unpacks it on each use."""

    def __init__(self, weight: Tensor, rule: str, group_size: int = 32):
        super().__init__()
        codes, scale, minimum = quantise_weight(weight, rule, group_size)
        self.rule, self.bits, self.dtype = rule, RULES[rule], weight.dtype
        self.shape = tuple(weight.shape)
        self.group_size = self.shape[1] // scale.shape[1]
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("minimum", minimum)

    @property
    def weight(self) -> Tensor:
        """The dequantised matrix (O, I), in the dtype of the original; a new tensor each time."""
        return dequantise_weight(self.codes, self.scale, self.minimum, self.rule).to(self.dtype)

    def extra_repr(self) -> str:
        return f"{self.shape[0]}, {self.shape[1]}, rule={self.rule}, group_size={self.group_size}"


class QuantisedLinear(PackedWeight):
    """nn.Linear with a packed weight (O, I); the bias stays as it was."""

    def __init__(self, linear: nn.Linear, rule: str, group_size: int = 32):
        super().__init__(linear.weight, rule, group_size)
        self.out_features, self.in_features = self.shape
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:  # (..., I) -> (..., O)
        return F.linear(x, self.weight.to(x.dtype), self.bias)


class QuantisedEmbedding(PackedWeight):
    """nn.Embedding with a packed table; only the rows that are looked up are unpacked. `weight` serves a tied head."""

    def __init__(self, embedding: nn.Embedding, rule: str, group_size: int = 32):
        super().__init__(embedding.weight, rule, group_size)
        self.num_embeddings, self.embedding_dim = self.shape

    def forward(self, idx: Tensor) -> Tensor:  # (...) -> (..., I)
        minimum = None if self.minimum is None else self.minimum[idx]
        return dequantise_weight(self.codes[idx], self.scale[idx], minimum, self.rule).to(self.dtype)


def quantise_model(model: nn.Module, bits: int, group_size: int = 32, keep: tuple[str, ...] = ("norm",),
                   embedding_bits: int | None = 8, rule: str | None = None) -> nn.Module:
    """A copy of `model` with each nn.Linear and nn.Embedding packed; everything else stays as it is.

    bits: 8 (rule "int8") or 4 (rule "q4_0"); `rule` picks another of RULES for the Linear layers. Layers whose
    name holds one of `keep` stay in float; embedding_bits=None keeps the embeddings. A Linear tied to an
    embedding shares its packed codes, or stays in float with it. The copy's state dict loads into a model
    quantised the same way.

    Raises ValueError, naming the layer, for bits other than 4 and 8, a rule of other bits, a group size that does
    not divide the width, weights that are not finite, and a model in which nothing was quantised.
    """
    for name, value in (("bits", bits), ("embedding_bits", embedding_bits)):
        if value not in DEFAULT_RULE and not (name == "embedding_bits" and value is None):
            raise ValueError(f"{name}={value} cannot be packed; use 8 or 4 (see simulate_model for other widths)")
    rule = rule or DEFAULT_RULE[bits]
    if RULES.get(rule) != bits:
        raise ValueError(f"rule={rule!r} does not have {bits} bits; use one of "
                         f"{', '.join(r for r, b in RULES.items() if b == bits)}")
    model = copy.deepcopy(model)
    packed: dict[int, PackedWeight] = {}  # id of the original weight -> its packed form, for tied layers
    for kind in (nn.Embedding, nn.Linear):  # embeddings first: a tied head follows the embedding
        for parent, child_name, full_name in list(_layers(model, kind, keep, embedding_bits is None)):
            layer = getattr(parent, child_name)
            try:
                if kind is nn.Embedding:
                    new = QuantisedEmbedding(layer, DEFAULT_RULE[embedding_bits], group_size)
                else:
                    tied = packed.get(id(layer.weight))
                    new = QuantisedLinear(layer, tied.rule if tied else rule, group_size)
            except ValueError as error:
                raise ValueError(f"layer {full_name!r}: {error}") from error
            first = packed.setdefault(id(layer.weight), new)
            new.codes, new.scale, new.minimum = first.codes, first.scale, first.minimum
            setattr(parent, child_name, new.train(layer.training))
    if not packed:
        raise ValueError(f"nothing to quantise: no nn.Linear or nn.Embedding outside keep={keep}")
    return model


def size_report(model: nn.Module) -> dict[str, float]:
    """Where the bytes of a quantised model are, against the ideal.

    ideal_bytes: every weight and kept parameter at the narrowest width in the model, nothing else. packed_bytes:
    codes. scale_bytes: scales and minimums. kept_bytes: all else that is saved. total_bytes: their sum.
    overhead: total / ideal - 1. Tied tensors count once. Raises ValueError for a model without packed layers.
    """
    layers = [m for m in model.modules() if isinstance(m, PackedWeight)]
    if not layers:
        raise ValueError("the model has no packed layers; make it with quantise_model")
    codes = {m.codes.data_ptr(): m for m in layers}
    scales = {t.data_ptr(): t for m in layers for t in (m.scale, m.minimum) if t is not None}
    kept = {t.data_ptr(): t for t in model.state_dict(keep_vars=True).values()
            if t.data_ptr() not in codes and t.data_ptr() not in scales}
    n_params = sum(m.shape[0] * m.shape[1] for m in codes.values())
    n_params += sum(t.numel() for t in kept.values() if isinstance(t, nn.Parameter))
    report = {
        "ideal_bytes": n_params * min(m.bits for m in layers) / 8,
        "packed_bytes": sum(m.codes.nbytes for m in codes.values()),
        "scale_bytes": sum(t.nbytes for t in scales.values()),
        "kept_bytes": sum(t.nbytes for t in kept.values()),
    }
    report["total_bytes"] = report["packed_bytes"] + report["scale_bytes"] + report["kept_bytes"]
    report["overhead"] = report["total_bytes"] / report["ideal_bytes"] - 1
    return report


def simulate_weight(weight: Tensor, bits: int, group_size: int | None = None) -> Tensor:
    """`weight` (O, I) rounded to 2**bits - 1 symmetric levels, still in float: shows the harm, saves no byte.

    group_size: None for one scale a row, 0 for one scale in all, else weights a group. ValueError for bits
    outside 2..8, a group size that does not divide I, and weights that are not finite.
    """
    if bits not in range(2, 9):
        raise ValueError(f"bits={bits} must be from 2 to 8")
    _check(weight, "int8", 0)
    if group_size is not None and (group_size < 0 or group_size and weight.shape[1] % group_size):
        raise ValueError(f"group_size={group_size} does not divide the row of {weight.shape[1]} weights")
    blocks = weight.detach().float()
    blocks = blocks.view(1, -1) if group_size == 0 else blocks.view(-1, group_size or weight.shape[1])
    top = 2 ** (bits - 1) - 1
    scale = blocks.abs().amax(-1, keepdim=True) / top
    return ((blocks * _inverse(scale)).round().clamp(-top, top) * scale).view_as(weight).to(weight.dtype)


def simulate_model(model: nn.Module, bits: int, group_size: int | None = None, keep: tuple[str, ...] = ("norm",),
                   embedding_bits: int | None = 8) -> nn.Module:
    """A copy of `model` with its weights rounded by simulate_weight: same size, same layers (embeddings by row)."""
    model = copy.deepcopy(model)
    done = set()
    for kind, width, group in ((nn.Embedding, embedding_bits, None), (nn.Linear, bits, group_size)):
        for parent, child_name, full_name in _layers(model, kind, keep, embedding_bits is None):
            weight = getattr(parent, child_name).weight
            if id(weight) in done:
                continue
            done.add(id(weight))
            try:
                weight.data = simulate_weight(weight, width, group)
            except ValueError as error:
                raise ValueError(f"layer {full_name!r}: {error}") from error
    if not done:
        raise ValueError(f"nothing to quantise: no nn.Linear or nn.Embedding outside keep={keep}")
    return model


def _layers(model: nn.Module, kind: type, keep: tuple[str, ...],
            keep_embeddings: bool) -> Iterator[tuple[nn.Module, str, str]]:
    """(parent, attribute, full name) of each layer of exactly this class that is not to be kept in float."""
    kept = {id(m.weight) for name, m in model.named_modules() if type(m) is nn.Embedding
            and (keep_embeddings or any(part in name for part in keep))}
    for parent_name, parent in model.named_modules():
        for child_name, child in parent.named_children():
            name = f"{parent_name}.{child_name}".lstrip(".")
            if type(child) is kind and id(child.weight) not in kept and not any(part in name for part in keep):
                yield parent, child_name, name


def _check(weight: Tensor, rule: str, group_size: int) -> None:
    if rule not in RULES:
        raise ValueError(f"rule={rule!r} is unknown; use one of {', '.join(RULES)}")
    if weight.dim() != 2 or not weight.numel():
        raise ValueError(f"weight has shape {tuple(weight.shape)}; only a matrix (out, in) can be quantised")
    if not torch.isfinite(weight).all():
        raise ValueError("the weight holds NaN or infinity; the training diverged, quantise an earlier checkpoint")
    width = weight.shape[1]
    if rule != "int8" and (group_size < 2 or group_size % 2 or width % group_size):
        fits = [g for g in (16, 32, 64, 128) if width % g == 0] or [g for g in (2, 4, 8) if width % g == 0]
        raise ValueError(f"group_size={group_size} must be even and divide the row of {width} weights; try {fits}")


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0.0, 1 / scale)  # a block of zeros has scale 0, and codes of zero


def _round_half_away(x: Tensor) -> Tensor:
    whole = x.abs().floor()
    return x.sign() * (whole + (2 * (x.abs() - whole)).floor())


def _half(x: Tensor) -> Tensor:
    half = x.half()
    if not torch.isfinite(half).all():
        raise ValueError(f"a scale of {float(x.abs().max()):.3g} does not fit float16 (65504); use rule 'int8'")
    return half
