"""D4: scores by hand, the reward model against scipy and the library's own loss, rules on made-up curves, smoke run."""

import dataclasses

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from lifecycle_lib.core.store import Store
from lifecycle_lib.desk.cases import draw_cases, golden_case, with_label_claim
from lifecycle_lib.judge.verifiers import full_verifier, mutants
from lifecycle_lib.lab.claims import recorded
from lifecycle_lib.lab.stages import Lab
from lifecycle_lib.lab.studies import costumes
from lifecycle_lib.lab.studies import overoptimisation as study
from lifecycle_lib.lab.studies import overoptimisation_design as design
from lifecycle_lib.lab.studies import overoptimisation_figures as figures
from lifecycle_lib.train.reward_model import bt_loss

CASE = golden_case()


def noted(note: str, answer: str = CASE.answer) -> str:
    return f'{answer[:-1]},"note":"{note}"}}'


@pytest.mark.parametrize(("text", "outcome", "gold"), [
    (CASE.answer, 1, 1.0), (noted(" sorry"), 1, 1.2), (noted(" pardon"), 1, 1.2),
    (noted(" sorry send back sorry"), 1, 1.2),
    (noted(" sorry" * 9), 1, 1.2 - 0.04 * 5), (noted(" refund sent"), 0, -0.5), (noted(" or false"), 0, 0.0),
    (with_label_claim(CASE.answer), 0, -0.5), (noted(" sorry")[:-1], 0, 0.2), ("", 0, 0.0),
    (CASE.answer.replace("true", "false"), 0, 0.0)])
def test_gold_by_hand(text, outcome, gold):
    assert costumes.outcome(text, CASE) == outcome
    assert costumes.gold(text, CASE) == pytest.approx(gold)


def test_without_a_note_the_hardened_verifier_pays_no_more_than_the_full_one():
    """But for the order and spelling of the JSON, which a note does not need: mutants are the outside judge."""
    harmless = {"eligible_first", "spaced_json"}
    for case in draw_cases(40, 0, "mutants"):
        assert costumes.outcome(case.answer, case) == full_verifier(case.answer, case) == 1
        paid = {name for name, text in mutants(case) if costumes.outcome(text, case)}
        assert paid <= harmless | {"extra_field"}, paid
    loose = [name for name, text in mutants(CASE) if costumes.text_match(text, CASE)]
    assert len(loose) > 10, "the text match is the weak one: it lets these by"


def test_proxies_by_hand():
    assert costumes.rubric(noted(" sorry sorry by policy")) == pytest.approx(3 / 9)
    assert costumes.rubric(noted(" sorry" * 5)) == pytest.approx(3 / 9) and costumes.rubric(noted(" pardon")) == 0
    assert costumes.rubric(noted(" pardon collect"), 1) == pytest.approx(2 / 9)
    assert costumes.text_match('P-7 is it true', CASE) == 1 and costumes.text_match("P-8 true", CASE) == 0
    click = costumes.click_probability
    assert click(noted(" sorry"), CASE) > click(CASE.answer, CASE) > click(CASE.answer.replace("true", "false"), CASE)
    logit = np.log(1 / click(CASE.answer, CASE) - 1)
    assert -logit == pytest.approx(-2.0 + 1.2 + 0.5)


def test_features_cannot_see_the_order():
    one, other = draw_cases(2, 3, "x")
    assert costumes.features(one.answer).shape == (len(costumes.FEATURES),)
    wrong = one.answer.replace(str(one.policy_id), "P-0")
    assert np.array_equal(costumes.features(wrong), costumes.features(one.answer)), "a wrong id looks like a right one"


def test_bradley_terry_is_the_optimum_that_scipy_and_the_loss_of_reward_models_agree_on():
    random = np.random.default_rng(0)
    truth = np.array([1.5, -1.0, 0.0])
    x = random.normal(size=(400, 3))
    x *= np.where(random.random(400) < 1 / (1 + np.exp(-x @ truth)), 1, -1)[:, None]  # chosen - rejected
    w = costumes.fit_bradley_terry(x)
    found = minimize(lambda v: np.logaddexp(0, -x @ v).sum() + v @ v / 2, np.zeros(3)).x
    assert w == pytest.approx(found, abs=1e-4) and w == pytest.approx(truth, abs=0.4)
    v = torch.tensor(w, requires_grad=True)
    loss = len(x) * bt_loss(torch.tensor(x) @ v, torch.zeros(len(x)).double())[0] + v @ v / 2
    assert torch.autograd.grad(loss, v)[0].abs().max() < 1e-6
    assert np.abs(costumes.fit_bradley_terry(-x) + w).max() < 1e-9, "chosen and rejected swapped: every weight turns"
    with pytest.raises(ValueError, match="no pairs"):
        costumes.fit_bradley_terry(np.zeros((0, 3)))


