"""D8, the claim: which removals are equivalent to never having seen the source, and what 24 months of notices cost.

Equivalence is two one-sided tests by interval (Schuirmann 1987, here on the 95 % paired t interval over seeds): an arm
passes a measure when the whole interval of arm minus never-seen lies inside the margin, and passes when it passes all
eight. Margins were set from the spread between two never-seen models on pilot seeds (100 and up), before the run.

`notices` is the cost model: takedowns arrive as a Poisson process, and those of one month are answered by one rebuild.
"""

import math
from collections.abc import Sequence

from lifecycle_lib.core.stats import paired_effect
from lifecycle_lib.core.store import Artifact
from lifecycle_lib.lab.design import Design, Row, equivalence
from lifecycle_lib.lab.stages import Lab
from lifecycle_lib.lab.studies.removal import ARMS, Removal
from lifecycle_lib.lab.studies.removal_world import SIZES

MEASURES = {  # measure: (what, margin, unit)
    "exposure": ("canary exposure", 1.0, "bits"),
    "jogged": ("other canaries after a jog", 1.0, "bits"),
    "auc": ("membership AUC", 0.075, "AUC"),
    "distance": ("distance of behaviour", 0.10, "total variation"),
    "their_facts": ("facts of the source", 0.15, "share"),
    "facts": ("facts that stay", 0.05, "share"),
    "loss": ("held-out loss that stays", 0.05, "nats"),
    "relearn_loss": ("loss after 8 steps of relearning", 0.30, "nats"),
}
EXACT = ("retrain", "detach")  # claimed equivalent
MONTHS, RATE = 24, 1.0


def notices(rate: float, months: int, parts: int, part_cpu_s: float) -> float:
    """Expected CPU seconds for `rate` revocations a month (Poisson) over `months`, each hitting one of `parts` equal
    parts at random; what hits a part within a month costs one rebuild of it. parts = 1 is a single model."""
    if rate < 0 or parts < 1:
        raise ValueError(f"rate={rate}, parts={parts}: a rate is 0 or more a month, parts at least 1")
    return months * parts * (1 - math.exp(-rate / parts)) * part_cpu_s


def measure(lab: Lab) -> tuple[Row, list[Artifact]]:
    size = SIZES["smoke" if lab.profile.name == "smoke" else "full"]
    study, row, made = Removal(lab, size), {}, []
    for name in ("never", "never-2", *ARMS, "worn", "shards-before"):
        audit = study.audited(name)
        found = audit.card["measured"]
        row |= {f"{name}.{k}": v for k, v in found.items() if k != "curve"}
        row |= {f"{name}.{key}_{p['step']}": p[key] for p in found.get("curve", ()) for key in ("loss", "others")}
        made += [*study.model(name)[1].values(), audit]
    adapter = study.adapter().card
    row |= {"adapter.cpu_s": adapter["train_cpu_s"], "detach.exact": float(adapter["exact"]),
            "full.cpu_s": study.full().card["train_cpu_s"],
            "shards.upfront_cpu_s": sum(study.shard(i).card["train_cpu_s"] for i in range(size.shards)),
            "ascent.steps": float(study.ascent().card["steps"]),
            "ascent-audit.steps": float(study.ascent(True).card["steps"]),
            "ascent-audit.reached": float(study.ascent(True).card["reached"]),
            "months.monolith": notices(RATE, MONTHS, 1, row["retrain.cpu_s"]),
            "months.shards": notices(RATE, MONTHS, size.shards, row["shards.cpu_s"]),
            "months.adapters": notices(RATE, MONTHS, 1, row["detach.cpu_s"])}
    return row, list({a.fingerprint: a for a in [*made, study.adapter()]}.values())


def table(rows: Sequence[Row]) -> dict:
    """{"equivalence": {arm: {measure: verdict}}, "passes": arms equivalent on every measure}."""
    def decide(arm: str, m: str) -> str:
        return equivalence(paired_effect([r[f"{arm}.{m}"] for r in rows], [r[f"never.{m}"] for r in rows]),
                           MEASURES[m][1])

    found = {arm: {m: decide(arm, m) for m in MEASURES} for arm in ("never-2", *ARMS)}
    return {"equivalence": found, "passes": [a for a, v in found.items() if set(v.values()) == {"supported"}]}


def _effects() -> tuple[tuple[str, str, str | None, str], ...]:
    against = {(a, m): (f"{a}: {what}, arm - never seen", f"{a}.{m}", f"never.{m}", unit)
               for a in ("never-2", *ARMS) for m, (what, _, unit) in MEASURES.items()}
    first = against.pop(("ascent-audit", "jogged"))
    cpu = [(f"{a}: removal", f"{a}.cpu_s", None, "CPU s") for a in ARMS[1:]]
    return (first, *against.values(), *cpu, ("shards: first training", "shards.upfront_cpu_s", None, "CPU s"),
            ("one model: first training", "full.cpu_s", None, "CPU s"),
            ("ascent-audit: other canaries, jogged - before", "ascent-audit.jogged", "ascent-audit.others_0", "bits"),
            ("never seen: exposure", "never.exposure", None, "bits"),
            ("before the notice: exposure", "nothing.exposure", None, "bits"),
            ("adapter on: exposure of codes written 16 times", "worn.exposure_16", None, "bits"),
            ("adapter on: facts of the source", "worn.their_facts", None, "share"),
            ("adapter on: facts that stay", "worn.facts", None, "share"),
            ("shards before the notice: facts that stay", "shards-before.facts", None, "share"),
            ("detach gives the base back bit for bit", "detach.exact", None, "share of seeds"),
            ("24 months, 1 notice a month: one model - shards", "months.monolith", "months.shards", "CPU s"),
            ("24 months, 1 notice a month: one model - adapters", "months.monolith", "months.adapters", "CPU s"))


def _name(arm: str, what: str) -> str:
    return f"{arm}: {MEASURES[what][0]}, arm - never seen"


D8 = Design(
    measure=measure, notebook="05", rows=("S2-02b", "S2-02d", "S3-8.07", "S3-8.18", "S3-8.20"), smallest=1.0,
    claim="retraining and detaching an adapter are equivalent to never having seen the source; gradient ascent is not: "
          "it leaves the codes in place, and when it is run until the audit passes, they come back after a jog on "
          "other rows",
    falsifier="ascent run until the audit passes stays within 1 bit of never-seen after the jog, or plain ascent does "
              "on exposure; or retraining or detaching leaves a margin",
    also=((_name("ascent", "exposure"), 1.0),),
    within=tuple((_name(arm, m), margin) for arm in EXACT for m, (_, margin, _) in MEASURES.items()),
    effects=_effects(), extra=table, n_items=24, items="canaries")
