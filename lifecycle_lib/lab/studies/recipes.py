"""Recipes: which knob of a small run matters (curriculum S3-6.03, .06, .07, .11, .17, .18, .21, .25).

The task is one comparison: `17 30 ->` (days since purchase, window) is answered `yes` or `no`. (days, window) pairs
on a lattice are held out; the hardest of them lie at the boundary. The world is the same for every seed, so a spread
over seeds is the spread of the run: its first weights and the order of its data.

Three settings of each knob around one centre; a grid of first weights by data order, taken apart into variance shares
(two-way random effects, Henderson 1953); and the winner's curse of a sweep beside a four-step protocol of the same
cost.

Left out: knobs together (only one is moved at a time), other optimisers than AdamW, accumulation over batches.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import mean

import numpy as np
import torch

from lifecycle_lib.core.seeds import make_generator
from lifecycle_lib.core.store import Artifact
from lifecycle_lib.lab.design import Design, Row
from lifecycle_lib.lab.stages import Lab
from lifecycle_lib.lab.studies.small import Vocab, batches_of, right, row_losses, rows_of, small_stage
from lifecycle_lib.model.gpt import GPT, GPTConfig
from lifecycle_lib.train.logprobs import Rows
from lifecycle_lib.train.loop import FitConfig

NEUTRAL, HOSTILE = ("please", "hello"), ("lawyer", "scam")
VOCAB = Vocab([f"{i:02d}" for i in range(60)] + ["->", "yes", "no", *NEUTRAL, *HOSTILE])
PAIRS = [(days, window) for window in range(10, 50) for days in range(60)]
HELD_OUT = [(d, w) for d, w in PAIRS if (3 * w + 5 * d) % 7 == 0]
TAUGHT = [(d, w) for d, w in PAIRS if (3 * w + 5 * d) % 7]
OFF = 1e9  # a clip no gradient reaches
ORDERS = ("shuffled", "days up", "days down")


@dataclass(frozen=True, slots=True, kw_only=True)
class Knobs:
    """One run of the sensitivity study. `order` sorts the rows of every epoch, or shuffles them by `order_seed`;
    `corrupt` puts one batch of random tokens, all counted, into the middle of the run."""

    steps: int = 200
    batch: int = 64
    lr: float = 6e-3
    warmup_share: float = 0.05
    weight_decay: float = 0.0
    beta2: float = 0.95
    clip: float = 1.0
    min_lr_share: float = 0.1
    order: str = "shuffled"
    order_seed: int = 0
    corrupt: bool = False

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"order={self.order!r} is unknown; use one of {', '.join(ORDERS)}")
        if not 0 <= self.warmup_share <= 1:
            raise ValueError(f"warmup_share={self.warmup_share} must be a share of the steps, 0 to 1")

    def fit(self) -> FitConfig:
        return FitConfig(steps=self.steps, lr=self.lr, optimizer="adamw", weight_decay=self.weight_decay,
                         beta2=self.beta2, warmup_steps=round(self.warmup_share * self.steps), clip=self.clip,
                         min_lr_share=self.min_lr_share, checkpoint_every=self.steps)


CENTRE = Knobs()
TOKENS = CENTRE.steps * CENTRE.batch
KNOBS: dict[str, tuple[dict, dict, dict]] = {  # knob: three settings, as changes of the centre
    "peak learning rate": ({"lr": CENTRE.lr / 4}, {}, {"lr": 4 * CENTRE.lr}),
    "batch, equal tokens": ({"batch": 16, "steps": TOKENS // 16}, {}, {"batch": 256, "steps": TOKENS // 256}),
    "warm-up": ({"warmup_share": 0.0}, {}, {"warmup_share": 0.5}),
    "weight decay": ({}, {"weight_decay": 0.1}, {"weight_decay": 1.0}),
    "clipping": ({"clip": 0.1}, {}, {"clip": OFF}),
    "beta2": ({"beta2": 0.9}, {}, {"beta2": 0.999}),
    "schedule": ({"min_lr_share": 0.0}, {}, {"min_lr_share": 1.0}),
    "data order, kind": ({}, {"order": "days up"}, {"order": "days down"})}
LR_FACTORS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)
SWEEP = [{"lr": f * CENTRE.lr, "weight_decay": d} for f in (0.5, 1, 2, 4) for d in (0.0, 0.1, 0.3)]
GRID_ORDERS, FRESH = 6, 4


def shape(lab: Lab) -> GPTConfig:
    small = lab.profile.name == "smoke"
    return GPTConfig(vocab_size=len(VOCAB), block_size=16, n_layer=1 if small else 2, n_head=2,
                     n_embd=16 if small else 48)


def answer_of(days: int, window: int) -> str:
    return "yes" if days <= window else "no"


def comparison_rows(pairs: Sequence[tuple[int, int]], tone: str = "") -> Rows:
    """Rows `TONE DAYS WINDOW -> yes|no`."""
    return rows_of(VOCAB, [f"{tone} {d:02d} {w:02d} ->" for d, w in pairs], [answer_of(d, w) for d, w in pairs])


def feed(knobs: Knobs) -> Callable[[int], Rows]:
    """batches(step) of one run."""
    sign = -1 if knobs.order == "days down" else 1
    pairs = TAUGHT if knobs.order == "shuffled" else sorted(TAUGHT, key=lambda p: (sign * p[0], p[1]))
    rows = comparison_rows(pairs)
    if knobs.order == "shuffled":
        clean = batches_of(rows, knobs.batch, knobs.order_seed)
    else:
        places = torch.arange(knobs.batch)

        def clean(step: int) -> Rows:
            pick = (step * knobs.batch + places) % len(rows.ids)
            return Rows(rows.ids[pick], rows.mask[pick])

    def batches(step: int) -> Rows:
        batch = clean(step)
        if knobs.corrupt and step == knobs.steps // 2:
            noise = torch.randint(3, len(VOCAB), batch.ids.shape, generator=make_generator(knobs.order_seed, "corrupt"))
            return Rows(noise, torch.ones_like(batch.mask))
        return batch

    return batches


def bits(ok: torch.Tensor) -> str:
    """Right or wrong, item by item, as text of 1 and 0."""
    return "".join("1" if x else "0" for x in ok.tolist())


def share(text: str) -> float:
    """Share of ones. Raises ValueError when there is none to count."""
    if not text:
        raise ValueError("no scored item; score at least one")
    return text.count("1") / len(text)


def run(lab: Lab, knobs: Knobs, seed: int) -> Artifact:
    """One run of the sensitivity study: `seed` draws the first weights."""
    exam = comparison_rows(HELD_OUT)

    def measure_model(model: GPT) -> dict:
        return {"right": bits(right(model, exam)), "loss": row_losses(model, exam).mean().item()}

    return small_stage(lab.arm(seed=seed), "recipe", {"knobs": knobs}, lambda: feed(knobs), measure_model,
                       gpt=shape(lab), fit=knobs.fit(), code=(sys.modules[__name__],))


def sensitivity(lab: Lab) -> tuple[Row, list[Artifact]]:
    """Every run of one seed: knobs, sweep, grid, both ways of choosing from the sweep."""
    made: list[Artifact] = []
    scale = 20 if lab.profile.name == "smoke" else 1

    def score(seed: int = lab.seed, proxy: int = 1, **changes: object) -> float:
        knobs = replace(CENTRE, **{"order_seed": seed} | changes)
        made.append(run(lab, replace(knobs, steps=max(4, knobs.steps // (scale * proxy))), seed))
        return share(made[-1].card["measured"]["right"])

    s, row = lab.seed, {"centre": score()}
    for knob, settings in KNOBS.items():
        for i, setting in enumerate(settings):
            row[f"{knob} {i}"] = score(**setting)
    for i in range(3):
        row[f"first weights, seed {i}"] = score(s + 1000 * i, order_seed=s)
    for i in range(GRID_ORDERS):
        row[f"data order, seed {i}"] = score(order_seed=i)
    for i, factor in enumerate(LR_FACTORS):
        row[f"lr {i}"] = score(lr=factor * CENTRE.lr)
    for name, clip in (("clip", CENTRE.clip), ("no clip", OFF)):
        row[f"corrupt, {name}"] = score(corrupt=True, clip=clip)
    spreads = {knob: _spread(row, knob) for knob in (*KNOBS, "first weights, seed", "data order, seed")}
    row |= {f"spread: {knob}": value for knob, value in spreads.items()}
    row["largest other spread"] = max(v for k, v in spreads.items() if k != "peak learning rate")
    return row | choosing(lambda **changes: score(**changes), s), made


def _spread(row: Row, knob: str) -> float:
    values = [row[f"{knob} {i}"] for i in range(3)]
    return max(values) - min(values)


def choosing(score: Callable[..., float], s: int) -> Row:
    """Two ways to choose one of the sweep's recipes at the price of its 12 full runs, each then run on fresh seeds.

    Greedy: every recipe once, the best score wins and is reported. Protocol: every recipe at a quarter of the steps
    (3 runs' worth), the best 4 in full on two seeds (8), the better mean once more on a new seed (1), which is
    reported."""
    full = [score(**r) for r in SWEEP]
    quick = [score(proxy=4, **r) for r in SWEEP]
    alive = sorted(range(len(SWEEP)), key=lambda i: -quick[i])[:4]
    twice = {i: (full[i] + score(seed=20_000 + s, **SWEEP[i])) / 2 for i in alive}
    greedy, protocol = max(range(len(SWEEP)), key=lambda i: full[i]), max(twice, key=lambda i: twice[i])
    fresh = {i: mean(score(seed=30_000 + 100 * s + k, **SWEEP[i]) for k in range(FRESH)) for i in {greedy, protocol}}
    return {"greedy.reported": full[greedy], "greedy.fresh": fresh[greedy], "protocol.fresh": fresh[protocol],
            "protocol.reported": score(seed=40_000 + s, **SWEEP[protocol]), "greedy.choice": float(greedy),
            "protocol.choice": float(protocol)}


def variance_shares(grid: np.ndarray) -> dict[str, float]:
    """Shares of variance of a table (A rows, B columns) with one value a cell: rows, columns, and what is left
    (interaction and noise together). Two-way random effects by mean squares; a negative estimate counts as 0.

    Raises ValueError for fewer than 2 rows or columns, or a table that does not vary."""
    a, b = grid.shape
    if a < 2 or b < 2:
        raise ValueError(f"a table of {a} x {b}: two-way effects need at least 2 rows and 2 columns")
    rows, columns, centre = grid.mean(1), grid.mean(0), grid.mean()
    left = grid - rows[:, None] - columns + centre
    rest = (left**2).sum() / ((a - 1) * (b - 1))
    parts = {"rows": max(0.0, rows.var(ddof=1) - rest / b), "columns": max(0.0, columns.var(ddof=1) - rest / a),
             "left": float(rest)}
    total = sum(parts.values())
    if total == 0:
        raise ValueError("every cell of the table is the same; there is no variance to share out")
    return {k: float(v / total) for k, v in parts.items()}


def shares_with_interval(grid: np.ndarray, n_boot: int = 2000) -> dict[str, list[float]]:
    """`variance_shares` as [estimate, low, high]: percentile bootstrap over rows and columns (95 %). Draws in which
    nothing varies are left out. With few rows such an interval is rough."""
    random, draws = np.random.default_rng(0), []
    for _ in range(n_boot):
        pick = random.integers(0, grid.shape[0], grid.shape[0]), random.integers(0, grid.shape[1], grid.shape[1])
        part = grid[np.ix_(*pick)]
        if np.ptp(part):
            draws.append(variance_shares(part))
    found = variance_shares(grid)
    return {k: [v, *np.percentile([d[k] for d in draws], [2.5, 97.5]).tolist()] for k, v in found.items()}


def sensitivity_extra(rows: Sequence[Row]) -> dict:
    grid = np.array([[r[f"data order, seed {i}"] for i in range(GRID_ORDERS)] for r in rows])
    shares = shares_with_interval(grid)
    names = {"rows": "first weights", "columns": "data order", "left": "interaction and noise"}
    return {"variance_shares": {names[k]: v for k, v in shares.items()}, "standard_deviation": float(grid.std(ddof=1)),
            "lr_factors": list(LR_FACTORS), "grid": grid.tolist()}


DESIGN = Design(
    measure=sensitivity, notebook="06", smallest=0.05, n_items=len(HELD_OUT), items="held-out (days, window) pairs",
    rows=("S3-6.03", "S3-6.06", "S3-6.07", "S3-6.11", "S3-6.17", "S3-6.18", "S3-6.21", "S3-6.25"),
    claim="over three settings each, the peak learning rate moves accuracy at least 5 points more than any other knob",
    falsifier="some other knob's spread comes within 5 points of the learning rate's",
    extra=sensitivity_extra,
    effects=(("spread of learning rate - largest other", "spread: peak learning rate", "largest other spread", "share"),
             *((f"spread: {k}", f"spread: {k}", None, "share")
               for k in (*KNOBS, "first weights, seed", "data order, seed")),
             *((f"learning rate x {f:g} - centre", f"lr {i}", "centre", "share")
               for i, f in enumerate(LR_FACTORS) if f != 1),
             *((f"{k}: setting {i + 1} - centre", f"{k} {i}", "centre", "share")
               for k, settings in KNOBS.items() for i, change in enumerate(settings) if change),
             ("corrupt batch, clip - no clip", "corrupt, clip", "corrupt, no clip", "share"),
             ("corrupt batch without clip - centre", "corrupt, no clip", "centre", "share"),
             ("winner's curse, greedy: reported - fresh", "greedy.reported", "greedy.fresh", "share"),
             ("winner's curse, protocol: reported - fresh", "protocol.reported", "protocol.fresh", "share"),
             ("fresh seeds, protocol - greedy", "protocol.fresh", "greedy.fresh", "share"),
             ("fresh seeds, greedy", "greedy.fresh", None, "share"), ("centre", "centre", None, "share")))
