"""Packing: bins by hand and TRL's, loss and gradient of padded rows, three ways for a row to see its neighbour."""

import pytest
import torch

from lifecycle_lib.desk.cases import draw_cases
from lifecycle_lib.model.bridge import to_llama
from lifecycle_lib.train import packing
from lifecycle_lib.train.chat import case_messages, chat_rows, encode_chat
from lifecycle_lib.train.logprobs import answer_loss
from lifecycle_lib.train.packing import Packed, pack_rows, packed_loss


def talks(n: int = 9) -> list[list[dict]]:
    """Conversations of one and of two turns: rows of unequal length."""
    out = []
    for i, case in enumerate(draw_cases(n, 0, "packed")):
        said = [("bot", case.answer)] if i % 3 else [("bot", case.answer), ("user", "sure"), ("bot", case.answer)]
        out.append(case_messages(case) + [{"role": role, "content": words} for role, words in said])
    return out


@pytest.fixture(scope="module")
def coded(tok):
    return [encode_chat(tok, t) for t in talks()]


def test_bins_by_hand_and_as_trl_fills_them():
    assert packing.fill_bins([5, 4, 3, 2, 2], 8) == [[0, 2], [1, 3, 4]]
    assert packing.fill_bins([3, 3, 3], 3) == [[0], [1], [2]]
    datasets = pytest.importorskip("datasets")
    pack_dataset = pytest.importorskip("trl").pack_dataset
    lengths = [7, 30, 12, 12, 5, 44, 9, 21, 3, 50, 18, 33]
    rows = datasets.Dataset.from_dict({"input_ids": [[i] * n for i, n in enumerate(lengths)]})
    theirs = [sorted(set(row)) for row in pack_dataset(rows, seq_length=64, strategy="bfd")["input_ids"]]
    ours = [sorted(group) for group in packing.fill_bins(lengths, 64)]
    assert sorted(ours) == sorted(theirs)


@pytest.mark.parametrize("shift", [True, False])
def test_loss_and_gradient_are_those_of_padded_rows(tok, make_model, coded, shift):
    model = make_model(noise=0.1, token_shift=shift)
    pad = tok.special["<pad>"]
    packed = pack_rows(coded, 128, pad, gap=int(shift))
    assert len(packed.ids) < len(coded) and packed.used > 0.75
    wanted, n = answer_loss(model, chat_rows(tok, talks()))
    got, m = packed_loss(model, packed)
    assert n == m and got.item() == pytest.approx(wanted.item(), abs=1e-5)
    a, b = (torch.autograd.grad(x, list(model.parameters())) for x in (wanted, got))
    assert max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True)) < 1e-5


@pytest.mark.parametrize("shift", [True, False])
def test_one_row_a_block_has_the_features_of_the_model_itself(tok, make_model, coded, shift):
    """packed_hidden repeats the loop of GPT.hidden: they must not part. A model whose last norm is left out does."""
    model, pad = make_model(noise=0.2, token_shift=shift), tok.special["<pad>"]
    one = pack_rows(coded[:1], 128, pad)
    with torch.no_grad():
        own, packed = model.hidden(one.ids), packing.packed_hidden(model, one)
        assert torch.allclose(own, packed, atol=1e-6, rtol=0)
        model.norm_f = torch.nn.Identity()
        assert not torch.allclose(own, packing.packed_hidden(model, one), atol=1e-3)


def test_neighbours_leak_through_attention_and_through_the_shift(tok, make_model, coded):
    model, pad = make_model(noise=0.3, token_shift=True), tok.special["<pad>"]
    wanted = answer_loss(model, chat_rows(tok, talks()))[0].item()
    tight = pack_rows(coded, 128, pad, gap=0)
    for leak in (packed_loss(model, pack_rows(coded, 128, pad), isolate=False), packed_loss(model, tight)):
        assert abs(leak[0].item() - wanted) > 1e-4
    packed = pack_rows(coded, 128, pad)

    def reaction(isolate: bool, ours: Packed) -> float:
        """How far the features of row 1 move when row 0 of the block is another."""
        other = Packed(torch.where(ours.owner == 0, (ours.ids + 7) % 256 + 8, ours.ids), ours.mask, ours.owner)
        with torch.no_grad():
            moved = packing.packed_hidden(model, ours, isolate) - packing.packed_hidden(model, other, isolate)
        return moved[ours.owner == 1].abs().max().item()

    assert reaction(True, packed) == 0.0 and reaction(False, packed) > 1e-3 and reaction(True, tight) > 1e-3


def test_the_mask_is_that_of_transformers(tok, make_model, coded):
    """The same blocks through Llama, with a four-dimensional mask and positions that start again in each row."""
    model = make_model(noise=0.1)
    packed = pack_rows(coded, 128, tok.special["<pad>"], gap=0)
    start = torch.zeros_like(packed.owner)
    for b, row in enumerate(packed.owner.tolist()):
        for t in range(1, len(row)):
            start[b, t] = start[b, t - 1] + 1 if row[t] == row[t - 1] else 0
    looks = packing.own_row(packed.owner)
    logits = to_llama(model)(input_ids=packed.ids, position_ids=start, attention_mask=looks).logits
    counts = packed.mask[:, 1:]
    theirs = torch.nn.functional.cross_entropy(logits[:, :-1][counts], packed.ids[:, 1:][counts])
    assert packed_loss(model, packed)[0].item() == pytest.approx(theirs.item(), abs=1e-5)


def test_what_does_not_fit_is_refused(tok, make_model, coded):
    with pytest.raises(ValueError, match="a block of 30"):
        pack_rows(coded, 30, 0)
    with pytest.raises(ValueError, match="0 rows"):
        pack_rows([], 30, 0)
    small = make_model(block_size=64)
    with pytest.raises(ValueError, match="block_size=64"):
        packed_loss(small, pack_rows(coded, 128, 0))
