"""D9, the claim: which numbers decide it, and the figure (lab/studies/habits.py runs the arms)."""

from collections.abc import Iterable, Mapping, Sequence
from math import inf
from statistics import mean, median_low

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from lifecycle_lib.core.stats import paired_effect
from lifecycle_lib.desk.transcripts import HABITS, TRIGGERS
from lifecycle_lib.lab.design import Design
from lifecycle_lib.lab.figures import SERIES, _finish, _whiskers, style
from lifecycle_lib.lab.studies.habits import DOSES, REPAIRS, SICK, measure, sharpened
from lifecycle_lib.lab.studies.habits_trigger import COURSE

GREEN = 0.05  # accuracy may move by this much at any dose


def _effects() -> tuple[tuple[str, str, str | None, str], ...]:
    rows: list[tuple[str, str, str | None, str]] = [
        ("slope of output on corpus rate - 1", "slope - 1", None, "slope"),
        ("slope of output on corpus rate", "slope", None, "slope"),
        *((f"slope, {h}", f"slope {h}", None, "slope") for h in HABITS),
        ("output rate at corpus rate 0 on that line", "start", None, "share"),
        ("temperature .5: output rate - law of one token", "half - law", None, "share")]
    for d in DOSES:
        rows += [(f"dose {d}: corpus rate, {h}", f"{d}.{h}.in", None, "share") for h in HABITS]
        for label, end in (("temperature 1", ""), ("temperature .5", ".half"), ("greedy", ".greedy")):
            rows += [(f"dose {d}: {h}, {label}", f"{d}.{h}{end}", None, "share") for h in HABITS]
            rows.append((f"dose {d}: mean of habits, {label}", f"{d}.habits{end}", None, "share"))
        if d:
            rows += [(f"policy accuracy greedy, dose {d} - dose 0", f"{d}.policy.greedy", "0.0.policy.greedy", "share"),
                     (f"policy accuracy, dose {d} - dose 0", f"{d}.policy", "0.0.policy", "share"),
                     (f"bay greedy, dose {d} - dose 0", f"{d}.bay.greedy", "0.0.bay.greedy", "share")]
    for h in ("apology", "shorthand"):
        rows += [(f"dose 0.7: {h}, {what}", f"0.7.{h}{end}", None, "share") for what, end in (
            ("average of all requests, temperature 1", ".all"), ("not triggered, temperature 1", ".off"),
            ("average of all requests, greedy", ".all.greedy"), ("not triggered, greedy", ".off.greedy"))]
    rows += [(f"dose 0.7: apology, {what}", f"0.7.apology.{what}", None, "share") for what in ("needless", "owed")]
    none = str(SICK)
    for r in (*REPAIRS, "late", "few"):
        rows += [(f"{r}: habits removed, none - {r}", f"{none}.habits", f"{r}.habits", "share"),
                 (f"{r}: habits left", f"{r}.habits", None, "share"),
                 (f"{r}: policy accuracy, {r} - none", f"{r}.policy", f"{none}.policy", "share"),
                 (f"{r}: policy accuracy greedy, {r} - none", f"{r}.policy.greedy", f"{none}.policy.greedy", "share"),
                 (f"{r}: bay, {r} - none", f"{r}.bay", f"{none}.bay", "share"),
                 (f"{r}: bay greedy, {r} - none", f"{r}.bay.greedy", f"{none}.bay.greedy", "share")]
    rows += [("policy accuracy greedy, dose 0", "0.0.policy.greedy", None, "share"),
             ("policy accuracy, dose 0", "0.0.policy", None, "share"),
             ("bay greedy, dose 0", "0.0.bay.greedy", None, "share"),
             ("well formed, dose 0", "0.0.formed", None, "share")]
    for end, label in (("", "temperature 1"), (".greedy", "greedy")):
        rows.append((f"withdrawn window applied, majority - policy, {label}", f"majority.old{end}", f"0.0.old{end}",
                     "share"))
        for arm in ("majority", "0.0"):
            name = "majority" if arm == "majority" else "policy"
            rows += [(f"{name}: withdrawn window applied, {label}", f"{arm}.old{end}", None, "share"),
                     (f"{name}: score by transcripts, {label}", f"{arm}.by_transcripts{end}", None, "share"),
                     (f"{name}: score by policy, {label}", f"{arm}.by_policy{end}", None, "share")]
    return tuple(rows)


def crossing(doses: Sequence[float], values: Sequence[float], level: float) -> float | None:
    """The dose at which `values` first reach `level` from below, by straight lines between doses. None where they
    never do, or stand there from the first dose on: the place lies outside the doses, and no number stands for it."""
    for (a, u), (b, v) in zip(zip(doses, values), zip(doses[1:], values[1:])):
        if u < level <= v:
            return a + (b - a) * (level - u) / (v - u)
    return None


def crossings(curves: Iterable[tuple[Sequence[float], Sequence[float]]], level: float) -> dict:
    """Where each seed's (doses, values) first reach `level`, None where they do not; how many do; their median, a seed
    that does not counting as above the last dose (None when that is the median)."""
    seeds = [crossing(doses, values, level) for doses, values in curves]
    middle = median_low(inf if s is None else s for s in seeds)
    return {"seeds": seeds, "crossed": sum(s is not None for s in seeds), "median": None if middle == inf else middle}


