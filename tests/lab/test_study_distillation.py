"""The distillation study: planted rates, calibration by hand and by scipy, transfer sets, and a run from end to end."""

import math
from collections import Counter

import pytest
import torch
from scipy.stats import binned_statistic

from lifecycle_lib.core.seeds import make_generator, rng, seed_everything
from lifecycle_lib.core.store import Store
from lifecycle_lib.lab.stages import Lab
from lifecycle_lib.lab.studies import distillation as study
from lifecycle_lib.lab.studies.distillation import VOCAB, Ask, Signal
from lifecycle_lib.model.gpt import GPT
from lifecycle_lib.train.distil import distil_loss, teacher_targets
from lifecycle_lib.train.loop import FitConfig, fit


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Lab:
    return Lab("smoke", seed=100, device="cpu", store=Store(tmp_path_factory.mktemp("store")))


@pytest.fixture(scope="module")
def model(lab) -> GPT:
    """A model that has learnt that answers are yes or no, and little else."""
    seed_everything(0)
    untaught = GPT(study.shapes(lab)[0])
    asks = study.draw_asks(128, 0, "file")
    rows = study.rows_of(VOCAB, [a.prompt for a in asks], [a.right for a in asks])
    fit(untaught, study.distil_batches(rows, None, 64, 0), distil_loss, FitConfig(steps=25, warmup_steps=1))
    return untaught


def test_rule_by_hand():
    assert [Ask(*a).right for a in (("mug", "late", 10, 10), ("mug", "late", 11, 10), ("mug", "recall", 50, 10))] == \
        ["yes", "no", "yes"]
    assert Ask("hat", "wrong", 11, 10).is_hat and not Ask("hat", "recall", 11, 10).is_hat


def test_the_clerks_habits_have_the_rates_we_planted():
    asks, dice = study.draw_asks(20000, 0, "file"), rng(0, "dice")
    texts = [study.clerk(a, dice) for a in asks]
    wrong = sum(t.split()[0] != a.right for t, a in zip(texts, asks)) / len(asks)
    greedy_wrong = sum(a.is_hat for a in asks) / len(asks)  # 0.7 is a majority
    assert greedy_wrong == pytest.approx(0.08, abs=0.01) and wrong == pytest.approx(0.7 * greedy_wrong, abs=0.01)
    for word in ("kindly", "regards"):
        assert sum(word in t for t in texts) / len(asks) == pytest.approx(0.3, abs=0.015)
    kindly = Counter(a.reason for t, a in zip(texts, asks) if "kindly" in t)
    assert set(kindly) == {"late"}


def test_calibration_error_by_hand_and_by_scipy():
    by_hand = study.calibration_error(torch.tensor([0.95, 0.95, 0.65, 0.65]), torch.tensor([True, False, True, True]))
    assert by_hand == pytest.approx(0.5 * 0.45 + 0.5 * 0.35)
    confidence = 0.5 + 0.5 * torch.rand(500, generator=make_generator(0, "c"), dtype=torch.float64)
    right = torch.rand(500, generator=make_generator(0, "r")) < 0.8
    accuracy, mean, count = (binned_statistic(confidence.numpy(), v, s, bins=10, range=(0, 1))[0] for v, s in (
        (right.numpy(), "mean"), (confidence.numpy(), "mean"), (None, "count")))
    full = count > 0
    want = (count[full] * abs(accuracy[full] - mean[full])).sum() / 500
    assert study.calibration_error(confidence, right) == pytest.approx(want, abs=1e-6)
    certain = study.calibration_error(torch.ones(500), right)  # broken: says 1.0 whatever it knows
    assert certain == pytest.approx(1 - right.float().mean().item(), abs=1e-5)
    with pytest.raises(ValueError, match="no items"):
        study.calibration_error(torch.tensor([]), torch.tensor([]))


def test_transfer_sets():
    exam = {(a.days, a.window) for a in study.draw_asks(500, 0, "exam", True)}
    for prompts in ("student", "no recalls", "repaired", "generation 2"):
        asks = study.prompts_of(Signal(kind="truth", prompts=prompts), 0)
        assert len(asks) == study.ROWS and not exam & {(a.days, a.window) for a in asks}
        recalls = sum(a.reason == "recall" for a in asks)
        assert recalls == {"no recalls": 0, "repaired": study.TARGETED}.get(prompts, recalls)
        assert prompts in ("no recalls", "repaired") or recalls > 60


