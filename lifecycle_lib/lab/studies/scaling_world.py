"""A world whose loss has a power-law tail: many facts of falling frequency, and one rule that a model can work out.

A row is three tokens. A fact: two tokens name it, the third is its value, one of 32, at random. Fact k is asked with
probability p_k ~ k^-(1 + alpha); a share NOISE of its rows show a random value. A rule: a day and a window, then `yes`
if the day is within the window, else `no`; a third of the (day, window) pairs are never trained on. Rows are drawn
fresh, so a token is seen once, and only the third token counts.

Hutter (2021) and Michaud et al. (2023) predict from this tail: a model that holds the n most frequent facts is left
with a loss ~ n^-alpha, and D rows show facts up to n ~ D^(1 / (1 + alpha)), so L ~ D^(-alpha / (1 + alpha)). They
assume capacity n ~ N and a learner that needs a fixed number of looks; a GPT trained by AdamW owes us neither.

The evaluation is exact: every fact, weighted by its probability and with its noise, and every trained-on kind of pair.
So it has no sampling error, and the irreducible loss E is known.

Shapes: B rows of 3 tokens, F facts.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from lifecycle_lib.core.seeds import make_generator
from lifecycle_lib.core.store import Artifact
from lifecycle_lib.lab.stages import Lab
from lifecycle_lib.lab.studies.small import small_stage
from lifecycle_lib.model.gpt import GPT, GPTConfig
from lifecycle_lib.train.logprobs import Rows, answer_loss
from lifecycle_lib.train.loop import FitConfig

SYMBOLS, VALUES, NUMBERS = 200, 32, 40  # a fact's key is two symbols
FACTS = SYMBOLS**2
ALPHA, NOISE, RULE_SHARE, NEAR = 0.6, 0.05, 0.2, 2
KEY, VALUE, NUMBER = 1, 1 + SYMBOLS, 1 + SYMBOLS + VALUES  # first ids of each kind of token; 0 is unused
YES, NO = NUMBER + NUMBERS, NUMBER + NUMBERS + 1
VOCAB = NO + 1
TOKENS_A_ROW = 3
PAIRS = torch.arange(NUMBERS**2)
BOUNDARY = (PAIRS // NUMBERS - PAIRS % NUMBERS).abs() <= NEAR


def frequencies(tau: float = 1.0, head: int = FACTS) -> Tensor:
    """p_k of the `head` most frequent facts, to the power tau, summing to 1. (F,) double, 0 beyond `head`."""
    p = torch.arange(1, FACTS + 1, dtype=torch.float64) ** (-(1 + ALPHA) * tau)
    p[head:] = 0
    return p / p.sum()


def irreducible() -> float:
    """E in nats a counted token: the entropy of the noise, which no model can remove."""
    right, wrong = 1 - NOISE + NOISE / VALUES, NOISE / VALUES
    return (1 - RULE_SHARE) * -(right * math.log(right) + (VALUES - 1) * wrong * math.log(wrong))


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What training rows are drawn: the share of rules; facts by p_k^tau among the `head` most frequent; a share of
    wrong values on top of the world's noise; a share of `copies` of 50 boilerplate rows; a share `booster` of rows
    about the 100 most frequent facts. `pool`: rows in the file, read again when it ends (0: always fresh)."""

    rules: float = RULE_SHARE
    tau: float = 1.0
    head: int = FACTS
    wrong: float = 0.0
    copies: float = 0.0
    booster: float = 0.0
    pool: int = 0


