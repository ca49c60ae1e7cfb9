"""Figures of the messy study: measured rates, shares of the gap, rows against accuracy, distance and gap."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from lifecycle_lib.core.stats import wilson
from lifecycle_lib.lab.figures import INK, SERIES, _finish, _start, _whiskers
from lifecycle_lib.lab.studies.messy import AMONG, CAUSES, LONGER, MACHINE, MORE, PLAYERS, ROWS, WRITERS

RATE_NAMES = {"lower_start": "small letter at the start", "lower_i": "i for I", "no_stop": "no stop at the end",
              "no_apostrophe": "dont for don't", "several": "several sentences", "bang": "an exclamation mark"}


def rates_figure(rates: Mapping, not_measured: str = "other shops, other years, other languages") -> Figure:
    """Measured typing rates of four registers with 95 % Wilson intervals, and words with a typo."""
    fig, ax = _start(8.2, 4.2)
    names = [*RATE_NAMES, "typo"]
    for shift, (register, of), (colour, marker, _, _) in zip((0.27, 0.09, -0.09, -0.27), rates["registers"].items(),
                                                             SERIES):
        k, n = (sum(r[key] for r in of["typo"].values()) for key in "kn")
        low, high = wilson(k, n)
        rows = [*(of[name] for name in RATE_NAMES), {"rate": k / n, "low": low, "high": high}]
        value, a, b = ([100 * r[key] for r in rows] for key in ("rate", "low", "high"))
        ax.errorbar(value, [len(names) - 1 - i + shift for i in range(len(names))], xerr=_whiskers(value, a, b),
                    color=colour, marker=marker, linestyle="none", label=f"{register} ({of['texts']:,} texts)")
    ax.set_yticks(range(len(names) - 1, -1, -1), [*RATE_NAMES.values(), "typo (of words of 5+ letters)"])
    ax.set(xlabel="percent of occasions", title="How people type, counted", xlim=(-1, 100))
    fig.legend(loc="outside upper right", ncols=4)
    return _finish(fig, "n texts in the legend (each rate has its own n); bars: 95 % Wilson intervals.", not_measured)


def _of(evidence: Mapping, name: str) -> tuple[float, float, float]:
    row = next(r for r in evidence["effects"] if r["name"] == name)
    return tuple(100 * row[key] for key in ("estimate", "low", "high"))  # type: ignore[return-value]


def causes_figure(evidence: Mapping, live: Mapping[str, float] | None = None,
                  not_measured: str = "wordings and second matters other than ours") -> Figure:
    """Points lost to each cause: exact Shapley shares of the whole gap, and of typing alone on the teacher's wordings.

    `live`: this run's shares of the whole gap by cause, drawn beside the recorded ones."""
    fig, ax = _start(7.6, 3.9)
    sets = [("whole gap", PLAYERS, "lost to {}"), ("typing alone, teacher's wordings", CAUSES,
                                                  "lost to {}, teacher's wordings")]
    for shift, (label, causes, name), (colour, _, _, hatch) in zip((0.2, -0.2), sets, SERIES):
        y = [len(PLAYERS) - 1 - i + shift for i in range(len(causes))]
        value, low, high = zip(*(_of(evidence, name.format(c)) for c in causes))
        ax.barh(y, value, 0.36, xerr=_whiskers(value, low, high), facecolor="white", edgecolor=colour,
                hatch=hatch or None, label=label, error_kw={"ecolor": colour})
    if live:
        ax.plot([100 * live[p] for p in PLAYERS], [len(PLAYERS) - 1 - i + 0.2 for i in range(len(PLAYERS))], "D",
                color="#8f8f8f", label="whole gap, this run", markersize=5)
    ax.axvline(0, color="#808080", linewidth=1)
    ax.set_yticks(range(len(PLAYERS) - 1, -1, -1), PLAYERS)
    ax.set(xlabel="points of accuracy lost", title="Who owns the gap")
    fig.legend(loc="outside upper right", ncols=3)
    n = len(evidence["seeds"])
    return _finish(fig, f"n = {n} seeds, 64 exams of {evidence['n_cases']} messages each; bars: 95 % t intervals over "
                        "seeds of exact Shapley shares.", not_measured)


