"""The kin of DPO: TRL's trainers as oracles in value and gradient, hand numbers, label noise, swapped pairs."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from lifecycle_lib.desk.cases import draw_cases
from lifecycle_lib.model.bridge import to_llama
from lifecycle_lib.model.hf_classes import llama_names
from lifecycle_lib.train import dpo
from lifecycle_lib.train import preferences as kin
from lifecycle_lib.train.logprobs import sum_logps

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

    rows = [{"prompt": p["prompt"], "completion": p[side], "label": side == "chosen"}
            for side in ("chosen", "rejected") for p in pairs]
    args = KTOConfig(**trl_args(str(tmp_path), per_device_train_batch_size=len(rows), max_length=None))
    near, far = make_model(noise=0.05), make_model(noise=0.15)
    raw = {}  # the KL estimate of mismatched answers before it is clamped at 0
    for name, reference, policy in (("above", far, near), ("below", near, far)):
        trainer = KTOTrainer(to_llama(reference), ref_model=to_llama(reference), args=args,
                             train_dataset=Dataset.from_list(rows), processing_class=tok.to_transformers())
        trainer.beta = BETA
        trainer.model.load_state_dict(to_llama(policy).state_dict())
        theirs = trainer.compute_loss(trainer.model.train(), next(iter(trainer.get_train_dataloader())))
        batch = batch_of(tok, pairs, reference)
        ours, _ = kin.kin_loss("kto", BETA, reference=reference)(policy, batch)
        assert abs(ours.item() - 0.5) > 0.01 and ours.item() == pytest.approx(theirs.item(), abs=1e-5)
        wanted = gradients(theirs, trainer.model)
        for a, b in zip(gradients(ours, policy), wanted, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)

        score = (sum_logps(policy, batch.rows) - batch.ref_logp).chunk(2)
        zero = free_zero(policy, reference, batch.rows)
        raw[name] = zero.item()
        if name == "above":
            leaky = gradients(kin.kto_loss(*score, zero.clamp(min=0), BETA), policy)
            assert max((a - b).abs().max() for a, b in zip(leaky, wanted)) > 1e-3, "a gradient through the zero"
            assert abs(kin.kto_loss(*score, zero * 0, BETA).item() - theirs.item()) > 1e-3, "no zero at all"
        else:
            assert abs(kin.kto_loss(*score, zero, BETA).item() - theirs.item()) > 1e-3, "a zero that is not clamped"
        swapped = batch_of(tok, [p | {"chosen": p["rejected"], "rejected": p["chosen"]} for p in pairs], reference)
        wrong, _ = kin.kin_loss("kto", BETA, reference=reference)(policy, swapped)
        assert abs(wrong.item() - theirs.item()) > 1e-5, "chosen and rejected swapped"
    assert raw["above"] > 0.1 and raw["below"] < -0.1, "both sides of the clamp were met"
    with pytest.raises(ValueError, match="KTO got a batch of 1 pair"):
        kin.mismatched_kl(policy, reference, batch_of(tok, pairs[:1], reference).rows)


def free_zero(policy, reference, rows) -> torch.Tensor:
    """KTO's zero with its gradient and its sign, from whole sequences: answer i after the prompt of answer i + 1."""
    prompts = [rows.prefix.ids[o][rows.prefix.mask[o]] for o in rows.prefix.owner]
    ratios = []
    for i, (ids, mask) in enumerate(zip(rows.ids, rows.mask)):
        j = (i + 1) % len(prompts)
        whole = torch.cat((prompts[j], rows.ids[j][:1], ids[mask]))[None]
        n = int(mask.sum())
        ratios.append(sum(sign * m(whole[:, :-1]).log_softmax(-1)[0, -n:].gather(-1, whole[0, -n:, None]).sum()
                          for m, sign in ((policy, 1), (reference, -1))))
    return torch.stack(ratios).mean()


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


def llama_logps(model, tok, pairs) -> tuple[torch.nn.Module, list[torch.Tensor], list[torch.Tensor]]:
    """transformers' Llama with these weights; token log-probabilities of each chosen and of each rejected answer."""
    peer = to_llama(model)
    rows = dpo.encode_pairs(tok, pairs)
    each = [[-F.cross_entropy(peer(input_ids=torch.tensor([row[0] + row[k]])).logits[0, len(row[0]) - 1:-1],
                              torch.tensor(row[k]), reduction="none") for row in rows] for k in (1, 2)]
    return peer, *each


