"""Decoding: greedy against a plain loop and transformers, frequencies against the softmax, rows that end."""

import math

import pytest
import torch
from scipy import stats

from lifecycle_lib.model.bridge import to_llama
from lifecycle_lib.model.gpt import GPT, Cache, GPTConfig
from lifecycle_lib.model.sampling import draw, generate, left_pad

EOS, PAD, VOCAB = 2, 0, 40
PROMPTS = [[5, 9, 11], [7], [30, 31, 32, 33, 34, 35], [8, 8]]


@pytest.fixture(scope="module")
def model() -> GPT:
    return make_model(True)


def make_model(token_shift: bool) -> GPT:
    torch.manual_seed(3)
    cfg = GPTConfig(vocab_size=VOCAB, block_size=48, n_layer=2, n_head=2, n_embd=16, token_shift=token_shift)
    model = GPT(cfg).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.25 * torch.randn_like(p))
    return model


def sample(model, prompts=PROMPTS, **changes):
    args = {"eos_id": EOS, "pad_id": PAD, "max_new_tokens": 12, "generator": torch.Generator().manual_seed(0)}
    return generate(model, prompts, **(args | changes))


@torch.no_grad()
def greedy_loop(model, prompt: list[int], n: int) -> list[int]:
    ids = list(prompt)
    while len(ids) < len(prompt) + n and (ids[-1] != EOS or len(ids) == len(prompt)):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt):]


def frequency_p(sample_tokens: torch.Tensor, probs: torch.Tensor) -> float:
    """Chi-square p-value of the counts under `probs`."""
    counts = torch.bincount(sample_tokens, minlength=len(probs)).double()
    return float(stats.chisquare(counts.numpy(), (probs.double() / probs.double().sum() * counts.sum()).numpy()).pvalue)


# ---------------------------------------------------------------- by hand

def test_draw_by_hand():
    # probabilities .5, .25, .25: a uniform number below .5 is token 0, below .75 token 1, else token 2
    logits = torch.tensor([0.5, 0.25, 0.25]).log().expand(5, 3)
    token, logp = draw(logits, 1.0, uniform=torch.tensor([0.0, 0.49, 0.51, 0.74, 0.99]))
    assert token.tolist() == [0, 0, 1, 1, 2]
    assert logp.tolist() == pytest.approx([math.log(0.5)] * 2 + [math.log(0.25)] * 3, abs=1e-6)


def test_temperature_by_hand():
    # at temperature 1/2 probabilities are squared: .8, .2 -> .64 / .68
    _, logp = draw(torch.tensor([[0.8, 0.2]]).log(), 0.5, uniform=torch.tensor([0.1]))
    assert logp.item() == pytest.approx(math.log(0.64 / 0.68), abs=1e-6)


def test_a_token_of_probability_zero_is_never_drawn():
    logits = torch.tensor([[-math.inf, 0.0, 0.0, -math.inf]])
    for u in (0.0, 0.999999940395):  # the ends of torch.rand
        token, logp = draw(logits, 1.0, uniform=torch.tensor([u]))
        assert token.item() in (1, 2) and math.isfinite(logp.item())


def test_left_pad():
    ids, mask = left_pad([[5, 6], [7]], PAD)
    assert ids.tolist() == [[5, 6], [PAD, 7]] and mask.tolist() == [[True, True], [False, True]]


# ---------------------------------------------------------------- greedy

@pytest.mark.parametrize("shift", [True, False])
def test_greedy_equals_an_argmax_loop(shift):
    model = make_model(shift)
    out = sample(model, temperature=0.0)
    assert out.ids == [greedy_loop(model, p, 12) for p in PROMPTS]
    assert out.tokens == sum(map(len, out.ids)) and out.ended == [ids[-1] == EOS for ids in out.ids]


def test_greedy_equals_transformers_generate():
    model = make_model(False)
    ids, mask = left_pad(PROMPTS, PAD)
    theirs = to_llama(model).generate(input_ids=ids, attention_mask=mask.long(), max_new_tokens=12, do_sample=False,
                                      eos_token_id=EOS, pad_token_id=PAD)[:, ids.shape[1]:].tolist()
    ours = sample(model, temperature=0.0).ids
    assert [row[:len(mine)] for row, mine in zip(theirs, ours)] == ours


