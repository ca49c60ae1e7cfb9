"""Packing, windows, and the held-out loss against transformers' own language-model loss."""

import pytest
import torch

from lifecycle_lib.model.bridge import to_llama
from lifecycle_lib.train.pretrain import lm_batches, lm_loss, lm_rows, pack


def test_packing_by_hand():
    train, held = pack([[1, 2], [3], [4, 5, 6], [7]], n_hold_out=1)
    assert train.tolist() == [1, 2, 3, 4, 5, 6] and held.tolist() == [7]
    rows = lm_rows(train, torch.tensor([0, 2]), 4)
    assert rows.ids.tolist() == [[1, 2, 3, 4], [3, 4, 5, 6]] and rows.mask.all()
    everything, nothing = pack([[1], [2]])
    assert everything.tolist() == [1, 2] and nothing.tolist() == []


@pytest.mark.parametrize("n", [2, 3])
def test_nothing_left_to_train_on_is_refused(n):
    with pytest.raises(ValueError, match=f"2 documents, {n} held out"):
        pack([[1], [2]], n_hold_out=n)


def test_batches_are_pure_and_reach_both_ends():
    stream = torch.arange(20)
    batches, again = lm_batches(stream, 8, 6, seed=1), lm_batches(stream, 8, 6, seed=1)
    last = again(40)
    assert torch.equal(batches(3).ids, again(3).ids) and torch.equal(last.ids, batches(40).ids)
    assert not torch.equal(batches(0).ids, batches(1).ids)
    assert not torch.equal(batches(0).ids, lm_batches(stream, 8, 6, seed=2)(0).ids)
    seen = torch.cat([batches(s).ids for s in range(60)])
    assert (seen.diff(dim=1) == 1).all(), "windows are cut in one piece"
    assert set(seen[:, 0].tolist()) == set(range(15)), "every window, the first and the last included"


def test_a_corpus_shorter_than_a_block_is_refused():
    assert lm_batches(torch.arange(6), 2, 6, seed=0)(0).ids.tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    with pytest.raises(ValueError, match="5 tokens, fewer than a block of 6"):
        lm_batches(torch.arange(5), 2, 6, seed=0)


def test_held_out_loss_is_that_of_transformers(make_model):
    model = make_model(noise=0.1)
    stream = torch.arange(70) * 13 % 97
    got = lm_loss(model, stream, length=16)
    blocks = stream[:64].view(4, 16)
    llama = to_llama(model)
    want = llama(input_ids=blocks, labels=blocks).loss.item()
    assert got == pytest.approx(want, abs=1e-5)
    early = llama(input_ids=blocks[:, :-1], labels=blocks[:, 1:]).loss.item()  # shifted here, and once more inside
    assert abs(early - want) > 1e-3, "labels shifted twice"
    assert lm_loss(model, stream, length=500) == pytest.approx(
        llama(input_ids=stream[None], labels=stream[None]).loss.item(), abs=1e-5)
    with pytest.raises(ValueError, match="no token to predict"):
        lm_loss(model, stream[:1], length=16)


def test_blocks_of_several_batches_weigh_the_same(make_model):
    model = make_model(noise=0.1)
    stream = torch.arange(40 * 5) * 7 % 61  # 40 blocks: a batch of 32 and one of 8
    alone = [lm_loss(model, stream[5 * i:5 * i + 5], 5) for i in range(40)]
    assert lm_loss(model, stream, 5) == pytest.approx(sum(alone) / 40, abs=1e-5)
