"""D12, a scaling law you can argue with: five budgets, ten sizes, and what the law does not say.

Grid: each budget C = 6 N D is spent on six sizes, each run with a schedule of its own length, so that the best size
of a budget can be read off (isoFLOP, Hoffmann et al. 2022, approach 2) and a law fitted (approach 3). Then, by seed:
cleaner rows against a doubled model; six recipes ranked at a fifth of the tokens and at all of them; a booster at two
sizes; another learning rate; one long run read in the middle of its schedule (Kaplan et al. 2020 did that).

The gate of the quality arms is planted, not built here (notebook 04 builds one): it keeps 30 % of a crawl and lets a
little junk through; reading a row costs it a forward pass of the 8-wide model. C counts that cost.
"""

from collections.abc import Sequence

import numpy as np
from scipy.stats import spearmanr

from lifecycle_lib.core.store import Artifact
from lifecycle_lib.lab.design import Design, Row
from lifecycle_lib.lab.stages import Lab
from lifecycle_lib.lab.studies.scaling_fit import Run, fit_law, isoflop_minimum, line_forecast, over_seeds
from lifecycle_lib.lab.studies.scaling_world import (
    FACTS,
    TOKENS_A_ROW,
    Recipe,
    irreducible,
    n_params,
    train,
)

GRID = {1e9: (4, 6, 8, 10, 12, 16), 3e9: (4, 6, 8, 12, 16, 24), 9e9: (6, 8, 12, 16, 24, 32),
        2.7e10: (8, 12, 16, 24, 32, 48), 8e10: (12, 16, 24, 32, 48, 64)}
BUDGETS = tuple(GRID)
KNOWN = 3  # budgets that a forecast may see
MIDDLE, MIDDLE_WIDTHS = 9e9, (6, 16, 32)
QUALITY = {1e9: (10, 16), 3e9: (12, 18), 9e9: (14, 22), 2.7e10: (18, 28), 8e10: (24, 36)}  # widths of N and about 2N
CRAWL_ROWS, KEPT = 66_667, 0.3
DIRTY = Recipe(copies=0.3, wrong=0.05, pool=CRAWL_ROWS)
GATED = Recipe(copies=0.003, wrong=0.002, pool=round(CRAWL_ROWS * KEPT))
GATE_FLOP_A_ROW = 2 * n_params(8) * TOKENS_A_ROW
RECIPES = {"natural": Recipe(), "many rules": Recipe(rules=0.5), "flat facts": Recipe(tau=0.6),
           "400 top facts": Recipe(head=400), "small set": Recipe(pool=20_000), "copies": Recipe(copies=0.5)}
RECIPE_WIDTH, RECIPE_TOKENS, PROXY = 16, 350_000, 0.2
BOOSTER = (0.0, 0.25, 0.5)
BOOSTER_WIDTHS, BOOSTER_TOKENS = (6, 32), 100_000
EARLY = (35_000, 70_000, 140_000)
SHRINK = {"smoke": 100.0}  # divides every budget: a profile that tests the plumbing and learns nothing


def gated_tokens(flop: float, width: int) -> float:
    """Tokens left to train on after the gate has read for them; it stops reading at the end of the crawl."""
    read_to_the_end = CRAWL_ROWS * GATE_FLOP_A_ROW
    per_token = 6 * n_params(width)
    tokens = flop / (per_token + GATE_FLOP_A_ROW / TOKENS_A_ROW / KEPT)
    if tokens / TOKENS_A_ROW <= GATED.pool:
        return tokens
    return (flop - read_to_the_end) / per_token


