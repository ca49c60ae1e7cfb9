"""The scaling study: the world's numbers by hand, the fit against laws that are known and against scipy's curve_fit."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from scipy.optimize import curve_fit

from lifecycle_lib.core.store import Store
from lifecycle_lib.lab.budget import Ledger, largest_n, plan, tokens_for
from lifecycle_lib.lab.stages import Lab
from lifecycle_lib.lab.studies import scaling, scaling_world
from lifecycle_lib.lab.studies.scaling_fit import Law, fit_law, isoflop_minimum, line_forecast, over_seeds
from lifecycle_lib.lab.studies.scaling_world import FACTS, KEY, VALUE, VALUES, Recipe, World, frequencies
from lifecycle_lib.model.gpt import GPT

TRUE = Law(0.3, 40.0, 0.6, 30.0, 0.4)
SIZES, BUDGETS = (1e3, 3e3, 1e4, 3e4, 1e5), (1e9, 1e10, 1e11)


def grid(law: Law, noise: float = 0.0, seed: int = 0) -> list[tuple[float, float, float]]:
    random = np.random.default_rng(seed)
    return [(n, c / 6 / n, law.loss(n, c / 6 / n) * math.exp(noise * random.normal()))
            for c, n in product(BUDGETS, SIZES)]


# ---- the world ---------------------------------------------------------------------------------------------------


def test_irreducible_loss_by_hand():
    """95 % right + 5 % spread over 32 values: -(q log q + 31 w log w), four rows in five are facts."""
    w = 0.05 / 32
    q = 0.95 + w
    assert scaling_world.irreducible() == pytest.approx(0.8 * -(q * math.log(q) + 31 * w * math.log(w)))
    assert scaling_world.irreducible() == pytest.approx(0.2882, abs=1e-4)


def test_frequencies_fall_as_a_power_and_sum_to_one():
    p = frequencies()
    assert p.sum() == pytest.approx(1) and p[0] / p[1] == pytest.approx(2**1.6)
    tail = [p[n:].sum().item() for n in (100, 1000)]  # the sum beyond n falls as n^-alpha, nearly: F is finite
    assert math.log10(tail[0] / tail[1]) == pytest.approx(0.6, abs=0.07)
    assert frequencies(head=400)[400:].sum() == 0


def test_rows_are_pure_in_seed_and_step_and_hold_what_the_recipe_says():
    world = World(7)
    rows = world.batches(Recipe(), 4000)(3)
    assert torch.equal(rows.ids, World(7).batches(Recipe(), 4000)(3).ids)
    assert not torch.equal(rows.ids, world.batches(Recipe(), 4000)(4).ids)
    assert rows.mask.sum(1).eq(1).all() and rows.mask[:, 2].all()
    is_rule = rows.ids[:, 0] >= scaling_world.NUMBER
    assert is_rule.float().mean() == pytest.approx(0.2, abs=0.03)
    facts = rows.ids[~is_rule]
    rank = torch.empty(FACTS, dtype=torch.long).scatter_(0, world.key, torch.arange(FACTS))
    ranks = rank[(facts[:, 0] - KEY) * scaling_world.SYMBOLS + facts[:, 1] - KEY]
    right = (facts[:, 2] - VALUE == world.value[ranks]).float().mean()
    assert right == pytest.approx(0.95 + 0.05 / VALUES, abs=0.02)
    assert (ranks == 0).float().mean() == pytest.approx(frequencies()[0].item(), abs=0.03)


def test_no_training_row_asks_a_held_out_pair():
    world = World(1)
    ids = world.batches(Recipe(rules=1.0), 3000)(0).ids
    day, window = ids[:, 0] - scaling_world.NUMBER, ids[:, 1] - scaling_world.NUMBER
    assert not world.held_out[day * scaling_world.NUMBERS + window].any()
    assert torch.equal(ids[:, 2] == scaling_world.YES, day <= window)


def test_a_pool_is_read_once_an_epoch():
    pool = World(2).batches(Recipe(pool=640), 64)
    first, again = (torch.cat([pool(s).ids for s in range(e, e + 10)]) for e in (0, 10))
    as_set = lambda rows: sorted(map(tuple, rows.tolist()))  # noqa: E731
    assert as_set(first) == as_set(again) and not torch.equal(first, again)


def test_measured_loss_equals_the_entropy_for_a_model_that_knows_everything():
    """And log(vocabulary) for one that says everything is equally likely."""
    world = World(0)

    class Flat(torch.nn.Module):
        device = torch.device("cpu")
        hidden = staticmethod(lambda ids: ids)
        head = staticmethod(lambda ids: torch.zeros(len(ids), scaling_world.VOCAB))

    assert scaling_world.measure(Flat(), world)["loss"] == pytest.approx(math.log(scaling_world.VOCAB), abs=1e-4)

    class Oracle(Flat):
        def head(self, last):  # (B,) the last token alone cannot tell, so the rows wait in `asked`
            logp = torch.full((len(last), scaling_world.VOCAB), -30.0)
            rows = self.asked.pop(0)
            if rows[0, 0] < scaling_world.NUMBER:
                logp[:, VALUE:scaling_world.NUMBER] = math.log(0.05 / VALUES)
                logp.scatter_(1, rows[:, 2:], math.log(0.95 + 0.05 / VALUES))
            else:
                logp.scatter_(1, rows[:, 2:], 0.0)
            return logp

    oracle = Oracle()
    ranks = torch.arange(FACTS).split(4096)
    oracle.asked = [*(world.facts(r, world.value[r]) for r in ranks), world.rules(scaling_world.PAIRS)]
    found = scaling_world.measure(oracle, world)
    assert found["loss"] == pytest.approx(scaling_world.irreducible(), abs=1e-4)
    assert found["facts_known"] == FACTS and found["boundary"] == 1.0


def test_size_formula_counts_every_parameter():
    for width in (4, 16, 96):
        assert scaling_world.n_params(width) == GPT(scaling_world.shape(width)).n_params()


def test_a_run_is_kept_and_early_losses_are_read(tmp_path):
    lab = Lab("smoke", seed=100, device="cpu", store=Store(tmp_path))
    found = scaling_world.train(lab, 4, 3000, read_at=[600, 1500])
    assert found.path == scaling_world.train(lab, 4, 3000, read_at=[600, 1500]).path
    measured = found.card["measured"]
    early = measured["early"]
    assert [t for t, _ in early] == [576, 1488] and early[0][1] > early[1][1] > measured["loss"]


# ---- the fit -----------------------------------------------------------------------------------------------------


def test_a_known_law_is_recovered_and_agrees_with_curve_fit():
    law = fit_law(grid(TRUE))
    assert (law.a, law.b, law.e) == pytest.approx((0.6, 0.4, 0.3), rel=1e-3)
    n, d, loss = np.array(grid(TRUE, 0.003)).T
    ours = fit_law(list(zip(n, d, loss)))
    theirs, _ = curve_fit(lambda x, e, la, a, lb, b: np.log(e + np.exp(la) * x[0]**-a + np.exp(lb) * x[1]**-b),
                          (n, d), np.log(loss), p0=(0.25, 3.0, 0.5, 3.0, 0.5), maxfev=20_000)
    assert (ours.e, ours.a, ours.b) == pytest.approx((theirs[0], theirs[2], theirs[4]), rel=0.03)


def test_optimum_by_calculus_is_the_optimum_by_search():
    sizes = np.exp(np.linspace(math.log(1e2), math.log(1e6), 20_000))
    for c in BUDGETS:
        by_search = sizes[TRUE.loss(sizes, c / 6 / sizes).argmin()]
        assert TRUE.best_n(c) == pytest.approx(by_search, rel=1e-3)
        assert TRUE.flop_for(TRUE.frontier(c)) == pytest.approx(c, rel=1e-6)
    steps = [TRUE.frontier(c) - TRUE.e for c in BUDGETS]
    assert steps[1] / steps[0] == pytest.approx(10**-TRUE.compute_exponent)  # hand: 10^-(0.24)


def test_forcing_the_floor_to_zero_over_promises():
    """The broken variant: a law without E, fitted on small budgets, foresees too low a loss at a large one."""
    runs = grid(TRUE)
    far = 1e14
    assert fit_law(runs, e=0.0).frontier(far) < TRUE.frontier(far) - 0.02
    assert fit_law(runs).frontier(far) == pytest.approx(TRUE.frontier(far), abs=1e-3)


def test_parabola_by_hand_and_edges():
    sizes = [math.exp(x) for x in (-2, -1, 0, 1, 2)]
    found = isoflop_minimum(sizes, [1 + 0.1 * (x - 0.25) ** 2 for x in (-2, -1, 0, 1, 2)])
    assert found.interior and found.n_params == pytest.approx(math.exp(0.25)) and found.loss == pytest.approx(1.0)
    edge = isoflop_minimum(sizes, [5, 4, 3, 2, 1])
    assert not edge.interior and edge.n_params == sizes[-1]


def test_a_shuffled_grid_has_no_optimum_to_speak_of():
    """Null: losses dealt out to the wrong sizes. The fit explains far less than on the real grid."""
    runs = grid(TRUE, 0.003)
    n, d, loss = np.array(runs).T
    loss = np.random.default_rng(0).permutation(loss)
    rms = lambda law, y: np.sqrt(np.mean((np.log(law.loss(n, d)) - np.log(y)) ** 2))  # noqa: E731
    assert rms(fit_law(list(zip(n, d, loss))), loss) > 10 * rms(fit_law(runs), np.array(runs)[:, 2])


def test_bad_grids_are_refused():
    one_size = [(1e3, 1e6 * i, 1.0 / i) for i in range(1, 8)]
    for runs, what in (([(1e3, 1e6, 1.0)] * 3, "give at least"), (one_size, "spread"),
                       ([*grid(TRUE)[:8], (1e3, 1e6, -1.0)], "positive")):
        with pytest.raises(ValueError, match=what):
            fit_law(runs)
    with pytest.raises(ValueError, match="no budget reaches"):
        TRUE.flop_for(0.3)
    with pytest.raises(ValueError, match="at least 2"):
        over_seeds([{}], lambda rows: {})


def test_interval_over_seeds_and_line():
    rows = [{"x": float(i)} for i in range(8)]
    value, low, high = over_seeds(rows, lambda some: {"mean": float(np.mean([r["x"] for r in some]))})["mean"]
    assert value == 3.5 and low < 2.5 < 4.5 < high
    assert line_forecast([1, 2, 3], [5, 4, 3], [5]) == [pytest.approx(1)]


# ---- the study ---------------------------------------------------------------------------------------------------


def test_gate_pays_for_what_it_reads():
    """Small budget: pays per kept row, at 1 / KEPT reads each. Large: the whole crawl, once."""
    n = scaling_world.n_params(12)
    tokens = scaling.gated_tokens(2e9, 12)
    reads = tokens / 3 / scaling.KEPT
    assert tokens * 6 * n + reads * scaling.GATE_FLOP_A_ROW == pytest.approx(2e9)
    tokens = scaling.gated_tokens(1.6e11, 30)
    cost = scaling.CRAWL_ROWS * scaling.GATE_FLOP_A_ROW
    assert tokens * 6 * scaling_world.n_params(30) + cost == pytest.approx(1.6e11)


def fake_rows(seeds: int = 3) -> list[dict]:
    """Rows as `measure` makes them, from a law we know."""
    rows = []
    for s in range(seeds):
        random, row = np.random.default_rng(s), {}
        for c, widths in scaling.GRID.items():
            for w in widths:
                n = scaling_world.n_params(w)
                loss = Law(0.29, 600.0, 1.1, 15.0, 0.42).loss(n, c / 6 / n) * math.exp(0.003 * random.normal())
                run = {"loss": loss, "n_params": n, "tokens": c / 6 / n, "boundary": 0.6, "facts_known": 1 / loss}
                row |= {f"grid {c:.1e} {w}.{k}": v for k, v in run.items()}
        for i, c in enumerate(scaling.BUDGETS):
            row |= {f"gated {c:.1e}.loss": 0.4, f"dirty {c:.1e}.loss": 0.4 + (0.02, 0.01, 0.005, -0.005, -0.02)[i]}
            row |= {f"dirty at N {c:.1e}.loss": 0.41}
        for i, name in enumerate(scaling.RECIPES):
            row |= {f"recipe {name} 0.2.loss": 0.5 + 0.01 * i, f"recipe {name} 1.0.loss": 0.4 - 0.01 * i}
        row |= {f"booster {b} {w}.loss": 0.4 for b in scaling.BOOSTER for w in scaling.BOOSTER_WIDTHS}
        row |= {key: 0.29 + t**-0.4 for t in scaling.EARLY for key in (f"own {t}.loss", f"early {t}")}
        row |= {f"rate {f} {w}.loss": 0.5 for f in (0.5, 2.0) for w in scaling.MIDDLE_WIDTHS}
        rows.append(row | scaling.derived(row))
    return rows


def test_derived_numbers_and_extras_of_a_known_world():
    rows = fake_rows()
    assert rows[0]["interior"] == 5 and rows[0]["recipe ranks agree"] == pytest.approx(-1)
    assert rows[0]["growth of N"] == pytest.approx(0.42 / 1.52, abs=0.05)
    assert rows[0]["signed line"] < 0 and rows[0]["returns shrink"] > 0
    assert rows[0]["regret of the proxy"] == pytest.approx(0.05) and rows[0]["loss follows facts_known"] > 0.99
    where = scaling.crossover(rows)["log10 C"]  # halfway between the third and the fourth budget
    assert where == pytest.approx((math.log10(9e9) + math.log10(2.7e10)) / 2)
    for row in rows:
        row |= {f"dirty - gated {c:.1e}": 0.01 for c in scaling.BUDGETS}
    with pytest.raises(ValueError, match="never stop winning"):
        scaling.crossover(rows)


# ---- the budget --------------------------------------------------------------------------------------------------


def test_planner_meets_the_law_where_speed_is_flop():
    """When tokens/s = rate / 6N, the best proposal is the law's own optimum."""
    sizes = np.exp(np.linspace(math.log(1e3), math.log(1e5), 200))
    best = plan(TRUE, 10.0, lambda n: 1e9 / (6 * n), list(sizes))[0]
    assert best.n_params == pytest.approx(TRUE.best_n(1e10), rel=0.03)
    assert best.loss == pytest.approx(TRUE.frontier(1e10), rel=1e-4)


def test_size_from_latency_and_memory():
    assert largest_n(latency_s=0.01, bytes_per_s=1e9, memory_bytes=1e6, bytes_each=4) == 250_000  # memory binds
    assert largest_n(latency_s=0.01, bytes_per_s=1e7, memory_bytes=1e6, bytes_each=4) == 25_000  # latency binds
    tokens = tokens_for(TRUE, 1e4, 0.6)
    assert TRUE.loss(1e4, tokens) == pytest.approx(0.6)
    with pytest.raises(ValueError, match="on any number of tokens"):
        tokens_for(TRUE, 1e2, 0.6)
    with pytest.raises(ValueError, match="latency_s=0"):
        largest_n(latency_s=0, bytes_per_s=1, memory_bytes=1)


def test_ledger_refuses_what_is_spent():
    ledger = Ledger({"explore": 60, "confirm": 120})
    ledger.ask("explore", "sweep", 50)
    ledger.debit("explore", "sweep", 55)
    with pytest.raises(ValueError, match="5 s are left to explore"):
        ledger.ask("explore", "one more", 10)
    assert ledger.left_s("confirm") == 120
    with pytest.raises(ValueError, match="no budget"):
        ledger.debit("fun", "x", 1)
