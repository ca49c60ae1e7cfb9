"""Messy language: counted by hand on small texts, followed by the generator, held to the real files where they are."""

import copy
import itertools
import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from scipy.spatial.distance import jensenshannon
from scipy.stats import chisquare

from lifecycle_lib.desk import messy, messy_measure
from lifecycle_lib.desk.messy import (
    CAUSES,
    CUSTOMER_WORDINGS,
    RATES_FILE,
    REGISTERS,
    load_rates,
    make_messy,
    sample_messages,
    slip,
)
from lifecycle_lib.desk.messy_measure import (
    FULL_OF,
    LENGTHS,
    Words,
    edit_of,
    edit_rates,
    fit_report,
    has_double,
    js_divergence,
    place_of,
    text_rates,
    trigrams,
    typo_rates,
)
from lifecycle_lib.desk.world import ITEMS, PHRASES, REASONS

RATES = load_rates()


# --- counting, by hand ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("wrong, right, kind, place", [
    ("recieve", "receive", "swap", "inner"), ("arived", "arrived", "undouble", "inner"),
    ("brokken", "broken", "double", "inner"), ("kettl", "kettle", "delete", "last"),
    ("xbroken", "broken", "insert", "first"), ("brokem", "broken", "substitute", "last")])
def test_one_edit_by_hand(wrong, right, kind, place):
    found = edit_of(wrong, right)
    assert found[0] == kind and place_of(found[1], kind, right) == place


def test_two_edits_and_none_are_not_one():
    assert edit_of("brknen", "broken") is None and edit_of("broken", "broken") is None


def test_every_edit_is_undone_by_the_list_of_words_one_edit_away():
    for word in ("kettle", "broken"):  # Norvig's list is the oracle of edit_of, both ways
        away = set(messy_measure.one_edit_away(word)) - {word}
        assert all(edit_of(w, word) for w in away)
        assert edit_of("kettleses", word) is None


def test_text_rates_by_hand():
    texts = ["hello there, i dont know. Where is it?", "I don't know", "WHERE IS MY CARD?", "Why? I paid! And i waited"]
    got = text_rates(texts)
    k_of_n = {name: (got[name]["k"], got[name]["n"]) for name in (*messy_measure.FITTED, "several", "two_questions")}
    assert k_of_n == {"all_caps": (1, 4), "lower_start": (1, 4), "lower_i": (2, 3), "no_stop": (2, 4), "bang": (1, 4),
                      "no_apostrophe": (1, 2), "greeting": (1, 4), "question_first": (1, 2), "several": (2, 4),
                      "two_questions": (0, 4)}


def test_typos_are_rare_unknown_words_one_edit_from_a_common_one():
    own = Counter({"transfer": 50, "tranfer": 2, "visas": 40, "didnt": 9, "zzzzzz": 1, "recieve": 7})
    words = Words(Counter(), own, [("recieve", "receive")])
    asked = ("tranfer", "transfer", "visas", "zzzzzz", "didnt", "recieve", "tran")
    assert [words.meant(w) for w in asked] == ["transfer", None, None, None, None, "receive", None]
    got = typo_rates(["tranfer transfer visas transferring"], words)  # by the length of what was meant
    assert [(r["k"], r["n"]) for r in got["typo"].values()] == [(0, 1), (1, 2), (0, 1)]


def test_divergence_is_scipys():
    p, q = trigrams(["my mug arrived cracked", "it is late"]), trigrams(["mi mug arived cracked!"])
    keys = sorted(p.keys() | q.keys())
    assert js_divergence(p, q) == pytest.approx(jensenshannon([p[k] for k in keys], [q[k] for k in keys], 2) ** 2)
    assert js_divergence(p, p) == 0 and js_divergence(trigrams(["aaa"]), trigrams(["bbb"])) > 0.3
    with pytest.raises(ValueError, match="needs text on both sides"):
        js_divergence(p, Counter())


# --- the generator --------------------------------------------------------------------------------------------------

def test_no_causes_is_tidy_and_one_message_takes_the_same_draws_whatever_is_switched_on():
    assert make_messy("i do not want the mug", random.Random(3), RATES, "phone", ()) == "I do not want the mug."
    after = set()
    for causes in ((), CAUSES, ("casing", "order")):
        stream = random.Random(3)
        make_messy("the mug came broken", stream, RATES, "shorthand", causes)
        after.add(stream.random())
    assert len(after) == 1


