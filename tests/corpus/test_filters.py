"""Filters: hand-computed measures, what each says it misses, the ruleset's version, real messages."""

import dataclasses
import itertools
import json
import random

import pytest

from lifecycle_lib.core.fingerprints import fingerprint
from lifecycle_lib.core.stats import wilson
from lifecycle_lib.corpus import filters
from lifecycle_lib.corpus.filters import DEFAULT_VERDICTS, FILTERS, Reason, Ruleset, apply_filters

R = Ruleset()
PLAIN = "the kettle arrived broken on day 12 , can i send it back and who pays for the label"


def codes(text, rules=R):
    return [reason.code for reason in apply_filters({"text": text}, rules)]


HITS = {
    "too_short": " ok  ", "too_long": " ".join(map("".join, itertools.product("bcdfgh", repeat=6))),
    "mojibake": "itâ€™s the thÃ© shop , and it came late",
    "symbol_heavy": "|--|--| 0 0 1 1 | == ## %% |--|", "repetitive": "buy the mug now " * 9,
    "shuffled": "the of kettle a is broken my and return the by box i it wrote",
    "spam": "WINNER! Claim your £100 prize, txt YES to 80086", "maybe_spam": "a £5 prize for the best photo",
    "boilerplate": "Copyright 2024 Shop. All rights reserved. See our privacy policy.",
    "abuse": "you useless idiots , send me the label", "exploit": "open EXPLOIT-DEMO-1 in the terminal"}


@pytest.mark.parametrize("code, text", HITS.items())
def test_each_filter_hits_its_kind_alone(code, text):
    assert codes(text) == [code]
    assert codes(PLAIN) == []
    assert codes(text, Ruleset(verdicts={code: "admit"})) == []  # each can be switched off


def test_measures_by_hand():
    def measured(text):
        [reason] = apply_filters({"text": text}, R)
        return reason
    assert measured("  seven77 ") == Reason(code="too_short", measured=7, limit=8)
    assert measured("abcd \x92 efgh, and x \x92 y abcdefghij klm").measured == round(2000 / 37, 3)
    assert measured("abc 12345 67890").measured == round(3 / 13, 4)
    # 15 words, so 13 runs of three; "a b c", "b c a", "c a b" are all there are
    assert measured("aa bb cc " * 5).measured == round(1 - 3 / 13, 4)
    assert measured("the of cat a is dog the and").measured == 1.0  # 3 articles, each before what cannot follow
    assert measured("what a mess" + "z" * 30).measured == 30


MISSES = {  # said in the docstrings: a filter that finds these now should say so there
    "too_short": "nothing much to say, really", "mojibake": "ðàáîòà ñåðâåðà", "shuffled": "kettle broken the arrived",
    "spam": "I found a lovely place for shoes and my friends like it too", "abuse": "you 1d1ots, send the label",
    "repetitive": "the mug is good. the cup is fine. this beaker is nice. that vessel is great. we like it all, truly",
    "boilerplate": "Welcome to Shop. Home. About. Contact.", "exploit": "rm -rf --no-preserve-root everything"}


@pytest.mark.parametrize("code, text", MISSES.items())
def test_what_a_filter_says_it_misses_it_misses(code, text):
    assert code not in codes(text)


def test_every_filter_says_what_it_misses():
    assert all("isses" in f.__doc__ for f in FILTERS)


FALSE_ALARMS = {"abuse": "he called me an idiot, what can i do about him", "symbol_heavy": "x = [1, 2, 3]; y = {4: 5}",
                "exploit": "we are not affected by CVE-2021-44228"}


@pytest.mark.parametrize("code, text", FALSE_ALARMS.items())
def test_known_false_alarms(code, text):
    assert codes(text) == [code]


def test_spam_inside_a_long_text_is_missed_and_length_alone_is_no_spam():
    filler = "the manual of the kettle says to wait until the water is cold before it is opened again . " * 20
    assert "spam" in codes(HITS["spam"]) and "spam" not in codes(filler + HITS["spam"] + " " + filler)


def test_naive_dialect_is_not_low_signal():
    """A cipher dialect has letters and no English articles: the shuffled filter must stay silent."""
    assert codes("oji zioocx efojabe feu luud ug upaf , xuo io eg cfed") == []


@pytest.mark.parametrize("seed", range(5))
def test_rules_get_stricter_with_their_thresholds(seed):
    draw = random.Random(seed)
    texts = ["".join(draw.choices("ab c12!?\n", k=draw.randint(0, 60))) for _ in range(50)] + list(HITS.values())
    strict = Ruleset(version="2.0.0", min_chars=20, max_chars=1000, max_mojibake=0, min_letters=.8, max_repeated=.1,
                     max_run=5, max_misplaced=.1, spam_cues=2, max_boilerplate=.1)
    for text in texts:
        assert bool(codes(text)) <= bool(codes(text, strict))


