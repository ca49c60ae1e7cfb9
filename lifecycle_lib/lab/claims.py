"""Claim cards: say what you expect and what would prove you wrong, run, then settle.

A forecast is an estimate of the effect and a probability that the claim comes out supported; it is scored with the
quadratic score (p - outcome)^2 of Brier (1950): 0 is perfect, 0.25 is what "fifty-fifty" always gets, 1 is certain and
wrong. Recorded evidence (data/results, several seeds) is read here and never computed in a notebook.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt

from lifecycle_lib.core.records import check_fields, read_json
from lifecycle_lib.core.stats import Effect, verdict
from lifecycle_lib.lab.design import equivalence
from lifecycle_lib.lab.figures import interval_dots

RESULTS = Path(__file__).resolve().parents[2] / "data" / "results"
DIRECTIONS = {"up": "is a rise of at least", "down": "is a fall of at least", "same": "stays within plus or minus"}
EVIDENCE_FIELDS = {"claim": str, "verdict": str, "seeds": list, "effects": list, "falsifier": str, "interval": str,
                   "n_cases": int, "smallest_effect": float}


def in_unit(value: float, unit: str, digits: int = 0) -> str:
    """A number with its unit; a share is printed in percent."""
    if unit.startswith("share"):
        return f"{100 * value:.{digits}f} %" + unit.removeprefix("share")
    return f"{value:,.0f} {unit}" if abs(value) >= 1000 else f"{value:.{max(2, digits)}f} {unit}"


@dataclass(slots=True, kw_only=True)
class ClaimCard:
    """A claim with the smallest effect worth having, what would falsify it, its scope and its blind spot.

    `direction` "same" claims that the effect stays within +-smallest. Raises ValueError for an empty field, an unknown
    direction or a smallest effect that is not above 0."""

    claim: str
    direction: str
    smallest: float
    unit: str
    falsifier: str
    scope: str
    not_measured: str
    forecast: tuple[float, float] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        for name in ("claim", "unit", "falsifier", "scope", "not_measured"):
            if not getattr(self, name).strip():
                raise ValueError(f"claim card: {name} is empty; a claim without it cannot be wrong, so write it")
        if self.direction not in DIRECTIONS:
            raise ValueError(f"claim card: direction={self.direction!r}; use one of {', '.join(DIRECTIONS)}")
        if not self.smallest > 0:
            raise ValueError(f"claim card: smallest={self.smallest}; give the least effect worth having, above 0")

    def show(self) -> None:
        """Print the card."""
        size = in_unit(self.smallest, self.unit, 0 if 100 * self.smallest == round(100 * self.smallest) else 1)
        print(f"CLAIM         {self.claim}\nit holds if   the effect {DIRECTIONS[self.direction]} {size}\n"
              f"falsified by  {self.falsifier}\nscope         {self.scope}\nnot measured  {self.not_measured}")

    def predict(self, estimate: float, confidence: float) -> None:
        """Commit to an effect and to the probability (0 to 1) that the claim comes out supported."""
        if not 0 <= confidence <= 1:
            raise ValueError(f"confidence={confidence}: give a probability from 0 to 1")
        self.forecast = (float(estimate), float(confidence))
        print(f"PREDICTION    effect {in_unit(estimate, self.unit)}; supported with probability {confidence:.0%}")

    def decide(self, effect: Effect) -> str:
        """supported, refuted or inconclusive; `effect` is signed, so a fall is negative."""
        if self.direction == "same":
            return equivalence(effect, self.smallest)
        turned = effect if self.direction == "up" else Effect(-effect.estimate, -effect.high, -effect.low, effect.n)
        return verdict(turned, self.smallest)

    def settle(self, effect: Effect) -> str:
        """Print the verdict and the score of the prediction; returns the verdict."""
        decided = self.decide(effect)
        low, high = (in_unit(x, self.unit.split(" of ")[0]) for x in (effect.low, effect.high))
        print(f"VERDICT       {decided}: {in_unit(effect.estimate, self.unit)} [{low}, {high}], n = {effect.n}")
        if self.forecast is None:
            print("no prediction was made; call predict() before running")
            return decided
        estimate, confidence = self.forecast
        inside = "inside" if effect.low <= estimate <= effect.high else "outside"
        points = brier(confidence, decided == "supported")
        print(f"PREDICTION    Brier score {points:.2f} (0 best, 0.25 a coin, 1 worst); your estimate lay {inside} the "
              "interval")
        return decided


def brier(probability: float, happened: bool) -> float:
    """(p - outcome)^2."""
    return (probability - happened) ** 2


def recorded(name: str, folder: Path = RESULTS) -> dict:
    """data/results/NAME.json. Raises ValueError when it is missing, or short of what evidence must state."""
    path = folder / f"{name}.json"
    if not path.is_file():
        raise ValueError(f"data/results/{name}.json: no such evidence; record it with: lifecycle evidence {name}")
    evidence = read_json(path)
    if not isinstance(evidence, Mapping):
        raise ValueError(f"{path.name}: not an object; record it again with: lifecycle evidence {name}")
    check_fields(evidence, EVIDENCE_FIELDS, path.name)
    if len(evidence["seeds"]) < 2 or not evidence["effects"]:
        raise ValueError(f"{path.name}: {len(evidence['seeds'])} seeds and {len(evidence['effects'])} effects are no "
                         f"evidence; record it again with: lifecycle evidence {name}")
    return evidence


def show_evidence(name: str, effects: Sequence[str] | None = None, folder: Path = RESULTS, claim: bool = True) -> None:
    """Print the recorded verdict and its effects (all, or those named) with intervals, seeds and n.

    `claim=False` leaves the claim and its verdict out: for effects that were recorded beside it."""
    evidence = recorded(name, folder)
    rows = _pick(evidence, name, effects)
    width = max(len(row["name"]) for row in rows)
    if claim:
        print(f"{evidence['verdict'].upper()}: {evidence['claim']}\nfalsified by: {evidence['falsifier']}")
    for row in rows:
        value, low, high = (in_unit(row[k], row["unit"].split(" of ")[0], 1) for k in ("estimate", "low", "high"))
        own_n = f"  n = {row['n']}" if "n" in row else ""  # over the seeds that can be compared
        own_n += "  Wilson" if row["unit"] == "share of seeds" else ""
        print(f"  {row['name']:<{width}}  {value:>12}  [{low}, {high}]{own_n}")
    n, items = f"{evidence['n_cases']:,}", evidence.get("items", "frozen cases")
    scored = f"{n} {items} a seed" if items == "frozen cases" else f"each scored on {n} {items}"
    print(f"{evidence['interval']}; {len(evidence['seeds'])} seeds, {scored}")


def evidence_figure(name: str, effects: Sequence[str] | Mapping[str, str] | None = None, title: str = "",
                    folder: Path = RESULTS,
                    not_measured: str = "other model sizes, other wordings, real customers") -> None:
    """Draw recorded effects (all, those named, or {name: label}; they share one unit) with their intervals, and show
    the figure."""
    evidence = recorded(name, folder)
    rows = _pick(evidence, name, effects)
    units = sorted({row["unit"] for row in rows})
    if len(units) != 1:
        raise ValueError(f"{name}: effects in {' and '.join(units)} do not share an axis; name those of one unit")
    scale, label = (100, "percent" + units[0].removeprefix("share")) if units[0].startswith("share") else (1, units[0])
    n = len(evidence["seeds"])
    label_of = effects if isinstance(effects, Mapping) else {}
    drawn = {label_of.get(row["name"], row["name"]): Effect(
        *(scale * row[k] for k in ("estimate", "low", "high")), row.get("n", n)) for row in rows}
    smallest = scale * evidence["smallest_effect"] if evidence["effects"][0] in rows else None
    interval_dots(drawn, title or name, xlabel=label, interval=evidence["interval"], not_measured=not_measured,
                  smallest=smallest)
    plt.show()


def _pick(evidence: Mapping, name: str, effects: Sequence[str] | None) -> list[dict]:
    rows = {row["name"]: row for row in evidence["effects"]}
    if missing := [e for e in effects or () if e not in rows]:
        raise ValueError(f"{name}: no effect {missing[0]!r}; it has {'; '.join(rows)}")
    return [rows[e] for e in (effects or rows)]