def measure(lab: Lab) -> tuple[Row, list[Artifact]]:
    """All runs of one seed."""
    row: Row = {}
    made: list[Artifact] = []
    shrink = SHRINK.get(lab.profile.name, 1.0)

    def arm(label: str, width: int, tokens: float, *keys: str, **more: object) -> dict:
        made.append(train(lab, width, max(tokens / shrink, 400.0), **more))
        found = made[-1].card["measured"]
        row.update({f"{label}.{key}": float(found[key]) for key in ("loss", *keys)})
        return found

    for flop, widths in GRID.items():
        for width in widths:
            arm(f"grid {flop:.1e} {width}", width, flop / 6 / n_params(width), "n_params", "tokens", "boundary",
                "facts_known", "fact_loss", "rule_loss")
    for flop, (width, double) in QUALITY.items():
        arm(f"gated {flop:.1e}", width, gated_tokens(flop, width), "facts_known", recipe=GATED)
        arm(f"dirty {flop:.1e}", double, flop / 6 / n_params(double), "facts_known", recipe=DIRTY)
        # the control, added after five seeds: at equal compute a doubled model loses on any rows, clean ones too
        arm(f"dirty at N {flop:.1e}", width, flop / 6 / n_params(width), "facts_known", recipe=DIRTY)
    for name, recipe in RECIPES.items():
        for share in (PROXY, 1.0):
            early = EARLY if (name, share) == ("natural", 1.0) else ()
            found = arm(f"recipe {name} {share}", RECIPE_WIDTH, share * RECIPE_TOKENS, recipe=recipe,
                        read_at=[t / shrink for t in early])
            row.update({f"early {t}": loss for t, (_, loss) in zip(early, found.get("early", ()))})
    for tokens in EARLY:
        arm(f"own {tokens}", RECIPE_WIDTH, tokens)
    for width in BOOSTER_WIDTHS:
        for share in BOOSTER:
            arm(f"booster {share} {width}", width, BOOSTER_TOKENS, recipe=Recipe(booster=share))
    for width in MIDDLE_WIDTHS:
        for rate in (0.5, 2.0):
            arm(f"rate {rate} {width}", width, MIDDLE / 6 / n_params(width), rate=rate)
    return row | derived(row), made


def grid_runs(rows: Sequence[Row], budgets: Sequence[float] = BUDGETS) -> list[Run]:
    """(N, D, mean loss over the rows' seeds) of every run of these budgets."""
    keys = [f"grid {flop:.1e} {width}" for flop in budgets for width in GRID[flop]]
    return [(rows[0][f"{k}.n_params"], rows[0][f"{k}.tokens"], float(np.mean([r[f"{k}.loss"] for r in rows])))
            for k in keys]


def minima(rows: Sequence[Row]) -> dict:
    """{budget: Minimum} of the parabolas."""
    by_budget = {flop: grid_runs(rows, [flop]) for flop in BUDGETS}
    return {flop: isoflop_minimum([n for n, _, _ in runs], [loss for *_, loss in runs])
            for flop, runs in by_budget.items()}


def forecasts(rows: Sequence[Row]) -> dict[str, float]:
    """Reducible loss at the budgets after the first three: measured, and as foreseen from the first three."""
    floor, bottom, seen, later = irreducible(), minima(rows), BUDGETS[:KNOWN], BUDGETS[KNOWN:]
    known = [bottom[c].loss for c in seen]
    runs = grid_runs(rows, seen)
    by = {"line": line_forecast(np.log(seen), known, np.log(later)), "line in C": line_forecast(seen, known, later),
          "law": [float(fit_law(runs).frontier(c)) for c in later],
          "law, E known": [float(fit_law(runs, floor).frontier(c)) for c in later],
          "law, E = 0": [float(fit_law(runs, 0.0).frontier(c)) for c in later],
          "measured": [bottom[c].loss for c in later]}
    return {f"forecast {name} {c:.1e}": v - floor for name, values in by.items() for c, v in zip(later, values)}


