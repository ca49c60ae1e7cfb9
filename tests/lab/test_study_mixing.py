"""The mixture study: its world by hand, its arms equal in draws, and a table nobody could know is a coin of nine."""

import dataclasses

import pytest

from lifecycle_lib.core.store import Store
from lifecycle_lib.corpus.mixture import MixtureSpec
from lifecycle_lib.lab.stages import Lab
from lifecycle_lib.lab.studies import mixing
from lifecycle_lib.lab.studies.mixing import KEYS, SHOPS, covered, exam, shop_rows, tables, vocabulary


def test_the_world_is_one_table_a_shop_and_rows_quote_it():
    rows = shop_rows(3, SHOPS)
    assert len(KEYS) == 40 and len(rows) == sum(SHOPS.values())
    table = tables(3)
    for row in rows[::97]:
        key = tuple(next(w for w in row["prompt"].split() if w in names) for names in (mixing.REASONS, mixing.ITEMS))
        assert table[row["source"]][key] == row["answer"]
    wrong = shop_rows(3, {"shop-1": 2000}, wrong=0.5)
    right = sum(table["shop-1"][tuple(next(w for w in r["prompt"].split() if w in names)
                                      for names in (mixing.REASONS, mixing.ITEMS))] == r["answer"] for r in wrong)
    assert 900 < right < 1100


def test_coverage_by_hand_and_as_expected():
    row = shop_rows(0, {"shop-6": 1})[0]
    assert covered([row, row]) == pytest.approx(1 / 40)
    mean = sum(covered(shop_rows(s, {"shop-6": 40})) for s in range(50)) / 50
    assert mean == pytest.approx(1 - (1 - 1 / 40) ** 40, abs=0.03)  # coupon collector: 0.637


def test_training_never_shows_the_exam_wording():
    words = vocabulary()
    prompts = {r["prompt"] for r in shop_rows(1, SHOPS)}
    asked = {words.decode(i for i in row[1:] if i) for part in exam(1, words).values() for row in part.ids.tolist()}
    assert len(asked) == 240 and not any(p in a for a in asked for p in prompts)


def test_an_arm_is_stored_and_answers_by_chance_when_untrained(tmp_path):
    lab = Lab("smoke", seed=5, device="cpu", store=Store(tmp_path / "s"))
    cfg, rows = mixing.SIZES["smoke"], shop_rows(5, SHOPS)
    first = mixing.trained(lab, "a", rows, MixtureSpec(), cfg)
    assert first.card["steps"] == cfg.steps and set(first.card["measured"]) == set(SHOPS)
    assert mixing.trained(lab, "a", rows, MixtureSpec(), cfg).path == first.path
    assert mixing.trained(lab, "a", rows, MixtureSpec(temperature=0.5), cfg).path != first.path
    assert all(v < 0.5 for v in first.card["measured"].values())  # nine ids, twenty steps


def test_every_effect_has_its_numbers(tmp_path, monkeypatch):
    lab = Lab("smoke", seed=5, device="cpu", store=Store(tmp_path / "s"))
    tiny = dataclasses.replace(mixing.SIZES["smoke"], steps=2)
    row, made = mixing.measure(lab, tiny)
    needed = {k for _, a, b, _ in mixing.DESIGN.effects for k in (a, b) if k}
    assert needed <= set(row) and len({a.fingerprint for a in made}) == len(made)
