"""Several adapters on one base: swap, off, routed rows, sums; peft as the oracle where it has the same."""

import pytest
import torch

from lifecycle_lib.model.checkpoint import weights_hash
from lifecycle_lib.model.gpt import GPT, GPTConfig
from lifecycle_lib.model.lora import LoRAConfig, attach, detach, make_adapter, merge, unmerge
from lifecycle_lib.model.portfolio import Portfolio, combine, config_of, load_portfolio
from lifecycle_lib.model.quantise import quantise_model

CFG = LoRAConfig(rank=3, alpha=6.0)
NAMES = {"wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj", "w_gate": "gate_proj", "w_up": "up_proj",
         "w_down": "down_proj"}


def small(seed=0, token_shift=True):
    torch.manual_seed(seed)
    return GPT(GPTConfig(vocab_size=50, block_size=16, n_layer=2, n_head=2, n_embd=16, token_shift=token_shift))


def trained(model, seed, cfg=CFG):
    """An adapter whose B is not zero any more, as after training."""
    adapter, g = make_adapter(model, cfg, seed), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapter.values():
            layer.b.copy_(0.3 * torch.randn(layer.b.shape, generator=g))
    return adapter


def ids(rows=4):
    return torch.randint(0, 50, (rows, 9), generator=torch.Generator().manual_seed(3))


def alone(model, adapter, x):
    attach(model, adapter)
    with torch.no_grad():
        y = model(x)
    detach(model)
    return y


def peft_twin(model, adapters):
    """The same base in transformers, wearing the same adapters under the same names in peft."""
    peft = pytest.importorskip("peft")
    from lifecycle_lib.model.bridge import to_hf
    other = None
    for name, adapter in adapters.items():
        cfg = config_of(adapter)
        theirs = peft.LoraConfig(r=cfg.rank, lora_alpha=cfg.alpha, lora_dropout=0.0, bias="none",
                                 target_modules=[NAMES[t] for t in cfg.targets])
        if other is None:
            other = peft.get_peft_model(to_hf(model), theirs, adapter_name=name)
        else:
            other.add_adapter(name, theirs)
        for path, layer in adapter.items():
            last = path.rpartition(".")[2]
            end = path.replace("blocks", "layers").replace("attn", "self_attn").replace(last, NAMES[last])
            peer = next(m for n, m in other.named_modules() if n.endswith(end) and hasattr(m, "lora_A"))
            with torch.no_grad():
                peer.lora_A[name].weight.copy_(layer.a)
                peer.lora_B[name].weight.copy_(layer.b)
    return other.eval()


def test_swapping_equals_each_alone_and_off_is_the_base_bit_for_bit():
    model, x = small(), ids()
    a, b = trained(model, 1), trained(model, 2, LoRAConfig(rank=2, alpha=2.0, targets=("wq", "wv")))
    base, before = model(x), weights_hash(model)
    want = {"a": alone(model, a, x), "b": alone(model, b, x)}
    portfolio = Portfolio(model, {"a": a, "b": b})
    for name in ("a", "b", None, "b", "a", None):
        portfolio.use(name)
        assert torch.equal(model(x), base if name is None else want[name])
    assert weights_hash(model) == before and portfolio.base == before


def test_routed_rows_equal_each_adapter_alone_in_value_and_gradient():
    model, x = small(), ids(6)
    a, b = trained(model, 1), trained(model, 2, LoRAConfig(rank=2, alpha=2.0, targets=("wq", "wv")))
    names = ["a", None, "b", "a", "b", None]
    want = {"a": alone(model, a, x), "b": alone(model, b, x), None: model(x).detach()}
    portfolio = Portfolio(model, {"a": a, "b": b})
    portfolio.route(names)
    routed = model(x)
    for i, name in enumerate(names):
        assert torch.allclose(routed[i], want[name][i], atol=1e-5)
    assert not torch.allclose(routed[0], want["b"][0], atol=1e-2)  # and the test can tell adapters apart
    wrong = torch.stack([want[n][i] for i, n in enumerate(reversed(names))])
    assert not torch.allclose(routed, wrong, atol=1e-2)  # a router that reads its list backwards is caught

    def grads(rows, adapter):
        portfolio.use(adapter) if adapter else portfolio.route(names)
        loss = sum(model(x)[i].square().mean() for i in rows)
        own = [p for n in "ab" for layer in portfolio.adapters[n].values() for p in (layer.a, layer.b)]
        return torch.autograd.grad(loss, own, allow_unused=True)

    mixed = grads([0, 2, 3, 4], None)
    apart = [u if u is not None else v for u, v in zip(grads([0, 3], "a"), grads([2, 4], "b"))]
    assert all(torch.allclose(u, v, atol=1e-5) for u, v in zip(mixed, apart))
    portfolio.route(names)
    assert not any(p.requires_grad for p in model.parameters())  # a routed batch trains adapters, never the base
    with pytest.raises(ValueError, match="a batch of 4 rows under a route of 6"):
        model(ids(4))
    with pytest.raises(ValueError, match="gates, bottlenecks, a route"):
        attach(model, a)
    portfolio.use(None)
    assert all(p.requires_grad for p in model.parameters()) and torch.equal(model(x), want[None])


