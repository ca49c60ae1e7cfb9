"""Dedupe: keys, near pairs against all pairs, clusters against scipy, keep-rules, protection, the diff of what went."""

import itertools

import numpy as np
import pytest
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from lifecycle_lib.core.seeds import rng
from lifecycle_lib.corpus import dedupe
from lifecycle_lib.corpus.dedupe import (
    bare_words,
    boilerplate,
    check_losses,
    choose,
    clusters_of,
    exact_clusters,
    jaccard,
    near_pairs,
    normalise,
    normalise_code,
    pairs_by_domain,
    removal_diff,
    shingles,
    strip_boilerplate,
    strip_header,
    tail,
)


def messages(n: int, seed: int = 0) -> list[str]:
    """Short messages from few words, every third an edit of an earlier one: all similarities occur."""
    draw = rng(seed, "messages")
    words = "my order parcel is late broken lost please refund return now the second again it was when will".split()
    out: list[str] = []
    for i in range(n):
        text = draw.choices(words, k=draw.randint(4, 14))
        if out and i % 3 == 0:
            text = draw.choice(out).split()
            for _ in range(draw.randrange(3)):
                text[draw.randrange(len(text))] = draw.choice(words)
        out.append(" ".join(text))
    return out


def all_pairs(texts, threshold, k, unit):
    sets = [shingles(t, k, unit) for t in texts]
    scored = ((i, j, jaccard(sets[i], sets[j])) for i, j in itertools.combinations(range(len(texts)), 2))
    return [p for p in scored if p[2] >= threshold]


# Keys

@pytest.mark.parametrize(("a", "b"), [
    ("Where is my ORDER?", "where is my order"),
    ("  two\tspaces \n here", "two spaces here"),
    ("cafe\u0301 order", "caf\u00e9 order"),
])
def test_normalise_looks_past_case_space_sign_and_accent_form(a, b):
    assert normalise(a) == normalise(b)


@pytest.mark.parametrize(("a", "b"), [
    ("refund in 14 days", "refund in 30 days"),
    ("fee $5", "fee 5%"),
    ("an extra €1 charge", "an extra £1 charge"),
    ("pay 1.50 now", "pay 150 now"),
    ("we refund", "we do not refund"),
    ("10² boxes", "102 boxes"),
])
def test_normalise_keeps_two_policies_apart(a, b):
    assert normalise(a) != normalise(b)
    assert len(exact_clusters([a, b])) == 0


def test_the_looser_key_merges_two_currencies():
    pair = ["Why an extra €1 charge?", "Why an extra £1 charge?"]
    assert exact_clusters(pair, key=bare_words) == [[0, 1]] and exact_clusters(pair) == []


def test_exact_clusters_by_hand():
    texts = ["A b.", "x", "a b", "X", "y", "a  B!"]
    assert exact_clusters(texts) == [[0, 2, 5], [1, 3]]
    assert exact_clusters(texts, key=str) == []


def test_header_variants_are_one_text():
    a = "From: Ann\nDate: 1 May\n\nWhere is my parcel?"
    b = "Subject: hello\nWhere is my parcel?"
    assert exact_clusters([a, b], key=lambda t: normalise(strip_header(t))) == [[0, 1]]
    assert strip_header("Refunds: 30 days\nDate: x") == "Refunds: 30 days\nDate: x"


def test_code_key_drops_comments_and_layout_only():
    assert normalise_code("x = 1  # one\n\n\nprint('# no comment')\n", "python") == "x = 1 print('# no comment')"
    assert normalise_code("SELECT a -- why\n FROM t /* two\nlines */", "sql") == "SELECT a FROM t"
    assert normalise_code("x = 1", "python") != normalise_code("x = 2", "python")
    with pytest.raises(ValueError, match="'cobol'"):
        normalise_code("x", "cobol")


