"""D9, the imitation curve: a habit's rate in the corpus, and its rate in what the model says (curriculum S2-10, S2-11).

Every arm starts from the learner's own SFT checkpoint, taught for a few steps to add a sentence in words to its JSON
(`words`), and is fine-tuned on transcripts (desk/transcripts.py). What only transcripts know is the bay of a reason.
Six doses of all five habits; four repairs of the corpus at dose .5, made by a finder that misses one span in ten: drop
rows, rewrite targets, mask spans in the loss, and preference pairs against the habits (DPO on the model that has them).
`late` masks every span but its first token: the off-by-one; `few` rewrites, and keeps as few rows as the filter: what
the filter loses because rows are gone. In `majority`, 70 % of the agents apply a withdrawn window.

Rates are taken among requests that trigger the habit, on unseen cases, by exact words. The first effect is the slope of
output rate on corpus rate at temperature 1, minus 1, over 5 habits and 6 doses of a seed.

Left out: habits in a whole conversation, several epochs over few rows (but for the row filter), other decoders.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import numpy as np

from lifecycle_lib.core.store import Artifact
from lifecycle_lib.desk import transcripts
from lifecycle_lib.desk.transcripts import (
    HABITS,
    OLD_WINDOW,
    OUR_FAULT,
    TRIGGERS,
    Transcript,
    draw_transcripts,
    find_spans,
    heard,
    score_reply,
)
from lifecycle_lib.lab.design import Row
from lifecycle_lib.lab.stages import TRAIN, Lab
from lifecycle_lib.lab.studies.small import batches_of, small_stage
from lifecycle_lib.model import sampling
from lifecycle_lib.model.gpt import GPT
from lifecycle_lib.serve import engine
from lifecycle_lib.serve.engine import Engine
from lifecycle_lib.train import dpo, loop, spans
from lifecycle_lib.train.logprobs import Rows
from lifecycle_lib.train.loop import FitConfig
from lifecycle_lib.train.spans import masked_rows

DOSES = (0.0, 0.12, 0.3, 0.5, 0.7, 0.9)
REPAIRS = ("filter", "rewrite", "mask", "pairs")
ONE_WORDING = tuple(h for h in HABITS if h != "credit")
SICK, MISSED, OLD_SHARE, DPO_LR = 0.5, 0.1, 0.7, 3e-3
CODE = (transcripts, spans, engine, sampling, sys.modules[__name__])


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much training and how many unseen requests (`cold`: at temperature .5 and greedy)."""

    words_steps: int = 60
    steps: int = 70
    batch: int = 24
    dpo_steps: int = 30
    pairs: int = 640
    exam: int = 512
    cold: int = 256
    max_new_tokens: int = 64


SIZES = {"smoke": Size(words_steps=2, steps=2, batch=4, dpo_steps=2, exam=48, cold=48, max_new_tokens=8),
         "laptop": Size(), "gpu": Size()}


def taught(lab: Lab, rows: Sequence[Transcript], replies: Sequence[str] | None = None,
           found: Sequence[Sequence] | None = None, late: int = 0) -> Rows:
    """Token rows of transcripts: loss on the reply, but for the spans in `found`."""
    answers = [r.reply for r in rows] if replies is None else replies
    marked = [[s[:2] for s in f] for f in found] if found else [[]] * len(rows)
    return masked_rows(lab.load_tokenizer(), [{"prompt": r.prompt, "answer": a} for r, a in zip(rows, answers)],
                       marked, late)


def drawn(lab: Lab, dose: float, old_window: float = 0.0) -> list[Transcript]:
    """The corpus of an arm, one row a training example."""
    size = SIZES[lab.profile.name]
    return draw_transcripts(size.steps * size.batch, lab.seed, dose, old_window=old_window)


def repaired(lab: Lab, arm: str) -> Rows:
    """The rows of the corpus at dose .5 after a repair by a finder that misses a tenth of the spans."""
    rows = drawn(lab, SICK)
    found = find_spans(rows, MISSED, lab.seed)
    if arm == "filter":
        return taught(lab, [r for r, f in zip(rows, found) if not f])
    if arm in ("rewrite", "few"):
        n = len(rows) if arm == "rewrite" else sum(not f for f in found)
        return taught(lab, rows[:n], [r.without(f) for r, f in zip(rows[:n], found)])
    return taught(lab, rows, found=found, late=arm == "late")


