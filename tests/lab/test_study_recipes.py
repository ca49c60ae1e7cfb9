"""The recipe studies: the task, the knobs, the variance shares, the winner's curse, the lost pieces."""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from itertools import product
from statistics import mean
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm

from lifecycle_lib.core.seeds import one_thread, rng
from lifecycle_lib.core.store import Store
from lifecycle_lib.lab.design import summarise
from lifecycle_lib.lab.stages import Lab
from lifecycle_lib.lab.studies import closures, recipes
from lifecycle_lib.lab.studies.closures import PIECES, Closure, demonstrations, exam_items, is_hardest, lose
from lifecycle_lib.lab.studies.recipes import (
    CENTRE,
    HELD_OUT,
    KNOBS,
    SWEEP,
    TAUGHT,
    VOCAB,
    Knobs,
    choosing,
    feed,
    share,
    shares_with_interval,
    variance_shares,
)


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Lab:
    os.environ["LIFECYCLE_QUIET"] = "1"
    one_thread()
    return Lab("smoke", seed=100, device="cpu", store=Store(tmp_path_factory.mktemp("recipes") / "store"))


def texts(rows) -> list[list[str]]:
    return [VOCAB.decode(r.tolist()).split() for r in rows.ids]


def test_no_held_out_pair_is_taught():
    assert not set(HELD_OUT) & set(TAUGHT) and len(HELD_OUT) == 343
    seen = {tuple(t[1:3]) for step in range(40) for t in texts(feed(CENTRE)(step))}
    assert not seen & {(f"{d:02d}", f"{w:02d}") for d, w in HELD_OUT}


def test_every_answer_follows_the_rule():
    for row in texts(feed(CENTRE)(3)):
        days, window, answer = int(row[1]), int(row[2]), row[4]
        assert answer == ("yes" if days <= window else "no")


def test_orders_and_seeds():
    up = [int(t[1]) for step in range(3) for t in texts(feed(Knobs(order="days up"))(step))]
    down = [int(t[1]) for step in range(3) for t in texts(feed(Knobs(order="days down"))(step))]
    assert up == sorted(up) and down == sorted(down, reverse=True) and up[0] == 0 and down[0] == 59
    assert texts(feed(Knobs(order_seed=1))(0)) != texts(feed(Knobs(order_seed=2))(0))
    with pytest.raises(ValueError, match="order='x'"):
        Knobs(order="x")


def test_one_batch_is_corrupt_and_only_one():
    clean, bad = feed(CENTRE), feed(replace(CENTRE, corrupt=True))
    differ = [step for step in range(95, 106) if not torch.equal(clean(step).ids, bad(step).ids)]
    assert differ == [100] and bad(100).mask.all()


def test_every_knob_has_the_centre_among_its_three_settings():
    for settings in KNOBS.values():
        assert len(settings) == 3 and {} in settings
        for change in settings:
            knobs = replace(CENTRE, **change)
            assert knobs.steps * knobs.batch == CENTRE.steps * CENTRE.batch, "equal tokens"


# ---- variance shares ----------------------------------------------------------------------------------------

def test_variance_shares_by_hand():
    """Rows 0 and 2 apart, columns equal, no noise: all of it is rows."""
    assert variance_shares(np.array([[0.0, 0.0], [2.0, 2.0]])) == {"rows": 1.0, "columns": 0.0, "left": 0.0}


def test_variance_shares_against_statsmodels():
    random = np.random.default_rng(0)
    grid = random.normal(size=(6, 1)) + 0.5 * random.normal(size=(1, 5)) + 0.3 * random.normal(size=(6, 5))
    frame = pd.DataFrame([{"a": i, "b": j, "y": grid[i, j]} for i, j in product(range(6), range(5))])
    table = anova_lm(ols("y ~ C(a) + C(b)", frame).fit())
    squares = table["sum_sq"] / table["df"]
    rest = squares["Residual"]
    parts = {"rows": (squares["C(a)"] - rest) / 5, "columns": (squares["C(b)"] - rest) / 6, "left": rest}
    found = variance_shares(grid)
    for key, value in parts.items():
        assert found[key] == pytest.approx(value / sum(parts.values()))


def test_variance_shares_finds_planted_shares_and_swaps_with_the_table():
    random = np.random.default_rng(1)
    found = [variance_shares(2 * random.normal(size=(12, 1)) + random.normal(size=(1, 12))
                             + random.normal(size=(12, 12))) for _ in range(60)]
    assert mean(f["rows"] for f in found) == pytest.approx(4 / 6, abs=0.08)
    grid = random.normal(size=(4, 5))
    assert variance_shares(grid)["rows"] == pytest.approx(variance_shares(grid.T)["columns"])


def test_variance_shares_interval_holds_the_estimate_and_refuses_constants():
    random = np.random.default_rng(2)
    for estimate, low, high in shares_with_interval(random.normal(size=(5, 5)), 200).values():
        assert 0 <= low <= high <= 1 and 0 <= estimate <= 1
    with pytest.raises(ValueError, match="no variance"):
        variance_shares(np.ones((3, 3)))
    with pytest.raises(ValueError, match="at least 2"):
        variance_shares(np.ones((1, 3)))


