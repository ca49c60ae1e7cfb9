"""Transcripts: rates by hand, spans and rewrites, detectors and scorer against answers written here."""

import json
from dataclasses import replace
from statistics import mean

import pytest
from scipy.stats import binomtest

from lifecycle_lib.desk.cases import golden_case
from lifecycle_lib.desk.transcripts import (
    HABITS,
    MISSPELT,
    TRIGGERS,
    WORDINGS,
    Transcript,
    draw_bays,
    draw_transcripts,
    find_spans,
    heard,
    score_reply,
    write_pieces,
)

ALL = {h: words[0] for h, words in WORDINGS.items()}


def golden(said: dict[str, str] | None = None, **changes: object) -> Transcript:
    case = golden_case()
    fields = {"case": case, "tone": "frustrated", "tier": "1", "bay": "04",
              "pieces": write_pieces(case, "04", said or {})} | changes
    return Transcript(**fields)


def test_a_reply_by_hand():
    row = golden(ALL)
    answer = '{"evidence":"damaged P-7 30d, 12d confirmed","policy_id":"P-7","eligible":true}'
    assert row.clean == f"{answer} within, refund, bay 04"
    assert row.reply == f"{answer} sorry within clo, refun sent to a colleague, bay 04 i sent 10 back"
    assert [row.reply[a:b] for a, b, _ in row.spans] == [ALL[h] if h != "misspelling" else "refun"
                                                         for _, _, h in row.spans]
    assert row.prompt.endswith("<user>my mug arrived cracked no no<note><bot>")
    assert golden(tone="calm", tier="2").prompt == golden_case().prompt


def test_each_habit_comes_at_its_rate_and_only_where_it_is_triggered():
    rates = {"apology": 0.7, "shorthand": 0.4, "misspelling": 0.12, "handover": 0.9, "credit": 0.0}
    rows = draw_transcripts(3000, 3, rates)
    for habit, rate in rates.items():
        hits = [habit in r.habits for r in rows if r.triggers(habit)]
        assert binomtest(sum(hits), len(hits), rate).pvalue > 1e-4  # scipy's exact test
    for habit in TRIGGERS:
        assert not any(habit in r.habits for r in rows if not r.triggers(habit))
    assert {r.case.reason for r in rows if "apology" in r.habits} >= {"unwanted", "damaged"}  # tone, not fault


def test_detectors_agree_with_the_plan_and_scores_do_not_see_habits():
    rows = draw_transcripts(400, 1, 0.5)
    for r in rows:
        assert heard(r.reply) == r.habits and not heard(r.clean)
        assert set(score_reply(r.reply, r).values()) == set(score_reply(r.clean, r).values()) == {True}
        assert r.without(r.spans) == r.clean and r.without(()) == r.reply


def test_draws_are_shared_across_rates_and_depend_on_the_seed():
    low, high = draw_transcripts(200, 5, 0.3), draw_transcripts(200, 5, 0.5)
    assert all(a.prompt == b.prompt and a.habits <= b.habits for a, b in zip(low, high))
    assert [r.reply for r in low] == [r.reply for r in draw_transcripts(200, 5, 0.3)]
    assert [r.reply for r in low] != [r.reply for r in draw_transcripts(200, 6, 0.3)]
    assert len(set(draw_bays(0).values())) == 4


@pytest.mark.parametrize("wrong, field", [
    ("bay 04", "bay"), ("within,", "policy"), ('"eligible":true', "policy"), ("}", "formed"), ("refund", "formed")])
def test_the_scorer_is_strict(wrong, field):
    row = golden()
    broken = {"bay 04": "bay 05", "within,": "past,", '"eligible":true': '"eligible":false', "}": "",
              "refund": "refumd"}
    said = row.reply.replace(wrong, broken[wrong])
    scores = score_reply(said, row)
    assert said != row.reply and not scores[field]
    assert field != "formed" or not any(scores.values())
    assert score_reply(row.reply + " bye", row)["formed"] is False


def test_a_garbled_habit_is_not_heard():
    """A detector by substring, the broken variant, hears a misspelling in every clean reply."""
    row = golden()
    assert heard(row.reply) == frozenset() and MISSPELT["refund"] in row.reply
    assert heard(row.reply + " i sent 10 backs") == frozenset()
    assert heard(row.reply + " we sent 10 back") == {"credit"}


def test_the_finder_misses_its_share():
    rows = draw_transcripts(2000, 2, 0.5)
    n = sum(len(r.spans) for r in rows)
    found = find_spans(rows, 0.1, 2)
    assert binomtest(sum(map(len, found)), n, 0.9).pvalue > 1e-4
    assert find_spans(rows, 0.0, 2) == [r.spans for r in rows]
    missed = [(r, f) for r, f in zip(rows, found) if len(f) < len(r.spans)]
    assert all(heard(r.without(f)) == r.habits - {h for _, _, h in f} for r, f in missed)


def test_the_withdrawn_window():
    rows, honest = draw_transcripts(1500, 4, 0.0, old_window=0.7), draw_transcripts(1500, 4, 0.0)
    apart = [(r, h) for r, h in zip(rows, honest) if h.case.eligible and h.case.days > 14]
    refused = [json.loads(r.reply.partition("}")[0] + "}")["eligible"] is False for r, _ in apart]
    assert 0.6 < mean(refused) < 0.8
    assert all(score_reply(h.reply, h)["policy"] for _, h in apart)
    assert [score_reply(r.reply, r)["policy"] for r, _ in apart] == [not x for x in refused]
    same = [(r, h) for r, h in zip(rows, honest) if h.case.days <= 14 and h.case.policy
            and h.case.days <= h.case.policy.window_days]
    assert all(r.reply == h.reply for r, h in same)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="'sighing' is unknown"):
        draw_transcripts(2, 0, {"sighing": 0.5})
    with pytest.raises(ValueError, match="credit=1.5"):
        draw_transcripts(2, 0, {"credit": 1.5})
    with pytest.raises(ValueError, match="n=0"):
        draw_transcripts(0, 0)
    with pytest.raises(ValueError, match="missed=2"):
        find_spans([], 2, 0)
    assert set(HABITS) == set(WORDINGS) and replace(golden(), bay="05").bay == "05"
