"""Prefix tuning against peft, by hand, and through everything that reads a cache."""

import pytest
import torch

from lifecycle_lib.model.checkpoint import weights_hash
from lifecycle_lib.model.gpt import GPT, GPTConfig
from lifecycle_lib.model.prefix import PrefixTuning
from lifecycle_lib.model.sampling import generate
from lifecycle_lib.train.logprobs import answer_loss, pad_rows, shared_rows, sum_logps
from lifecycle_lib.train.loop import FitConfig, fit


def small(token_shift=False):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=50, block_size=24, n_layer=2, n_head=2, n_embd=16, token_shift=token_shift))
    with torch.no_grad():
        for block in model.blocks:  # large enough that attention is not uniform
            for w in (block.attn.wq, block.attn.wk, block.attn.wv, block.attn.wo):
                w.weight.mul_(10)
    return model


def ids(rows=3, width=7):
    return torch.randint(3, 50, (rows, width), generator=torch.Generator().manual_seed(1))


def test_one_key_by_hand():
    """With all scores equal, a prefix of one key takes 1 / (t + 1) of the attention of the t-th token."""
    model = small()
    prefix = PrefixTuning(model, 1)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.wq.weight.zero_()  # every score is 0
            block.attn.wv.weight.zero_()  # real values are 0: what comes out of attention is the prefix's value
        prefix.v.fill_(1.0)
    seen = []
    model.blocks[0].attn.wo.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    prefix(ids(1, 3))
    assert torch.allclose(seen[0][0, :, 0], torch.tensor([1 / 2, 1 / 3, 1 / 4]))


def test_value_and_gradient_equal_pefts():
    peft = pytest.importorskip("peft")
    from lifecycle_lib.model.bridge import to_llama
    model, x, n = small(), ids(), 4
    other = peft.get_peft_model(to_llama(model), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=n))
    prefix = PrefixTuning(model, n, torch.Generator().manual_seed(2), std=0.7)
    theirs = other.prompt_encoder["default"].embedding.weight  # (P, 2 L C): key and value of layer 0, of layer 1 ...

    def as_theirs(k, v):
        both = torch.stack([k, v], dim=1)  # (L, 2, H, P, D)
        return both.permute(3, 0, 1, 2, 4).reshape(n, -1)

    with torch.no_grad():
        theirs.copy_(as_theirs(prefix.k, prefix.v))
    mine, his = prefix(x), other(input_ids=x, attention_mask=torch.ones_like(x)).logits
    assert torch.allclose(mine, his, atol=1e-5)
    mine.square().sum().backward()
    his.square().sum().backward()
    assert torch.allclose(as_theirs(prefix.k.grad, prefix.v.grad), theirs.grad, atol=1e-5)
    assert theirs.grad.abs().max() > 1e-3
    assert prefix.k.numel() + prefix.v.numel() == theirs.numel() == 2 * 2 * n * 16
    with torch.no_grad():  # a prefix whose keys and values are swapped is another function: the test can tell
        theirs.copy_(as_theirs(prefix.v, prefix.k))
        assert not torch.allclose(mine, other(input_ids=x, attention_mask=torch.ones_like(x)).logits, atol=1e-3)


@pytest.mark.parametrize("token_shift", [False, True])
def test_padding_shared_prompts_and_decoding_agree_with_the_plain_pass(token_shift):
    model = small(token_shift)
    prefix = PrefixTuning.from_tokens(model, [5, 9, 11])
    prompts, answers = [[7, 8], [3, 4, 5, 6]], [[9, 2], [10, 11, 2]]
    plain = sum_logps(prefix, pad_rows(prompts, answers, 0))
    shared = shared_rows(prompts, answers, [0, 1], 0)
    assert torch.allclose(sum_logps(prefix, shared), plain, atol=1e-5)
    grads = [torch.autograd.grad(sum_logps(prefix, r).sum(), [prefix.k, prefix.v])
             for r in (pad_rows(prompts, answers, 0), shared)]
    assert all(torch.allclose(u, v, atol=1e-5) for u, v in zip(*grads))
    out = generate(prefix, prompts, eos_id=2, pad_id=0, max_new_tokens=5, temperature=0.0)
    for prompt, got in zip(prompts, out.ids):
        so_far = list(prompt)
        for token in got:
            assert prefix(torch.tensor([so_far]))[0, -1].argmax().item() == token
            so_far.append(token)


def test_from_tokens_starts_as_having_read_them():
    model, x = small(), ids(2, 5)
    read = torch.tensor([[5, 9, 11]]).expand(2, -1)
    own = PrefixTuning.from_tokens(model, [5, 9, 11])
    assert torch.allclose(own(x), model(torch.cat((read, x), 1))[:, 3:], atol=1e-5)


def test_training_moves_the_prefix_alone():
    model = small(True)
    before, prefix = weights_hash(model), PrefixTuning.from_tokens(model, [5, 9, 11])
    rows = pad_rows([[7, 8]] * 2, [[9, 2]] * 2, 0)
    result = fit(prefix, lambda _: rows, answer_loss, FitConfig(steps=8, optimizer="adamw", lr=0.03, warmup_steps=0))
    assert result.losses[-1] < result.losses[0] and weights_hash(model) == before


def test_a_prefix_takes_room():
    model = small()
    assert PrefixTuning(model, 10).cfg.block_size == 14
    with pytest.raises(ValueError, match="25 tokens do not fit block_size=24"):
        PrefixTuning(model, 10)(ids(1, 15))
    with pytest.raises(ValueError, match="n_tokens=24 must be 1 to 23"):
        PrefixTuning(model, 24)
