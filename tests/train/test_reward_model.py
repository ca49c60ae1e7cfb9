"""Reward model: TRL's RewardTrainer as oracle (scores, loss, gradient), scipy on tiny features."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from lifecycle_lib.desk.cases import draw_cases
from lifecycle_lib.model.bridge import to_llama
from lifecycle_lib.train import dpo
from lifecycle_lib.train.logprobs import Rows
from lifecycle_lib.train.loop import FitConfig
from lifecycle_lib.train.reward_model import RewardModel, bt_loss, train_reward_model


@pytest.fixture(scope="module")
def pairs() -> list[dict]:
    return dpo.make_pairs(draw_cases(4, 0, "dpo"))


def batch_of(tok, pairs) -> dpo.PairBatch:
    return dpo.PairBatch(dpo.pair_rows(dpo.encode_pairs(tok, pairs), 0), torch.zeros(2 * len(pairs)))


def test_by_hand():
    loss, metrics = bt_loss(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0]))
    assert loss.item() == pytest.approx((math.log1p(math.exp(-1)) + math.log1p(math.exp(2))) / 2, abs=1e-6)
    assert metrics == {"accuracy": 0.5, "margin": -0.5, "mean_reward": 0.75}
    assert bt_loss(torch.zeros(3), torch.zeros(3))[0].item() == pytest.approx(math.log(2), abs=1e-6)
    with_margin, _ = bt_loss(torch.tensor([1.0]), torch.tensor([0.0]), margin=torch.tensor([1.0]))
    assert with_margin.item() == pytest.approx(math.log(2), abs=1e-6), "a gap of the stated margin is an even vote"


def test_a_constant_added_to_every_score_changes_nothing():
    c, r = torch.randn(5), torch.randn(5)
    torch.testing.assert_close(bt_loss(c + 7, r + 7)[0], bt_loss(c, r)[0])


def trl_reward(model: RewardModel, tok, pairs, folder, **columns):
    """TRL's RewardTrainer on the same body and head."""
    from datasets import Dataset
    from dpo_step import trl_args
    from transformers import LlamaForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    llama = to_llama(model.body)
    config = llama.config
    config.num_labels, config.pad_token_id = 1, tok.special["<pad>"]
    peer = LlamaForSequenceClassification(config)
    peer.model.load_state_dict(llama.model.state_dict())
    with torch.no_grad():
        peer.score.weight.copy_(model.head[None])
    args = trl_args(folder)
    args.pop("beta")
    rows = Dataset.from_list([{k: p[k] for k in ("prompt", "chosen", "rejected")} for p in pairs])
    for name, values in columns.items():
        rows = rows.add_column(name, values)
    return RewardTrainer(peer, args=RewardConfig(**args, per_device_train_batch_size=len(pairs), max_length=None),
                         train_dataset=rows, processing_class=tok.to_transformers())


@pytest.mark.parametrize("margin", [None, [0.0, 0.5, 1.0, 2.0]])
def test_scores_loss_and_gradient_are_those_of_trl(make_model, tok, pairs, tmp_path, margin):
    model = RewardModel.from_gpt(make_model(noise=0.1), seed=1)
    with torch.no_grad():
        model.head.mul_(20)
    trainer = trl_reward(model, tok, pairs, str(tmp_path), **({"margin": margin} if margin else {}))
    peer = trainer.model.train()
    theirs, outputs = trainer.compute_loss(peer, next(iter(trainer.get_train_dataloader())), return_outputs=True)

    batch = batch_of(tok, pairs)
    scores = model(batch.rows)
    for a, b in zip(scores.chunk(2), outputs.logits[:, 0].chunk(2)):  # TRL shuffles the pairs
        torch.testing.assert_close(a.sort()[0], b.sort()[0], atol=1e-5, rtol=1e-5)
    ours, metrics = bt_loss(*scores.chunk(2), margin=torch.tensor(margin) if margin else None)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5) and abs(ours.item() - math.log(2)) > 0.01
    assert metrics["accuracy"] == pytest.approx(trainer._metrics["train"]["accuracy"][-1])
    mine = torch.autograd.grad(ours, [model.head, model.body.blocks[0].attn.wq.weight, model.body.wte.weight])
    named = dict(peer.named_parameters())
    keys = ("score.weight", "model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight")
    for a, b in zip(mine, torch.autograd.grad(theirs, [named[k] for k in keys]), strict=True):
        torch.testing.assert_close(a, b.view(a.shape), atol=1e-5, rtol=1e-5)

    def agrees(loss) -> bool:
        return abs(loss.item() - theirs.item()) < 1e-5

    chosen, rejected = model(batch.rows).chunk(2)
    assert not agrees(bt_loss(rejected, chosen)[0]), "chosen and rejected swapped"
    early = Rows(batch.rows.ids, batch.rows.mask.clone(), batch.rows.prefix)
    early.mask[torch.arange(8), batch.rows.mask.long().cumsum(1).argmax(1)] = False
    assert not agrees(bt_loss(*model(early).chunk(2))[0]), "read off one token before the end"
    if margin:
        assert not agrees(bt_loss(chosen, rejected)[0]), "the margin forgotten"