def test_cdpo_orpo_and_rdpo_on_whole_sequences_are_those_of_transformers(make_model, gradients, tok, pairs):
    """kin_loss from end to end, against each formula as its paper has it on a Llama's logits: value and gradient."""
    uneven = [pairs[0] | {"chosen": pairs[0]["rejected"], "rejected": pairs[0]["chosen"]},
              pairs[1] | {"rejected": "no"}, *pairs[2:]]  # chosen longer, much longer, and shorter
    reference, policy = make_model(noise=0.05), make_model(noise=0.15)
    batch = batch_of(tok, uneven, reference)
    peer, chosen, rejected = llama_logps(policy, tok, uneven)
    with torch.no_grad():
        _, ref_chosen, ref_rejected = llama_logps(reference, tok, uneven)
    total = lambda rows: torch.stack([x.sum() for x in rows])  # noqa: E731
    odds = lambda rows: torch.stack([torch.logit(x.mean().exp()) for x in rows])  # noqa: E731
    margin = BETA * (total(chosen) - total(ref_chosen) - total(rejected) + total(ref_rejected))
    longer = torch.tensor([float(len(c) - len(r)) for c, r in zip(chosen, rejected)])
    assert longer.min() < 0 < longer.max()
    vote = F.binary_cross_entropy_with_logits  # a vote with target 1, or 0.8 where a fifth may be wrong
    ones = torch.ones(len(uneven))
    nll = -torch.cat(chosen).mean()
    wanted = {"cdpo": vote(margin, 0.8 * ones), "rdpo": vote(margin + 0.02 * longer, ones),
              "orpo": nll + BETA * vote(odds(chosen) - odds(rejected), ones)}
    for kind, theirs in wanted.items():
        ours, _ = kin.kin_loss(kind, BETA, smoothing=0.2, alpha=0.02)(policy, batch)
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-5), kind
        for a, b in zip(gradients(ours, policy), torch.autograd.grad(theirs, list(by_name(peer, 2)),
                                                                     retain_graph=True), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    away = lambda loss, kind: abs(loss.item() - wanted[kind].item())  # noqa: E731
    assert away(kin.kin_loss("dpo", BETA)(policy, batch)[0], "cdpo") > 1e-3, "no smoothing"
    assert away(vote(margin - 0.02 * longer, ones), "rdpo") > 1e-3, "the sign of the length turned round"
    assert away(nll - BETA * vote(odds(chosen) - odds(rejected), ones), "orpo") > 1e-3, "the odds ratio subtracted"
    assert away(total(chosen).mean() * -1 + wanted["orpo"] - nll, "orpo") > 1e-3, "a sum in place of the answer loss"


def by_name(peer, n_layer: int):
    """A Llama's weights in the order of GPT.state_dict()."""
    named = dict(peer.named_parameters())
    return [named[name] for name in llama_names(n_layer).values()]


def test_rdpo_is_the_optimum_of_a_reward_that_pays_for_brevity():
    """Park et al. (2024): the best policy of reward - alpha |y| - beta KL, written out over four answers. Its R-DPO
    logit of every pair is the voters' log-odds, so the gradient of the votes' likelihood is 0 there, and with the sign
    turned round it is not."""
    beta, alpha = 0.5, 0.2
    reward, length = torch.tensor([1.0, 0.2, -0.5, 0.7]).double(), torch.tensor([3.0, 9.0, 1.0, 30.0]).double()
    ref = torch.tensor([0.4, 0.3, 0.2, 0.1]).double().log()
    policy = (ref + (reward - alpha * length) / beta).log_softmax(0).requires_grad_()
    a, b = torch.tensor([(i, j) for i in range(4) for j in range(4) if i != j]).T
    share = torch.sigmoid(reward[a] - reward[b])  # votes for a over b, exact
    gap = (policy - ref)[a] - (policy - ref)[b]

    def slope(sign: float) -> float:
        each = torch.stack([p * kin.rdpo_loss(g[None], sign * n[None], beta, alpha)
                            for p, g, n in zip(share, gap, length[a] - length[b])])
        return torch.autograd.grad(each.sum(), policy, retain_graph=True)[0].abs().max().item()

    assert slope(1.0) < 1e-10 and slope(-1.0) > 0.05


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
    (lambda: kin.smoothed_loss(torch.zeros(3, 1), 0.1, 0.2), r"gap has shape \(3, 1\)"),
    (lambda: kin.ipo_loss(torch.zeros(3), torch.zeros(3, 1), 0.1),
     r"chosen_score has shape \(3,\), rejected_score has shape \(3, 1\)"),
    (lambda: kin.ipo_loss(torch.zeros(3), torch.zeros(3), 0.1, (torch.ones(3, 1), torch.ones(3))),
     r"chosen_score has shape \(3,\), chosen_length has shape \(3, 1\)"),
    (lambda: kin.rdpo_loss(torch.zeros(3), torch.zeros(3, 1), 0.1, 0.1), r"extra_tokens has shape \(3, 1\)"),
    (lambda: kin.rdpo_loss(torch.zeros(3), torch.zeros(3), 0.1, -0.1), "alpha=-0.1"),
    (lambda: kin.kto_loss(torch.zeros(3), torch.zeros(2, 1), torch.tensor(0.0), 0.1), r"rejected_score .*\(2, 1\)"),
    (lambda: kin.kto_loss(torch.zeros(3), torch.zeros(2), torch.zeros(3), 0.1), r"zero has shape \(3,\)"),
    (lambda: kin.orpo_loss(-torch.ones(3, 1), -torch.ones(3), torch.tensor(1.0), 0.1),
     r"chosen_mean has shape \(3, 1\), rejected_mean has shape \(3,\)"),
])
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
