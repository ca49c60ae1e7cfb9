"""The ledger: forgetting and backward transfer by hand, its exams, its paths, its design."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from lifecycle_lib.core.seeds import seed_everything
from lifecycle_lib.core.store import Store
from lifecycle_lib.lab.stages import Lab
from lifecycle_lib.lab.studies import erosion, ledger
from lifecycle_lib.lab.studies.ledger import (
    DESIGN,
    PATHS,
    SKILLS,
    backward_transfer,
    bits,
    chat_rows,
    exam,
    forgetting,
    reading_cases,
    small_ledger,
)
from lifecycle_lib.lab.studies.small_desk import document_rows, small_documents, small_gpt, vocabulary
from lifecycle_lib.model.gpt import GPT

VOCAB = vocabulary()
CFG = replace(erosion.SIZES["smoke"], n_cases=40, n_rows=64, n_asks=4)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """One store for the file: the small base is made once."""
    return Lab("smoke", seed=0, device="cpu", store=Store(tmp_path_factory.mktemp("ledger")))


def test_forgetting_by_hand_takes_the_best_earlier_stage_not_the_last():
    table = [{"a": 0.2, "b": 0.0}, {"a": 0.9, "b": 0.1}, {"a": 0.5, "b": 0.8}, {"a": 0.4, "b": 0.9}]
    assert forgetting(table) == {"a": pytest.approx(0.5), "b": pytest.approx(-0.1)}
    previous = {k: table[-2][k] - table[-1][k] for k in "ab"}  # broken: against the stage before alone
    assert previous["a"] == pytest.approx(0.1) != forgetting(table)["a"]
    with pytest.raises(ValueError, match="1 stage"):
        forgetting(table[:1])
    with pytest.raises(ValueError, match="different skills"):
        forgetting([{"a": 1.0}, {"b": 1.0}])


def test_backward_transfer_is_equation_3_of_lopez_paz_and_ranzato():
    """Oracle: numpy on their R, where R[i, j] is the score on task j after task i."""
    r = np.random.default_rng(0).random((4, 4))
    table = [{str(j): r[i, j] for j in range(4)} for i in range(4)]
    want = np.mean([r[3, i] - r[i, i] for i in range(3)])
    assert backward_transfer(table, list("0123")) == pytest.approx(want)
    with pytest.raises(ValueError, match="one skill a stage"):
        backward_transfer(table, ["0"])


def test_bits_of_a_blind_model_are_log2_of_its_vocabulary():
    seed_everything(0)
    model = GPT(small_gpt(VOCAB, 16, 1))
    with torch.no_grad():
        model.wte.weight.zero_()
    rows = document_rows(VOCAB, small_documents(20, 1))
    assert bits(model, rows) == pytest.approx(math.log2(len(VOCAB)), abs=1e-4)


def test_exams_hold_what_training_never_shows():
    cases, harmful, twins, chats = exam(0, 50, 20)
    assert sum(c.policy is None for c in cases) == 10 and len({c.case_id for c in cases}) == 50
    for case in cases:
        assert (case.reason in {p.reason for p in case.policies}) == (case.policy is not None)
    trained = {c.prompt for c in reading_cases(500, 0, "train")}
    assert not trained & {c.prompt for c in cases} and not trained & {a.prompt for a in harmful + twins}
    assert all(len(c.replies) == 4 for c in chats)
    rows = chat_rows(VOCAB, 8, 0)
    said = VOCAB.decode(rows.ids[0][rows.mask[0]].tolist()).removesuffix("<eos>")
    assert any(said.startswith(start) for start in ("thanks", "sorry", "we have", "a colleague"))


def test_a_path_fills_every_cell_and_joint_training_has_one_stage(lab):
    for name, stages in (("LoRA r=16", ["base", "policy", "reading", "chat"]), ("all at once", ["base", "all"])):
        measured = small_ledger(lab, CFG, name, PATHS[name]).card["measured"]
        assert [m["stage"] for m in measured] == stages
        assert all(0 <= m[k] <= 1 for m in measured for k in SKILLS) and all(m["bits"] > 0 for m in measured)


def test_design_and_chain(lab, monkeypatch):
    monkeypatch.setattr(ledger, "PATHS", {k: PATHS[k] for k in ("none", "policy last")})
    row, made = ledger.measure(lab, CFG)
    assert len(made) == 6
    assert row["chain.forgetting.json"] == pytest.approx(
        max(row[f"chain.{s}.json"] for s in ("base", "sft", "dpo")) - row["chain.rlvr.json"])
    row |= DESIGN.derive(row)
    first = [max(row[f"none.{i}.{k}"] for i in range(3)) - row[f"none.3.{k}"] for k in ("refusal", "exact")]
    assert row["none.forgetting"] == pytest.approx(sum(first) / 2)  # not of chat, which came last
    for _, treatment, control, *_ in DESIGN.effects:
        for key in (treatment, control):
            assert key is None or not key.startswith(("none.", "policy last.", "chain.")) or key in row
    named = {name for name, *_ in DESIGN.effects}
    assert len(named) == len(DESIGN.effects) and {n for n, _ in DESIGN.also} <= named
