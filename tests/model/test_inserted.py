"""Bottlenecks by hand and against torch's own modules, gates against peft's IA3."""

import pytest
import torch
from torch import nn

from lifecycle_lib.model.checkpoint import weights_hash
from lifecycle_lib.model.gpt import GPT, GPTConfig
from lifecycle_lib.model.inserted import Bottleneck, Gate, insert_bottlenecks, insert_gates, remove


def small(token_shift=False):
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=50, block_size=16, n_layer=2, n_head=2, n_embd=16, token_shift=token_shift))


IDS = torch.arange(12).view(2, 6)


def test_one_bottleneck_by_hand():
    layer = Bottleneck(nn.Linear(2, 2, bias=False), 1)
    with torch.no_grad():
        layer.base.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        layer.down.copy_(torch.tensor([[10.0, 0.0]]))  # gelu(10) = 10
        layer.up.copy_(torch.tensor([[0.0], [0.5]]))
    assert torch.allclose(layer(torch.tensor([[1.0, 3.0]])), torch.tensor([[1.0, 6.0 + 5.0]]))


@pytest.mark.parametrize("put", [lambda m: insert_bottlenecks(m, 4), insert_gates])
def test_both_start_as_the_base_train_little_and_come_out_again(put):
    model = small(True)
    before, logits = weights_hash(model), model(IDS)
    model.norm_f.requires_grad_(False)  # somebody froze it before
    n = put(model)
    h = model.cfg.n_hidden
    assert n == (2 * 2 * 4 * (16 + 16) if put is not insert_gates else 2 * (16 + 16 + h))
    assert torch.equal(model(IDS), logits)
    model(IDS).square().mean().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained) and sum(p.numel() for p in trained) == n
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    remove(model)
    assert weights_hash(model) == before
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["norm_f.weight"]  # as it was before
    with pytest.raises(ValueError, match="holds no bottleneck and no gate"):
        remove(model)


def test_a_bottleneck_equals_torchs_sequential():
    g = torch.Generator().manual_seed(1)
    layer = Bottleneck(nn.Linear(5, 6, bias=False), 3, g)
    nn.init.normal_(layer.up)
    twin = nn.Sequential(nn.Linear(6, 3, bias=False), nn.GELU(), nn.Linear(3, 6, bias=False))
    twin[0].weight.data, twin[2].weight.data = layer.down.data.clone(), layer.up.data.clone()
    x = torch.randn(4, 5, generator=g)
    y = layer.base(x).detach()
    mine, his = layer(x), y + twin(y)
    assert torch.allclose(mine, his, atol=1e-6)
    mine.square().sum().backward()
    his.square().sum().backward()
    assert torch.allclose(layer.down.grad, twin[0].weight.grad, atol=1e-5)
    assert torch.allclose(layer.up.grad, twin[2].weight.grad, atol=1e-5)


def test_gates_equal_pefts_ia3_in_value_and_gradient():
    peft = pytest.importorskip("peft")
    from lifecycle_lib.model.bridge import to_llama
    model = small()
    other = peft.get_peft_model(to_llama(model), peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]))
    insert_gates(model)
    names, g = {"wk": "k_proj", "wv": "v_proj", "w_down": "down_proj"}, torch.Generator().manual_seed(2)
    pairs = []
    for path, module in model.named_modules():
        if isinstance(module, Gate):
            last = path.rpartition(".")[2]
            end = path.replace("blocks", "layers").replace("attn", "self_attn").replace(last, names[last])
            peer = next(m for n, m in other.named_modules() if n.endswith(end) and hasattr(m, "ia3_l")).ia3_l["default"]
            with torch.no_grad():
                module.gate.copy_(1 + 0.3 * torch.randn(module.gate.shape, generator=g))
                peer.copy_(module.gate.view_as(peer))
            pairs.append((module.gate, peer))
    mine, his = model(IDS), other(input_ids=IDS).logits
    assert torch.allclose(mine, his, atol=1e-5)
    mine.square().mean().backward()
    his.square().mean().backward()
    assert len(pairs) == 6 and all(torch.allclose(a.grad, b.grad.flatten(), atol=1e-5) for a, b in pairs)
    down = model.blocks[0].mlp.w_down
    down.on_input = False  # a gate on the wrong side of the layer does not even fit
    with pytest.raises(RuntimeError):
        model(IDS)


def test_a_target_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="no linear layer has one of these names"):
        insert_gates(nn.Sequential(nn.Linear(2, 2)))