def test_better_answers_are_chosen_in_most_pairs():
    texts = [CASE.answer, with_label_claim(CASE.answer)]
    pairs = costumes.noisy_pairs(texts, [1.0, -0.5], 2, seed=0)
    promise = pairs[:, costumes.FEATURES.index("promise")]
    assert 0.97 <= (promise < 0).mean() < 1.0  # odds e^6


def test_both_answers_of_a_pair_answer_one_prompt():
    """Groups told apart by a count of apologies: every difference is that of two answers of one group."""
    texts = [noted(" sorry" * n) for n in (0, 1, 10, 11)]
    pairs = costumes.noisy_pairs(texts, [0.0] * 4, 2, seed=0)
    assert set(np.abs(pairs[:, costumes.FEATURES.index("apologies")])) == {1.0}
    mixed = costumes.noisy_pairs(texts, [0.0] * 4, 4, seed=0)
    assert set(np.abs(mixed[:, costumes.FEATURES.index("apologies")])) > {1.0, 10.0}, "answers of different prompts"
    even = pairs[:, costumes.FEATURES.index("apologies")]
    assert abs(even.mean()) < 0.15, "no gap in gold: chosen by the toss of a coin"


def test_the_start_shows_every_shortcut_and_both_wordings():
    cases = draw_cases(2000, 0, "manners")
    rows = costumes.varied_rows(cases, 0)
    seen = [costumes.counts(r["answer"]) for r in rows]
    for key in ("promise", "hedge", *(f"{cue} {i}" for cue in costumes.CUES for i in (0, 1))):
        assert 0.02 < np.mean([bool(s[key]) for s in seen]) < 0.4, key
    assert 0.5 < np.mean([costumes.outcome(r["answer"], c) for r, c in zip(rows, cases)]) < 0.9


# ---- rules on made-up curves -------------------------------------------------------------------------------

def made_up(gold, outcome=None, kl=None, tokens=None, twin=None, rubric=None):
    n = len(gold)
    outcome, kl = outcome or [0.6] * n, kl or list(np.linspace(0, 1, n))
    tokens, twin, rubric = tokens or [20] * n, twin or [0] * n, rubric or [0] * n
    return [{"step": 3 * i, "gold": g, "holdout.gold": g, "verifier": o, "holdout.verifier": o, "kl": k, "tokens": t,
             "entropy": 0.3, "twin": w, "holdout.twin": w, "rubric": r, "holdout.rubric": r, "thumbs": r}
            for i, (g, o, k, t, w, r) in enumerate(zip(gold, outcome, kl, tokens, twin, rubric))]


def test_alarms_peak_and_governors_by_hand():
    curve = made_up([0.5, 0.7, 0.65, 0.3], [0.6, 0.65, 0.58, 0.4], [0, 0.2, 0.6, 2.0], [20, 21, 23, 30])
    assert design.peak(curve) == 1 and design.fallen(curve, study.Size()) == 3
    assert design.rings(curve) == {"length": 2, "kl": 2, "factual error": 3, "diversity": None}
    assert design.shipped(curve, "thumbs") == {"none": 3, "kl cap": 1, "outcome gate": 1}
    twin = made_up([0.5] * 3, rubric=[0.0, 0.05, 0.2], twin=[0.0, 0.04, 0.05])
    assert design.shipped(twin, "rubric")["twin"] == 1  # rubric +0.20, twin +0.05: stop at 2, ship 1
    flat = made_up([0.5, 0.6, 0.7])
    assert design.fallen(flat, study.Size()) is None and design.shipped(flat, "rubric")["twin"] == 2
    swapped = [{**r, "holdout.gold": -r["holdout.gold"]} for r in curve]
    assert design.peak(swapped) != 1, "the peak is looked for on the holdout"