def test_boilerplate_is_what_many_documents_repeat():
    texts = [f"Question {i}?\nSent from my phone.\nSent from my phone." for i in range(4)]
    texts.append("Sent from my phone. Why?")
    assert boilerplate(texts, min_documents=4) == {"sent from my phone"}  # twice in one document counts once
    assert strip_boilerplate(texts[0], {"sent from my phone"}) == "Question 0?"
    assert boilerplate(texts, 5, unit="sentence") == {"sent from my phone"} and boilerplate(texts, 5) == set()
    assert strip_boilerplate(texts[4], {"sent from my phone"}, unit="sentence") == "Why?"
    with pytest.raises(ValueError, match="'page'"):
        boilerplate(texts, 2, unit="page")


# Near pairs and clusters

@pytest.mark.parametrize(("threshold", "k", "unit"), [(0.5, 3, "char"), (0.8, 5, "char"), (0.6, 2, "word")])
def test_near_pairs_equal_the_comparison_of_all_pairs(threshold, k, unit):
    texts = messages(300)
    expected = all_pairs(texts, threshold, k, unit)
    assert len(expected) > 40
    assert near_pairs(texts, threshold, k, unit) == expected


def test_near_pairs_right_at_the_threshold_and_at_the_edges():
    pair = ["a b c d", "a b c e"]  # word 1-grams: 3 of 5
    assert near_pairs(pair, 0.6, k=1) == [(0, 1, 0.6)] and near_pairs(pair, 0.61, k=1) == []
    assert near_pairs([], 0.8) == [] and near_pairs(["one"], 0.8) == []
    assert near_pairs(["", "", "a"], 0.8) == [(0, 1, 1.0)]
    assert near_pairs(["same"] * 4, 0.9) == [(i, j, 1.0) for i, j in itertools.combinations(range(4), 2)]


def test_broken_search_of_one_band_loses_pairs(monkeypatch):
    texts = messages(300)
    expected = near_pairs(texts, 0.5, 3, "char")
    whole = dedupe.band_keys
    monkeypatch.setattr(dedupe, "band_keys", lambda *args: whole(*args)[:1])
    found = near_pairs(texts, 0.5, 3, "char")
    assert set(found) < set(expected) and len(found) < 0.7 * len(expected)


def test_clusters_equal_scipy_connected_components():
    draw = rng(0, "graph")
    for n, m in ((1, 0), (30, 10), (200, 150), (200, 400)):
        pairs = [(draw.randrange(n), draw.randrange(n), 0.9) for _ in range(m)]
        a, b = np.array([p[:2] for p in pairs], int).reshape(-1, 2).T
        _, labels = connected_components(coo_matrix((np.ones(m), (a, b)), (n, n)), directed=False)
        expected = [np.flatnonzero(labels == label).tolist() for label in dict.fromkeys(labels.tolist())]
        assert clusters_of(n, pairs) == [rows for rows in expected if len(rows) > 1]


def test_broken_union_without_transitivity_is_caught(monkeypatch):
    chain = [(4, 3), (3, 2), (2, 1), (1, 0)]
    assert clusters_of(5, chain) == [[0, 1, 2, 3, 4]]

    def forgets(parent, i, j):
        parent[max(i, j)] = min(i, j)

    monkeypatch.setattr(dedupe, "join", forgets)
    assert clusters_of(5, [(0, 2), (1, 2), (3, 4)]) != [[0, 1, 2], [3, 4]]


def test_thresholds_by_domain():
    pairs = [(0, 1, 0.7), (1, 2, 0.85), (2, 3, 1.0)]
    domains = ["spam", "spam", "policy", "policy"]
    assert pairs_by_domain(pairs, domains, {"spam": 0.6, "policy": 0.8}) == pairs
    assert pairs_by_domain(pairs, domains, {"spam": 0.6, "policy": 0.9}) == [pairs[0], pairs[2]]
    assert pairs_by_domain(pairs, domains, {"spam": 0.6, "policy": 1.1}) == [pairs[0]]
    with pytest.raises(ValueError, match="'policy' has no threshold"):
        pairs_by_domain(pairs, domains, {"spam": 0.6})


# Which copy stays

TEXTS = ["a b c d", "a b c", "a b c d e", "other text", "a b x"]
CLUSTER = [[0, 1, 2, 4]]


@pytest.mark.parametrize(("rule", "kept"), [("first", 0), ("shortest", 1), ("longest", 2), ("medoid", 0),
                                            ("hardest", 4)])
