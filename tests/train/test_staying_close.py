"""KL, L2-SP and replay against torch's own functions, by hand, and with a broken variant."""

import math
from itertools import count

import pytest
import torch
import torch.nn.functional as F

from lifecycle_lib.core.seeds import seed_everything
from lifecycle_lib.model.gpt import GPT, GPTConfig
from lifecycle_lib.train.logprobs import Rows, answer_loss, pad_rows, shared_rows
from lifecycle_lib.train.staying_close import (
    counted_logits,
    frozen,
    kl_loss,
    kl_tokens,
    l2_sp,
    l2_sp_loss,
    replay,
    replayed,
    stack,
)

CFG = GPTConfig(vocab_size=20, block_size=16, n_layer=1, n_head=2, n_embd=16)


def models():
    out = []
    for seed in (0, 1):
        seed_everything(seed)
        out.append(GPT(CFG))
    return out


def rows(n=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 20, (n, 9), generator=g).tolist()
    return pad_rows([r[:4] for r in ids], [r[4:6 + i % 3] for i, r in enumerate(ids)], 0)


def test_kl_by_hand():
    p, r = torch.log(torch.tensor([[0.5, 0.5]])), torch.log(torch.tensor([[0.9, 0.1]]))
    assert kl_tokens(p, r).item() == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2), abs=1e-6)
    assert kl_tokens(p, r, "reverse").item() == pytest.approx(0.5 * math.log(5 / 9) + 0.5 * math.log(5), abs=1e-6)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_kl_equals_torch_in_value_and_gradient(direction):
    policy, reference = models()
    batch = rows()
    kl_loss(frozen(reference), 1.0, direction)
    n = int(batch.mask[:, 1:].sum())

    def ours():
        return kl_loss(reference, 0.7, direction)(policy, batch)[0]

    def torchs():
        mask = batch.mask[:, 1:]
        p = F.log_softmax(policy(batch.ids[:, :-1]), -1)[mask]
        r = F.log_softmax(reference(batch.ids[:, :-1]), -1)[mask].detach()
        a, b = (p, r) if direction == "forward" else (r, p)
        return answer_loss(policy, batch)[0] + 0.7 * F.kl_div(a, b, log_target=True, reduction="sum") / n

    grads = []
    for loss in (ours(), torchs()):
        policy.zero_grad()
        loss.backward()
        grads.append([p.grad.clone() for p in policy.parameters()])
    assert ours().item() == pytest.approx(torchs().item(), abs=1e-5)
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert all(p.grad is None for p in reference.parameters())


def test_kl_is_never_negative_and_zero_at_the_reference():
    policy, reference = models()
    batch = rows()
    for direction in ("forward", "reverse"):
        logits = counted_logits(policy, batch)
        assert (kl_tokens(logits, counted_logits(reference, batch), direction) >= -1e-6).all()
        assert kl_tokens(logits, logits.detach(), direction).abs().max() < 1e-6


def test_the_two_directions_differ_and_a_sum_over_the_batch_is_caught():
    """Broken variant: kl_div's default reduction ("mean") divides by N * V, not by N."""
    policy, reference = models()
    batch = rows()
    p, r = counted_logits(policy, batch), counted_logits(reference, batch)
    ours = kl_tokens(p, r).mean()
    broken = F.kl_div(F.log_softmax(p, -1), F.log_softmax(r, -1), log_target=True, reduction="none").mean()
    assert broken.item() == pytest.approx(ours.item() / CFG.vocab_size, rel=1e-4)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(broken, ours, atol=1e-5, rtol=1e-5)
    assert abs(kl_tokens(p, r, "reverse").mean() - ours) > 1e-6


