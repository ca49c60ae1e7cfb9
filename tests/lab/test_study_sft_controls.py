"""The controls: which rows an arm sees, what a look measures, and a run from end to end."""

import pytest

from lifecycle_lib.core.store import Store
from lifecycle_lib.judge.evals import frozen_cases
from lifecycle_lib.lab.design import summarise
from lifecycle_lib.lab.stages import Lab
from lifecycle_lib.lab.studies import sft_controls as study
from lifecycle_lib.train import sft
from lifecycle_lib.train.logprobs import token_logps


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Lab:
    return Lab("smoke", seed=5, device="cpu", store=Store(tmp_path_factory.mktemp("store") / "s"))


def test_repeated_rows_are_the_first_of_the_others_and_every_batch_is_made_of_them():
    rows, few = (study.demonstrations(arm, 20, 0) for arm in ("all different", "64 rows again"))
    assert len({r["prompt"] for r in rows}) > 300 and few == rows[:64]
    batches = sft.sft_batches([([1, i], [2]) for i in range(len(few))], study.BATCH, 0, 0, 8)
    seen = [i for step in range(8) for i in batches(step).ids[:, 1].tolist()]
    assert sorted(seen) == sorted(2 * list(range(64)))  # two epochs, every row twice


def test_a_look_by_hand(lab):
    """The loss is minus the mean log-probability over all answer tokens; an untrained base is never right."""
    model, tok = lab.load(lab.base()), lab.load_tokenizer()
    row = study.look(model, tok, 4, 0, greedy=True)
    total, n = 0.0, 0
    for c in frozen_cases(4):
        p, a = sft.encode_rows(tok, [{"prompt": c.prompt, "answer": c.answer}])[0]
        one = study.pad_rows([p], [a], 0)
        total, n = total - float(token_logps(model, one).sum().detach()), n + len(a)
    assert row["loss"] == pytest.approx(total / n, abs=1e-4)
    assert row["exact"] == row["greedy exact"] == 0 and set(row) == {"loss", "valid", "exact", "greedy valid",
                                                                    "greedy exact"}


def test_every_effect_has_its_numbers_and_a_counted_prompt_trains_otherwise(lab):
    for design in (study.START, study.TURNS):
        row, made = design.measure(lab)
        told, _ = summarise(design, [row, row])
        assert len({e["name"] for e in told}) == len(design.effects) and len({a.fingerprint for a in made}) == len(made)
    losses = {arm: study.start_arm(lab, arm).card["first_loss"] for arm in study.ARMS}
    assert losses["all different"] != losses["prompt counted"]  # the same rows, another mask