def test_keep_rules_by_hand(rule, kept):
    """Medoid, word 1-grams: the sums of similarities are 0 .75+.8+.4, 1 .75+.6+.5, 2 .8+.6+.333, 4 .4+.5+.333."""
    choice = choose(CLUSTER, TEXTS, rule, scores=[0.1, 0.2, 0.3, 9.0, 0.4], k=1)
    assert choice.kept == tuple(sorted([kept, 3]))
    assert [r.row for r in choice.removed] == [i for i in CLUSTER[0] if i != kept]
    for r in choice.removed:
        assert r.representative == kept
        assert r.jaccard == jaccard(shingles(TEXTS[r.row], 1, "word"), shingles(TEXTS[kept], 1, "word"))


def test_per_cluster_protection_and_nearest_representative():
    choice = choose(CLUSTER, TEXTS, "first", per_cluster=2, protect=[4], k=1)
    assert choice.kept == (0, 1, 3, 4)
    (gone,) = choice.removed
    assert (gone.row, gone.representative, gone.jaccard) == (2, 0, 4 / 5)
    assert choose(CLUSTER, TEXTS, "first", per_cluster=9).removed == ()
    assert choose([], TEXTS, "first").kept == (0, 1, 2, 3, 4)


def test_random_rule_is_even_and_fixed_by_the_seed():
    def pick(seed):
        return choose([[0, 1, 2, 3]], ["t"] * 4, "random", seed=seed).kept[0]

    picks = [pick(s) for s in range(400)]
    assert picks == [pick(s) for s in range(400)]
    assert all(70 <= picks.count(i) <= 130 for i in range(4))


@pytest.mark.parametrize(("arguments", "message"), [
    ({"rule": "best"}, "rule='best'"),
    ({"rule": "first", "per_cluster": 0}, "per_cluster=0"),
    ({"rule": "hardest"}, "one score a text"),
    ({"rule": "hardest", "scores": [1.0]}, "one score a text"),
    ({"rule": "first", "clusters": [[0, 1], [1, 2]]}, "row 1 is in two clusters"),
])
def test_choose_names_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        choose(**({"clusters": CLUSTER, "texts": TEXTS} | arguments))


# What went

def test_removal_diff_puts_the_smallest_slice_first_and_the_check_flags_it():
    rows = [{"slice": "ORDER"}] * 20 + [{"slice": "REVERSAL"}] * 4
    texts = [f"order number {i} is late" for i in range(10)] * 2 + ["reverse it please now"] * 3 + ["undo the refund"]
    choice = choose(exact_clusters(texts), texts, "first")
    small, large = removal_diff(rows, choice, by="slice")
    assert (small.slice, small.before, small.removed, small.kept, small.lost_share) == ("REVERSAL", 4, 2, 2, 0.5)
    assert small.pairs == ((20, 21, 1.0), (20, 22, 1.0))
    assert (large.slice, large.removed) == ("ORDER", 10)
    assert check_losses([small, large], 0.5) == []
    assert check_losses([small, large], 0.4) == [small, large]
    guarded = choose(exact_clusters(texts), texts, "first", protect=tail([r["slice"] for r in rows], 5))
    small, _ = removal_diff(rows, guarded, by=lambda row: row["slice"])
    assert small.removed == 0
    for bad in (lambda: removal_diff([], choice, "slice"), lambda: check_losses([], 0.1),
                lambda: check_losses([small], 1.5)):
        with pytest.raises(ValueError, match="no rows|empty diff|outside 0 to 1"):
            bad()


def test_every_row_is_kept_or_removed_once_and_every_representative_is_kept():
    texts = messages(200)
    clusters = clusters_of(len(texts), near_pairs(texts, 0.6, 2, "word"))
    for rule in dedupe.RULES:
        choice = choose(clusters, texts, rule, per_cluster=2, scores=list(range(200)), k=2)
        assert sorted([*choice.kept, *(r.row for r in choice.removed)]) == list(range(200))
        assert {r.representative for r in choice.removed} <= set(choice.kept)
        assert len(choice.removed) == sum(max(0, len(c) - 2) for c in clusters)
