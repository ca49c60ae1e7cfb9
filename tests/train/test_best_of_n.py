"""Best-of-n by hand, by brute force over all subsets and by scipy; winners of one batch."""

import itertools
import math

import numpy as np
import pytest
from scipy.special import comb
from scipy.stats import entropy

from lifecycle_lib.core.stats import pass_at_k
from lifecycle_lib.desk.cases import draw_cases
from lifecycle_lib.train import best_of_n as bon
from lifecycle_lib.train import grpo


def test_by_hand():
    proxy, score = [[1.0, 2.0, 3.0]], [[10.0, 20.0, 60.0]]
    assert bon.best_of_n(proxy, score, 1) == pytest.approx([30.0])
    assert bon.best_of_n(proxy, score, 2) == pytest.approx([(20 + 60 + 60) / 3])  # pairs 12, 13, 23
    assert bon.best_of_n(proxy, score, 3) == pytest.approx([60.0])


def test_is_the_mean_over_all_subsets_ties_shared():
    random = np.random.default_rng(0)
    proxy, score = random.integers(0, 4, (3, 7)).astype(float), random.normal(size=(3, 7))
    for n in range(1, 8):
        brute = [np.mean([np.mean(s[list(pick)][p[list(pick)] == p[list(pick)].max()])
                          for pick in itertools.combinations(range(7), n)]) for p, s in zip(proxy, score)]
        assert bon.best_of_n(proxy, score, n) == pytest.approx(brute), "a tie is shared among those drawn"
        first = [np.mean([s[pick[int(np.argmax(p[list(pick)]))]] for pick in itertools.combinations(range(7), n)])
                 for p, s in zip(proxy, score)]
        assert n == 1 or np.abs(bon.best_of_n(proxy, score, n) - first).max() > 0.02, "the first of the tied ones wins"
        top = [np.mean([p[list(pick)].max() for pick in itertools.combinations(range(7), n)]) for p in proxy]
        assert bon.best_of_n(proxy, proxy, n) == pytest.approx(top), "the proxy's own expected maximum"
    distinct = random.permuted(np.tile(np.arange(7.0), (3, 1)), axis=1)
    brute = [np.mean([s[list(pick)][p[list(pick)].argmax()] for pick in itertools.combinations(range(7), 3)])
             for p, s in zip(distinct, score)]
    assert bon.best_of_n(distinct, score, 3) == pytest.approx(brute)
    biased = [s[:3][p[:3].argmax()] for p, s in zip(distinct, score)]  # one subset, as a naive estimate takes it
    assert np.abs(np.array(biased) - brute).max() > 0.1


def test_a_score_of_0_and_1_is_pass_at_k():
    right = np.array([[1, 0, 0, 1, 0, 0, 0, 0.0]])
    for k in (1, 3, 8):
        assert bon.best_of_n(right, right, k)[0] == pytest.approx(pass_at_k(8, 2, k))
        assert bon.best_of_n(right, right, k)[0] == pytest.approx(1 - comb(6, k) / comb(8, k))


def test_kl_is_that_of_the_maximum_of_n_uniforms():
    """Best of n of a proxy without ties is the density n u^(n-1) on ranks: the oracle integrates it."""
    ranks = (np.arange(200_000) + 0.5) / 200_000
    for n in (1, 2, 16, 64):
        assert bon.best_of_n_kl(n) == pytest.approx(entropy(n * ranks ** (n - 1), np.ones(200_000)), abs=1e-4)
    assert bon.best_of_n_kl(64) == pytest.approx(math.log(64) - 63 / 64)


def test_kl_of_a_pool_with_ties():
    """Oracle: scipy on the two-level distribution; drawn best-of-3 for a proxy of three levels."""
    paid = np.array([[1.0] * 9 + [0.0], [1.0, 0, 0, 0, 0, 0, 0, 0, 0, 0]])
    for n in (1, 4, 64):
        win = 1 - np.array([0.1, 0.9]) ** n
        want = [entropy([w, 1 - w], [q, 1 - q]) for w, q in zip(win, (0.9, 0.1))]
        assert bon.pool_kl(paid, n) == pytest.approx(want, abs=1e-12)
    assert bon.pool_kl(paid, 10**4) == pytest.approx([-math.log(0.9), -math.log(0.1)])
    assert bon.best_of_n_kl(64) > 10 * bon.pool_kl(paid, 64)[0], "the bound says little about a proxy that ties"
    distinct = np.arange(2000.0)[None]
    assert bon.pool_kl(distinct, 16)[0] == pytest.approx(bon.best_of_n_kl(16), abs=0.02)
    levels = np.array([0.0, 0, 0, 1, 1, 2])
    random = np.random.default_rng(0)
    top = random.choice(levels, (200_000, 3)).max(1)
    drawn = [np.mean(top == v) for v in (0, 1, 2)]
    assert bon.pool_kl(levels[None], 3)[0] == pytest.approx(entropy(drawn, [3 / 6, 2 / 6, 1 / 6]), abs=0.01)
    assert np.all(bon.pool_kl(random.normal(size=(3, 40)), 8) <= bon.best_of_n_kl(8))
    with pytest.raises(ValueError, match="n=0"):
        bon.pool_kl(paid, 0)


@pytest.mark.parametrize(("proxy", "score", "n", "message"), [
    ([[1.0, 2.0]], [[1.0]], 1, "must both be"), ([1.0, 2.0], [1.0, 2.0], 1, "must both be"),
    ([[1.0, 2.0]], [[1.0, 2.0]], 3, "n=3 of a pool of 2"), ([[1.0, 2.0]], [[1.0, 2.0]], 0, "n=0"),
    ([[1.0, math.nan]], [[1.0, 2.0]], 1, "not finite")])
def test_refuses(proxy, score, n, message):
    with pytest.raises(ValueError, match=message):
        bon.best_of_n(np.array(proxy), np.array(score), n)


def test_refuses_no_draw():
    with pytest.raises(ValueError, match="n=0"):
        bon.best_of_n_kl(0)


def test_winners_are_the_paid_answers_and_no_others(make_model, tok):
    model, cases = make_model(noise=0.05), draw_cases(3, 0, "rlvr")
    cfg = grpo.GRPOConfig(n_prompts=3, group_size=4, max_new_tokens=6)
    even = lambda texts, _: [float(i % 2 == 0) for i in range(len(texts))]  # noqa: E731
    kept = bon.winners(model, tok, cases, even, cfg, seed=1, step=0)
    batch = grpo.collect(model, tok, cases, even, cfg, seed=1, step=0)
    eos = tok.special["<eos>"]
    assert [tok.decode([t for t in a if t != eos]) for _, a in kept] == batch.texts[::2]
    assert [p for p, _ in kept] == [tok.encode(c.prompt) for c in cases for _ in range(2)]
    with pytest.raises(ValueError, match="none of 12 answers was paid 1.0 or more"):
        bon.winners(model, tok, cases, lambda t, c: [0.0] * len(t), cfg, seed=1, step=0)
    with pytest.raises(ValueError, match="returned nan for answer 0"):
        bon.winners(model, tok, cases, lambda t, c: [math.nan] * len(t), cfg, seed=1, step=0)