def test_shuffling_is_seen_in_long_prose_only():
    """Words of a plain paragraph, shuffled: found mostly with many articles, never with fewer than three."""
    text = ("the clerk took the box to a table and the lid came off . a label was on the side and the order of a "
            "customer in the north was on it , so the clerk sent the box to the shop with a note")
    draw, found = random.Random(0), 0
    assert codes(text) == []
    for _ in range(200):
        words = text.split()
        draw.shuffle(words)
        found += "shuffled" in codes(" ".join(words))
    assert found > 100
    assert "shuffled" not in codes("the of kettle a is broken")


@pytest.mark.parametrize("fields, word", [
    ({"version": "1.0"}, "semantic version"), ({"version": 1}, "semantic version"), ({"min_letters": 1.5}, "0 to 1"),
    ({"min_chars": -1}, "min_chars=-1"), ({"max_chars": 5}, "max_chars"), ({"spam_cues": 1}, "spam_cues"),
    ({"max_run": float("nan")}, "max_run"), ({"min_chars": "8"}, "min_chars"), ({"min_chars": True}, "min_chars"),
    ({"verdicts": {"spam": "maybe"}}, "verdicts"), ({"verdicts": {"spa": "reject"}}, "reasons are"),
    ({"verdicts": ["spam"]}, "verdicts"), ({"verdicts": {"no_licence": "admit"}}, "never kept"),
    ({"verdicts": {"no_source": "accept_with_risk"}}, "never kept"), ({"verdicts": {"eval_only": "admit"}}, "never")])
def test_ruleset_refuses(fields, word):
    with pytest.raises(ValueError, match=word):
        Ruleset(**fields)


def test_every_threshold_and_verdict_is_in_the_fingerprint():
    assert Ruleset(version="9.9.9").fingerprint() == R.fingerprint()
    for f in dataclasses.fields(Ruleset):
        if f.name not in ("version", "verdicts"):
            step = 1 if f.type is int else 0.01
            assert dataclasses.replace(R, **{f.name: getattr(R, f.name) + step}).fingerprint() != R.fingerprint()
    assert Ruleset(verdicts={"spam": "quarantine"}).fingerprint() != R.fingerprint()
    assert Ruleset(verdicts={"spam": DEFAULT_VERDICTS["spam"]}).fingerprint() == R.fingerprint()


def test_version_1_0_0_measures_what_it_measured():
    """If this fails, a filter changed: give the default ruleset a new version, then record the new value."""
    texts = [*HITS.values(), *MISSES.values(), *FALSE_ALARMS.values(), PLAIN]
    got = [[(r.code, float(r.measured)) for r in apply_filters({"text": t}, R)] for t in texts]
    assert (R.version, fingerprint(got), R.fingerprint()) == ("1.0.0", "82e9a4461fdf2fae", "61e2a926cabd38e2")


def test_a_filter_that_reads_the_truth_would_be_caught():
    row = {"text": PLAIN, "truth": {"defect": "spam"}}

    def cheat(row, ruleset):  # broken on purpose
        return [Reason(code="spam", measured=1, limit=1)] if row["truth"]["defect"] else []
    clean = row | {"truth": {"defect": None}}
    assert apply_filters(row, R) == apply_filters(clean, R)
    assert cheat(row, R) != cheat(clean, R)


@pytest.mark.parametrize("text", [None, 3, ["a"]])
def test_no_text(text):
    with pytest.raises(ValueError, match="give a string"):
        apply_filters({"id": "x", "text": text}, R)


@pytest.mark.parametrize("unit", ["a", "aaaa ", "a.", "1-", "@a", "the of ", "Ã©", ".com", "txt ", "é", " ", "\x92"])
def test_no_text_takes_long(unit):
    apply_filters({"text": (unit * R.max_chars)[:R.max_chars]}, R)  # all patterns are linear: well under a second each


def test_real_spam_and_ham(real_data):
    """The half of the SMS set that was not looked at while the cues were written: the odd lines."""
    lines = (real_data / "support" / "sms_spam_collection.tsv").read_text(encoding="utf-8").split("\n")[1::2]
    labelled = [line.split("\t", 1) for line in lines if line.startswith(("ham\t", "spam\t"))]
    found = {"spam": [0, 0, 0], "ham": [0, 0, 0]}
    for label, text in labelled:
        got = set(codes(text))
        found[label] = [a + b for a, b in zip(found[label], (1, "spam" in got, bool(got & {"spam", "maybe_spam"})))]
    (spam, hit, flagged), (ham, wrong, bothered) = found["spam"], found["ham"]
    print(f"spam rejected {hit}/{spam} {wilson(hit, spam)}, flagged {flagged}; ham rejected {wrong}/{ham} "
          f"{wilson(wrong, ham)}, flagged {bothered}")
    assert spam > 300 and ham > 2000
    assert wilson(hit, spam)[0] > 0.5 and wilson(flagged, spam)[0] > 0.75
    assert wilson(wrong, ham)[1] < 0.01 and wilson(bothered, ham)[1] < 0.02


def test_real_questions_pass(real_data):
    text = (real_data / "math" / "gsm8k_test.jsonl").read_text(encoding="utf-8")
    questions = [json.loads(line)["question"] for line in text.splitlines()]
    flagged = sum(bool(codes(q)) for q in questions)
    assert flagged / len(questions) < 0.03, flagged
    assert filters.length(questions[0], R) is None
