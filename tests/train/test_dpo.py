"""DPO: TRL's DPOTrainer as oracle (loss, gradient and three optimiser steps), ln 2 at the start, damaged pair files."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from lifecycle_lib.core.records import write_jsonl
from lifecycle_lib.desk.cases import draw_cases, with_label_claim
from lifecycle_lib.model.bridge import to_llama
from lifecycle_lib.train import dpo

BETA = 0.3
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pairs() -> list[dict]:
    return dpo.make_pairs(draw_cases(4, 0, "dpo"))


def batch_of(encoded, ref) -> dpo.PairBatch:
    return dpo.PairBatch(dpo.pair_rows(encoded, 0), ref.T.reshape(-1))


def test_loss_is_ln_2_at_the_start(make_model, tok, pairs):
    model = make_model(noise=0.1)
    encoded = dpo.encode_pairs(tok, pairs)
    loss, metrics = dpo.pair_loss(model, batch_of(encoded, dpo.reference_logps(model, encoded, 0)), BETA)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6) and metrics["margin"] == pytest.approx(0, abs=1e-5)


def test_by_hand():
    t = lambda *x: torch.tensor(x)  # noqa: E731
    loss, metrics = dpo.dpo_loss(t(-1.0, -2.0), t(-3.0, -1.0), t(-2.0, -2.0), t(-2.0, -2.0), beta=0.5)
    # margins: .5 * ((-1 + 2) - (-3 + 2)) = 1 and .5 * (0 - 1) = -.5
    assert loss.item() == pytest.approx((math.log1p(math.exp(-1)) + math.log1p(math.exp(0.5))) / 2, abs=1e-6)
    assert metrics["margin"] == pytest.approx(0.25) and metrics["accuracy"] == 0.5
    assert metrics["chosen_reward"] == pytest.approx(0.25) and metrics["rejected_reward"] == pytest.approx(0.0)
    assert metrics["chosen_sum_logp"] == pytest.approx(-1.5) and metrics["rejected_sum_logp"] == pytest.approx(-2.0)


def test_loss_and_gradient_are_those_of_trl(make_model, gradients, tok, pairs, tmp_path):
    from dpo_step import trl_dpo

    reference, policy = make_model(noise=0.05), make_model(noise=0.15)
    trainer = trl_dpo(reference, tok, pairs, str(tmp_path))
    trainer.beta = BETA
    trainer.model.load_state_dict(to_llama(policy).state_dict())
    theirs = trainer.compute_loss(trainer.model.train(), next(iter(trainer.get_train_dataloader())))

    encoded = dpo.encode_pairs(tok, pairs)
    ref = dpo.reference_logps(reference, encoded, 0)
    ours, metrics = dpo.pair_loss(policy, batch_of(encoded, ref), BETA)
    assert abs(ours.item() - math.log(2)) > 0.01, "the policy has to differ from the reference"
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    for a, b in zip(gradients(ours, policy), gradients(theirs, trainer.model), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    logged = {k: v[-1] for k, v in trainer._metrics["train"].items()}
    for ours_name, name in {"margin": "rewards/margins", "accuracy": "rewards/accuracies",
                            "chosen_reward": "rewards/chosen", "chosen_sum_logp": "logps/chosen"}.items():
        assert metrics[ours_name] == pytest.approx(logged[name], abs=1e-4), ours_name

    def agrees(loss: torch.Tensor) -> bool:
        return abs(loss.item() - theirs.item()) < 1e-5

    swapped = [(p, r, c) for p, c, r in encoded]
    assert not agrees(dpo.pair_loss(policy, batch_of(swapped, ref.flip(1)), BETA)[0]), "chosen and rejected swapped"
    assert not agrees(dpo.pair_loss(policy, batch_of(encoded, ref.flip(1)), BETA)[0]), "references swapped"
    assert not agrees(dpo.pair_loss(policy, batch_of(encoded, ref * 0), BETA)[0]), "no reference"
    rows = dpo.pair_rows(encoded, 0)
    n = rows.mask.sum(1)
    means = (dpo.sum_logps(policy, rows) / n).chunk(2) + (ref.T.reshape(-1) / n).chunk(2)
    assert not agrees(dpo.dpo_loss(*means, BETA)[0]), "mean log-probabilities instead of sums"


def test_three_steps_of_fit_are_three_steps_of_trl(make_model, tok, pairs, tmp_path):
    import dpo_step

    model = make_model(noise=0.05)
    encoded = dpo.encode_pairs(tok, pairs)
    batch = batch_of(encoded, dpo.reference_logps(model, encoded, 0))
    ours, _ = dpo_step.run_ours(model, batch, lambda m, b: dpo.pair_loss(m, b, dpo_step.BETA))
    theirs, _ = dpo_step.run_trl(dpo_step.trl_dpo(model, tok, pairs, str(tmp_path)))
    assert ours == pytest.approx(theirs, abs=1e-5) and ours[2] < ours[1] < ours[0]


def test_reference_does_not_depend_on_the_batch_size(make_model, tok, pairs):
    model = make_model(noise=0.1)
    encoded = dpo.encode_pairs(tok, pairs)
    whole, parts = dpo.reference_logps(model, encoded, 0), dpo.reference_logps(model, encoded, 0, batch_size=3)
    assert whole.shape == (4, 2)
    torch.testing.assert_close(whole, parts, atol=1e-4, rtol=1e-6)
    prompt, _, rejected = encoded[3]
    logits = to_llama(model)(input_ids=torch.tensor([prompt + rejected])).logits[0, len(prompt) - 1:-1]
    want = -F.cross_entropy(logits, torch.tensor(rejected), reduction="sum")
    torch.testing.assert_close(whole[3, 1], want.detach(), atol=1e-4, rtol=1e-6)


def test_pairs_share_the_prompt_and_say_why(pairs, tok):
    for row, case in zip(pairs, draw_cases(4, 0, "dpo"), strict=True):
        assert row["prompt"] == case.prompt and row["chosen"] == case.answer
        assert row["rejected"] == with_label_claim(case.answer) != row["chosen"]
        assert row["reason"] and row["licence"] and row["source"]
    for prompt, chosen, rejected in dpo.encode_pairs(tok, pairs):
        eos = tok.special["<eos>"]
        assert tok.decode(prompt).endswith("<bot>") and chosen[-1] == rejected[-1] == eos and eos not in chosen[:-1]


def test_batches_are_pure_and_an_epoch_covers_every_pair(tok):
    encoded = dpo.encode_pairs(tok, dpo.make_pairs(draw_cases(12, 0, "dpo")))
    ref = torch.arange(24.0).view(12, 2)  # names each pair
    batches = dpo.dpo_batches(encoded, ref, 4, seed=3, pad_id=0, device=CPU)
    again = dpo.dpo_batches(encoded, ref, 4, seed=3, pad_id=0, device=CPU)
    later = again(5)
    for step in (0, 4, 5):
        assert torch.equal(batches(step).rows.ids, again(step).rows.ids)
    assert torch.equal(later.ref_logp, batches(5).ref_logp)
    for epoch in (0, 1):
        seen = torch.cat([batches(3 * epoch + i).ref_logp.chunk(2)[0] for i in range(3)])
        assert sorted(seen.tolist()) == [2.0 * i for i in range(12)]
    assert not torch.equal(batches(0).ref_logp, batches(3).ref_logp), "each epoch has its own order"
    chosen, rejected = batches(0).ref_logp.chunk(2)
    assert torch.equal(rejected, chosen + 1), "row i and row i + B are one pair"
    with pytest.raises(ValueError, match="12 pairs cannot fill a batch of 13"):
        dpo.dpo_batches(encoded, ref, 13, seed=0, pad_id=0, device=CPU)


@pytest.mark.parametrize("beta", [0, -0.1, math.inf, math.nan])
def test_beta_has_to_be_positive(beta):
    with pytest.raises(ValueError, match="beta="):
        dpo.dpo_loss(*(torch.zeros(2),) * 4, beta)


@pytest.mark.parametrize(("k", "shape"), [(0, (3, 1)), (1, (3, 1)), (2, (1,)), (3, ()), (3, (1, 3))])
def test_a_column_in_place_of_a_row_is_refused(k, shape):
    """(3, 1) against (3,) broadcasts to nine pairs: a finite loss, of other pairs."""
    logps = [torch.zeros(shape) if i == k else torch.zeros(3) for i in range(4)]
    with pytest.raises(ValueError, match="all must be .B,., one number a pair") as error:
        dpo.dpo_loss(*logps, BETA)
    assert str(shape) in str(error.value) and "(3,)" in str(error.value)
    with pytest.raises(ValueError, match=r"shape \(0,\)"):
        dpo.dpo_loss(*[torch.zeros(0)] * 4, BETA)


@pytest.mark.parametrize(("change", "message"), [
    ({"reason": " "}, "reason is ' '"), ({"prompt": ""}, "prompt is ''"), ({"chosen": 3}, "chosen is 3"),
    ({"rejected": "good"}, "carry no preference"),
])
def test_make_pair_refuses(change, message):
    pair = {"prompt": "p", "chosen": "good", "rejected": "bad", "reason": "because"}
    assert dpo.make_pair(**pair) == pair
    with pytest.raises(ValueError, match=message):
        dpo.make_pair(**(pair | change))


def test_read_pairs_names_file_and_line(tmp_path, pairs):
    path = tmp_path / "pairs.jsonl"
    write_jsonl(path, pairs)
    assert dpo.read_pairs(path) == pairs
    lines = path.read_text().splitlines()
    for change, message in (({"reason": ""}, "reason is ''"), ({"rejected": pairs[2]["chosen"]}, "no preference"),
                            ({"chosen": None}, "'chosen'")):
        broken = [*lines[:2], json.dumps(pairs[2] | change), *lines[3:]]
        path.write_text("\n".join(broken) + "\n")
        with pytest.raises(ValueError, match=message) as error:
            dpo.read_pairs(path)
        assert str(error.value).startswith(f"{path}:3: ")
    path.write_text("")
    with pytest.raises(ValueError, match="no rows"):
        dpo.read_pairs(path)


def said(*words: str) -> list[dict]:
    """policy, order, user, bot: as many messages as words."""
    return [{"role": role, "content": w} for role, w in zip(("policy", "order", "user", "bot"), words)]


def test_conversational_pairs_become_text(tmp_path):
    path = tmp_path / "pairs.jsonl"
    row = {"chosen": said("damaged P-7 30d", "A1 mug 9d", "broken", "yes"),
           "rejected": said("damaged P-7 30d", "A1 mug 9d", "broken", "no"), "reason": "wrong_decision", "id": "x"}
    prompt = "<bos><policy>damaged P-7 30d<order>A1 mug 9d<user>broken<bot>"
    write_jsonl(path, [row, row | {"prompt": prompt}, row | {"prompt": row["chosen"][:-1]}])
    want = {"prompt": prompt, "chosen": "yes", "rejected": "no", "reason": "wrong_decision", "id": "x"}
    assert dpo.read_pairs(path) == [want] * 3


@pytest.mark.parametrize(("change", "message"), [
    ({"rejected": said("damaged P-7 31d", "A1 mug 9d", "broken", "no")},
     "prompts differ at message 1: chosen has policy 'damaged P-7 30d', rejected has policy 'damaged P-7 31d'"),
    ({"rejected": [*said("damaged P-7 30d", "A1 mug 9d", "broken", "no"), {"role": "user", "content": "s"},
                   {"role": "bot", "content": "no"}]}, "differ at message 4: chosen has nothing, rejected has bot"),
    ({"rejected": said("damaged P-7 30d", "A1 mug 9d", "broken", "yes")}, "carry no preference"),
    ({"reason": " "}, "reason is ' '"),
    ({"rejected": "no"}, "'rejected'"),
    ({"rejected": said("damaged P-7 30d", "A1 mug 9d", "broken")}, "rejected must be a prompt and then the bot's"),
    ({"chosen": said("damaged P-7 30d", "A1 mug 9d", "br<bot>oken", "yes")}, "message 3 contains the tag <bot>"),
    ({"prompt": "another"}, "prompt 'another' is not what both"),
])
def test_a_bad_conversational_pair_is_refused_by_file_and_line(tmp_path, change, message):
    path = tmp_path / "pairs.jsonl"
    row = {"chosen": said("damaged P-7 30d", "A1 mug 9d", "broken", "yes"),
           "rejected": said("damaged P-7 30d", "A1 mug 9d", "broken", "no"), "reason": "wrong_decision"}
    write_jsonl(path, [row, row | change])
    with pytest.raises(ValueError) as error:
        dpo.read_pairs(path)
    assert str(error.value).startswith(f"{path}:2: ") and message in str(error.value)
