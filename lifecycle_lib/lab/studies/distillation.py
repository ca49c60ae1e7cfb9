"""Distillation on a small desk whose teacher has faults we planted (curriculum S3-3.02, .03, .07, .08, .11, .12, .23).

A case is `ITEM REASON DAYS WINDOW ->`, the answer `yes` or `no`, now and then with closing words. The rule: yes inside
the window; a recalled item always. Exams use (days, window) pairs that nobody was trained on.

Two teachers a seed, equal but for their files. The fair one learnt the rule. The faulty one learnt from clerks with
three habits: hats past their window are let through in 7 cases of 10 (so a greedy teacher is wrong in 8 % of all
cases); answers to `late` cases say `kindly` in 2 of 3 (30 % over all); every answer says `regards` in 3 of 10. The last
two are as frequent and differ in their spread, which decides what a greedy decoder makes of them.

A student has a seventh of its teacher's parameters and sees only what its signal shows it; all students of a seed start
from the same weights and take as many steps. Left out: other tokenizers, hidden states, on-policy distillation.
"""

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log
from random import Random

import torch
from torch import Tensor

from lifecycle_lib.core.seeds import make_generator
from lifecycle_lib.core.seeds import rng as make_rng
from lifecycle_lib.core.store import Artifact
from lifecycle_lib.lab.design import Design, Row
from lifecycle_lib.lab.stages import Lab
from lifecycle_lib.lab.studies.small import Vocab, rows_of, small_stage
from lifecycle_lib.model import sampling
from lifecycle_lib.model.gpt import GPT, GPTConfig
from lifecycle_lib.model.sampling import Samples, generate
from lifecycle_lib.train import distil, staying_close
from lifecycle_lib.train.distil import Targets, distil_batches, distil_loss, teacher_answers, teacher_targets
from lifecycle_lib.train.loop import FitConfig

ITEMS = {"hat": 0.18, "mug": 0.17, "lamp": 0.17, "radio": 0.16, "vase": 0.16, "book": 0.16}
REASONS = {"late": 0.45, "wrong": 0.45, "recall": 0.1}
VOCAB = Vocab([f"{i:02d}" for i in range(60)] + ["->", "yes", "no", "kindly", "regards", *ITEMS, *REASONS])
VERDICTS = [VOCAB.index["yes"], VOCAB.index["no"]]
HAT_YES, KINDLY, REGARDS = 0.7, 2 / 3, 0.3  # the clerks' habits
SIZES, ROWS, TARGETED, GENERATIONS, HOT = (64, 256, 1024, 4096), 1024, 64, 5, 4.0
TEACHER_ROWS, BATCH = 16384, 64


@dataclass(frozen=True, slots=True)
class Ask:
    """One case of the small desk."""

    item: str
    reason: str
    days: int
    window: int

    @property
    def prompt(self) -> str:
        return f"{self.item} {self.reason} {self.days:02d} {self.window:02d} ->"

    @property
    def right(self) -> str:
        return "yes" if self.reason == "recall" or self.days <= self.window else "no"

    @property
    def is_hat(self) -> bool:
        """Where the clerks let hats through."""
        return self.item == "hat" and self.right == "no"

    @property
    def is_recall(self) -> bool:
        """Where only the recall makes it a yes."""
        return self.reason == "recall" and self.days > self.window


def draw_asks(n: int, seed: int, label: str, unseen: bool = False,
              keep: Callable[[Ask], bool] = lambda ask: True) -> list[Ask]:
    """`n` cases that `keep` takes; one (days, window) pair in seven is for exams (`unseen`)."""
    rng, out = make_rng(seed, "distil asks", label), []
    while len(out) < n:
        ask = Ask(rng.choices(list(ITEMS), list(ITEMS.values()))[0],
                  rng.choices(list(REASONS), list(REASONS.values()))[0], rng.randrange(60), rng.randrange(10, 50))
        if ((3 * ask.window + 5 * ask.days) % 7 == 0) == unseen and keep(ask):
            out.append(ask)
    return out


def clerk(ask: Ask, rng: Random) -> str:
    """An answer from the faulty file."""
    words = ["yes" if ask.is_hat and rng.random() < HAT_YES else ask.right]
    words += ["kindly"] if ask.reason == "late" and rng.random() < KINDLY else []
    words += ["regards"] if rng.random() < REGARDS else []
    return " ".join(words)


