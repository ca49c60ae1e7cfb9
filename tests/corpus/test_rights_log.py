"""The claims log: replay to a day, bad events, contracts with a clock."""

from __future__ import annotations

import itertools

import pytest

from lifecycle_lib.corpus.rights_log import ClaimsLog, Contract, must_delete, within_window

EVENTS = [
    {"source": "F", "date": "2026-01-10", "event": "granted", "licence": "CC-BY-4.0", "evidence": "m", "holder": "f"},
    {"source": "F", "date": "2026-03-01", "event": "changed", "licence": "CC-BY-NC-4.0"},
    {"source": "F", "date": "2026-09-01", "event": "revoked"},
    {"source": "P", "date": "2026-02-01", "event": "granted", "licence": "LicenseRef-partner", "evidence": "contract 7",
     "contract": {"customer": "acme", "starts": "2026-02-01", "ends": "2026-12-31", "no_base": True, "no_mixing": True,
                  "delete_on_exit": True}},
]


@pytest.mark.parametrize("source, day, status, licence", [
    ("F", "2026-01-09", "unseen", ""), ("F", "2026-01-10", "granted", "CC-BY-4.0"),
    ("F", "2026-02-28", "granted", "CC-BY-4.0"), ("F", "2026-03-01", "granted", "CC-BY-NC-4.0"),
    ("F", "2026-09-01", "revoked", "CC-BY-NC-4.0"), ("P", "2026-12-31", "granted", "LicenseRef-partner"),
    ("P", "2027-01-01", "expired", "LicenseRef-partner"), ("Q", "2026-01-10", "unseen", ""),
])
def test_replay_by_hand(source, day, status, licence):
    claim = ClaimsLog(EVENTS).rights_on(source, day)
    assert (claim.status, claim.licence, claim.in_quarantine) == (status, licence, status == "unseen")


def test_replay_does_not_depend_on_the_order_of_the_file():
    for order in itertools.permutations(EVENTS):
        assert ClaimsLog(order).rights_on("F", "2026-05-01").licence == "CC-BY-NC-4.0"


@pytest.mark.parametrize("event, message", [
    ({"source": "F", "date": "2026-01-01", "event": "revoked"}, ":5: F revoked on 2026-01-01, when it was unseen"),
    ({"source": "F", "date": "2026-02-31", "event": "granted", "licence": "MIT"}, "not a day"),
    ({"source": "F", "date": "2026-05-01", "event": "sold"}, "event='sold'"),
    ({"source": "G", "date": "2026-05-01", "event": "granted"}, "without licence"),
    ({"source": "G", "date": "2026-05-01", "event": "granted", "licence": "MIT", "until": "x"}, "'until' is no field"),
    ({"source": "G", "date": "2026-05-01", "event": "granted", "licence": "MIT", "contract": {}}, "give cu"),
    ({"source": " ", "date": "2026-05-01", "event": "granted", "licence": "MIT"}, "source=' '"),
])
def test_a_bad_event_is_named(event, message):
    with pytest.raises(ValueError, match=message):
        ClaimsLog([*EVENTS, event])


def test_the_clock_of_a_contract():
    contract = ClaimsLog(EVENTS).rights_on("P", "2026-06-01").contract
    days = ("2026-01-31", "2026-02-01", "2026-12-31", "2027-01-01")
    assert [within_window(contract, day) for day in days] == [False, True, True, False]
    assert [must_delete(contract, day) for day in days] == [False, False, False, True]
    with pytest.raises(ValueError, match="swap them"):
        Contract(customer="x", starts="2026-02-01", ends="2026-01-01")


def test_a_replay_that_takes_the_last_event_would_rewrite_the_past():
    log, day = ClaimsLog(EVENTS), "2026-02-01"
    assert log.events["F"][-1][1] == "revoked" and log.rights_on("F", day).status == "granted"