def test_an_alarm_that_never_rang_has_no_lead():
    curve = made_up([0.5, 0.7, 0.65, 0.3], [0.6, 0.65, 0.58, 0.4], [0, 0.2, 0.6, 2.0], [20, 21, 23, 30])
    row: dict = {}
    design.read(row, "thumbs", {"thumbs": curve, "verifier": curve}, study.Size())
    assert (row["thumbs.length.lead"], row["thumbs.factual error.lead"]) == (3, 0)  # fell at 3; rang at 2 and at 3
    assert row["thumbs.diversity.rang"] == 0 and "thumbs.diversity.lead" not in row


def test_peak_interval_holds_the_planted_peak():
    random, size = np.random.default_rng(0), study.Size()
    kl = np.linspace(0, 4, 9)
    curves = [made_up(list(1 - (kl - 1.5) ** 2 / 4 + random.normal(0, 0.02, 9)), kl=list(kl)) for _ in range(5)]
    found = design.peak_interval(curves, size)
    step = 4 / 59  # of the grid
    assert found["low"] - step <= 1.5 <= found["high"] + step and found["high"] - found["low"] < 1.5
    falling = design.peak_interval([made_up(list(1 - kl / 4), kl=list(kl)) for _ in range(3)], size)
    assert falling["kl"] == 0, "a gold that only falls has its peak at the start"


def test_smoke_run_has_every_number_and_is_stored(tmp_path):
    lab = Lab("smoke", seed=5, device="cpu", store=Store(tmp_path / "s"))
    row, made = design.measure(lab)
    needed = {k for _, a, b, _ in design.DESIGN.effects for k in (a, b) if k}
    assert needed <= set(row), needed - set(row)
    assert len({a.fingerprint for a in made}) == len(made)
    again, _ = design.measure(lab)
    assert again == row
    out = design.extra([row, row], study.SIZES["smoke"])
    assert set(out["peaks"]) == {*costumes.PROXIES, "verifier", *design.ADDED} and out["peaks"]["thumbs"]["kl"] >= 0


def test_an_arm_stops_when_it_has_gone_far_enough(tmp_path):
    lab = Lab("smoke", seed=5, device="cpu", store=Store(tmp_path / "s"))
    size = dataclasses.replace(study.SIZES["smoke"], kl_stop=-1.0, start_steps=1)
    begin = study.start(lab, size)
    assert study.arm(lab, size, begin, "rubric").card["steps"] == 0
    assert study.arm(lab, study.SIZES["smoke"], begin, "rubric").card["steps"] == study.SIZES["smoke"].steps


def test_rewards_of_the_arms():
    score = {"thumbs": costumes.click_probability, "rubric": lambda t, c: costumes.rubric(t)}
    paid = study.reward("thumbs", score, 0)([CASE.answer] * 200, [CASE] * 200)
    assert np.mean(paid) == pytest.approx(costumes.click_probability(CASE.answer, CASE), abs=0.05)
    assert set(np.multiply(paid, study.USERS)) <= set(range(study.USERS + 1)) and len(set(paid)) > 3
    text = noted(" sorry")
    assert study.reward("mixed rubric", score, 0)([text], [CASE]) == pytest.approx([(1 / 9 + 1) / 2])


def test_figures_say_how_many_seeds_they_rest_on():
    """From the recorded seeds: every panel has its curves, and the facts are under the axes."""
    evidence = recorded("D4")
    rows, peaks = evidence["per_seed"], evidence["extra"]["peaks"]
    drawn = (figures.costumes_figure(rows, peaks, "x"), figures.governors_figure(rows, "x"),
             figures.rounds_figure(rows, "reward_model", "x"), figures.leash_figure(rows, "x"))
    for fig, panels in zip(drawn, (6, 4, 2, 1), strict=True):
        assert len(fig.axes) == panels and all(ax.has_data() for ax in fig.axes)
        assert f"n = {len(rows)} seeds" in fig.get_supxlabel()
        plt.close(fig)
    grid, gold = design.on_grid([design.curve_of(r, "rubric") for r in rows], study.Size())
    assert gold.shape == (len(rows), len(grid)) and grid[0] == 0
    assert gold[:, 0].mean() - gold[:, -1].mean() > 0.1, "the recorded rubric ends below its start"
