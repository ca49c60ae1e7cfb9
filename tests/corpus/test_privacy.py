"""Privacy detectors and their scores: by hand, against other implementations, and with checks taken out."""

import random
import re

import numpy as np
import pytest
from scipy.stats import binomtest

from lifecycle_lib.corpus import privacy, privacy_eval
from lifecycle_lib.corpus.privacy import DETECTORS, Span, find_pii, iban_ok, luhn, mask, privacy_report, score_spans
from lifecycle_lib.corpus.privacy_eval import (
    TokenClassifier,
    clopper_pearson,
    n_to_bound,
    recall_gain,
    residual_leak,
    split_by_template,
    tokens,
)

FOUND = [  # kind, text, the span in it
    ("EMAIL", "write to j.smith+a@mail.co.uk.", "j.smith+a@mail.co.uk"),
    ("PHONE", "call +44 20 7946 0958 today", "+44 20 7946 0958"),
    ("PHONE", "my phone is 5551234567", "5551234567"),
    ("CARD", "card 4111 1111 1111 1111 expired", "4111 1111 1111 1111"),
    ("IBAN", "pay GB82 WEST 1234 5698 7654 32", "GB82 WEST 1234 5698 7654 32"),
    ("IP", "from 192.168.1.10 again", "192.168.1.10"),
    ("IP", "from 2001:db8::ff00:42:8329 again", "2001:db8::ff00:42:8329"),
    ("URL", "see https://shop.example/x?y=1 now", "https://shop.example/x?y=1"),
    ("US_SSN", "ssn 123-45-6789", "123-45-6789"),
    ("BIRTH_DATE", "born on 3/4/1980", "3/4/1980"),
    ("DATE", "delivered March 4, 2021", "March 4, 2021"),
    ("ADDRESS", "send it to 12 High Street, Flat 3 please", "12 High Street, Flat 3"),
    ("ADDRESS", "send it to PO Box 77", "PO Box 77"),
    ("ZIP", "my zip code is 10001", "10001"),
    ("ZIP", "London SW1A 1AA", "SW1A 1AA"),
    ("ID_NUMBER", "passport number is X1234567", "X1234567"),
    ("AGE", "a 38-year-old man", "38"),
    ("PERSON", "My name is Ada King Lovelace.", "Ada King Lovelace"),
    ("PERSON", "order holder: Zoë O'Brien", "Zoë O'Brien"),
    ("PERSON", "ask Mrs. Hopper's team", "Hopper"),
    ("SECRET", "the password is hunter2!", "hunter2!"),
]
MISSED = [  # what the docstrings say is missed, or must not be taken
    ("EMAIL", "john at mail dot com"), ("CARD", "4_1_1_1_1_1_1_1_1_1_1_1_1_1_1_1"), ("CARD", "4111 1111 1111 1112"),
    ("IBAN", "GB82 WEST 1234 5698 7654 33"), ("IP", "999.1.1.1"), ("US_SSN", "000-12-3456"), ("DATE", "in 1977"),
    ("SECRET", "credit card pin ?"), ("SECRET", "the password is correct"), ("PHONE", "2 000 000 people"),
    ("PHONE", "from 1990-1995"), ("PHONE", "4111 1111 1111 1112"), ("ADDRESS", "walks 5 hours a day to walk"),
    ("PERSON", "ada lovelace called"), ("ZIP", "order A44986 mug 87d confirmed"), ("AGE", "he is 38")]


@pytest.mark.parametrize(("kind", "text", "value"), FOUND)
def test_found_by_hand(kind, text, value):
    start = text.index(value)
    assert find_pii(text) == [Span(start, start + len(value), kind, value)]
    assert mask(text, find_pii(text)) == text.replace(value, f"[{kind}]")


@pytest.mark.parametrize(("kind", "text"), MISSED)
def test_documented_misses(kind, text):
    assert kind not in {s.kind for s in find_pii(text)}


def test_obfuscation_is_an_option():
    text = "john at mail dot com or 4_1_1_1_1_1_1_1_1_1_1_1_1_1_1_1"
    assert find_pii(text) == []
    assert [(s.kind, s.text) for s in find_pii(text, obfuscation=True)] == [
        ("EMAIL", "john at mail dot com"), ("CARD", "4_1_1_1_1_1_1_1_1_1_1_1_1_1_1_1")]


def test_every_detector_is_tried_and_says_what_it_misses():
    assert {kind for kind, _, _ in FOUND} == set(DETECTORS)
    for kind, detector in DETECTORS.items():
        assert re.search("[Mm]iss|[Tt]akes", detector.__doc__), kind


def test_spans_never_overlap_and_a_mask_leaves_nothing_to_find():
    random_ = random.Random(0)
    for _ in range(300):
        text = " ".join(random_.choice([*(t for _, t, _ in FOUND), *(t for _, t in MISSED)]) for _ in range(6))
        spans = find_pii(text)
        assert all(a.end <= b.start for a, b in zip(spans, spans[1:]))
        assert all(text[s.start:s.end] == s.text for s in spans)
        masked = mask(text, spans)
        assert not any(s.text in masked for s in spans if s.kind in ("EMAIL", "CARD", "IBAN"))
        kept = mask(text, [Span(s.start, s.end, "X") for s in spans])
        assert len(kept) == len(text) + sum(3 - (s.end - s.start) for s in spans)