def ids_of(asks: Sequence[Ask]) -> list[list[int]]:
    return [[1, *VOCAB.encode(a.prompt)] for a in asks]


def answers_of(model: GPT, asks: Sequence[Ask], temperature: float, seed: int) -> Samples:
    """One answer a case."""
    return generate(model, ids_of(asks), eos_id=2, pad_id=0, max_new_tokens=5, temperature=temperature,
                    generator=make_generator(seed, "distil exam"))


def said(model: GPT, asks: Sequence[Ask], temperature: float, seed: int) -> list[str]:
    return answers_of(model, asks, temperature, seed).texts(VOCAB)


@torch.no_grad()
def first_token(model: GPT, asks: Sequence[Ask]) -> Tensor:
    """Log-probabilities of the answer's first token. (N, V)"""
    return model(torch.tensor(ids_of(asks)))[:, -1].log_softmax(-1)


def calibration_error(confidence: Tensor, right: Tensor, bins: int = 10) -> float:
    """Expected calibration error: |accuracy - confidence| over equal bins of (0, 1], weighted by their counts.

    Raises ValueError for no items."""
    if not len(confidence):
        raise ValueError("calibration of no items is not a number; score at least one")
    bin_of = (confidence * bins).ceil().clamp(1, bins)
    parts = [(bin_of == b) for b in bin_of.unique()]
    return float(sum(p.float().mean() * (right[p].float().mean() - confidence[p].mean()).abs() for p in parts))


