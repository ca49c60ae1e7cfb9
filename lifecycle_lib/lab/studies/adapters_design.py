"""The claim of peft_ranks, and how a seed's arms become its row (the tasks and the arms are in adapters.py)."""

from lifecycle_lib.core.store import Artifact
from lifecycle_lib.lab.design import Design, Row, between, first_at
from lifecycle_lib.lab.stages import Lab
from lifecycle_lib.lab.studies.adapters import (
    ALPHAS,
    ARMS,
    FAST,
    N_ITEMS,
    PACKED,
    TARGETS,
    TASKS,
    merged,
    tuned,
)

MIXES = tuple(f"{a:g}+{1 - a:g}" for a in ALPHAS)
COSTS = ("n_trained", "cpu_s_a_step", "grad_bytes", "state_bytes", "kept_bytes")


def at_skill(curve: list[dict], target: float) -> dict:
    """The curve where its "new" first crosses `target`: every number interpolated between the checkpoint before and the
    one that is there, and "reached" 1. The last checkpoint and 0 if it never does: that is not equal skill.

    Raises ValueError for an empty curve."""
    hit = first_at("new", curve, target)
    if not hit["reached"] or hit["step"] == curve[0]["step"]:
        return hit
    before = next(c for c, after in zip(curve, curve[1:]) if after["step"] == hit["step"])
    return {**between(before, hit, "new", target), "reached": 1.0}


def lost(curve: list[dict]) -> list[dict]:
    """The curve with "lost": the rise of the old answers' loss over the start, in nats a token."""
    return [{**c, "lost": c["old_nats"] - curve[0]["old_nats"]} for c in curve]


def arm_row(label: str, found: dict, target: float) -> Row:
    """One arm's numbers: the last checkpoint, equal skill (".at"), the curve ("@step") and the costs."""
    curve = lost(found["curve"])
    row = {f"{label}.{k}": v for k, v in curve[-1].items() if k != "step"}
    row |= {f"{label}.at.{k}": v for k, v in at_skill(curve, target).items()}
    row |= {f"{label}.{k}@{c['step']}": c[k] for c in curve for k in ("new", "lost", "old")}
    row |= {f"{label}.{k}": v for k, v in found.items() if k in ("moved", "intruders") or k.startswith("energy")}
    row[f"{label}.held_bytes"] = found["grad_bytes"] + found["state_bytes"]
    return row | {f"{label}.{k}": found[k] for k in COSTS}


def peft_ranks(lab: Lab) -> tuple[Row, list[Artifact]]:
    row, made = {}, []
    for task, target in TARGETS.items():
        runs = {arm: tuned(lab, task, arm) for arm in (*ARMS, PACKED)}
        runs |= {f"{arm} fast": tuned(lab, task, arm, fast=True) for arm in FAST}
        for label, artifact in runs.items():
            row |= arm_row(f"{task}.{label}", artifact.card["measured"], target)
        made += runs.values()
        row[f"{task}.packed_after.new"] = runs["lora-8"].card["measured"]["packed_after"]["new"]
        row[f"{task}.start.old"] = runs["full"].card["measured"]["curve"][0]["old"]
    made.append(merged(lab))
    row |= {f"merge.{k}": v for k, v in made[-1].card["measured"].items()}
    row["merge.best"] = max(min(row[f"merge.cat.{w}.{t}"] for t in TASKS) for w in MIXES)
    for arm in FAST:
        row |= {f"both.{arm}.{k}": sum(row[f"{t}.{arm}.at.{k}"] for t in TASKS) / len(TASKS)
                for k in ("old", "opened", "lost")}
    return row | {f"{t}.rank_gain": row[f"{t}.lora-16.new"] - row[f"{t}.lora-1.new"] for t in TASKS}, made


Effects = list[tuple]  # as Design.effects wants them


def there(*labels: str) -> tuple[str, ...]:
    """The keys that say that these arms reached equal skill."""
    return tuple(f"{label}.at.reached" for label in labels)


