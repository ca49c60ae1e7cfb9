"""The training loop: resume is bit-identical, the schedule's points, optimisers against torch's own, bad settings."""

import copy
import math

import pytest
import torch

from lifecycle_lib.core.records import read_json, write_json
from lifecycle_lib.core.tensors import load_tensors, save_tensors
from lifecycle_lib.train.logprobs import answer_loss
from lifecycle_lib.train.loop import FitConfig, fit, make_optimizers, schedule
from lifecycle_lib.train.pretrain import lm_batches

STREAM = torch.arange(400) * 7 % 101


def config(optimizer: str, **more: object) -> FitConfig:
    return FitConfig(**({"steps": 7, "optimizer": optimizer, "checkpoint_every": 2, "warmup_steps": 2} | more))


def stops_at(step: int):
    """A loss function that is killed at a step."""
    calls = iter(range(step + 1))

    def loss_fn(model, batch):
        if next(calls) == step:
            raise KeyboardInterrupt
        return answer_loss(model, batch)

    return loss_fn


def run(model, optimizer: str, folder=None, loss_fn=answer_loss, **more: object):
    return fit(model, lm_batches(STREAM, 4, 12, seed=0), loss_fn, config(optimizer, **more), folder)


@pytest.mark.parametrize("optimizer", ["muon", "adamw", "sgd"])
def test_an_interrupted_run_ends_with_the_same_bits(make_model, tmp_path, optimizer):
    whole = make_model(token_shift=True)
    result = run(whole, optimizer)
    with pytest.raises(KeyboardInterrupt):
        run(make_model(token_shift=True), optimizer, tmp_path, stops_at(5))
    assert read_json(tmp_path / "resume.json")["step"] == 4
    assert [p.name for p in tmp_path.glob("*.safetensors")] == ["resume-000004.safetensors"]
    damaged = tmp_path / "damaged"  # what a resume would be that forgot the optimiser's state
    damaged.mkdir()
    (damaged / "resume.json").write_bytes((tmp_path / "resume.json").read_bytes())
    tensors = load_tensors(tmp_path / "resume-000004.safetensors")
    save_tensors(damaged / "resume-000004.safetensors", {k: v for k, v in tensors.items() if k.startswith("model.")})

    def same(folder, seed: int = 9) -> bool:
        model = make_model(token_shift=True, seed=seed)  # other weights: they have to come from the folder
        again = run(model, optimizer, folder)
        assert again.steps == 7
        return again.history == result.history and all(
            torch.equal(a, b) for a, b in zip(whole.state_dict().values(), model.state_dict().values(), strict=True))

    assert same(tmp_path)
    assert not same(damaged), "resumed without the optimiser's state"


def test_a_finished_folder_and_a_fresh_one_agree(make_model, tmp_path):
    with_folder, without = make_model(), make_model()
    a, b = run(with_folder, "adamw", tmp_path), run(without, "adamw")
    assert a.history == b.history and len(a.losses) == a.steps == 7
    assert all(torch.equal(x, y) for x, y in zip(with_folder.parameters(), without.parameters()))
    assert [row["step"] for row in a.history] == list(range(7)) and a.losses[-1] < a.losses[0]


def test_schedule_points():
    cfg = FitConfig(steps=110, warmup_steps=10, min_lr_share=0.1)
    assert schedule(0, cfg) == pytest.approx(1 / 11) and schedule(9, cfg) == pytest.approx(10 / 11)
    assert schedule(10, cfg) == 1
    assert schedule(60, cfg) == pytest.approx(0.55)  # half way down: .1 + .9 / 2
    assert schedule(110, cfg) == pytest.approx(0.1)
    flat = FitConfig(steps=5, warmup_steps=0, min_lr_share=1.0)
    assert [schedule(s, flat) for s in range(5)] == [1.0] * 5
    assert math.isfinite(schedule(3, FitConfig(steps=4, warmup_steps=10)))