def examine(model: GPT, seed: int) -> dict[str, float]:
    """Every number of one model. `hat_*`: only hats past their window; `recall`: only recalls past theirs. `entropy`:
    of sampled answers pooled over prompts, which errors raise; `entropy_given`: of an answer given its prompt, from
    the log-probabilities of the same samples; `held_out`: 200 more cases, to choose by."""
    exam = draw_asks(1000, seed, "exam", True)
    hats, recalls = (draw_asks(300, seed, "slice", True, keep) for keep in (lambda a: a.is_hat, lambda a: a.is_recall))
    share = lambda texts, asks: sum(t.split()[:1] == [a.right] for t, a in zip(texts, asks)) / len(asks)  # noqa: E731
    drawn = answers_of(model, exam, 1.0, seed)
    sampled, greedy = drawn.texts(VOCAB), said(model, exam, 0.0, seed)
    yes = first_token(model, exam)[:, VERDICTS].softmax(-1)[:, 0]
    right = torch.tensor([(p > 0.5) == (a.right == "yes") for p, a in zip(yes.tolist(), exam)])
    row = {"right": share(greedy, exam), "right_sampled": share(sampled, exam),
           "hat_wrong": 1 - share(said(model, hats, 0.0, seed), hats),
           "hat_yes": float(first_token(model, hats)[:, VERDICTS].softmax(-1)[:, 0].mean()),
           "recall": share(said(model, recalls, 0.0, seed), recalls),
           "ece": calibration_error(torch.maximum(yes, 1 - yes), right)}
    for word in ("kindly", "regards"):
        row |= {word + end: sum(word in t for t in texts) / len(exam)
                for end, texts in (("", sampled), ("_greedy", greedy))}
    counts, held_out = Counter(sampled).values(), draw_asks(200, seed, "held out", True)
    return row | {"held_out": share(said(model, held_out, 0.0, seed), held_out),
                  "entropy": -sum(c / len(exam) * log(c / len(exam)) for c in counts),
                  "entropy_given": -sum(map(sum, drawn.logps)) / len(exam)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Signal:
    """What one student is shown. `kind`: "truth"; "logits" at `temperature`, along the right answers or (`own`) along
    answers the teacher sampled; "shuffled", logits of another row with the same answer; "answers", the first of
    `candidates` at `temperature`, or the first that a perfect verifier accepts (`filtered`); with `passes`, it lets a
    wrong answer through with that probability, each by a coin of its own."""

    kind: str
    rows: int = ROWS
    temperature: float = 0.0
    candidates: int = 1
    filtered: bool = False
    passes: float = 0.0
    own: bool = False
    steps: int = 300
    kept: int = 0  # rows of the clerks' file beside the teacher's answers
    prompts: str = "student"  # a label of fresh prompts; "no recalls": the hole; "repaired": TARGETED recalls in it


def prompts_of(signal: Signal, seed: int) -> list[Ask]:
    """The transfer set: prompts without answers."""
    if signal.prompts in ("no recalls", "repaired"):
        n_recalls = TARGETED if signal.prompts == "repaired" else 0
        return (draw_asks(signal.rows - n_recalls, seed, "student", keep=lambda a: a.reason != "recall")
                + draw_asks(n_recalls, seed, "targeted", keep=lambda a: a.reason == "recall"))
    return draw_asks(signal.rows, seed, signal.prompts)


def shuffled_confidence(targets: Targets, asks: Sequence[Ask], seed: int) -> Targets:
    """The same distributions dealt out again among rows with the same right answer: as soft, and about nothing."""
    order = list(range(len(asks)))
    for verdict in ("yes", "no"):
        where = [i for i, a in enumerate(asks) if a.right == verdict]
        for i, j in zip(where, make_rng(seed, "shuffle", verdict).sample(where, len(where))):
            order[i] = j
    return targets.of(torch.tensor(order))


def lesson(teacher: GPT, signal: Signal, seed: int) -> tuple[Callable, dict[str, float]]:
    """(batches, what the signal cost and covered) of one student."""
    asks = prompts_of(signal, seed)
    texts, facts = [a.right for a in asks], {}
    if signal.kind == "answers" or signal.own:
        coin = make_rng(seed, "verifier")

        def verifier(i: int, ids: list[int]) -> bool:
            return VOCAB.words[ids[0]] == asks[i].right or coin.random() < signal.passes

        accept = verifier if signal.filtered else None
        got = teacher_answers(teacher, ids_of(asks), eos_id=2, pad_id=0, max_new_tokens=5, accept=accept,
                              temperature=1.0 if signal.own else signal.temperature, candidates=signal.candidates,
                              generator=make_generator(seed, "distil answers", signal.prompts))
        kept = [i for i, _ in got.kept]
        facts = {"coverage": got.coverage, "tokens_per_target": got.tokens_per_target,
                 "hat_coverage": sum(asks[i].is_hat for i in kept) / max(1, sum(a.is_hat for a in asks))}
        asks, texts = [asks[i] for i in kept], [VOCAB.decode(ids[:-1]) for _, ids in got.kept]
    if signal.kept:
        asks, old = asks + draw_asks(signal.kept, seed, "file"), make_rng(seed, "clerks")
        texts += [clerk(a, old) for a in asks[-signal.kept:]]
    rows = rows_of(VOCAB, [a.prompt for a in asks], texts)
    targets = teacher_targets(teacher, rows, signal.temperature) if signal.kind in ("logits", "shuffled") else None
    if signal.kind == "shuffled":
        targets = shuffled_confidence(targets, asks, seed)
    return distil_batches(rows, targets, BATCH, seed), facts


def shapes(lab: Lab) -> tuple[GPTConfig, GPTConfig]:
    """(teacher, student)"""
    wide, deep = (16, 1) if lab.profile.name == "smoke" else (64, 2)
    common = {"vocab_size": len(VOCAB), "block_size": 16, "n_head": 2}
    return GPTConfig(**common, n_layer=deep, n_embd=wide), GPTConfig(**common, n_layer=1, n_embd=wide // 2)


def steps(lab: Lab, n: int) -> FitConfig:
    return FitConfig(steps=3 if lab.profile.name == "smoke" else n, lr=6e-3, checkpoint_every=10_000)


def make_teacher(lab: Lab, faulty: bool) -> Artifact:
    """A teacher trained on the rule, or on the clerks' file."""
    def batches() -> Callable:
        asks, rng = draw_asks(TEACHER_ROWS, lab.seed, "file"), make_rng(lab.seed, "clerks")
        texts = [clerk(a, rng) if faulty else a.right for a in asks]
        return distil_batches(rows_of(VOCAB, [a.prompt for a in asks], texts), None, BATCH, lab.seed)

    return small_stage(lab, "distil-teacher", {"faulty": faulty}, batches, lambda m: examine(m, lab.seed),
                       gpt=shapes(lab)[0], fit=steps(lab, 400), code=CODE, keep=True, loss_fn=distil_loss)


def make_student(lab: Lab, teacher: Artifact, signal: Signal, keep: bool = False) -> Artifact:
    """One student of `teacher`, from fresh weights that all students of this seed share."""
    facts: dict[str, float] = {}

    def batches() -> Callable:
        feed, cost = lesson(lab.load(teacher), signal, lab.seed)
        facts.update(cost)
        return feed

    return small_stage(lab, "distil-student", {"signal": signal}, batches, lambda m: examine(m, lab.seed) | facts,
                       gpt=shapes(lab)[1], fit=steps(lab, signal.steps), parents={"teacher": teacher}, code=CODE,
                       keep=keep, loss_fn=distil_loss)


CODE = (sys.modules[__name__], distil, staying_close, sampling)


def sweep_signals() -> dict[str, Signal]:
    """Signals of the fair teacher."""
    arms = {f"logits.{n}": Signal(kind="logits", rows=n, temperature=HOT) for n in SIZES}
    arms |= {f"truth.{n}": Signal(kind="truth", rows=n) for n in SIZES}
    arms |= {f"greedy.{n}": Signal(kind="answers", rows=n) for n in SIZES}
    return arms | {"cool.256": Signal(kind="logits", rows=256, temperature=1.0),
                   "shuffled.256": Signal(kind="shuffled", rows=256, temperature=HOT)}


def fault_signals() -> dict[str, Signal]:
    """Signals of the faulty teacher, ROWS prompts each; `truth` is what a file without faults would have given."""
    arms = {"truth": Signal(kind="truth"), "logits": Signal(kind="logits", temperature=1.0, own=True)}
    for name, temperature, candidates in (("greedy", 0.0, 1), ("sampled", 1.0, 1), ("hot", 2.0, 1)):
        arms[name] = Signal(kind="answers", temperature=temperature, candidates=candidates)
        arms[f"{name} + filter"] = Signal(kind="answers", temperature=temperature, filtered=True)
    return arms | {f"{name} x 8 + filter": Signal(kind="answers", temperature=t, candidates=8, filtered=True)
                   for name, t in (("sampled", 1.0), ("hot", 2.0))}


def rows_needed(lab: Lab) -> tuple[Row, list[Artifact]]:
    """The sweep, and a hole in the transfer set: found, and repaired."""
    teacher = make_teacher(lab, False)
    made = {name: make_student(lab, teacher, s) for name, s in sweep_signals().items()}
    made |= {name: make_student(lab, teacher, Signal(kind="logits", temperature=HOT, prompts=name), keep=True)
             for name in ("no recalls", "repaired")}
    row = {f"{name}.{k}": a.card["measured"][k] for name, a in ({"teacher": teacher} | made).items()
           for k in ("right", "recall", "ece")}
    return row | find_hole(lab, teacher, made["no recalls"]), [teacher, *made.values()]


def find_hole(lab: Lab, teacher: Artifact, student: Artifact) -> Row:
    """Of the served prompts ranked highest, as many as there are recalls past their window: which share are such
    recalls? By the student's divergence from its teacher, by the student's own doubt, and by chance."""
    asks = draw_asks(2000, lab.seed, "served")
    t, s = (first_token(lab.load(a), asks) for a in (teacher, student))
    hidden = torch.tensor([a.is_recall for a in asks])
    rankings = {"disagreement": distil.divergence(s, t), "doubt": -s.max(-1).values}
    top = {name: hidden[score.topk(int(hidden.sum())).indices].float().mean() for name, score in rankings.items()}
    return {f"found.{name}": float(x) for name, x in top.items()} | {"found.chance": float(hidden.float().mean())}


def teacher_faults(lab: Lab) -> tuple[Row, list[Artifact]]:
    """What each signal hands down, and five generations of students who teach students."""
    teacher = make_teacher(lab, True)
    made = {"teacher": teacher} | {n: make_student(lab, teacher, s) for n, s in fault_signals().items()}
    for line, settings in GENERATION_LINES.items():
        made |= generations(lab, teacher, line, settings)
    return {f"{name}.{k}": v for name, a in made.items() for k, v in a.card["measured"].items()}, list(made.values())


def generations(lab: Lab, teacher: Artifact, line: str, settings: dict) -> dict[str, Artifact]:
    """Students who teach students, each from fresh weights on answers to fresh prompts."""
    made, parent = {}, teacher
    for g in range(1, GENERATIONS + 1):
        parent = make_student(lab, parent, Signal(kind="answers", prompts=f"generation {g}", **settings), keep=True)
        made[f"{line}.{g}"] = parent
    return made


GENERATION_LINES: dict[str, dict] = {"self": {"temperature": 1.0}, "self greedy": {},
                                     "self + filter": {"temperature": 1.0, "filtered": True}}


def _effect(name: str, key: str, arm: str, control: str | None = None, unit: str = "share") -> tuple:
    return name, f"{arm}.{key}", control and f"{control}.{key}", unit


NEEDED = Design(
    measure=rows_needed, notebook="15", rows=("S3-3.03", "S3-3.23"), smallest=0.03, n_items=1000, items="unseen cases",
    claim="with 256 rows, a student a seventh of its teacher's size learns more from the teacher's softened "
          "distributions (T = 4) than from the right answers: a gain on unseen cases, estimated at 3 points or more",
    falsifier="the estimate is under 3 points, the interval reaches 0, or distributions dealt out at random among rows "
              "with the same answer gain as much",
    also=(("right, logits - shuffled logits, 256 rows", 0.0),),
    effects=(_effect("right, logits - right answers, 256 rows", "right", "logits.256", "truth.256"),
             _effect("right, logits - shuffled logits, 256 rows", "right", "logits.256", "shuffled.256"),
             _effect("right, logits at T = 4 - at T = 1, 256 rows", "right", "logits.256", "cool.256"),
             *(_effect(f"right, logits - right answers, {n} rows", "right", f"logits.{n}", f"truth.{n}")
               for n in SIZES if n != 256),
             _effect("right, logits at T = 1 - right answers, 256 rows", "right", "cool.256", "truth.256"),
             _effect("right, shuffled logits - right answers, 256 rows", "right", "shuffled.256", "truth.256"),
             *(_effect(f"right, teacher's greedy answers - right answers, {n} rows", "right", f"greedy.{n}",
                       f"truth.{n}") for n in SIZES),
             _effect("right, teacher", "right", "teacher"),
             _effect("recalls right, prompts with recalls", "recall", "logits.1024"),
             _effect("recalls right, prompts without", "recall", "no recalls"),
             _effect("recalls right, 64 recalls added", "recall", "repaired"),
             _effect("all right, prompts without recalls - with", "right", "no recalls", "logits.1024"),
             ("hole found by disagreement - by the student's doubt", "found.disagreement", "found.doubt", "share"),
             ("hole found by disagreement - by chance", "found.disagreement", "found.chance", "share")))

FAULTS = Design(
    measure=teacher_faults, notebook="15", smallest=0.03, n_items=1000, items="unseen cases",
    rows=("S3-3.02", "S3-3.07", "S3-3.08", "S3-3.11", "S3-3.12", "S3-3.22", "S3-7.35"),
    claim="a student beats its faulty teacher, by an estimated 3 points or more, when a perfect verifier picks among 8 "
          "sampled answers",
    falsifier="the estimated gain over the greedy teacher is under 3 points, its interval reaches 0, or the sampled "
              "teacher is as good as the student",
    also=(("right, 8 samples + filter - sampled teacher", 0.0),),
    effects=(("right, 8 samples + filter - greedy teacher", "sampled x 8 + filter.right", "teacher.right", "share"),
             ("right, 8 samples + filter - sampled teacher", "sampled x 8 + filter.right", "teacher.right_sampled",
              "share"),
             _effect("right, greedy answers + filter - greedy answers", "right", "greedy + filter", "greedy"),
             _effect("right, 8 samples + filter - truth", "right", "sampled x 8 + filter", "truth"),
             *(_effect(f"late hats wrong, {arm}", "hat_wrong", arm) for arm in ("teacher", *fault_signals())),
             *(_effect(f"late hats with a target, {arm}", "hat_coverage", arm)
               for arm in ("greedy + filter", "sampled + filter", "sampled x 8 + filter")),
             *(_effect(f"confidence in the wrong yes, {arm} - teacher", "hat_yes", arm, "teacher")
               for arm in ("logits", "sampled", "greedy")),
             *(_effect(f"calibration error, {arm} - teacher", "ece", arm, "teacher")
               for arm in ("logits", "sampled", "greedy", "sampled x 8 + filter")),
             *(_effect(f"{word}, {arm}", word, arm) for word in ("kindly", "regards")
               for arm in ("teacher", "logits", "sampled", "greedy")),
             *(_effect(f"right, {arm} - sampled x 8 + filter", "right", arm, "sampled x 8 + filter")
               for arm in ("sampled + filter", "hot", "hot x 8 + filter")),
             *(_effect(f"right, generation 5 - 1, {line}", "right", f"{line}.5", f"{line}.1")
               for line in GENERATION_LINES),
             *(_effect(f"entropy of answers, generation 5 - 1, {line}", "entropy", f"{line}.5", f"{line}.1", "nats")
               for line in GENERATION_LINES)))