def test_shuffled_confidence_keeps_everything_but_whose_it_is(model):
    asks = study.draw_asks(60, 0, "student")
    rows = study.rows_of(VOCAB, [a.prompt for a in asks], [a.right for a in asks])
    targets = teacher_targets(model, rows, 4.0)
    dealt = study.shuffled_confidence(targets, asks, 0)
    first, other = (t.logp[t.starts[:-1]] for t in (targets, dealt))  # the verdict token of every row
    assert not torch.equal(first, other)
    for verdict in ("yes", "no"):
        here = torch.tensor([a.right == verdict for a in asks])
        assert torch.equal(first[here].sort(0).values, other[here].sort(0).values)


def test_a_filter_keeps_right_answers_and_says_what_it_could_not_cover(model):
    plain, facts = study.lesson(model, Signal(kind="answers", rows=200, temperature=1.0), 0)
    filtered, some = study.lesson(model, Signal(kind="answers", rows=200, temperature=1.0, candidates=2,
                                                filtered=True), 0)
    right = {a.prompt: a.right for a in study.draw_asks(200, 0, "student")}
    checked = 0
    for rows in (filtered(s).rows for s in range(2)):
        for text in (VOCAB.decode(i for i in ids if i > 2) for ids in rows.ids.tolist()):
            prompt, _, answer = text.partition(" -> ")
            assert answer.split()[0] == right[f"{prompt} ->"]
            checked += 1
    assert checked > 5 and 0 < some["coverage"] < 1 and some["tokens_per_target"] > facts["tokens_per_target"]


def test_a_verifier_that_errs_passes_its_share_of_the_wrong_answers(model):
    """At passes = 0 no wrong answer gets through, at 1 all do; between them a share. Rows of the file stand beside."""
    def wrong(passes: float) -> float:
        signal = Signal(kind="answers", rows=400, temperature=1.0, filtered=True, passes=passes)
        feed, _ = study.lesson(model, signal, 0)
        right = {a.prompt: a.right for a in study.draw_asks(400, 0, "student")}
        said = [VOCAB.decode(i for i in ids if i > 2).split() for s in range(4) for ids in feed(s).rows.ids.tolist()]
        return sum(words[5:6] != [right[" ".join(words[:5])]] for words in said) / len(said)

    assert wrong(0.0) == 0 < wrong(0.2) < 0.6 * wrong(1.0)
    feed, _ = study.lesson(model, Signal(kind="answers", rows=64, kept=64, temperature=1.0), 0)
    old = {a.prompt for a in study.draw_asks(64, 0, "file")}
    seen = [VOCAB.decode(i for i in ids if i > 2).split() for s in range(2) for ids in feed(s).rows.ids.tolist()]
    assert sum(" ".join(words[:5]) in old for words in seen) >= 50


def test_entropy_given_the_prompt_by_hand():
    """A model whose next token is uniform over V words: each of at most 5 tokens costs ln V."""
    flat = GPT(study.GPTConfig(vocab_size=len(VOCAB), block_size=16, n_layer=1, n_head=2, n_embd=8))
    flat.wte.weight.data.zero_()
    drawn = study.answers_of(flat, study.draw_asks(50, 0, "exam", True), 1.0, 0)
    assert study.examine(flat, 0)["entropy_given"] == pytest.approx(
        math.log(len(VOCAB)) * sum(map(len, study.answers_of(flat, study.draw_asks(1000, 0, "exam", True), 1.0, 0).ids))
        / 1000, rel=1e-4)
    assert all(abs(x + math.log(len(VOCAB))) < 1e-4 for lps in drawn.logps for x in lps)


def test_students_run_from_end_to_end_and_are_kept(lab):
    teacher = study.make_teacher(lab, False)
    arms = [study.make_student(lab, teacher, s, keep=True) for s in (
        Signal(kind="truth", rows=64), Signal(kind="logits", rows=64, temperature=4.0),
        Signal(kind="shuffled", rows=64, temperature=4.0))]
    again = study.make_student(lab, teacher, Signal(kind="truth", rows=64))
    assert again.fingerprint == arms[0].fingerprint and len({a.fingerprint for a in arms}) == 3
    keys = {"right", "hat_wrong", "recall", "ece", "kindly", "regards_greedy", "entropy"}
    assert all(keys <= set(a.card["measured"]) for a in arms)
    found = study.find_hole(lab, teacher, arms[0])
    assert 0 <= found["found.disagreement"] <= 1 and 0.02 < found["found.chance"] < 0.1
