"""Clicks: what each reason types, how pure a page is, a smoke seed through every arm, the verdict."""

import json

import numpy as np
import pytest
from scipy.stats import binomtest

from lifecycle_lib.core.records import write_jsonl
from lifecycle_lib.core.seeds import rng
from lifecycle_lib.core.store import Store
from lifecycle_lib.corpus.feedback import read_feedback
from lifecycle_lib.desk.cases import golden_case
from lifecycle_lib.judge.evals import score
from lifecycle_lib.lab.design import summarise
from lifecycle_lib.lab.stages import Lab
from lifecycle_lib.lab.studies.clicks import DESIGN, correction, draw_clicks, measure


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


def test_a_smoke_seed_and_the_verdict(tmp_path):
    row, made = measure(Lab("smoke", seed=100, device="cpu", store=Store(tmp_path)))
    assert all(t in row and (c is None or c in row) for _, t, c, _ in DESIGN.effects)
    assert len(made) == 9 and np.isfinite(list(row.values())).all()
    fixed = row | {"before.exact_pass": 0.65, "purity 0.4.exact_pass": 0.4}
    good, none = ([fixed | {"gated.exact_pass": g + x} for x in (0, 0.01, 0.02)] for g in (0.8, 0.41))
    harmless = [r | {"purity 0.4.exact_pass": 0.67 + r["gated.exact_pass"] / 100} for r in good]
    assert [summarise(DESIGN, rows)[1] for rows in (good, none, harmless)] == ["supported", "refuted", "refuted"]