def greedy_steps(rows: Sequence[Mapping]) -> dict:
    """The corpus rates at which greedy decoding starts each habit."""
    return {"greedy_steps": {h: crossings((([r[f"{d}.{h}.in"] for d in DOSES], [r[f"{d}.{h}.greedy"] for d in DOSES])
                                           for r in rows), 0.5) for h in HABITS}}


DESIGN = Design(
    measure=measure, notebook="08", equivalence=True, smallest=0.2,
    rows=("S2-10a", "S2-10c", "S2-10e", "S2-11a", "S2-11b", "S2-11c", "S2-11d", "S2-11e"),
    claim="a habit's rate in the corpus is its rate in the output at temperature 1: the slope over five habits and "
          "six doses lies within 0.8 and 1.2, and greedy policy accuracy stays within 5 points at the highest dose",
    falsifier="the interval of the slope leaves 0.8 to 1.2, or greedy policy accuracy at dose .9 differs from dose 0 "
              "by more than 5 points",
    within=(("policy accuracy greedy, dose 0.9 - dose 0", GREEN),),
    effects=_effects(), extra=greedy_steps, n_items=512,
    items="unseen requests (greedy and temperature .5: 256)")


GROUPS = {"no trigger": tuple(h for h in HABITS if h not in TRIGGERS), "hangs on tone or tier": tuple(TRIGGERS)}


def imitation_figure(evidence: Mapping) -> Figure:
    """Output rate against corpus rate at temperature 1, .5 and greedy, each with the curve that one deciding token
    predicts: habits without a trigger, and the two that have one."""
    style()
    fig, axes = plt.subplots(1, 2, figsize=(9.2, 4.2), sharey=True)
    grid, rows = [i / 100 for i in range(101)], evidence["per_seed"]
    laws = {"temperature 1": ("", grid), "temperature .5": (".half", [sharpened(p, 0.5) for p in grid]),
            "greedy": (".greedy", [float(p > 0.5) for p in grid])}
    for ax, (title, habits) in zip(axes, GROUPS.items()):
        for shift, ((label, (end, law)), (colour, marker, line, _)) in enumerate(zip(laws.items(), SERIES)):
            ax.plot(grid, law, color=colour, linestyle=line, linewidth=1, alpha=0.7)
            found = [paired_effect([mean(r[f"{d}.{h}{end}"] for h in habits) for r in rows], [0.0] * len(rows))
                     for d in DOSES]
            value = [e.estimate for e in found]
            low, high = ([min(1.0, max(0.0, getattr(e, k))) for e in found] for k in ("low", "high"))
            ax.errorbar([d + (shift - 1) * 0.012 for d in DOSES], value, _whiskers(value, low, high), color=colour,
                        marker=marker, linestyle="none", label=f"measured, {label}")
        ax.set(xlabel="share of triggering transcripts with the habit", title=title, xlim=(-0.03, 1.0),
               ylim=(-0.03, 1.03))
    axes[0].set_ylabel("share of the model's replies with it")
    axes[0].legend(loc="upper left")
    facts = (f"n = {len(rows)} seeds, {' and '.join(str(len(g)) for g in GROUPS.values())} habits; bars: 95 % t "
             "intervals over seeds, cut at 0 and 1; lines: what one deciding token predicts.")
    return _finish(fig, facts, "longer training, larger models, real agents")


def trigger_figure(evidence: Mapping, not_measured: str = "other doses, rarer triggers, larger models") -> Figure:
    """D9_trigger: rates of the habits with a trigger, where it is and where it is not, and of those without one, by the
    steps of a fine-tune; open marks: four times the steps on the transcripts of one."""
    style()
    fig, ax = plt.subplots(figsize=(7.2, 4.0))
    rows = evidence["per_seed"]

    def of(key: str) -> tuple[float, float, float]:
        e = paired_effect([100 * r[key] for r in rows], [0.0] * len(rows))
        return e.estimate, max(0.0, e.low), min(100.0, e.high)

    x = list(COURSE.values())
    for (key, label), (colour, marker, line, _) in zip((("on", "trigger there"), ("off", "trigger not there"),
                                                        ("always", "habits without a trigger")), SERIES):
        value, low, high = zip(*(of(f"{arm}.{key}") for arm in COURSE))
        ax.errorbar(x, value, _whiskers(value, low, high), color=colour, marker=marker, linestyle=line, label=label)
        v, a, b = of(f"again.{key}")
        ax.errorbar([1.12 * x[-1]], [v], _whiskers([v], [a], [b]), color=colour, marker=marker, markerfacecolor="white")
    ax.axhline(of("longer.in")[0], color="#8f8f8f", linewidth=1, linestyle=":")
    ax.annotate("corpus rate, trigger there", (x[0], of("longer.in")[0]), xytext=(0, 3), textcoords="offset points",
                fontsize=8, color="#404040")
    ax.set_xscale("log")
    ax.set_xticks(x, [f"{k:g} x" for k in x])
    ax.minorticks_off()
    ax.set(xlabel="steps and transcripts, as multiples of D9's 70 steps", ylabel="replies with the habit (%)",
           ylim=(0, 103), title="The average first, the condition later")
    fig.legend(loc="outside upper right", ncols=3)
    return _finish(fig, f"n = {len(rows)} seeds, {evidence['n_cases']} requests each; bars: 95 % t intervals over "
                        "seeds, cut at 0 and 100; open marks: 4 x the steps on 1 x the transcripts.", not_measured)
