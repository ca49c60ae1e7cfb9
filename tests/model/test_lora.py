"""LoRA against peft, by hand, and under the two promises that removal rests on: detach is exact, merge is not."""

import pytest
import torch
from torch import nn

from lifecycle_lib.model.checkpoint import weights_hash
from lifecycle_lib.model.gpt import GPT, GPTConfig
from lifecycle_lib.model.lora import (
    LoRAConfig,
    LoRALinear,
    attach,
    detach,
    load_lora,
    make_adapter,
    merge,
    n_trained,
    save_lora,
)

CFG = LoRAConfig(rank=3, alpha=6.0)


def small(seed=0, **changes):
    torch.manual_seed(seed)
    return GPT(GPTConfig(**{"vocab_size": 50, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 16} | changes))


def worn(model, seed=1):
    """The model with an adapter whose B is not zero any more, as after training."""
    adapter = make_adapter(model, CFG, seed)
    attach(model, adapter)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapter.values():
            layer.b.copy_(0.3 * torch.randn(layer.b.shape, generator=g))
    return adapter


def test_one_layer_by_hand():
    base = nn.Linear(2, 1, bias=False)
    layer = LoRALinear(base, LoRAConfig(rank=1, alpha=2.0), torch.Generator().manual_seed(0))
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[1.0, 2.0]]))
        layer.a.copy_(torch.tensor([[3.0, -1.0]]))
        layer.b.copy_(torch.tensor([[0.5]]))
    x = torch.tensor([[1.0, 1.0]])
    assert layer(x).item() == 3.0 + 2.0 * 0.5 * (3.0 - 1.0)  # W x = 3; scale 2, B A x = 0.5 * 2
    assert layer.delta().tolist() == [[3.0, -1.0]]


def test_an_untrained_adapter_changes_nothing_and_counts_what_the_formula_says():
    model, ids = small(), torch.arange(12).view(2, 6)
    before, h = model(ids), model.cfg.n_hidden
    adapter = make_adapter(model, CFG, 0)
    attach(model, adapter)
    assert torch.equal(model(ids), before)
    assert n_trained(adapter) == 2 * 3 * (4 * (16 + 16) + 3 * (16 + h))
    assert n_trained(adapter) == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("token_shift", [False, True])
def test_forward_and_gradients_equal_pefts(token_shift):
    peft = pytest.importorskip("peft")
    from lifecycle_lib.model.bridge import to_hf
    model = small(token_shift=token_shift)
    ids = torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(3))
    names = {"wq": "q_proj", "wo": "o_proj", "w_down": "down_proj"}
    ours = LoRAConfig(rank=3, alpha=6.0, targets=tuple(names))
    theirs = peft.LoraConfig(r=3, lora_alpha=6, lora_dropout=0.0, bias="none",
                             target_modules=list(names if token_shift else names.values()))
    other = peft.get_peft_model(to_hf(model), theirs)
    adapter = make_adapter(model, ours, 0)
    attach(model, adapter)
    g, pairs = torch.Generator().manual_seed(4), []
    for name, layer in adapter.items():
        last = name.rpartition(".")[2]
        peer = name if token_shift else name.replace("blocks", "layers").replace(
            f".{last}", f".{names[last]}").replace("attn", "self_attn")
        peer = next(m for n, m in other.named_modules() if n.endswith(peer) and hasattr(m, "lora_A"))
        pairs.append((layer, peer.lora_A["default"].weight, peer.lora_B["default"].weight))
        with torch.no_grad():
            layer.b.copy_(0.2 * torch.randn(layer.b.shape, generator=g))
            pairs[-1][1].copy_(layer.a)
            pairs[-1][2].copy_(layer.b)
    mine, his = model(ids), other(input_ids=ids).logits
    assert torch.allclose(mine, his, atol=1e-5)
    mine.square().sum().backward()
    his.square().sum().backward()
    for layer, a, b in pairs:
        assert torch.allclose(layer.a.grad, a.grad, atol=1e-5) and torch.allclose(layer.b.grad, b.grad, atol=1e-5)
        assert min(layer.a.grad.abs().max(), layer.b.grad.abs().max()) > 1e-2  # 1e-5 is a tolerance, not the size
    frozen = [p for n, p in model.named_parameters() if not n.endswith((".a", ".b"))]
    assert all(p.grad is None for p in frozen)