def test_earlier_detector_wins():
    assert [s.kind for s in find_pii("me@www.shop.com")] == ["EMAIL"]  # not also a domain
    with pytest.raises(ValueError, match="overlaps"):
        mask("abcdef", [Span(0, 4, "A"), Span(2, 6, "B")])
    with pytest.raises(ValueError, match="start must be"):
        Span(3, 3, "A")
    with pytest.raises(ValueError, match="give a string"):
        find_pii(None)


def naive_luhn(number: str) -> bool:
    """From ISO/IEC 7812's text, another way: by table."""
    doubled = [0, 2, 4, 6, 8, 1, 3, 5, 7, 9]
    digits = [int(d) for d in number][::-1]
    return (sum(digits[0::2]) + sum(doubled[d] for d in digits[1::2])) % 10 == 0


def test_check_digits():
    assert luhn("79927398713") and not luhn("79927398710")
    assert iban_ok("DE89 3704 0044 0532 0130 00") and not iban_ok("DE98 3704 0044 0532 0130 00")
    random_ = random.Random(1)
    for _ in range(500):
        number = "".join(random_.choice("0123456789") for _ in range(random_.randint(12, 19)))
        assert luhn(number) == naive_luhn(number)


def test_luhn_without_doubling_is_caught(monkeypatch):
    """Summing plain digits takes two swapped digits for a good card, and refuses a real one."""
    monkeypatch.setattr(privacy, "luhn", lambda digits: sum(map(int, digits)) % 10 == 0)
    assert [s.kind for s in find_pii("card 4111 1111 1111 1111 expired")] != ["CARD"]


@pytest.mark.parametrize("text", ["a" * 50_000, "1-" * 20_000, "Aa " * 20_000, "a." * 20_000, "call 555-1234 " * 3_000,
                                  "password is " * 5_000, "12 ab " * 10_000, ":" * 50_000])
def test_long_texts_take_linear_time(text):
    import time
    start = time.perf_counter()
    find_pii(text, obfuscation=True)
    assert time.perf_counter() - start < 5  # a pattern that backtracks takes minutes


# ---- scores ------------------------------------------------------------------------------------------------

def test_scores_by_hand():
    gold = [[Span(0, 5, "A"), Span(10, 15, "B")], [Span(0, 5, "A", "Mary ")], []]
    found = [[Span(3, 8, "A"), Span(10, 15, "A")], [], [Span(1, 2, "B")]]
    loose, exact = score_spans(gold, found), score_spans(gold, found, "exact")
    assert (loose["A"].gold, loose["A"].hit, loose["A"].found, loose["A"].correct) == (2, 1, 2, 1)
    assert (loose["B"].gold, loose["B"].hit, loose["B"].touched, loose["B"].found) == (1, 0, 1, 1)
    assert (loose["A"].recall, loose["A"].precision) == (0.5, 0.5)
    assert (loose["A"].characters, loose["A"].covered, loose["A"].missed) == (10, 2, ["Mary "])
    assert (exact["A"].hit, exact["A"].correct) == (0, 0)
    assert loose["A"].recall_interval == pytest.approx(tuple(binomtest(1, 2).proportion_ci(method="wilson")))
    assert score_spans(gold, [[], [], []])["A"].precision is None


def test_scores_against_characters():
    """A span is a hit when the sets of its characters meet: the same counts from sets of positions."""
    random_ = random.Random(2)
    for _ in range(50):
        gold, found = ([[Span(a, a + random_.randint(1, 9), random_.choice("AB")) for a in range(0, 60, 12)]
                        for _ in range(3)] for _ in range(2))
        scores = score_spans(gold, found)
        for kind in "AB":
            hit = sum(any(f.kind == kind and set(range(f.start, f.end)) & set(range(g.start, g.end)) for f in fs)
                      for gs, fs in zip(gold, found) for g in gs if g.kind == kind)
            assert scores[kind].hit == hit


def test_no_gold_is_no_evidence():
    with pytest.raises(ValueError, match="no gold span"):
        score_spans([[], []], [[], []])
    with pytest.raises(ValueError, match="2 documents"):
        score_spans([[Span(0, 1, "A")], []], [[]])
    with pytest.raises(ValueError, match="match='near'"):
        score_spans([[Span(0, 1, "A")]], [[]], "near")


