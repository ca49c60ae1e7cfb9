"""The two pictures of D5, from its recorded evidence: slices over the threshold, and arms between skill and copying.

Left out: seeds one by one (they are in the evidence file).
"""

import textwrap
from collections.abc import Mapping

from matplotlib.figure import Figure

from lifecycle_lib.lab.figures import SERIES, _finish, _start, _whiskers
from lifecycle_lib.lab.studies.dedup import ARMS

THRESHOLDS = ("off", "0.95", "0.9", "0.8", "0.7", "0.6")
LINES = ("mean", "REVERSAL", "messy", "EN-B", "verbatim")
SCOPE = "real corpora, larger models, the seconds the filter itself takes"


def _effects(evidence: Mapping) -> dict[str, Mapping]:
    found = {row["name"]: row for row in evidence["effects"]}
    if missing := [f"{arm}: {what}" for arm in ARMS for what in LINES if f"{arm}: {what}" not in found]:
        raise ValueError(f"no effect {missing[0]!r} in the evidence; record it with: lifecycle evidence D5")
    return found


def _facts(evidence: Mapping) -> str:
    return f"n = {len(evidence['seeds'])} seeds; bars: 95 % t intervals over seeds."


def threshold_figure(evidence: Mapping) -> Figure:
    """Accuracy by slice, its natural mean, and pages completed word for word, against the filter's threshold."""
    found = _effects(evidence)
    fig, ax = _start(7.6, 3.9)
    for shift, (what, (colour, marker, line, _)) in enumerate(zip(LINES, SERIES)):
        rows = [found[f"{t}: {what}"] for t in THRESHOLDS]
        value, low, high = ([100 * r[k] for r in rows] for k in ("estimate", "low", "high"))
        label = "pages word for word" if what == "verbatim" else what if what == "mean" else f"slice {what}"
        ax.errorbar([i + (shift - 2) * .05 for i in range(len(rows))], value, _whiskers(value, low, high), color=colour,
                    marker=marker, linestyle=line, label=label)
    ax.set_xticks(range(len(THRESHOLDS)), ["no filter", *THRESHOLDS[1:]])
    ax.set(xlabel="near copies removed from this Jaccard on (3-word shingles), shortest kept", ylabel="share right (%)",
           ylim=(-4, 104))
    fig.legend(loc="outside upper center", ncols=5)
    return _finish(fig, _facts(evidence), SCOPE)


def trade_figure(evidence: Mapping) -> Figure:
    """Every arm: REVERSAL accuracy against pages completed word for word. Good is top left."""
    found = _effects(evidence)
    fig, ax = _start(7.6, 4.2)
    places: list[tuple[float, float, list[str]]] = []  # arms that lie together share a label
    for arm in ARMS:
        x, y = ({k: 100 * found[f"{arm}: {what}"][k] for k in ("estimate", "low", "high")}
                for what in ("verbatim", "REVERSAL"))
        colour, marker, _, _ = SERIES[0 if " " not in arm else 1 if arm.split()[1] in ("protected", "pages") else 2]
        ax.errorbar(x["estimate"], y["estimate"], _whiskers([y["estimate"]], [y["low"]], [y["high"]]),
                    _whiskers([x["estimate"]], [x["low"]], [x["high"]]), color=colour, marker=marker)
        near = [p for p in places if abs(p[0] - x["estimate"]) < 4 and abs(p[1] - y["estimate"]) < 5]
        if near:
            near[0][2].append(arm)
        else:
            places.append((x["estimate"], y["estimate"], [arm]))
    for x, y, arms in places:
        names = ", ".join(arm.replace("off", "no filter").replace(" ", "\u00a0") for arm in arms)  # break between arms
        ax.annotate(textwrap.fill(names, 27), (x, y), xytext=(8, 0 if len(arms) > 1 else 5), fontsize=9,
                    textcoords="offset points", va="center" if len(arms) > 1 else "bottom")
    ax.set(xlabel="pages completed word for word (%)", ylabel="REVERSAL right (%)", xlim=(-5, 118), ylim=(-4, 104))
    return _finish(fig, _facts(evidence), SCOPE)
