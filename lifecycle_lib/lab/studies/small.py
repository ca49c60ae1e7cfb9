"""Small models for experiments that need many of them: one stage in the store a run, seconds each.

A study draws its own rows of words, trains a GPT of some 0.05M to 0.3M parameters on them and measures it at once;
the numbers are kept in the run's card (`measured`), so a stopped study goes on where it was.

Shapes: N rows, T tokens.
"""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from lifecycle_lib.core.seeds import make_generator, seed_everything
from lifecycle_lib.core.store import Artifact
from lifecycle_lib.lab.stages import TRAIN, Lab
from lifecycle_lib.model.checkpoint import save_checkpoint
from lifecycle_lib.model.gpt import GPT, GPTConfig
from lifecycle_lib.train import loop
from lifecycle_lib.train.logprobs import Rows, answer_loss, pad_rows, token_logps

SPECIAL = ("<pad>", "<bos>", "<eos>")


class Vocab:
    """Words to ids, one token a word: `SPECIAL` first, then the given words in order."""

    def __init__(self, words: Iterable[str]) -> None:
        self.words = [*SPECIAL, *dict.fromkeys(w for w in words if w not in SPECIAL)]
        self.index = {w: i for i, w in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str) -> list[int]:
        """Ids of the words of `text`. Raises ValueError naming a word that is not in the vocabulary."""
        try:
            return [self.index[w] for w in text.split()]
        except KeyError as error:
            raise ValueError(f"word {error.args[0]!r} is not in the vocabulary of {len(self)}; add it") from None

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(self.words[i] for i in ids)


def rows_of(vocab: Vocab, prompts: Sequence[str], answers: Sequence[str], whole: bool = False) -> Rows:
    """Rows <bos> prompt answer <eos>; the answer counts, or every word when `whole`."""
    p = [[1, *vocab.encode(x)] for x in prompts]
    a = [[*vocab.encode(x), 2] for x in answers]
    return pad_rows([x[:1] for x in p], [x[1:] + y for x, y in zip(p, a)], 0) if whole else pad_rows(p, a, 0)


def batches_of(rows: Rows, batch: int, seed: int, weights: Tensor | None = None) -> Callable[[int], Rows]:
    """batches(step): rows in a fresh order each epoch, or drawn with replacement by `weights` (N,). Pure in
    (seed, step). A set smaller than a batch is drawn with replacement too."""
    n = len(rows.ids)
    per_epoch = n // batch
    orders: dict[int, Tensor] = {}

    def batches(step: int) -> Rows:
        if weights is not None or per_epoch == 0:
            g = make_generator(seed, "draw", step)
            w = weights if weights is not None else torch.ones(n)
            pick = torch.multinomial(w, batch, replacement=True, generator=g)
        else:
            epoch, i = divmod(step, per_epoch)
            if epoch not in orders:
                orders.clear()
                orders[epoch] = torch.randperm(n, generator=make_generator(seed, "order", epoch))
            pick = orders[epoch][i * batch:(i + 1) * batch]
        ids, mask = rows.ids[pick], rows.mask[pick]
        width = int((ids != 0).any(0).nonzero().max()) + 1  # no column of padding alone
        return Rows(ids[:, :width], mask[:, :width])

    return batches


def small_stage(lab: Lab, name: str, config: Mapping, batches: Callable[[], Callable[[int], Rows]],
                measure: Callable[[GPT], dict], *, gpt: GPTConfig, fit: loop.FitConfig,
                start: Artifact | None = None, parents: Mapping[str, Artifact] | None = None,
                code: Sequence[ModuleType] = (), keep: bool = False, loss_fn: loop.LossFn = answer_loss) -> Artifact:
    """One small training run and its measurements, from the store when it is there.

    `config` must determine `batches()` and `measure` together with the seed and the modules in `code`: name the study's
    own module there. `start` continues a kept run; `keep` saves the weights. The card's `measured` holds what
    `measure(model)` returned, `train_cpu_s` the training alone."""
    def make(folder: Path) -> dict:
        seed_everything(lab.seed)
        model = lab.load(start, expect=gpt) if start else GPT(gpt).to(lab.device)
        feed = batches()
        result = loop.fit(model, lambda s: feed(s).to(lab.device), loss_fn, fit, folder, name)
        if keep:
            save_checkpoint(folder, model)
        return {"steps": result.steps, "first_loss": result.losses[0], "last_loss": result.losses[-1],
                "n_params": model.n_params(), "train_cpu_s": result.cpu_s, "measured": measure(model)}

    parents = {**({"start": start} if start else {}), **(parents or {})}
    return lab.make(name, {"gpt": gpt, "fit": fit, **config}, parents, make,
                    (*TRAIN, sys.modules[__name__], *code))


@torch.no_grad()
def row_losses(model: GPT, rows: Rows, part: int = 256) -> Tensor:
    """Mean loss in nats over the counted tokens of each row. (N,)"""
    out = []
    for i in range(0, len(rows.ids), part):
        r = Rows(rows.ids[i:i + part], rows.mask[i:i + part]).to(model.device)
        out.append((-token_logps(model, r).sum(-1) / r.mask[:, 1:].sum(-1).clamp(min=1)).cpu())
    return torch.cat(out)


@torch.no_grad()
def right(model: GPT, rows: Rows, part: int = 256) -> Tensor:
    """Is every counted token the model's first choice, given the right ones before it? Which equals: does greedy
    decoding give the whole answer? (N,) bool"""
    out = []
    for i in range(0, len(rows.ids), part):
        r = Rows(rows.ids[i:i + part], rows.mask[i:i + part]).to(model.device)
        best = model(r.ids[:, :-1]).argmax(-1)
        out.append(((best == r.ids[:, 1:]) | ~r.mask[:, 1:]).all(-1).cpu())
    return torch.cat(out)
