"""The live erosion on the chain (smoke: sizes and bookkeeping), and its figures from hand-made rows."""

import matplotlib.pyplot as plt
import pytest

from lifecycle_lib.core.store import Store
from lifecycle_lib.desk.cases import draw_cases
from lifecycle_lib.desk.safety import draw_asks
from lifecycle_lib.judge.gates import GateRefused
from lifecycle_lib.lab.forgetting_figures import (
    chain_cells,
    curves_of,
    equal_skill_figure,
    erosion_figure,
    last_cells,
    ledger_figure,
    path_cells,
)
from lifecycle_lib.lab.stages import Lab
from lifecycle_lib.lab.studies.erosion import Arm
from lifecycle_lib.lab.studies.erosion_live import LiveConfig, desk_rows, erode_chain, launch_gate
from lifecycle_lib.lab.studies.ledger import DESIGN


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return Lab("smoke", seed=0, device="cpu", store=Store(tmp_path_factory.mktemp("store")))


def test_every_arm_starts_from_the_same_taught_model(lab):
    cfg = LiveConfig(align_steps=2, marks=(0, 1, 2), batch=4, n_rows=16, n_cases=2, n_asks=2)
    curves, models = erode_chain(lab, {"plain": Arm(), "replay 5 %": Arm(replay=0.5), "LoRA": Arm(rank=1)}, cfg)
    assert [c["step"] for c in curves["plain"]] == [0, 1, 2] and set(models) == {"taught", *curves}
    assert curves["plain"][0] == curves["replay 5 %"][0] == curves["LoRA"][0]
    assert all(0 <= c[k] <= 1 for curve in curves.values() for c in curve for k in ("exact", "refusal", "over_refusal"))


def test_rows_are_the_contract_to_the_character(lab):
    """Oracle: the tokenizer's own decoder."""
    tok = lab.load_tokenizer()
    things = [*draw_asks("harmful", 3, 0, "align"), *draw_cases(3, 0, "clean")]
    rows = desk_rows(tok, things)
    for thing, ids, mask in zip(things, rows.ids, rows.mask):
        assert tok.decode(ids[mask].tolist()) == thing.answer + "<eos>"
    assert not any("label_created" in t.answer for t in things)


def test_the_launch_gate_is_the_real_one(lab):
    model = lab.load(lab.sft())
    assert not launch_gate(lab, model, model, 48).ships  # a smoke model's answers are no JSON
    with pytest.raises(GateRefused, match="10 cases"):
        launch_gate(lab, model, model, 10)


def rows_by_hand():
    def curve(shift):
        return [{"step": s, "exact": e, "refusal": r + shift, "over_refusal": 0.1, "ships": 1.0}
                for s, e, r in ((0, 0.0, 0.9), (10, 0.8 if shift else 0.3, 0.1))]
    return [{"plain.curve": curve(d), "a": 0.4 + d, "b": 0.9, "c": 2.5} for d in (0.0, 0.02, 0.04)]


def test_cells_name_what_the_ledger_records():
    keys = {key for _, a, b, *_ in DESIGN.effects for key in (a, b) if key}
    for cells in (chain_cells(), path_cells("none"), last_cells()):
        assert {key for line in cells.values() for key in line.values()} <= keys
    assert list(path_cells("policy last")) == ["base", "after reading", "after chat", "after policy"]
    assert list(path_cells("all at once")) == ["base", "after all at once"]


def test_figures_draw_what_the_rows_hold():
    rows = rows_by_hand()
    fig = erosion_figure(rows, arms=("plain",), live={"plain": rows[0]["plain.curve"]})
    marked = {line.get_label(): list(line.get_ydata()) for line in fig.axes[0].get_lines()}
    assert marked["refusal of harmful asks"] == pytest.approx([92, 12]) and "Not measured" in fig._supxlabel.get_text()
    assert [ax.get_title(loc="left") for ax in fig.axes] == ["plain", "plain, your run"]
    heat = ledger_figure(rows, {"s1": {"x": "a", "y": "b", "bits": "c"}}, "by hand")
    assert heat.axes[0].texts[2].get_text().startswith("2.5\n[2.5") and heat.axes[0].images[0].get_array()[0, 2] == 75
    shown = [t.get_text() for t in heat.axes[0].texts]
    assert shown[0].startswith("42\n[") and shown[1].startswith("90\n[90, 90]")
    dots = equal_skill_figure(rows, ["plain"]).axes[0]  # at .5 of .0 to .8: five eighths of the way; one never did
    assert list(dots.get_lines()[0].get_xdata()) == pytest.approx([100 * (0.9 + d - 0.8 * 5 / 8) for d in (0.02, 0.04)])
    assert [t.get_text() for t in dots.get_yticklabels()] == ["plain (2 of 3 seeds)"]
    plt.close("all")
    with pytest.raises(ValueError, match="no curve of arm 'KL'; there are plain"):
        curves_of(rows, "KL")
    broken = [{**r, "plain.curve": r["plain.curve"][:1]} for r in rows[:1]] + rows[1:]
    with pytest.raises(IndexError):  # a curve that lost a checkpoint is no curve of the same steps
        erosion_figure([broken[1], broken[0]], arms=("plain",))
    plt.close("all")
