"""The network: hand-made numbers, transformers' Llama as oracle, cache and padding as properties, planted faults."""

import math
import random

import pytest
import torch

from lifecycle_lib.model import gpt
from lifecycle_lib.model.bridge import to_llama
from lifecycle_lib.model.gpt import GPT, Attention, Block, GPTConfig, RMSNorm, rope_tables
from lifecycle_lib.model.hf_classes import llama_names

TOL = 1e-5


def make_model(token_shift: bool, seed: int = 0, **changes) -> GPT:
    """A small model whose weights are large enough that a mistake shows."""
    torch.manual_seed(seed)
    cfg = {"vocab_size": 50, "block_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 16, "token_shift": token_shift}
    model = GPT(GPTConfig(**(cfg | changes))).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def llama_error(model: GPT) -> tuple[float, float]:
    """Largest difference from the Llama with the same weights: (logits, gradients)."""
    llama = to_llama(model)
    idx = torch.randint(50, (3, 17), generator=torch.Generator().manual_seed(1))
    logits, theirs = model(idx), llama(input_ids=idx, use_cache=False).logits
    for out in (logits, theirs):
        torch.nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), idx[:, 1:].flatten()).backward()
    grads, names = dict(llama.named_parameters()), llama_names(model.cfg.n_layer)
    worst = max(float((p.grad - grads[names[n]].grad).abs().max()) for n, p in model.named_parameters())
    return float((logits - theirs).detach().abs().max()), worst


def cache_error(model: GPT, chunks: list[int]) -> float:
    """Largest difference between one full pass and the same tokens fed in chunks through the cache."""
    idx = torch.randint(50, (2, sum(chunks)), generator=torch.Generator().manual_seed(sum(chunks)))
    cache = model.new_cache(2, sum(chunks))
    with torch.no_grad():
        parts = torch.cat([model(part, None, cache) for part in idx.split(chunks, dim=1)], dim=1)
        return float((parts - model(idx)).abs().max())


def padding_error(model: GPT, lengths: list[int], side: str = "left") -> float:
    """Largest difference between rows padded into one batch and each row alone."""
    generator = torch.Generator().manual_seed(sum(lengths))
    width = max(lengths) + 1
    ids = torch.randint(50, (len(lengths), width), generator=generator)  # pads are random tokens: they must not matter
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, n in enumerate(lengths):
        mask[row, width - n:] = True
        if side == "right":
            mask[row] = mask[row].flip(0)
    with torch.no_grad():
        together = model(ids, mask)
        return max(float((together[i, mask[i]] - model(ids[i, mask[i]].unsqueeze(0))[0]).abs().max())
                   for i in range(len(lengths)))


# ---------------------------------------------------------------- by hand

def test_rms_norm_by_hand():
    # rms(3, 4) = sqrt(12.5) = 3.53553
    norm = RMSNorm(2, 0.0)
    assert torch.allclose(norm(torch.tensor([3.0, 4.0])), torch.tensor([0.848528, 1.131371]), atol=TOL)


def test_token_shift_and_attention_by_hand():
    """x0 = (1, 0), x1 = (0, 1), s = (.5, .25), identity projections, one head of two dimensions.

    After the shift h0 = (1, 0) and h1 = (0 + .5 * 1, 1 + .25 * 0) = (.5, 1). Position 1 turns by one radian: q1.k0 =
    .5 cos 1 - sin 1 = -.57132, q1.k1 = |h1|^2 = 1.25. Over sqrt(2) and through the softmax: .21621 and .78379.
    The output is .21621 h0 + .78379 h1 = (.60811, .78379)."""
    cfg = GPTConfig(vocab_size=4, block_size=2, n_layer=1, n_head=1, n_embd=2)
    attn = Attention(cfg, 0)
    with torch.no_grad():
        attn.shift.copy_(torch.tensor([0.5, 0.25]))
        for w in (attn.wq, attn.wk, attn.wv, attn.wo):
            w.weight.copy_(torch.eye(2))
    out = attn(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), *rope_tables(cfg), None, None)
    assert torch.allclose(out, torch.tensor([[[1.0, 0.0], [0.60811, 0.78379]]]), atol=TOL)


def test_number_of_parameters_by_hand():
    # embedding 640*128; a layer 4*128^2 + 3*128*352 + 2 norms and a shift of 128; the last norm 128
    cfg = GPTConfig(vocab_size=640, n_layer=3, n_head=4, n_embd=128)
    assert cfg.n_hidden == 352
    assert GPT(cfg).n_params() == 640 * 128 + 3 * (4 * 128**2 + 3 * 128 * 352 + 3 * 128) + 128 == 685_312


def test_first_loss_is_log_vocabulary():
    torch.manual_seed(0)
    model, idx = GPT(GPTConfig(vocab_size=640)), torch.randint(640, (8, 64))
    loss = torch.nn.functional.cross_entropy(model(idx).flatten(0, 1), torch.randint(640, (8 * 64,)))
    assert abs(loss.item() - math.log(640)) < 0.1


# ---------------------------------------------------------------- transformers as oracle

