"""The kin of DPO: TRL's trainers as oracles in value and gradient, hand numbers, label noise, swapped pairs."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from lifecycle_lib.desk.cases import draw_cases
from lifecycle_lib.model.bridge import to_llama
from lifecycle_lib.train import dpo
from lifecycle_lib.train import preferences as kin
from lifecycle_lib.train.reward_model import bt_loss

BETA = 0.3


@pytest.fixture(scope="module")
def pairs() -> list[dict]:
    return dpo.make_pairs(draw_cases(4, 0, "dpo"))


def batch_of(tok, pairs, reference) -> dpo.PairBatch:
    encoded = dpo.encode_pairs(tok, pairs)
    return dpo.PairBatch(dpo.pair_rows(encoded, 0), dpo.reference_logps(reference, encoded, 0).T.reshape(-1))


def numbers(n: int = 6, seed: int = 0):
    """chosen and rejected log-probabilities that ask for a gradient, and a reference."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda base: base - torch.rand(n, generator=g)  # noqa: E731
    return draw(-2).requires_grad_(), draw(-4).requires_grad_(), draw(-3), draw(-3)


def same(ours, theirs, leaves) -> None:
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_by_hand():
    gap = torch.tensor([2.0])
    up, down = math.log1p(math.exp(-1)), math.log1p(math.exp(1))
    assert kin.smoothed_loss(gap, 0.5, 0.1).item() == pytest.approx(0.9 * up + 0.1 * down, abs=1e-6)
    robust = kin.smoothed_loss(gap, 0.5, 0.1, robust=True).item()
    assert robust == pytest.approx((0.9 * up - 0.1 * down) / 0.8, abs=1e-6)
    t = lambda x: torch.tensor([x])  # noqa: E731
    assert kin.ipo_loss(t(2.0), t(-4.0), 0.1).item() == pytest.approx((6 - 5) ** 2)
    assert kin.ipo_loss(t(2.0), t(-4.0), 0.1, (t(2.0), t(4.0))).item() == pytest.approx((1 + 1 - 5) ** 2)
    assert kin.kto_loss(t(1.0), t(1.0), torch.tensor(1.0), 0.1).item() == pytest.approx(0.5)
    half = math.log(0.5)  # odds 1 against 1: log odds ratio 0
    assert kin.orpo_loss(t(half), t(half), torch.tensor(2.0), 0.1).item() == pytest.approx(2 + 0.1 * math.log(2))


