"""Quiz banks: the pass mark by hand, damaged banks, the progress file, and every bank in data/quiz."""

from __future__ import annotations

import copy
import itertools
import json
import math

import pytest

from lifecycle_lib.lab import quiz as q

BANK = {"notebook": "99", "pass": 0.75, "questions": [
    {"id": f"q{i}", "row": "S1-95", "question": "which?", "choices": {"a": "this", "b": "that"}, "answer": "b",
     "why": "because", "common_wrong": "no"} for i in range(1, 5)]}


@pytest.fixture(autouse=True)
def banks(tmp_path, monkeypatch):
    monkeypatch.setattr(q, "BANKS", tmp_path)
    monkeypatch.setenv("LIFECYCLE_PROGRESS", str(tmp_path / "work" / "progress.json"))
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    (tmp_path / "99.json").write_text(json.dumps(BANK))
    return tmp_path


def test_three_of_four_pass_and_two_do_not(capsys):
    assert q.grade("99", {"q1": "b", "q2": "b", "q3": "b", "q4": "a"}) == 0.75
    assert "3 of 4 right, 4 answered: passed (pass: 75%)" in capsys.readouterr().out
    assert q.grade("99", {"q1": "b", "q2": "b"}) == 0.5
    assert "2 of 4 right, 2 answered: not yet" in capsys.readouterr().out
    assert q.progress() == {}  # no person was there


def test_score_is_the_share_of_right_letters():
    for letters in itertools.product("ab", repeat=4):
        answers = {f"q{i}": letter for i, letter in enumerate(letters, 1)}
        assert q.score(BANK, answers) == letters.count("b") / 4


def test_progress_keeps_the_best(banks):
    q.grade("99", {"q1": "b", "q2": "b", "q3": "b"}, record=True)
    q.grade("99", {"q1": "b"}, record=True)
    assert q.progress() == {"99": 0.75}
    assert (banks / "work" / "progress.json").is_file()


def test_text_shows_every_choice_and_no_answer(capsys):
    q.quiz("99")
    said = capsys.readouterr().out
    assert said.count("a) this") == 4 and "because" not in said and "75%" in said
    q.explain("99")
    assert "b) that" in capsys.readouterr().out


@pytest.mark.parametrize("answers", [{"q9": "a"}, {"q1": "z"}])
def test_foreign_answers_raise(answers):
    with pytest.raises(ValueError, match="is no"):
        q.grade("99", answers)


def broken(change) -> dict:
    bank = copy.deepcopy(BANK)
    change(bank)
    return bank


@pytest.mark.parametrize("change", [
    lambda b: b["questions"][0].update(answer="c"), lambda b: b["questions"][0].pop("why"),
    lambda b: b["questions"][1].update(id="q1"), lambda b: b.update(questions=[]), lambda b: b.update({"pass": 75})])
def test_damaged_banks_raise(banks, change):
    (banks / "98.json").write_text(json.dumps(broken(change)))
    with pytest.raises(ValueError, match="98.json"):
        q.bank("98")


def blind(bank: dict) -> list[str]:
    """What the lengths of the options give away to someone who has read nothing; [] is good."""
    size = {q["id"]: {letter: len(text) for letter, text in q["choices"].items()} for q in bank["questions"]}
    rest = {q["id"]: [n for letter, n in size[q["id"]].items() if letter != q["answer"]] for q in bank["questions"]}
    right = {q["id"]: size[q["id"]][q["answer"]] for q in bank["questions"]}
    wordy = [f"{key}: the right option is over 1.5 times the longest wrong one"
             for key in right if right[key] > 1.5 * max(rest[key])]
    most = math.ceil(0.4 * len(right))
    longest = sum(right[key] > max(rest[key]) for key in right)
    shortest = sum(right[key] < min(rest[key]) for key in right)
    return wordy + [f"the right option is the {name} in {found} of {len(right)}, at most {most} may be"
                    for name, found in [("longest", longest), ("shortest", shortest)] if found > most]


def test_a_bank_that_the_longest_option_passes_is_found():
    def planted(right: str, wrong: str) -> dict:
        return broken(lambda b: [q.update(choices={"a": wrong, "b": right}) for q in b["questions"]])
    assert blind(BANK) == [] and math.ceil(0.4 * 4) == 2
    assert len(blind(planted("no: the reason, told at length, because it is right", "yes, always"))) == 5
    for right, wrong, name in [("no, for once", "yes, always", "longest"), ("yes, always", "no, for once", "shortest")]:
        assert blind(planted(right, wrong)) == [f"the right option is the {name} in 4 of 4, at most 2 may be"]


def test_the_committed_banks():
    for path in sorted((q.ROOT / "data" / "quiz").glob("*.json")):
        found = q.bank(path.stem, path.parent)
        assert found["notebook"] == path.stem
        assert 6 <= len(found["questions"]) <= 14, path.name
        letters = [each["answer"] for each in found["questions"]]
        assert max(letters.count(letter) for letter in letters) < 0.75 * len(letters), f"{path.name}: one letter passes"
        assert not blind(found), f"{path.name}: {blind(found)}"
