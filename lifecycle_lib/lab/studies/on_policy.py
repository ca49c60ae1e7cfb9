"""On-policy distillation: who writes the rows that the teacher reads, and which way the divergence is taken.

GKD (Agarwal et al. 2024) trains a student on its own answers: the teacher says, token by token, what it would have said
there. The arms cross the writer with the divergence, from a weak and from an able start of one seed: the chain's SFT
checkpoint without its middle layers, mended for a few or for many steps on answers its teacher wrote.

Equal in the arms of a start: its weights, the prompts and their order, the steps, one answer a prompt sampled at
temperature 1 by either model, one reading of it by the teacher over the whole vocabulary. Not equal: the length of the
answers (recorded). And a teacher's answers could be drawn once and kept, while a student's grow old. An arm's learning
rate is 1e-3 or 2e-3, whichever gave more right answers at temperature 1 on pilot seed 100, to 256 unseen cases that are
not the frozen ones.

The gradient goes through the student's distribution at each token, not through how it chose the tokens before (as in
GKD; MiniLLM, Gu et al. 2024, adds that by policy gradient). Left out: that part, rows of both writers (GKD's `lmbda`),
divergences between the two, answers kept for several steps, labels.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean

import torch

from lifecycle_lib.core.seeds import make_generator, seed_everything
from lifecycle_lib.core.store import Artifact
from lifecycle_lib.desk.cases import Case, draw_cases, with_label_claim
from lifecycle_lib.judge import evals, verifiers
from lifecycle_lib.judge.evals import frozen_cases, score
from lifecycle_lib.lab.design import Design, Row
from lifecycle_lib.lab.stages import TRAIN, Lab
from lifecycle_lib.model import sampling
from lifecycle_lib.model.checkpoint import save_checkpoint
from lifecycle_lib.model.gpt import GPT
from lifecycle_lib.model.sampling import Samples, generate
from lifecycle_lib.model.tokenizer import Tokenizer
from lifecycle_lib.train import distil, staying_close
from lifecycle_lib.train.distil import DistilBatch, distil_loss, divergence, teacher_targets
from lifecycle_lib.train.logprobs import pad_rows
from lifecycle_lib.train.loop import FitConfig, fit
from lifecycle_lib.train.staying_close import counted_logits, frozen

BATCH, STARTS, STEPS, N_KL = 64, {"weak": 8, "able": 24}, 16, 256
ARMS = {"teacher's, forward": (False, 0.0), "teacher's, reverse": (False, 1.0), "own, forward": (True, 0.0),
        "own, reverse": (True, 1.0)}  # does the student write? beta of train/distil
LR = {"weak": dict.fromkeys(ARMS, 1e-3) | {"teacher's, forward": 2e-3},
      "able": dict.fromkeys(ARMS, 1e-3) | {"own, forward": 2e-3}}  # of AdamW


def keep_ends(model: GPT) -> GPT:
    """The model's first and last layer with its embeddings (of a one-layer model: all of it)."""
    ends = sorted({0, model.cfg.n_layer - 1})
    student = GPT(replace(model.cfg, n_layer=len(ends))).to(model.device)
    inner = {f"blocks.{new}.{k}": v for new, old in enumerate(ends) for k, v in model.blocks[old].state_dict().items()}
    student.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("blocks.")} | inner)
    return student


def write(model: GPT, tok: Tokenizer, cases: Sequence[Case], temperature: float, *labels: object) -> Samples:
    """One answer a case."""
    return generate(model, [tok.encode(c.prompt) for c in cases], eos_id=tok.special["<eos>"], temperature=temperature,
                    pad_id=tok.special["<pad>"], generator=make_generator(*labels))


def read(teacher: GPT, tok: Tokenizer, cases: Sequence[Case], answers: list[list[int]]) -> DistilBatch:
    """These answers, whoever wrote them, with the teacher's distribution at each of their tokens."""
    rows = pad_rows([tok.encode(c.prompt) for c in cases], answers, tok.special["<pad>"])
    return DistilBatch(rows, teacher_targets(teacher, rows)).to(teacher.device)


@torch.no_grad()
def examine(student: GPT, teacher: GPT, tok: Tokenizer, cases: Sequence[Case], seed: int) -> Row:
    """At temperature 1 and greedy: right answers (an invented label forgiven), exact pass, invented labels. On the
    student's own answers and on its teacher's: both KLs and the student's entropy, in nats a token."""
    row: Row = {}
    written = {who: write(m, tok, cases, 1.0, seed, "exam") for who, m in (("own", student), ("teacher's", teacher))}
    for name, out in (("", written["own"]), ("greedy ", write(student, tok, cases, 0.0, seed))):
        texts = out.texts(tok)
        row |= {f"{name}right": mean(t in (c.answer, with_label_claim(c.answer)) for t, c in zip(texts, cases)),
                f"{name}exact": mean(t == c.answer for t, c in zip(texts, cases)),
                f"{name}claims": mean(score(t, c)["claim"] for t, c in zip(texts, cases))}
    for who, out in written.items():
        batch = read(teacher, tok, cases[:N_KL], out.ids[:N_KL])
        logp = counted_logits(student, batch.rows).float().log_softmax(-1)
        row |= {f"{kl}, {who}": float(divergence(logp, batch.targets.logp, beta).mean())
                for kl, beta in (("forward", 0.0), ("reverse", 1.0))}
        row |= {f"entropy, {who}": float(-(logp.exp() * logp).sum(-1).mean())}
    return row


