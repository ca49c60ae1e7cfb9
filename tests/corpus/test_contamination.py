"""Contamination: n-grams by hand, every screen against a quadratic search, the registry, and broken screens."""

import json
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest, mannwhitneyu

from lifecycle_lib.core.records import write_jsonl
from lifecycle_lib.corpus import screens
from lifecycle_lib.corpus.contamination import (
    LEAKS,
    Registry,
    audit,
    detection,
    ngram_table,
    plant,
    read_items,
    stream,
)
from lifecycle_lib.corpus.dedupe import bare_words
from lifecycle_lib.corpus.screens import Screen, Words, make_set
from lifecycle_lib.desk.documents import draw_documents

ROOT = Path(__file__).parents[2]
TEN = "one two three four five six seven eight nine ten"


def random_text(random_: random.Random, n: int, vocabulary: int = 6) -> str:
    return " ".join(f"w{random_.randrange(vocabulary)}" for _ in range(n))


def registry_of(tmp_path, items, **options) -> Registry:
    registry = Registry(tmp_path / "registry.json", {})
    registry.add(make_set("own", items, **options))
    return registry


def scores(text: str, *sets) -> dict[tuple[str, str, str], float]:
    return {(m.item, m.part, m.screen): m.score for m in Screen(sets).match(text)}


# ---- by hand -----------------------------------------------------------------------------------------------

def test_by_hand():
    """Ten words hold three 8-grams, none of 13, and eight 3-shingles; the row below has words 2 to 9: one 8-gram, six
    shingles."""
    own = make_set("own", [{"id": "a", "prompt": TEN}])
    assert own.unscreened() == {"exact": 0, "8-gram": 0, "13-gram": 1, "fuzzy": 0}
    row = "Well, Two three FOUR five, six seven eight nine! eleven"
    assert scores(row, own) == {("a", "prompt", "8-gram"): 1 / 3, ("a", "prompt", "fuzzy"): 6 / 8}
    whole = scores(f"he said: {TEN}.", own)
    assert whole == {("a", "prompt", s): 1.0 for s in ("exact", "8-gram", "fuzzy")}


def test_run_hashes_are_the_polynomial():
    words = Words("a b c a b")
    h = [screens._word_hash(w) for w in "abcab"]
    want = [(h[i] * screens.BASE + h[i + 1]) % 2**64 for i in range(4)]
    assert words.runs(2).tolist() == want == [words.run(i, 2) for i in range(4)]
    assert want[0] == want[3] and len(set(want)) == 3
    assert len(words.runs(6)) == 0 and words.run(4, 2) is None


def test_ngram_table_by_hand():
    table = ngram_table([TEN, "one two"], ["x two three four five y"], ns=(2, 4, 5))
    assert [(t["items_hit"], t["rows_hit"], t["too_short"]) for t in table] == [(1, 1, 0), (1, 1, 1), (0, 0, 1)]
    assert table[0]["interval"] == pytest.approx(tuple(binomtest(1, 2).proportion_ci(method="wilson")))
    with pytest.raises(ValueError, match="no evidence"):
        ngram_table([], ["a"])


# ---- properties and the quadratic search ---------------------------------------------------------------------

def test_a_planted_item_is_always_found():
    random_ = random.Random(0)
    items = [{"id": str(i), "prompt": random_text(random_, random_.randint(5, 40), 300)} for i in range(60)]
    screen = Screen([make_set("own", items)])
    for item in items:
        text = item["prompt"].upper().replace(" ", random_.choice([" ", "  ", ", ", "\n", " - "]))
        row = f"{random_text(random_, 20, 300)} {text}; {random_text(random_, 20, 300)}"
        found = {(m.item, m.screen) for m in screen.match(row) if m.score == 1}
        assert (item["id"], "exact") in found and (item["id"], "fuzzy") in found or len(item["prompt"].split()) < 6


def grams(text: str, n: int) -> set[tuple[str, ...]]:
    words = bare_words(text).split()
    return {tuple(words[i:i + n]) for i in range(len(words) - n + 1)}


