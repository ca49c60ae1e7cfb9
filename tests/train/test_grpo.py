"""GRPO: advantages and losses of TRL's GRPOTrainer as oracle, empty and uniform groups, bad reward functions."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from lifecycle_lib.desk.cases import draw_cases
from lifecycle_lib.model.bridge import to_llama
from lifecycle_lib.train import grpo
from lifecycle_lib.train.logprobs import Rows, token_logps

GROUP, MAX_NEW = 4, 10
REWARDS = torch.tensor([1.0, 0, 0, 1] + [1.0] * 4 + [0.0, 0, 0, 1] + [0.3, 0.1, 0.8, 0.4])


@pytest.fixture
def rollouts(tok):
    """rollouts(model) -> (prompts, Rollouts whose old log-probabilities are the model's, answers)."""
    from grpo_step import make_rollouts

    prompts = [tok.encode(c.prompt) for c in draw_cases(4, 0, "rlvr")]
    return lambda model: (prompts, *make_rollouts(model, tok, prompts, GROUP, MAX_NEW, REWARDS))


@pytest.fixture
def trainer_of(tok, tmp_path):
    """trainer_of(model, rollouts, beta=0.0, **config): TRL's trainer with exactly these rollouts."""
    from grpo_step import trl_grpo

    def make(model, rolled, beta: float = 0.0, **config: object):
        trainer = trl_grpo(model, tok, *rolled, str(tmp_path), GROUP, MAX_NEW, **config)
        trainer.beta = beta  # after construction: TRL would look for the reference model on its hub
        trainer.current_gradient_accumulation_steps = 1
        trainer.model.train()
        return trainer

    return make


def test_advantages_by_hand():
    got = grpo.group_advantages(torch.tensor([1.0, 0, 0, 1]), 4)
    std = math.sqrt(1 / 3)  # sample standard deviation
    torch.testing.assert_close(got, torch.tensor([1.0, -1, -1, 1]) * 0.5 / (std + 1e-4))
    torch.testing.assert_close(grpo.group_advantages(torch.tensor([1.0, 0, 0, 1]), 4, scale="none"),
                               torch.tensor([0.5, -0.5, -0.5, 0.5]))


def test_a_uniform_group_gives_exact_zeros_whatever_the_others():
    for value in (0.0, 1.0, 0.1, 1e6 / 3):
        rewards = torch.tensor([value] * 7 + [0.0, 1, 1, 0, 1, 1, 1])
        got = grpo.group_advantages(rewards, 7)
        assert torch.equal(got[:7], torch.zeros(7)) and torch.isfinite(got).all() and got[7:].abs().min() > 0.1


def test_population_std_and_batch_std_by_hand():
    rewards = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 1])
    got = grpo.group_advantages(rewards, 4, scale="population", eps=0)
    torch.testing.assert_close(got[:4], torch.tensor([1.0, -1, -1, 1]))  # 0.5 / 0.5
    values = rewards.view(-1, 4).numpy()
    oracle = (values - values.mean(1, keepdims=True)) / values.std(1, keepdims=True)  # numpy divides by n
    torch.testing.assert_close(got, torch.tensor(oracle).flatten())
    sample = grpo.group_advantages(rewards, 4, eps=0)
    torch.testing.assert_close(got / sample, torch.full((8,), math.sqrt(4 / 3)))  # one factor: a learning rate
    batch = grpo.group_advantages(rewards, 4, scale="batch", eps=0)
    torch.testing.assert_close(batch[0], torch.tensor(0.5 / rewards.std().item()))
    assert (batch[:4] / sample[:4] - batch[4:] / sample[4:]).abs().max() > 0.1, "no one factor between these two"


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_are_those_of_trl(make_model, rollouts, trainer_of, tok, scale):
    rolled = prompts, batch, answers = rollouts(make_model())
    trainer = trainer_of(make_model(), rolled, scale_rewards=scale)
    repeated = [p for p in prompts for _ in range(GROUP)]
    texts = [tok.decode(a) for a in answers]
    trainer._generate = lambda _: (repeated, answers, None, texts, None, {}, None, None)
    trainer._calculate_rewards = lambda *_: REWARDS.unsqueeze(1)
    del trainer._prepare_inputs  # back to the class's own
    theirs = trainer._generate_and_score_completions([{"prompt": tok.decode(p)} for p in repeated])["advantages"]
    torch.testing.assert_close(grpo.group_advantages(REWARDS, GROUP, scale), theirs, atol=1e-5, rtol=1e-5)
    groups = REWARDS.view(-1, GROUP)
    if scale != "batch":
        over_the_batch = ((groups - groups.mean(1, keepdim=True)) / (REWARDS.std() + 1e-4)).flatten()
        assert (over_the_batch - theirs).abs().max() > 1e-2, "std over the batch instead of the group"
    for other in {"group", "population", "batch", "none"} - {scale}:
        assert (grpo.group_advantages(REWARDS, GROUP, other) - theirs).abs().max() > 1e-2, f"{other}, not {scale}"
    assert (grpo.group_advantages(REWARDS, 8, scale) - theirs).abs().max() > 1e-2, "groups of the wrong size"


