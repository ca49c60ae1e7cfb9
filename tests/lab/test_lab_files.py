"""The committed lab files: the generator makes them again byte for byte, and jsonschema agrees with their audits."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import jsonschema
import pytest

from lifecycle_lib.desk.cases import draw_cases
from lifecycle_lib.desk.world import held_out
from lifecycle_lib.judge.evals import check_frozen_file
from lifecycle_lib.judge.verifiers import ANSWER_SCHEMA, parse_answer
from lifecycle_lib.lab.lab_files import export_lab_files, preference_pairs, sft_example, sft_examples
from lifecycle_lib.train.dpo import read_pairs

DATA = Path(__file__).resolve().parents[2] / "data"


def test_same_bytes_again(tmp_path):
    for made in export_lab_files(tmp_path):
        kept = DATA / made.relative_to(tmp_path)
        assert made.read_bytes() == kept.read_bytes(), f"data/{made.relative_to(tmp_path)}: make it again"


def test_an_edited_file_is_caught(tmp_path):
    made = export_lab_files(tmp_path)[2]
    made.write_text(made.read_text().replace('"plain"', '"easy"', 1))
    assert made.read_bytes() != (DATA / "evals" / "policy_cases.jsonl").read_bytes()
    with pytest.raises(ValueError, match="policy_cases.jsonl:1"):
        check_frozen_file(made)


def test_counts_and_the_first_row_by_hand():
    rows = sft_examples()
    assert Counter(r["audit"] for r in rows) == {
        "keep": 60, "reject: unknown field label_created": 2, "reject: missing policy_id": 2,
        "reject: wrong type in eligible": 2}
    assert rows[0]["input"] == {"order_id": "A97983", "reason": "damaged", "days": 46, "damage_confirmed": True}
    assert rows[0]["target"] == {"eligible": True, "evidence": "damaged P-5 48d, 46d confirmed", "policy_id": "P-5"}
    assert Counter(r["reason"] for r in preference_pairs()) == {"invented_side_effect": 30, "wrong_policy": 10}
    assert check_frozen_file(DATA / "evals" / "policy_cases.jsonl") == 512


def test_jsonschema_agrees_with_the_audit():
    judge = jsonschema.Draft202012Validator(ANSWER_SCHEMA)
    for row in sft_examples():
        assert judge.is_valid(row["target"]) == judge.is_valid(json.loads(row["answer"])) == (row["audit"] == "keep")


def test_examples_show_the_right_answer_on_seen_pairs_only():
    for row, case in zip(sft_examples()[:60], draw_cases(60, 0, "sft")):
        assert row["answer"] == case.answer
        assert not any(held_out(case.days, p.window_days) for p in case.policies)
    unseen = sft_example(draw_cases(1, 0, "eval")[0])
    assert unseen["answer"] != sft_examples()[0]["answer"]


def test_pairs_read_back_and_each_rejected_answer_is_worse():
    for pair in read_pairs(DATA / "preference_pairs.jsonl"):
        chosen, rejected = parse_answer(pair["chosen"]), parse_answer(pair["rejected"])
        assert chosen.valid and not chosen.claims
        assert bool(rejected.claims) == (pair["reason"] == "invented_side_effect")
        if pair["reason"] == "wrong_policy":
            assert rejected.valid and rejected.fields["policy_id"] != chosen.fields["policy_id"]