def test_shared_prompts_are_read():
    """Oracle: the same answers with their prompts written out. Broken: without the prefix, other logits."""
    policy, reference = models()
    prompts, answers, owner = [[3, 4, 5, 6], [7, 8]], [[9, 10], [11], [12, 13, 14]], [0, 1, 0]
    shared, whole = shared_rows(prompts, answers, owner, 0), pad_rows([prompts[i] for i in owner], answers, 0)
    torch.testing.assert_close(counted_logits(policy, shared), counted_logits(policy, whole), atol=1e-5, rtol=1e-5)
    loss_fn, grads = kl_loss(frozen(reference), 0.5), []
    for batch in (shared, whole):
        policy.zero_grad()
        loss_fn(policy, batch)[0].backward()
        grads.append([p.grad.clone() for p in policy.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    blind = counted_logits(policy, Rows(shared.ids, shared.mask))
    assert (blind - counted_logits(policy, whole)).abs().max() > 1e-2
    for refused in (lambda: stack(whole, shared), lambda: replay(lambda s: whole, shared, 0.5, 0),
                    lambda: replay(lambda s: shared, whole, 0.5, 0)(0)):
        with pytest.raises(ValueError, match="share their prompts"):
            refused()


def test_kl_elsewhere_reads_other_rows():
    policy, reference = models()
    batch, other = rows(), rows(2, seed=9)
    loss, metrics = kl_loss(frozen(reference), 1.0, elsewhere=(other for _ in count()))(policy, batch)
    want = kl_tokens(counted_logits(policy, other), counted_logits(reference, other)).mean()
    assert metrics["kl"] == pytest.approx(want.item(), abs=1e-6)
    assert metrics["task"] == pytest.approx(answer_loss(policy, batch)[0].item(), abs=1e-6)
    assert loss.item() == pytest.approx(metrics["task"] + metrics["kl"], abs=1e-6)


def test_l2_sp_gradient_is_the_distance():
    model, other = models()
    start = {n: p.detach() for n, p in other.named_parameters()}
    l2_sp(model, start).backward()
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, p.detach() - start[n])
    want = sum(F.mse_loss(p, start[n], reduction="sum").item() for n, p in model.named_parameters()) / 2
    assert l2_sp(model, start).item() == pytest.approx(want, rel=1e-5)
    loss_fn = l2_sp_loss(model, 0.5)
    assert loss_fn(model, rows())[1]["l2_sp"] == 0
    with torch.no_grad():
        model.wte.weight += 1
    assert loss_fn(model, rows())[1]["l2_sp"] == pytest.approx(model.wte.weight.numel() / 2, rel=1e-4)
    with pytest.raises(ValueError, match="no starting value"):
        l2_sp(model, {})


@pytest.mark.parametrize("share", [0.0, 0.01, 0.02, 0.05, 0.1, 1 / 3, 1.0])
def test_replay_keeps_its_share_over_a_run(share):
    taken = [replayed(s, 32, share) for s in range(300)]
    assert abs(sum(taken) - share * 32 * 300) <= 1 and max(taken) - min(taken) <= 1
    # broken: rounding each batch alone replays nothing at 1 %
    assert round(0.01 * 32) == 0 < sum(replayed(s, 32, 0.01) for s in range(10))


def test_replay_swaps_rows_and_keeps_the_size():
    new, old = rows(8), rows(5, seed=3)
    feed = replay(lambda step: new, old, 0.25, seed=0)
    got = feed(0)
    assert len(got.ids) == 8
    wide = lambda r: F.pad(r.ids, (0, got.ids.shape[1] - r.ids.shape[1]))[:, :got.ids.shape[1]]  # noqa: E731
    assert torch.equal(got.ids[:6], wide(new)[:6])
    assert all(any(torch.equal(row, o) for o in wide(old)) for row in got.ids[6:])
    assert torch.equal(feed(3).ids, feed(3).ids) and replay(lambda s: new, old, 0.0, 0)(0) is new


def test_stack_pads_to_one_width():
    a = pad_rows([[3]], [[4]], 0)
    b = pad_rows([[3, 5]], [[4, 6]], 0)
    got = stack(a, b)
    assert got.ids.tolist() == [[3, 4, 0, 0], [3, 5, 4, 6]] and got.mask.tolist()[0] == [False, True, False, False]
    assert stack(a, Rows(a.ids, a.mask)).ids.shape == (2, 2)


def test_bad_input():
    policy, reference = models()
    with pytest.raises(ValueError, match="direction='sideways'"):
        kl_tokens(torch.zeros(1, 2), torch.zeros(1, 2), "sideways")
    with pytest.raises(ValueError, match="same vocabulary"):
        kl_tokens(torch.zeros(1, 2), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="beta=-1"):
        kl_loss(reference, -1)
    with pytest.raises(ValueError, match="alpha=nan"):
        l2_sp_loss(policy, math.nan)
    with pytest.raises(ValueError, match="share=2"):
        replay(lambda s: rows(), rows(), 2, 0)
