"""Figures that the report and the notebooks share, one look for all.

Legible in greyscale: series differ in marker, line style and hatch, not in colour alone. Every figure says under its
axes how many cases or seeds it rests on, what its intervals are, and what was not measured here (a required argument:
a figure that does not say what it leaves out is read as if it left out nothing).

Left out: interactive figures.
"""

import io
import re
import textwrap
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lifecycle_lib.core.stats import Effect, wilson

INK = "#111111"  # in a page it becomes the page's own text colour
SERIES = (  # colour, marker, line, hatch; the greys of the colours are far apart
    (INK, "o", "-", ""), ("#d1495b", "s", "--", "////"), ("#69b3e7", "^", "-.", "...."),
    ("#8f8f8f", "D", ":", "xxxx"), ("#5b3f8c", "v", (0, (5, 1, 1, 1, 1, 1)), "----"))
FONT_PT = 9
History = Sequence[Mapping[str, float]]


def style() -> None:
    """Set matplotlib's defaults for this project: 9 pt or larger, 110 dpi, no box, light grid."""
    plt.rcParams.update({
        "figure.dpi": 110, "savefig.dpi": 110, "figure.constrained_layout.use": True,
        "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans", "Arial", "Helvetica"],
        "font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left",
        "axes.labelsize": 10, "xtick.labelsize": FONT_PT, "ytick.labelsize": FONT_PT, "legend.fontsize": FONT_PT,
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
        "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.labelcolor": INK, "text.color": INK,
        "grid.color": "#808080", "grid.alpha": 0.25, "grid.linewidth": 0.6, "legend.frameon": False,
        "lines.linewidth": 1.6, "lines.markersize": 6, "errorbar.capsize": 3,
        "svg.fonttype": "none", "svg.hashsalt": "lifecycle"})


def _start(width: float, height: float) -> tuple[Figure, Axes]:
    style()
    return plt.subplots(figsize=(width, height))


def _finish(fig: Figure, facts: str, not_measured: str) -> Figure:
    """Write `facts` (n, kind of interval) and the 'not measured here' line below the axes."""
    if not not_measured.strip():
        raise ValueError("not_measured is empty; say what this figure does not show, for example 'other seeds'")
    line = f"{facts}\nNot measured here: {not_measured}."
    columns = int(fig.get_figwidth() * 13.5)
    text = "\n".join(textwrap.fill(part, columns) for part in line.splitlines())
    fig.supxlabel(text, x=0.01, ha="left", fontsize=FONT_PT, color="#606060")
    return fig


def _whiskers(values: Sequence[float], low: Sequence[float], high: Sequence[float]) -> list[list[float]]:
    return [[max(0.0, v - a) for v, a in zip(values, low)], [max(0.0, b - v) for v, b in zip(values, high)]]


def scorecard_figure(stages: Sequence[Mapping], *, not_measured: str, width: float = 7.6,
                     height: float = 3.5) -> Figure:
    """Exact pass and invented claims by stage, in percent, each with its 95 % Wilson interval.

    `stages`: rows of a run's report (name, n_cases, exact_pass, invented_claim_rate, with _low and _high).
    """
    if not stages:
        raise ValueError("no stages to draw; give the rows of a run's report")
    fig, ax = _start(width, height)
    labels = {"exact_pass": "exact pass (higher is better)",
              "invented_claim_rate": "invented claims (lower is better)"}
    for shift, (key, label), (colour, marker, line, _) in zip((-0.05, 0.05), labels.items(), SERIES):
        value, low, high = ([100 * row[key + end] for row in stages] for end in ("", "_low", "_high"))
        ax.errorbar([i + shift for i in range(len(stages))], value, _whiskers(value, low, high), color=colour,
                    marker=marker, linestyle=line, label=label)
    ax.set(ylim=(-3, 103), ylabel="share of answers (%)", xlabel="stage")
    ax.set_xticks(range(len(stages)), [row["name"] for row in stages])
    fig.legend(loc="outside upper center", ncols=2)
    n = " or ".join(map(str, sorted({row["n_cases"] for row in stages})))
    return _finish(fig, f"n = {n} frozen cases a stage; bars: 95 % Wilson intervals.", not_measured)


