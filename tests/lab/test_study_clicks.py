"""Clicks: what each reason types, how pure a page is, a smoke seed through every arm, the verdict."""

import json

import numpy as np
import pytest
from matplotlib import pyplot as plt
from scipy.stats import binomtest

from lifecycle_lib.core.records import write_jsonl
from lifecycle_lib.core.seeds import rng
from lifecycle_lib.core.store import Store
from lifecycle_lib.corpus.feedback import read_feedback
from lifecycle_lib.desk.cases import golden_case
from lifecycle_lib.judge.evals import score
from lifecycle_lib.lab.design import summarise
from lifecycle_lib.lab.stages import Lab
from lifecycle_lib.lab.studies.clicks import (
    DESIGN,
    PURITIES,
    correction,
    draw_clicks,
    flips,
    habits,
    measure,
    purity_figure,
    right_share,
)


def test_what_each_reason_types():
    case = golden_case()
    said = {r: correction(case, r, rng(0, r)) for r in ("wrong", "ugly", "dislike", "test")}
    assert said["wrong"] == case.answer and said["test"] == "ok"
    assert said["ugly"] != case.answer and json.loads(said["ugly"]) == json.loads(case.answer)
    assert json.loads(said["dislike"])["evidence"] == "late or not: damaged P-7 30d, 12d confirmed"
    exact = {r: score(text, case)["exact"] for r, text in said.items()}
    assert exact == {"wrong": True, "ugly": False, "dislike": False, "test": False}
    assert score(said["dislike"], case)["eligible_ok"] and not score(said["test"], case)["valid"]


def test_purity_and_the_loader(tmp_path):
    rows = draw_clicks(800, 3, 0.4)
    assert binomtest(sum(r["reason"] == "wrong" for r in rows), 800, 0.4).pvalue > 1e-4
    assert {r["reason"] for r in draw_clicks(50, 3, 0.0, ("dislike",))} == {"dislike"}
    write_jsonl(tmp_path / "c.jsonl", rows)
    assert read_feedback(tmp_path / "c.jsonl") == rows
    with pytest.raises(ValueError, match="purity=1.2"):
        draw_clicks(3, 0, 1.2)


def test_right_shares_by_hand_and_by_the_judge():
    rows = draw_clicks(120, 5, 0.4)
    answers = [c["answer"].replace(',"label_created":true}', "}") for c in rows]
    assert right_share(rows) == sum(c["correction"] == a for c, a in zip(rows, answers)) / 120
    assert right_share(draw_clicks(60, 5, 1.0)) == 1 and right_share(draw_clicks(60, 5, 0.0, ("ugly", "test"))) == 0
    assert habits(["ok", '{"a": 1}', '{"evidence":"late or not: x"}']) == {
        "said ok": 1 / 3, "other words": 1 / 3, "spaced": 1 / 3, "broken": 2 / 3}  # no text here has all three fields
    assert 0.6 < sum(c["consent_to_train"] for c in draw_clicks(400, 5, 0.4)) / 400 < 0.95


def test_a_smoke_seed_and_the_verdict(tmp_path):
    row, made = measure(Lab("smoke", seed=100, device="cpu", store=Store(tmp_path)))
    assert all(t in row and (c is None or c in row) for _, t, c, _ in DESIGN.effects)
    assert len({a.fingerprint for a in made}) == 10 and np.isfinite(list(row.values())).all()
    assert 0 < row["gated.rows"] == row["as few.rows"] < row["purity 0.4.rows"]  # the control has as many rows
    fixed = row | {"before.exact_pass": 0.65, "purity 0.4.exact_pass": 0.4, "as few.exact_pass": 0.4}
    good, none = ([fixed | {"gated.exact_pass": g + x} for x in (0, 0.01, 0.02)] for g in (0.8, 0.41))
    harmless = [r | {"purity 0.4.exact_pass": 0.67 + r["gated.exact_pass"] / 100} for r in good]
    by_size = [r | {"as few.exact_pass": 0.79 + r["gated.exact_pass"] / 100} for r in good]  # fewer rows did it alone
    verdicts = [summarise(DESIGN, rows)[1] for rows in (good, none, harmless, by_size)]
    assert verdicts == ["supported", "refuted", "refuted", "refuted"]
    up = {f"purity {q}.exact_pass": q for q in PURITIES}
    assert flips([fixed | up])["flip"]["median"] == pytest.approx(0.65)
    assert flips([fixed | dict.fromkeys(up, 0.9)])["flip"] == {"seeds": [None], "crossed": 0, "median": None}
    fig = purity_figure({"per_seed": good, "n_cases": 256})
    assert fig.axes[0].get_xlabel() == "corrections that are right (%)"
    plt.close(fig)
