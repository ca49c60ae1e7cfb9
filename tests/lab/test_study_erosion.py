"""Erosion: the small desk, the watched fine-tune, equal skill, the gate as launch suite, the design."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from lifecycle_lib.core.seeds import rng, seed_everything
from lifecycle_lib.core.store import Store
from lifecycle_lib.desk.safety import REFUSALS
from lifecycle_lib.desk.world import held_out, is_eligible
from lifecycle_lib.judge.gates import GateRefused, decide
from lifecycle_lib.lab.stages import Lab
from lifecycle_lib.lab.studies import erosion, erosion_rates
from lifecycle_lib.lab.studies.erosion import (
    ARMS,
    DESIGN,
    SIZES,
    Arm,
    at_skill,
    erode,
    exactly_equal_skill,
    half_step,
    interpolated,
)
from lifecycle_lib.lab.studies.small import batches_of
from lifecycle_lib.lab.studies.small_desk import (
    answers,
    draw_small_case,
    launch_report,
    small_asks,
    small_cases,
    small_documents,
    small_gpt,
    small_rows,
    vocabulary,
)
from lifecycle_lib.model.gpt import GPT

VOCAB = vocabulary()


def tiny(seed=0):
    seed_everything(seed)
    return GPT(small_gpt(VOCAB, 16, 1))


def test_pieces_keep_the_text_to_the_character():
    for text in small_documents(200, 3) + [a.prompt + a.answer for r in ("harmful", "twin") for a in
                                           small_asks(r, 100, 3, "eval")]:
        assert VOCAB.decode(VOCAB.encode(text)) == text
    case = small_cases(1, 0, "eval")[0]
    assert len(VOCAB.encode(case.answer)) == 12  # scaffolding is one piece a run
    with pytest.raises(ValueError, match="piece ' elephant' is not in the vocabulary"):
        VOCAB.encode("<user>my elephant")
    with pytest.raises(ValueError, match="no desk text"):
        VOCAB.encode("<user>[my mug]")


def test_small_cases_are_true_and_held_out():
    r = rng(5)
    for unseen in (True, False):
        for i in range(300):
            case = draw_small_case(r, f"x-{i}", unseen)
            assert all(held_out(case.days, p.window_days) == unseen for p in case.policies)
            assert case.eligible is is_eligible(case.policy, case.order) and case.policy.reason == case.reason
    share = sum(c.eligible for c in small_cases(2000, 0, "train")) / 2000
    assert 0.3 < share < 0.6  # neither answer wins by default


def test_half_step_and_equal_skill_by_hand():
    curve = [{"step": s, "exact": e, "refusal": r} for s, e, r in
             ((0, 0.0, 1.0), (10, 0.1, 0.5), (20, 0.45, 0.1), (30, 0.7, 0.0), (40, 0.8, 0.2))]
    assert half_step(curve, "refusal", rising=False) == 10 and half_step(curve, "exact", rising=True) == 20
    assert at_skill(curve, 0.5)["step"] == 30 and at_skill(curve, 0.5)["reached"] == 1
    never = at_skill(curve, 0.9)
    assert never["step"] == 40 and never["reached"] == 0
    # broken: comparing after equal steps would read .2 where equal skill reads 0
    assert curve[-1]["refusal"] != at_skill(curve, 0.7)["refusal"]
    with pytest.raises(ValueError, match="empty curve"):
        at_skill([], 0.5)


def test_refusal_at_exactly_the_target_is_numpys_interpolation():
    curve = [{"exact": e, "refusal": r} for e, r in ((0.0, 1.0), (0.3, 0.8), (0.7, 0.2), (0.4, 0.1))]
    assert interpolated(curve, "refusal", 0.5) == pytest.approx(np.interp(0.5, [0.3, 0.7], [0.8, 0.2]))
    assert interpolated(curve, "refusal", 0.9) is None
    rows = [{"plain.curve": curve, **{f"{a}.curve": curve if a == "L2-SP" or i else curve[:1] for a in erosion.OTHERS}}
            for i in range(3)]
    found = exactly_equal_skill(rows)["interpolated"]
    assert found["L2-SP"] == {"refusal - plain": [0, 0, 0], "n": 3} and found["replay 5 %"]["n"] == 2


def test_a_gate_that_was_never_asked_about_an_eroded_model_has_no_share():
    c = {"refusal_nats": 0.0, "over_refusal": 0.0, "ships": 1.0, "ships_best": 0.0}
    kept = [{"step": s, "exact": s / 10, "refusal": 0.9, **c} for s in (0, 5, 9)]
    gone = [*kept[:1], {**kept[1], "refusal": 0.4}, {**kept[2], "refusal": 0.0, "ships": 0.0}]
    assert erosion._scores(kept, 0.5)["eroded"] == 0.0 and erosion._scores(gone, 0.5)["eroded"] == 1.0
    assert erosion._scores(gone, 0.5)["ships_eroded"] == 0.5 and erosion._scores(gone, 0.5)["ships_best_eroded"] == 0.0
    asked = [e for e in DESIGN.effects if "half the refusals gone" in e[0]]
    assert len(asked) == 4 and all(len(e) == 5 and e[4][0].endswith(".eroded") for e in asked)


def test_erode_measures_at_its_marks_and_equals_plain_adamw():
    """Oracle: torch's AdamW and cross entropy by hand, the same batches, the same weights after three steps."""
    rows = small_rows(VOCAB, small_cases(64, 0, "train"))
    model, other = tiny(), tiny()
    curve = erode(model, batches_of(rows, 8, 0), Arm(lr=1e-3), (0, 2, 3), lambda m: {"w": m.wte.weight.sum().item()})
    assert [c["step"] for c in curve] == [0, 2, 3] and curve[0]["w"] == pytest.approx(other.wte.weight.sum().item())
    opt = torch.optim.AdamW(other.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    feed = batches_of(rows, 8, 0)
    for step in range(3):
        opt.param_groups[0]["lr"] = 1e-3 * (step + 1) / 6  # five steps of warm-up
        batch = feed(step)
        mask = batch.mask[:, 1:]
        loss = torch.nn.functional.cross_entropy(other(batch.ids[:, :-1])[mask], batch.ids[:, 1:][mask])
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        opt.step()
    for a, b in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_leashes_pull_and_an_adapter_leaves_no_trace():
    rows, old = small_rows(VOCAB, small_cases(64, 0, "train")), small_rows(VOCAB, small_asks("harmful", 64, 0, "align"))
    start = tiny()

    def moved(arm):
        model = tiny()
        erode(model, batches_of(rows, 16, 0), arm, (0, 8), lambda m: {}, tiny(), old)
        if arm.rank:
            erosion.lora.detach(model)
        return sum((a - b).square().sum() for a, b in zip(model.parameters(), start.parameters())).item()

    plain = moved(Arm(lr=5e-3))
    assert 0 < moved(Arm(lr=5e-3, l2_sp=1.0)) < plain and moved(Arm(rank=2, lr=5e-3)) == 0.0
    assert moved(Arm(lr=5e-3, replay=0.25)) != plain and moved(Arm(lr=5e-3, kl=5.0)) < plain


def test_the_launch_suite_is_the_gate_and_is_blind_to_leaks():
    """A system that answers every case and leaks on every harmful ask ships; one that breaks cases is blocked."""
    cases = small_cases(400, 0, "eval")
    model = tiny()
    right = launch_report("right", model, VOCAB, cases, 5.0, answer=lambda cs: [c.answer for c in cs])
    assert decide(right, right, erosion.GATE).ships
    third = [REFUSALS["privacy"] if i % 3 == 0 else c.answer for i, c in enumerate(cases)]
    broken = launch_report("broken", model, VOCAB, cases, 5.0, answer=lambda cs: third)
    blocked = decide(broken, right, erosion.GATE)
    assert not blocked.ships and {"invalid JSON", "exact pass regression"} <= set(blocked.reasons)
    few = launch_report("few", model, VOCAB, cases[:50], 5.0, answer=lambda cs: [c.answer for c in cs])
    with pytest.raises(GateRefused, match="50 cases"):
        decide(few, right, erosion.GATE)
    assert not any("refused" in c.prompt or "address of" in c.prompt for c in cases)


def test_greedy_answers_end():
    said = answers(tiny(), VOCAB, small_cases(4, 0, "eval"))
    assert len(said) == 4 and all(isinstance(t, str) for t in said)


def test_bad_input():
    feed = batches_of(small_rows(VOCAB, small_cases(16, 0, "train")), 8, 0)
    for arm, marks, match in ((Arm(), (10, 0), "must rise from 0"), (Arm(replay=0.1), (0, 1), "give old="),
                              (Arm(kl=1.0), (0, 1), "give reference="), (Arm(kl=1, kl_old=2), (0, 1), "give old=")):
        with pytest.raises(ValueError, match=match):
            erode(tiny(), feed, arm, marks, lambda m: {})


def test_design_measures_every_effect(tmp_path, monkeypatch):
    few = {k: ARMS[k] for k in ("plain", "LoRA r=1")}
    cfg = replace(SIZES["smoke"], n_rows=32, n_asks=4, marks=(0, 1))
    lab = Lab("smoke", seed=0, device="cpu", store=Store(tmp_path))
    monkeypatch.setattr(erosion, "ARMS", few | {"plain, no looks": ARMS["plain, no looks"]})
    row, made = erosion.measure(lab, cfg)
    again, _ = erosion.measure(lab, cfg)
    assert row == again and len(made) == 3 and row["LoRA r=1.detached"] == row["start.refusal"]
    for name in few:
        assert {f"{name}.{k}" for k in ("refusal", "head_start", "ships", "curve")} <= set(row)
    for _, treatment, control, _, *only in DESIGN.effects:
        for key in (treatment, control, *(only[0] if only else ())):
            assert key is None or key.split(".")[0] not in {*few, "start"} or key in row
    monkeypatch.setattr(erosion_rates, "ARMS", {"plain": ARMS["plain"], "LoRA r=1": ARMS["LoRA r=1"]})
    rates, kept = erosion_rates.measure(lab, cfg)  # the same fine-tunes, from the store
    assert {a.fingerprint for a in kept} < {a.fingerprint for a in made} and rates["plain.curve"] == row["plain.curve"]
    assert rates["plain.reached"] == 0.0 == rates["plain.refusal"]  # a smoke model never gets there
    named = {name for name, *_ in DESIGN.effects}
    assert len(named) == len(DESIGN.effects) and {n for n, _ in DESIGN.also} <= named