@pytest.mark.parametrize(("loss_type", "beta", "weighted_kl"), [
    *((t, b, u) for t in ("grpo", "dapo", "dr_grpo") for b, u in ((0.0, True), (0.04, True), (0.04, False))),
    ("bnpo", 0.04, True)])
def test_loss_and_gradient_are_those_of_trl(make_model, gradients, rollouts, trainer_of, loss_type, beta, weighted_kl):
    old, policy, reference = make_model(noise=0.05), make_model(noise=0.09), make_model(noise=0.02)
    rolled = _, batch, _ = rollouts(old)
    trainer = trainer_of(policy, rolled, beta, loss_type=loss_type, use_bias_correction_kl=weighted_kl)
    mask = batch.rows.mask[:, 1:]
    with torch.no_grad():
        ref = torch.zeros(trainer.fixed["completion_mask"].shape)
        ref[trainer.fixed["completion_mask"].bool()] = token_logps(reference, batch.rows)[mask]
    trainer.fixed["ref_per_token_logps"] = ref
    theirs = trainer._compute_loss(trainer.model, trainer.fixed)

    ref_logps = token_logps(reference, batch.rows).detach()
    ours, metrics = grpo.grpo_loss(token_logps(policy, batch.rows), batch.old_logps, batch.advantages, mask,
                                   loss_type=loss_type, max_tokens=MAX_NEW, ref_logps=ref_logps, beta=beta,
                                   weighted_kl=weighted_kl)
    assert metrics["clip_share"] > 0.02, "the clip has to matter"
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    for a, b in zip(gradients(ours, policy), gradients(theirs, trainer.model), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    if beta and not weighted_kl:
        assert metrics["kl"] == pytest.approx(trainer._metrics["train"]["kl"][-1], abs=1e-5)
    cfg = grpo.GRPOConfig(n_prompts=4, group_size=GROUP, max_new_tokens=MAX_NEW, loss_type=loss_type, beta=beta,
                          weighted_kl=weighted_kl)
    assert grpo.rollout_loss(policy, batch, cfg, ref=reference)[0].item() == pytest.approx(theirs.item(), abs=1e-5)

    def agrees(**change: object) -> bool:
        settings = {"loss_type": loss_type, "max_tokens": MAX_NEW, "beta": beta, "ref_logps": ref_logps,
                    "weighted_kl": weighted_kl, "mask": mask, "advantages": batch.advantages} | change
        loss, _ = grpo.grpo_loss(token_logps(policy, batch.rows), batch.old_logps, **settings)
        return abs(loss.item() - theirs.item()) < 1e-5

    assert agrees()
    assert not agrees(clip_low=1.0, clip_high=1e9), "no clip"
    assert not agrees(mask=mask.roll(1, 1)), "mask off by one"
    assert not agrees(advantages=-batch.advantages), "reward sign flipped"
    others = {"grpo", "dapo", "dr_grpo"} - {"dapo" if loss_type == "bnpo" else loss_type}
    assert not any(agrees(loss_type=t) for t in others), "normalised over something else"
    if beta:
        assert not agrees(beta=0.0), "no KL term"
        assert not agrees(weighted_kl=not weighted_kl), "the other KL estimate"
        assert not agrees(kl_kind="k1", weighted_kl=True) and not agrees(kl_kind="k2", weighted_kl=False), "another one"


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo"])
def test_sequence_ratio_is_that_of_trl(make_model, gradients, rollouts, trainer_of, loss_type):
    """GSPO: one ratio an answer. Its clip is a small fraction of the token's."""
    policy = make_model(noise=0.09)
    rolled = _, batch, _ = rollouts(make_model(noise=0.05))
    trainer = trainer_of(policy, rolled, loss_type=loss_type, importance_sampling_level="sequence", epsilon=0.01,
                         epsilon_high=0.02)
    theirs = trainer._compute_loss(trainer.model, trainer.fixed)
    cfg = grpo.GRPOConfig(n_prompts=4, group_size=GROUP, max_new_tokens=MAX_NEW, loss_type=loss_type,
                          ratio_level="sequence", clip_low=0.01, clip_high=0.02)
    ours, metrics = grpo.rollout_loss(policy, batch, cfg)
    assert metrics["clip_share"] > 0.02, "the clip has to matter"
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    for a, b in zip(gradients(ours, policy), gradients(theirs, trainer.model), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    for change in ({"ratio_level": "token"}, {"clip_low": 0.99, "clip_high": 1e9}, {"clip_high": 0.01}):
        wrong, _ = grpo.rollout_loss(policy, batch, dataclasses.replace(cfg, **change))
        assert abs(wrong.item() - theirs.item()) > 1e-5, change


def test_clip_higher_lets_a_paid_token_rise_further():
    """One paid token at ratio 1.3: cut off at 1.2, still pushed where the upper bound is 1.35."""
    logp = torch.full((1, 1), math.log(1.3), requires_grad=True)
    for high, pays, slope in ((0.2, 1.2, 0.0), (0.35, 1.3, -1.3)):
        loss, _ = grpo.grpo_loss(logp, torch.zeros(1, 1), torch.ones(1), torch.ones(1, 1).bool(), clip_high=high)
        assert loss.item() == pytest.approx(-pays)
        assert torch.autograd.grad(loss, logp)[0].item() == pytest.approx(slope)


def test_kl_estimators_on_a_policy_small_enough_to_enumerate():
    """Every expectation is a sum over five tokens; the oracle is torch.distributions."""
    theta = torch.tensor([0.9, -0.4, 0.3, -1.2, 0.5], dtype=torch.float64, requires_grad=True)
    q = torch.tensor([0.1, 0.3, 0.2, 0.25, 0.15], dtype=torch.float64)
    p = theta.softmax(0)
    kl = torch.distributions.kl_divergence
    policy, reference = torch.distributions.Categorical(p), torch.distributions.Categorical(q)
    true, forward = kl(policy, reference), kl(reference, policy)
    want = torch.autograd.grad(true, theta, retain_graph=True)[0]
    want_forward = torch.autograd.grad(forward, theta, retain_graph=True)[0]
    weight = p.detach()  # sampled from the policy: no gradient through the draw
    value, as_loss, weighted = {}, {}, {}
    for kind in ("k1", "k2", "k3"):
        k = grpo.kl_estimate(p.log(), q.log(), kind)
        value[kind] = (weight * k).sum().item()
        as_loss[kind] = torch.autograd.grad((weight * k).sum(), theta, retain_graph=True)[0]
        ratio = (p.log() - p.log().detach()).exp()
        weighted[kind] = torch.autograd.grad((weight * ratio * k).sum(), theta, retain_graph=True)[0]
    assert value["k1"] == pytest.approx(true.item()) and value["k3"] == pytest.approx(true.item())
    assert abs(value["k2"] - true.item()) > 0.02
    torch.testing.assert_close(as_loss["k1"], torch.zeros_like(want))
    torch.testing.assert_close(as_loss["k2"], want)
    torch.testing.assert_close(as_loss["k3"], want_forward)
    assert (as_loss["k3"] - want).abs().max() > 0.01
    torch.testing.assert_close(weighted["k1"], want)
    torch.testing.assert_close(weighted["k3"], want)
    assert (weighted["k2"] - want).abs().max() > 0.01


def test_kl_terms_of_answers_of_two_tokens_enumerated():
    """Three tokens, answers of two. Value: k1 and k3, summed over the answer, are right. Gradient: a term a token has
    at best the part in which the text before each token is held fixed; the leash in the reward has the whole."""
    v = 3
    answers = torch.cartesian_prod(torch.arange(v), torch.arange(v))  # (9, 2)
    gen = torch.Generator().manual_seed(0)
    theta = torch.randn(1 + v, v, generator=gen, dtype=torch.float64).requires_grad_()  # row 0: first token
    reference = torch.randn(1 + v, v, generator=gen, dtype=torch.float64)

    def logps_of(logits):
        logp = logits.log_softmax(-1)
        return torch.stack((logp[0, answers[:, 0]], logp[1 + answers[:, 0], answers[:, 1]]), 1)

    slope = lambda x: torch.autograd.grad(x, theta, retain_graph=True)[0]  # noqa: E731
    logps, ref = logps_of(theta), logps_of(reference)
    weight, mask = logps.detach().sum(1).exp(), torch.ones(9, 2)
    kl = torch.distributions.kl_divergence
    whole = kl(*(torch.distributions.Categorical(logits=x.sum(1)) for x in (logps, ref)))
    here, there = (torch.distributions.Categorical(logits=x) for x in (theta, reference))
    seen = torch.cat((torch.ones(1), theta[0].softmax(0).detach()))  # how often the text before a token occurs
    prefix_fixed, forward = slope((seen * kl(here, there)).sum()), slope((seen * kl(there, here)).sum())
    assert (prefix_fixed - slope(whole)).abs().max() > 0.05, "a token also changes the KL of those after it"

    def loss_gradient(kind, weighted, level="token"):
        """In expectation, of grpo_loss: every answer a batch of its own, weighted by its probability."""
        one = [grpo.grpo_loss(logps[i:i + 1], logps[i:i + 1].detach(), torch.zeros(1), mask[i:i + 1], beta=1.0,
                              ref_logps=ref[i:i + 1], loss_type="dr_grpo", max_tokens=1, kl_kind=kind,
                              weighted_kl=weighted, ratio_level=level)[0] for i in range(9)]
        return slope((weight * torch.stack(one)).sum())

    for kind in ("k1", "k3"):
        value = (weight * grpo.kl_estimate(logps, ref, kind).sum(1)).sum()
        assert value.item() == pytest.approx(whole.item(), abs=1e-12)
        for level in ("token", "sequence"):
            torch.testing.assert_close(loss_gradient(kind, True, level), prefix_fixed, atol=1e-6, rtol=0)
    torch.testing.assert_close(loss_gradient("k2", False), prefix_fixed, atol=1e-6, rtol=0)
    torch.testing.assert_close(loss_gradient("k3", False), forward, atol=1e-6, rtol=0)
    k3 = grpo.kl_estimate(logps, ref, "k3")
    ratio = (logps - logps.detach()).mean(1, keepdim=True).exp()
    of_answers = slope((weight * (ratio * k3).sum(1)).sum())
    assert min((of_answers - g).abs().max() for g in (prefix_fixed, forward, slope(whole))) > 0.05, "the answer's ratio"
    in_reward = slope((weight * (logps - ref).detach().sum(1) * logps.sum(1)).sum())
    torch.testing.assert_close(in_reward, slope(whole), atol=1e-12, rtol=0)


def test_kl_terms_that_are_nobodys_gradient_are_refused():
    z = torch.zeros(1, 2)
    for kind, weighted, why in (("k1", False, "gradient 0"), ("k2", True, "gradient of no KL")):
        message = f"kl_kind={kind!r} with weighted_kl={weighted} .*{why}.*; use weighted_kl={not weighted}"
        with pytest.raises(ValueError, match=message):
            grpo.GRPOConfig(kl_kind=kind, weighted_kl=weighted)
        with pytest.raises(ValueError, match=message):
            grpo.grpo_loss(z, z, z[:, 0], z.bool(), beta=0.1, ref_logps=z, kl_kind=kind, weighted_kl=weighted)
        grpo.GRPOConfig(kl_kind=kind, weighted_kl=not weighted)


@pytest.mark.parametrize(("change", "message"), [
    ({"advantages": torch.zeros(2, 1)}, r"advantages \(2, 1\) .* logps \(2, 3\)"),
    ({"advantages": torch.zeros(1)}, r"advantages \(1,\)"), ({"old_logps": torch.zeros(2, 1)}, r"old_logps \(2, 1\)"),
    ({"mask": torch.ones(3)}, r"mask \(3,\)"), ({"ref_logps": torch.zeros(2, 1)}, r"ref_logps \(2, 1\)"),
    ({name: torch.zeros(2) for name in ("logps", "old_logps", "mask", "advantages")}, r"logps \(2,\)")])
def test_shapes_that_would_broadcast_are_refused(change, message):
    shapes = {name: torch.zeros(2, 3) for name in ("logps", "old_logps", "mask", "ref_logps")}
    grpo.grpo_loss(**shapes, advantages=torch.zeros(2), beta=0.1)
    with pytest.raises(ValueError, match=message):
        grpo.grpo_loss(**{**shapes, "advantages": torch.zeros(2), **change}, beta=0.1)


def test_kl_estimates_by_hand():
    p, q = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    for kind, by_hand in (("k1", math.log(2)), ("k2", math.log(2) ** 2 / 2), ("k3", 0.5 - 1 + math.log(2))):
        assert grpo.kl_estimate(p, q, kind).item() == pytest.approx(by_hand)


def test_temperature_reaches_the_ratio_as_in_trl(make_model, rollouts, trainer_of):
    policy = make_model(noise=0.09)
    rolled = _, batch, _ = rollouts(make_model(noise=0.05))
    trainer = trainer_of(policy, rolled, temperature=0.7)
    theirs = trainer._compute_loss(trainer.model, trainer.fixed).item()
    ours = [grpo.rollout_loss(policy, batch, grpo.GRPOConfig(temperature=t))[0].item() for t in (0.7, 1.0)]
    assert ours[0] == pytest.approx(theirs, abs=1e-5) and abs(ours[1] - theirs) > 1e-3


def test_three_steps_of_fit_are_three_steps_of_trl(make_model, rollouts, trainer_of):
    from dpo_step import run_ours, run_trl

    model = make_model(noise=0.05)
    rolled = _, batch, _ = rollouts(model)
    ours, _ = run_ours(model, batch, lambda m, b: grpo.rollout_loss(m, b, grpo.GRPOConfig()))
    theirs, _ = run_trl(trainer_of(model, rolled))
    assert ours == pytest.approx(theirs, abs=1e-5) and ours[2] < ours[1] < ours[0]


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_an_empty_row_adds_nothing(loss_type):
    gen = torch.Generator().manual_seed(0)
    old = -torch.rand(3, 5, generator=gen)
    new = (old + 0.3 * torch.randn(3, 5, generator=gen)).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 1, 0], [0] * 5, [1, 1, 0, 0, 0]]).bool()
    adv = torch.tensor([0.7, 5.0, -1.1])
    loss, metrics = grpo.grpo_loss(new, old, adv, mask, loss_type=loss_type, max_tokens=5, ref_logps=old, beta=0.04)
    (grad,) = torch.autograd.grad(loss, new)
    assert torch.isfinite(grad).all() and math.isfinite(loss.item())
    assert torch.equal(grad[~mask], torch.zeros(9)) and (grad[mask] != 0).any()
    other = grpo.grpo_loss(new, old, adv * torch.tensor([1, -3, 1]), mask, loss_type=loss_type, max_tokens=5,
                           ref_logps=old, beta=0.04)[0]
    assert other.item() == loss.item()
    empty, metrics = grpo.grpo_loss(new, old, adv, mask & False, loss_type=loss_type, max_tokens=5)
    assert empty.item() == 0 and metrics == {"clip_share": 0.0, "kl": 0.0}
    assert torch.equal(torch.autograd.grad(empty, new)[0], torch.zeros(3, 5))