def learning_curve(histories: Mapping[str, History | Sequence[History]], *, not_measured: str, key: str = "loss",
                   ylabel: str = "loss (nats per token)", title: str = "", smooth: int = 1, width: float = 6.4,
                   height: float = 3.6) -> Figure:
    """`key` against the step, one line a label. A label's value is one history or one a seed (mean, and range).

    A history is what training writes: rows with "step" and numbers. `smooth`: running mean over this many steps.
    """
    if not histories:
        raise ValueError("no histories to draw; give {label: history}")
    fig, ax = _start(width, height)
    n_seeds = set()
    for (label, given), (colour, marker, line, _) in zip(histories.items(), SERIES * len(histories)):
        runs = [given] if given and isinstance(given[0], Mapping) else list(given)
        if not runs or not all(runs):
            raise ValueError(f"history {label!r} has no rows; train first")
        if any(key not in row for run in runs for row in run):
            raise ValueError(f"history {label!r} has no {key!r} in some row; it has {', '.join(runs[0][0])}")
        n_seeds.add(len(runs))
        steps = [row["step"] for row in runs[0]][:min(map(len, runs))]
        curves = [_running_mean([row[key] for row in run], smooth)[:len(steps)] for run in runs]
        mean = [sum(at) / len(at) for at in zip(*curves)]
        ax.plot(steps, mean, color=colour, linestyle=line, marker=marker, markevery=max(1, len(steps) // 8),
                label=label)
        if len(runs) > 1:
            ax.fill_between(steps, [min(at) for at in zip(*curves)], [max(at) for at in zip(*curves)], color=colour,
                            alpha=0.15, linewidth=0)
    ax.set(xlabel="training step", ylabel=ylabel, title=title)
    ax.legend()
    n = " or ".join(map(str, sorted(n_seeds)))
    facts = f"n = {n} seed{'' if n == '1' else 's'} a line" + ("." if n == "1" else "; band: range over seeds.")
    return _finish(fig, facts if smooth == 1 else f"{facts} Running mean over {smooth} steps.", not_measured)


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    return [sum(part := values[max(0, i + 1 - width):i + 1]) / len(part) for i in range(len(values))]


def interval_dots(effects: Mapping[str, Effect], title: str, *, xlabel: str, interval: str, not_measured: str,
                  smallest: float | None = None, width: float = 6.4) -> Figure:
    """One dot with its interval an effect, zero marked, and the smallest effect worth having if there is one.

    `interval` names the kind ("95 % paired t interval"); n is read from the effects (seeds).
    """
    if not effects:
        raise ValueError("no effects to draw; give {name: Effect}")
    fig, ax = _start(width, 1.6 + 0.4 * len(effects))
    rows = list(effects.values())
    y = range(len(rows) - 1, -1, -1)
    value = [e.estimate for e in rows]
    ax.axvline(0, color="#808080", linewidth=1)
    if smallest is not None:
        ax.axvline(smallest, color="#808080", linewidth=1.2, linestyle="--",
                   label=f"smallest effect worth having: {smallest:g}")
        fig.legend(loc="outside upper right")
    ax.errorbar(value, list(y), xerr=_whiskers(value, [e.low for e in rows], [e.high for e in rows]), color=INK,
                marker="o", linestyle="none")
    ax.set_yticks(list(y), list(effects))
    ax.set(xlabel=xlabel, title=title, ylim=(-0.6, len(rows) - 0.4))
    n = " or ".join(map(str, sorted({e.n for e in rows})))
    return _finish(fig, f"n = {n} seed{'' if n == '1' else 's'}; bars: {interval}.", not_measured)


def slice_bars(slices: Mapping[str, Mapping[str, Mapping]], *, not_measured: str, key: str = "exact_pass",
               ylabel: str = "exact pass (%)", title: str = "", width: float = 7.0, height: float = 3.6) -> Figure:
    """Bars by slice, one group a slice and one bar a label, with 95 % Wilson intervals from each slice's own n.

    `slices`: {label: {slice: {"n": cases, key: share}}}, a report's "slices" under the name it is to have.
    """
    if not slices or not all(slices.values()):
        raise ValueError("no slices to draw; give {label: report['slices']}")
    fig, ax = _start(width, height)
    names = sorted({name for part in slices.values() for name in part})
    each = 0.8 / len(slices)
    for number, (label, part) in enumerate(slices.items()):
        colour, _, _, hatch = SERIES[number % len(SERIES)]
        here = [(i, part[name]) for i, name in enumerate(names) if name in part]
        value = [100 * row[key] for _, row in here]
        ends = [wilson(round(row[key] * row["n"]), row["n"]) for _, row in here]
        bars = _whiskers(value, [100 * a for a, _ in ends], [100 * b for _, b in ends])
        ax.bar([i - 0.4 + each * (number + 0.5) for i, _ in here], value, each * 0.92, yerr=bars, facecolor="white",
               edgecolor=colour, hatch=hatch or None, linewidth=1.4, label=label, error_kw={"ecolor": colour})
    n = {name: sorted({part[name]["n"] for part in slices.values() if name in part}) for name in names}
    ax.set_xticks(range(len(names)), [f"{name}\nn = {' or '.join(map(str, n[name]))}" for name in names])
    ax.set(ylim=(0, 103), ylabel=ylabel, title=title, xlabel="slice of the evaluation")
    fig.legend(loc="outside upper right", ncols=min(6, len(slices)))
    return _finish(fig, "n under each slice; bars: 95 % Wilson intervals.", not_measured)


def to_svg(fig: Figure, label: str) -> str:
    """The figure as one <svg> element for a page, and closed: text stays text, black follows the page's colour.

    `label` is what a screen reader says.
    """
    out = io.StringIO()
    fig.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    plt.close(fig)
    svg = out.getvalue()
    svg = svg[svg.index("<svg"):].replace(INK, "currentColor").replace("#606060", "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    safe = label.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return svg.replace("<svg", f'<svg role="img" aria-label="{safe}"', 1)
