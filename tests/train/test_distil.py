"""Distillation: torch's kl_div and TRL's generalized_jsd_loss as oracles, T^2 by hand, the ways to get it wrong."""

import math

import pytest
import torch
import torch.nn.functional as F

from lifecycle_lib.core.seeds import make_generator
from lifecycle_lib.desk.cases import draw_cases
from lifecycle_lib.train import distil
from lifecycle_lib.train.distil import DistilBatch, distil_loss, divergence, merge_rest, teacher_targets
from lifecycle_lib.train.logprobs import Rows, answer_loss, pad_rows, shared_rows
from lifecycle_lib.train.loop import FitConfig, fit
from lifecycle_lib.train.sft import encode_rows


def logits_of(*shape: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(*shape, generator=make_generator(seed, "logits"))


@pytest.fixture(scope="module")
def rows(tok) -> Rows:
    cases = draw_cases(6, 0, "distil")
    encoded = encode_rows(tok, [{"prompt": c.prompt, "answer": c.answer} for c in cases])
    return pad_rows([p for p, _ in encoded], [a for _, a in encoded], tok.special["<pad>"])


def ours(student: torch.Tensor, teacher: torch.Tensor, temperature: float, beta: float = 0.0) -> torch.Tensor:
    """T^2 times the mean divergence, from logits (M, V)."""
    soft = [torch.log_softmax(x / temperature, -1) for x in (student, teacher)]
    return temperature**2 * divergence(*soft, beta).mean()


def test_two_tokens_by_hand():
    student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.8, 0.2]]).log()
    forward = 0.8 * math.log(1.6) + 0.2 * math.log(0.4)
    reverse = 0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2)
    m = (0.65, 0.35)  # the mixture at beta = 0.5
    jsd = 0.5 * (0.8 * math.log(0.8 / m[0]) + 0.2 * math.log(0.2 / m[1]))
    jsd += 0.5 * (0.5 * math.log(0.5 / m[0]) + 0.5 * math.log(0.5 / m[1]))
    for beta, want in ((0.0, forward), (1.0, reverse), (0.5, jsd)):
        assert divergence(student, teacher, beta).item() == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_value_and_gradient_equal_torch_kl_div(temperature, beta):
    student, teacher = logits_of(40, 17).requires_grad_(), logits_of(40, 17, seed=1)
    q, p = F.log_softmax(student / temperature, -1), F.log_softmax(teacher / temperature, -1)
    first, second = (q, p) if beta == 0 else (p, q)  # kl_div(input, target) is KL(target || input)
    theirs = temperature**2 * F.kl_div(first, second, reduction="batchmean", log_target=True)
    mine = ours(student, teacher, temperature, beta)
    assert mine.item() == pytest.approx(theirs.item(), abs=1e-5)
    a, b = (torch.autograd.grad(x, student, retain_graph=True)[0] for x in (mine, theirs))
    assert (a - b).abs().max() < 1e-5


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_value_and_gradient_equal_trl_gkd(beta):
    gkd = pytest.importorskip("trl.experimental.gkd", reason="trl is an extra")
    student, teacher = logits_of(3, 8, 17).requires_grad_(), logits_of(3, 8, 17, seed=1)
    labels = torch.randint(0, 2, (3, 8), generator=make_generator(0, "labels")) * 101 - 100  # -100 or 1
    theirs = gkd.GKDTrainer.generalized_jsd_loss(student, teacher, labels, beta=beta, temperature=2.0)
    counted = labels != -100
    mine = ours(student[counted], teacher[counted], 2.0, beta) / 4  # TRL does not multiply by T^2
    assert mine.item() == pytest.approx(theirs.item(), abs=1e-5)
    a, b = (torch.autograd.grad(x, student)[0] for x in (mine, theirs))
    assert (a - b).abs().max() < 1e-5


def test_scaled_divergence_goes_to_both_kls_and_jumps_at_the_ends():
    """Agarwal et al.: D / beta goes to KL(teacher||student) at 0, D / (1 - beta) to KL(student||teacher) at 1."""
    student, teacher = (torch.log_softmax(logits_of(30, 12, seed=s).double(), -1) for s in (0, 1))
    forward, reverse = (divergence(student, teacher, b) for b in (0.0, 1.0))
    near0, near1 = divergence(student, teacher, 1e-5), divergence(student, teacher, 1 - 1e-5)
    assert torch.allclose(near0 / 1e-5, forward, rtol=1e-2) and torch.allclose(near1 / 1e-5, reverse, rtol=1e-2)
    assert max(near0.max(), near1.max()) < 1e-3 < 0.1 < min(forward.min(), reverse.min())
    assert not torch.allclose(near1 / 1e-5, forward, rtol=0.1)  # broken: the two ends taken for one another


