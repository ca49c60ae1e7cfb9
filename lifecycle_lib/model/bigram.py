"""The smallest language models: counts of which token follows which, and the same table learnt by gradient.

Counting is maximum likelihood: P(next | token) = count(token, next) / count(token). A one-matrix network with
softmax rows, trained on -ln p, has that table as its optimum (Karpathy's makemore, part 1), so the
divergence between the two must fall to zero. Losses are in nats.

Leaves out: longer contexts and back-off. Smoothing is additive only.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# V = vocabulary, B = batch, T = time


def count_bigrams(lines: Iterable[str]) -> dict[str, Counter[str]]:
    """For each word, how often each other word follows it. Words are cut at spaces; lines do not join.

    Raises ValueError when no line has two words, or when `lines` is one string.
    """
    if isinstance(lines, str):
        raise ValueError("lines is one string and would be read letter by letter; pass a list: text.splitlines()")
    counts: dict[str, Counter[str]] = {}
    for line in lines:
        words = line.split()
        for word, following in zip(words, words[1:]):
            counts.setdefault(word, Counter())[following] += 1
    if not counts:
        raise ValueError("no line has two words, so nothing follows anything; give longer lines")
    return counts


def most_likely_next(counts: dict[str, Counter[str]], word: str) -> tuple[str, int]:
    """The word most often seen after `word`, and how often; ties go to the alphabet. ValueError if unseen."""
    if not counts.get(word):
        raise ValueError(f"nothing was ever seen after {word!r}; known words: {', '.join(sorted(counts)[:8])}")
    return min(counts[word].items(), key=lambda item: (-item[1], item[0]))


def token_loss(p: float) -> float:
    """Loss of one observed token in nats, -ln p. Raises ValueError for p outside (0, 1]."""
    if not 0 < p <= 1:
        raise ValueError(f"p={p} is no probability of an observed token; give a number in (0, 1]")
    return -math.log(p) + 0.0  # + 0.0: a certain token costs 0.0, not -0.0


@dataclass(frozen=True, slots=True)
class CountBigram:
    """Bigram counts over token ids. `counts` (V, V) int64: row = token, column = the one after it."""

    counts: Tensor
    smoothing: float = 0.0

    @classmethod
    def fit(cls, ids: Sequence[int] | Tensor, vocab_size: int, smoothing: float = 0.0) -> CountBigram:
        """Count the pairs of one stream of ids; `smoothing` is added to every pair.

        Raises ValueError for fewer than two ids, an id outside [0, vocab_size), or a negative smoothing.
        """
        if not (math.isfinite(smoothing) and smoothing >= 0):
            raise ValueError(f"smoothing={smoothing} must be a number of at least 0")
        row, column = _pairs(ids, vocab_size)
        counts = torch.bincount(row * vocab_size + column, minlength=vocab_size**2)
        return cls(counts.view(vocab_size, vocab_size), smoothing)

    def probs(self) -> Tensor:
        """P(next | token) (V, V) float64. A token that nothing ever followed has a row of NaN (smoothing 0)."""
        weights = self.counts.double() + self.smoothing
        return weights / weights.sum(1, keepdim=True)

    def nll(self, ids: Sequence[int] | Tensor) -> float:
        """Mean -ln p over the pairs of a stream, in nats; infinite when a pair has probability 0."""
        row, column = _pairs(ids, len(self.counts))
        p = self.probs()[row, column].nan_to_num(0.0)  # a row without counts gives nothing a chance
        return float(-p.log().mean())

    def sample(self, generator: torch.Generator, n: int, start: int = 0) -> list[int]:
        """`n` ids that follow `start`, each drawn from the row of the one before it.

        Raises ValueError when it reaches a token that nothing ever followed: use smoothing.
        """
        probs, token, out = self.probs(), start, []
        for _ in range(n):
            if probs[token].isnan().any():
                raise ValueError(f"nothing was ever seen after token {token}; fit with smoothing above 0")
            token = int(torch.multinomial(probs[token].float(), 1, generator=generator))
            out.append(token)
        return out


class NeuralBigram(nn.Module):
    """One (V, V) table of logits, nothing else: `forward` looks up the row of each token."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(vocab_size, vocab_size))

    def forward(self, idx: Tensor) -> Tensor:  # (B, T) -> (B, T, V)
        """Logits of the next token, shape of `idx` plus (V,)."""
        return self.logits[idx]


def kl_to_counts(neural: NeuralBigram, counts: CountBigram) -> float:
    """KL(counts || neural) in nats, rows weighted by how often each token occurs. Zero when the tables agree."""
    weights = counts.counts.double() + counts.smoothing
    joint = weights / weights.sum()
    p = counts.probs().nan_to_num(0.0)
    log_q = neural.logits.detach().cpu().double().log_softmax(1).to(p.device)
    return float((joint * (p.clamp_min(1e-300).log() - log_q)).sum())


def _pairs(ids: Sequence[int] | Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    stream = torch.as_tensor(ids, dtype=torch.long).cpu()
    if stream.dim() != 1 or len(stream) < 2:
        raise ValueError(f"ids has shape {tuple(stream.shape)}; a bigram needs one stream of at least two ids")
    low, high = int(stream.min()), int(stream.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"ids run from {low} to {high}, outside [0, {vocab_size}); check vocab_size={vocab_size}")
    return stream[:-1], stream[1:]