def naive(items, row: str, ngrams, max_items: int) -> dict:
    """Every item against the row, word by word."""
    out = {}
    parts = [(x["id"], k, t) for x in items for k, t in x.items() if k != "id"]
    for n in (3, *ngrams):
        owners: dict = {}
        for item, _, text in parts:
            for g in grams(text, n):
                owners.setdefault(g, set()).add(item)
        for item, part, text in parts:
            rare = {g for g in grams(text, n) if len(owners[g]) <= max_items}
            shared = rare & grams(row, n)
            if shared and (n != 3 or len(rare) >= 4):
                out[item, part, "fuzzy" if n == 3 else f"{n}-gram"] = len(shared) / len(rare)
    for item, part, text in parts:
        same = {i for i, _, t in parts if bare_words(t) == bare_words(text)}
        inside = f" {bare_words(text)} " in f" {bare_words(row)} "
        if len(same) <= max_items and (inside if len(text.split()) >= 5 else bare_words(text) == bare_words(row)):
            out[item, part, "exact"] = 1.0
    return out


@pytest.mark.parametrize("seed", range(4))
def test_against_quadratic_search(seed):
    """A vocabulary of four words makes every kind of repeat, inside items, between items and with the rows."""
    random_ = random.Random(seed)
    items = [{"id": str(i), "prompt": random_text(random_, random_.randint(1, 14), 4),
              "answer": random_text(random_, random_.randint(1, 9), 4)} for i in range(25)]
    own = make_set("own", items, ngrams=(4, 6), max_items=2)
    screen = Screen([own])
    for _ in range(20):
        row = random_text(random_, random_.randint(1, 30), 4)
        ours = {(m.item, m.part, m.screen): m.score for m in screen.match(row)}
        assert ours == pytest.approx(naive(items, row, (4, 6), 2)), row


def test_lower_case_on_one_side_only_is_caught(monkeypatch):
    own = make_set("own", [{"id": "a", "prompt": TEN}])
    assert scores(TEN.upper(), own)
    monkeypatch.setattr(screens, "bare_words", lambda text: " ".join(text.split()))  # rows keep their case
    assert not scores(TEN.upper(), own)


def test_word_counts_that_forget_order_are_caught(monkeypatch):
    """With BASE 1 a run's hash is the sum of its words: any order would do."""
    own, swapped = [{"id": "a", "prompt": TEN}], TEN.replace("nine ten", "ten nine")
    assert ("a", "prompt", "exact") not in scores(swapped, make_set("own", own))
    monkeypatch.setattr(screens, "BASE", 1)
    monkeypatch.setattr(screens, "INVERSE", 1)
    assert ("a", "prompt", "exact") in scores(swapped, make_set("own", own))


# ---- templates -----------------------------------------------------------------------------------------------

def test_a_layout_is_no_leak():
    layout = "please decide this return by the policy below and answer in strict json order number"
    items = [{"id": str(i), "prompt": f"{layout} {i} item{i} colour{i} day{i} shop{i} case{i}"} for i in range(10)]
    kept = make_set("own", items, max_items=3)
    assert kept.dropped["template"] > 0
    assert scores(f"{layout} 77 other words", kept) == {}
    loose = make_set("own", items, max_items=10)
    assert scores(f"{layout} 77 other words", loose) != {}
    assert scores(items[4]["prompt"], kept)["4", "prompt", "exact"] == 1
    only_layout = make_set("own", [{"id": str(i), "prompt": layout} for i in range(10)])
    assert only_layout.unscreened() == {"exact": 10, "8-gram": 10, "13-gram": 10, "fuzzy": 10}


def test_background_is_no_leak():
    items = [{"id": "a", "prompt": TEN}, {"id": "b", "prompt": "the quick brown fox jumps over the lazy dog again"}]
    own = make_set("own", items, background=[f"in clean text too: {TEN}"])
    assert own.dropped["background"] == 11  # 8 shingles and 3 8-grams
    assert scores(TEN, own) == {} and scores(items[1]["prompt"], own)


# ---- registry ------------------------------------------------------------------------------------------------

@pytest.fixture
def made(tmp_path):
    write_jsonl(tmp_path / "evals" / "own.jsonl", [{"id": "a", "prompt": TEN, "answer": "yes"}])
    registry = Registry(tmp_path / "evals" / "registry.json", {})
    registry.add(make_set("own", read_items(tmp_path / "evals" / "own.jsonl"),
                          canaries=["canary 26b5c67b 86b7 4d0c"]), tmp_path / "evals" / "own.jsonl")
    registry.write()
    return tmp_path / "evals"


