"""REINFORCE with KL: every answer of a toy policy enumerated, autograd of the exact objective; TRL's RLOO."""

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from lifecycle_lib.desk.cases import draw_cases
from lifecycle_lib.train import reinforce
from lifecycle_lib.train.grpo import GRPOConfig, grpo_batches, kl_estimate
from lifecycle_lib.train.loop import FitConfig, fit
from lifecycle_lib.train.reinforce import leashed_returns, leave_one_out, reinforce_kl, reinforce_loss

BETA, V, T = 0.7, 3, 2
SEQUENCES = torch.cartesian_prod(*[torch.arange(V)] * T)  # (9, 2): all answers of two tokens


def toy(seed: int) -> torch.Tensor:
    """Logits of the first token, and of the second after each first one. (1 + V, V)"""
    return torch.randn(1 + V, V, generator=torch.Generator().manual_seed(seed)).double()


def logps_of(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Log-probability of each token. (B, 2)"""
    logp = logits.log_softmax(-1)
    return torch.stack((logp[0, y[:, 0]], logp[1 + y[:, 0], y[:, 1]]), 1)


@pytest.fixture
def world():
    return toy(0).requires_grad_(), toy(1), torch.linspace(-1, 2, 9).double()


def exact_gradient(theta, ref, reward) -> torch.Tensor:
    """d/d theta of -(E[r] - beta KL(policy || reference)), the sum over all sequences written out."""
    logp, ref_logp = logps_of(theta, SEQUENCES).sum(1), logps_of(ref, SEQUENCES).sum(1)
    return torch.autograd.grad(-(logp.exp() * (reward - BETA * (logp - ref_logp))).sum(), theta)[0]


def expected_gradient(theta, ref, reward, leash: str) -> torch.Tensor:
    """The estimator's gradient, each sequence weighted by its probability."""
    logps, ref_logps, mask = logps_of(theta, SEQUENCES), logps_of(ref, SEQUENCES), torch.ones(9, T)
    p = logps.detach().sum(1).exp()
    returns = leashed_returns(reward, logps, ref_logps, mask, BETA if leash == "reward" else 0.0)
    loss = reinforce_loss(logps, 9 * p * returns, mask)
    if leash == "loss":
        loss = loss + BETA * (p * kl_estimate(logps, ref_logps).sum(1)).sum()
    return torch.autograd.grad(loss, theta)[0]


def test_by_hand():
    assert leave_one_out(torch.tensor([1.0, 2.0, 6.0]), 3).tolist() == [-3.0, -1.5, 4.5]
    logps = torch.tensor([[-1.0, -2.0], [-3.0, -9.0]], requires_grad=True)
    mask = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    returns = leashed_returns(torch.tensor([1.0, 0.0]), logps, torch.tensor([[-2.0, -2.0], [-2.0, -2.0]]), mask, 0.5)
    assert returns.tolist() == [0.5, 0.5] and not returns.requires_grad
    assert reinforce_loss(logps, torch.tensor([2.0, -2.0]), mask).item() == -(2 * -3 + -2 * -3) / 2


def test_the_leash_in_the_reward_has_the_exact_gradient_and_k3_in_the_loss_has_not(world):
    want = exact_gradient(*world)
    torch.testing.assert_close(expected_gradient(*world, "reward"), want, atol=1e-10, rtol=0)
    assert (expected_gradient(*world, "loss") - want).abs().max() > 0.05


def test_sampling_converges_to_the_exact_gradient(world):
    theta, ref, reward = world
    g = torch.Generator().manual_seed(0)
    logp = logps_of(theta, SEQUENCES).sum(1)
    pick = torch.multinomial(logp.detach().exp(), 60_000, replacement=True, generator=g)
    logps, ref_logps, mask = logps_of(theta, SEQUENCES[pick]), logps_of(ref, SEQUENCES[pick]), torch.ones(len(pick), T)
    returns = leashed_returns(reward[pick], logps, ref_logps, mask, BETA)
    with_baseline, without = (torch.autograd.grad(reinforce_loss(logps, a, mask), theta, retain_graph=True)[0]
                              for a in (leave_one_out(returns, 4), returns))
    for estimate in (with_baseline, without):
        torch.testing.assert_close(estimate, exact_gradient(*world), atol=0.03, rtol=0)


def test_loss_from_rewards_is_that_of_trl_rloo_on_a_baseline_counted_by_hand(world, monkeypatch):
    from trl import RLOOTrainer

    theta, ref, reward = world
    logps, ref_logps, mask = logps_of(theta, SEQUENCES[:8]), logps_of(ref, SEQUENCES[:8]), torch.ones(8, T)
    ratio = (logps.detach() - ref_logps).tolist()
    paid = [float(reward[i]) - BETA * (ratio[i][0] + ratio[i][1]) for i in range(8)]
    advantages = []
    for i in range(8):  # two groups of four: each answer against the mean of the three others
        others = [paid[j] for j in range(4 * (i // 4), 4 * (i // 4) + 4) if j != i]
        advantages.append(paid[i] - sum(others) / 3)
    quiet = SimpleNamespace(reduce=lambda x, reduction: x, gather=lambda x: x)
    of = SimpleNamespace(_get_per_token_logps_and_entropies=lambda *a, **k: (logps, torch.zeros_like(logps), None),
                         aux_loss_enabled=False, epsilon_low=0.2, epsilon_high=0.2, accelerator=quiet,
                         model=SimpleNamespace(training=True),
                         _metrics={"train": defaultdict(list)})
    none = torch.zeros(8, 0, dtype=torch.long)
    theirs = RLOOTrainer._compute_loss(of, None, {  # its value is -mean advantage: ratio 1; the gradients are equal
        "prompt_ids": none, "prompt_mask": none, "completion_ids": SEQUENCES[:8], "completion_mask": mask,
        "old_logps": logps.detach().sum(1), "advantages": torch.tensor(advantages).double()})
    slope = lambda loss: torch.autograd.grad(loss, theta, retain_graph=True)[0]  # noqa: E731
    monkeypatch.setattr(reinforce, "token_logps", lambda model, rows: {"policy": logps, "ref": ref_logps}[model])
    rows = SimpleNamespace(mask=torch.ones(8, T + 1))

    def ours(beta: float = BETA, sign: float = 1.0) -> torch.Tensor:
        """reinforce_kl on a batch as grpo_batches makes it with scale "none": rewards less their group's mean."""
        centred = (reward[:8].view(2, 4) - reward[:8].view(2, 4).mean(1, keepdim=True)).view(-1)
        batch = SimpleNamespace(rows=rows, advantages=sign * centred, metrics={})
        cfg = reinforce.leashed(GRPOConfig(n_prompts=2, group_size=4), beta)
        return slope(reinforce_kl("ref", cfg)("policy", batch)[0])

    wanted = slope(theirs)
    torch.testing.assert_close(ours(), wanted, atol=1e-6, rtol=1e-6)
    assert (ours(sign=-1.0) - wanted).abs().max() > 1e-3, "the sign of the reward turned round"
    assert (ours(beta=0.0) - wanted).abs().max() > 1e-3, "no leash"
    returns = leashed_returns(reward[:8], logps, ref_logps, mask, BETA)
    own = slope(reinforce_loss(logps, returns - returns.view(2, 4).mean(1).repeat_interleave(4), mask))
    assert (own - wanted).abs().max() > 1e-3, "the baseline has the answer itself in it: 3/4 of the gradient"


def test_one_step_moves_toward_what_is_paid_and_the_leash_holds(make_model, tok):
    cases = draw_cases(4, 0, "rl")
    reward = lambda texts, where: [-len(t) / 10 for t in texts]  # noqa: E731  (short tokens pay)
    ref = make_model(noise=0.02)
    cfg = reinforce.leashed(GRPOConfig(n_prompts=4, group_size=8, max_new_tokens=6), 0.0)
    found = {}
    for beta in (50.0, 0.0):
        model = make_model(noise=0.02)
        one = replace(cfg, beta=beta)
        result = fit(model, grpo_batches(model, tok, cases, reward, one, 0), reinforce_kl(ref, one),
                     FitConfig(steps=15, optimizer="adamw", lr=2e-2, warmup_steps=0, checkpoint_every=1000))
        assert result.history[0]["kl"] == pytest.approx(0, abs=1e-4)
        found[beta] = result.history[-1]
    assert found[0.0]["reward"] > result.history[0]["reward"] + 0.3, [h["reward"] for h in result.history]
    assert found[0.0]["kl"] > found[50.0]["kl"]


@pytest.mark.parametrize(("call", "message"), [
    (lambda: reinforce_kl(None, GRPOConfig()), "scale='group'"),
    (lambda: reinforce_kl(None, GRPOConfig(scale="none", temperature=0.5)), "temperature=0.5"),
    (lambda: reinforce_kl(None, GRPOConfig(scale="none"), "nowhere"), "kl_in='nowhere'"),
    (lambda: leave_one_out(torch.zeros(3), 2), "3 returns do not split"),
    (lambda: leashed_returns(torch.zeros(4, 1), *[torch.zeros(4, 2)] * 3, 0.1), r"rewards has shape \(4, 1\)"),
    (lambda: reinforce_loss(torch.zeros(4, 2), torch.zeros(4, 1), torch.ones(4, 2)), r"advantages has shape \(4, 1\)"),
])
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
