"""D5: what each filter does to the corpus by hand, the alarm against scipy, and an arm that runs."""

import dataclasses
from collections import Counter

import pytest
from scipy.stats import binomtest

from lifecycle_lib.core.store import Store
from lifecycle_lib.lab.stages import Lab
from lifecycle_lib.lab.studies import STUDIES, dedup, dedup_figures
from lifecycle_lib.lab.studies.dedup import ARMS, Size, alarm, build, draw_corpus, item_pool, kept_by

SEED = 107
SIZE = Size(plain=150, payment=50)


@pytest.fixture(scope="module")
def corpus() -> dedup.Corpus:
    return draw_corpus(SEED, SIZE)


def left(corpus: dedup.Corpus, name: str) -> Counter:
    return Counter(corpus.rows[i]["slice"] for i in kept_by(ARMS[name], corpus.rows, SEED).kept)


def test_the_corpus_by_hand(corpus):
    counts = Counter(row["slice"] for row in corpus.rows)
    assert counts == {"plain": 150, "messy": 16, "EN-B": 40, "REVERSAL": 11, "page": 6 * (1 + 4 + 16 + 64)}
    assert corpus.rows == draw_corpus(SEED, SIZE).rows != draw_corpus(SEED + 1, SIZE).rows
    assert len({row["answer"] for row in corpus.rows if row["slice"] == "REVERSAL"}) == 11


def test_no_filter_keeps_all_and_each_threshold_takes_its_slices(corpus):
    assert left(corpus, "off").total() == len(corpus.rows)
    assert left(corpus, "0.95")["REVERSAL"] == 11 and left(corpus, "0.95")["messy"] == 16
    assert left(corpus, "0.9")["REVERSAL"] == 11 and left(corpus, "0.9")["messy"] == 0
    assert left(corpus, "0.8")["REVERSAL"] == 2 and left(corpus, "0.8")["page"] == 24  # one a page
    assert left(corpus, "0.6")["EN-B"] < 40 / 2 < 30 < left(corpus, "0.8")["EN-B"]


def test_protection_and_caps(corpus):
    assert left(corpus, "0.8 protected")["REVERSAL"] == 11 == left(corpus, "0.8 pages only")["REVERSAL"]
    assert left(corpus, "0.8 keep 2")["REVERSAL"] == 4 and left(corpus, "0.8 keep 4")["REVERSAL"] == 8
    assert left(corpus, "0.8 keep 2")["page"] == 6 * (1 + 2 + 2 + 2)


def test_what_is_removed_at_a_threshold_really_is_alike(corpus):
    """Outside oracle: Jaccard by the definition, over all pairs of the rows that are no pages."""
    texts = [row["text"].split() for row in corpus.rows if row["domain"] == "message"]
    sets = [{tuple(t[i:i + 3]) for i in range(len(t) - 2)} for t in texts]
    alike = {i for i, a in enumerate(sets) for j, b in enumerate(sets) if i != j and len(a & b) / len(a | b) >= .8}
    removed = {r.row for r in kept_by(ARMS["0.8"], corpus.rows, SEED).removed if r.row < len(texts)}
    assert removed <= alike and len(alike) >= 2 * 16 + 11


def test_items_are_unseen_and_ask_for_what_their_row_asks(corpus):
    pool = item_pool(corpus, SEED, SIZE)
    seen = {row["prompt"] for row in corpus.rows}
    assert not any(item["prompt"] in seen for item in pool)
    assert all(item["answer"] == corpus.rows[item["row"]]["answer"] for item in pool)
    assert Counter(item["slice"] for item in pool)["REVERSAL"] == 11 * SIZE.wordings


def test_a_build_after_the_filter_cannot_ask_about_what_was_removed(corpus):
    pool, kept = item_pool(corpus, SEED, SIZE), kept_by(ARMS["0.8"], corpus.rows, SEED).kept
    asked = {how: build(pool, corpus, kept, how, 200, SEED) for how in dedup.BUILDS}
    gone = set(range(len(corpus.rows))) - set(kept)
    assert not {pool[i]["row"] for i in asked["after"] + asked["after, by slice"]} & gone
    assert {pool[i]["row"] for i in asked["before, by slice"]} & gone
    assert Counter(pool[i]["slice"] for i in asked["before, by slice"])["REVERSAL"] == 50
    assert asked["before"] == build(pool, corpus, kept, "before", 200, SEED)


@pytest.mark.parametrize("lost,won", [(5, 0), (6, 0), (7, 0), (8, 0), (9, 1), (12, 3), (3, 12)])
def test_the_alarm_is_the_exact_test(lost, won):
    before, after = "1" * lost + "0" * won + "11", "0" * lost + "1" * won + "11"
    pool = [{"slice": "plain"}] * len(before)
    p = binomtest(lost, lost + won).pvalue
    assert alarm(range(len(pool)), pool, before, after) == (lost > won and p < .05)
    assert alarm(range(len(pool)), pool, before, after, "plain") == (lost > won and p < .0125)
    assert not alarm(range(len(pool)), pool, before, after, "REVERSAL")  # no items, no alarm
    assert not alarm(range(len(pool)), pool, after, before) or won > lost  # broken on purpose: models swapped


def test_arms_run_and_every_effect_has_its_number(tmp_path):
    lab = Lab("smoke", seed=SEED, device="cpu", store=Store(tmp_path / "s"))
    tiny = dataclasses.replace(dedup.SIZES["smoke"], plain=30, payment=10, steps=2)
    row, made = dedup.measure(lab, tiny, ("off", "0.8", "0.8 hardest"))
    assert len({a.fingerprint for a in made}) == 3 and all(a.card["steps"] == 2 for a in made)
    assert STUDIES["D5"] is dedup.DESIGN
    for _, treatment, control, _ in dedup.DESIGN.effects:
        for key in filter(None, (treatment, control)):
            arm = next((a for a in sorted(ARMS, key=len, reverse=True) if key.startswith(f"{a}.")), None)
            assert (key if arm is None else "0.8" + key.removeprefix(arm)) in row, key
    again, _ = dedup.measure(lab, tiny, ("0.8",))
    assert again["off.mean"] == row["off.mean"]


def test_figures_need_every_arm_and_say_what_they_rest_on():
    effects = [{"name": n, "estimate": .5, "low": .4, "high": .6} for n, *_ in dedup.DESIGN.effects]
    for draw in (dedup_figures.threshold_figure, dedup_figures.trade_figure):
        fig = draw({"effects": effects, "seeds": [0, 1, 2]})
        assert "n = 3 seeds" in fig.get_supxlabel() and "Not measured here" in fig.get_supxlabel()
        with pytest.raises(ValueError, match="off: REVERSAL"):
            draw({"effects": [e for e in effects if e["name"] != "off: REVERSAL"], "seeds": [0, 1, 2]})
