"""Documents: seen pairs only, no JSON, notes that say what the prompt says, shares as stated."""

import json
import re
from collections import Counter

import pytest
from scipy import stats
from test_cases import reason_of, shown_pairs

from lifecycle_lib.desk import documents, world
from lifecycle_lib.desk.cases import golden_case, with_label_claim
from lifecycle_lib.model.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return documents.draw_documents(3000, 0)


def test_by_hand():
    case = golden_case()
    head = case.prompt.removesuffix("<bot>")
    assert documents.note(None, case) == head + "<note>damaged P-7 30d, 12d confirmed"
    assert documents.recap(None, case) == head + "<note>damaged P-7 30d, 12d confirmed, within, refund"


def test_no_held_out_pair_and_no_json(rows):
    pairs = [p for r in rows for p in shown_pairs(r["text"])]
    assert len(pairs) > 1000 and not [p for p in pairs if world.held_out(*p)]
    assert not [r for r in rows if "{" in r["text"] or "}" in r["text"] or "label_created" in r["text"]]


def test_tokenizer_text_shows_no_held_out_pair_either():
    assert not [p for t in documents.tokenizer_corpus(0) for p in shown_pairs(t) if world.held_out(*p)]


def test_provenance_and_licence(rows):
    assert all(r["licence"] == world.LICENCE and r["world_version"] for r in rows)
    assert all(r["source"] == documents.SOURCES[r["kind"]] for r in rows)
    assert all(r["text"].startswith("<bos>") and r["text"].endswith("<eos>") and r["text"].count("<eos>") == 1
               for r in rows)


def test_kinds_follow_their_weights(rows):
    total = sum(documents.WEIGHTS.values())
    count = Counter(r["kind"] for r in rows)
    assert set(count) == set(documents.KINDS)
    assert stats.chisquare([count[k] for k in documents.WEIGHTS],
                           [len(rows) * w / total for w in documents.WEIGHTS.values()]).pvalue > 1e-4


def test_notes_and_recaps_repeat_the_line_that_covers_the_message(rows):
    checked = 0
    for row in rows:
        if row["kind"] not in ("note", "recap"):
            continue
        text, note = row["text"].removesuffix("<eos>").split("<note>")
        item, days, status, message = re.search(r"<order>A\d{5} (\w+) (\d\d)d (\w+)<user>(.+)$", text).groups()
        reason = reason_of(message, item)
        line = re.search(rf"<policy>({reason} P-\d (\d\d)d)", text)
        if line is None:
            assert note.startswith(f"no policy covers {reason}")
            continue
        assert note.startswith(f"{line[1]}, {days}d {status}")
        if row["kind"] == "recap":
            within = int(days) <= int(line[2])
            refund = within and (reason != "damaged" or status == "confirmed")
            assert note.endswith(f", {'within' if within else 'past'}, {'refund' if refund else 'no refund'}")
        checked += 1
    assert checked > 500


def test_a_ledger_says_only_what_its_book_and_its_order_say(rows):
    ledgers = [r["text"].removesuffix("<eos>") for r in rows if r["kind"] == "ledger"]
    for text in ledgers:
        top, day = text.removeprefix("<bos>").split("<note>")
        book, _, order = top.partition("<order>")
        facts = {*book.split("<policy>")[1:], " ".join(order.split()[2:])}
        assert set(day.split(", ")) <= facts, text
    assert len(ledgers) > 100


def test_one_seed_one_corpus(rows):
    assert documents.draw_documents(50, 0) == rows[:50] != documents.draw_documents(50, 1)
    with pytest.raises(ValueError, match="n=0 documents"):
        documents.draw_documents(0, 0)


def test_the_tokenizer_learns_ids_and_numbers_as_single_tokens():
    tok = Tokenizer.train(documents.tokenizer_corpus(0), 640, world.SPECIAL_TOKENS)
    case = golden_case()
    for word in [f" {p}" for p in world.POLICY_IDS] + [f" {n:02d}" for n in range(100)]:
        assert len(tok.encode(word)) == 1, word
    for text in (case.prompt, case.answer, with_label_claim(case.answer)):
        assert tok.decode(tok.encode(text)) == text
    assert len(tok.encode(case.prompt)) <= 40 and json.loads(tok.decode(tok.encode(case.answer)))