def test_report_names_what_is_missed():
    rows = [{"text": "mail a@b.org, ask Ada", "spans": [Span(5, 12, "EMAIL"), Span(18, 21, "PERSON")]},
            {"text": "call +44 20 7946 0958", "spans": []}]
    report = privacy_report(rows)
    assert report["never_found"] == ["PERSON"] and report["unlabelled"] == ["PHONE"]
    as_dicts = [r | {"spans": [{"start": s.start, "end": s.end, "kind": s.kind} for s in r["spans"]]} for r in rows]
    assert privacy_report(as_dicts) == report
    by_kind = {t["kind"]: t for t in report["table"]}
    assert by_kind["PERSON"]["missed"] == ["Ada"] and by_kind["PERSON"]["recall"] == 0
    assert by_kind["EMAIL"]["recall"] == 1 == by_kind["EMAIL"]["characters_hidden"]
    assert by_kind["PHONE"]["recall"] is None and by_kind["PHONE"]["precision"] == 0


# ---- classifier and residual leak --------------------------------------------------------------------------

def rows_of_templates(n: int, seed: int) -> list[dict]:
    """Names after words that no pattern knows ("parcel for X"), and capitalised things that are no names."""
    random_ = random.Random(seed)
    frames = [("parcel for {} arrived", 1), ("we met {} yesterday", 1), ("the {} model broke", 0), ("{} shipped it", 1),
              ("a {} lamp", 0), ("from {} with thanks", 1), ("size {} fits", 0), ("paid by {} today", 1)]
    rows = []
    for i in range(n):
        frame, name = frames[i % len(frames)]
        word = "".join(random_.choice("abcdefgh") for _ in range(5)).capitalize()
        text = frame.format(word)
        at = text.index(word)
        rows.append({"text": text, "spans": [Span(at, at + 5, "PERSON", word)] if name else [], "template": i % 16})
    return rows


def test_classifier_finds_what_patterns_do_not():
    rows = rows_of_templates(320, 0)
    train, test = split_by_template(rows)
    assert not {r["template"] for r in train} & {r["template"] for r in test}
    result = recall_gain(train, test, precision=0.8, draws=200)
    assert result["patterns"]["recall"] == 0
    assert result["gain"].low > 0 and result["both"]["recall"] > 0.5
    assert result["curve"][-1][2] == 0  # threshold above 1: the patterns alone
    with pytest.raises(ValueError, match="no personal token"):
        recall_gain(train, [{"text": "a lamp", "spans": [], "template": 99}], precision=0.5)


def test_classifier_gradient_is_torch_s():
    import torch
    rows = rows_of_templates(16, 1)
    model = TokenClassifier().fit(rows, steps=1, rate=0.05, decay=0.0)
    x = torch.tensor(np.concatenate([TokenClassifier.features(r["text"]) for r in rows]))
    y = torch.tensor([float(any(t.overlaps(s) for s in r["spans"])) for r in rows for t in tokens(r["text"])])
    w = torch.zeros(privacy_eval.BUCKETS, dtype=torch.float64, requires_grad=True)
    torch.nn.functional.binary_cross_entropy_with_logits(w[x].sum(1), y.double()).backward()
    step = -0.05 * np.sign(w.grad.numpy()) * (np.abs(w.grad.numpy()) > 0)  # Adam's first step is the sign
    assert np.abs(model.weights - step).max() < 1e-4


def test_shuffled_labels_teach_nothing():
    """A broken pairing of text and spans: the gain must vanish."""
    rows = rows_of_templates(320, 0)
    wrong = [r | {"spans": [Span(0, 1, "PERSON")] if i % 3 == 0 else []} for i, r in enumerate(rows)]
    train, _ = split_by_template(wrong)
    _, test = split_by_template(rows)
    try:
        assert recall_gain(train, test, precision=0.8, draws=200)["both"]["recall"] < 0.3
    except ValueError as error:
        assert "no threshold" in str(error)


@pytest.mark.parametrize(("k", "n"), [(0, 1), (0, 598), (1, 50), (7, 20), (20, 20)])
def test_clopper_pearson_is_scipy_s(k, n):
    ours, theirs = clopper_pearson(k, n), binomtest(k, n).proportion_ci(0.95, "exact")
    assert ours == pytest.approx((theirs.low, theirs.high))


@pytest.mark.parametrize("leaks", [0, 1, 3])
def test_n_to_bound_is_the_smallest(leaks):
    n = n_to_bound(0.005, leaks)
    assert clopper_pearson(leaks, n, 0.9)[1] < 0.005 <= clopper_pearson(leaks, n - 1, 0.9)[1]
    if not leaks:
        assert n == 598  # ln 0.05 / ln 0.995 = 597.65


def test_residual_leak_bound_holds():
    """Planted leak of 2 %: the 95 % upper bound lies above it in about 95 of 100 draws, never far fewer."""
    rows = [{"leak": i % 50 == 0} for i in range(5000)]
    audits = [residual_leak(rows, 300, lambda r: r["leak"], seed=s) for s in range(200)]
    assert sum(a["upper"] >= 0.02 for a in audits) >= 184
    assert audits[0] == residual_leak(rows, 300, lambda r: r["leak"], seed=0)
    with pytest.raises(ValueError, match="n=0"):
        residual_leak(rows, 0, bool)
    with pytest.raises(ValueError, match="empty sample"):
        clopper_pearson(0, 0)