def derived(row: Row) -> Row:
    """One seed's fits and comparisons, as numbers."""
    runs, floor = grid_runs([row]), irreducible()
    law, pinned = fit_law(runs), fit_law(runs, floor)
    bottom = minima([row])
    slope = np.polyfit(np.log(BUDGETS), np.log([m.n_params for m in bottom.values()]), 1)[0]
    out = {"law.e": law.e, "law.a": law.a, "law.b": law.b, "law.c": law.compute_exponent, "pinned.a": pinned.a,
           "pinned.b": pinned.b, "pinned.c": pinned.compute_exponent, "planted.e": floor, "growth of N": float(slope),
           "interior": float(sum(m.interior for m in bottom.values())), **forecasts([row])}
    out |= {f"best N {c:.1e}": m.n_params for c, m in bottom.items()}
    for name in ("line", "line in C", "law", "law, E known", "law, E = 0"):
        misses = [out[f"forecast {name} {c:.1e}"] - out[f"forecast measured {c:.1e}"] for c in BUDGETS[KNOWN:]]
        out |= {f"error {name}": float(np.mean(np.abs(misses))), f"signed {name}": float(np.mean(misses))}
    drops = -np.diff([m.loss for m in bottom.values()])
    out["returns shrink"] = float(drops[0] - drops[-1])
    for flop in BUDGETS:
        out[f"dirty - gated {flop:.1e}"] = row[f"dirty {flop:.1e}.loss"] - row[f"gated {flop:.1e}.loss"]
        out[f"dirty at N - gated {flop:.1e}"] = row[f"dirty at N {flop:.1e}.loss"] - row[f"gated {flop:.1e}.loss"]
    small, full = ([row[f"recipe {name} {share}.loss"] for name in RECIPES] for share in (PROXY, 1.0))
    out["recipe ranks agree"] = float(spearmanr(small, full).statistic)
    picked = row[f"recipe {list(RECIPES)[int(np.argmin(small))]} 1.0.loss"]
    out["regret of the proxy"] = picked - min(full)
    gain = {w: row[f"booster 0.0 {w}.loss"] - row[f"booster 0.25 {w}.loss"] for w in BOOSTER_WIDTHS}
    out |= {f"booster gain {w}": g for w, g in gain.items()} | {"booster x size": gain[32] - gain[6]}
    labels = [f"grid {flop:.1e} {width}" for flop in BUDGETS for width in GRID[flop]]
    loss = [row[f"{k}.loss"] for k in labels]
    for key in ("boundary", "facts_known"):
        values = [row[f"{k}.{key}"] for k in labels]
        out[f"loss follows {key}"] = -float(spearmanr(loss, values).statistic) if len(set(values)) > 1 else 0.0
    tokens = np.log([*EARLY, RECIPE_TOKENS])
    own = [*(row[f"own {t}.loss"] for t in EARLY), row["recipe natural 1.0.loss"]]
    read = [*(row[f"early {t}"] for t in EARLY), row["recipe natural 1.0.loss"]]
    for name, values in (("own", own), ("read", read)):
        out[f"data exponent, {name}"] = -float(np.polyfit(tokens, np.log(np.array(values) - floor), 1)[0])
    best = {w: min(row[f"grid {MIDDLE:.1e} {w}.loss"], *(row[f"rate {f} {w}.loss"] for f in (0.5, 2.0)))
            for w in MIDDLE_WIDTHS}
    small, middle, large = MIDDLE_WIDTHS
    out["ends above the middle, best rate"] = min(best[small], best[large]) - best[middle]
    return out


def crossover(rows: Sequence[Row]) -> dict[str, float]:
    """The budget (log10) where the mean of dirty - gated last turns from plus to minus. ValueError if it never does."""
    mean = [float(np.mean([r[f"dirty - gated {c:.1e}"] for r in rows])) for c in BUDGETS]
    turns = [i for i in range(len(mean) - 1) if mean[i] > 0 >= mean[i + 1]]
    if not turns:
        raise ValueError("cleaner rows never stop winning on this grid")
    i, x = turns[-1], np.log10(BUDGETS)
    return {"log10 C": float(x[i] + (x[i + 1] - x[i]) * mean[i] / (mean[i] - mean[i + 1]))}


def extra(rows: Sequence[Row]) -> dict:
    """Fits on the mean over seeds, with bootstrap intervals over seeds: [value, 2.5 %, 97.5 %]."""
    def laws(some: Sequence[Row]) -> dict[str, float]:
        runs = grid_runs(some)
        law = fit_law(runs, starts=((1.2, 0.5, 0.7),))
        return {"e": law.e, "a": law.a, "b": law.b, "c": law.compute_exponent, "a_scale": law.a_scale,
                "b_scale": law.b_scale} | {f"best N {c:.1e}": float(law.best_n(c)) for c in BUDGETS}

    def ranks(some: Sequence[Row]) -> dict[str, float]:
        losses = ([np.mean([r[f"recipe {n} {s}.loss"] for r in some]) for n in RECIPES] for s in (PROXY, 1.0))
        return {"spearman of mean losses": float(spearmanr(*losses).statistic)}

    bottoms = over_seeds(rows, lambda some: {f"{c:.1e}": m.n_params for c, m in minima(some).items()})
    found = {"irreducible": irreducible(), "budgets": list(BUDGETS),
             "grid": {f"{c:.1e}": list(widths) for c, widths in GRID.items()},
             "law": over_seeds(rows, laws), "isoflop": bottoms, "ranks": over_seeds(rows, ranks),
             "interior": {f"{c:.1e}": sum(minima([r])[c].interior for r in rows) for c in BUDGETS}}
    try:
        found["crossover"] = over_seeds(rows, crossover)
    except ValueError as error:
        found["crossover"] = str(error)
    return found