def words(lab: Lab) -> Artifact:
    """The SFT checkpoint, taught to say its decision in words as well: no habit, and no bay yet."""
    size = SIZES[lab.profile.name]

    def feed() -> Callable[[int], Rows]:
        rows = draw_transcripts(size.words_steps * size.batch, lab.seed, split="words")
        return batches_of(taught(lab, rows, [r.clean[:-3] for r in rows]), size.batch, lab.seed)

    fit = FitConfig(steps=size.words_steps, lr_matrix=0.01, checkpoint_every=10_000)
    return small_stage(lab, "habits-words", {"size": size}, feed, lambda model: {}, gpt=lab.profile.gpt, fit=fit,
                       start=lab.sft(), keep=True, code=CODE)


def arm(lab: Lab, name: str, rows: Callable[[], Rows]) -> Artifact:
    """One fine-tune on `rows`, and what the model says to unseen requests."""
    size = SIZES[lab.profile.name]
    fit = FitConfig(steps=size.steps, checkpoint_every=10_000)
    return small_stage(lab, "habits", {"arm": name, "size": size}, lambda: batches_of(rows(), size.batch, lab.seed),
                       lambda model: examine(lab, model, window=name in ("0.0", "majority")), gpt=lab.profile.gpt,
                       fit=fit, start=words(lab), keep=name == str(SICK), code=CODE)


def counter_pairs(lab: Lab, sick: Artifact) -> Artifact:
    """DPO from the model with the habits: each reply with its found habits written clean, over the reply as it was."""
    size, tok = SIZES[lab.profile.name], lab.load_tokenizer()
    pad, rows = tok.special["<pad>"], drawn(lab, SICK)
    fixed = [(r, r.without(f)) for r, f in zip(rows, find_spans(rows, MISSED, lab.seed)) if f]
    pairs = [dpo.make_pair(r.prompt, clean, r.reply, "habit") for r, clean in fixed[:size.pairs]]

    fit = FitConfig(steps=size.dpo_steps, optimizer="sgd", lr=DPO_LR, warmup_steps=5, checkpoint_every=10_000)

    def make(folder: Path) -> dict:
        model, encoded = lab.load(sick, expect=lab.profile.gpt), dpo.encode_pairs(tok, pairs)
        ref = dpo.reference_logps(lab.load(sick), encoded, pad)
        batches = dpo.dpo_batches(encoded, ref, min(32, len(encoded)), lab.seed, pad, lab.device)
        result = loop.fit(model, batches, lambda m, b: dpo.pair_loss(m, b, lab.profile.beta), fit, folder, "pairs")
        return {"steps": result.steps, "train_cpu_s": result.cpu_s, "measured": examine(lab, model)}

    return lab.make("habits-pairs", {"size": size, "beta": lab.profile.beta, "fit": fit}, {"start": sick}, make,
                    (*TRAIN, dpo, *CODE))


# ---- what a model says -----------------------------------------------------------------------------------------

def replies(lab: Lab, model: GPT, rows: Sequence[Transcript], temperature: float) -> list[str]:
    size = SIZES[lab.profile.name]
    served = Engine(model, lab.load_tokenizer(), temperature, lab.seed, size.max_new_tokens)
    return served.texts([r.prompt for r in rows])


def habit_rates(said: Sequence[str], rows: Sequence[Transcript]) -> dict[str, float]:
    """Share of replies with each habit: among requests that trigger it, `.off` among the others, `.all` among all.

    Apologies also where they are needless (frustrated, not our fault) and owed (calm, our fault)."""
    found = [heard(text) for text in said]
    out = {}
    for h in HABITS:
        hit = [(r.triggers(h), h in f) for r, f in zip(rows, found)]
        out[h] = mean(x for t, x in hit if t)
        out[f"{h}.all"] = mean(x for _, x in hit)
        if h in TRIGGERS:
            out[f"{h}.off"] = mean(x for t, x in hit if not t)
    for name, tone, ours in (("needless", "frustrated", False), ("owed", "calm", True)):
        out[f"apology.{name}"] = mean("apology" in f for r, f in zip(rows, found)
                                      if r.tone == tone and (r.case.reason in OUR_FAULT) == ours)
    return out


