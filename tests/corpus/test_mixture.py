"""Mixture: shares by hand and by an oracle, levers as properties, the lock and what moved, planted faults."""

import dataclasses
import json

import numpy as np
import pytest
from scipy import stats

from lifecycle_lib.corpus import mixture
from lifecycle_lib.corpus.mixture import (
    MixtureSpec,
    Phase,
    cap_shares,
    counts,
    draw,
    make_lock,
    moved,
    psi,
    read_lock,
    row_weights,
    shares,
    sheet,
    write_lock,
)

SIZES = {"a": 900, "b": 90, "c": 10}


def rows(**sizes):
    return [{"id": f"{k}{i}", "text": f"{k} text {i}" + " more" * (i % 5), "source": k, "licence": "CC0-1.0"}
            for k, n in sizes.items() for i in range(n)]


def test_temperature_by_hand():
    got = shares(SIZES, MixtureSpec(temperature=0.5))
    total = 30 + 90**0.5 + 10**0.5
    assert got == pytest.approx({"a": 30 / total, "b": 90**0.5 / total, "c": 10**0.5 / total})
    assert [round(v, 3) for v in got.values()] == [0.703, 0.222, 0.074]
    assert shares(SIZES, MixtureSpec(temperature=0)) == pytest.approx({k: 1 / 3 for k in SIZES})
    assert shares(SIZES, MixtureSpec()) == pytest.approx({"a": 0.9, "b": 0.09, "c": 0.01})


@pytest.mark.parametrize("seed", range(20))
def test_shares_sum_to_one_and_respect_caps_and_order(seed):
    random = np.random.default_rng(seed)
    sizes = {f"s{i}": float(v) for i, v in enumerate(random.integers(1, 1000, 6))}
    caps = {"s0": 0.3, "s1": 0.25}
    spec = MixtureSpec(temperature=float(random.random()), caps=caps)
    got = shares(sizes, spec)
    assert sum(got.values()) == pytest.approx(1) and all(got[k] <= c + 1e-9 for k, c in caps.items())
    free = [k for k in sizes if k not in caps]
    plain = shares(sizes, dataclasses.replace(spec, caps={}))
    ratio = {k: got[k] / plain[k] for k in free}
    assert max(ratio.values()) == pytest.approx(min(ratio.values())) and min(ratio.values()) >= 1 - 1e-9


def test_water_filling_by_hand_and_when_the_excess_hits_a_second_cap():
    assert cap_shares({"a": 0.8, "b": 0.15, "c": 0.05}, {"a": 0.5}) == pytest.approx({"a": 0.5, "b": 0.375, "c": 0.125})
    got = cap_shares({"a": 0.8, "b": 0.15, "c": 0.05}, {"a": 0.5, "b": 0.2})
    assert got == pytest.approx({"a": 0.5, "b": 0.2, "c": 0.3})
    with pytest.raises(ValueError, match="to no group"):
        cap_shares({"a": 0.8, "b": 0.2}, {"a": 0.3, "b": 0.3})


def test_one_pass_of_capping_would_not_be_enough():
    """The broken variant: clip once and renormalise. It breaks the second cap, which the property above forbids."""
    given, caps = {"a": 0.8, "b": 0.15, "c": 0.05}, {"a": 0.5, "b": 0.2}
    once = {k: min(v, caps.get(k, 1)) for k, v in given.items()}
    once = {k: v / sum(once.values()) for k, v in once.items()}
    assert once["a"] > caps["a"]


def test_phases_jump_or_ramp():
    jump = MixtureSpec(weights={"a": 1}, phases=(Phase(start=0.5, weights={"c": 1}),))
    ramp = MixtureSpec(weights={"a": 1}, phases=(Phase(start=0.5, weights={"c": 1}, ramp=0.5),))
    assert shares(SIZES, jump, 0.49)["a"] == 1 and shares(SIZES, jump, 0.5)["c"] == 1
    assert shares(SIZES, ramp, 0.75) == pytest.approx({"a": 0.5, "b": 0, "c": 0.5})


def test_draws_follow_the_shares_and_repeat_by_seed():
    data, spec = rows(a=300, b=30, c=10), MixtureSpec(temperature=0.5)
    pick, log = draw(data, spec, 6000, seed=3)
    want = shares(counts(data, spec), spec)
    assert stats.chisquare(list(log[0]["drawn"].values()), [6000 * v for v in want.values()]).pvalue > 1e-3
    again, _ = draw(data, spec, 6000, seed=3)
    other, _ = draw(data, spec, 6000, seed=4)
    assert (pick == again).all() and (pick != other).any()
    natural = stats.chisquare(list(log[0]["drawn"].values()), [6000 * n / 340 for n in (300, 30, 10)]).pvalue
    assert natural < 1e-6  # the test can fail: these draws do not follow the natural shares


