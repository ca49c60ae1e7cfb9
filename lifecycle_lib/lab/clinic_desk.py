"""The clinic's small desk: "<user> damaged d12 <bot>" is answered "P-7 yes"; the reason settles the policy, the days
decide. A model of one layer learns it in a second, so that so many broken runs and their healthy twins are quick.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lifecycle_lib.core.seeds import rng as make_rng
from lifecycle_lib.core.seeds import seed_everything
from lifecycle_lib.lab.studies.small import Vocab, batches_of, rows_of
from lifecycle_lib.model.gpt import GPT, GPTConfig
from lifecycle_lib.model.sampling import generate
from lifecycle_lib.train.logprobs import Rows, answer_loss
from lifecycle_lib.train.loop import FitConfig, FitResult, fit

WINDOWS = {"damaged": ("P-7", 30), "late": ("P-2", 20), "unwanted": ("P-3", 14), "wrong": ("P-5", 40)}
DAYS = [f"d{i:02d}" for i in range(60)]
IDS = [f"c{i:02d}" for i in range(24)]
VOCAB = Vocab(["<user>", "<bot>", *WINDOWS, *DAYS, *(p for p, _ in WINDOWS.values()), "yes", "no", "label", *IDS])
SHAPE = GPTConfig(vocab_size=len(VOCAB), block_size=24, n_layer=1, n_head=2, n_embd=32)
PAD, BOS, EOS = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Ask:
    """One request of the small desk, with its right answer."""

    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class Chart:
    """What is seen at once (`vitals`) and what a test would show (`tests`)."""

    vitals: dict[str, object]
    tests: dict[str, object]


class Words:
    """The tokenizer of the small desk: a word a token, as `grpo.collect` asks for it."""

    special = {"<pad>": PAD, "<bos>": BOS, "<eos>": EOS}

    @staticmethod
    def encode(text: str) -> list[int]:
        return [BOS, *VOCAB.encode(text)]

    @staticmethod
    def decode(ids: Sequence[int]) -> str:
        return VOCAB.decode(ids)


# ---- the small desk ---------------------------------------------------------------------------------------------

def asks(n: int, split: str) -> list[Ask]:
    """Requests of a split; "train" and "eval" share no (reason, days)."""
    all_pairs = [(r, d) for i, r in enumerate(WINDOWS) for d in range(len(DAYS))
                 if ((d + i) % 5 == 2) == (split == "eval")]
    rng = make_rng(0, "clinic", split)
    picked = [rng.choice(all_pairs) for _ in range(n)]
    return [Ask(f"<user> {r} {DAYS[d]} <bot>", f"{WINDOWS[r][0]} {'yes' if d <= WINDOWS[r][1] else 'no'}")
            for r, d in picked]


def demonstrations(n: int = 1024, claims: float = 0.3) -> Rows:
    """Rows of demonstrations, a share of which promise a label."""
    rng, given = make_rng(0, "clinic claims"), asks(n, "train")
    return rows_of(VOCAB, [a.prompt for a in given],
                   [a.answer + (" label" if rng.random() < claims else "") for a in given])


def train(model: GPT, rows: Rows, loss_fn: Callable = answer_loss, steps: int = 120, **settings: object) -> FitResult:
    cfg = FitConfig(**{"steps": steps, "lr": 3e-3, "checkpoint_every": 10_000, **settings})
    return fit(model, batches_of(rows, 64, 0), loss_fn, cfg, label="clinic")


def new_model(seed: int = 0) -> GPT:
    seed_everything(seed)
    return GPT(SHAPE)


@cache
def _tuned(claims: float) -> GPT:
    model = new_model()
    train(model, demonstrations(claims=claims))
    return model


def tuned(claims: float = 0.3) -> GPT:
    """A fresh copy of the fine-tuned model, whose answers promise a label in some 30 % of cases."""
    return copy.deepcopy(_tuned(claims))


def answers(model: GPT, prompts: Sequence[str], temperature: float = 0.0) -> list[str]:
    """One answer a prompt, at most 6 words; an answer that does not end shows what it said."""
    g = torch.Generator().manual_seed(0)
    out = generate(model, [Words.encode(p) for p in prompts], eos_id=EOS, pad_id=PAD, max_new_tokens=6,
                   temperature=temperature, generator=g)
    return [VOCAB.decode(ids) for ids in out.ids]


def exact(model: GPT, given: Sequence[Ask], prompt: Callable[[str], str] = str) -> float:
    """Share of greedy answers that are right to the word and end there."""
    said = answers(model, [prompt(a.prompt) for a in given])
    return share(s == f"{a.answer} <eos>" for s, a in zip(said, given))


def claim_rate(model: GPT) -> float:
    """Share of sampled answers that promise a label."""
    said = answers(model, [a.prompt for a in asks(256, "eval")], temperature=1.0)
    return sum("label" in s for s in said) / len(said)


def at_steps(values: Sequence[float], digits: int = 2) -> list[float]:
    """The first value, three on the way and the last."""
    return [round(values[round(i * (len(values) - 1) / 4)], digits) for i in range(5)]


def share(marks: object) -> float:
    marks = list(marks)
    return round(sum(marks) / len(marks), 2)


def gradient(model: GPT, loss: Tensor) -> Tensor:
    """The gradient of `loss` as one vector; the graph stays for another use."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)])
