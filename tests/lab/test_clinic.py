"""The clinic: every planted bug shows, no healthy twin does, and a diagnosis is graded as promised."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F

from lifecycle_lib.core.seeds import one_thread
from lifecycle_lib.lab import clinic, clinic_desk, patients
from lifecycle_lib.lab.cli import main
from lifecycle_lib.train.logprobs import answer_loss

NUMBERS = range(1, len(clinic.PATIENTS) + 1)


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("LIFECYCLE_QUIET", "1")
    one_thread()


def test_there_are_at_least_twelve_patients_and_every_cause_is_listed_once():
    causes = [p.cause for p in clinic.PATIENTS]
    assert len(causes) >= 12 and len(set(causes)) == len(causes) and set(causes) < set(clinic.CAUSES)


@pytest.mark.parametrize("number", NUMBERS)
def test_the_planted_bug_shows_and_its_healthy_twin_is_clean(number):
    one = clinic.patient(number)
    assert one.sign(clinic.chart(number))
    assert not one.sign(clinic.chart(number, planted=False))


@pytest.mark.parametrize("number", NUMBERS)
def test_no_chart_holds_a_broken_number(number):
    def numbers(value: object):
        if isinstance(value, (list, tuple)):
            for v in value:
                yield from numbers(v)
        elif isinstance(value, float):
            yield value
    seen = clinic.chart(number)
    assert all(math.isfinite(x) for part in (seen.vitals, seen.tests) for v in part.values() for x in numbers(v))


def test_no_chart_shows_the_sign_of_another_cause():
    """A wrong name is answered with what it would show: so no other sign may be there, where it can be read at all."""
    for number in NUMBERS:
        for other in clinic.PATIENTS:
            try:
                shows = other.sign(clinic.chart(number))
            except KeyError:  # nothing of the kind is measured in this run
                continue
            assert shows == (other is clinic.patient(number)), (number, other.cause)
    assert set(clinic.WOULD_SHOW) == set(clinic.CAUSES)


def test_a_vital_alone_does_not_tell_two_patients_at_ln_2_apart_but_a_test_does():
    a, b = (next(n for n in NUMBERS if clinic.patient(n).cause == c) for c in ("own_reference", "optimiser_elsewhere"))
    assert clinic.chart(a).vitals["loss"] == clinic.chart(b).vitals["loss"] == [round(math.log(2), 3)] * 5
    assert clinic.chart(a).tests["gradient norm"][0] > 0 == clinic.chart(b).tests["gradient norm"][0]


def test_the_small_desk_by_hand():
    """d12 is inside P-7's 30 days; the training file and the evaluation share no (reason, days)."""
    known = {a.prompt: a.answer for split in ("train", "eval") for a in clinic_desk.asks(2000, split)}
    assert known["<user> damaged d12 <bot>"] == "P-7 yes"
    assert known["<user> damaged d31 <bot>"] == "P-7 no"
    assert not {a.prompt for a in clinic_desk.asks(2000, "train")} & {a.prompt for a in clinic_desk.asks(2000, "eval")}


def test_the_micro_batch_patient_against_torch():
    """The right loss is torch's mean over all counted tokens; the mean of two means is not."""
    rows, model = clinic_desk.demonstrations(64, claims=0.5), clinic_desk.tuned()
    logits = model(rows.ids[:, :-1])[rows.mask[:, 1:]]
    whole = F.cross_entropy(logits, rows.ids[:, 1:][rows.mask[:, 1:]]).detach()
    torch.testing.assert_close(answer_loss(model, rows)[0].detach(), whole, atol=1e-6, rtol=1e-6)
    planted, healthy = (patients.mean_of_means(p).vitals["loss in two micro-batches"] for p in (True, False))
    assert abs(healthy - float(whole)) < 1e-4 < abs(planted - float(whole))


def test_points_by_hand():
    """5 - 2 tests - 2 for one wrong name = 1; ordering after the diagnosis costs nothing; a repeated test is free."""
    book: clinic.Book = {}
    clinic.order_test(6, "prompt in training", book)
    clinic.order_test(6, "prompt in training", book)
    clinic.order_test(6, clinic.TWIN, book)
    assert clinic.diagnose(6, "leaked_split", book) == (False, 1)
    assert clinic.diagnose(6, "template_drift", book) == (True, 1)
    clinic.order_test(6, "prompt in the service", book)
    assert clinic.diagnose(6, "template_drift", book) == (True, 1)
    assert clinic.diagnose(6, "leaked_split", book) == (False, 1) and book["6"]["points"] == 1


def test_points_never_fall_below_zero():
    book: clinic.Book = {}
    for cause in ("leaked_split", "bad_verifier", "kl_too_strong", "too_few_steps"):
        clinic.diagnose(6, cause, book)
    assert clinic.diagnose(6, "template_drift", book) == (True, 0)


def test_bad_input_is_refused(tmp_path):
    for call, text in ((lambda: clinic.patient(18), "1 to 17"), (lambda: clinic.order_test(6, "blood", {}), "has:"),
                       (lambda: clinic.diagnose(6, "gremlins", {}), "unknown")):
        with pytest.raises(ValueError, match=text):
            call()
    (tmp_path / "book.json").write_text('{"3": 4}')
    with pytest.raises(ValueError, match="not a case book"):
        clinic.read_book(tmp_path / "book.json")


def test_the_command(tmp_path, capsys):
    book = str(tmp_path / "book.json")
    assert main(["clinic", "--book", book]) == 0 and "waiting" in capsys.readouterr().out
    assert main(["clinic", "6", "--book", book]) == 0 and "causes:" in capsys.readouterr().out
    assert main(["clinic", "6", "--test", "prompt in the s", "--book", book]) == 0
    assert "<user>" in capsys.readouterr().out
    assert main(["clinic", "6", "--cause", "leaked_split", "--book", book]) == 1
    assert "evaluation prompts would stand in the training file" in capsys.readouterr().out
    assert main(["clinic", "6", "--test", "prompt in", "--book", book]) == 2
    assert "could be 'prompt in training' or 'prompt in the service'" in capsys.readouterr().err
    assert main(["clinic", "6", "--cause", "template_drift", "--book", book]) == 0
    assert "2 of 5 points" in capsys.readouterr().out
    assert json.loads((tmp_path / "book.json").read_text())["6"]["points"] == 2
    assert main(["clinic", "99", "--book", book]) == 2
    assert main(["clinic", "--cause", "leaked_split", "--book", book]) == 2
