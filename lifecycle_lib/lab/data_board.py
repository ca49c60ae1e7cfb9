"""What went in: one page of figures from a gate's decision log.

Six panels: how many rows of each source and domain were kept, set aside and thrown out (95 % Wilson intervals), text
kept by source and by licence, copies by week of capture, and rows kept by slice against the fewest wanted.

The counts stream over decisions.jsonl; a field with more names than fit is cut to the largest, the rest added up.
Left out: how long rows stay in quarantine (exits.jsonl has the dates), and change between runs: `data diff`.
"""

import datetime
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lifecycle_lib.core.records import write_bytes
from lifecycle_lib.core.stats import wilson
from lifecycle_lib.corpus.decisions import stream
from lifecycle_lib.corpus.manifest import KEPT, read_manifest

ENDS = ("kept", "quarantine", "reject")
COPIES = ("exact_duplicate", "near_duplicate")
MOST = 12  # names on an axis
MAX_NAMES = 10_000


@dataclass(slots=True)
class Board:
    """Counts behind the panels. ends[field][name][end] rows, kept_bytes[field][name], weeks[Monday] (copies, rows)."""

    ends: dict[str, dict[str, Counter]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(Counter)))
    kept_bytes: dict[str, Counter] = field(default_factory=lambda: defaultdict(Counter))
    weeks: dict[str, list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0]))
    lines: int = 0
    undated: int = 0


def read_board(folder: str | Path) -> Board:
    """Count the decisions of a gate's folder. Lines of which no row could be made count under "(unreadable)".

    A copy is a row that was rejected as one; rows that were rejected or set aside before the search for copies do not
    count in the weeks. Raises ValueError for a folder without a finished run."""
    read_manifest(folder)
    board = Board()
    for d in stream(Path(folder) / "decisions.jsonl"):
        end = "kept" if d["verdict"] in KEPT else d["verdict"]
        board.lines += 1
        for by in ("source", "domain", "slice", "licence"):
            names = board.ends[by]
            name = d[by] if d[by] in names or len(names) < MAX_NAMES else "(others)"
            names[name][end] += 1
            board.kept_bytes[by][name] += d["text_bytes"] if end == "kept" else 0
        copy = d["reason"] in COPIES
        if end == "kept" or copy:
            try:
                day = datetime.date.fromisoformat(d["captured"])
            except ValueError:
                board.undated += 1
                continue
            week = board.weeks[(day - datetime.timedelta(day.weekday())).isoformat()]
            week[0] += copy
            week[1] += 1
    return board


def largest(counts: dict[str, Counter], most: int = MOST) -> list[tuple[str, Counter]]:
    """The `most` names with most rows, largest first; the others as one name "n others"."""
    ranked = sorted(counts.items(), key=lambda item: (-sum(item[1].values()), item[0]))
    if len(ranked) <= most:
        return ranked
    rest = sum((c for _, c in ranked[most - 1:]), Counter())
    return [*ranked[:most - 1], (f"{len(ranked) - most + 1:,} others", rest)]