def test_collect_scores_what_the_policy_said(make_model, tok):
    model = make_model(noise=0.05, token_shift=True)
    cases = draw_cases(3, 0, "rlvr")
    cfg = grpo.GRPOConfig(n_prompts=3, group_size=4, max_new_tokens=6)
    seen: list[tuple] = []

    def reward(texts, repeated):
        seen.append((list(texts), list(repeated)))
        return [float(len(t)) for t in texts]

    batch = grpo.collect(model, tok, cases, reward, cfg, seed=1, step=2)
    texts, repeated = seen[0]
    assert batch.texts == texts and [c.case_id for c in repeated] == [c.case_id for c in cases for _ in range(4)]
    with torch.no_grad():  # the sampler's log-probabilities (cached decoding) are those of a training pass
        torch.testing.assert_close(token_logps(model, batch.rows), batch.old_logps, atol=1e-5, rtol=1e-5)
    answers = [row[m].tolist() for row, m in zip(batch.rows.ids, batch.rows.mask)]
    assert [tok.decode([t for t in a if t != tok.special["<eos>"]]) for a in answers] == texts
    lengths = torch.tensor([float(len(t)) for t in texts])
    torch.testing.assert_close(batch.advantages, grpo.group_advantages(lengths, 4))
    assert batch.metrics["reward"] == pytest.approx(lengths.mean().item()) and torch.equal(batch.rewards, lengths)
    loss, _ = grpo.rollout_loss(model, batch, cfg)
    weights = batch.rows.mask.sum(1) / batch.rows.mask.sum()
    assert loss.item() == pytest.approx(-(weights * batch.advantages).sum().item(), abs=1e-5), "the ratio is 1"
    again = grpo.collect(model, tok, cases, reward, cfg, seed=1, step=2)
    other = grpo.collect(model, tok, cases, reward, cfg, seed=1, step=3)
    assert again.texts == batch.texts != other.texts
    dealt = grpo.collect(model, tok, cases, reward, cfg, seed=1, step=2, shuffle=True)
    assert dealt.texts == batch.texts and not torch.equal(dealt.advantages, batch.advantages)
    torch.testing.assert_close(dealt.advantages, grpo.group_advantages(dealt.rewards, 4))
    for a, b in zip(dealt.advantages.view(3, 4), batch.advantages.view(3, 4)):
        torch.testing.assert_close(a.sort().values, b.sort().values)  # within its group