def test_t_squared_keeps_the_gradient_of_a_hot_softmax():
    """Hinton et al., section 2.1: for T far above the logits the gradient is (z - v) / V, whatever T is."""
    student, teacher = logits_of(5, 9).requires_grad_(), logits_of(5, 9, seed=1)
    centred = [x - x.mean(-1, keepdim=True) for x in (student.detach(), teacher)]
    want = (centred[0] - centred[1]) / 9 / 5

    def error(scale) -> float:
        loss = scale * ours(student, teacher, 1000.0) / 1000.0**2
        return float((torch.autograd.grad(loss, student)[0] - want).abs().max() / want.abs().max())

    assert error(1000.0**2) < 0.01
    assert error(1.0) > 0.99  # forgotten: next to no gradient is left


def test_the_direction_matters():
    """A student narrower than its teacher: forward KL is dear, reverse KL cheap. A swapped call shows at once."""
    teacher = torch.tensor([[0.5, 0.5 - 1e-6, 1e-6]]).log()
    narrow = torch.tensor([[1 - 2e-6, 1e-6, 1e-6]]).log()
    assert divergence(narrow, teacher, 0.0) > 6 > 1 > divergence(narrow, teacher, 1.0)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_merging_outcomes_lowers_the_divergence(beta):
    student, teacher = (torch.log_softmax(logits_of(30, 12, seed=s), -1) for s in (0, 1))
    whole = divergence(student, teacher, beta)
    assert (whole >= 0).all() and divergence(teacher, teacher, beta).abs().max() < 1e-6
    last = torch.zeros(30)
    for k in (1, 4, 11):  # each keeps what the one before kept
        ids = teacher.topk(k).indices
        kept = divergence(merge_rest(student, ids), merge_rest(teacher, ids), beta)
        assert (kept >= last - 1e-6).all() and (kept <= whole + 1e-6).all()
        last = kept
    assert torch.allclose(last, whole, atol=1e-5)  # one token in the rest: nothing was merged


def test_kept_targets_are_the_teachers_own(make_model, tok, rows):
    teacher, student = make_model(noise=0.2), make_model(noise=0.2, seed=1)
    targets = teacher_targets(teacher, rows, 2.0)
    batches = distil.distil_batches(rows, targets, 4, seed=0)
    loss, metrics = distil_loss(student, batches(0), alpha=0.3)
    r = batches(0).rows
    counted = r.mask[:, 1:]
    soft = ours(student(r.ids[:, :-1])[counted], teacher(r.ids[:, :-1])[counted].detach(), 2.0)
    assert metrics["soft"] == pytest.approx(soft.item(), abs=1e-5)
    hard, _ = answer_loss(student, r)
    assert loss.item() == pytest.approx(0.7 * hard.item() + 0.3 * soft.item(), abs=1e-5)
    none, _ = distil_loss(student, DistilBatch(r, None))
    assert none.item() == pytest.approx(hard.item(), abs=1e-5)


def test_top_k_states_what_it_merged(make_model, rows):
    teacher = make_model(noise=0.2)
    kept = teacher_targets(teacher, rows, 2.0, top_k=8)
    whole = teacher_targets(teacher, rows, 2.0)
    assert kept.rest == pytest.approx(1 - float(kept.logp[:, :-1].exp().sum(-1).mean()), abs=1e-5)
    assert whole.rest == 0 and kept.nbytes < whole.nbytes / 20
    assert torch.allclose(kept.logp.exp().sum(-1), torch.ones(len(kept.logp)), atol=1e-5)


def test_rows_are_paired_across_signals_and_a_student_learns(make_model, tok, rows):
    teacher, student = make_model(noise=0.3), make_model(noise=0.3, seed=1)
    targets = teacher_targets(teacher, rows)
    hard, soft = (distil.distil_batches(rows, t, 2, seed=5) for t in (None, targets))
    assert all(torch.equal(hard(s).rows.ids, soft(s).rows.ids) for s in range(7))
    assert len({tuple(hard(s).rows.ids.flatten().tolist()) for s in range(3)}) == 3  # an epoch of 6 rows
    result = fit(student, soft, distil_loss, FitConfig(steps=60, optimizer="adamw", lr=1e-2, warmup_steps=1))
    assert result.losses[-1] < 0.4 * result.losses[0]


