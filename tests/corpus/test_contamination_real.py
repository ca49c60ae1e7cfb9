"""Contamination on public files: GSM8K train against test by n, BANKING77's own leak, HumanEval against MBPP."""

import csv
import gzip
import json

import pytest

from lifecycle_lib.corpus.contamination import Registry, audit, ngram_table
from lifecycle_lib.corpus.screens import make_set


def jsonl(path):
    with (gzip.open(path, "rt") if path.suffix == ".gz" else open(path, encoding="utf-8")) as file:
        return [json.loads(line) for line in file]


def test_gsm8k_by_n(real_data):
    """The trimmed train file is the first 2,000 rows and every later row that shares an 8-gram with the test file, so
    from 8 on the table is that of the whole train file, and below 8 a lower bound. Lower-case words, questions only."""
    train = [r["question"] for r in jsonl(real_data / "math" / "gsm8k_train_trim.jsonl")]
    test = [r["question"] for r in jsonl(real_data / "math" / "gsm8k_test.jsonl")]
    assert (len(train), len(test)) == (2067, 1319)
    table = {t["n"]: t for t in ngram_table(test, train)}
    assert table[8]["rows_hit"] == 91  # the number that comes with the file
    assert {n: t["items_hit"] for n, t in table.items()} == {
        5: 655, 6: 293, 7: 132, 8: 77, 9: 26, 10: 9, 11: 6, 12: 3, 13: 3, 14: 3, 15: 3}
    assert not any(t["too_short"] for t in table.values())
    low, high = table[8]["interval"]
    assert low < 77 / 1319 < high and high - low < 0.03


@pytest.fixture
def banking(real_data):
    def texts(name):
        with open(real_data / "support" / name, encoding="utf-8", newline="") as file:
            return [row["text"] for row in csv.DictReader(file)]
    return texts("banking77_train.csv"), texts("banking77_test.csv")


def test_banking77_leaks(banking, tmp_path):
    """25 test rows are a train row, but for case and punctuation. A row that holds a shorter test item counts as exact
    too, so the audit finds those 25 and more."""
    train, test = banking
    registry = Registry(tmp_path / "registry.json", {})
    registry.add(make_set("banking77", [{"id": str(i), "prompt": t} for i, t in enumerate(test)]))
    report = audit(({"text": t} for t in train), registry)
    exact = {int(h["item"]) for h in report["hits"] if h["screen"] == "exact"}
    from lifecycle_lib.corpus.dedupe import bare_words
    known = {bare_words(t) for t in train}
    same = {i for i, t in enumerate(test) if bare_words(t) in known}
    assert len(same) == 25 and same <= exact and len(exact) == 158
    inside = [i for i in exact - same if len(test[i].split()) >= 5]
    assert all(any(f" {bare_words(test[i])} " in f" {t} " for t in known) for i in inside[:10])


def test_code_sets_share_little(real_data):
    human = [r["prompt"] for r in jsonl(real_data / "code" / "HumanEval.jsonl.gz")]
    mbpp = [f"{r['text']} {r['code']}" for r in jsonl(real_data / "code" / "mbpp.jsonl")]
    table = {t["n"]: t for t in ngram_table(human, mbpp, ns=(5, 8, 13))}
    assert table[13]["items_hit"] <= table[8]["items_hit"] <= table[5]["items_hit"]
    assert table[13]["n_items"] == 164