def test_batches_are_pure_in_step(make_model, tok):
    model, cases = make_model(noise=0.05), draw_cases(6, 0, "rlvr")
    cfg = grpo.GRPOConfig(n_prompts=2, group_size=2, max_new_tokens=4)
    batches = grpo.grpo_batches(model, tok, cases, lambda t, c: [0.0] * len(t), cfg, seed=0)
    first, _, again = batches(0), batches(1), batches(0)
    assert first.texts == again.texts and torch.equal(first.rows.prefix.ids, again.rows.prefix.ids)
    assert first.metrics["uniform_groups"] == 1 and torch.equal(first.advantages, torch.zeros(4))
    with pytest.raises(ValueError, match="6 cases cannot fill 7 prompts"):
        grpo.grpo_batches(model, tok, cases, lambda t, c: [], grpo.GRPOConfig(n_prompts=7), seed=0)


@pytest.mark.parametrize("change", [
    {"n_prompts": 0}, {"group_size": 1}, {"loss_type": "ppo"}, {"scale": "std"}, {"ratio_level": "word"},
    {"kl_kind": "k4"}, {"temperature": 0},
    {"temperature": math.nan}, {"beta": -0.1}, {"beta": math.inf}, {"clip_low": 0}, {"clip_low": 1}, {"clip_high": -1},
    {"max_new_tokens": 0},
])
def test_config_refuses(change):
    grpo.GRPOConfig()
    (name, value), = change.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        grpo.GRPOConfig(**change)


