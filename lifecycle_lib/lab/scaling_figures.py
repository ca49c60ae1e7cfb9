"""Figures of the scaling study, from the rows of its evidence (a row a seed, see lab/studies/scaling.py).

Means over seeds with 95 % t intervals, unless said. Left out: colour as the only cue, as everywhere in this project.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from lifecycle_lib.core.stats import Effect, paired_effect
from lifecycle_lib.lab.design import Row
from lifecycle_lib.lab.figures import INK, SERIES, _finish, _start, _whiskers
from lifecycle_lib.lab.studies.scaling import BUDGETS, GRID, KNOWN, PROXY, RECIPES, grid_runs, minima
from lifecycle_lib.lab.studies.scaling_fit import fit_law, line_forecast
from lifecycle_lib.lab.studies.scaling_world import BOUNDARY, NUMBERS, PAIRS, World, irreducible

GREY = "#808080"


def of_key(rows: Sequence[Row], key: str) -> Effect:
    """Mean of one number over seeds with its t interval."""
    return paired_effect([r[key] for r in rows], [0.0] * len(rows))


def show_numbers(evidence: Mapping, *names: str, digits: int = 3) -> None:
    """Print recorded effects with as many digits as a loss needs. Raises ValueError for an effect that is not there."""
    rows = {row["name"]: row for row in evidence["effects"]}
    if missing := [name for name in names if name not in rows]:
        raise ValueError(f"no effect {missing[0]!r}; there are {'; '.join(rows)}")
    width = max(map(len, names))
    for row in (rows[name] for name in names):
        value, low, high = (f"{row[k]:+.{digits}f}" for k in ("estimate", "low", "high"))
        print(f"{row['name']:<{width}}  {value} [{low}, {high}] {row['unit']}")
    print(f"{evidence['interval']}, {len(evidence['seeds'])} seeds")


def _points(ax, x: Sequence[float], effects: Sequence[Effect], **look) -> None:
    ax.errorbar(x, [e.estimate for e in effects],
                _whiskers([e.estimate for e in effects], [e.low for e in effects], [e.high for e in effects]), **look)


def isoflop_figure(rows: Sequence[Row], live: Mapping[float, Sequence[tuple[float, float]]] | None = None) -> Figure:
    """Loss against size, a curve a budget; a bar under each is the interval of its best size. `live`: {budget:
    [(N, loss), ...]} of runs just made, drawn as rings."""
    fig, ax = _start(7.6, 4.6)
    for flop, (colour, marker, line, _) in zip(BUDGETS, SERIES):
        sizes = [n for n, _, _ in grid_runs(rows, [flop])]
        losses = [of_key(rows, f"grid {flop:.1e} {w}.loss") for w in GRID[flop]]
        _points(ax, sizes, losses, color=colour, marker=marker, linestyle=line, label=f"C = {flop:.1e}")
        best = of_key([{"x": float(np.log(r[f"best N {flop:.1e}"]))} for r in rows], "x")
        low = min(e.estimate for e in losses)
        ax.plot(np.exp([best.low, best.high]), [low - 0.008] * 2, color=colour, linewidth=5, solid_capstyle="butt")
    for runs in (live or {}).values():
        ax.plot(*zip(*runs), linestyle="none", marker="o", markersize=12, markerfacecolor="none", color=INK,
                markeredgewidth=1.8, label="this seed, just trained")
    ax.axhline(irreducible(), color=GREY, linewidth=1)
    ax.text(1300, irreducible() + 0.004, "E, the noise that no model removes", fontsize=9, color=GREY)
    ax.set(xscale="log", xlabel="parameters N", ylabel="loss (nats a counted token)",
           title="Every budget has a best size, and it grows")
    fig.legend(*_once(ax), loc="outside upper center", ncols=3)
    return _finish(fig, f"n = {len(rows)} seeds; whiskers: 95 % t intervals of the loss; thick bars: the same for the "
                        "best N (parabola by seed).", "deeper models, other text, larger budgets")


def cost_figure(rows: Sequence[Row]) -> Figure:
    """Compute that the next 0.01 nat costs, by budget, from each seed's own law: E fitted, and E given."""
    fig, ax = _start(6.6, 3.4)
    for (name, floor), (colour, marker, line, _) in zip({"E fitted": None, "E given": irreducible()}.items(), SERIES):
        laws = [fit_law(grid_runs([r]), floor) for r in rows]
        prices = [of_key([{"x": float(np.log(law.flop_for(law.frontier(c) - 0.01) - c))} for law in laws], "x")
                  for c in BUDGETS]
        _points(ax, BUDGETS, [Effect(*np.exp([e.estimate, e.low, e.high]), e.n) for e in prices], color=colour,
                marker=marker, linestyle=line, label=f"the next 0.01 nat, {name}")
    ax.plot(BUDGETS, BUDGETS, color=GREY, linestyle=":", label="all that was spent so far")
    ax.set(xscale="log", yscale="log", xlabel="compute spent (FLOP)", ylabel="compute to pay (FLOP)",
           title="The same step costs more each time")
    ax.legend(loc="upper left")
    return _finish(fig, f"n = {len(rows)} seeds, a law each; whiskers: 95 % t intervals.",
                   "whether the next 0.01 nat is worth it")


