"""D9: the laws by hand, a smoke seed through every arm, the repairs, and a verdict that falls when the slope does."""

from math import isclose

import numpy as np
import pytest
from matplotlib import pyplot as plt
from scipy.stats import linregress

from lifecycle_lib.core.store import Store
from lifecycle_lib.desk.transcripts import HABITS, find_spans
from lifecycle_lib.lab.design import summarise
from lifecycle_lib.lab.stages import Lab
from lifecycle_lib.lab.studies import habits, habits_trigger
from lifecycle_lib.lab.studies.habits import DOSES, curve, sharpened
from lifecycle_lib.lab.studies.habits_design import (
    DESIGN,
    crossing,
    greedy_steps,
    imitation_figure,
    trigger_figure,
)


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Lab:
    return Lab("smoke", seed=100, device="cpu", store=Store(tmp_path_factory.mktemp("store")))


@pytest.fixture(scope="module")
def measured(lab):
    return habits.measure(lab)


def test_laws_by_hand():
    assert sharpened(0.25, 0.5) == 0.1 and sharpened(0.5, 0.1) == 0.5 and isclose(sharpened(0.3, 1.0), 0.3)
    assert crossing((0, 0.4, 0.6, 1), (0, 0.1, 0.9, 1), 0.5) == pytest.approx(0.5)
    assert crossing((0, 0.5, 1), (0, 0, 0.2), 0.5) is None  # never: no dose stands for it, not even the last
    assert crossing((0, 0.5, 1), (0.6, 0.7, 0.9), 0.5) is None  # from the start on: nor the last one either
    x, y = np.array(DOSES), np.array((0, 0.05, 0.2, 0.45, 0.8, 1.0))
    assert crossing(DOSES, y, 0.5) == pytest.approx(np.interp(0.5, y, x))


def ideal_row(slope: float = 1.0) -> dict:
    row = {f"{d}.{h}.in": d for d in DOSES for h in HABITS}
    row |= {f"{d}.{h}": slope * d for d in DOSES for h in HABITS}
    row |= {f"{d}.{h}.half": sharpened(d, 0.5) for d in DOSES for h in HABITS}
    return row | {f"{d}.{h}.greedy": float(d >= 0.7) for d in DOSES for h in HABITS}


def test_the_curve_of_a_perfect_mirror_and_scipys_slope():
    found = curve(ideal_row())
    assert found["slope"] == pytest.approx(1) and found["half - law"] == pytest.approx(0)
    late = ideal_row() | {f"{d}.apology.greedy": 0.1 for d in DOSES}
    steps = greedy_steps([ideal_row(), late, late])["greedy_steps"]
    assert steps["credit"]["crossed"] == 3 and steps["credit"]["median"] == pytest.approx(0.6)  # between .5 and .7
    assert steps["apology"]["seeds"][1:] == [None, None]  # two seeds that never start are not averaged in as .9
    assert steps["apology"]["crossed"] == 1 and steps["apology"]["median"] is None
    random = np.random.default_rng(0)
    noisy = {k: v + (random.normal(0, 0.1) if k.count(".") == 2 else 0) for k, v in ideal_row().items()}
    x, y = ([noisy[f"{d}.{h}{end}"] for h in HABITS for d in DOSES] for end in (".in", ""))
    assert curve(noisy)["slope"] == pytest.approx(linregress(x, y).slope)


def test_a_smoke_seed_measures_what_the_design_asks(measured):
    row, made = measured
    for _, treatment, control, _ in DESIGN.effects:
        assert treatment in row and (control is None or control in row)
    assert len({a.fingerprint for a in made}) == len(made) == len(DOSES) + len(habits.REPAIRS) + 3
    assert all(np.isfinite(list(row.values())))


def test_the_verdict_falls_with_the_slope(measured):
    row = measured[0] | {"0.9.policy.greedy": 0.8, "0.0.policy.greedy": 0.8}
    good = [row | {"slope - 1": x} for x in (-0.05, 0.02, 0.0)]
    bad = [row | {"slope - 1": x} for x in (-0.5, -0.52, -0.51)]
    hurt = [r | {"0.9.policy.greedy": 0.6 + 0.001 * i} for i, r in enumerate(good)]
    assert [summarise(DESIGN, rows)[1] for rows in (good, bad, hurt)] == ["supported", "refuted", "refuted"]
    effects, verdict = summarise(DESIGN, good)
    assert verdict == "supported" and len(effects) == len(DESIGN.effects)
    fig = imitation_figure({"per_seed": good})
    assert [ax.get_title(loc="left") for ax in fig.axes] == ["no trigger", "hangs on tone or tier"]
    plt.close(fig)


def test_repairs_touch_what_was_found_and_nothing_else(lab, monkeypatch):
    monkeypatch.setitem(habits.SIZES, "smoke", habits.Size(steps=10, batch=20))
    rows = habits.drawn(lab, 0.5)
    found = find_spans(rows, habits.MISSED, lab.seed)
    whole, masked, late = (habits.taught(lab, rows), habits.repaired(lab, "mask"), habits.repaired(lab, "late"))
    n_spans = sum(map(len, found))
    assert int((late.mask & ~masked.mask).sum()) == n_spans  # one token a span: the one that decides
    assert (masked.mask <= late.mask).all() and (late.mask <= whole.mask).all()
    assert len(habits.repaired(lab, "filter").ids) == sum(not f for f in found)
    assert len(habits.repaired(lab, "few").ids) == len(habits.repaired(lab, "filter").ids)
    rewritten = habits.repaired(lab, "rewrite")
    assert len(rewritten.ids) == len(rows) and rewritten.mask.sum() < whole.mask.sum()


def test_the_follow_up_on_triggers(lab):
    row, made = habits_trigger.measure(lab)
    assert len(made) == 5 and all(t in row and (c is None or c in row) for _, t, c, _ in habits_trigger.DESIGN.effects)
    assert [a.card["steps"] for a in made] == [1, 2, 4, 8, 8]
    assert row["short.in"] == row["again.in"] == pytest.approx(0.7, abs=0.25)  # the same transcripts
    row |= {"longer.in": 0.7, "longer.gap": 0.66, "short.gap": 0.2}
    seen = [row | {"longer.on": 0.68 + x, "longer.off": 0.02 + x} for x in (0, 0.01, 0.02)]
    blind = [r | {"longer.on": 0.4, "longer.off": 0.3} for r in seen]
    leaks = [r | {"longer.off": r["longer.off"] + 0.3} for r in seen]
    still = [r | {"longer.gap": 0.1 + r["longer.off"]} for r in seen]
    verdicts = [summarise(habits_trigger.DESIGN, rows)[1] for rows in (seen, blind, leaks, still)]
    assert verdicts == ["supported", "refuted", "refuted", "refuted"]
    fig = trigger_figure({"per_seed": seen, "n_cases": 48})
    drawn = [box.lines[0].get_ydata()[-1] for box in fig.axes[0].containers[::2]]  # at four times the steps
    assert drawn == pytest.approx([69, 3, 100 * row["longer.always"]])
    plt.close(fig)