def test_round_trip_without_the_words(made):
    registry = Registry.read(made / "registry.json")
    text = (made / "registry.json").read_text()
    assert "seven" not in text and "26b5c67b" not in text and registry.sets["own"].file == "own.jsonl"
    report = audit([{"id": "r1", "text": "clean"}, {"id": "r2", "text": TEN}], registry, ["own"])
    assert report["contaminated"] and report["rows_hit"] == 1 and report["n_rows"] == 2
    assert {(h["screen"], h["row"], h["id"], h["rows"]) for h in report["hits"]} == {
        ("exact", 2, "r2", 1), ("8-gram", 2, "r2", 1), ("fuzzy", 2, "r2", 1)}
    exact = report["sets"]["own"]["screens"]["exact"]
    assert (exact["items_hit"], exact["n"]) == (1, 1) and exact["interval"][0] > 0.2
    canary = audit([{"text": "x Canary 26b5c67b-86b7-4d0c y"}], registry)
    assert canary["contaminated"] and canary["sets"]["own"]["screens"]["canary"]["items_hit"] == 1
    short = audit([{"text": "two three four five six seven eight nine"}], registry)  # one 8-gram: overlap, no verdict
    assert not short["contaminated"] and short["hits"]


@pytest.mark.parametrize(("damage", "message"), [
    (lambda f: (f / "own.jsonl").write_text('{"id": "a", "prompt": "new", "answer": "yes"}\n'), "changed since"),
    (lambda f: (f / "own.jsonl").unlink(), "is gone"),
    (lambda f: (f / "registry.json").unlink(), "cannot be read"),
    (lambda f: (f / "registry.json").write_text("{}"), "not a registry"),
    (lambda f: (f / "registry.json").write_text((f / "registry.json").read_text().replace('_items": 1', '_items": 2')),
     "changed by hand"),
    (lambda f: (f / "other.jsonl").write_text('{"prompt": "x"}\n'), "other.jsonl: this evaluation set is not in"),
])
def test_what_stops_an_audit(made, damage, message):
    damage(made)
    with pytest.raises(ValueError, match=message):
        Registry.read(made / "registry.json").check(folder=made)


def test_refusals(made, tmp_path):
    registry = Registry.read(made / "registry.json")
    for call, message in [
            (lambda: audit([{"text": "x"}], registry, ["gone"]), "'gone' is not registered"),
            (lambda: audit([], registry), "no rows"), (lambda: audit([{"id": "q"}], registry), "row 1"),
            (lambda: audit([{"text": "x"}], registry, ngrams=(9,)), "holds"),
            (lambda: audit([{"text": "x"}], registry, fuzzy=0), "fuzzy=0"),
            (lambda: audit([{"text": "x"}], Registry(tmp_path / "r.json", {})), "no evaluation set"),
            (lambda: make_set("s", []), "no items"), (lambda: make_set("s", [{"id": "a"}, {"id": "a"}]), "twice"),
            (lambda: make_set("s", [{"id": "a", "p": TEN}], ngrams=(3,)), "ngrams"),
            (lambda: make_set("s", [{"id": "a", "p": TEN}], canaries=["a b"]), "canary"),
            (lambda: registry.suspect("a b", "w"), "2 words"), (lambda: plant([], "odd", []), "kind='odd'"),
            (lambda: detection([{"id": "a", "prompt": TEN}], {}, ["x"]), "give rows")]:
        with pytest.raises(ValueError, match=message):
            call()


def test_a_suspect_blocks_the_next_ingestion(made):
    leak = "someone posted that the answer to case twelve is P-4 and eligible"
    registry = Registry.read(made / "registry.json")
    assert not audit([{"text": f"quote: {leak}"}], registry)["contaminated"]
    registry.suspect(leak, "seen in FORUM-2")
    registry.suspect(leak, "seen in FORUM-2")
    registry.suspect("another text that somebody has seen leaking", "seen in CHAT")
    registry.write()
    again = Registry.read(made / "registry.json")
    assert again.sets["suspects"].n_items == 2
    report = audit([{"text": "clean"}, {"text": f"quote: {leak.upper()}!"}], again)
    assert report["contaminated"] and report["hits"][0]["item"].startswith("seen in FORUM-2")


def test_the_committed_registry_is_of_the_committed_files():
    registry = Registry.read(ROOT / "data" / "evals" / "registry.json")
    registry.check(["policy_cases"], ROOT / "data" / "evals")
    items = read_items(ROOT / "data" / "evals" / "policy_cases.jsonl")
    fresh = make_set("policy_cases", items)
    assert [p.as_json() for p in fresh.parts] == [p.as_json() for p in registry.sets["policy_cases"].parts]
    rows = [{"text": d["text"]} for d in draw_documents(300, 100)]
    report = audit(rows, registry)
    assert not report["contaminated"]  # the desk's training text shares layouts, no item
    leaked = audit([*rows, {"text": items[7]["prompt"] + items[7]["answer"]}], registry)
    assert leaked["contaminated"] and leaked["rows_hit"] == 1