@pytest.mark.parametrize(("rewards", "message"), [
    ([1.0, math.nan], "returned nan for answer 1"), ([math.inf, 0], "returned inf for answer 0"),
    ([1.0], "1 values for 2 answers"), ([], "0 values for 2"), ([1, None], "None for answer 1"),
    (["1", 0], "'1' for answer 0"), (None, "None for 2 answers"), (0.5, "0.5 for 2 answers"),
    ([1.0, [0.5]], r"\[0.5\] for answer 1"), ([{"r": 1}, 0], "{'r': 1} for answer 0"),
    ([1.0, 1e300], r"1e\+300 for answer 1"),
    (torch.zeros(2, 2), r"for answer 0; every reward must be one finite number"), ({0: 1.0, 1: 0.0}, "one number each"),
    ("10", "'10' for 2 answers"), (torch.tensor(1.0), "for 2 answers"), ([1.0, 10**400], "for answer 1"),
])
def test_check_rewards_refuses(rewards, message):
    with pytest.raises(ValueError, match=message):
        grpo.check_rewards(rewards, 2)


def test_a_bad_reward_function_is_refused_by_the_answer_it_fails_on():
    cases, texts = draw_cases(3, 0, "rlvr"), ["{}", "no", "{}"]
    bad = f"answer 1 \\(case {cases[1].case_id}\\): 'no'"

    def parses(answers, _):
        return [float(len(json.loads(t))) for t in answers]

    with pytest.raises(ValueError, match=f"raised JSONDecodeError .* for {bad}; a bad answer must score, not raise"):
        grpo.rewards_of(parses, texts, cases)
    with pytest.raises(ValueError, match=f"returned nan for {bad}"):
        grpo.rewards_of(lambda t, c: [1.0, math.nan, 0.0], texts, cases)
    with pytest.raises(ValueError, match="returned 2 values for 3 answers"):
        grpo.rewards_of(lambda t, c: [1.0, 0.0], texts, cases)

    def together(answers, _):
        if len(answers) > 1:
            raise RuntimeError("too many")
        return [0.0]

    with pytest.raises(ValueError, match=r"raised RuntimeError \(too many\) on 3 answers together, and on none"):
        grpo.rewards_of(together, texts, cases)
    assert grpo.rewards_of(lambda t, c: [1.0, 0.0, 0.5], texts, cases).tolist() == [1.0, 0.0, 0.5]


