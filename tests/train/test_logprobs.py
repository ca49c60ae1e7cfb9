"""Log-probabilities and the answer loss: transformers' labels convention, torch's cross-entropy, and by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from lifecycle_lib.model.bridge import to_llama
from lifecycle_lib.train.logprobs import Prefix, Rows, answer_loss, pad_rows, shared_rows, sum_logps, token_logps

PROMPTS = [[1, 20, 30, 40], [1, 50], [1, 60, 70, 80, 90]]
ANSWERS = [[100, 101, 2], [102, 103, 104, 105, 2], [106, 2]]


class Table(torch.nn.Module):
    """A model whose logits are looked up: hidden is one-hot of the token, the head a (V, V) table."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(table)

    def hidden(self, ids: torch.Tensor, mask=None, cache=None) -> torch.Tensor:
        return F.one_hot(ids, len(self.table)).float()

    def head(self, h: torch.Tensor) -> torch.Tensor:
        return h @ self.table


def labels_of(rows: Rows) -> torch.Tensor:
    """transformers' convention: not shifted, -100 where nothing counts."""
    return rows.ids.masked_fill(~rows.mask, -100)


def test_by_hand():
    probs = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).repeat(4, 1)
    model = Table(probs.log())
    rows = pad_rows([[3], [3, 3]], [[0, 1], [2]], pad_id=3)
    assert rows.ids.tolist() == [[3, 0, 1], [3, 3, 2]]
    assert rows.mask.tolist() == [[False, True, True], [False, False, True]]
    want = torch.tensor([[math.log(0.5), math.log(0.25)], [0.0, math.log(0.125)]])
    torch.testing.assert_close(token_logps(model, rows), want)
    torch.testing.assert_close(sum_logps(model, rows), torch.tensor([-3 * math.log(2), -3 * math.log(2)]))
    loss, metrics = answer_loss(model, rows)  # (1 + 2 + 3) bits over 3 tokens
    assert loss.item() == pytest.approx(2 * math.log(2), abs=1e-6) and metrics["target_tokens"] == 3


def test_answer_loss_is_that_of_transformers(make_model, gradients):
    model = make_model(noise=0.1)
    llama = to_llama(model)
    rows = pad_rows(PROMPTS, ANSWERS, pad_id=0)
    ours, theirs = answer_loss(model, rows)[0], llama(input_ids=rows.ids, labels=labels_of(rows)).loss
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    for a, b in zip(gradients(ours, model), gradients(theirs, llama), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    logits = llama(input_ids=rows.ids).logits
    plain = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels_of(rows)[:, 1:].flatten(), ignore_index=-100)
    assert ours.item() == pytest.approx(plain.item(), abs=1e-5)


def test_the_oracle_catches_wrong_masks_and_shifts(make_model):
    model = make_model(noise=0.1)
    rows = pad_rows(PROMPTS, ANSWERS, pad_id=0)
    want = to_llama(model)(input_ids=rows.ids, labels=labels_of(rows)).loss.item()

    def agrees(ids: torch.Tensor, mask: torch.Tensor) -> bool:
        return abs(answer_loss(model, Rows(ids, mask))[0].item() - want) < 1e-5

    assert agrees(rows.ids, rows.mask)
    assert not agrees(rows.ids, rows.mask.roll(-1, 1)), "mask off by one, early"
    assert not agrees(rows.ids, rows.mask.roll(1, 1)), "mask off by one, late"
    assert not agrees(rows.ids, rows.ids != 0), "prompt tokens counted"
    assert not agrees(rows.ids, torch.ones_like(rows.mask)), "padding counted"
    shifted = labels_of(rows).roll(-1, 1)  # already shifted, and transformers shifts again
    twice = to_llama(model)(input_ids=rows.ids, labels=shifted).loss.item()
    assert abs(twice - want) > 1e-3, "labels shifted twice"