def test_answers_filter_and_count(make_model, tok):
    model = make_model(noise=0.4)
    prompts = [tok.encode(c.prompt) for c in draw_cases(5, 0, "answers")]
    ask = {"eos_id": 7, "pad_id": 0, "max_new_tokens": 200}  # some frequent id as the end
    everything = distil.teacher_answers(model, prompts, temperature=1.0, candidates=4, **ask,
                                        generator=make_generator(0, "a"))
    even = distil.teacher_answers(model, prompts, temperature=1.0, candidates=4, **ask,
                                  generator=make_generator(0, "a"), accept=lambda i, ids: len(ids) % 2 == 0)
    assert all(ids[-1] == 7 for _, ids in everything.kept) and all(len(ids) % 2 == 0 for _, ids in even.kept)
    assert even.tokens == everything.tokens and even.coverage <= everything.coverage
    assert everything.tokens_per_target == everything.tokens / len(everything.kept)
    with pytest.raises(ValueError, match="none of 20 teacher answers was accepted"):
        distil.teacher_answers(model, prompts, temperature=1.0, candidates=4, accept=lambda i, ids: False, **ask)
    with pytest.raises(ValueError, match="the same answer"):
        distil.teacher_answers(model, prompts, candidates=4, **ask)


def test_a_sum_of_log_probabilities_favours_short_answers(make_model, tok):
    """A teacher that finds every token equally likely ranks by length alone; per token it has no opinion."""
    flat, texts = make_model(noise=0.0), ["no", "no no no", "no no"]
    flat.wte.weight.data.zero_()
    scores = distil.teacher_scores(flat, tok, ["<bos>"], [texts])[0]
    lengths = [len(tok.encode(t)) + 1 for t in texts]
    assert scores == pytest.approx([-n * math.log(flat.cfg.vocab_size) for n in lengths], abs=1e-3)
    assert distil.rank_pairs(["<bos>"], [texts], [scores])[0]["chosen"] == "no"


def test_ranking_makes_pairs_in_the_teachers_order(make_model, tok):
    model = make_model(noise=0.3)
    cases = draw_cases(3, 0, "rank")
    texts = [[c.answer, '{"policy_id":null}', "no"] for c in cases]
    scores = distil.teacher_scores(model, tok, [c.prompt for c in cases], texts, part=2)
    one = pad_rows([tok.encode(cases[1].prompt)], [tok.encode("no") + [tok.special["<eos>"]]], 0)
    by_itself = -answer_loss(model, one)[0] * int(one.mask.sum())
    assert scores[1][2] == pytest.approx(by_itself.item(), abs=1e-4)
    pairs = distil.rank_pairs([c.prompt for c in cases], texts, scores)
    assert all(p["chosen"] == t[s.index(max(s))] for p, t, s in zip(pairs, texts, scores))
    assert distil.rank_pairs(["a"], [["x", "y"]], [[1.0, 1.0]]) == []  # no difference, no pair
    with pytest.raises(ValueError, match="prompt 0.*one finite score"):
        distil.rank_pairs(["a"], [["x", "y"]], [[1.0, math.nan]])


@pytest.mark.parametrize("bad, message", [
    (lambda t, r: divergence(torch.zeros(2, 3), torch.zeros(2, 4)), "one vocabulary"),
    (lambda t, r: divergence(torch.zeros(2, 3), torch.zeros(2, 3), 1.5), "beta=1.5"),
    (lambda t, r: teacher_targets(t, r, 0.0), "temperature=0.0"),
    (lambda t, r: teacher_targets(t, r, 1.0, top_k=640), "top_k=640"),
    (lambda t, r: distil_loss(t, DistilBatch(r, None), alpha=2), "alpha=2"),
    (lambda t, r: teacher_targets(t, shared_rows([[1, 2]], [[3], [4]], [0, 0], 0)), "share a prefix"),
    (lambda t, r: distil.distil_batches(shared_rows([[1, 2]], [[3], [4]], [0, 0], 0), None, 1, 0), "share a prefix"),
    (lambda t, r: distil.distil_batches(Rows(r.ids[:3], r.mask[:3]), teacher_targets(t, r), 2, 0), "of 6 rows")])
def test_bad_input_is_named(make_model, rows, bad, message):
    with pytest.raises(ValueError, match=message):
        bad(make_model(), rows)
