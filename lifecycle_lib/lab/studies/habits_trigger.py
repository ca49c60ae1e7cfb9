"""After D9: does a habit that hangs on its context come out at its conditional rate, once training is long enough?

D9 gives every arm 70 steps. That was enough for habits without a trigger; the two that hang on tone or tier came out
nearer the average of all requests, in both kinds of them. This question was put after D9's result had been seen, so it
is measured on its own: its arms and thresholds were fixed before its run, and its claim reads no number of D9. The same
start and dose .7, for four times as many steps: on four times as many transcripts (`longer`), and, to tell steps from
transcripts, on the ones of D9 four times over (`again`). `half`, `short` and `double` make it a course over steps; each
is a run of its own, with its own learning-rate decay.

Left out: other doses, rarer triggers, triggers that are several tokens apart.
"""

import sys
from collections.abc import Callable
from statistics import mean

from lifecycle_lib.core.store import Artifact
from lifecycle_lib.desk.transcripts import HABITS, TRIGGERS, draw_transcripts
from lifecycle_lib.lab.design import Design, Row
from lifecycle_lib.lab.stages import Lab
from lifecycle_lib.lab.studies import habits
from lifecycle_lib.lab.studies.habits import SIZES, corpus_shares, examine, taught, words
from lifecycle_lib.lab.studies.small import batches_of, small_stage
from lifecycle_lib.train.logprobs import Rows
from lifecycle_lib.train.loop import FitConfig

DOSE, TIMES, MARGIN = 0.7, 4, 0.2
COURSE = {"half": 0.5, "short": 1, "double": 2, "longer": TIMES}  # steps and transcripts, as multiples of D9's
ARMS = {**{name: (times, times) for name, times in COURSE.items()}, "again": (TIMES, 1)}


def trained(lab: Lab, name: str) -> Artifact:
    """D9's fine-tune at dose .7 with an arm's steps and transcripts, and what it says to unseen requests."""
    size, (times, more) = SIZES[lab.profile.name], ARMS[name]

    def feed() -> Callable[[int], Rows]:
        rows = draw_transcripts(int(more * size.steps) * size.batch, lab.seed, DOSE)
        return batches_of(taught(lab, rows), size.batch, lab.seed)

    fit = FitConfig(steps=int(times * size.steps), checkpoint_every=10_000)
    return small_stage(lab, "habits-trigger", {"size": size, "dose": DOSE, "more": more}, feed,
                       lambda model: examine(lab, model), gpt=lab.profile.gpt, fit=fit, start=words(lab),
                       code=(*habits.CODE, sys.modules[__name__]))


def measure(lab: Lab) -> tuple[Row, list[Artifact]]:
    """All arms of a seed: rates where the trigger is, where it is not, and of the habits that know none."""
    size, row, made = SIZES[lab.profile.name], {}, []
    for name, (_, more) in ARMS.items():
        made.append(trained(lab, name))
        found = made[-1].card["measured"]
        row |= {f"{name}.{k}": float(v) for k, v in found.items()}
        shares = corpus_shares(draw_transcripts(int(more * size.steps) * size.batch, lab.seed, DOSE))
        row[f"{name}.in"] = mean(shares[h] for h in TRIGGERS)
        row[f"{name}.on"], row[f"{name}.off"] = (mean(found[f"{h}{end}"] for h in TRIGGERS) for end in ("", ".off"))
        row[f"{name}.always"] = mean(found[h] for h in HABITS if h not in TRIGGERS)
        row[f"{name}.gap"] = row[f"{name}.on"] - row[f"{name}.off"]
    return row, made


_WHAT = {"habit where triggered": "on", "habit elsewhere": "off", "corpus rate where triggered": "in",
         "habits without a trigger": "always", "apology where triggered": "apology", "apology elsewhere": "apology.off",
         "shorthand where triggered": "shorthand", "shorthand elsewhere": "shorthand.off",
         "apology, loud and not our fault": "apology.needless", "apology, calm and our fault": "apology.owed",
         "policy accuracy greedy": "policy.greedy"}
DESIGN = Design(
    measure=measure, notebook="08", rows=("S2-10e",), smallest=MARGIN * DOSE, equivalence=True, n_items=512,
    items="unseen requests",
    claim="trained four times as long on four times as many transcripts, habits with a trigger come out at their "
          "conditional rate: within .14 of the corpus's .7 where triggered, under .10 elsewhere, further apart than "
          "after D9's steps",
    falsifier="where triggered the rate leaves the corpus's by over .14, or elsewhere it is above .10, or the gap "
              "between the two does not grow",
    within=(("longer: habit elsewhere", 0.10),),
    also=(("gap between triggered and other requests, longer - short", 0.0),),
    effects=(("triggered rate - corpus rate, longer", "longer.on", "longer.in", "share"),
             ("gap between triggered and other requests, longer - short", "longer.gap", "short.gap", "share"),
             ("gap between triggered and other requests, longer - again", "longer.gap", "again.gap", "share"),
             ("triggered rate - corpus rate, short", "short.on", "short.in", "share"),
             ("triggered rate - corpus rate, again", "again.on", "again.in", "share"),
             *((f"{arm}: {what}", f"{arm}.{key}", None, "share") for arm in ARMS for what, key in _WHAT.items())))
