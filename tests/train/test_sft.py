"""Demonstrations: only the answer counts, audits refuse a damaged target, epochs cover every row."""

import json

import pytest
import torch
import torch.nn.functional as F

from lifecycle_lib.desk.cases import draw_cases, golden_case, with_label_claim
from lifecycle_lib.model.bridge import to_llama
from lifecycle_lib.train import sft
from lifecycle_lib.train.logprobs import Rows, answer_loss


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return sft.make_demonstrations(draw_cases(12, 0, "sft"), 0.3, seed=0)


def test_the_loss_counts_the_answer_and_its_end_only(make_model, tok, rows):
    model = make_model(noise=0.1)
    encoded = sft.encode_rows(tok, rows[:3])
    batch = sft.sft_batches(encoded, 3, 0, tok.special["<pad>"], 128)(0)
    losses, counted = [], 0
    for row in rows[:3]:  # the oracle tokenizes with transformers and scores one row at a time
        fast = tok.to_transformers()
        prompt, answer = fast(row["prompt"])["input_ids"], fast(row["answer"] + "<eos>")["input_ids"]
        logits = to_llama(model)(input_ids=torch.tensor([prompt + answer])).logits[0]
        losses.append(F.cross_entropy(logits[len(prompt) - 1:-1], torch.tensor(answer), reduction="sum").item())
        counted += len(answer)
    loss, metrics = answer_loss(model, batch)
    assert loss.item() == pytest.approx(sum(losses) / counted, abs=1e-5) and metrics["target_tokens"] == counted
    everything = Rows(batch.ids, batch.ids != tok.special["<pad>"])
    assert abs(answer_loss(model, everything)[0].item() - sum(losses) / counted) > 1e-3, "prompt tokens counted"
    headless = Rows(batch.ids, batch.mask & (batch.ids != tok.special["<eos>"]))
    assert abs(answer_loss(model, headless)[0].item() - sum(losses) / counted) > 1e-3, "the end not counted"


def test_what_a_row_says(tok, rows):
    for row, case in zip(rows, draw_cases(12, 0, "sft"), strict=True):
        assert row["prompt"] == case.prompt and row["id"] == case.case_id
        assert row["answer"] == (with_label_claim(case.answer) if row["flawed"] else case.answer)
        assert row["source"] and row["licence"] == "CC-BY-4.0"
    for prompt, answer in sft.encode_rows(tok, rows):
        assert tok.decode(prompt).endswith("<bot>") and answer[-1] == tok.special["<eos>"]


def test_the_share_of_flawed_rows():
    cases = draw_cases(2000, 0, "sft")
    flawed = sum(r["flawed"] for r in sft.make_demonstrations(cases, 0.3, seed=0))
    assert 540 <= flawed <= 660  # 600 +- 3 standard deviations
    assert sum(r["flawed"] for r in sft.make_demonstrations(cases, 0.0, seed=0)) == 0
    assert sum(r["flawed"] for r in sft.make_demonstrations(cases, 1.0, seed=0)) == 2000
    for share in (-0.1, 1.1):
        with pytest.raises(ValueError, match=f"claim_share={share}"):
            sft.make_demonstrations(cases, share, seed=0)


def test_batches_are_pure_and_an_epoch_covers_every_row(tok, rows):
    encoded = sft.encode_rows(tok, rows)
    keys = {tuple(p + a): i for i, (p, a) in enumerate(encoded)}
    assert len(keys) == 12

    def rows_of(batch: Rows) -> list[int]:
        return [keys[tuple(t for t in row if t != 0)] for row in batch.ids.tolist()]

    batches, again = (sft.sft_batches(encoded, 4, 7, tok.special["<pad>"], 128) for _ in range(2))
    late = rows_of(again(4))
    for step in (0, 4, 2):
        assert torch.equal(batches(step).ids, again(step).ids) and torch.equal(batches(step).mask, again(step).mask)
    assert rows_of(batches(4)) == late
    orders = [[i for s in range(3) for i in rows_of(batches(3 * epoch + s))] for epoch in range(3)]
    assert all(sorted(order) == list(range(12)) for order in orders) and orders[0] != orders[1] != orders[2]
    other = sft.sft_batches(encoded, 4, 8, tok.special["<pad>"], 128)
    assert [rows_of(other(s)) for s in range(3)] != [rows_of(batches(s)) for s in range(3)]
    uneven = sft.sft_batches(encoded, 5, 7, tok.special["<pad>"], 128)
    assert len({i for s in range(2) for i in rows_of(uneven(s))}) == 10, "no row twice in an epoch"


def test_batches_refuse(tok, rows):
    encoded = sft.encode_rows(tok, rows)
    with pytest.raises(ValueError, match="12 demonstrations cannot fill a batch of 13"):
        sft.sft_batches(encoded, 13, 0, 0, 128)
    with pytest.raises(ValueError, match="over the limit of 40"):
        sft.sft_batches(encoded, 4, 0, 0, 40)(0)


def test_the_lesson_record():
    case = golden_case()
    example = sft.make_example(case.order, case.policy)
    assert example == {
        "instruction": "Decide the return and cite the policy.",
        "input": {"order_id": "A10234", "reason": "damaged", "days": 12},
        "target": {"eligible": True, "evidence": "damaged P-7 30d, 12d confirmed", "policy_id": "P-7"}}
    assert list(example["target"]) == sorted(example["target"]) and sft.audit_target(example["target"]) == "keep"
    assert json.loads(case.answer) == example["target"]


@pytest.mark.parametrize(("change", "verdict"), [
    ({}, "keep"), ({"eligible": None, "policy_id": None, "evidence": None}, "keep"),
    ({"policy_id": ...}, "reject: missing policy_id"),
    ({"policy_id": ..., "evidence": ...}, "reject: missing policy_id, evidence"),
    ({"eligible": 1}, "reject: wrong type in eligible"), ({"eligible": "true"}, "reject: wrong type in eligible"),
    ({"evidence": 30}, "reject: wrong type in evidence"),
    ({"label_created": True}, "reject: unknown field label_created"),
])
def test_audit(change, verdict):
    target = {"eligible": True, "policy_id": "P-7", "evidence": "damaged P-7 30d"} | change
    target = {k: v for k, v in target.items() if v is not ...}
    assert sft.audit_target(target) == verdict and sft.audit_targets([target, target]) == [verdict] * 2