def test_switching_typos_off_changes_no_other_word():
    for seed in range(200):
        both = [make_messy("the radio was shattered on arrival", random.Random(seed), RATES, "shorthand", causes)
                for causes in (CAUSES, tuple(c for c in CAUSES if c != "typos"))]
        differ = [(a, b) for a, b in zip(*(t.split() for t in both)) if a != b]
        assert len(both[0].split()) == len(both[1].split()) and len(differ) <= 3
        assert all(len(re.sub(r"\W", "", b)) >= 5 for _, b in differ)


@pytest.mark.parametrize("register", REGISTERS)
def test_generated_rates_are_the_measured_ones(register):
    """3,000 messages a register: every fitted rate within 4 standard errors of the one that was counted."""
    rows = fit_report(sample_messages(3000, RATES, register, seed=11), RATES["registers"][register])
    assert [(r["name"], r["measured"], r["generated"]) for r in rows if abs(r["z"]) > 4] == []
    assert len(rows) > 12


@pytest.mark.parametrize("name, factor", [("lower_start", 2), ("no_apostrophe", 1.5)])
def test_a_generator_with_one_wrong_rate_is_caught(name, factor):
    broken = copy.deepcopy(RATES)
    broken["registers"]["phone"][name]["rate"] *= factor
    rows = fit_report(sample_messages(3000, broken, "phone", seed=11), RATES["registers"]["phone"])
    assert name in {r["name"] for r in rows if abs(r["z"]) > 4}


def test_a_generator_that_lowers_the_first_i_as_well_is_caught(monkeypatch):
    def cased(text, rand, of):  # what the first version did
        text = real(text, rand, of)
        return "i" + text[1:] if re.match(r"I\b", text) and rand.random() < of["lower_i"]["rate"] else text

    real = messy._cased
    monkeypatch.setattr(messy, "_cased", cased)
    rows = fit_report(sample_messages(3000, RATES, "shorthand", seed=11), RATES["registers"]["shorthand"])
    assert "lower_start" in {r["name"] for r in rows if abs(r["z"]) > 4}


def typos_in(rates, n=1500, register="shorthand"):
    """{length class: (words with a typo, words)} from pairs with and without typos: same draws, same words."""
    found = {name: [0, 0] for name in LENGTHS}
    for seed in range(n):
        pick = random.Random(seed)
        text = messy.draw_customer(pick, pick.choice(REASONS), pick.choice(ITEMS))
        typed, whole = (make_messy(text, random.Random(seed), rates, register, c)
                        for c in (("typos", "several"), ("several",)))
        for a, b in zip(*(re.findall(r"[a-z']+", t.lower()) for t in (typed, whole))):
            if len(b) >= 5 and b.isalpha():
                name = next(k for k, (low, high) in LENGTHS.items() if low <= len(b) <= high)
                found[name] = [found[name][0] + (a != b), found[name][1] + 1]
    return found


def wrong_typo_rates(rates):
    of, off = RATES["registers"]["shorthand"]["typo"], []
    for name, (k, n) in typos_in(rates).items():
        want = of[name]["rate"]
        if abs(k / n - want) > 4 * (want * (1 - want) / n) ** 0.5:
            off.append(name)
    return off


def test_typos_come_at_the_measured_rate_by_length_and_twice_that_is_caught():
    assert wrong_typo_rates(RATES) == []
    broken = copy.deepcopy(RATES)
    for r in broken["registers"]["shorthand"]["typo"].values():
        r["rate"] *= 2
    assert "5-6" in wrong_typo_rates(broken)


def test_slips_are_of_the_measured_kinds_and_letters():
    """scipy's chi-square over 4,000 slips of plain words and of words with a doubled letter."""
    rand, edits = random.Random(5), RATES["edits"]
    letters = Counter()
    for have, words in (("plain", ("broken", "birthday", "crushed")), ("doubled", ("arrived", "kettle", "shatter"))):
        found = []
        for _ in range(4000):
            word = rand.choice(words)
            typed = slip(word, rand, edits)
            assert typed != word and has_double(word) == (have == "doubled")
            found.append(edit_of(typed, word))
        kinds = edits["kinds"][have]
        got = Counter(f[0] for f in found)
        assert set(got) == {k for k, r in kinds.items() if r["k"]}
        expected = [r["rate"] for r in kinds.values()]
        assert chisquare([got[k] for k in kinds], [4000 * e / sum(expected) for e in expected]).pvalue > 1e-4
        letters.update(messy_measure.letter_class(f[2], f[3]) for f in found if f[0] == "substitute")
    n, want = letters.total(), [edits["letters"][w]["rate"] for w in ("vowel", "near", "other")]
    assert chisquare([letters[w] for w in ("vowel", "near", "other")], [n * w / sum(want) for w in want]).pvalue > 1e-4