# ---- choosing from a sweep ----------------------------------------------------------------------------------

def luck(true: dict[int, float], sd: float, s: int):
    """A score function whose recipes differ by `true` and whose runs differ by luck alone."""
    def score(seed: int = s, proxy: int = 1, **recipe: float) -> float:
        i = SWEEP.index(recipe)
        return true[i] + rng(seed, "luck", i, proxy).gauss(0, sd)
    return score


def test_the_winner_of_equal_recipes_is_only_lucky():
    rows = [choosing(luck(dict.fromkeys(range(12), 0.8), 0.05, s), s) for s in range(200)]
    curse = mean(r["greedy.reported"] - r["greedy.fresh"] for r in rows)
    assert curse == pytest.approx(0.05 * 1.629, abs=0.01)  # the mean largest of 12 standard normals is 1.629
    assert mean(r["protocol.reported"] - r["protocol.fresh"] for r in rows) == pytest.approx(0, abs=0.012)


def test_without_luck_both_find_the_best():
    row = choosing(luck({i: i / 12 for i in range(12)}, 0.0, 3), 3)
    assert row["greedy.choice"] == row["protocol.choice"] == 11
    assert row["greedy.reported"] == row["greedy.fresh"] == row["protocol.fresh"]


def test_share_of_nothing_raises():
    assert share("0110") == 0.5
    with pytest.raises(ValueError, match="no scored item"):
        share("")


# ---- the closure drill --------------------------------------------------------------------------------------

def test_the_patch_set_touches_only_hostile_customers_who_were_too_late():
    patched, raw = texts(demonstrations(Closure())), texts(demonstrations(Closure(patched=False)))
    touched = [(a, b) for a, b in zip(patched, raw) if a != b]
    late = [a for a in patched if a[1] in closures.HOSTILE and int(a[2]) > int(a[3])]
    assert len(touched) / len(late) == pytest.approx(0.5, abs=0.05)
    for a, b in touched:
        assert a[:5] == b[:5] and (a[5], b[5]) == ("no", "yes") and a in late


def test_losing_a_piece_changes_that_piece_and_nothing_else():
    whole = Closure(order_seed=4)
    changed = {piece: {k for k, v in asdict(lose(whole, piece)).items() if v != asdict(whole)[k]} for piece in PIECES}
    assert changed == {"data order": {"order_seed"}, "patch set": {"patched"}, "learning rate": {"lr"},
                       "library version": {"beta2", "weight_decay"}}
    with pytest.raises(ValueError, match="piece 'mood'"):
        lose(whole, "mood")


def test_the_hardest_slice():
    hard = [item for item in exam_items() if is_hardest(*item)]
    assert all(tone in ("lawyer", "scam") and abs(d - w) <= 5 for tone, d, w in hard) and len(hard) == 126


def test_whole_closure_is_exact_and_a_lost_piece_is_not(lab, tmp_path):
    base = closures.base_model(lab)
    original = closures.fine_tune(lab, base)
    again = closures.fine_tune(replace(lab, store=Store(tmp_path / "again")), base)
    assert closures.weights_sum(again) == closures.weights_sum(original)
    cfg = Closure(**original.card["config"]["closure"])
    for piece in PIECES:
        assert closures.weights_sum(closures.fine_tune(lab, base, lose(cfg, piece))) != closures.weights_sum(original)


def check_effects(design, row) -> None:
    effects, decided = summarise(design, [row, {k: v + 0.01 * (v < 1) for k, v in row.items()}])
    assert len(effects) == len(design.effects) and decided in ("supported", "refuted", "inconclusive")


def test_the_drill_measures_all_its_effects(lab):
    row, made = closures.closure_drill(lab)
    check_effects(closures.DESIGN, row)
    assert row["same weights"] == 1.0 and len(made) == 9


def test_sensitivity_measures_all_its_effects(lab, monkeypatch):
    """One run is real; the others are stand-ins whose accuracy is drawn from their settings."""
    real = recipes.run(lab, replace(CENTRE, steps=6), 100)
    assert len(real.card["measured"]["right"]) == len(HELD_OUT)
    calls = []

    def run(lab, knobs, seed):
        calls.append((knobs, seed))
        right = 200 + rng(seed, knobs).randrange(140)
        return SimpleNamespace(card={"measured": {"right": "1" * right + "0" * (343 - right)}})

    monkeypatch.setattr(recipes, "run", run)
    row, _ = recipes.sensitivity(lab)
    check_effects(recipes.DESIGN, row)
    assert all(0 <= row[k] <= 1 for k in row if k.startswith("spread"))
    assert row["centre"] == row["peak learning rate 1"] == row["warm-up 1"] == row["lr 4"], "the centre is one run"
    fresh = {seed for _, seed in calls} - {100, 1100, 2100}
    assert min(fresh) >= 20_000, "fresh seeds are no seed that anything was chosen on"
    rows = [row, {k: min(1.0, v + 0.05 * rng(1, k).random()) for k, v in row.items()}]
    shares = recipes.sensitivity_extra(rows)["variance_shares"]
    assert sum(v[0] for v in shares.values()) == pytest.approx(1)