def test_detach_gives_the_base_back_bit_for_bit_after_training():
    from lifecycle_lib.train.logprobs import Rows, answer_loss
    from lifecycle_lib.train.loop import FitConfig, fit
    model = small()
    before, ids = weights_hash(model), torch.randint(3, 50, (4, 10), generator=torch.Generator().manual_seed(1))
    adapter = make_adapter(model, CFG, 0)
    model.wte.requires_grad_(False)  # somebody froze the embedding before
    attach(model, adapter)
    result = fit(model, lambda _: Rows(ids, torch.ones_like(ids, dtype=torch.bool)), answer_loss,
                 FitConfig(steps=5, optimizer="adamw", lr=1e-2, warmup_steps=0))
    assert result.losses[-1] < result.losses[0]
    with_adapter = model(ids)
    off = detach(model)
    assert weights_hash(model) == before and off == adapter
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["wte.weight"]  # as it was before
    attach(model, off)  # and on again: nothing was lost
    assert torch.equal(model(ids), with_adapter)
    detach(model)
    model.requires_grad_(False)  # an engine holds its model frozen; an adapter that comes and goes does not thaw it
    attach(model, off)
    merge(model)
    assert not any(p.requires_grad for p in model.parameters())


def test_merge_gives_the_same_answers_and_cannot_be_undone_exactly():
    model, ids = small(), torch.arange(12).view(2, 6)
    kept = {n: p.detach().clone() for n, p in model.named_parameters()}
    adapter = worn(model)
    want = model(ids)
    merge(model)
    assert torch.allclose(model(ids), want, atol=1e-5)
    with torch.no_grad():
        for layer in adapter.values():
            layer.base.weight -= layer.delta()
    worst = max((p - kept[n]).abs().max().item() for n, p in model.named_parameters())
    assert 0 < worst < 1e-6  # close, and not the base: its hash is another


def test_saved_adapters_fit_their_own_base_only(tmp_path):
    model, ids = small(), torch.arange(12).view(2, 6)
    worn(model)
    want = model(ids)
    save_lora(tmp_path / "a.safetensors", model, detach(model), CFG)
    fresh = small()
    attach(fresh, load_lora(tmp_path / "a.safetensors", fresh))
    assert torch.equal(fresh(ids), want)
    with pytest.raises(ValueError, match="trained on base .* load that base"):
        load_lora(tmp_path / "a.safetensors", small(seed=9))


def test_bad_use_is_refused(tmp_path):
    with pytest.raises(ValueError, match="rank=0 must be at least 1"):
        LoRAConfig(rank=0)
    with pytest.raises(ValueError, match="alpha=-1.0 must be positive"):
        LoRAConfig(alpha=-1.0)
    model = small()
    with pytest.raises(ValueError, match="no linear layer has this name; the model has w_down"):
        make_adapter(model, LoRAConfig(targets=("lm_head",)), 0)
    with pytest.raises(ValueError, match="wears no adapter"):
        detach(model)
    other = make_adapter(small(), CFG, 0)
    with pytest.raises(ValueError, match="another model's layer"):
        attach(model, other)
    adapter = worn(model)
    with pytest.raises(ValueError, match="detach or merge it first"):
        attach(model, adapter)
    (tmp_path / "x.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="damaged"):
        load_lora(tmp_path / "x.safetensors", small())


def broken_merge(delta):
    """A merge that writes `delta` of each layer into its weight."""
    def run(model):
        with torch.no_grad():
            for layer in detach(model).values():
                layer.base.weight += delta(layer)
    return run


@pytest.mark.parametrize("run, sound", [
    (merge, True), (broken_merge(LoRALinear.delta), True),
    (broken_merge(lambda layer: layer.b @ layer.a), False),  # alpha / rank forgotten: half the adapter
    (broken_merge(lambda layer: layer.scale * layer.delta()), False),  # applied twice
    (broken_merge(lambda layer: layer.delta().T), False)])  # fits a square matrix, and is another one
def test_a_merge_must_answer_like_the_worn_adapter_and_broken_ones_do_not(run, sound):
    model, ids = small(), torch.arange(12).view(2, 6)
    adapter, g = make_adapter(model, LoRAConfig(rank=3, alpha=6.0, targets=("wq", "wo")), 1), torch.Generator()
    attach(model, adapter)
    with torch.no_grad():
        for layer in adapter.values():
            layer.b.copy_(0.3 * torch.randn(layer.b.shape, generator=g.manual_seed(1)))
        want = model(ids)
        run(model)
        assert torch.allclose(model(ids), want, atol=1e-5) == sound