def test_a_frozen_base_stays_frozen_and_rows_follow_the_models_device():
    model = small().requires_grad_(False)
    portfolio = Portfolio(model, {"a": trained(model, 1)})
    for turn in (lambda: portfolio.use("a"), lambda: portfolio.route(["a", None]), lambda: portfolio.use(None)):
        turn()
        assert not any(p.requires_grad for n, p in model.named_parameters() if not n.endswith((".a", ".b")))
    model.to("meta")
    portfolio.route(["a", None])
    assert {m.rows["a"].device.type for m in model.modules() if hasattr(m, "rows")} == {"meta"}


def test_mixed_batches_and_sums_equal_pefts():
    model, x = small(token_shift=False), ids(4)
    a, b = trained(model, 1), trained(model, 2)
    other = peft_twin(model, {"a": a, "b": b})
    portfolio, names = Portfolio(model, {"a": a, "b": b}), ["a", None, "b", "a"]
    portfolio.route(names)
    with torch.no_grad():
        his = other(input_ids=x, adapter_names=[n or "__base__" for n in names]).logits
        assert torch.allclose(model(x), his, atol=1e-5)
        portfolio.use(None)
        for title, how, weights in (("one", "cat", (0.7, -0.4)), ("two", "linear", (0.7, -0.4)),
                                    ("three", "linear", (0.5, 0.5))):
            other.add_weighted_adapter(["a", "b"], list(weights), title, combination_type=how)
            other.set_adapter(title)
            mine = alone(model, combine([(a, weights[0]), (b, weights[1])], how), x)
            assert torch.allclose(mine, other(input_ids=x).logits, atol=1e-5), title


def test_merge_and_unmerge_equal_pefts_and_round():
    model, x = small(token_shift=False), ids()
    a, kept = trained(model, 1), small(token_shift=False).state_dict()
    other = peft_twin(model, {"a": a})
    attach(model, a)
    worn = model(x)
    merged = merge(model)
    other.merge_adapter()
    assert torch.allclose(model(x), worn, atol=1e-5)
    assert torch.allclose(model(x), other(input_ids=x).logits, atol=1e-5)
    unmerge(model, merged)
    other.unmerge_adapter()
    assert torch.allclose(model(x), worn, atol=1e-5)
    assert torch.allclose(model(x), other(input_ids=x).logits, atol=1e-5)
    detach(model)
    residual = max((p - kept[n]).abs().max().item() for n, p in model.state_dict().items())
    assert 0 < residual < 1e-6


def test_cat_is_the_sum_of_the_deltas_and_linear_is_not():
    model = small()
    a, b = trained(model, 1), trained(model, 2)
    path = next(iter(a))
    want = 0.5 * a[path].delta() - 2 * b[path].delta()
    assert torch.allclose(combine([(a, 0.5), (b, -2.0)])[path].delta(), want, atol=1e-6)
    assert config_of(combine([(a, 1), (b, 1)])).rank == 6
    halves = combine([(a, 0.5), (a, 0.5)], "linear")[path].delta()  # of one adapter with itself: 2 (A's delta), not 1
    assert torch.allclose(halves, 2 * a[path].delta(), atol=1e-6)


