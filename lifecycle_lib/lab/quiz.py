"""The quizzes: one bank a notebook in data/quiz, graded at 75 %, progress kept in a file of the learner's own.

Text by default, so that nbval and papermill see the same thing every time; buttons where a person sits in front of the
kernel. Grades go to work/progress.json (ignored by git), and only when a person is there or asks for it.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from lifecycle_lib.core.records import check_fields, read_json, write_json
from lifecycle_lib.lab.notebook import ROOT, live

BANKS = ROOT / "data" / "quiz"
QUESTION = {"id": str, "row": str, "question": str, "choices": dict, "answer": str, "why": str, "common_wrong": str}
INTERVIEW = {"question": str, "answer": str, "common_wrong_answer": str}


def bank(notebook: str, folder: Path | None = None) -> dict:
    """The checked bank. ValueError for a missing file or field, a repeated id, or an answer nobody can choose."""
    path = (folder or BANKS) / f"{notebook}.json"
    if not path.is_file():
        raise ValueError(f"data/quiz/{notebook}.json: there is no such bank; give a notebook's number, such as '07'")
    found = read_json(path)
    check_fields(found, {"notebook": str, "pass": float, "questions": list}, path.name)
    if not found["questions"] or not 0 < found["pass"] <= 1:
        raise ValueError(f"{path.name}: needs questions, and a pass mark above 0 and at most 1")
    for number, q in enumerate(found["questions"], 1):
        check_fields(q, QUESTION, f"{path.name}: question {number}")
        if q["answer"] not in q["choices"] or len(q["choices"]) < 2:
            raise ValueError(f"{path.name}: question {number}: answer {q['answer']!r} is none of its choices "
                             f"{', '.join(q['choices'])}, or there is only one; mend the bank")
    ids = [q["id"] for q in found["questions"]]
    if len(set(ids)) != len(ids):
        raise ValueError(f"{path.name}: a question id is used twice; give each its own")
    for number, q in enumerate(found.get("interview", []), 1):
        check_fields(q, INTERVIEW, f"{path.name}: interview {number}")
    return found


def quiz(notebook: str, widget: bool | None = None) -> None:
    """Show the bank: buttons when a person is there (or `widget=True`), else text."""
    found = bank(notebook)
    if live() if widget is None else widget:
        _buttons(found)
        return
    for q in found["questions"]:
        print(f"{q['id']}  {q['question']}")
        for letter, text in q["choices"].items():
            print(f"      {letter}) {text}")
    print(f'\nAnswer with grade("{notebook}", {{"{found["questions"][0]["id"]}": "a", ...}}); '
          f"{found['pass']:.0%} right is a pass.")


def score(found: Mapping, answers: Mapping[str, str]) -> float:
    """Share of the bank's questions answered right; what is not answered is wrong. ValueError for a foreign answer."""
    questions = {q["id"]: q for q in found["questions"]}
    for key, letter in answers.items():
        if key not in questions:
            raise ValueError(f"{key!r} is no question of bank {found['notebook']}; it has {', '.join(questions)}")
        if letter not in questions[key]["choices"]:
            raise ValueError(f"{key}: {letter!r} is no choice; use one of {', '.join(questions[key]['choices'])}")
    return sum(answers.get(key) == q["answer"] for key, q in questions.items()) / len(questions)


def grade(notebook: str, answers: Mapping[str, str], record: bool | None = None) -> float:
    """Grade, say why for each wrong answer, and keep the best score when a person is there (or `record=True`)."""
    found = bank(notebook)
    share = score(found, answers)
    for q in found["questions"]:
        if q["id"] in answers and answers[q["id"]] != q["answer"]:
            print(f"{q['id']}: not {answers[q['id']]}. {q['common_wrong']}")
    n = len(found["questions"])
    print(f"{round(share * n)} of {n} right, {len(answers)} answered: "
          f"{'passed' if share >= found['pass'] else 'not yet'} (pass: {found['pass']:.0%})")
    if live() if record is None else record:
        kept = progress()
        write_json(progress_file(), kept | {notebook: max(share, kept.get(notebook, 0.0))})
    return share


def explain(notebook: str) -> None:
    """Every right answer with its reason. Look after you have tried."""
    for q in bank(notebook)["questions"]:
        print(f"{q['id']}: {q['answer']}) {q['choices'][q['answer']]}\n      {q['why']}")


def interview(notebook: str) -> None:
    """The bank's interview questions, each with its answer and the common wrong one."""
    for q in bank(notebook).get("interview", []):
        print(f"Q      {q['question']}\nA      {q['answer']}\nwrong  {q['common_wrong_answer']}\n")


def progress_file() -> Path:
    """LIFECYCLE_PROGRESS, else work/progress.json in the repository."""
    return Path(os.environ.get("LIFECYCLE_PROGRESS") or ROOT / "work" / "progress.json")


def progress() -> dict[str, float]:
    """Best score by notebook so far; {} before the first."""
    return read_json(progress_file()) if progress_file().is_file() else {}


def _buttons(found: Mapping) -> None:
    import ipywidgets as w
    from IPython.display import display

    boxes, out = {}, w.Output()
    for q in found["questions"]:
        options = [(f"{letter}) {text}", letter) for letter, text in q["choices"].items()]
        boxes[q["id"]] = w.RadioButtons(options=options, value=None, layout=w.Layout(width="auto"))
        display(w.VBox([w.HTML(f"<b>{q['id']}</b> {q['question']}"), boxes[q["id"]]]))

    def check(_: object) -> None:
        out.clear_output()
        with out:
            grade(found["notebook"], {key: box.value for key, box in boxes.items() if box.value})

    button = w.Button(description="Grade")
    button.on_click(check)
    display(button, out)