# ---- streaming and detection -----------------------------------------------------------------------------------

def test_stream_names_file_and_line(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text('{"id": "a", "text": "x", "more": "y"}\n{"text": "z", "more": "w"}\n')
    assert [r for r, _ in stream(path, ["text", "more"])] == [{"id": "a", "text": "x y"}, {"id": 2, "text": "z w"}]
    assert list(stream(path))[-1][1] == path.stat().st_size
    path.write_text('{"text": "x"}\n\n{"text": "y"}')  # a blank line holds nothing
    assert [r["id"] for r, _ in stream(path)] == [1, 3]
    for bad in ("{", "[]", '{"text": 3}', "3", '{"text": "x", "text": "y"}', '{"text": NaN}', "\0"):
        path.write_text('{"text": "x"}\n' + bad + "\n")
        with pytest.raises(ValueError, match=r"c\.jsonl:2"):
            list(stream(path))
    path.write_text('{"prompt": "x"}\n')
    with pytest.raises(ValueError, match="--field"):
        list(stream(path))
    path.write_bytes(b"\xef\xbb\xbf" + b'{"text": "x"}\n')
    assert [r["text"] for r, _ in stream(path)] == ["x"]
    for raw, what in ((b"", "empty"), ('{"text": "x"}'.encode("utf-16"), "UTF-16"), (b"\x1f\x8b\x08\0", "gzip")):
        path.write_bytes(raw)
        with pytest.raises(ValueError, match=what):
            list(stream(path))
    with pytest.raises(ValueError, match="is a folder"):
        list(stream(tmp_path))


def test_memory_follows_the_registry_not_the_rows(tmp_path):
    registry = registry_of(tmp_path, [{"id": "a", "prompt": TEN}])

    def peak(n: int) -> int:
        tracemalloc.start()
        audit(({"text": f"{TEN} row {i} of a corpus with its own words"} for i in range(n)), registry)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size
    screens._word_hash.cache_clear()
    peak(900)  # fills the cache of words
    assert peak(900) < peak(100) + 100_000


def test_detection_tells_leaks_apart():
    items = read_items(ROOT / "data" / "evals" / "policy_cases.jsonl")[:60]
    docs = [d["text"] for d in draw_documents(300, 101)]
    leaks = {kind: plant(items, kind, docs[:100], seed=1) for kind in LEAKS}
    result = detection(items, leaks, docs[100:])
    assert result["verbatim"]["exact"]["rate"] == 1
    assert result["paraphrase"]["exact"]["rate"] == 0 < result["paraphrase"]["fuzzy"]["rate"]
    assert result["answer_only"]["13-gram"]["rate"] == 0 < result["answer_only"]["exact"]["rate"]
    for screens_ in result.values():
        for name, r in screens_.items():
            assert r["false_alarms"] <= 0.01 * 200, name
            assert r["found"] == round(r["rate"] * r["n"])


def test_auc_is_mann_whitney():
    items = [{"id": "a", "prompt": TEN, "answer": "eleven twelve"}]
    random_ = random.Random(3)
    words = TEN.split() + ["x"] * 10
    leaks = [" ".join(random_.sample(words, 12)) for _ in range(40)]
    clean = [" ".join(random_.sample(words, 6)) for _ in range(50)]
    result = detection(items, {"mixed": leaks}, clean)["mixed"]["words"]
    weight = {w: 1.0 for w in (TEN + " eleven twelve").split()}
    score = [[sum(weight.get(w, 0) for w in set(t.split())) / 12 for t in texts] for texts in (leaks, clean)]
    assert result["auc"] == pytest.approx(mannwhitneyu(*score).statistic / (40 * 50))
    alarms = np.array([c[1] for c in result["curve"]])
    assert (np.diff(alarms) <= 0).all() and alarms[0] == 1 and alarms[-1] == 0


def test_json_of_a_report_is_json(tmp_path):
    report = audit([{"text": TEN}], registry_of(tmp_path, [{"id": "a", "prompt": TEN}]))
    assert json.loads(json.dumps(report))["contaminated"] is True