def _equal_skill() -> Effects:
    all_four = there(*(f"{t}.{arm}" for t in TASKS for arm in FAST))
    each: Effects = [
        ("old exact answers kept at equal skill, lora-8 - full", "both.lora-8.old", "both.full.old", "share", all_four),
        ("old answers' loss spared at equal skill, full - lora-8", "both.full.lost", "both.lora-8.lost", "nats",
         all_four),
        ("old exact answers once their form is given, lora-8 - full", "both.lora-8.opened", "both.full.opened", "share",
         all_four)]
    for t in TASKS:
        pair = there(f"{t}.lora-8", f"{t}.full")
        each += [
            (f"{t}: old exact kept, lora-8 - full", f"{t}.lora-8.at.old", f"{t}.full.at.old", "share", pair),
            (f"{t}: old loss spared, full - lora-8", f"{t}.full.at.lost", f"{t}.lora-8.at.lost", "nats", pair),
            (f"{t}: steps to equal skill, lora-8 - full", f"{t}.lora-8.at.step", f"{t}.full.at.step", "steps", pair)]
        each += [(f"{t}: old loss spared by a tenth of the rate, {arm}", f"{t}.{arm} fast.at.lost",
                  f"{t}.{arm}.at.lost", "nats", there(f"{t}.{arm} fast", f"{t}.{arm}")) for arm in FAST]
    return each


def _effects() -> tuple[tuple, ...]:
    each = [*_equal_skill(),
            ("rank pays more on facts than on note: (16 - 1) - (16 - 1)", "facts.rank_gain", "note.rank_gain", "share"),
            *((f"{t}: new skill, lora-16 - lora-1", f"{t}.lora-16.new", f"{t}.lora-1.new", "share") for t in TASKS),
            *((f"{t}: new skill, prefix-16 - lora-8", f"{t}.prefix-16.new", f"{t}.lora-8.new", "share") for t in TASKS),
            *((f"{t}: share of the change that 8 directions hold, full", f"{t}.full.energy_8", None, "share")
              for t in TASKS),
            *((f"{t}: intruder directions, lora-8 - full", f"{t}.lora-8.intruders", f"{t}.full.intruders", "share")
              for t in TASKS),
            *((f"{t}: new skill on int4, trained there - packed after", f"{t}.{PACKED}.new", f"{t}.packed_after.new",
               "share") for t in TASKS),
            *((f"{t}: new skill, int4 trained there - float", f"{t}.{PACKED}.new", f"{t}.lora-8.new", "share")
              for t in TASKS),
            ("two adapters added: weaker skill at the best alpha", "merge.best", None, "share"),
            ("cosine of the two adapters' changes", "merge.cosine", None, "cosine")]
    for t in TASKS:
        each += [(f"{t}: reached equal skill, {arm}", f"{t}.{arm}.at.reached", None, "share of seeds") for arm in ARMS]
        each += [(f"{t}: new skill, {arm}", f"{t}.{arm}.new", None, "share") for arm in ARMS]
        each += [(f"{t}: old exact at equal skill, {arm}", f"{t}.{arm}.at.old", None, "share", there(f"{t}.{arm}"))
                 for arm in ARMS]
        each += [(f"{t}: loss added to old answers at equal skill, {arm}", f"{t}.{arm}.at.lost", None, "nats",
                  there(f"{t}.{arm}")) for arm in ARMS]
        each += [(f"{t}: CPU time a step, {arm}", f"{t}.{arm}.cpu_s_a_step", None, "s") for arm in ARMS]
    each += [(f"trained numbers, {arm}", f"note.{arm}.n_trained", None, "numbers") for arm in ARMS]
    each += [(f"gradients and optimiser state, {arm}", f"note.{arm}.held_bytes", None, "bytes") for arm in ARMS]
    each += [(f"kept for the backward pass, {arm}", f"note.{arm}.kept_bytes", None, "bytes") for arm in ARMS]
    return tuple(each)


DESIGN = Design(
    measure=peft_ranks, notebook="10", smallest=0.05,
    rows=("S3-10.02", "S3-10.03", "S3-10.07", "S3-10.10", "S3-10.12", "S3-10.22", "S0-30"),
    claim="at equal skill on a new task, each at its gentlest rate, LoRA of rank 8 forgets less than full tuning: at "
          "least 5 points more of the old answers stay exact",
    falsifier="the mean over both tasks keeps less than 5 points more (interval below 0.05); the direction is the "
              "literature's (Biderman et al. 2024); a first run, at rates picked for speed, spoke against it in nats",
    n_items=N_ITEMS, items="unseen cases (note) or the 120 trained facts", effects=_effects())
