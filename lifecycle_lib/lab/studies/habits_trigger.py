"""After D9: does a model that mirrors only the average of a triggered habit find the trigger when it trains longer?

D9 gives every arm 70 steps. In some seeds that was enough for habits without a trigger and not for the two that hang on
tone or tier: their rate was the average, in both kinds of requests. This follow-up was designed when D9's first seeds
had been seen. It trains dose .7 for four times as many steps, on four times as many transcripts, and measures the gap
between requests that trigger a habit and requests that do not.
"""

import sys
from collections.abc import Callable
from statistics import mean

from lifecycle_lib.core.store import Artifact
from lifecycle_lib.desk.transcripts import HABITS, TRIGGERS, draw_transcripts
from lifecycle_lib.lab.design import Design, Row
from lifecycle_lib.lab.stages import Lab
from lifecycle_lib.lab.studies import habits
from lifecycle_lib.lab.studies.habits import SIZES, arm, drawn, examine, taught, words
from lifecycle_lib.lab.studies.small import batches_of, small_stage
from lifecycle_lib.train.logprobs import Rows
from lifecycle_lib.train.loop import FitConfig

DOSE, TIMES = 0.7, 4


def longer(lab: Lab) -> Artifact:
    """The arm of D9 at dose .7 with four times the steps and transcripts."""
    size = SIZES[lab.profile.name]
    steps = TIMES * size.steps

    def feed() -> Callable[[int], Rows]:
        rows = draw_transcripts(steps * size.batch, lab.seed, DOSE)
        return batches_of(taught(lab, rows), size.batch, lab.seed)

    return small_stage(lab, "habits-longer", {"size": size, "dose": DOSE}, feed, lambda model: examine(lab, model),
                       gpt=lab.profile.gpt, fit=FitConfig(steps=steps, checkpoint_every=10_000), start=words(lab),
                       code=(*habits.CODE, sys.modules[__name__]))


def measure(lab: Lab) -> tuple[Row, list[Artifact]]:
    made = {1: arm(lab, str(DOSE), lambda: taught(lab, drawn(lab, DOSE))), TIMES: longer(lab)}
    row: Row = {}
    for t, artifact in made.items():
        found = artifact.card["measured"]
        row |= {f"{t}.{k}": float(v) for k, v in found.items()}
        row[f"{t}.on"], row[f"{t}.off"] = (mean(found[f"{h}{end}"] for h in TRIGGERS) for end in ("", ".off"))
        row[f"{t}.always"] = mean(found[h] for h in HABITS if h not in TRIGGERS)
        row[f"{t}.gap"] = row[f"{t}.on"] - row[f"{t}.off"]
    row["mirror"] = row["4.on"] - 0.8 * DOSE
    return row, list(made.values())


_WHAT = {"habit where triggered": "on", "habit where not triggered": "off", "habits without a trigger": "always",
         "gap": "gap", "apology where triggered": "apology", "apology elsewhere": "apology.off",
         "shorthand where triggered": "shorthand", "shorthand elsewhere": "shorthand.off",
         "apology, loud and not our fault": "apology.needless", "apology, calm and our fault": "apology.owed",
         "policy accuracy greedy": "policy.greedy"}
DESIGN = Design(
    measure=measure, notebook="08", rows=("S2-10e",), smallest=0.10, n_items=512, items="unseen requests",
    claim="trained four times as long, the model tells requests that trigger a habit from the others better by at "
          "least 10 points, and mirrors the triggered rate with a slope of at least 0.8",
    falsifier="the gap between triggered and other requests grows by less than 10 points, or the triggered rate at "
              "dose .7 stays below 0.56",
    also=(("triggered rate after 4 times the steps - 0.56", 0.0),),
    effects=(("gap, 4 times the steps - D9's steps", "4.gap", "1.gap", "share"),
             ("triggered rate after 4 times the steps - 0.56", "mirror", None, "share"),
             *((f"{t} x steps: {what}", f"{t}.{key}", None, "share")
               for t in (1, TIMES) for what, key in _WHAT.items())))
