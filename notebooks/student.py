"""A learner's copies of the notebooks: solutions, hidden tests and outputs taken out (a prediction comes before its
result), everything else as it stands.

    python notebooks/student.py FOLDER    write FOLDER/NN_topic.ipynb for each notebook; a copy that is there is kept

The regions are nbgrader's: between `### BEGIN SOLUTION` and `### END SOLUTION` stands what a learner writes, between
`### BEGIN HIDDEN TESTS` and `### END HIDDEN TESTS` what only the teacher's grading runs.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOLUTION = re.compile(r"^([ \t]*)### BEGIN SOLUTION\n.*?^[ \t]*### END SOLUTION[ \t]*$", re.DOTALL | re.MULTILINE)
HIDDEN = re.compile(r"^[ \t]*### BEGIN HIDDEN TESTS\n.*?^[ \t]*### END HIDDEN TESTS[ \t]*\n?", re.DOTALL | re.MULTILINE)
TODO = r"\1# your code here\n\1raise NotImplementedError"


def student_source(source: str) -> str:
    """The source of a cell without its solution and hidden tests. Raises ValueError when a region is not closed."""
    text = HIDDEN.sub("", SOLUTION.sub(TODO, source))
    if re.search(r"### (BEGIN|END) (SOLUTION|HIDDEN TESTS)", text):
        raise ValueError("a solution or hidden-test region is not closed; every BEGIN needs its END")
    return text.rstrip("\n") if text != source else source


def student_notebook(notebook: dict) -> dict:
    """The notebook with student cells and no outputs: they would show the answers, and what is to be predicted."""
    copy = json.loads(json.dumps(notebook))
    copy["metadata"].pop("widgets", None)
    for cell in copy["cells"]:
        cell["source"] = student_source("".join(cell["source"]))
        if cell["cell_type"] == "code":
            cell.update(outputs=[], execution_count=None)
    return copy


def main(folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(HERE.glob("[0-9][0-9]_*.ipynb")):
        to = folder / path.name
        if to.exists():
            print(f"kept your {to} (delete it to get the current one)")
            continue
        text = json.dumps(student_notebook(json.loads(path.read_text(encoding="utf-8"))), ensure_ascii=False, indent=1)
        part = to.with_suffix(".part")
        part.write_text(text + "\n", encoding="utf-8")
        os.replace(part, to)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])) if len(sys.argv) == 2 else print(__doc__) or 2)
