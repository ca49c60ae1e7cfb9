"""The adapter study: its two tasks, its arms, what it counts, and a smoke run of every number its effects name."""

import pytest
import torch

from lifecycle_lib.core.store import Store
from lifecycle_lib.desk.cases import golden_case
from lifecycle_lib.lab.stages import Lab
from lifecycle_lib.lab.studies import adapters, adapters_design
from lifecycle_lib.lab.studies.adapters import (
    ARMS,
    PACKED,
    Task,
    change,
    facts,
    n_trained,
    note_pair,
    score,
    step_memory,
    task_rows,
    wear,
)
from lifecycle_lib.lab.studies.small import right, row_losses
from lifecycle_lib.model.gpt import GPT, GPTConfig
from lifecycle_lib.train.logprobs import pad_rows
from lifecycle_lib.train.loop import FitConfig


def small():
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=50, block_size=24, n_layer=2, n_head=2, n_embd=32))


def rows():
    return pad_rows([[3, 4, 5], [6, 7]], [[8, 2], [9, 10, 2]], 0)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return Lab("smoke", seed=0, device="cpu", store=Store(tmp_path_factory.mktemp("store")))


def test_the_notes_answer_by_hand_and_a_fact_has_one_number(lab):
    prompt, answer = note_pair(golden_case())
    assert prompt.endswith("<user>my mug arrived cracked<note>") and "<bot>" not in prompt
    assert answer == "damaged P-7 30d, 12d confirmed, within, refund"
    table = facts(120, 3)
    assert len({p for p, _ in table}) == 120 and facts(120, 3) == table != facts(120, 4)
    tok = lab.load_tokenizer()
    encoded = task_rows(tok, table)
    assert encoded.mask.sum(1).tolist() == [2] * 120  # the number is one token, then the end
    clash = [(p, " 00") for p, _ in table[:1] * 2]
    assert len({p for p, _ in clash}) == 1  # what a table with a repeated key would look like


def test_score_is_what_small_says():
    model = small()
    exact, nats, opened = score(model, rows())
    assert exact == right(model, rows()).float().mean().item() <= opened
    weighted = row_losses(model, rows()) * torch.tensor([2.0, 3.0])
    assert abs(nats - weighted.sum().item() / 5) < 1e-6
    from lifecycle_lib.train.logprobs import answer_loss
    assert abs(nats - answer_loss(model, rows())[0].item()) < 1e-6


def test_an_answer_whose_opening_is_given_may_be_right_where_the_greedy_one_is_not(monkeypatch):
    """Two rows of three answer tokens; the model is wrong on the first token of row 1 and on the last of row 2."""
    asked = pad_rows([[3, 4], [6, 7]], [[8, 9, 2], [8, 9, 2]], 0)
    logits = torch.nn.functional.one_hot(torch.tensor([5, 9, 2, 8, 9, 1]), 50).float()
    monkeypatch.setattr(adapters, "counted_logits", lambda model, rows: logits)
    assert score(small(), asked)[0::2] == (0.0, 0.5)
    monkeypatch.setattr(adapters, "OPENING", 0)  # nothing given: the plain greedy answer
    assert score(small(), asked)[2] == 0.0


def test_trained_numbers_by_formula(lab):
    tok, c, h, layers = lab.load_tokenizer(), 32, 96, 1
    for arm, want in {"lora-2": 2 * layers * (4 * 2 * c + 3 * (c + h)), "prefix-4": 2 * layers * 4 * c,
                      "gates": layers * (2 * c + h), "bottleneck-3": layers * 2 * 2 * 3 * c,
                      "int4+lora-2": 2 * layers * (4 * 2 * c + 3 * (c + h))}.items():
        model = GPT(lab.profile.gpt)
        assert model.cfg.n_hidden == h
        assert n_trained(wear(model, arm, 0, tok)) == want, arm
    with pytest.raises(ValueError, match="arm 'dora-2' is unknown"):
        wear(small(), "dora-2", 0, tok)


