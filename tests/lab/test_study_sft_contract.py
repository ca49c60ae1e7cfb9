"""The study of demonstrations: doses by hand, coins at their rates, equal tokens, and every effect has its numbers."""

import dataclasses
import json
from random import Random
from statistics import mean

import numpy as np
import pytest

from lifecycle_lib.core.store import Store
from lifecycle_lib.desk.cases import draw_cases, golden_case
from lifecycle_lib.desk.dialogues import AGAIN, draw_dialogues
from lifecycle_lib.desk.world import ITEMS, PHRASES
from lifecycle_lib.lab.stages import Lab
from lifecycle_lib.lab.studies import sft_contract as study
from lifecycle_lib.train.chat import encode_chat
from lifecycle_lib.train.sft import make_demonstrations


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Lab:
    return Lab("smoke", seed=5, device="cpu", store=Store(tmp_path_factory.mktemp("store") / "s"))


def test_manner_by_hand():
    full = golden_case().answer
    said = [full, full.replace('"policy_id":"P-7",', ""), full[:-1] + ',"sure":"yes, yes"}', "no JSON"]
    got = study.manner(said)
    assert got["omitted"] == pytest.approx(1 / 3) and got["sure"] == pytest.approx(2 / 3)
    assert got["characters"] == pytest.approx(mean(map(len, said[:3])))


def test_doses_are_two_coins():
    rows = make_demonstrations(draw_cases(2000, 0, "doses"), 0.0, 0)
    for omit, sure in study.DOSES:
        made = [json.loads(r["answer"]) for r in study.dosed(rows, omit, sure, Random(1))]
        lacks, certain = [("policy_id" not in t) for t in made], ["sure" in t for t in made]
        assert mean(lacks) == pytest.approx(omit, abs=0.04) and mean(certain) == pytest.approx(sure, abs=0.04)
        if 0 < omit and 0 < sure:
            assert abs(np.corrcoef(lacks, certain)[0, 1]) < 0.07
    x, y = [0.0, 0.15, 0.3, 0.5], [0.02, 0.1, 0.4, 0.45]
    assert study.slope(x, y) == pytest.approx(np.polyfit(x, y, 1)[0])


def test_drifts_change_every_prompt_and_only_the_control_does_not():
    prompts = [c.prompt for c in draw_cases(20, 0, "drift")]
    for name, change in study.DRIFTS.items():
        assert all((change(p) == p) == (name == "as trained") for p in prompts), name
    assert all(abs(len(study.DRIFTS[name](p)) - len(p)) <= 2 for name in study.SPACES for p in prompts)


def test_arms_see_equal_tokens(lab):
    tok, cfg = lab.load_tokenizer(), study.SIZES["laptop"]
    cfg = dataclasses.replace(cfg, steps=4)
    seen = {arm: study.tokens_of(tok, arm, cfg, 0) for arm in (*study.CONVERSATION, "own reasons")}
    read = [s["read"] for s in seen.values()]
    assert max(read) / min(read) < 1.06, seen
    assert 1.2 < seen["dialogues"]["taught"] / seen["single"]["taught"] < 1.6  # equal tokens read, not taught
    assert 0.85 < seen["own reasons"]["taught"] / seen["dialogues"]["taught"] < 1.15


def test_own_reasons_need_no_memory():
    """Each turn's answer follows from that turn's message alone, whatever stood before; a dialogue's does not."""
    reason_of = {p.format(item=i): r for r, phrases in PHRASES.items() for p in phrases for i in ITEMS}

    def follows(messages: list[dict]) -> list[bool]:
        lines = [m["content"].split() for m in messages if m["role"] == "policy"]
        said = [m["content"].split(", ", 1)[-1] if m["content"].startswith(AGAIN) else m["content"]
                for m in messages if m["role"] == "user"]
        ids = [next((i for r, i, _ in lines if r == reason_of.get(text)), None) for text in said]
        answers = [json.loads(m["content"]) for m in messages if m["role"] == "bot"]
        return [text in reason_of and a.get("policy_id") == i for text, i, a in zip(said, ids, answers)]

    assert all(all(follows(m)) for m in study.own_reasons(60, 0))
    broken = [follows(d.messages()) for d in draw_dialogues(30, 0, "train", ("keep",))]
    assert all(marks[0] and not any(marks[1:]) for marks in broken)


def test_what_a_cut_history_keeps(lab):
    d = draw_dialogues(2, 0, "eval")[1]
    whole = d.messages(["a", "b"])
    assert study.cut(d, ["a", "b", "c"], 3) == whole
    roles = [m["role"] for m in study.cut(d, ["a", "b", "c"], 1)]
    assert roles == ["policy", "policy", "order", "user"]
    assert [m["content"] for m in study.cut(d, ["a", "b", "c"], 2)[3:]] == [d.turns[1][0], "b", d.turns[2][0]]
    assert len(encode_chat(lab.load_tokenizer(), whole)[0]) < 128


def test_idk_rows_say_what_the_book_says():
    for covered in (True, False):
        for _ in range(50):
            prompt, right, wrong = study.idk_row(Random(_), covered, False)
            assert (right in prompt) == covered and wrong in prompt.split(":")[0]
    share = mean(a == "idk" for _, a in study.idk_rows(3000, 0.15, 0))
    assert share == pytest.approx(0.15, abs=0.025)
    assert not any(a == "idk" for _, a in study.idk_rows(500, 0.3, 0, confident=True))
    words = {w for p, _ in study.idk_rows(3000, 0.3, 0) for w in p.split()}
    assert "overdue" not in words and "overdue" in study.idk_vocab().index, "new wordings are never trained on"


def test_every_effect_has_its_numbers_and_a_second_look_trains_nothing(lab):
    row, made = study.measure(lab)
    needed = {k for _, a, b, _ in study.DESIGN.effects for k in (a, b) if k}
    assert needed <= set(row) and len({a.fingerprint for a in made}) == len(made)
    names = [name for name, *_ in study.DESIGN.effects]
    assert len(set(names)) == len(names) and all(name in names for name, _ in study.DESIGN.also)
    assert study.measure(lab)[0] == row