def test_the_cosine_is_torchs():
    cfg = FitConfig(steps=30, warmup_steps=0, min_lr_share=0.2)
    opt = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    peer = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=30, eta_min=0.2)
    for step in range(30):
        assert schedule(step, cfg) == pytest.approx(peer.get_last_lr()[0], abs=1e-9)
        opt.step()
        peer.step()


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_steps_are_torchs(make_model, optimizer):
    """A hand-written loop: zero, backward, clip, torch's optimiser with the schedule's rate."""
    ours, theirs = make_model(noise=0.05), make_model(noise=0.05)
    cfg = config(optimizer, steps=4, weight_decay=0.1, clip=0.5, lr=1e-2)
    batches = lm_batches(STREAM, 4, 12, seed=0)
    result = fit(ours, batches, answer_loss, cfg)
    if optimizer == "adamw":
        opt = torch.optim.AdamW(theirs.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    else:
        opt = torch.optim.SGD(theirs.parameters(), lr=1e-2, momentum=0.9, weight_decay=0.1)
    for step in range(4):
        opt.param_groups[0]["lr"] = 1e-2 * schedule(step, cfg)
        opt.zero_grad()
        loss = answer_loss(theirs, batches(step))[0]
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        opt.step()
        assert result.history[step]["loss"] == pytest.approx(loss.item(), abs=1e-6)
        assert result.history[step]["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_muon_takes_the_hidden_matrices_and_adamw_the_rest(make_model):
    model = make_model(token_shift=True)
    muon, adamw = make_optimizers(model, config("muon"))
    assert isinstance(muon, torch.optim.Muon) and isinstance(adamw, torch.optim.AdamW)
    names = {id(p): n for n, p in model.named_parameters()}
    matrices = [names[id(p)] for p in muon.param_groups[0]["params"]]
    rest = [names[id(p)] for p in adamw.param_groups[0]["params"]]
    assert len(matrices) == 2 * 7 and all(".w" in n for n in matrices)
    assert "wte.weight" in rest and "blocks.0.attn.shift" in rest and "norm_f.weight" in rest
    assert sorted(matrices + rest) == sorted(names.values())
    (only,) = make_optimizers(model, config("adamw"))
    assert len(only.param_groups[0]["params"]) == len(names)


def test_frozen_weights_stay_and_an_all_frozen_model_is_refused(make_model):
    model = make_model()
    model.blocks[0].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    run(model, "muon", steps=2)
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved and not any(k.startswith("blocks.0.") for k in moved)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        run(model, "adamw")


def test_a_loss_that_is_not_finite_stops_the_run(make_model):
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match=f"training: loss is {bad} at step 0; lower lr"):
            run(make_model(), "adamw", loss_fn=lambda m, b, bad=bad: (answer_loss(m, b)[0] * bad, {}))


def test_a_seed_set_after_initialisation_is_caught(make_model):
    """Two runs of one seed agree; seeding after the weights are drawn makes them differ."""
    from lifecycle_lib.core.seeds import seed_everything
    from lifecycle_lib.model.gpt import GPT

    def losses(model) -> list[float]:
        return run(model, "adamw", steps=2).losses

    cfg = make_model().cfg
    assert losses(make_model(seed=4)) == losses(make_model(seed=4)) != losses(make_model(seed=5))

    def late(seed: int) -> GPT:
        model = GPT(cfg)
        seed_everything(seed)
        return model

    torch.manual_seed(123)
    assert losses(late(4)) != losses(late(4))


def test_missing_weights_behind_the_pointer_are_named(make_model, tmp_path):
    write_json(tmp_path / "resume.json", {"step": 2, "file": "resume-000002.safetensors", "history": []})
    with pytest.raises(ValueError, match="resume-000002.safetensors"):
        run(make_model(), "adamw", tmp_path)


@pytest.mark.parametrize("change", [
    {"steps": 0}, {"optimizer": "adam"}, {"lr": 0}, {"lr": math.nan}, {"lr_matrix": -1}, {"clip": math.inf},
    {"min_lr_share": 1.5}, {"min_lr_share": -0.1}, {"checkpoint_every": 0}, {"warmup_steps": -1}, {"beta2": 1.0},
    {"weight_decay": -0.1},
])
def test_config_refuses(change):
    (name, value), = change.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        FitConfig(**({"steps": 3} | change))