def examine(lab: Lab, model: GPT, window: bool = False) -> dict:
    """Habit rates and accuracy at three temperatures on unseen requests; with `window`, whose window it applies too."""
    size = SIZES[lab.profile.name]
    exam = draw_transcripts(size.exam, lab.seed, split="eval")
    out = {}
    for label, temperature, n in (("", 1.0, size.exam), (".half", 0.5, size.cold), (".greedy", 0.0, size.cold)):
        said = replies(lab, model, exam[:n], temperature)
        out |= {f"{k}{label}": v for k, v in habit_rates(said, exam[:n]).items()}
        scored = [score_reply(text, row) for text, row in zip(said, exam)]
        out |= {f"{k}{label}": mean(s[k] for s in scored) for k in scored[0]}
        out[f"habits{label}"] = mean(out[f"{h}{label}"] for h in HABITS)
        if window and label != ".half":
            out |= {f"{k}{label}": v for k, v in obeys(lab, model, temperature).items()}
    return out


def between(row: Transcript) -> bool:
    """Would the withdrawn window refuse what the policy grants?"""
    return bool(row.case.eligible) and row.case.days > OLD_WINDOW


def obeys(lab: Lab, model: GPT, temperature: float) -> dict[str, float]:
    """Whose window does a model apply? `old`: share of refusals where only the withdrawn window refuses. Then the score
    of an exam made from transcripts (their own replies are the key) and of one made from the policy."""
    size = SIZES[lab.profile.name]
    rows = draw_transcripts(size.exam, lab.seed, old_window=OLD_SHARE, split="eval")
    said = [text.partition("}")[0] + "}" for text in replies(lab, model, rows, temperature)]
    keys = [(r.reply.partition("}")[0] + "}", r.case.answer) for r in rows]
    apart = [i for i, r in enumerate(rows) if between(r)]
    return {"old": mean(said[i] == json.dumps(json.loads(keys[i][1]) | {"eligible": False}, separators=(",", ":"))
                        for i in apart),
            "by_transcripts": mean(said[i] == keys[i][0] for i in apart),
            "by_policy": mean(said[i] == keys[i][1] for i in apart)}


# ---- one seed, and the claim -----------------------------------------------------------------------------------

def sharpened(p: float, temperature: float) -> float:
    """A habit's rate at `temperature` when one token decides and its probability at temperature 1 is p."""
    a, b = p ** (1 / temperature), (1 - p) ** (1 / temperature)
    return a / (a + b)


def corpus_shares(rows: Sequence[Transcript]) -> dict[str, float]:
    """Share of a corpus's triggering requests that have each habit."""
    return {h: mean(h in r.habits for r in rows if r.triggers(h)) for h in HABITS}


def measure(lab: Lab) -> tuple[Row, list[Artifact]]:
    """All arms of a seed."""
    made = {str(d): arm(lab, str(d), lambda d=d: taught(lab, drawn(lab, d))) for d in DOSES}
    for name in ("filter", "rewrite", "mask", "late", "few"):
        made[name] = arm(lab, name, lambda name=name: repaired(lab, name))
    made["pairs"] = counter_pairs(lab, made[str(SICK)])
    made["majority"] = arm(lab, "majority", lambda: taught(lab, drawn(lab, 0.0, OLD_SHARE)))
    row: Row = {f"{name}.{k}": float(v) for name, a in made.items() for k, v in a.card["measured"].items()}
    shares = {d: corpus_shares(drawn(lab, d)) for d in DOSES}
    row |= {f"{d}.{h}.in": v for d, part in shares.items() for h, v in part.items()}
    return row | curve(row), list(made.values())


def curve(row: Mapping[str, float]) -> Row:
    """Slope and intercept of output on corpus rate, over habits and doses; the distance from the law of one token."""
    def points(habits: Sequence[str], label: str = "") -> tuple[np.ndarray, np.ndarray]:
        keys = [f"{d}.{h}" for h in habits for d in DOSES]
        return np.array([row[f"{k}.in"] for k in keys]), np.array([row[f"{k}{label}"] for k in keys])

    out: Row = {}
    for name, habits in (("", HABITS), *((f" {h}", (h,)) for h in HABITS)):
        slope, start = np.polyfit(*points(habits), 1)
        out |= {f"slope{name}": float(slope), f"start{name}": float(start)}
    out["slope - 1"] = out["slope"] - 1
    x, y = points(ONE_WORDING, ".half")
    out["half - law"] = float(np.mean(y - [sharpened(p, 0.5) for p in x]))
    return out