class World:
    """One seed's facts, and which pairs of the rule are held out."""

    def __init__(self, seed: int) -> None:
        g = make_generator(seed, "scaling world")
        self.seed = seed
        self.key = torch.randperm(FACTS, generator=g)  # which pair of symbols asks for the fact of rank k
        self.value = torch.randint(VALUES, (FACTS,), generator=g)
        self.held_out = torch.rand(len(PAIRS), generator=g) < 1 / 3

    def facts(self, ranks: Tensor, shown: Tensor) -> Tensor:
        """Rows (B, 3) that ask for the facts of these ranks and show these values."""
        key = self.key[ranks]
        return torch.stack((KEY + key // SYMBOLS, KEY + key % SYMBOLS, VALUE + shown), 1)

    def rules(self, pairs: Tensor) -> Tensor:
        """Rows (B, 3) of these (day, window) pairs."""
        day, window = pairs // NUMBERS, pairs % NUMBERS
        return torch.stack((NUMBER + day, NUMBER + window, torch.where(day <= window, YES, NO)), 1)

    def draw(self, n: int, recipe: Recipe, g: torch.Generator, cum: Tensor) -> Tensor:
        """n fresh rows (n, 3) of `recipe`; `cum` is the running sum of its frequencies."""
        u = torch.rand(6, n, generator=g, dtype=torch.float64)
        ranks = torch.searchsorted(cum, u[0] * cum[-1]).clamp(max=FACTS - 1)
        ranks = torch.where(u[1] < recipe.booster, (u[0] * 100).long(), ranks)
        shown = torch.where(u[2] < NOISE + recipe.wrong, (u[3] * VALUES).long(), self.value[ranks])
        pairs = PAIRS[~self.held_out]
        rows = torch.where((u[4] < recipe.rules)[:, None], self.rules(pairs[(u[3] * len(pairs)).long()]),
                           self.facts(ranks, shown))
        page = self.facts(torch.arange(50), self.value[:50])
        return torch.where((u[5] < recipe.copies)[:, None], page[(u[3] * 50).long()], rows)

    def batches(self, recipe: Recipe, batch: int) -> Callable[[int], Rows]:
        """batches(step), pure in (seed, step)."""
        cum = frequencies(recipe.tau, recipe.head).cumsum(0)
        pool = self.draw(recipe.pool, recipe, make_generator(self.seed, "pool"), cum) if recipe.pool else None
        orders: dict[int, Tensor] = {}

        def batches(step: int) -> Rows:
            if pool is None:
                return counted(self.draw(batch, recipe, make_generator(self.seed, "rows", step), cum))
            epoch, at = divmod(step * batch, len(pool))
            if epoch not in orders:
                orders.clear()
                orders[epoch] = torch.randperm(len(pool), generator=make_generator(self.seed, "epoch", epoch))
            return counted(pool[orders[epoch][at:at + batch]])

        return batches


def counted(ids: Tensor) -> Rows:
    """Rows whose third token counts."""
    return Rows(ids, (torch.arange(TOKENS_A_ROW) == 2).expand(ids.shape))


@torch.no_grad()
def measure(model: GPT, world: World) -> dict[str, float]:
    """Exact losses in nats a counted token, the share of questions answered, and the rule's held-out pairs."""
    probabilities, device = frequencies(), model.device
    right, any_value = [], []
    for ranks in torch.arange(FACTS).split(4096):
        rows = world.facts(ranks, world.value[ranks]).to(device)
        logp = model.head(model.hidden(rows[:, :2])[:, -1]).float().log_softmax(-1)
        right.append(logp.gather(1, rows[:, 2:])[:, 0].double().cpu())
        any_value.append(logp[:, VALUE:NUMBER].mean(1).double().cpu())
    right, any_value = torch.cat(right), torch.cat(any_value)
    fact = -(probabilities * ((1 - NOISE) * right + NOISE * any_value)).sum().item()
    rows = world.rules(PAIRS).to(device)
    logp = model.head(model.hidden(rows[:, :2])[:, -1]).float().log_softmax(-1)
    rule = -logp.gather(1, rows[:, 2:])[:, 0].cpu()
    hit = (logp.argmax(-1) == rows[:, 2]).cpu().float()
    out = world.held_out
    return {"loss": (1 - RULE_SHARE) * fact + RULE_SHARE * rule[~out].mean().item(), "fact_loss": fact,
            "rule_loss": rule[~out].mean().item(), "facts_known": (right > math.log(0.5)).double().sum().item(),
            "rule_new_pairs": hit[out].mean().item(), "boundary": hit[out & BOUNDARY].mean().item()}


def shape(width: int) -> GPTConfig:
    """One layer of this width: 276 width + 16 width^2 parameters."""
    return GPTConfig(vocab_size=VOCAB, block_size=4, n_layer=1, n_head=1, n_embd=width, n_hidden=4 * width)


def n_params(width: int) -> int:
    """Parameters of `shape(width)`, the tied embedding included."""
    return width * (VOCAB + 4 + 16 * width)


def learning_rate(width: int) -> float:
    """The one rule for every run: 0.32 / width, at most 0.03 (near the best of a sweep at widths 16, 48 and 96)."""
    return min(0.03, 0.32 / width)


def batch_rows(tokens: float) -> int:
    """Rows a batch: the power of two nearest to sqrt(tokens) / 3, at least 16, so that steps grow like sqrt(tokens)."""
    return max(16, 2 ** round(math.log2(math.sqrt(tokens) / 3)))


def train(lab: Lab, width: int, tokens: float, recipe: Recipe | None = None, rate: float = 1.0,
          read_at: Sequence[float] = ()) -> Artifact:
    """One run over `tokens` tokens of `recipe`; its card's `measured` holds the exact losses and the run's N and D.

    The cosine schedule has the length of the run. `read_at`: token counts at which the unfinished model is measured
    too ("early": [[tokens, loss], ...]), in the middle of a schedule meant for more. `rate` multiplies the rate."""
    recipe = recipe or Recipe()
    batch = batch_rows(tokens)
    steps = max(8, round(tokens / TOKENS_A_ROW / batch))
    fit = FitConfig(steps=steps, optimizer="adamw", lr=rate * learning_rate(width),
                    warmup_steps=min(50, max(1, steps // 10)), checkpoint_every=100_000)
    stops = {round(t / TOKENS_A_ROW / batch) for t in read_at}
    early: list[list[float]] = []
    world, seen = World(lab.seed), count()

    def loss_fn(model: GPT, rows: Rows) -> tuple[Tensor, dict[str, float]]:
        if (step := next(seen)) in stops:
            early.append([step * batch * TOKENS_A_ROW, measure(model, world)["loss"]])
        return answer_loss(model, rows)

    def measured(model: GPT) -> dict:
        size = {"n_params": model.n_params(), "tokens": steps * batch * TOKENS_A_ROW}
        return {**measure(model, world), **size, **({"early": early} if read_at else {})}

    return small_stage(lab, "scaling", {"recipe": recipe, "batch": batch, "read_at": list(read_at)},
                       lambda: world.batches(recipe, batch), measured, gpt=shape(width), fit=fit,
                       code=(sys.modules[__name__],), loss_fn=loss_fn)
