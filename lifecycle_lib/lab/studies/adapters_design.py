"""The claim of peft_ranks, and how a seed's arms become its row (the tasks and the arms are in adapters.py)."""

from functools import partial

from lifecycle_lib.core.store import Artifact
from lifecycle_lib.lab.design import Design, Row, first_at
from lifecycle_lib.lab.stages import Lab
from lifecycle_lib.lab.studies.adapters import (
    ALPHAS,
    ARMS,
    GENTLE,
    N_ITEMS,
    PACKED,
    PREFIXES,
    TARGETS,
    TASKS,
    merged,
    tuned,
)

MIXES = tuple(f"{a:g}+{1 - a:g}" for a in ALPHAS)
COSTS = ("n_trained", "cpu_s_a_step", "grad_bytes", "state_bytes", "kept_bytes")


at_skill = partial(first_at, "new")


def arm_row(label: str, found: dict, target: float) -> Row:
    """One arm's numbers: the last checkpoint, the one at equal skill (".at"), the curve ("@step") and the costs.

    "lost" is the rise of the old answers' loss over the start, in nats a token."""
    curve = [{**c, "lost": c["old_nats"] - found["curve"][0]["old_nats"]} for c in found["curve"]]
    row = {f"{label}.{k}": curve[-1][k] for k in ("new", "new_nats", "old", "lost", "docs_nats")}
    row |= {f"{label}.at.{k}": at_skill(curve, target)[k] for k in ("reached", "step", "old", "lost", "docs_nats")}
    row |= {f"{label}.{k}@{c['step']}": c[k] for c in curve for k in ("new", "lost")}
    row[f"{label}.held_bytes"] = found["grad_bytes"] + found["state_bytes"]
    return row | {f"{label}.{k}": found[k] for k in COSTS}


def peft_ranks(lab: Lab) -> tuple[Row, list[Artifact]]:
    row, made = {}, []
    for task, target in TARGETS.items():
        for arm, gentle in (*((a, False) for a in (*ARMS, PACKED)), *((a, True) for a in GENTLE)):
            made.append(artifact := tuned(lab, task, arm, gentle))
            found, label = artifact.card["measured"], f"{task}.{arm}{' gentle' if gentle else ''}"
            row |= arm_row(label, found, target)
            row |= {f"{label}.{k}": v for k, v in found.items() if k == "moved" or k.startswith("energy")}
            if "packed_after" in found:
                row[f"{task}.packed_after.new"] = found["packed_after"]["new"]
        row[f"{task}.start.old"] = artifact.card["measured"]["curve"][0]["old"]
        row[f"{task}.prefix.new"] = max(row[f"{task}.prefix-{p}.new"] for p in PREFIXES)
    made.append(merged(lab))
    row |= {f"merge.{k}": v for k, v in made[-1].card["measured"].items()}
    row["merge.best"] = max(min(row[f"merge.cat.{w}.{t}"] for t in TASKS) for w in MIXES)
    for arm in (*GENTLE, *(f"{a} gentle" for a in GENTLE)):
        row[f"both.{arm}.lost"] = sum(row[f"{t}.{arm}.at.lost"] for t in TASKS) / len(TASKS)
    rank = {t: row[f"{t}.lora-16.new"] - row[f"{t}.lora-1.new"] for t in TASKS}
    return row | {f"{t}.rank_gain": gain for t, gain in rank.items()}, made


def _effects() -> tuple[tuple[str, str, str | None, str], ...]:
    each: list[tuple[str, str, str | None, str]] = [
        ("old answers' loss spared at equal skill, full - lora-8", "both.full.lost", "both.lora-8.lost", "nats"),
        ("the same with both rates a notch lower", "both.full gentle.lost", "both.lora-8 gentle.lost", "nats"),
        *((f"the same on {t}", f"{t}.full.at.lost", f"{t}.lora-8.at.lost", "nats") for t in TASKS),
        ("rank pays more on facts than on note: (16 - 1) - (16 - 1)", "facts.rank_gain", "note.rank_gain", "share"),
        *((f"{t}: new skill, lora-16 - lora-1", f"{t}.lora-16.new", f"{t}.lora-1.new", "share") for t in TASKS),
        *((f"{t}: new skill, better prefix - lora-8", f"{t}.prefix.new", f"{t}.lora-8.new", "share") for t in TASKS),
        *((f"{t}: new skill on int4, trained there - packed after", f"{t}.{PACKED}.new", f"{t}.packed_after.new",
           "share") for t in TASKS),
        ("two adapters added: weaker skill at the best alpha", "merge.best", None, "share"),
        ("cosine of the two adapters' changes", "merge.cosine", None, "cosine")]
    for t in TASKS:
        each += [(f"{t}: new skill, {arm}", f"{t}.{arm}.new", None, "share") for arm in ARMS]
        each += [(f"{t}: loss added to old answers, {arm}", f"{t}.{arm}.lost", None, "nats") for arm in ARMS]
        each += [(f"{t}: reached equal skill, {arm}", f"{t}.{arm}.at.reached", None, "share of seeds") for arm in ARMS]
        each += [(f"{t}: CPU time a step, {arm}", f"{t}.{arm}.cpu_s_a_step", None, "s") for arm in ARMS]
    each += [(f"trained numbers, {arm}", f"note.{arm}.n_trained", None, "numbers") for arm in ARMS]
    each += [(f"gradients and optimiser state, {arm}", f"note.{arm}.held_bytes", None, "bytes") for arm in ARMS]
    each += [(f"kept for the backward pass, {arm}", f"note.{arm}.kept_bytes", None, "bytes") for arm in ARMS]
    return tuple(each)


DESIGN = Design(
    measure=peft_ranks, notebook="10", smallest=0.1,
    rows=("S3-10.02", "S3-10.03", "S3-10.07", "S3-10.10", "S3-10.12", "S3-10.22", "S0-30"),
    claim="at equal skill on a new task, LoRA of rank 8 costs the old task less than full tuning: its answers lose at "
          "least 0.1 nats a token less",
    falsifier="the mean over both tasks spares less than 0.1 nats (interval below 0.1); the direction is the "
              "literature's (Biderman et al. 2024), the pilot seed spoke against it",
    n_items=N_ITEMS, items="unseen cases (note) or the 120 trained facts", effects=_effects())
