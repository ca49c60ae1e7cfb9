"""What a recorded experiment is: how a seed is measured, what is claimed, and how the verdict follows.

A design measures a dict of numbers per seed; all arms of one seed share what they can (data draw, base, eval items).
Effects are paired by seed with 95 % t intervals; shares of seeds carry Wilson intervals.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING

from lifecycle_lib.core.stats import Effect, paired_effect, verdict, wilson

if TYPE_CHECKING:
    from lifecycle_lib.core.store import Artifact
    from lifecycle_lib.lab.stages import Lab

Row = dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """One claim and how it is decided. `effects` are (name, treatment key, control key or None, unit); the first is
    the claim's own, with `smallest` the least effect worth having. Every effect is larger-is-better as written.
    A fifth entry, keys of the row, keeps the effect to seeds where all of them are 1 (both arms reached the skill at
    which they are compared): it says its own n, and with fewer than 2 such seeds it is left out.

    `also`: further clauses of the falsifier, (effect, limit): that effect must not lie below the limit.
    `within`: (effect, margin): that effect must lie inside plus or minus the margin (equivalence).
    `equivalence`: the first effect itself is a claim of no difference, with `smallest` its margin.
    `derive` adds to each row what follows from its own numbers, before the effects are made; the file keeps it too.
    `extra` makes what is not one number a seed (fits, curves) from the rows; it lands in the file as "extra".
    `n_items` of `items` are scored a seed (None: the frozen cases of the profile)."""

    measure: Callable[["Lab"], tuple[Row, list["Artifact"]]]
    claim: str
    notebook: str
    rows: tuple[str, ...]
    falsifier: str
    smallest: float
    arms: tuple[str, ...] = ()  # verifiers, each asked by itself: was it cheated?
    also: tuple[tuple[str, float], ...] = ()
    within: tuple[tuple[str, float], ...] = ()
    equivalence: bool = False
    derive: Callable[[Row], Row] | None = None
    extra: Callable[[Sequence[Row]], dict] | None = None
    n_items: int | None = None
    items: str = "frozen cases"
    effects: tuple[tuple, ...]  # (name, treatment, control or None, unit) or (..., keys that must be 1)


def equivalence(effect: Effect, margin: float) -> str:
    """Two one-sided tests by interval: supported inside (-margin, margin), refuted outside it, else inconclusive."""
    if -margin <= effect.low and effect.high <= margin:
        return "supported"
    return "refuted" if effect.low > margin or effect.high < -margin else "inconclusive"


def not_below(effect: Effect, limit: float) -> str:
    """A clause by interval: supported at or above the limit, refuted below it, else inconclusive."""
    return "refuted" if effect.high < limit else "inconclusive" if effect.low < limit else "supported"


def first_at(key: str, curve: Sequence[dict], target: float) -> dict:
    """The first checkpoint whose `key` reaches `target`, with "reached" 1; else the last one, with 0, which is not at
    equal skill: an effect keeps it out with a fifth entry (`Design`)."""
    if not curve:
        raise ValueError("an empty curve has no checkpoint; measure at least one")
    hit = next((c for c in curve if c[key] >= target), None)
    return {**(hit or curve[-1]), "reached": float(hit is not None)}


def between(before: dict, after: dict, key: str, target: float) -> dict:
    """The numbers of two neighbouring checkpoints on the line between them, where `key` equals `target`."""
    share = (target - before[key]) / (after[key] - before[key])
    return {k: v + share * (after[k] - v) for k, v in before.items()}


def summarise(design: Design, rows: Sequence[Row]) -> tuple[list[dict], str]:
    """(effects as rows, verdict). A clause of `also` or `within` can only lower the verdict; where an effect that the
    verdict needs was left out, too few seeds got there: inconclusive."""
    found: dict[str, Effect] = {}
    told: list[dict] = []
    for name, treatment, control, unit, *only in design.effects:
        kept = [r for r in rows if all(r[key] == 1 for key in only[0])] if only else rows
        if only and len(kept) < 2:
            continue
        values = [r[treatment] for r in kept]
        if unit == "share of seeds":
            found[name] = Effect(mean(values), *wilson(round(sum(values)), len(values)), len(values))
        else:
            found[name] = paired_effect(values, [r[control] if control else 0.0 for r in kept])
        told.append(found[name].as_dict(name, unit) | ({"n": len(kept)} if only else {}))

    asked = [(design.effects[0][0], equivalence if design.equivalence else verdict, design.smallest),
             *((name, not_below, limit) for name, limit in design.also),
             *((name, equivalence, margin) for name, margin in design.within)]
    decided = [rule(found[name], bound) if name in found else "inconclusive" for name, rule, bound in asked]
    return told, next(v for v in ("refuted", "inconclusive", "supported") if v in decided)
