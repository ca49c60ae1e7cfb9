"""The messy study: shares by hand and by all orders, one case under every switch, arms that differ in rows alone."""

import itertools
import random

import matplotlib.pyplot as plt
import pytest

from lifecycle_lib.core.store import Store
from lifecycle_lib.desk.messy import CAUSES, load_rates
from lifecycle_lib.desk.messy_measure import js_divergence, trigrams
from lifecycle_lib.desk.world import REASONS
from lifecycle_lib.lab import messy_figures
from lifecycle_lib.lab.design import summarise
from lifecycle_lib.lab.stages import Lab
from lifecycle_lib.lab.studies import STUDIES, messy
from lifecycle_lib.lab.studies.messy import CUSTOMERS, PLAYERS, TEACHER, WRITERS, drawn, reader_tokens, shapley, worth


def test_shapley_by_hand():
    """Two causes lose 1 and 2 points alone and 5 together: the 2 points of their meeting are halved."""
    lost = {frozenset(): 0.0, frozenset("a"): 1.0, frozenset("b"): 2.0, frozenset("ab"): 5.0}
    assert shapley(lost.__getitem__, "ab") == {"a": 2.0, "b": 3.0}


def test_shapley_is_the_mean_over_all_orders_and_adds_up():
    players = "abcd"
    draw = random.Random(7)
    values = {frozenset(s): draw.random() for k in range(5) for s in itertools.combinations(players, k)}
    got = shapley(values.__getitem__, players)
    orders = list(itertools.permutations(players))
    for p in players:
        gain = [values[frozenset(o[:o.index(p) + 1])] - values[frozenset(o[:o.index(p)])] for o in orders]
        assert got[p] == pytest.approx(sum(gain) / len(orders))
    assert sum(got.values()) == pytest.approx(values[frozenset(players)] - values[frozenset()])


def test_one_cause_at_a_time_does_not_add_up_where_causes_meet():
    lost = {frozenset(): 0.0, frozenset("a"): 1.0, frozenset("b"): 2.0, frozenset("ab"): 5.0}
    alone = sum(lost[frozenset(p)] for p in "ab")  # the broken variant: each cause by itself
    assert alone == 3 != lost[frozenset("ab")]


def test_rows_worth_by_hand():
    curve = [(0, 0.4), (1, 0.5), (3, 0.7)]
    assert worth(curve, 0.6) == (pytest.approx(2 ** 1.5 - 1), "")
    assert worth(curve, 0.4) == (0.0, "at most") and worth(curve, 0.8) == (3.0, "more than")


def test_a_switch_changes_the_message_and_never_its_reason():
    tidy, typed, own = (drawn(messy.Writer(causes=c, own=o), 300, 4, "exam", None)
                        for c, o in (((), 0.0), (CAUSES, 0.0), (CAUSES, 0.5)))
    assert [a for _, a in tidy] == [a for _, a in typed] == [a for _, a in own]
    assert {a for _, a in tidy} == {f"{r}<eos>" for r in REASONS}
    same = sum(a == b for (a, _), (b, _) in zip(typed, own))
    assert 0.4 < same / 300 < 0.6 and sum(a != b for (a, _), (b, _) in zip(tidy, typed)) > 150


def test_wrong_answers_come_at_their_rate_and_leave_the_messages_alone():
    right, some = (drawn(CUSTOMERS, 1000, 2, "x", wrong=w) for w in (0.0, 0.1))
    assert [p for p, _ in right] == [p for p, _ in some]
    assert 70 < sum(a != b for (_, a), (_, b) in zip(right, some)) < 130


def test_a_typo_falls_apart_into_shorter_tokens_and_comes_back_whole():
    tok = reader_tokens(450)
    whole, typed = tok.encode("my mug arrived cracked"), tok.encode("my mug arirved craked")
    assert len(whole) < len(typed) and tok.decode(typed) == "my mug arirved craked"
    assert tok.encode("damaged") == tok.encode("damaged")[:1]  # an answer is one token and <eos>


def test_the_customers_lie_nearest_to_themselves():
    def text(writer, label):
        return trigrams(p for p, _ in drawn(writer, 300, 9, label))

    real = text(CUSTOMERS, "seen")
    far = {name: js_divergence(text(w, name), real) for name, w in WRITERS.items()}
    assert min(far, key=far.get) == "customers" and max(far, key=far.get) == "narrow teacher"
    assert far["teacher"] > 2 * far["customers"]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    lab = Lab("smoke", seed=5, device="cpu", store=Store(tmp_path_factory.mktemp("store")))
    return lab, *messy.measure(lab)


def test_every_effect_has_its_numbers_and_stages_are_kept(smoke):
    lab, row, made = smoke
    needed = {k for _, a, b, _ in messy.DESIGN.effects for k in (a, b) if k}
    assert needed <= set(row) and len({a.fingerprint for a in made}) == len(made) == len(WRITERS) + 8
    assert messy.measure(lab)[1][0].path == made[0].path
    assert messy.summary([row])["correlation_over_writers"]["n"] == 7
    parts = [row[f"lost to {p}"] for p in PLAYERS]
    assert sum(parts) == pytest.approx(row["teacher.clean"] - row["teacher.messy"])
    assert sum(row[f"lost to {c}, typing"] for c in CAUSES) == pytest.approx(row["typing"])
    assert STUDIES["D10"] is messy.DESIGN and TEACHER in WRITERS.values()


def test_the_figures_draw_what_was_recorded(smoke):
    _, row, _ = smoke
    effects, _ = summarise(messy.DESIGN, [row, row])
    evidence = {"effects": effects, "seeds": [0, 1], "n_cases": 400, "extra": messy.summary([row, row])}
    drawn_rows = messy_figures.rows_figure(evidence, [(0, 0.5), (100, 0.8)])
    line = drawn_rows.axes[0].containers[1].lines[0]
    assert line.get_ydata()[0] == pytest.approx(100 * row["teacher.messy"])
    bars = messy_figures.causes_figure(evidence, dict.fromkeys(PLAYERS, 0.1)).axes[0].patches
    assert len(bars) == len(PLAYERS) + len(CAUSES)
    points = messy_figures.distance_figure(evidence).axes[0].lines
    assert [p.get_xdata()[0] for p in points] == [row[f"{w}.divergence"] for w in WRITERS]
    rates = messy_figures.rates_figure(load_rates()).axes[0]
    assert len(rates.get_yticklabels()) == 7
    plt.close("all")