DESIGN = Design(
    measure=measure, notebook="02", smallest=0.05, n_items=FACTS, items="facts, every one weighted by its frequency",
    rows=("S4-18", "S4-19", "S4-20", "S4-21", "S4-22", "S4-23", "S0-19", "S0-20", "S0-21", "S0-75a", "S1-10", "S1-11",
          "S4-24", "S4-40", "S3-6.30"),
    claim="on facts with a power-law tail the loss falls as a power of compute, and the best size of a budget lies "
          "inside the grid and grows with the budget",
    falsifier="the interval of the compute exponent, or of a or b, reaches 0; fewer than two budgets with an interior "
              "optimum; an optimum that does not grow with the budget",
    also=(("a, exponent of size", 0.001), ("b, exponent of data", 0.001), ("budgets with an interior optimum", 2.0),
          ("growth of the best N, exponent of C", 0.001)),
    extra=extra,
    effects=(("c, exponent of compute", "law.c", None, "exponent"), ("a, exponent of size", "law.a", None, "exponent"),
             ("b, exponent of data", "law.b", None, "exponent"),
             ("c, with E given", "pinned.c", None, "exponent"), ("a, with E given", "pinned.a", None, "exponent"),
             ("b, with E given", "pinned.b", None, "exponent"),
             ("fitted E - planted E", "law.e", "planted.e", "nats"),
             ("budgets with an interior optimum", "interior", None, "of 5 budgets"),
             ("growth of the best N, exponent of C", "growth of N", None, "exponent"),
             ("ends above the middle, each at its best rate", "ends above the middle, best rate", None, "nats"),
             ("first step of budget - last step, loss bought", "returns shrink", None, "nats"),
             ("forecast error, line in log C - law", "error line", "error law", "nats"),
             ("forecast error, law with E = 0 - law", "error law, E = 0", "error law", "nats"),
             ("forecast error, law with E known", "error law, E known", None, "nats"),
             *((f"{name}: forecast - measured", f"signed {name}", None, "nats")
               for name in ("line", "line in C", "law", "law, E = 0")),
             *((f"dirty at 2N - gated at N, C = {c:.1e}", f"dirty - gated {c:.1e}", None, "nats") for c in BUDGETS),
             *((f"dirty at N - gated at N, C = {c:.1e}", f"dirty at N - gated {c:.1e}", None, "nats") for c in BUDGETS),
             *((f"facts known, gated at N - dirty at 2N, C = {c:.1e}", f"gated {c:.1e}.facts_known",
                f"dirty {c:.1e}.facts_known", "facts") for c in BUDGETS),
             *((f"facts known, gated at N - dirty at N, C = {c:.1e}", f"gated {c:.1e}.facts_known",
                f"dirty at N {c:.1e}.facts_known", "facts") for c in BUDGETS),
             ("recipe ranks at 0.2x and 1x, Spearman", "recipe ranks agree", None, "correlation"),
             ("regret of picking at 0.2x", "regret of the proxy", None, "nats"),
             ("booster gain, large - small model", "booster x size", None, "nats"),
             *((f"booster gain at width {w}", f"booster gain {w}", None, "nats") for w in BOOSTER_WIDTHS),
             ("loss and boundary days, rank correlation", "loss follows boundary", None, "correlation"),
             ("loss and facts known, rank correlation", "loss follows facts_known", None, "correlation"),
             ("data exponent, read mid-schedule - own schedules", "data exponent, read", "data exponent, own",
              "exponent")))
