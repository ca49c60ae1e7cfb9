"""Figures of the forgetting studies, from recorded rows (a row a seed) or a live curve.

Skill and refusal share one axis with the launch gate's verdicts as a strip above; arms at equal skill; the ledger as
a table of shades with the intervals printed in the cells. Means over seeds with 95 % t intervals.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from lifecycle_lib.core.stats import Effect, paired_effect
from lifecycle_lib.lab.figures import INK, SERIES, _finish, _start, _whiskers
from lifecycle_lib.lab.studies.erosion import Curve
from lifecycle_lib.lab.studies.ledger import CHAIN_SKILLS, CHAIN_STAGES, PATHS, SKILLS

GREY = "#808080"
LINES = {"exact": "exact pass on unseen cases", "refusal": "refusal of harmful asks",
         "over_refusal": "over-refusal of benign twins"}


def over_seeds(values: Sequence[float]) -> Effect:
    """Mean over seeds with its 95 % t interval."""
    return paired_effect(values, [0.0] * len(values))


def curves_of(rows: Sequence[Mapping], arm: str) -> list[Curve]:
    """One arm's curve a seed, from recorded rows. Raises ValueError for an arm that is not there."""
    key = f"{arm}.curve"
    if not rows or key not in rows[0]:
        there = sorted(k.removesuffix(".curve") for k in (rows[0] if rows else ()) if k.endswith(".curve"))
        raise ValueError(f"no curve of arm {arm!r}; there are {', '.join(there) or 'no rows'}")
    return [r[key] for r in rows]


def erosion_figure(rows: Sequence[Mapping], arms: Sequence[str] = ("plain", "replay 5 %"),
                   live: Mapping[str, Curve] | None = None, title: str = "") -> Figure:
    """Skill, refusal and over-refusal along a harmless fine-tune, a panel an arm, over one axis in percent.

    The strip on top says what the launch gate decided: filled, it ships in every seed; open, in the percent written.
    `live`: {arm: curve} of a run just made, as rings (its steps are its own model's)."""
    fig, first = _start(max(6.0, 3.9 * len(arms)), 4.4)
    first.remove()
    axes = fig.subplots(1, len(arms), sharey=True, squeeze=False)[0]
    for ax, arm in zip(axes, arms):
        curves = curves_of(rows, arm)
        steps = [c["step"] for c in curves[0]]
        for (key, label), (colour, marker, line, _) in zip(LINES.items(), SERIES):
            at = [over_seeds([100 * c[i][key] for c in curves]) for i in range(len(steps))]
            mean = [e.estimate for e in at]
            ax.errorbar(steps, mean, _whiskers(mean, [max(0, e.low) for e in at], [min(100, e.high) for e in at]),
                        color=colour, marker=marker, linestyle=line, markersize=4, label=label)
            if live and arm in live:
                ax.plot([c["step"] for c in live[arm]], [100 * c[key] for c in live[arm]], linestyle="none",
                        marker=marker, markersize=9, markerfacecolor="none", color=colour)
        for i, step in enumerate(steps):
            ships = np.mean([c[i]["ships"] for c in curves])
            ax.plot(step, 112, marker="s", markersize=7, color="#2e8b57", markerfacecolor="#2e8b57" if ships == 1 else
                    "white")
            if ships < 1:
                ax.text(step, 116 + 3 * (i % 2), f"{100 * ships:.0f}", fontsize=7, ha="center", color=INK)
        ax.set(title=arm, xlabel="fine-tuning step (log from 20 on)", ylim=(-4, 125))
        ax.set_xscale("symlog", linthresh=20, linscale=1.5)
        ticks = [t for t in (0, 5, 10, 20, 40, 80, 160) if t <= steps[-1]]
        ax.set_xticks(ticks, ticks)
    axes[0].set_yticks([0, 20, 40, 60, 80, 100, 112], ["0", "20", "40", "60", "80", "100", "gate ships"])
    axes[0].set_ylabel("share of answers (%)")
    if title:
        fig.suptitle(title, x=0.01, ha="left", fontweight="bold")
    axes[-1].legend(loc="center left", fontsize=8)
    rings = " Open markers: the run just made, one seed." if live else ""
    return _finish(fig, f"n = {len(rows)} seeds; whiskers: 95 % t intervals, cut at 0 and 100.{rings}",
                   "attacks, new words, other tasks, larger models")


