"""Actuals beside intents: counted from outside, compared with the config, planted mismatches flagged."""

from __future__ import annotations

import json

import pytest
import torch

from lifecycle_lib.lab.actuals import Actuals, intended, mismatches, watch
from lifecycle_lib.lab.rebuild import pick
from lifecycle_lib.lab.stages import STAGES
from lifecycle_lib.train.logprobs import Rows
from tests.lab.chain import chain


def test_watch_counts_by_hand():
    w = torch.nn.Parameter(torch.zeros(2))
    with watch() as seen:
        batches = seen.counted(lambda step: Rows(torch.zeros(3, 4).long(), torch.ones(3, 4).bool()))
        optimizer = torch.optim.SGD([w], lr=0.1)
        for step in range(2):
            batches(step)
            optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
            w.sum().backward()
            optimizer.step()
    optimizer.step()  # outside: not counted
    assert seen.as_card() == {"first_step": 0, "batches": 2, "optimizer_steps": 2, "rows_per_step": [3, 3],
                              "target_tokens": 2 * 3 * 3, "lr_peak": {"SGD": 0.1}, "lr_last": {"SGD": 0.05}}


def test_a_run_that_did_nothing_says_so():
    assert Actuals().as_card()["batches"] == 0


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_did_what_its_config_says(name):
    card = pick(chain(), name).card
    assert mismatches(card) == []
    assert (intended(card) is None) == name.startswith("int")


@pytest.mark.parametrize(("key", "value", "said"), [
    ("optimizer_steps", 1, "optimizer_steps: intended 2, was 1"),
    ("rows_per_step", [8, 8], "rows_per_step: intended 16, was 8"),  # pairs counted as rows, or accumulation lost
    ("lr_peak", {"SGD": 0.01}, "lr_peak: intended SGD 0.001, was SGD 0.01"),
    ("lr_peak", {"AdamW": 0.001}, "lr_peak: intended SGD 0.001, was AdamW 0.001")])
def test_a_planted_mismatch_is_flagged(key, value, said):
    card = json.loads(json.dumps(pick(chain(), "dpo").card))
    card["actual"][key] = value
    assert mismatches(card) == [said]


def test_a_resumed_run_is_held_to_what_it_did_after():
    card = json.loads(json.dumps(pick(chain(), "dpo").card))
    card["actual"] |= {"first_step": 1, "optimizer_steps": 1}
    assert mismatches(card) == []


def test_no_actuals_is_an_error_not_a_pass():
    card = json.loads(json.dumps(pick(chain(), "sft").card))
    del card["actual"]
    with pytest.raises(ValueError, match="field 'actual' is missing"):
        mismatches(card)