def forecast_figure(rows: Sequence[Row]) -> Figure:
    """The frontier, and what the first budgets foresee: a line in log C, the law, the law with E forced to 0."""
    fig, ax = _start(7.2, 4.2)
    floor, seen = irreducible(), BUDGETS[:KNOWN]
    known = [minima(rows)[c].loss - floor for c in seen]
    x = np.exp(np.linspace(np.log(BUDGETS[0]), np.log(BUDGETS[-1]), 60))
    runs = grid_runs(rows, seen)
    drawn = {"straight line": np.array(line_forecast(np.log(seen), known, np.log(x))),
             "law, E fitted": fit_law(runs).frontier(x) - floor,
             "law, E forced to 0": fit_law(runs, 0.0).frontier(x) - floor,
             "law, E known": fit_law(runs, floor).frontier(x) - floor}
    for (label, y), (colour, _, line, _) in zip(drawn.items(), SERIES[1:]):
        ax.plot(x, y, color=colour, linestyle=line, label=label)
    bottoms = [of_key([{"x": minima([r])[c].loss - floor} for r in rows], "x") for c in BUDGETS]
    _points(ax, BUDGETS, bottoms, color=INK, marker="o", linestyle="none", label="measured")
    ax.axvline(np.sqrt(BUDGETS[KNOWN - 1] * BUDGETS[KNOWN]), color=GREY, linewidth=1)
    ax.text(np.sqrt(BUDGETS[KNOWN - 1] * BUDGETS[KNOWN]) * 1.1, known[0] * 0.95, "not seen by the fits", fontsize=9,
            color=GREY)
    ax.set(xscale="log", xlabel="compute C = 6ND (FLOP)", ylabel="loss above E (nats)", ylim=(0, None),
           title="Three budgets forecast two more")
    ax.legend(loc="lower left")
    return _finish(fig, f"n = {len(rows)} seeds; fits on their mean; whiskers: 95 % t intervals.",
                   "budgets beyond these, other worlds")