def test_memory_of_a_step_is_the_formula_where_there_is_one(lab):
    fit = FitConfig(steps=1, optimizer="adamw", lr=1e-3)
    full = step_memory(model := small(), rows(), fit)
    assert full["grad_bytes"] == 4 * model.n_params() and full["state_bytes"] == 8 * model.n_params()
    light = step_memory(worn := wear(small(), "lora-1", 0, lab.load_tokenizer()), rows(), fit)
    assert light["grad_bytes"] == 4 * n_trained(worn) and light["state_bytes"] == 8 * n_trained(worn)
    assert light["kept_bytes"] > 0.5 * full["kept_bytes"]  # what backward needs hardly shrinks


def test_energy_of_a_change_of_known_rank(monkeypatch):
    start, model = small(), small()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2 and "wte" not in name:
                g = torch.Generator().manual_seed(1)
                p += torch.randn(len(p), 2, generator=g) @ torch.randn(2, p.shape[1], generator=g)
    monkeypatch.setattr(adapters, "RANKS", (1, 2))
    found = change(model, start)
    assert 0.5 < found["energy_1"] < 0.999 and found["energy_2"] == pytest.approx(1, abs=1e-5)
    assert change(model, start, directions=False) == {"moved": found["moved"]}


def test_intruders_are_directions_that_the_weights_did_not_have():
    """Of the ten first directions a large change of rank 2 brings two new ones to each matrix, a scaled weight none."""
    start, strange, scaled = small(), small(), small()
    with torch.no_grad():
        for name, m in start.named_modules():
            if isinstance(m, torch.nn.Linear):
                u, s, v = torch.linalg.svd(torch.randn(m.weight.shape, generator=torch.Generator().manual_seed(2)),
                                           full_matrices=False)
                s = torch.linspace(2, 1, len(s))
                m.weight.copy_(u * s @ v)
                mixed = (u[:, :16].sum(1) / 4, u[:, 16:].sum(1) / 4)  # as near to all old directions, near to none
                push = sum(torch.outer(a, b) for a, b in zip(mixed, v))
                strange.get_submodule(name).weight.copy_(m.weight + 9 * push)
                scaled.get_submodule(name).weight.copy_(3 * m.weight)
    assert change(strange, start)["intruders"] == pytest.approx(0.2)
    assert change(scaled, start)["intruders"] == 0.0 and change(scaled, start)["moved"] == pytest.approx(2)


def test_equal_skill_lies_between_two_checkpoints_or_nowhere():
    curve = [{"step": s, "new": n, "old_nats": o} for s, n, o in ((0, 0.0, 1.0), (10, 0.4, 2.0), (20, 0.6, 3.5))]
    assert adapters_design.at_skill(curve, 0.4) == {"step": 10, "new": 0.4, "old_nats": 2.0, "reached": 1.0}
    at = adapters_design.at_skill(curve, 0.5)
    assert at == pytest.approx({"step": 15, "new": 0.5, "old_nats": 2.75, "reached": 1.0})
    assert adapters_design.at_skill(curve, 0.0) == {**curve[0], "reached": 1.0}
    assert adapters_design.at_skill(curve, 0.9) == {**curve[-1], "reached": 0.0}  # broken: to call this equal skill
    with pytest.raises(ValueError, match="empty curve"):
        adapters_design.at_skill([], 0.5)


def test_a_smoke_run_has_every_number_that_an_effect_names(lab, monkeypatch):
    monkeypatch.setattr(adapters, "TASKS", {t: Task(steps=2, batch=4, every=1) for t in adapters.TASKS})
    monkeypatch.setattr(adapters, "N_ITEMS", 8)
    monkeypatch.setattr(adapters, "N_FACTS", 8)
    design = adapters_design.DESIGN
    row, made = design.measure(lab)
    assert {k for _, t, c, _, *there in design.effects for k in (t, c, *(there[0] if there else ())) if k} <= set(row)
    assert len(made) == 2 * (len(ARMS) + 1 + len(adapters.FAST)) + 1
    assert all(isinstance(v, (int, float)) for v in row.values())
    assert row[f"note.{PACKED}.n_trained"] == row["note.lora-8.n_trained"]
    assert row["merge.cat.1+0.note"] == row["merge.alone.1.note"] == row["note.lora-8.new"]  # at weight 1 it is itself
    assert all(rates.keys() == set(ARMS) for rates in adapters.RATES.values())
    again, _ = design.measure(lab)
    assert again == row  # all of it came from the store
