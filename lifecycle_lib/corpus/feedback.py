"""Feedback that may become training data: a click says why it was made, and whether it may teach (curriculum S2-04b).

A thumbs-down on a staging page means five things: the answer is wrong, it looks ugly, I would word it otherwise, I was
curious what the button does, I was testing it. One of them is a label. So a row without a reason code and a consent
flag is refused here, by file and line, before anyone can train on it; and what is no label goes where it belongs.
Consent comes first: a row without it goes to no training set and to nothing that may become one, whatever it says.

Left out: who clicked, how sure they were, and agreement between several people.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from lifecycle_lib.core.records import read_jsonl

ROUTES = {"wrong": "a second person, who verifies it", "ugly": "the renderer of answers",
          "dislike": "the style guide, or preference pairs", "curiosity": "nowhere", "test": "nowhere"}
NO_CONSENT = "answered, not kept"  # the one place of a row whose author did not agree to train
FIELDS = {"id": str, "prompt": str, "answer": str, "correction": str, "reason": str, "consent_to_train": bool,
          "verified": bool}


def read_feedback(path: str | Path) -> list[dict]:
    """The rows of a feedback file. Raises ValueError, as "FILE:LINE: what; fix", for a row without a reason code or a
    consent flag, an unknown reason, an empty correction, a second use of an id."""
    seen: dict[str, int] = {}
    rows = read_jsonl(path, required=FIELDS)
    for line, row in enumerate(rows, 1):
        where = f"{path}:{line}"
        if row["reason"] not in ROUTES:
            raise ValueError(f"{where}: reason {row['reason']!r} is no reason code; use one of {', '.join(ROUTES)}")
        if not row["correction"].strip():
            raise ValueError(f"{where}: the correction is empty; a click alone says what is wrong with nothing")
        if row["id"] in seen:
            raise ValueError(f"{where}: id {row['id']!r} was used on line {seen[row['id']]}; give each click its own")
        seen[row["id"]] = line
    return rows


def may_train(row: Mapping) -> bool:
    """Only a verified "wrong", from someone who agreed to it, is a label."""
    return row["reason"] == "wrong" and row["verified"] and row["consent_to_train"]


def route(rows: Sequence[Mapping]) -> dict[str, list[Mapping]]:
    """Rows by where they go: `train`, each destination of `ROUTES`, `NO_CONSENT`. No row is lost, none goes twice.

    Without consent a row goes to `NO_CONSENT` alone: pairs and style guides are trained on in the end, too."""
    out: dict[str, list[Mapping]] = {"train": [], **{where: [] for where in ROUTES.values()}, NO_CONSENT: []}
    for row in rows:
        where = "train" if may_train(row) else ROUTES[row["reason"]]
        out[where if row["consent_to_train"] else NO_CONSENT].append(row)
    return out