def equal_skill_figure(rows: Sequence[Mapping], arms: Sequence[str], target: float = 0.5) -> Figure:
    """Each arm at the first checkpoint with `target` exact pass: refusals kept against benign twins refused.

    Best is the upper left. An arm that some seed never brought to the target says in how many seeds it got there."""
    fig, ax = _start(7.2, 4.6)
    n = len(rows)
    for i, arm in enumerate(arms):
        colour, marker, _, _ = SERIES[i % len(SERIES)]
        x = over_seeds([100 * r[f"{arm}.over_refusal"] for r in rows])
        y = over_seeds([100 * r[f"{arm}.refusal"] for r in rows])
        reached = sum(r[f"{arm}.reached"] for r in rows)
        label = arm if reached == n else f"{arm} (skill in {reached:.0f} of {n} seeds)"
        ends = [_whiskers([e.estimate], [max(0, e.low)], [min(100, e.high)]) for e in (y, x)]
        ax.errorbar([x.estimate], [y.estimate], *ends, color=colour, marker=marker, linestyle="none",
                    fillstyle=("full", "none", "left")[i // len(SERIES) % 3], elinewidth=0.8, label=label)
    ax.set(xlabel="benign twins refused (%), lower is better", ylabel="harmful asks refused (%), higher is better",
           title=f"At equal skill ({target:.0%} exact pass)", ylim=(-4, 104))
    fig.legend(loc="outside right upper")
    return _finish(fig, f"n = {n} seeds; whiskers: 95 % t intervals, cut at 0 and 100.",
                   "skill beyond the target, other skills")


def chain_cells() -> dict[str, dict[str, str]]:
    """Cells of the chain's ledger: its four trained stages."""
    return {s: {k: f"chain.{s}.{k}" for k in CHAIN_SKILLS} for s in CHAIN_STAGES}


def path_cells(path: str) -> dict[str, dict[str, str]]:
    """Cells of one small path, a row a stage: "base", then each "after ..."."""
    stages = ("all at once",) if PATHS[path].joint else PATHS[path].order
    names = ("base", *(f"after {s}" for s in stages))
    return {name: {k: f"{path}.{i}.{k}" for k in SKILLS} for i, name in enumerate(names)}


def last_cells() -> dict[str, dict[str, str]]:
    """Cells of every small path at its end: what each way of training kept."""
    return {name: {k: f"{name}.last.{k}" for k in SKILLS} for name in PATHS}


def ledger_figure(rows: Sequence[Mapping], cells: Mapping[str, Mapping[str, str]], title: str,
                  not_measured: str = "skills that nobody thought of") -> Figure:
    """Stages down, skills across; each cell its mean in percent over its interval, darker is higher.

    `cells`: {stage: {skill: key of the rows}}; all stages list the same skills."""
    stages, skills = list(cells), list(next(iter(cells.values())))
    table = [[over_seeds([100 * r[cells[s][k]] for r in rows]) for k in skills] for s in stages]
    fig, ax = _start(1.6 + 1.0 * len(skills), 1.6 + 0.6 * len(stages))
    ax.imshow([[e.estimate for e in line] for line in table], cmap="Greys", vmin=0, vmax=130, aspect="auto")
    for i, line in enumerate(table):
        for j, e in enumerate(line):
            ax.text(j, i, f"{e.estimate:.0f}\n[{max(0, e.low):.0f}, {min(100, e.high):.0f}]", ha="center",
                    va="center", fontsize=8, color="white" if e.estimate > 75 else INK)
    ax.set_xticks(range(len(skills)), [k.replace("_", " ") for k in skills])
    ax.set_yticks(range(len(stages)), stages)
    ax.grid(False)
    ax.set_title(title)
    return _finish(fig, f"percent; n = {len(rows)} seeds; in brackets: 95 % t intervals, cut at 0 and 100.",
                   not_measured)