def data_board(folder: str | Path, min_rows: int = 50) -> Figure:
    """The figure for a gate's folder. `min_rows`: the fewest kept rows a slice should have, drawn as a line; slices
    below it are marked. Raises ValueError for a folder without a finished run and for min_rows below 1."""
    if min_rows < 1:
        raise ValueError(f"min_rows={min_rows}: give 1 or more kept rows that each slice should have")
    import matplotlib.pyplot as plt

    from lifecycle_lib.lab.figures import _finish, style

    board = read_board(folder)
    style()
    names = max(len(largest(board.ends[by])) for by in ("source", "domain", "slice", "licence"))
    fig, axes = plt.subplots(3, 2, figsize=(11, 4.5 + 3 * max(2.0, 0.24 * names)))
    _rates(axes[0][0], board, "source")
    _rates(axes[0][1], board, "domain")
    _bytes(axes[1][0], board, "source")
    _bytes(axes[1][1], board, "licence")
    _weeks(axes[2][0], board)
    _coverage(axes[2][1], board, min_rows)
    handles, labels = axes[0][0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside upper right", ncols=3)
    fig.suptitle("What went in", x=0.01, ha="left", fontweight="bold")
    undated = f" {board.undated:,} kept rows and copies have no capture date." if board.undated else ""
    return _finish(fig, f"n = {board.lines:,} lines of one gate run; bars at the dots and in the weeks: 95 % Wilson "
                   f"intervals.{undated}", "whether the verdicts are right (sample the kept rows), and what a model "
                   "learns from them")


def _rates(ax: Axes, board: Board, by: str) -> None:
    from lifecycle_lib.lab.figures import SERIES

    parts = largest(board.ends[by])
    for shift, end, (colour, marker, _, _) in zip((-0.22, 0, 0.22), ENDS, SERIES):
        n = [sum(c.values()) for _, c in parts]
        share = [100 * c[end] / m for (_, c), m in zip(parts, n)]
        bounds = [wilson(c[end], m) for (_, c), m in zip(parts, n)]
        ax.errorbar(share, [i + shift for i in range(len(parts))], xerr=_error(share, bounds), color=colour,
                    marker=marker, markersize=4.5, linestyle="none", linewidth=1.1, label=end)
    _named(ax, [f"{_short(name)} ({sum(c.values()):,})" for name, c in parts])
    ax.set(xlim=(-2, 102), xlabel="share of its lines (%)", title=f"verdicts by {by} (lines)")


def _bytes(ax: Axes, board: Board, by: str) -> None:
    from lifecycle_lib.lab.figures import INK

    parts = [(name, Counter(kept=n)) for name, n in board.kept_bytes[by].items()]
    parts = largest(dict(parts))
    total = sum(c["kept"] for _, c in parts)
    unit, label = (1e6, "MB") if total >= 1e6 else (1e3, "kB")
    ax.barh(range(len(parts)), [c["kept"] / unit for _, c in parts], color="white", edgecolor=INK, hatch="////")
    for i, (_, c) in enumerate(parts):
        ax.annotate(f" {c['kept'] / total:.0%}" if total else " 0%", (c["kept"] / unit, i), va="center", fontsize=9)
    _named(ax, [_short(name) for name, _ in parts])
    ax.margins(x=0.12)
    ax.set_xlim(left=0)
    ax.set(xlabel=f"text kept ({label})", title=f"text kept by {by}")


def _weeks(ax: Axes, board: Board) -> None:
    from lifecycle_lib.lab.figures import SERIES

    ax.set(title="copies by week of capture", xlabel="week (Monday)", ylabel="copies among its rows (%)")
    if not board.weeks:
        ax.text(0.5, 0.5, "no kept row has a capture date", ha="center", transform=ax.transAxes)
        return
    weeks = sorted(board.weeks.items())
    share = [100 * copies / n for _, (copies, n) in weeks]
    bounds = [wilson(copies, n) for _, (copies, n) in weeks]
    days = [datetime.date.fromisoformat(week) for week, _ in weeks]
    colour, marker, line, _ = SERIES[0]
    ax.errorbar(days, share, _error(share, bounds), color=colour, marker=marker, markersize=4.5, linestyle=line,
                linewidth=1)
    top = 110 * max(high for _, high in bounds)
    ax.set_ylim(-0.04 * top, top)
    ax.tick_params(axis="x", rotation=30)
    if len(days) == 1:
        ax.set_xticks(days, [days[0].isoformat()])


def _coverage(ax: Axes, board: Board, min_rows: int) -> None:
    from lifecycle_lib.lab.figures import SERIES

    parts = sorted(((c["kept"], name, sum(c.values())) for name, c in board.ends["slice"].items()
                    if name != "(unreadable)"))[:MOST]
    few = [kept < min_rows for kept, _, _ in parts]
    (ink, *_), (red, *_, hatch) = SERIES[:2]
    ax.barh(range(len(parts)), [kept for kept, _, _ in parts], color="white",
            edgecolor=[red if f else ink for f in few], hatch=[hatch if f else "" for f in few])
    ax.axvline(min_rows, color="#808080", linestyle="--", linewidth=1.2)
    _named(ax, [f"{_short(name)}: {kept:,} of {n:,}" + (" LOW" if f else "") for (kept, name, n), f in zip(parts, few)])
    ax.set_xscale("symlog", linthresh=10)
    ax.set_xlim(left=0)
    ax.set(xlabel="rows kept (log)", title=f"smallest slices ({min_rows} wanted)")


def _named(ax: Axes, names: list[str]) -> None:
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(max(4, len(names)) - 0.4, -0.6)


def _error(share: list[float], bounds: list[tuple[float, float]]) -> list[list[float]]:
    return [[max(0.0, s - 100 * a) for s, (a, _) in zip(share, bounds)],
            [max(0.0, 100 * b - s) for s, (_, b) in zip(share, bounds)]]


def _short(name: str) -> str:
    """At most 24 characters, and no dollar sign, which would start a formula."""
    name = "".join(c if c.isprintable() else "?" for c in name).replace("$", r"\$")
    return name if len(name) <= 24 else name[:23] + "…"


def write_board(folder: str | Path) -> Path:
    """Draw the board into board.png beside the manifest, and return its path."""
    import io

    import matplotlib.pyplot as plt

    out, path = io.BytesIO(), Path(folder) / "board.png"
    fig = data_board(folder)
    fig.savefig(out, format="png", metadata={"Software": None})
    plt.close(fig)
    write_bytes(path, out.getvalue())
    return path