def rows_figure(evidence: Mapping, live: Sequence[tuple[int, float]] = (),
                not_measured: str = "rows that customers sent; answers that people wrote") -> Figure:
    """Accuracy against rows of the exam's writer, beside what augmentation and more synthetic rows reach."""
    fig, ax = _start(7.6, 5.2)
    x = [3, *ROWS]  # none stands at 3 on the log axis
    names = ["teacher", *AMONG.values()]
    for what, label, (colour, marker, line, _) in zip(("clean", "messy", "fresh", "typed"), (
            "offline (the teacher's own messages)", "messy messages", "messy, in wordings no row holds",
            "the teacher's wordings, typed"), SERIES):
        value, low, high = zip(*(_of(evidence, f"{n}: {what}") for n in names))
        ax.errorbar(x, value, _whiskers(value, low, high), color=colour, marker=marker, linestyle=line, label=label)
    for (name, label), line in zip((("typed as measured", "messy, augmented at the measured rates"),
                                    ("random noise", "messy, augmented by guess"),
                                    (MORE, "messy, 10,000 more synthetic rows, 3 x the steps"),
                                    (LONGER, "messy, 3 x the steps"),
                                    (MACHINE, "messy, 3,000 such rows, 10 % of answers wrong")),
                                   ("-", "--", ":", (0, (1, 4)), "-.")):
        ax.axhline(_of(evidence, f"{name}: messy")[0], color="#8f8f8f", linestyle=line, linewidth=1.4, label=label)
    if live:
        ax.plot([max(3, k) for k, _ in live], [100 * v for _, v in live], "D", color=INK, markerfacecolor="white",
                label="messy, this run")
    ax.set_xscale("log")
    ax.set_xticks(x, ["none", *map(str, ROWS)])
    ax.minorticks_off()
    ax.set(ylim=(0, 103), xlabel="rows of the exam's writer among the training rows", ylabel="right answers (%)",
           title="What a row of the exam's writer is worth")
    fig.legend(loc="outside upper right", ncols=2)
    n = len(evidence["seeds"])
    return _finish(fig, f"n = {n} seeds, {evidence['n_cases']} messages an exam; bars: 95 % t intervals over seeds; "
                        "grey lines: means, messy.", not_measured)


def distance_figure(evidence: Mapping, not_measured: str = "writers other than these eight") -> Figure:
    """Each writer's distance from the exam's before training, and how far its reader falls short after it. "customers"
    is the exam's own writer: two samples of one text, the floor, and no part of r."""
    fig, ax = _start(7.2, 4.0)
    for i, name in enumerate(WRITERS):
        d, g = evidence["extra"]["writers"][name]["divergence"], 100 * evidence["extra"]["writers"][name]["gap"]
        colour, marker, _, _ = SERIES[i % len(SERIES)]
        ax.plot(d, g, marker, color=colour, markerfacecolor="white" if i >= len(SERIES) else colour)
        dx, dy, side = {"typed as measured": (-7, -3, "right"), "a quarter in customers' words": (7, -8, "left"),
                        "customers": (6, -13, "left")}.get(
            name, (7, 3, "left"))
        shown = "the exam's writer (floor)" if name == "customers" else name
        ax.annotate(shown, (d, g), xytext=(dx, dy), textcoords="offset points", fontsize=8, ha=side)
    r = evidence["extra"]["correlation_over_writers"]
    ax.set(xlabel="divergence of character trigrams from the exam's writer, before training (bits)", xlim=(0, 0.36),
           ylabel="points under the teacher's offline score", ylim=(-5, 67),
           title=f"r = {r['r']:.2f} [{r['low']:.2f}, {r['high']:.2f}]")
    return _finish(fig, f"n = {r['n']} writers, means of {len(evidence['seeds'])} seeds; interval: {r['interval']}.",
                   not_measured)