def quality_figure(rows: Sequence[Row], crossing: Sequence[float] | None) -> Figure:
    """Loss on dirty rows minus loss on gated rows at N, by budget: dirty at 2N, and the control, dirty at N.

    `crossing`: where the first line last changes sign, as log10 C with its ends."""
    fig, ax = _start(7.0, 4.0)
    arms = {"dirty at 2N": "dirty - gated", "control: dirty at N": "dirty at N - gated"}
    for (label, key), (colour, marker, line, _) in zip(arms.items(), SERIES):
        _points(ax, BUDGETS, [of_key(rows, f"{key} {c:.1e}") for c in BUDGETS], color=colour, marker=marker,
                linestyle=line, label=label)
    ax.axhline(0, color=GREY, linewidth=1)
    if crossing:
        ax.axvspan(10 ** crossing[1], 10 ** crossing[2], color=GREY, alpha=0.3)
    ax.set(xscale="log", xlabel="compute of each arm, gate included (FLOP)", ylabel="loss minus gated at N (nats)",
           title="Above zero the gated rows are ahead")
    ax.legend(loc="lower center")
    return _finish(fig, f"n = {len(rows)} seeds; whiskers: 95 % paired t intervals; band: 95 % bootstrap over seeds of "
                        "the last change of sign at 2N.", "other gates, a crawl of another size, other kinds of junk")


def recipe_figure(rows: Sequence[Row]) -> Figure:
    """Six recipes at a fifth of the tokens and at all of them: crossing lines are rank flips."""
    fig, ax = _start(6.8, 4.2)
    looks = [*SERIES, (INK, "x", (0, (1, 3)), "")]
    for name, (colour, marker, line, _) in zip(RECIPES, looks):
        ends = [of_key(rows, f"recipe {name} {s}.loss") for s in (PROXY, 1.0)]
        _points(ax, [0, 1], ends, color=colour, marker=marker, linestyle=line, label=name)
    ax.set_xticks([0, 1], [f"{PROXY:g}x tokens (proxy)", "1x tokens (full)"])
    ax.set(xlim=(-0.15, 1.15), ylabel="loss (nats a counted token)", title="Where lines cross, the proxy ranks wrong")
    fig.legend(loc="outside right center")
    return _finish(fig, f"n = {len(rows)} seeds; whiskers: 95 % t intervals.", "other model sizes, other recipes")


def always_yes(rows: Sequence[Row]) -> list[float]:
    """By seed, the share of the scored boundary pairs (held out from training) that always answering yes gets right."""
    yes = (PAIRS // NUMBERS <= PAIRS % NUMBERS).float()
    return [yes[World(int(r["seed"])).held_out & BOUNDARY].mean().item() for r in rows]


def slice_figure(rows: Sequence[Row]) -> Figure:
    """Against the loss of every run of the grid: facts known, and boundary days never trained on."""
    fig, ax = _start(7.0, 4.0)
    labels = [f"grid {c:.1e} {w}" for c in BUDGETS for w in GRID[c]]
    loss = [of_key(rows, f"{k}.loss").estimate for k in labels]
    most = max(of_key(rows, f"{k}.facts_known").estimate for k in labels)
    for key, scale, name, (colour, marker, _, _) in (
            ("facts_known", 100 / most, f"facts known (100 = {most:.0f} facts)", SERIES[0]),
            ("boundary", 100, "boundary days right (%)", SERIES[1])):
        effects = [of_key(rows, f"{k}.{key}") for k in labels]
        _points(ax, loss, [Effect(scale * e.estimate, scale * e.low, scale * e.high, e.n) for e in effects],
                color=colour, marker=marker, linestyle="none", label=name)
    yes = 100 * float(np.mean(always_yes(rows)))
    ax.axhline(yes, color=GREY, linewidth=1)
    ax.set(xlabel="loss (nats a counted token), better to the left", ylabel="percent", ylim=(0, 118),
           title="One follows the loss, one does not")
    ax.legend(loc="upper right")
    return _finish(fig, f"n = {len(rows)} seeds, {len(labels)} runs each; whiskers: 95 % t intervals; line: always "
                        f"answering yes gets on the same pairs ({yes:.0f} %).",
                   "slices nobody thought of")


def _once(ax) -> tuple[list, list]:
    handles, labels = ax.get_legend_handles_labels()
    found = dict(zip(labels, handles))
    return list(found.values()), list(found)