@pytest.mark.parametrize("bits", [8, 4])
def test_on_packed_weights_an_adapter_trains_as_on_the_same_weights_in_float(bits):
    model, x = quantise_model(small(), bits=bits, group_size=16), ids()
    before, plain = weights_hash(model), model(x)
    attach(model, fresh := make_adapter(model, CFG, 1))
    assert torch.equal(model(x), plain)
    detach(model)
    float_twin = small()
    with torch.no_grad():  # the oracle: the unpacked weights in an ordinary model
        for name, weight in ({n: v.base.weight for n, v in fresh.items()} | {"wte": model.wte.weight}).items():
            float_twin.get_submodule(name).weight.copy_(weight)
    mine, his = trained(model, 1), trained(float_twin, 1)  # B is not zero: A has a gradient as well
    attach(model, mine), attach(float_twin, his)
    optimizers = [torch.optim.SGD([p for v in a.values() for p in (v.a, v.b)], lr=1e-3) for a in (mine, his)]
    losses = []
    for _ in range(3):
        pair = model(x), float_twin(x)
        assert torch.allclose(*pair, atol=1e-5)
        for y, optimizer in zip(pair, optimizers):
            optimizer.zero_grad()
            y.square().sum().backward()
        for n in mine:
            for u, v in ((mine[n].a.grad, his[n].a.grad), (mine[n].b.grad, his[n].b.grad)):
                assert torch.allclose(u, v, atol=1e-5) and u.abs().max() > 1e-2
        losses.append(pair[0].square().sum().item())
        [optimizer.step() for optimizer in optimizers]
    assert losses[-1] < losses[0]
    detach(model)
    assert weights_hash(model) == before


def test_a_packed_base_refuses_a_merge_and_knows_its_adapters(tmp_path):
    model, x = quantise_model(small(), bits=4, group_size=16), ids()
    before, adapter = weights_hash(model), trained(model, 1)
    attach(model, adapter)
    with pytest.raises(ValueError, match="its base is packed"):
        merge(model)
    detach(model)
    Portfolio(model, {"a": adapter}).save(tmp_path)
    assert weights_hash(model) == before
    again = quantise_model(small(), bits=4, group_size=16)
    assert torch.equal(alone(again, load_portfolio(tmp_path, again).adapters["a"], x), alone(model, adapter, x))
    with pytest.raises(ValueError, match=f"base {before[:12]}, this model is {weights_hash(small())[:12]}"):
        load_portfolio(tmp_path, small())  # the float base is another base


def test_a_folder_keeps_the_portfolio_and_refuses_another_base(tmp_path):
    model, x = small(), ids()
    adapters = {"shop": trained(model, 1), "safety": trained(model, 2, LoRAConfig(rank=2, alpha=4.0, targets=("wo",)))}
    Portfolio(model, adapters).save(tmp_path, {"shop": {"owner": "desk"}})
    fresh = small()
    loaded = load_portfolio(tmp_path, fresh)
    for name, adapter in adapters.items():
        loaded.use(name)
        assert torch.equal(fresh(x), alone(model, adapter, x))
    with pytest.raises(ValueError, match=f"{weights_hash(model)[:12]}, this model is {weights_hash(small(9))[:12]}"):
        load_portfolio(tmp_path, small(9))


def test_bad_use_is_refused():
    model = small()
    portfolio = Portfolio(model, {"a": trained(model, 1)})
    with pytest.raises(ValueError, match="row 1: no adapter 'c'; registered: a"):
        portfolio.route(["a", "c"])
    with pytest.raises(ValueError, match="'a' is taken"):
        portfolio.add("a", trained(model, 2))
    with pytest.raises(ValueError, match="another model's layer"):
        portfolio.add("b", trained(small(), 2))
    a, odd = portfolio.adapters["a"], trained(model, 2, LoRAConfig(rank=2, alpha=2.0))
    with pytest.raises(ValueError, match="ranks .3, 2. cannot be added"):
        combine([(a, 1.0), (odd, 1.0)], "linear")
    with pytest.raises(ValueError, match="different layers"):
        combine([(a, 1.0), (trained(small(), 1), 1.0)])
    with pytest.raises(ValueError, match="how='mean' is unknown"):
        combine([(a, 1.0)], "mean")