def test_check_rewards_passes_numbers_on():
    assert grpo.check_rewards([True, 0.5], 2).tolist() == [1.0, 0.5]
    assert grpo.check_rewards([torch.tensor(0.25), np.float32(0.5)], 2).tolist() == [0.25, 0.5]
    assert grpo.check_rewards(torch.tensor([0.25, 0.5]), 2).tolist() == [0.25, 0.5]


def test_losses_and_advantages_refuse(make_model, rollouts):
    z = torch.zeros(2, 3)
    for kwargs, message in (({"loss_type": "ppo"}, "loss_type='ppo'"), ({"loss_type": "dr_grpo"}, "max_tokens"),
                            ({"beta": 0.1}, "beta=0.1 needs ref_logps"), ({"ratio_level": "x"}, "ratio_level='x'"),
                            ({"kl_kind": "x"}, "kl_kind='x'")):
        with pytest.raises(ValueError, match=message):
            grpo.grpo_loss(z, z, torch.zeros(2), z.bool(), **kwargs)
    for rewards, size in ((torch.zeros(5), 4), (torch.zeros(4), 1), (torch.zeros(0), 4), (torch.zeros(4), 0)):
        with pytest.raises(ValueError, match="do not split into groups"):
            grpo.group_advantages(rewards, size)
    with pytest.raises(ValueError, match="scale='std'"):
        grpo.group_advantages(torch.zeros(4), 4, scale="std")
    with pytest.raises(ValueError, match=r"shape \(4, 1\) must be \(B,\)"):
        grpo.group_advantages(torch.zeros(4, 1), 4)
    model = make_model()
    _, batch, _ = rollouts(model)
    with pytest.raises(ValueError, match="needs ref_logps"):
        grpo.rollout_loss(model, batch, grpo.GRPOConfig(beta=0.04))


def test_rows_with_a_wrong_mask_are_caught(make_model, rollouts):
    """The oracle of `token_logps` here is the Llama of the same weights on whole rows."""
    model = make_model(noise=0.05)
    prompts, batch, answers = rollouts(model)
    whole = [p + a for p, a in zip([p for p in prompts for _ in range(GROUP)], answers)]
    llama = to_llama(model)
    want = []
    for row, answer in zip(whole, answers):
        logps = torch.log_softmax(llama(input_ids=torch.tensor([row])).logits[0, :-1], -1)
        want += logps[-len(answer):].gather(1, torch.tensor(answer)[:, None]).flatten().tolist()
    mask = batch.rows.mask[:, 1:]
    torch.testing.assert_close(batch.old_logps[mask], torch.tensor(want), atol=1e-5, rtol=1e-5)
    swapped = Rows(batch.rows.ids, batch.rows.mask, None)
    assert (token_logps(model, swapped)[mask] - torch.tensor(want)).abs().max() > 1e-3, "answers without a prompt"
