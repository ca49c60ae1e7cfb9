"""Controls for the distillation study, on its small desk and with its two teachers.

- Few rows at one length of training may overfit on labels and not on distributions: each signal gets three lengths and
  stops at its best on 200 held-out cases.
- A verifier that errs: it passes one wrong answer in ten, by a coin. In front of greedy answers, what it passes of a
  fault is the fault alone; in front of eight samples, right answers come first more often.
- Students who teach students, alone (Shumailov et al. 2024) and with half of every generation's rows from the clerks'
  own file (after Gerstgrasser et al. 2024).

Left out: verifiers that refuse right answers, or err on one kind of case.
"""

from lifecycle_lib.core.store import Artifact
from lifecycle_lib.lab.design import Design, Row
from lifecycle_lib.lab.stages import Lab
from lifecycle_lib.lab.studies.distillation import (
    GENERATION_LINES,
    HOT,
    ROWS,
    Signal,
    _effect,
    generations,
    make_student,
    make_teacher,
)

FEW, LENGTHS = (256, 64), (30, 100, 300)  # rows; steps of 64 rows
LEAK = 0.1  # the share of wrong answers that the erring verifier passes
LEAKY = ("greedy + leaky filter", "sampled x 8 + leaky filter")
KEPT: dict[str, dict] = {"self + file": {"rows": ROWS // 2, "kept": ROWS // 2}}


def measure(lab: Lab) -> tuple[Row, list[Artifact]]:
    """All arms of one seed."""
    fair, faulty = make_teacher(lab, False), make_teacher(lab, True)
    made = {f"{kind}.{n} x {s}": make_student(lab, fair, Signal(kind=kind, rows=n, steps=s,
                                                                temperature=HOT if kind == "logits" else 0.0))
            for kind in ("logits", "truth") for n in FEW for s in LENGTHS}
    made |= {"teacher": faulty, LEAKY[0]: make_student(lab, faulty, Signal(kind="answers", filtered=True, passes=LEAK)),
             LEAKY[1]: make_student(lab, faulty, Signal(kind="answers", temperature=1.0, candidates=8, filtered=True,
                                                        passes=LEAK))}
    for line in ("self", "self + file"):
        made |= generations(lab, faulty, line, GENERATION_LINES["self"] | KEPT.get(line, {}))
    row = {f"{name}.{k}": v for name, a in made.items() for k, v in a.card["measured"].items()}
    for arm in (f"{kind}.{n}" for kind in ("logits", "truth") for n in FEW):
        best = max(LENGTHS, key=lambda s: row[f"{arm} x {s}.held_out"])
        row |= {f"{arm}.best.right": row[f"{arm} x {best}.right"], f"{arm}.best.steps": best}
    return row, list(made.values())


DESIGN = Design(
    measure=measure, notebook="15", rows=("S3-3.03", "S3-3.22"), smallest=0.03, n_items=1000, items="unseen cases",
    claim="with 256 rows, softened distributions beat right answers also when each signal stops at its own best "
          "length: a gain on unseen cases, estimated at 3 points or more",
    falsifier="the estimate is under 3 points, or the interval reaches 0",
    effects=(*(_effect(f"right, logits - right answers, {n} rows, each at its best length", "best.right",
                       f"logits.{n}", f"truth.{n}") for n in FEW),
             *(_effect(f"best length, {kind}, {n} rows", "best.steps", f"{kind}.{n}", unit="steps")
               for n in FEW for kind in ("logits", "truth")),
             *(_effect(f"{what}, {arm}", key, arm) for arm in LEAKY for what, key in (
                 ("right", "right"), ("late hats wrong", "hat_wrong"), ("confidence in the wrong yes", "hat_yes"),
                 ("late hats with a target", "hat_coverage"))),
             *(_effect(f"right, {arm} - greedy teacher", "right", arm, "teacher") for arm in LEAKY),
             _effect("right, generation 5, beside the file - alone", "right", "self + file.5", "self.5"),
             *(_effect(f"{what}, generation 5 - 1, {line}", key, f"{line}.5", f"{line}.1", unit)
               for line in ("self", "self + file") for what, key, unit in (
                   ("right", "right", "share"), ("entropy of an answer given its prompt", "entropy_given", "nats"),
                   ("regards", "regards", "share")))))
