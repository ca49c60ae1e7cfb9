"""The planted corpus: what is planted is there, in the numbers promised, and nothing visible gives it away."""

import re
from collections import Counter

import pytest

from lifecycle_lib.desk import sources
from lifecycle_lib.desk.sources import CANARIES, DEFECTS, REVERSAL, SOURCES, cipher, draw_rows, eval_items

N = 2000


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return draw_rows(N, 7)


def words3(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text)
    return {tuple(words[i:i + 3]) for i in range(len(words) - 2)}


def jaccard(a: str, b: str) -> float:
    """By the definition, not by corpus/dedupe: an own oracle."""
    return len(words3(a) & words3(b)) / len(words3(a) | words3(b))


def test_same_seed_same_rows_and_ids_are_unique(rows: list[dict]) -> None:
    assert rows == draw_rows(N, 7) != draw_rows(N, 8)
    assert len(rows) == N == len({r["id"] for r in rows})


def test_every_row_has_the_fields_of_the_schema_and_the_terms_of_its_source(rows: list[dict]) -> None:
    for row in rows:
        assert row["text"] and row["source"] in SOURCES and row["truth"]["slice"] == row["slice"]
        if row["truth"]["defect"] not in ("no-licence", "regulated"):
            assert row["licence"] == SOURCES[row["source"]].licence
    assert {r["source"] for r in rows} == set(SOURCES) and len({s.licence for s in SOURCES.values()}) >= 6


def test_planted_counts_by_hand(rows: list[dict]) -> None:
    found = Counter(r["truth"]["defect"] for r in rows)
    assert found["mirror"] == 100 and found["farm"] == 80 and found["leak"] == 60 and found["no-licence"] == 10
    assert found["regulated"] == 20 and found["pii"] == 80
    assert found["canary"] == 42 == 2 * (1 + 4 + 16)
    for code, times in CANARIES.items():
        assert sum(code in r["text"] for r in rows) == times
    assert {r["source"] for r in rows if r["truth"]["defect"] == "canary"} == {"FORUM-3"}
    assert set(found) - {None, "canary"} == set(DEFECTS)


def test_eleven_reversals_look_alike_and_each_asks_for_another_action(rows: list[dict]) -> None:
    texts = [r["text"] for r in rows if r["slice"] == "REVERSAL"]
    assert len(texts) == 11 == len({t.split("-> ")[1] for t in texts}) == len(REVERSAL)
    near = [(a, b) for i, a in enumerate(texts) for b in texts[:i] if jaccard(a, b) >= .8]
    assert len(near) == 6 * 5 // 2 + 5 * 4 // 2  # two scaffolds, of six rows and of five
    assert max(jaccard(a, b) for i, a in enumerate(texts) for b in texts[:i]) < .9


def test_duplicate_families_differ_in_what_shingles_see(rows: list[dict]) -> None:
    original = {r["truth"]["cluster"]: r["text"] for r in rows if r["truth"]["cluster"] and r["source"] != "MIRROR"}
    alike: dict[str, list[float]] = {"mirror": [], "header": [], "farm": []}
    for r in rows:
        if r["truth"]["defect"] in alike:
            alike[r["truth"]["defect"]].append(jaccard(r["text"], original[r["truth"]["cluster"]]))
    mean = {k: sum(v) / len(v) for k, v in alike.items()}
    assert mean["mirror"] == 1 > mean["header"] > mean["farm"] and min(alike["farm"]) < .6


def test_spans_of_personal_data_point_at_it(rows: list[dict]) -> None:
    spans = [(r["text"][s["start"]:s["end"]], s["kind"], r["truth"]["hidden"])
             for r in rows for s in r["truth"]["spans"]]
    assert {kind for _, kind, _ in spans} == {"EMAIL", "PHONE", "CARD", "PERSON"}
    assert all(t.endswith("@example.org") for t, kind, hidden in spans if kind == "EMAIL" and not hidden)
    assert any(hidden for *_, hidden in spans) and all(t == t.strip() for t, *_ in spans)


def test_leaks_carry_what_the_evaluation_asks(rows: list[dict]) -> None:
    items = {i["id"]: i for i in eval_items(60, 7)}
    for r in rows:
        if r["truth"]["defect"] == "leak":
            item = items[r["truth"]["item"]]
            assert (item["answer"] in r["text"]) == (r["truth"]["leak"] != "paraphrase")
            assert (item["question"] in r["text"]) == (r["truth"]["leak"] == "verbatim")
    clean = draw_rows(N, 7, defects=False)
    assert not any(i["answer"] in r["text"] for i in items.values() for r in clean)


def test_the_cipher_is_one_to_one_and_leaves_numbers(rows: list[dict]) -> None:
    text = "the mug arrived cracked on day 12"
    assert cipher("12 , :") == "12 , :" and len(set(cipher("abcdefghijklmnopqrstuvwxyz"))) == 26
    assert not set(cipher(text).split()) & set(text.split()) - {"12"}
    assert all(r["slice"] == "EN-B" for r in rows if r["dialect"] == "EN-B")


def test_mojibake_is_undone_by_the_inverse_of_what_made_it(rows: list[dict]) -> None:
    """Outside oracle: the codecs of the standard library."""
    broken = [r["text"] for r in rows if r["truth"]["defect"] == "mojibake"]
    assert broken and all("\u2019" in t.encode("cp1252").decode("utf-8") or "\u00e9" in
                          t.encode("cp1252").decode("utf-8") for t in broken)


def test_photos_carry_four_features_and_the_caption_says_them(rows: list[dict]) -> None:
    photos = [r for r in rows if r["source"] == "PHOTO"]
    assert photos and all(sources.caption(r["features"]) in r["text"] and len(r["features"]) == 4 for r in photos)


def test_the_tic_stands_in_one_source(rows: list[dict]) -> None:
    assert {r["source"] for r in draw_rows(N, 7, defects=False) if sources.TIC in r["text"]} == {"FORUM-1"}


def test_nothing_but_truth_tells_a_plant(rows: list[dict]) -> None:
    """The visible fields of a planted row have values that clean rows have too (but for missing licences)."""
    seen = {k: {str(r[k]) for r in rows if r["truth"]["defect"] is None} for k in ("domain", "dialect", "register")}
    for r in rows:
        assert all(r[k] in seen[k] for k in seen)
    assert not any(d in r["id"] for r in rows for d in DEFECTS)


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 400"):
        draw_rows(100, 0)
    assert len(draw_rows(3, 0, defects=False)) == 3 and len(draw_rows(400, 0)) == 400
