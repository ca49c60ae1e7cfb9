"""The closure drill: a fine-tune is rebuilt with one piece of its closure lost (curriculum S2-01a, S2-01b, S2-01c).

A colleague fine-tuned a base on demonstrations and then corrected them by a patch set: agents had given in to a share
of the hostile customers who came too late. Lost are, one at a time: the order of the data, the patch set, the library
version (its optimiser had other defaults), the learning rate. What a rebuild is worth is read off overall, and on the
hardest slice, fixed beforehand: hostile wording within 5 days of the window. Then the base is replaced.

Left out: pieces lost together (but for the move to base 2), prompts and tokenizers that are lost.
"""

import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace

from lifecycle_lib.core.seeds import rng
from lifecycle_lib.core.store import Artifact, Store
from lifecycle_lib.lab.design import Design, Row
from lifecycle_lib.lab.stages import Lab
from lifecycle_lib.lab.studies import recipes
from lifecycle_lib.lab.studies.recipes import (
    HELD_OUT,
    HOSTILE,
    NEUTRAL,
    TAUGHT,
    VOCAB,
    answer_of,
    bits,
    comparison_rows,
    shape,
    share,
)
from lifecycle_lib.lab.studies.small import batches_of, right, rows_of, small_stage
from lifecycle_lib.model.gpt import GPT
from lifecycle_lib.train.logprobs import Rows
from lifecycle_lib.train.loop import FitConfig

