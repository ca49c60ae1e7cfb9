"""Counts, losses, and the neural table that must come out equal to the counts."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F

from lifecycle_lib.core.seeds import make_generator, pick_device
from lifecycle_lib.model.bigram import (
    CountBigram,
    NeuralBigram,
    count_bigrams,
    kl_to_counts,
    most_likely_next,
    token_loss,
)

DATA = Path(os.environ.get("LIFECYCLE_DATA", Path(__file__).parents[3] / "shared" / "data"))
NAMES = DATA / "corpora" / "names.txt"
LINES = ["damaged return eligible", "damaged return eligible", "damaged return review", "late return review"]


def stream(n=4000, vocab_size=6, seed=0):
    """Ids from a random chain in which some pairs are rare."""
    table = torch.rand(vocab_size, vocab_size, generator=make_generator(seed, "table")).double() ** 4 + 1e-3
    chain = CountBigram((table * 1e6).long())
    return chain.sample(make_generator(seed, "walk"), n)


# ---------------------------------------------------------------- the lesson

def test_four_lines():
    counts = count_bigrams(LINES)
    assert most_likely_next(counts, "damaged") == ("return", 3)
    assert most_likely_next(counts, "return") == ("eligible", 2)
    assert counts["return"] == {"eligible": 2, "review": 2}
    assert "eligible" not in counts  # lines do not join


def test_token_loss():
    assert token_loss(0.80) == pytest.approx(0.223, abs=5e-4)
    assert token_loss(0.20) == pytest.approx(1.609, abs=5e-4)
    assert token_loss(0.20) - token_loss(0.80) == pytest.approx(math.log(4))
    assert math.copysign(1, token_loss(1)) == 1


def test_token_loss_equals_torch():
    logits = torch.randn(20, 7, generator=make_generator(0, "logits")).double()
    target = torch.arange(20) % 7
    mine = [token_loss(float(p)) for p in logits.softmax(1)[range(20), target]]
    assert mine == pytest.approx(F.cross_entropy(logits, target, reduction="none").tolist(), abs=1e-9)


@pytest.mark.parametrize("p", [0, -0.1, 1.1, float("nan")])
def test_token_loss_refuses_what_is_no_probability(p):
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        token_loss(p)


# ---------------------------------------------------------------- counts over ids

def test_count_table_by_hand():
    model = CountBigram.fit([0, 1, 0, 1, 1], 2)
    assert model.counts.tolist() == [[0, 2], [1, 1]]
    assert model.nll([0, 1, 0]) == pytest.approx(math.log(2) / 2)  # p = 1, then 1/2
    assert CountBigram.fit([0, 1, 0, 1, 1], 2, smoothing=1).probs().tolist() == [[0.25, 0.75], [0.5, 0.5]]


def test_training_nll_is_the_conditional_entropy():
    ids = stream()
    model = CountBigram.fit(ids, 6)
    joint = scipy.stats.entropy(model.counts.flatten().numpy())
    first = scipy.stats.entropy(np.bincount(ids[:-1]))
    assert model.nll(ids) == pytest.approx(joint - first, abs=1e-9)


def test_counts_are_the_best_bigram_and_transposed_counts_are_caught():
    ids = stream()
    best = CountBigram.fit(ids, 6)
    backwards = CountBigram(best.counts.T.contiguous())  # broken: P(previous | token)
    assert best.nll(ids) < CountBigram.fit(ids, 6, smoothing=5).nll(ids) < math.log(6)
    assert backwards.nll(ids) > best.nll(ids) + 0.1


def test_unseen_pair_costs_infinity_and_smoothing_mends_it():
    assert CountBigram.fit([0, 1, 0, 1], 3).nll([0, 2]) == math.inf
    assert CountBigram.fit([0, 1, 0, 1], 3).nll([2, 0]) == math.inf
    assert CountBigram.fit([0, 1, 0, 1], 3, smoothing=1).nll([0, 2]) == pytest.approx(math.log(5))


def test_samples_follow_the_table():
    ids = stream()
    model = CountBigram.fit(ids, 6)
    again = CountBigram.fit(model.sample(make_generator(1, "sample"), 4000, start=ids[0]), 6)
    assert (again.counts[model.counts == 0] == 0).all()
    assert (again.probs() - model.probs()).abs().max() < 0.1
    assert model.sample(make_generator(2, "a"), 9) == model.sample(make_generator(2, "a"), 9)


@pytest.mark.skipif(not NAMES.exists(), reason="names.txt not found; set LIFECYCLE_DATA")
def test_names_reach_the_published_loss():
    names = NAMES.read_text(encoding="utf-8").split()
    ids = [0 if c == "." else ord(c) - 96 for c in "." + ".".join(names) + "."]
    assert round(CountBigram.fit(ids, 27).nll(ids), 4) == 2.4540
    assert round(CountBigram.fit(ids, 27, smoothing=1).nll(ids), 4) == 2.4546
    without_ends = [i for i in ids if i]  # broken: no start and end token
    assert round(CountBigram.fit(without_ends, 27).nll(without_ends), 3) != 2.454


# ---------------------------------------------------------------- the neural table

def train(model, ids, targets, steps=250):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(ids), targets).backward()
        optimizer.step()
        schedule.step()


def test_neural_table_equals_the_counts():
    device = pick_device(None)
    ids = stream(2000)
    counts = CountBigram.fit(ids, 6)
    model = NeuralBigram(6).to(device)
    before = kl_to_counts(model, counts)
    data = torch.tensor(ids, device=device)
    train(model, data[:-1], data[1:])
    assert before > 0.3
    assert -1e-9 < kl_to_counts(model, counts) < 1e-3
    p = model.logits.detach().cpu().softmax(1).double()
    assert (p - counts.probs()).abs().max() < 0.01


def test_neural_table_with_unshifted_targets_is_caught():
    ids = torch.tensor(stream(2000))
    model = NeuralBigram(6)
    train(model, ids[:-1], ids[:-1], steps=50)  # broken: predicts the token it was given
    assert kl_to_counts(model, CountBigram.fit(ids, 6)) > 1


def test_kl_equals_scipy():
    counts = CountBigram.fit(stream(), 6, smoothing=0.5)
    model = NeuralBigram(6)
    torch.nn.init.normal_(model.logits, generator=make_generator(3, "init"))
    q = model.logits.detach().double().softmax(1).numpy()
    weights = (counts.counts + 0.5).sum(1).double().numpy()
    rows = [scipy.stats.entropy(p, row) for p, row in zip(counts.probs().numpy(), q)]
    assert kl_to_counts(model, counts) == pytest.approx(np.average(rows, weights=weights), abs=1e-9)


# ---------------------------------------------------------------- bad input

def test_bad_input_raises():
    for call, message in [
        (lambda: count_bigrams(["one", ""]), "two words"),
        (lambda: count_bigrams("a b"), "letter by letter"),
        (lambda: most_likely_next(count_bigrams(LINES), "mug"), "'mug'"),
        (lambda: CountBigram.fit([1], 2), "at least two"),
        (lambda: CountBigram.fit([0, 2], 2), "outside"),
        (lambda: CountBigram.fit([0, -1], 2), "outside"),
        (lambda: CountBigram.fit([0, 1], 2, smoothing=-1), "smoothing"),
        (lambda: CountBigram.fit([0, 1], 2).sample(make_generator(0, "s"), 3), "nothing was ever seen"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