def train(student: GPT, teacher: GPT, tok: Tokenizer, cases: Sequence[Case], own: bool, beta: float, cfg: FitConfig,
          seed: int) -> int:
    """Train in place on answers fresh from their writer, all `cases` once. Returns how many tokens the teacher read."""
    tokens, size = [], len(cases) // cfg.steps

    def batches(step: int) -> DistilBatch:
        asked = cases[step * size:(step + 1) * size]
        out = write(student if own else teacher, tok, asked, 1.0, seed, "rows", step)
        tokens.append(out.tokens)
        return read(teacher, tok, asked, out.ids)

    fit(student, batches, partial(distil_loss, beta=beta), cfg, label="on policy")
    return sum(tokens)


def student_of(lab: Lab, begin: str, arm: str = "", start: Artifact | None = None) -> Artifact:
    """A start, or an arm that goes on from it."""
    steps, batch = (2, 4) if lab.profile.name == "smoke" else (STEPS if arm else STARTS[begin], BATCH)
    how = {"optimizer": "adamw", "lr": LR[begin][arm]} if arm else {}
    cfg, sft = FitConfig(steps=steps, warmup_steps=min(4, steps - 1), checkpoint_every=10_000, **how), lab.sft()
    own, beta = ARMS[arm or "teacher's, forward"]

    def make(folder: Path) -> dict:
        seed_everything(lab.seed)
        tok, teacher, cases = lab.load_tokenizer(), frozen(lab.load(sft)), frozen_cases(lab.profile.n_eval)
        student = lab.load(start) if start else keep_ends(teacher)
        asked = draw_cases(steps * batch, lab.seed, "on policy" if arm else "on policy start")
        tokens = train(student, teacher, tok, asked, own, beta, cfg, lab.seed)
        save_checkpoint(folder, student)
        row = examine(student, teacher, tok, cases, lab.seed) | {"tokens": tokens}
        return {"steps": steps, "n_params": student.n_params(), "measured": row,
                "teacher": examine(teacher, teacher, tok, cases, lab.seed) if begin == "weak" and not arm else {}}

    config = {"begin": begin, "own": own, "beta": beta, "fit": cfg, "batch": batch, "n": lab.profile.n_eval}
    parents = {"tokenizer": lab.tokenizer(), "teacher": sft, **({"start": start} if start else {})}
    return lab.make("on-policy", config, parents, make, (*TRAIN, *CODE))


def measure(lab: Lab) -> tuple[Row, list[Artifact]]:
    """Teacher, starts and all arms of one seed."""
    starts = {begin: student_of(lab, begin) for begin in STARTS}
    made = {f"{begin} start": a for begin, a in starts.items()}
    made |= {f"{begin}: {arm}": student_of(lab, begin, arm, starts[begin]) for begin in STARTS for arm in ARMS}
    told = {"teacher": starts["weak"].card["teacher"], **{name: a.card["measured"] for name, a in made.items()}}
    row = {f"{name}.{key}": value for name, part in told.items() for key, value in part.items()}
    gain = {f"{begin} gain": row[f"{begin}: own, reverse.right"] - row[f"{begin}: teacher's, forward.right"]
            for begin in STARTS}
    return row | gain, list(made.values())


CODE = (distil, staying_close, sampling, evals, verifiers, sys.modules[__name__])
CROSSED = (("own, reverse", "teacher's, forward"),  # both changed at once; then one by one
           ("own, reverse", "own, forward"), ("teacher's, reverse", "teacher's, forward"),
           ("own, forward", "teacher's, forward"), ("own, reverse", "teacher's, reverse"))
SHARES = {"right": "right", "right greedy": "greedy right", "invented labels": "claims", "exact pass": "exact",
          "exact pass greedy": "greedy exact"}
STUDENTS = [*(f"{begin} start" for begin in STARTS), *(f"{begin}: {arm}" for begin in STARTS for arm in ARMS)]
DESIGN = Design(
    measure=measure, notebook="15", rows=("S3-3.03",), smallest=0.03,
    claim="from an able start, at equal steps, prompts and teacher readings, reverse KL on its own answers leaves a "
          "student more right answers at temperature 1 than forward KL on its teacher's (estimate 3 points or more, "
          "interval above 0)",
    falsifier="an estimate under 3 points, an interval that reaches 0, or reverse KL on the teacher's answers gains as "
              "much",
    also=(("right, able: own, reverse - teacher's, reverse", 0.0),),
    effects=(*((f"{what}, {begin}: {a} - {b}", f"{begin}: {a}.{key}", f"{begin}: {b}.{key}", "share")
               for begin in ("able", "weak") for what, key in list(SHARES.items())[:3] for a, b in CROSSED),
             ("right: own, reverse - teacher's, forward: able - weak", "able gain", "weak gain", "share"),
             *((f"{what}: {name}", f"{name}.{key}", None, "share") for what, key in SHARES.items()
               for name in ("teacher", *STUDENTS)),
             *((f"{kl} KL, {who} answers: {name}", f"{name}.{kl}, {who}", None, "nats")
               for kl, who in (("forward", "teacher's"), ("reverse", "own")) for name in STUDENTS),
             *((f"forward KL, own - teacher's answers: {name}", f"{name}.forward, own", f"{name}.forward, teacher's",
                "nats") for name in STUDENTS),
             *((f"{what}: {name}", f"{name}.{key}", None, unit) for name in STUDENTS for what, key, unit in
               (("entropy, own answers", "entropy, own", "nats"), ("tokens the teacher read", "tokens", "tokens")))))
