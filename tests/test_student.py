"""Learner's copies: no solution left, what stands around it untouched, a learner's work kept."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("student", ROOT / "notebooks" / "student.py")
student = importlib.util.module_from_spec(spec)
spec.loader.exec_module(student)

CELL = """def double(x):
    ### BEGIN SOLUTION
    y = 2 * x
    return y
    ### END SOLUTION


assert double(2) == 4
### BEGIN HIDDEN TESTS
assert double(3) == 6
### END HIDDEN TESTS"""


def test_one_cell_by_hand():
    assert student.student_source(CELL) == ("def double(x):\n    # your code here\n    raise NotImplementedError\n\n\n"
                                            "assert double(2) == 4")
    assert student.student_source("x = 1\n") == "x = 1\n"


@pytest.mark.parametrize("end", ["    ### END SOLUTION\n", "### END HIDDEN TESTS"])
def test_an_open_region_is_refused(end):
    with pytest.raises(ValueError, match="not closed"):
        student.student_source(CELL.replace(end, ""))


def test_every_notebook_has_exercises_and_its_copy_no_answers(tmp_path):
    assert student.main(tmp_path) == 0
    for path in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        original, copy = path.read_text(), (tmp_path / path.name).read_text()
        assert "BEGIN SOLUTION" in original and "BEGIN SOLUTION" not in copy and "HIDDEN TESTS" not in copy
        assert "raise NotImplementedError" in copy
        assert len(json.loads(original)["cells"]) == len(json.loads(copy)["cells"])
        assert not any(cell.get("outputs") for cell in json.loads(copy)["cells"])  # nothing to peek at
    mine = tmp_path / path.name
    mine.write_text("my work")
    student.main(tmp_path)
    assert mine.read_text() == "my work"