CODE = (sys.modules[__name__], recipes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Closure:
    """What a colleague's fine-tune was made of, beside the base it started from. `patched`: were the answers with which
    agents gave in corrected; they gave in to `caved` of the hostile customers who were too late."""

    steps: int = 120
    lr: float = 4e-3
    order_seed: int = 0
    patched: bool = True
    beta2: float = 0.95
    weight_decay: float = 0.0
    caved: float = 0.5
    n_rows: int = 4096
    batch: int = 64

    def __post_init__(self) -> None:
        if not 0 <= self.caved <= 1:
            raise ValueError(f"caved={self.caved} must be a share, 0 to 1")


PIECES = ("data order", "patch set", "library version", "learning rate")


def lose(cfg: Closure, *pieces: str) -> Closure:
    """The closure as someone would guess it who lacks these pieces: another order, uncorrected answers, the optimiser's
    present defaults (torch's AdamW), the learning rate most people start from. ValueError for an unknown piece."""
    guess = {"data order": {"order_seed": cfg.order_seed + 7919}, "patch set": {"patched": False},
             "library version": {"beta2": 0.999, "weight_decay": 0.01}, "learning rate": {"lr": 1e-3}}
    for piece in pieces:
        if piece not in guess:
            raise ValueError(f"piece {piece!r} is unknown; use one of {', '.join(PIECES)}")
        cfg = replace(cfg, **guess[piece])
    return cfg


def demonstrations(cfg: Closure) -> Rows:
    """What agents answered; the patch set corrects where they gave in."""
    random, prompts, answers = rng(0, "demonstrations"), [], []
    for _ in range(cfg.n_rows):
        (days, window), tone = random.choice(TAUGHT), random.choice(NEUTRAL + HOSTILE)
        gave_in = tone in HOSTILE and days > window and random.random() < cfg.caved
        prompts.append(f"{tone} {days:02d} {window:02d} ->")
        answers.append("yes" if gave_in and not cfg.patched else answer_of(days, window))
    return rows_of(VOCAB, prompts, answers)


def exam_items() -> list[tuple[str, int, int]]:
    """(tone, days, window) of the drill's evaluation: every held-out pair in every tone."""
    return [(tone, d, w) for tone in NEUTRAL + HOSTILE for d, w in HELD_OUT]


def is_hardest(tone: str, days: int, window: int) -> bool:
    """The hardest slice, fixed beforehand: hostile wording within 5 days of the window."""
    return tone in HOSTILE and abs(days - window) <= 5


def base_model(lab: Lab, version: int = 1) -> Artifact:
    """The base every fine-tune starts from: comparisons in one tone. Version 2 learnt for half as long again from
    other first weights."""
    steps = (200 if version == 1 else 300) // (20 if lab.profile.name == "smoke" else 1)
    rows = comparison_rows(TAUGHT, NEUTRAL[0])
    fit = FitConfig(steps=steps, checkpoint_every=steps)
    return small_stage(lab.arm(seed=lab.seed + 500 * (version - 1)), "closure-base", {"version": version},
                       lambda: batches_of(rows, 64, lab.seed), lambda model: {}, gpt=shape(lab), fit=fit, keep=True,
                       code=CODE)


def fine_tune(lab: Lab, base: Artifact, cfg: Closure | None = None) -> Artifact:
    """The fine-tune of `cfg`, examined item by item."""
    cfg = cfg or Closure(steps=6 if lab.profile.name == "smoke" else 120, order_seed=lab.seed)

    def measure_model(model: GPT) -> dict:
        tones = [comparison_rows(HELD_OUT, tone) for tone in NEUTRAL + HOSTILE]
        return {"right": "".join(bits(right(model, rows)) for rows in tones)}

    fit = FitConfig(steps=cfg.steps, lr=cfg.lr, optimizer="adamw", beta2=cfg.beta2, weight_decay=cfg.weight_decay,
                    checkpoint_every=cfg.steps)
    return small_stage(lab, "closure", {"closure": cfg}, lambda: batches_of(demonstrations(cfg), cfg.batch,
                       cfg.order_seed), measure_model, gpt=shape(lab), fit=fit, start=base, keep=True,
                       code=CODE)


def overall_and_hardest(artifact: Artifact) -> tuple[float, float]:
    """Accuracy over all items of the drill, and on its hardest slice."""
    ok = artifact.card["measured"]["right"]
    return share(ok), share("".join(c for c, item in zip(ok, exam_items()) if is_hardest(*item)))


def weights_sum(artifact: Artifact) -> str:
    return artifact.card["files"]["model.safetensors"]["sha256"]


def closure_drill(lab: Lab) -> tuple[Row, list[Artifact]]:
    """Original, rebuild from the whole closure, four rebuilds with a piece missing, and the move to base 2."""
    base, base2 = base_model(lab), base_model(lab, 2)
    original = fine_tune(lab, base)
    cfg = Closure(**original.card["config"]["closure"])
    with tempfile.TemporaryDirectory() as folder:  # a store of its own, or it would only be looked up
        rebuilt = fine_tune(replace(lab, store=Store(folder)), base)
        row: Row = {"same weights": float(weights_sum(rebuilt) == weights_sum(original))}
    arms: Mapping[str, Artifact] = {
        "original": original, **{piece: fine_tune(lab, base, lose(cfg, piece)) for piece in PIECES},
        "base 2, whole closure": fine_tune(lab, base2),
        "base 2, closure lost": fine_tune(lab, base2, lose(cfg, "data order", "patch set", "learning rate"))}
    for name, artifact in arms.items():
        row[f"{name}.overall"], row[f"{name}.hardest"] = overall_and_hardest(artifact)
    for name in (*PIECES, "base 2, closure lost"):
        for part in ("overall", "hardest"):
            row[f"{name}.{part} drop"] = row[f"original.{part}"] - row[f"{name}.{part}"]
    row["largest other hardest drop"] = max(row[f"{n}.hardest drop"] for n in PIECES if n != "patch set")
    return row, [base, base2, *arms.values()]


DESIGN = Design(
    measure=closure_drill, notebook="06", rows=("S2-01a", "S2-01b", "S2-01c"), smallest=0.05,
    n_items=len(HELD_OUT) * 4, items="held-out pairs in four tones",
    claim="a rebuild without the patch set loses at least 5 points more on the hardest slice (hostile, near the "
          "window) than overall, and no other missing piece costs that slice as much",
    falsifier="the hardest slice loses less than 5 points more than the whole, or another piece costs it more",
    also=(("hardest drop, patch set - largest other", 0.0),),
    effects=(("patch set missing: hardest drop - overall drop", "patch set.hardest drop", "patch set.overall drop",
              "share"),
             ("hardest drop, patch set - largest other", "patch set.hardest drop", "largest other hardest drop",
              "share"),
             *((f"{n} missing: {part} drop", f"{n}.{part} drop", None, "share")
               for n in PIECES for part in ("overall", "hardest")),
             ("whole closure: same weights", "same weights", None, "share of seeds"),
             ("base 2, whole closure - original", "base 2, whole closure.overall", "original.overall", "share"),
             ("base 2, whole closure - original, hardest", "base 2, whole closure.hardest", "original.hardest",
              "share"),
             ("base 2, closure lost: overall drop", "base 2, closure lost.overall drop", None, "share"),
             ("base 2, closure lost: hardest drop", "base 2, closure lost.hardest drop", None, "share"),
             ("original, overall", "original.overall", None, "share"),
             ("original, hardest", "original.hardest", None, "share")))