def test_ipo_robust_and_length_normalised_are_those_of_trl(make_model, gradients, tok, pairs, tmp_path):
    from dpo_step import trl_dpo

    reference, policy = make_model(noise=0.05), make_model(noise=0.15)
    uneven = [pairs[0] | {"rejected": "no"}, *pairs[1:]]  # lengths that differ within a pair
    trainer = trl_dpo(reference, tok, uneven, str(tmp_path))
    trainer.beta, trainer.label_smoothing = BETA, 0.2
    trainer.model.load_state_dict(to_llama(policy).state_dict())
    feed = next(iter(trainer.get_train_dataloader()))
    batch = batch_of(tok, uneven, reference)
    seen = {}
    for ours_kind, name in {"dpo": "sigmoid", "ipo_mean": "ipo", "robust": "robust", "norm": "sigmoid_norm"}.items():
        trainer.loss_types = [name]
        theirs = trainer.compute_loss(trainer.model.train(), feed)
        ours, _ = kin.kin_loss(ours_kind, BETA, smoothing=0.2)(policy, batch)
        assert ours.item() == pytest.approx(theirs.item(), abs=1e-5), name
        for a, b in zip(gradients(ours, policy), gradients(theirs, trainer.model), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        seen[name] = theirs.item()

    def agrees(name: str, kind: str, on=batch, **more) -> bool:
        return abs(kin.kin_loss(kind, BETA, **more)(policy, on)[0].item() - seen[name]) < 1e-5

    assert not agrees("ipo", "ipo"), "the paper's sums are not TRL's means"
    swapped = batch_of(tok, [p | {"chosen": p["rejected"], "rejected": p["chosen"]} for p in uneven], reference)
    none = dpo.PairBatch(batch.rows, batch.ref_logp * 0)
    for name, kind in (("ipo", "ipo_mean"), ("robust", "robust"), ("sigmoid_norm", "norm")):
        assert not agrees(name, kind, swapped, smoothing=0.2), f"{kind}: chosen and rejected swapped"
        assert not agrees(name, kind, none, smoothing=0.2), f"{kind}: no reference"
    assert not agrees("robust", "cdpo", smoothing=0.2), "cDPO adds the flipped term, robust DPO subtracts it"


def test_kto_is_that_of_trl(make_model, gradients, tok, pairs, tmp_path):
    from datasets import Dataset
    from dpo_step import trl_args
    from trl import KTOConfig, KTOTrainer

    reference, policy = make_model(noise=0.05), make_model(noise=0.15)
    rows = [{"prompt": p["prompt"], "completion": p[side], "label": side == "chosen"}
            for side in ("chosen", "rejected") for p in pairs]
    args = KTOConfig(**trl_args(str(tmp_path), per_device_train_batch_size=len(rows), max_length=None))
    trainer = KTOTrainer(to_llama(reference), ref_model=to_llama(reference), args=args,
                         train_dataset=Dataset.from_list(rows), processing_class=tok.to_transformers())
    trainer.beta = BETA
    trainer.model.load_state_dict(to_llama(policy).state_dict())
    theirs = trainer.compute_loss(trainer.model.train(), next(iter(trainer.get_train_dataloader())))
    batch = batch_of(tok, pairs, reference)
    ours, _ = kin.kin_loss("kto", BETA, reference=reference)(policy, batch)
    assert abs(ours.item() - 0.5) > 0.01 and ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    for a, b in zip(gradients(ours, policy), gradients(theirs, trainer.model), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    if (zero := kin.mismatched_kl(policy, reference, batch.rows)) == 0:  # the other way round it is not
        zero = kin.mismatched_kl(reference, policy, batch.rows)
    assert zero > 0
    swapped = batch_of(tok, [p | {"chosen": p["rejected"], "rejected": p["chosen"]} for p in pairs], reference)
    wrong, _ = kin.kin_loss("kto", BETA, reference=reference)(policy, swapped)
    assert abs(wrong.item() - theirs.item()) > 1e-5, "chosen and rejected swapped"


def test_orpo_and_cdpo_are_those_of_trl():
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    here = SimpleNamespace(device=torch.device("cpu"))
    chosen, rejected, ref_chosen, ref_rejected = numbers()
    of = SimpleNamespace(beta=BETA, accelerator=here)
    theirs = -ORPOTrainer.odds_ratio_loss(of, chosen, rejected)[0].mean()
    same(kin.orpo_loss(chosen, rejected, torch.tensor(0.0), BETA), theirs, [chosen, rejected])
    of = SimpleNamespace(beta=BETA, accelerator=here, alpha=0.0, loss_type="sigmoid", label_smoothing=0.2)
    theirs = CPOTrainer.cpo_loss(of, chosen - ref_chosen, rejected - ref_rejected)[0].mean()
    gap = (chosen - ref_chosen) - (rejected - ref_rejected)
    same(kin.smoothed_loss(gap, BETA, 0.2), theirs, [chosen, rejected])
    assert abs(kin.smoothed_loss(-gap, BETA, 0.2).item() - theirs.item()) > 1e-3, "swapped"
    of.loss_type = "ipo"
    theirs = CPOTrainer.cpo_loss(of, chosen - ref_chosen, rejected - ref_rejected)[0].mean()
    same(kin.ipo_loss(chosen - ref_chosen, rejected - ref_rejected, BETA), theirs, [chosen, rejected])


def test_rdpo_is_bradley_terry_with_the_length_as_stated_margin(make_model, tok, pairs):
    reference, policy = make_model(noise=0.05), make_model(noise=0.15)
    batch = batch_of(tok, pairs, reference)
    ours, _ = kin.kin_loss("rdpo", BETA, alpha=0.4)(policy, batch)
    chosen, rejected = kin.implicit_rewards(policy, batch, BETA)
    n = [torch.tensor([len(row[i]) for row in dpo.encode_pairs(tok, pairs)]) for i in (1, 2)]
    assert ours.item() == pytest.approx(bt_loss(chosen, rejected, margin=0.4 * (n[0] - n[1]))[0].item(), abs=1e-5)


def test_robust_is_unbiased_and_smoothing_wants_a_finite_gap():
    gap = torch.linspace(-3, 3, 7)
    mixed = 0.7 * kin.smoothed_loss(gap, 1.0, 0.3, robust=True) + 0.3 * kin.smoothed_loss(-gap, 1.0, 0.3, robust=True)
    torch.testing.assert_close(mixed, -F.logsigmoid(gap).mean(), atol=1e-6, rtol=1e-6)
    best = torch.tensor([math.log(0.7 / 0.3)], requires_grad=True)
    assert torch.autograd.grad(kin.smoothed_loss(best, 1.0, 0.3), best)[0].item() == pytest.approx(0, abs=1e-6)


def test_label_noise_flips_exactly_that_share(pairs):
    many = dpo.make_pairs(draw_cases(40, 0, "dpo"))
    noisy = kin.with_label_noise(many, 0.25, 3)
    assert sum(a["chosen"] != b["chosen"] for a, b in zip(many, noisy)) == 10
    assert noisy == kin.with_label_noise(many, 0.25, 3) != kin.with_label_noise(many, 0.25, 4)
    with pytest.raises(ValueError, match="share=1.5"):
        kin.with_label_noise(many, 1.5, 0)


def test_the_audit_catches_swapped_pairs_that_no_metric_shows(make_model, tok):
    honest = lambda pair, answer: "label_created" not in answer  # noqa: E731
    pairs = dpo.make_pairs(draw_cases(20, 0, "dpo"))
    assert kin.audit_pairs(pairs, honest) == []
    noisy = kin.with_label_noise(pairs, 0.2, 0)
    assert kin.audit_pairs(noisy, honest) == [i for i, p in enumerate(noisy) if "label" in p["chosen"]] != []
    swapped = kin.with_label_noise(pairs, 1.0, 0)
    assert kin.audit_pairs(swapped, honest) == list(range(20))
    model = make_model()
    first = [kin.kin_loss("dpo", BETA)(model, batch_of(tok, p, model))[0].item() for p in (pairs, swapped)]
    assert first == pytest.approx([math.log(2)] * 2, abs=1e-5), "the loss sees nothing"
    with pytest.raises(ValueError, match="no pairs"):
        kin.audit_pairs([], honest)


def test_a_scorer_that_knows_the_answers_disagrees_with_swapped_labels(make_model, tok, pairs):
    reference, policy = make_model(noise=0.05), make_model(noise=0.05)
    for p in policy.parameters():
        p.requires_grad_(True)
    batch = batch_of(tok, pairs, reference)
    solver = torch.optim.SGD(policy.parameters(), lr=0.05)
    for _ in range(5):
        solver.zero_grad()
        kin.kin_loss("dpo", BETA)(policy, batch)[0].backward()
        solver.step()
    chosen, rejected = kin.implicit_rewards(policy, batch, BETA)
    assert (chosen > rejected).all()
    swapped = batch_of(tok, [p | {"chosen": p["rejected"], "rejected": p["chosen"]} for p in pairs], reference)
    chosen, rejected = kin.implicit_rewards(policy, swapped, BETA)
    assert not (chosen > rejected).any()


@pytest.mark.parametrize(("call", "message"), [
    (lambda: kin.kin_loss("dop", 0.1), "kind='dop' is unknown"), (lambda: kin.kin_loss("ipo", 0.0), "beta=0.0"),
    (lambda: kin.kin_loss("kto", 0.1), "KTO needs the frozen reference"),
    (lambda: kin.smoothed_loss(torch.zeros(1), 0.1, 0.5), "smoothing=0.5"),
])
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
