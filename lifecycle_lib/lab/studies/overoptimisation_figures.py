"""D4, drawn from the recorded seeds: proxy and gold against KL, best-of-n, what governors keep, release by release."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from lifecycle_lib.lab.design import Row
from lifecycle_lib.lab.figures import SERIES, _finish, style
from lifecycle_lib.lab.studies.costumes import PROXIES
from lifecycle_lib.lab.studies.overoptimisation import SIZES
from lifecycle_lib.lab.studies.overoptimisation_design import BETAS, GOVERNORS, curve_of, on_grid

TITLES = {"thumbs": "thumbs", "reward_model": "reward model", "rubric": "rubric", "text_match": "text match",
          "verifier": "control: hardened verifier"}
NS = (1, 2, 4, 8, 16, 32, 64)


def costumes_figure(rows: Sequence[Row], peaks: Mapping[str, Mapping[str, float]], not_measured: str) -> Figure:
    """One panel a costume: every seed's gold (thin), their mean (thick), the proxy from 0 at the start to 1 at its
    highest, and the peak of gold with its interval, where it was reached. The last panel: gold under best-of-n."""
    style()
    fig, axes = plt.subplots(2, 3, figsize=(10.5, 6.4), sharey=True)
    for ax, name in zip(axes.flat, TITLES):
        curves = [curve_of(row, name) for row in rows]
        grid, gold = on_grid(curves, SIZES["laptop"])
        for curve in curves:
            ax.plot([r["kl"] for r in curve], [r["gold"] for r in curve], color=SERIES[0][0], lw=0.6, alpha=0.4)
        ax.plot(grid, gold.mean(0), color=SERIES[0][0], lw=2.2, label="gold, in right answers (mean over seeds)")
        proxy = np.array([np.interp(grid, np.maximum.accumulate([r["kl"] for r in c]), [r[name] for r in c])
                          for c in curves]).mean(0)
        share = (proxy - proxy[0]) / max(1e-9, np.ptp(proxy))
        ax.plot(grid, share, color=SERIES[1][0], ls=SERIES[1][2], label="proxy, 0 at the start, its range is 1")
        peak = peaks[name]
        if peak["high"] < peak["end"]:
            ax.errorbar([peak["kl"]], [1.12], xerr=[[peak["kl"] - peak["low"]], [peak["high"] - peak["kl"]]],
                        fmt=SERIES[3][1], color=SERIES[3][0], label="peak of gold, 95 % over seeds")
        else:
            ax.text(peak["end"], 1.12, "no peak yet", ha="right", va="center", fontsize=8, color=SERIES[3][0])
        ax.set(title=TITLES[name], xlabel="KL from the start (nats an answer)", ylim=(-0.55, 1.25))
    last = axes.flat[5]
    for name, (colour, marker, line, _) in zip(TITLES, SERIES):
        mean = [np.mean([row[f"{name}.bon{n}.gold"] for row in rows]) for n in NS]
        far = [np.mean([row[f"{name}.bon{n}.kl"] for row in rows]) for n in NS]
        last.plot(far, mean, color=colour, marker=marker, ls=line, ms=4, label=TITLES[name])
    last.set(title="best-of-n: gold, n = 1 to 64", xlabel="KL of best-of-n (nats)")
    last.legend(loc="lower right", fontsize=8)
    for ax in axes[:, 0]:
        ax.set_ylabel("right answers")
    shown = {label: h for ax in axes.flat[:5] for h, label in zip(*ax.get_legend_handles_labels())}
    fig.legend(shown.values(), shown.keys(), loc="outside upper center", ncols=3)
    return _finish(fig, f"n = {len(rows)} seeds; peak: where mean gold (test, holdout) is highest; 95 % bootstrap over "
                   "seeds.", not_measured)


def governors_figure(rows: Sequence[Row], not_measured: str) -> Figure:
    """What each governor keeps: gold against proxy, both as the change from the start; mean and range over seeds."""
    style()
    fig, axes = plt.subplots(1, 4, figsize=(10.5, 3.6), sharey=True)
    kinds = list(dict.fromkeys(g for names in GOVERNORS.values() for g in names))
    looks = dict(zip(kinds, [(c, m) for c, m, _, _ in SERIES] + [("#2a9d8f", "P")]))
    for ax, proxy in zip(axes, PROXIES):
        for name in GOVERNORS[proxy]:
            x, y = (np.array([row[f"{proxy}.{name}.{what}"] for row in rows]) for what in ("proxy", "gold"))
            ax.errorbar(x.mean(), y.mean(), [[y.mean() - y.min()], [y.max() - y.mean()]], fmt=looks[name][1],
                        color=looks[name][0], label=name, capsize=2)
        ax.axhline(0, color="#808080", lw=0.8)
        ax.set(title=TITLES[proxy], xlabel="proxy gained")
    axes[0].set_ylabel("gold gained (right answers)")
    shown = {label: h for ax in axes for h, label in zip(*ax.get_legend_handles_labels())}
    fig.legend(shown.values(), shown.keys(), loc="outside upper center", ncols=6)
    return _finish(fig, f"n = {len(rows)} seeds; bars: range over seeds.", not_measured)


def leash_figure(rows: Sequence[Row], not_measured: str) -> Figure:
    """The reward model's arm with three prices of a nat: gold along sqrt(KL), mean over seeds, and where each seed
    ended."""
    style()
    fig, ax = plt.subplots(figsize=(7.0, 3.8))
    arms = {"no KL term": "reward_model"} | {f"beta {b}": f"kl {b} reward_model" for b in BETAS}
    for (label, name), (colour, marker, line, _) in zip(arms.items(), SERIES):
        curves = [curve_of(row, name) for row in rows]
        grid, gold = on_grid(curves, SIZES["laptop"])
        ax.plot(np.sqrt(grid), gold.mean(0), color=colour, ls=line, label=f"{label}, mean")
        ax.plot([c[-1]["kl"] ** 0.5 for c in curves], [c[-1]["gold"] for c in curves], marker, color=colour, ms=5)
    ax.set(title="A price on KL: shorter journey, same road?", xlabel="square root of KL (nats an answer)",
           ylabel="gold (right answers)")
    ax.legend()
    return _finish(fig, f"n = {len(rows)} seeds; line: mean, as far as all seeds went; points: end of each seed.",
                   not_measured)


def rounds_figure(rows: Sequence[Row], name: str, not_measured: str) -> Figure:
    """One arm, release by release: its own number alone (left), then everything else (right). Mean over seeds."""
    style()
    fig, (left, right) = plt.subplots(1, 2, figsize=(9.2, 3.5))
    curves = [curve_of(row, name) for row in rows]
    n = min(map(len, curves))
    mean = {key: np.array([[r[key] for r in c[:n]] for c in curves]).mean(0) for key in curves[0][0]}
    left.plot(range(n), mean[name], color=SERIES[0][0], marker=SERIES[0][1])
    left.set(title="what the dashboard showed", xlabel="release", ylabel=f"{TITLES[name]}: mean score")
    longer = 100 * (mean["tokens"] / mean["tokens"][0] - 1)
    shown = {"outcome right (%)": 100 * mean["verifier"], "answers longer (%)": longer,
             "KL (nats, x 10)": 10 * mean["kl"]}
    for (label, values), (colour, marker, line, _) in zip(shown.items(), SERIES[1:]):
        right.plot(range(n), values, color=colour, marker=marker, ls=line, label=label)
    right.set(title="what nobody had asked for", xlabel="release", ylabel="in the units of the legend")
    right.legend()
    return _finish(fig, f"n = {len(rows)} seeds, {SIZES['laptop'].n_test} unseen cases a release; means over seeds.",
                   not_measured)