@pytest.mark.parametrize("token_shift", [False, True])
def test_a_shared_prompt_changes_nothing(make_model, token_shift):
    model = make_model(noise=0.1, token_shift=token_shift)
    owner = [2, 0, 1, 0, 2]
    answers = [[7, 8, 9], [10], [11, 12], [], [13, 14, 15, 16]]
    apart = pad_rows([PROMPTS[i] for i in owner], answers, pad_id=0)
    shared = shared_rows(PROMPTS, answers, owner, pad_id=0)
    assert shared.prefix.ids.shape == (3, 4) and shared.ids.shape == (5, 5)
    weight = torch.arange(1.0, 6.0)
    grads = []
    for rows in (apart, shared):
        logps = sum_logps(model, rows)
        grads.append((logps.detach(), torch.autograd.grad((logps * weight).sum(), list(model.parameters()))))
    torch.testing.assert_close(grads[0][0], grads[1][0], atol=1e-5, rtol=1e-5)
    for a, b in zip(grads[0][1], grads[1][1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)  # sums over 15 weighted tokens
    p = shared.prefix
    broken = Rows(shared.ids, shared.mask, Prefix(p.ids, p.mask, p.owner.roll(1)))
    assert (sum_logps(model, broken) - grads[0][0]).abs().max() > 1e-3, "answers behind the wrong prompt"
    leaky = Rows(shared.ids, shared.mask, Prefix(p.ids, torch.ones_like(p.mask), p.owner))
    assert (sum_logps(model, leaky) - grads[0][0]).abs().max() > 1e-3, "padding attended to"


def test_prompts_of_one_token_need_no_prefix(make_model):
    model = make_model(noise=0.1)
    shared = shared_rows([[5], [6]], [[7], [8, 9]], [1, 0], pad_id=0)
    assert shared.prefix is None
    torch.testing.assert_close(sum_logps(model, shared), sum_logps(model, pad_rows([[6], [5]], [[7], [8, 9]], 0)))
    mixed = shared_rows([[5], [6, 4]], [[7], [8, 9]], [1, 0], pad_id=0)
    torch.testing.assert_close(sum_logps(model, mixed), sum_logps(model, pad_rows([[6, 4], [5]], [[7], [8, 9]], 0)))


def test_temperature_is_that_of_the_softmax(make_model):
    model = make_model(noise=0.1)
    rows = pad_rows(PROMPTS, ANSWERS, pad_id=0)
    logits = to_llama(model)(input_ids=rows.ids).logits[:, :-1]
    want = torch.log_softmax(logits / 0.7, -1).gather(-1, rows.ids[:, 1:, None]).squeeze(-1) * rows.mask[:, 1:]
    torch.testing.assert_close(token_logps(model, rows, 0.7), want, atol=1e-5, rtol=1e-5)
    assert (token_logps(model, rows) - want).abs().max() > 1e-3


def test_nothing_to_count_gives_zero_and_no_nan(make_model):
    model = make_model()
    rows = pad_rows(PROMPTS, [[], [], []], pad_id=0)
    loss, _ = answer_loss(model, rows)
    assert loss.item() == 0
    grads = torch.autograd.grad(loss, list(model.parameters()))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)
    some = pad_rows(PROMPTS, [ANSWERS[0], [], ANSWERS[2]], pad_id=0)
    assert sum_logps(model, some)[1].item() == 0


def test_padding_and_neighbours_do_not_matter(make_model):
    model = make_model(noise=0.1, token_shift=True)
    together = sum_logps(model, pad_rows(PROMPTS, ANSWERS, pad_id=0))
    alone = torch.cat([sum_logps(model, pad_rows([p], [a], pad_id=9)) for p, a in zip(PROMPTS, ANSWERS)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("prompts", "answers", "limit", "message"), [
    ([], [], None, "0 prompts and 0 answers"),
    ([[1]], [[2], [3]], None, "1 prompts and 2 answers"),
    ([[1], []], [[2], [3]], None, "row 1 has an empty prompt"),
    ([[1], [1, 2, 3]], [[2], [4, 5]], 4, "row 1 has 5 tokens, over the limit of 4"),
])
def test_pad_rows_refuses(prompts, answers, limit, message):
    with pytest.raises(ValueError, match=message):
        pad_rows(prompts, answers, 0, limit)


@pytest.mark.parametrize(("prompts", "answers", "owner", "message"), [
    ([], [], [], "at least one prompt"),
    ([[1], []], [[2]], [0], "no empty one"),
    ([[1]], [[2], [3]], [0], "2 answers need as many owners"),
    ([[1]], [[2]], [1], "0 to 0"),
])
def test_shared_rows_refuses(prompts, answers, owner, message):
    with pytest.raises(ValueError, match=message):
        shared_rows(prompts, answers, owner, 0)