@pytest.mark.parametrize("changes", [{}, {"n_layer": 3, "n_head": 4, "n_embd": 24, "rope_base": 500.0},
                                     {"n_head": 1, "norm_eps": 1e-3}])
def test_logits_and_gradients_equal_llama(changes):
    logits, grads = llama_error(make_model(False, **changes))
    assert logits < TOL and grads < TOL


def test_interleaved_rope_is_caught(monkeypatch):
    def interleaved(x, cos, sin):  # pairs (x_0, x_1), (x_2, x_3): another valid RoPE, not Llama's
        a, b = x[..., ::2], x[..., 1::2]
        c, s = cos[..., :a.shape[-1]], sin[..., :a.shape[-1]]
        return torch.stack((a * c - b * s, b * c + a * s), dim=-1).flatten(-2)

    monkeypatch.setattr(gpt, "rotate", interleaved)
    logits, grads = llama_error(make_model(False))
    assert logits > 100 * TOL and grads > 100 * TOL


# ---------------------------------------------------------------- properties

@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_cache_equals_full_forward(shift, seed):
    rng = random.Random(seed)
    chunks = [rng.randint(1, 6) for _ in range(rng.randint(2, 5))] + [1, 1]
    assert cache_error(make_model(shift, seed), chunks) < TOL


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_padding_changes_nothing(shift, seed, side):
    rng = random.Random(seed)
    assert padding_error(make_model(shift, seed), [rng.randint(1, 20) for _ in range(4)], side) < TOL


@pytest.mark.parametrize("shift", [True, False])
def test_the_future_changes_nothing(shift):
    model = make_model(shift)
    idx = torch.randint(50, (1, 12))
    with torch.no_grad():
        want = model(idx)
        for t in range(1, 12):
            other = idx.clone()
            other[:, t:] = (other[:, t:] + 7) % 50
            got = model(other)
            assert torch.allclose(got[:, :t], want[:, :t], atol=1e-6)
            assert not torch.allclose(got[:, t:], want[:, t:], atol=1e-3)


def test_selected_cache_rows_go_on_as_those_rows():
    model, idx = make_model(True), torch.randint(50, (3, 6))
    rows = torch.tensor([2, 0, 2])
    cache = model.new_cache(3, 8)
    with torch.no_grad():
        model(idx, None, cache)
        cache.select(rows)
        step = torch.tensor([[4], [5], [6]])
        assert torch.allclose(model(step, None, cache)[:, 0], model(torch.cat((idx[rows], step), 1))[:, -1], atol=TOL)


def test_cache_bytes():
    # 2 layers * (keys + values) * 3 rows * 8 tokens * 16 features * 4 bytes
    assert make_model(True).new_cache(3, 8).nbytes == 2 * 2 * 3 * 8 * 16 * 4


def test_pads_give_finite_gradients():
    model = make_model(True)
    mask = torch.tensor([[False] * 4 + [True] * 2])
    model(torch.randint(50, (1, 6)), mask)[:, -1].sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


# ---------------------------------------------------------------- planted faults

def test_shift_leaking_from_pads_is_caught(monkeypatch):
    whole = Block.forward
    monkeypatch.setattr(Block, "forward", lambda self, x, valid, *args: whole(self, x, None, *args))
    assert padding_error(make_model(True), [3, 9, 14]) > 100 * TOL
    assert padding_error(make_model(False), [3, 9, 14]) < TOL  # without a shift there is nothing to leak


@pytest.mark.parametrize("shift", [True, False])
def test_cache_off_by_one_is_caught(shift, monkeypatch):
    whole = GPT.hidden

    def off_by_one(self, idx, mask=None, cache=None):
        h = whole(self, idx, mask, cache)
        if cache is not None:
            cache.length -= 1
        return h

    monkeypatch.setattr(GPT, "hidden", off_by_one)
    assert cache_error(make_model(shift), [4, 3, 1]) > 100 * TOL


def test_cache_that_forgets_the_shifted_token_is_caught(monkeypatch):
    whole = GPT.hidden

    def forgetful(self, idx, mask=None, cache=None):
        if cache is not None:
            cache.last = [torch.zeros_like(x) for x in cache.last]
        return whole(self, idx, mask, cache)

    monkeypatch.setattr(GPT, "hidden", forgetful)
    assert cache_error(make_model(True), [4, 3, 1]) > 100 * TOL


# ---------------------------------------------------------------- what a user gives

@pytest.mark.parametrize("given, message", [
    ({"vocab_size": 0}, "vocab_size=0"), ({"n_embd": 30, "n_head": 4}, "try n_embd=32"),
    ({"n_hidden": -1}, "n_hidden=-1")])
def test_bad_config(given, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**({"vocab_size": 50} | given))


def test_too_many_tokens():
    model = make_model(True)
    with pytest.raises(ValueError, match="33 tokens do not fit block_size=32"):
        model(torch.zeros(1, 33, dtype=torch.long))
    cache = model.new_cache(1, 32)
    model(torch.zeros(1, 32, dtype=torch.long), None, cache)
    with pytest.raises(ValueError, match="33 tokens"):
        model(torch.zeros(1, 1, dtype=torch.long), None, cache)