def test_weighing_by_length():
    data = [{"id": "s", "text": "one", "source": "x"}, {"id": "l", "text": "one two three", "source": "x"}]
    assert row_weights(data, MixtureSpec()) == pytest.approx([0.5, 0.5])
    assert row_weights(data, MixtureSpec(unit="token")) == pytest.approx([0.25, 0.75])


def test_psi_is_the_symmetrised_divergence():
    p, q = {"a": 50, "b": 30, "c": 20}, {"a": 20, "b": 30, "c": 50}
    total, parts = psi(p, q)
    a, b = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
    assert total == pytest.approx(stats.entropy(a, b) + stats.entropy(b, a))
    assert list(parts)[-1] == "b" and psi(p, p)[0] == 0 and psi({"a": 1}, {"b": 1})[0] > 5
    with pytest.raises(ValueError, match="empty"):
        psi({}, q)


def test_the_lock_names_what_moved(tmp_path):
    data, held, spec = rows(a=20, b=5), rows(z=3), MixtureSpec()
    made = {"dedupe": "word-5 @ .8"}
    lock = make_lock(data, spec, 1, held, made)
    assert moved(lock, make_lock(data[::-1], spec, 1, held, made)) == []  # order is not content
    edited = [{**data[0], "text": "edited"}, *data[1:]]
    for new, said in (
        (make_lock(edited, spec, 1, held, made), "group a: content changed, 20 -> 20 rows"),
        (make_lock(rows(a=20), spec, 1, held, made), "group b: disappeared (5 rows)"),
        (make_lock(data, spec, 1, held, {"dedupe": "word-3 @ .8"}), "dedupe: word-5 @ .8 -> word-3 @ .8"),
        (make_lock(data, MixtureSpec(temperature=0.5), 1, held, made), "lever temperature: 1.0 -> 0.5"),
        (make_lock(data, spec, 2, held, made), "seed: 1 -> 2"),
        (make_lock(data, spec, 1, held[:2], made), "held-out rows: changed; scores before and after do not compare"),
    ):
        assert moved(lock, new) == [said]
    write_lock(tmp_path / "mixture.lock.json", lock)
    assert read_lock(tmp_path / "mixture.lock.json") == json.loads(json.dumps(lock))
    write_lock(tmp_path / "mixture.lock.json", lock | {"seed": 9})
    with pytest.raises(ValueError, match="changed since"):
        read_lock(tmp_path / "mixture.lock.json")
    write_lock(tmp_path / "x.json", {"a": 1})
    with pytest.raises(ValueError, match="not a mixture lock"):
        read_lock(tmp_path / "x.json")


def test_a_hash_of_counts_alone_would_miss_an_edit(monkeypatch):
    data, held = rows(a=20, b=5), rows(z=3)
    edited = [{**data[0], "text": "edited"}, *data[1:]]
    monkeypatch.setattr(mixture, "group_hash", lambda part: str(len(part)))
    assert moved(make_lock(data, MixtureSpec(), 1, held, {}), make_lock(edited, MixtureSpec(), 1, held, {})) == []


def test_a_held_out_row_in_the_mixture_is_refused():
    data = rows(a=5)
    for leak in (data[2], {**data[2], "id": "other"}):
        with pytest.raises(ValueError, match="'a2' stands in the mixture"):
            make_lock(data, MixtureSpec(), 0, [leak], {})


def test_sheet():
    data = [*rows(a=3), {"id": "again", "text": "a text 0", "source": "a", "licence": "MIT"}]
    [line] = sheet(data)
    assert line["rows"] == 4 and line["repeats"] == 0.25 and line["licences"] == ["CC0-1.0", "MIT"]


@pytest.mark.parametrize("make, match", [
    (lambda: MixtureSpec(temperature=2), "temperature=2"),
    (lambda: MixtureSpec(unit="byte"), "unit='byte'"),
    (lambda: MixtureSpec(caps={"a": 0}), "cap of 'a'"),
    (lambda: MixtureSpec(weights={"a": -1, "b": 2}), "weights {'a': -1}"),
    (lambda: MixtureSpec(weights={"a": 0}), "at least one above 0"),
    (lambda: Phase(start=0.9, weights={"a": 1}, ramp=0.2), "must not pass 1"),
    (lambda: MixtureSpec(phases=(Phase(start=0.5, weights={"a": 1}, ramp=0.3), Phase(start=0.6, weights={"a": 1}))),
     "phases start at"),
    (lambda: shares(SIZES, MixtureSpec(weights={"q": 1})), "weight of 'q': no such source"),
    (lambda: shares(SIZES, MixtureSpec(), 1.5), "progress=1.5"),
    (lambda: counts([], MixtureSpec()), "no rows"),
    (lambda: counts([{"id": "1", "text": "x"}], MixtureSpec()), "field 'source' is None"),
    (lambda: draw(rows(a=3), MixtureSpec(), 2, 0, blocks=3), "blocks=3"),
])
def test_bad_input(make, match):
    with pytest.raises(ValueError, match=match):
        make()
