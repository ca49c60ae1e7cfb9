"""Figures of the forgetting studies, from recorded rows (a row a seed) or a live curve.

Skill and refusal share one axis with the launch gate's verdicts as a strip above; arms at equal skill, a dot a seed,
since shares near 0 and 100 spread in no t interval; the ledger as a table of shades with 95 % t intervals in the cells.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from lifecycle_lib.core.stats import Effect, paired_effect
from lifecycle_lib.lab.figures import INK, SERIES, _finish, _start
from lifecycle_lib.lab.studies.erosion import Curve, interpolated
from lifecycle_lib.lab.studies.ledger import CHAIN_SKILLS, CHAIN_STAGES, PATHS, SCORED

LINES = {"exact": "exact pass on unseen cases", "refusal": "refusal of harmful asks",
         "over_refusal": "over-refusal of benign twins"}
NAMES = {"no_policy": "no policy", "no_claim": "valid,\nno claim", "bits": "documents\n(bits)"}


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
    """Skill, refusal and over-refusal at the checkpoints of a harmless fine-tune, a panel an arm, in percent.

    Thin lines are seeds, the marked line is their mean. The strip on top says what the launch gate decided: filled, it
    ships in every seed; open, in the percent written. `live`: {arm: curve} of a run just made, each a panel more."""
    panels = {arm: curves_of(rows, arm) for arm in arms} | {f"{a}, your run": [c] for a, c in (live or {}).items()}
    fig, first = _start(max(6.0, 3.6 * len(panels)), 4.4)
    first.remove()
    axes = fig.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for ax, (name, curves) in zip(axes, panels.items()):
        steps = [c["step"] for c in curves[0]]
        for (key, label), (colour, marker, line, _) in zip(LINES.items(), SERIES):
            values = [[100 * c[i][key] for i in range(len(steps))] for c in curves]
            if len(curves) > 1:
                ax.plot(range(len(steps)), np.transpose(values), color=colour, linewidth=0.6, alpha=0.35)
            ax.plot(range(len(steps)), np.mean(values, 0), color=colour, marker=marker, linestyle=line, markersize=4,
                    label=label)
        for i in range(len(steps)):
            if "ships" not in curves[0][i]:
                continue
            ships = np.mean([c[i]["ships"] for c in curves])
            ax.plot(i, 112, marker="s", markersize=7, color="#2e8b57", markerfacecolor="#2e8b57" if ships == 1 else
                    "white")
            if ships < 1:
                ax.text(i, 116 + 3 * (i % 2), f"{100 * ships:.0f}", fontsize=7, ha="center", color=INK)
        ax.set(title=name, xlabel="fine-tuning step of a checkpoint", ylim=(-4, 125))
        ax.set_xticks(range(len(steps)), steps)
    axes[0].set_yticks([0, 20, 40, 60, 80, 100, 112], ["0", "20", "40", "60", "80", "100", "gate ships"])
    axes[0].set_ylabel("share of answers (%)")
    if title:
        fig.suptitle(title, x=0.01, ha="left", fontweight="bold")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    own = " Gate: filled, ships in all seeds; else in this % of them."
    own += " Your run: one seed, another model, its own steps." if live else ""
    return _finish(fig, f"n = {len(rows)} seeds, thin lines; marked: their mean.{own}",
                   "attacks, new words, other tasks, larger models")


def equal_skill_figure(rows: Sequence[Mapping], arms: Sequence[str], target: float = 0.5) -> Figure:
    """Each arm where exact pass crosses `target`: refusals kept, and benign twins refused, a dot a seed, a bar at the
    median. A seed that never got there has no dot, and the arm says how many did."""
    fig, first = _start(8.2, 1.6 + 0.34 * len(arms))
    first.remove()
    axes = fig.subplots(1, 2, sharey=True)
    labels = []
    for i, arm in enumerate(arms):
        colour, marker, _, _ = SERIES[i % len(SERIES)]
        for ax, key in zip(axes, ("refusal", "over_refusal")):
            values = [interpolated(c, key, target) for c in curves_of(rows, arm)]
            there = [100 * v for v in values if v is not None]
            ax.plot(there, [i + 0.12 * (k % 3 - 1) for k in range(len(there))], color=colour, marker=marker,
                    linestyle="none", markersize=4, alpha=0.6)
            if there:
                ax.plot([np.median(there)] * 2, [i - 0.35, i + 0.35], color=INK, linewidth=2)
        labels.append(arm if len(there) == len(rows) else f"{arm} ({len(there)} of {len(rows)} seeds)")
    axes[0].set_yticks(range(len(arms)), labels)
    axes[0].invert_yaxis()
    axes[0].set(xlabel="harmful asks refused (%), higher is better", xlim=(-4, 104))
    axes[1].set(xlabel="benign twins refused (%), lower is better", xlim=(-4, 104))
    fig.suptitle(f"At exactly {target:.0%} exact pass", x=0.01, ha="left", fontweight="bold")
    return _finish(fig, f"n = {len(rows)} seeds, a dot each; bar: median; interpolated between checkpoints.",
                   "skill beyond the target, other skills")


def chain_cells() -> dict[str, dict[str, str]]:
    """Cells of the chain's ledger: its four trained stages."""
    return {s: {k: f"chain.{s}.{k}" for k in (*CHAIN_SKILLS, "bits")} for s in CHAIN_STAGES}


def path_cells(path: str) -> dict[str, dict[str, str]]:
    """Cells of one small path, a row a stage: "base", then each "after ..."."""
    stages = ("all at once",) if PATHS[path].joint else PATHS[path].order
    names = ("base", *(f"after {s}" for s in stages))
    return {name: {k: f"{path}.{i}.{k}" for k in SCORED} for i, name in enumerate(names)}


def last_cells() -> dict[str, dict[str, str]]:
    """Cells of every small path at its end: what each way of training kept."""
    return {name: {k: f"{name}.last.{k}" for k in SCORED} for name in PATHS}


def ledger_figure(rows: Sequence[Mapping], cells: Mapping[str, Mapping[str, str]], title: str,
                  not_measured: str = "skills that nobody thought of") -> Figure:
    """Stages down, skills across; each cell its mean in percent over its interval, darker is better. The column "bits"
    is in bits a token of held-out documents, where fewer is better.

    `cells`: {stage: {skill: key of the rows}}; all stages list the same skills."""
    stages, skills = list(cells), list(next(iter(cells.values())))
    fig, ax = _start(1.6 + 1.0 * len(skills), 1.6 + 0.6 * len(stages))
    shade = np.zeros((len(stages), len(skills)))
    for i, stage in enumerate(stages):
        for j, skill in enumerate(skills):
            bits = skill == "bits"
            e = over_seeds([(1 if bits else 100) * r[cells[stage][skill]] for r in rows])
            shade[i, j] = max(0.0, 100 - 10 * e.estimate) if bits else e.estimate
            text = f"{e.estimate:.1f}\n[{e.low:.1f}, {e.high:.1f}]" if bits else \
                f"{e.estimate:.0f}\n[{max(0, e.low):.0f}, {min(100, e.high):.0f}]"
            ax.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if shade[i, j] > 75 else INK)
    ax.imshow(shade, cmap="Greys", vmin=0, vmax=130, aspect="auto")
    ax.set_xticks(range(len(skills)), [NAMES.get(k, k) for k in skills])
    ax.set_yticks(range(len(stages)), stages)
    ax.grid(False)
    ax.set_title(title)
    return _finish(fig, f"percent (bits: bits a token, fewer is better); n = {len(rows)} seeds; in brackets: 95 % t "
                   "intervals, shares cut at 0 and 100.", not_measured)
