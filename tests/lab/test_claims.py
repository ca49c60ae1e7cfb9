"""Claim cards: verdicts by hand, the Brier score against its expectation, and evidence that says too little."""

from __future__ import annotations

import json

import matplotlib.pyplot as plt
import numpy as np
import pytest

from lifecycle_lib.core.stats import Effect, paired_effect, verdict
from lifecycle_lib.lab.claims import ClaimCard, brier, evidence_figure, in_unit, recorded, show_evidence

FIELDS = dict(claim="c", direction="up", smallest=0.1, unit="share", falsifier="f", scope="s", not_measured="m")
EVIDENCE = {"claim": "c", "verdict": "supported", "seeds": [0, 1], "falsifier": "f", "interval": "95 % paired t",
            "n_cases": 512, "smallest_effect": 0.1, "effects": [
                {"name": "gain", "estimate": 0.25, "low": 0.2, "high": 0.3, "unit": "share"},
                {"name": "size", "estimate": 2048.0, "low": 2048.0, "high": 2048.0, "unit": "bytes"}]}


def write(folder, **changes):
    (folder / "e.json").write_text(json.dumps(EVIDENCE | changes))
    return folder


def test_by_hand(capsys):
    card = ClaimCard(**FIELDS)
    card.predict(0.2, 0.8)
    assert card.settle(Effect(0.25, 0.2, 0.3, 5)) == "supported"
    said = capsys.readouterr().out
    assert "25 % [20 %, 30 %], n = 5" in said
    assert "Brier score 0.04" in said and "inside" in said  # (0.8 - 1)^2
    assert card.settle(Effect(0.02, -0.01, 0.05, 5)) == "refuted"
    assert "Brier score 0.64" in capsys.readouterr().out  # (0.8 - 0)^2


def test_down_is_up_turned_over_and_same_is_a_band():
    down, same = ClaimCard(**FIELDS | {"direction": "down"}), ClaimCard(**FIELDS | {"direction": "same"})
    rng = np.random.default_rng(0)
    for _ in range(200):
        effect = paired_effect(*rng.normal(size=(2, 4)))
        turned = Effect(-effect.estimate, -effect.high, -effect.low, effect.n)
        assert down.decide(effect) == ClaimCard(**FIELDS).decide(turned) == verdict(turned, 0.1)
    assert same.decide(Effect(0.0, -0.09, 0.09, 5)) == "supported"
    assert same.decide(Effect(0.0, -0.11, 0.09, 5)) == "inconclusive"
    assert same.decide(Effect(0.3, 0.2, 0.4, 5)) == "refuted"


def test_brier_is_proper_and_an_improper_score_is_caught():
    def best_report(score) -> float:
        grid = np.linspace(0, 1, 101)
        truth = 0.7
        return float(grid[np.argmin([truth * score(p, True) + (1 - truth) * score(p, False) for p in grid])])

    assert best_report(brier) == pytest.approx(0.7)
    assert best_report(lambda p, y: abs(p - y)) != pytest.approx(0.7)  # absolute error rewards overconfidence


@pytest.mark.parametrize("change", [{"claim": " "}, {"direction": "sideways"}, {"smallest": 0}, {"falsifier": ""}])
def test_a_claim_that_cannot_be_wrong_is_refused(change):
    with pytest.raises(ValueError, match="claim card"):
        ClaimCard(**FIELDS | change)


def test_settling_without_a_prediction_says_so(capsys):
    ClaimCard(**FIELDS).settle(Effect(0.25, 0.2, 0.3, 5))
    assert "no prediction" in capsys.readouterr().out
    with pytest.raises(ValueError, match="probability"):
        ClaimCard(**FIELDS).predict(0.1, 80)


def test_recorded_evidence(tmp_path, capsys, monkeypatch):
    write(tmp_path)
    show_evidence("e", folder=tmp_path)
    said = capsys.readouterr().out
    assert "SUPPORTED: c" in said and "25.0 %  [20.0 %, 30.0 %]" in said and "2,048 bytes" in said
    monkeypatch.setattr(plt, "show", lambda: None)
    evidence_figure("e", effects=["gain"], folder=tmp_path)
    ax = plt.gcf().axes[0]
    assert [line.get_xdata()[0] for line in ax.lines if line.get_marker() == "o"] == [25]
    plt.close("all")
    with pytest.raises(ValueError, match="share an axis"):
        evidence_figure("e", folder=tmp_path)
    with pytest.raises(ValueError, match="no effect 'loss'"):
        show_evidence("e", ["loss"], tmp_path)
    gain = EVIDENCE["effects"][0]
    write(tmp_path, effects=[gain | {"n": 5}, gain | {"name": "other gain"}])  # its own n only where it has one
    show_evidence("e", folder=tmp_path)
    said = [line for line in capsys.readouterr().out.splitlines() if "gain" in line]
    assert [line.rpartition("]")[2] for line in said] == ["  n = 5", ""]


def test_thin_or_missing_evidence_raises(tmp_path):
    with pytest.raises(ValueError, match="lifecycle evidence nowhere"):
        recorded("nowhere", tmp_path)
    for change in ({"seeds": [0]}, {"effects": []}, {"verdict": None}):
        with pytest.raises(ValueError, match="e.json"):
            recorded("e", write(tmp_path, **change))


def test_units():
    assert in_unit(0.256, "share") == "26 %" and in_unit(1, "share of seeds") == "100 % of seeds"
    assert in_unit(-1.5, "nats") == "-1.50 nats" and in_unit(2048, "bytes") == "2,048 bytes"
