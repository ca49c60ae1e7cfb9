"""The preferences study: rates by hand, imitation against answer_loss, all three designs from end to end."""

from dataclasses import replace

import pytest
import torch

from lifecycle_lib.core.store import Store
from lifecycle_lib.desk.cases import draw_cases, with_label_claim
from lifecycle_lib.lab.design import summarise
from lifecycle_lib.lab.stages import Lab
from lifecycle_lib.lab.studies import preferences as study
from lifecycle_lib.train.logprobs import answer_loss, pad_rows


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Lab:
    return Lab("smoke", seed=100, device="cpu", store=Store(tmp_path_factory.mktemp("store")))


def test_a_claim_that_is_never_closed_is_said_and_not_claimed():
    a, b, c, d = draw_cases(4, 0, "x")
    texts = [a.answer, with_label_claim(b.answer), with_label_claim(c.answer)[:-1], "hello"]
    assert study.rates(texts, [a, b, c, d]) == {"said": 0.5, "claim": 0.25, "valid": 0.5, "exact": 0.25}
    with pytest.raises(ValueError):
        study.rates(texts, [a])


def test_imitating_the_winners_is_the_sft_loss_of_the_chosen_answers(lab):
    bench = study.Bench(lab)
    batch = bench.batches(bench.pairs)(0)
    ours, _ = study.chosen_loss(bench.reference, batch)
    coded = study.dpo.encode_pairs(bench.tok, bench.pairs)
    order = study.dpo.make_rng(lab.seed, "dpo order", 0).sample(range(len(coded)), len(coded))[:lab.profile.dpo_batch]
    whole = pad_rows([coded[i][0] for i in order], [coded[i][1] for i in order], bench.pad)
    assert ours.item() == pytest.approx(answer_loss(bench.reference, whole)[0].item(), abs=1e-5)
    rejected = pad_rows([coded[i][0] for i in order], [coded[i][2] for i in order], bench.pad)
    assert abs(ours.item() - answer_loss(bench.reference, rejected)[0].item()) > 1e-4, "the losers"


def test_an_untrained_policy_has_spent_no_kl(lab):
    bench = study.Bench(lab)
    texts, kl = bench.answers(bench.reference, 2)
    assert len(texts) == 2 * len(bench.cases) and kl == pytest.approx(0, abs=1e-4)
    moved = lab.load(bench.sft)
    with torch.no_grad():
        moved.wte.weight.mul_(1.5)
    assert bench.answers(moved)[1] > 0.1


def test_the_run_ended_at_a_matched_claim_is_a_run_cut_short(lab):
    bench = study.Bench(lab)
    probe = study.TailProbe(bench)
    start = float(probe(bench.reference)[0])
    late, never = study.matched(bench, probe, 1e-3, 3, target=-1e9)
    early, at_once = study.matched(bench, probe, 1e-3, 3, target=start)
    assert (never["reached"], never["steps"], at_once["reached"], at_once["steps"]) == (False, 3, True, 0)
    untouched = study.after(bench, probe, early)
    assert untouched["fork"] == start and untouched["moved"] == 0, "ended before its first step"
    assert study.after(bench, probe, late)["moved"] > 0


def test_the_tail_probe_is_the_log_odds_of_the_tokens_after_the_fork(lab):
    bench = study.Bench(lab)
    (prompt, chosen, rejected), *_ = study.dpo.encode_pairs(
        bench.tok, study.dpo.make_pairs(draw_cases(study.N_PROBE, lab.seed, "dpo probe")))
    probe = study.TailProbe(bench)
    probe.rows, probe.forks = pad_rows([prompt], [rejected], bench.pad), probe.forks[:1]
    p = bench.reference(torch.tensor([prompt + rejected]))[0].softmax(-1)
    tail = [torch.logit(p[len(prompt) + i - 1, rejected[i]].double()) for i in range(probe.forks[0], len(rejected))]
    assert chosen[:probe.forks[0]] == rejected[:probe.forks[0]]
    torch.testing.assert_close(probe(bench.reference), torch.stack(tail).float(), atol=1e-3, rtol=1e-3)


def test_where_noisy_votes_let_dpo_rest():
    """Found again by minimising the expected loss of one pair: the odds of the reference fall by e^d."""
    from scipy.optimize import minimize_scalar

    said, share, beta = 0.3, 0.4, 0.5

    def expected(d: float, smoothing: float) -> float:
        of = lambda x: float(study.preferences.smoothed_loss(torch.tensor([x]).double(), beta, smoothing))  # noqa: E731
        return (1 - share) * of(d) + share * of(-d)

    for smoothing, wrong in ((0.0, share), (share, 2 * share * (1 - share))):
        d = minimize_scalar(expected, args=(smoothing,), bounds=(-5, 5), method="bounded").x
        left = float(torch.sigmoid(torch.logit(torch.tensor(said)) - d))
        assert study.at_rest(said, wrong, beta) == pytest.approx(left, abs=1e-3)
    assert study.at_rest(said, 0.5, beta) == pytest.approx(said), "votes that say nothing move nothing"


def test_all_designs_end_to_end(lab, monkeypatch):
    monkeypatch.setattr(study, "RL", replace(study.RL, n_prompts=2, group_size=2, max_new_tokens=6))
    monkeypatch.setattr(study, "RL_FIT", replace(study.RL_FIT, steps=1))
    monkeypatch.setattr(study, "RM_FIT", replace(study.RM_FIT, steps=2))
    monkeypatch.setattr(study, "ADAM", dict.fromkeys(study.ADAM, 1))
    for design in (study.KIN_DESIGN, study.NOISE_DESIGN, study.ADAM_DESIGN):
        row, made = design.measure(lab)
        effects, verdict = summarise(design, [row, row])
        told = [e[0] for e in design.effects if len(e) < 5 or all(row[key] == 1 for key in e[4])]
        assert [e["name"] for e in effects] == told and verdict in ("supported", "refuted", "inconclusive")
        assert all(a.card for a in made)
    assert design.measure(lab)[0] == row, "from the store"
    assert row["adam_0.0001.reached"] == 0 and verdict == "inconclusive", "nobody got there: nothing is decided"
