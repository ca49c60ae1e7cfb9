"""Feedback: rows without a reason or a consent flag are refused by file and line; routing loses nothing."""

import json
from collections import Counter
from itertools import product

import pytest

from lifecycle_lib.core.records import write_jsonl
from lifecycle_lib.corpus.feedback import FIELDS, NO_CONSENT, ROUTES, may_train, read_feedback, route


def click(**changes: object) -> dict:
    return {"id": "c1", "prompt": "<bos>q", "answer": "a", "correction": "b", "reason": "wrong",
            "consent_to_train": True, "verified": True} | changes


def written(tmp_path, *rows: dict):
    write_jsonl(tmp_path / "clicks.jsonl", rows)
    return tmp_path / "clicks.jsonl"


def test_a_good_file_comes_back_as_it_is(tmp_path):
    rows = [click(), click(id="c2", reason="ugly", verified=False)]
    path = written(tmp_path, *rows)
    assert read_feedback(path) == rows == [json.loads(x) for x in path.read_text().splitlines()]


@pytest.mark.parametrize("field", FIELDS)
def test_a_missing_field_names_file_and_line(tmp_path, field):
    bad = {k: v for k, v in click(id="c2").items() if k != field}
    with pytest.raises(ValueError, match=rf"clicks.jsonl:2: field '{field}' is missing"):
        read_feedback(written(tmp_path, click(), bad))


@pytest.mark.parametrize("changes, message", [
    ({"reason": "thumbs_down"}, "clicks.jsonl:1: reason 'thumbs_down' is no reason code; use one of wrong"),
    ({"consent_to_train": "yes"}, "field 'consent_to_train' is 'yes'"), ({"consent_to_train": 1}, "consent_to_train"),
    ({"correction": " "}, "clicks.jsonl:1: the correction is empty")])
def test_bad_values_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        read_feedback(written(tmp_path, click(**changes)))


def test_an_id_used_twice(tmp_path):
    with pytest.raises(ValueError, match=r"clicks.jsonl:2: id 'c1' was used on line 1"):
        read_feedback(written(tmp_path, click(), click()))


def test_routes_by_hand():
    rows = [click(), click(id="c2", verified=False), click(id="c3", consent_to_train=False),
            click(id="c4", reason="test")]
    found = {where: [r["id"] for r in part] for where, part in route(rows).items() if part}
    assert found == {"train": ["c1"], ROUTES["wrong"]: ["c2"], NO_CONSENT: ["c3"], "nowhere": ["c4"]}


def test_no_row_is_lost_and_none_trains_without_all_three():
    every = product(ROUTES, (True, False), (True, False))
    rows = [click(id=str(i), reason=r, consent_to_train=c, verified=v) for i, (r, c, v) in enumerate(every)]
    found = route(rows)
    assert Counter(r["id"] for part in found.values() for r in part) == Counter(r["id"] for r in rows)
    assert [r["id"] for r in found["train"]] == ["0"]  # the one of twenty that has all three
    assert not any(may_train(r) for where, part in found.items() if where != "train" for r in part)
    assert {r["id"] for r in found[NO_CONSENT]} == {r["id"] for r in rows if not r["consent_to_train"]}


def test_a_router_that_asks_for_the_reason_alone_keeps_what_it_may_not():
    """The broken variant: a dislike without consent reaches the pairs, which are trained on."""
    row = click(reason="dislike", consent_to_train=False, verified=False)
    assert "preference pairs" in ROUTES[row["reason"]] and route([row])[NO_CONSENT] == [row]


def test_json_schema_refuses_the_same_rows(tmp_path):
    """An outside judge of the fields: the jsonschema library."""
    jsonschema = pytest.importorskip("jsonschema")
    names = {str: "string", bool: "boolean"}
    schema = {"required": list(FIELDS), "properties": {k: {"type": names[t]} for k, t in FIELDS.items()}
              | {"reason": {"enum": list(ROUTES)}}}
    tried = [click(), click(reason="meh"), click(consent_to_train=1), click(verified=None), {"id": "c"}]
    for row in tried:
        try:
            read_feedback(written(tmp_path, row))
        except ValueError:
            assert not jsonschema.Draft202012Validator(schema).is_valid(row)
        else:
            assert jsonschema.Draft202012Validator(schema).is_valid(row)


def test_a_gate_that_asks_for_one_thing_lets_opinions_in():
    """The broken variant: consent alone."""
    rows = [click(id=str(i), reason=r, verified=r == "wrong") for i, r in enumerate(ROUTES)]
    assert len([r for r in rows if r["consent_to_train"]]) == 5 and len(route(rows)["train"]) == 1