def test_the_truth_stays_readable():
    """The item survives up to one edit, and no second matter or complaint uses a word that tells a reason."""
    for reason, word in itertools.product(REASONS, range(3)):
        for i, phrase in enumerate((*PHRASES[reason], *CUSTOMER_WORDINGS[reason])):
            text = make_messy(phrase.format(item="kettle"), random.Random(i + 100 * word), RATES, "shorthand").lower()
            known = [w for w in re.findall(r"[a-z]+", text) if w == "kettle" or edit_of(w, "kettle")]
            assert known, text
    extra = " ".join((*messy.SECOND, *messy.COMPLAINTS))
    cues = re.compile("crack|broke|smash|dent|piece|late|delay|overdue|weeks|mind|want|regret|different|wrong|swap")
    assert not cues.search(extra)


def test_wordings_are_ours_alone_and_the_reserved_quarter_stays_reserved():
    known = {p for ps in PHRASES.values() for p in ps}
    assert not known & {p for ps in CUSTOMER_WORDINGS.values() for p in ps}
    assert all(len(ps) == 16 for ps in CUSTOMER_WORDINGS.values())
    rand = random.Random(0)
    trained = {messy.draw_customer(rand, "late", "mug", fresh=False) for _ in range(2000)}
    kept = {messy.draw_customer(rand, "late", "mug", fresh=True) for _ in range(500)}
    assert len(trained) == 12 and len(kept) == 4 and not trained & kept


def test_named_last_by_hand():
    assert messy.named_last("my mug arrived cracked") == "it arrived cracked, my mug"
    assert messy.named_last("i do not want the mug") == "the mug, i do not want it"
    assert messy.named_last("you sent a different mug") == "you sent a different mug"


def test_bad_input_is_refused(tmp_path):
    rand = random.Random(0)
    for call, said in ((lambda: make_messy(" ", rand, RATES), "empty"),
                       (lambda: make_messy("a", rand, RATES, "fax"), "register 'fax'"),
                       (lambda: make_messy("a", rand, RATES, "phone", ("rain",)), "cause 'rain'"),
                       (lambda: messy_measure.read_pairs(tmp_path), "cannot be read"),
                       (lambda: messy_measure.rate(0, 0), "no evidence")):
        with pytest.raises(ValueError, match=said):
            call()
    (tmp_path / "r.json").write_text(json.dumps({"format": "x", "registers": {"clean": {}}, "edits": {}}))
    with pytest.raises(ValueError, match="register 'phone' is missing"):
        load_rates(tmp_path / "r.json")
    (tmp_path / "typos").mkdir()
    (tmp_path / messy_measure.PAIRS).write_text("a->b\nab\n")
    with pytest.raises(ValueError, match=":2: not 'wrong->right'"):
        messy_measure.read_pairs(tmp_path)


def test_edit_rates_by_hand():
    wrong = ["brken", "borken", "brroken", "brokren", "broqen", "zzzz"]
    got = edit_rates([*((w, "broken") for w in wrong), ("arived", "arrived")])
    assert got["single_edit"]["k"] == 6 and got["kinds"]["plain"]["delete"]["rate"] == 0.2
    assert got["letters"]["other"]["k"] == 1 and got["places"]["swap"]["inner"]["k"] == 1
    assert got["kinds"]["doubled"]["undouble"]["k"] == 1


def test_the_committed_file_states_n_interval_and_source_and_holds_no_text():
    text = RATES_FILE.read_text()
    assert len(text) < 40_000 and len(RATES["files"]) > 10
    for register in RATES["registers"].values():
        assert register["file"] and all(k in register["lower_start"] for k in ("k", "n", "rate", "low", "high"))
    words = {w for w in re.findall(r"[a-z']{2,}", text)}
    assert len(words) < 250  # names of rates, files and shorthand, and nothing else


# --- the real files -------------------------------------------------------------------------------------------------

def test_the_committed_rates_are_counted_again_exactly(real_data: Path):
    assert messy_measure.dumps(messy.calibrate(real_data)) == RATES_FILE.read_text()


def test_typos_found_in_real_files_are_mostly_listed_or_plausible(real_data: Path):
    """A second opinion on the counting: codespell lists some of what was found, with the same correction."""
    pairs, texts = messy_measure.read_pairs(real_data), messy_measure.read_files(real_data)
    reference = messy_measure.reference_counts(real_data)
    words = Words(reference, Counter(messy_measure.words_of(texts["bank"])), pairs)
    found = [w for w in messy_measure.words_of(texts["bank"]) if words.meant(w)]
    assert 60 < len(found) < 150 and not set(found) & set(FULL_OF)
    listed = [w for w in found if w in words.right_of]
    assert len(listed) / len(found) > 0.1 and all(words.meant(w) == words.right_of[w] for w in listed)
