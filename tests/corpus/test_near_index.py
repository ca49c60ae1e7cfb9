"""The index for large corpora: the same clusters as the plain search, from memory or a file, and what it counts."""

import numpy as np
import pytest

from lifecycle_lib.core.records import write_jsonl
from lifecycle_lib.core.seeds import rng
from lifecycle_lib.corpus import near_index
from lifecycle_lib.corpus.dedupe import clusters_of, jaccard, near_pairs, shingles
from lifecycle_lib.corpus.minhash import MinHash
from lifecycle_lib.corpus.near_index import JsonlTexts, near_clusters


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("LIFECYCLE_QUIET", "1")


def rows(n: int) -> list[str]:
    """Random letters, so unrelated rows are far apart; a third copy earlier rows with 0 to 6 letters changed."""
    draw = rng(0, "rows")
    out: list[str] = []
    for _ in range(n):
        text = draw.choices("abcdefgh é", k=draw.randint(0, 80))
        if out and draw.random() < 0.33:
            text = list(draw.choice(out))
            for _ in range(draw.randrange(7) if text else 0):
                text[draw.randrange(len(text))] = "z"
        out.append("".join(text))
    return out


def test_clusters_and_edges_are_those_of_the_plain_search():
    texts = rows(1200)
    found = near_clusters(texts, 0.6)
    expected = clusters_of(len(texts), near_pairs(texts, 0.6, unit="char"))
    assert found.clusters() == expected and len(expected) > 50
    assert clusters_of(len(texts), found.edges.tolist()) == expected  # the edges alone say the same
    assert len(found.edges) == sum(len(c) - 1 for c in expected)  # a forest
    for (i, j), value in zip(found.edges.tolist(), found.jaccards):
        assert value >= 0.6 and value == jaccard(shingles(texts[i], 5, "char"), shingles(texts[j], 5, "char"))
    assert found.beyond_window == 0 and found.candidates >= found.compared >= len(found.edges) / 2


def test_block_size_does_not_matter_and_a_file_gives_the_same(tmp_path, monkeypatch):
    texts = rows(400)
    one = near_clusters(texts, 0.7)
    monkeypatch.setattr(near_index, "BLOCK_CHARACTERS", 200)
    write_jsonl(tmp_path / "rows.jsonl", [{"id": str(i), "text": t} for i, t in enumerate(texts)])
    two = near_clusters(JsonlTexts(tmp_path / "rows.jsonl"), 0.7, folder=tmp_path)
    assert np.array_equal(one.labels, two.labels) and np.array_equal(one.edges, two.edges)
    assert list(tmp_path.iterdir()) == [tmp_path / "rows.jsonl"]  # the band keys are gone


def test_many_copies_cost_one_link_each_and_no_comparison():
    texts = ["the very same text"] * 5000 + ["another one entirely"]
    found = near_clusters(texts, 0.8)
    assert found.clusters() == [list(range(5000))] and len(found.edges) == 4999 and found.candidates == 0


def test_a_bucket_beyond_the_window_is_counted():
    texts = [f"thank you for your order number {i:04d} it is on its way to you now" for i in range(60)]
    whole = near_clusters(texts, 0.6)
    assert whole.clusters() == [list(range(60))] and whole.beyond_window == 0
    assert near_clusters(texts, 0.6, window=3).beyond_window > 0


def test_words_other_seeds_and_a_single_row():
    texts = ["one two three four", "one two three four five", "none of these", ""]
    assert near_clusters(texts, 0.7, MinHash(k=1, unit="word", seed=5)).clusters() == [[0, 1]]
    assert near_clusters(["alone"], 0.7).clusters() == []


def test_bad_input_is_named(tmp_path):
    with pytest.raises(ValueError, match="no texts"):
        near_clusters([], 0.8)
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n{"text": 3}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"rows.jsonl:2: no field"):
        list(JsonlTexts(path))
    assert JsonlTexts(path)[0] == "fine"
    with pytest.raises(ValueError, match=r"rows.jsonl:2: no field"):
        JsonlTexts(path)[1]