def test_a_broken_cache_row_order_is_caught(monkeypatch, model):
    """The prompt's cache is repeated per sample; tiled in the wrong order, rows continue another prompt."""
    monkeypatch.setattr(torch.Tensor, "repeat_interleave", lambda self, n: self.repeat(n))
    assert sample(model, temperature=0.0, n_samples=2).ids != \
        [greedy_loop(model, p, 12) for p in PROMPTS for _ in range(2)]


# ---------------------------------------------------------------- frequencies

def test_sampled_frequencies_match_the_softmax(model):
    n = 4000
    out = sample(model, PROMPTS[:2], n_samples=n, max_new_tokens=1, temperature=0.7, batch_rows=10000)
    for i, prompt in enumerate(PROMPTS[:2]):
        with torch.no_grad():
            probs = (model(torch.tensor([prompt]))[0, -1] / 0.7).softmax(-1)
        tokens = torch.tensor([ids[0] for ids in out.ids[i * n:(i + 1) * n]])
        assert frequency_p(tokens, probs) > 0.01
        wrong = (model(torch.tensor([prompt]))[0, -1]).softmax(-1).detach()  # the temperature forgotten
        assert frequency_p(tokens, wrong) < 1e-6


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0])
def test_recorded_logps_equal_the_full_forward(model, temperature):
    out = sample(model, temperature=temperature, n_samples=3)
    for row, (ids, logps) in enumerate(zip(out.ids, out.logps)):
        prompt = PROMPTS[row // 3]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids]))[0, len(prompt) - 1:-1] / (temperature or 1.0)
        want = logits.log_softmax(-1).gather(-1, torch.tensor(ids).unsqueeze(-1)).squeeze(-1)
        assert torch.allclose(torch.tensor(logps), want, atol=1e-5)


# ---------------------------------------------------------------- rows that end

def test_rows_that_end_leave_the_others_alone(model):
    """With another end token no row leaves early; up to its own end every row must read the same."""
    some = sample(model, n_samples=8, max_new_tokens=20)
    never = sample(model, n_samples=8, max_new_tokens=20, eos_id=-1)
    lengths = [len(ids) for ids in some.ids]
    assert min(lengths) < 5 and max(lengths) == 20  # some left, some stayed to the end
    assert [row[:n] for row, n in zip(never.ids, lengths)] == some.ids
    for a, b in zip(some.logps, never.logps):
        assert a == pytest.approx(b[:len(a)], abs=1e-5)


def test_rows_that_ended_leave_within_a_few_steps(model, monkeypatch):
    sizes, whole = [], GPT.hidden
    monkeypatch.setattr(GPT, "hidden", lambda self, idx, *args: sizes.append(len(idx)) or whole(self, idx, *args))
    lengths = [len(ids) for ids in sample(model, n_samples=8, max_new_tokens=20).ids]
    for t, rows in enumerate(sizes[1:], 1):  # the pass after t tokens were drawn
        assert rows * 0.8 <= sum(n > t for n in lengths) <= rows


def test_dropping_the_wrong_rows_is_caught(monkeypatch, model):
    whole = Cache.select
    monkeypatch.setattr(Cache, "select", lambda self, rows: whole(self, rows.flip(0) if len(rows) < 32 else rows))
    with pytest.raises(AssertionError):
        test_rows_that_end_leave_the_others_alone(model)


def test_batches_do_not_change_greedy(model):
    assert sample(model, temperature=0.0, batch_rows=1).ids == sample(model, temperature=0.0).ids


def test_same_seed_same_samples(model):
    assert sample(model).ids == sample(model).ids != sample(model, generator=torch.Generator().manual_seed(1)).ids


def test_the_block_ends_a_row(model):
    out = sample(model, [[5] * 46], max_new_tokens=10, eos_id=-1)
    assert len(out.ids[0]) == 2 and out.ended == [False]


@pytest.mark.parametrize("changes, message", [
    ({"temperature": -1.0}, "temperature=-1"), ({"temperature": math.nan}, "temperature=nan"),
    ({"n_samples": 0}, "n_samples=0"), ({"max_new_tokens": 0}, "max_new_tokens=0"), ({"prompts": []}, "at least one"),
    ({"prompts": [[]]}, "no empty one"), ({"prompts": [[5] * 48]}, "leaves no room")])
def test_bad_requests(model, changes, message):
    with pytest.raises(ValueError, match=message):
        sample(model, **changes)