def test_on_features_it_is_logistic_regression():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 3))
    x = np.where((rng.random((60, 1)) < 1 / (1 + np.exp(-x @ [[1.0], [-2.0], [0.5]]))), x, -x)  # chosen - rejected
    want = minimize(lambda w: np.log1p(np.exp(-x @ w)).mean(), np.zeros(3), tol=1e-12).x
    w, diff = torch.zeros(3, dtype=torch.double, requires_grad=True), torch.tensor(x)
    solver = torch.optim.LBFGS([w], max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure():
        solver.zero_grad()
        loss, _ = bt_loss(diff @ w, torch.zeros(60, dtype=torch.double))
        loss.backward()
        return loss

    solver.step(closure)
    assert w.detach().numpy() == pytest.approx(want, abs=1e-4)
    swapped = minimize(lambda w: np.log1p(np.exp(x @ w)).mean(), np.zeros(3), tol=1e-12).x
    assert swapped == pytest.approx(-want, abs=1e-4), "swapped labels give the opposite taste, at the same loss"


def test_shared_and_whole_prompts_score_alike(make_model, tok, pairs):
    model = RewardModel.from_gpt(make_model(noise=0.1, token_shift=True))
    shared = model(batch_of(tok, pairs).rows)
    whole = model.score(tok, [p["prompt"] for p in pairs] * 2, [p["chosen"] for p in pairs]
                        + [p["rejected"] for p in pairs], part=3)
    torch.testing.assert_close(shared.detach(), whole, atol=1e-5, rtol=1e-5)


def test_it_learns_the_votes_and_leaves_the_policy_alone(make_model, tok, tmp_path):
    policy = make_model(noise=0.05)
    before = policy.wte.weight.clone()
    pairs = dpo.make_pairs(draw_cases(48, 0, "dpo"))
    cfg = FitConfig(steps=25, optimizer="adamw", lr=3e-3, checkpoint_every=1000)
    model, result = train_reward_model(policy, tok, pairs[:32], cfg, batch_size=16)
    assert result.losses[0] == pytest.approx(math.log(2), abs=0.05) and result.losses[-1] < 0.3
    assert torch.equal(policy.wte.weight, before)
    score = lambda side: model.score(tok, [p["prompt"] for p in pairs[32:]], [p[side] for p in pairs[32:]])  # noqa: E731
    assert (score("chosen") > score("rejected")).float().mean() > 0.9
    model.save(tmp_path)
    torch.testing.assert_close(RewardModel.load(tmp_path).score(tok, [pairs[0]["prompt"]], ["{}"]),
                               model.score(tok, [pairs[0]["prompt"]], ["{}"]))


@pytest.mark.parametrize(("scores", "margin"), [
    ((torch.zeros(3, 1), torch.zeros(3)), None), ((torch.zeros(3), torch.zeros(1, 3)), None),
    ((torch.zeros(3), torch.zeros(3)), torch.zeros(3, 1)),
])
def test_a_column_of_scores_is_refused(scores, margin):
    with pytest.raises(ValueError, match="all must be .B,., one number a pair"):
        bt_loss(*scores, margin)
    bt_loss(torch.zeros(3), torch.zeros(3), torch.tensor(1.0))


def test_refusals(make_model, tok, tmp_path):
    model = RewardModel.from_gpt(make_model())
    model.save(tmp_path)
    RewardModel.from_gpt(make_model(n_embd=64)).save(tmp_path / "other")
    (tmp_path / "head.safetensors").write_bytes((tmp_path / "other" / "head.safetensors").read_bytes())
    with pytest.raises(ValueError, match="belongs to another body"):
        RewardModel.load(tmp_path)
    with pytest.raises(ValueError, match="row 1 has no answer token"):
        model(Rows(torch.ones(2, 3, dtype=torch.long), torch.tensor([[False, True, True], [False] * 3])))
