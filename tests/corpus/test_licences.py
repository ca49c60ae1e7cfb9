"""SPDX expressions as policy tags: by hand, the lattice laws, license-expression as the judge of equivalence."""

from __future__ import annotations

import json
import re

import license_expression
import pytest

from lifecycle_lib.core.records import read_jsonl
from lifecycle_lib.core.seeds import rng
from lifecycle_lib.corpus import licences
from lifecycle_lib.corpus.licences import (
    TABLE,
    UNKNOWN,
    Policy,
    asks_no_more,
    choice,
    join,
    join_options,
    policy,
    prune,
)


def tags(licence: str) -> set[frozenset[str]]:
    return set(policy().parse(licence).terms)


def options(*some: str) -> set[frozenset[str]]:
    return {frozenset(o.split()) for o in some}



@pytest.mark.parametrize("licence, wanted", [
    ("MIT", ["commercial-ok attribution"]),
    ("CC0-1.0", ["commercial-ok"]),
    ("CC-BY-NC-4.0", ["attribution non-commercial"]),
    ("MIT AND CC-BY-NC-4.0", ["attribution non-commercial"]),  # both bind: the permission is gone
    ("ODbL-1.0 OR CC-BY-NC-4.0", ["commercial-ok attribution share-alike:ODbL-1.0", "attribution non-commercial"]),
    ("MIT OR CC-BY-SA-4.0", ["commercial-ok attribution"]),  # nobody need choose the one that asks more
    ("(MIT OR CC0-1.0) AND CC-BY-ND-4.0", ["commercial-ok attribution no-derivatives"]),
    ("Apache-2.0 WITH LLVM-exception", ["commercial-ok attribution"]),
    ("gpl-2.0", ["commercial-ok attribution share-alike:GPL-2.0-only"]),  # SPDX: case is free, old ids have new names
    ("MIT OR LicenseRef-nobody-knows", ["commercial-ok attribution", "unknown"]),
    ("MIT AND LicenseRef-nobody-knows", ["attribution unknown"]),
])
def test_terms_by_hand(licence, wanted):
    assert tags(licence) == options(*wanted)


@pytest.mark.parametrize("licence", ["", None, "NOASSERTION", "NONE", "CC BY 4.0", "LicenseRef-MIT-TC", "MIT AND",
                                     "(MIT", "MIT/Apache-2.0", "MIT WITH Apache-2.0", "MIT WITH made-up", "secret", 7,
                                     "LLVM-exception", "MIT AND " * 200 + "MIT", "(" * 600 + "MIT" + ")" * 600])
def test_what_cannot_be_read_is_unknown_and_says_why(licence):
    parsed = policy().parse(licence)
    assert parsed.terms == UNKNOWN and parsed.problem


def test_equivalent_expressions_have_equal_terms_as_license_expression_judges():
    spdx, source = license_expression.get_spdx_licensing(), rng(0, "expressions")
    ids = ["MIT", "CC0-1.0", "CC-BY-SA-4.0", "CC-BY-NC-4.0", "GPL-3.0-only"]

    def draw(depth: int) -> str:
        if depth == 0 or source.random() < 0.3:
            return source.choice(ids)
        return f"({draw(depth - 1)} {source.choice(('AND', 'OR'))} {draw(depth - 1)})"

    equal = 0
    for _ in range(200):
        a = draw(2)
        b = str(spdx.parse(a).simplify())
        assert spdx.is_equivalent(a, b)
        assert tags(a) == tags(b), (a, b)
        equal += a != b
    assert equal > 100


def draw_terms(source) -> licences.Terms:
    return prune(frozenset(t for t in ("commercial-ok", "attribution", "unknown", "share-alike:A", "share-alike:B")
                           if source.random() < 0.5) for _ in range(source.randint(1, 3)))


def laws_hold(join_two) -> bool:
    """Idempotent, commutative, associative, and monotone in what is permitted."""
    source = rng(1, "lattice")
    for _ in range(300):
        a, b, c = (draw_terms(source) for _ in range(3))
        joined = join_two(a, b)
        if (join_two(a, a), joined, join_two(a, join_two(b, c))) != (a, join_two(b, a), join_two(join_two(a, b), c)):
            return False
        if not all(any(asks_no_more(x, o) for x in side) for o in joined for side in (a, b)):
            return False  # an option of the mix that one side does not permit
    return True


def test_lattice_laws_and_a_permissive_join_breaks_them():
    assert laws_hold(join)
    assert laws_hold(lambda a, b: prune(join_options(x, y) for x in a for y in b))
    assert not laws_hold(choice)  # takes the more permissive side
    assert not laws_hold(lambda a, b: min(a, b, key=lambda t: len(set().union(*t))))


def test_join_of_nothing_raises():
    with pytest.raises(ValueError, match="no terms"):
        join()


def test_tag_of_a_merge_keeps_every_restriction():
    mixed = policy().mix(["CC-BY-SA-4.0", "CC-BY-NC-4.0", "MIT"])
    assert mixed == options("attribution non-commercial share-alike:CC-BY-SA-4.0")


def change_table(tmp_path, change) -> str:
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    change(table)
    path = tmp_path / "table.json"
    path.write_text(json.dumps(table), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("change, message", [
    (lambda t: t["groups"][0]["licences"].append("MIT"), "MIT: is in two groups"),
    (lambda t: t["groups"][0]["licences"].append("Mitt"), "Mitt: is not an SPDX id"),
    (lambda t: t["groups"][0]["tags"].append("fine"), "not fine"),
    (lambda t: t["groups"][0]["tags"].append("non-commercial"), "commercial-ok together with non-commercial"),
    (lambda t: t["plans"].pop("OPEN"), "give exactly"),
    (lambda t: t.pop("meet"), "'meet' must be a list"),
    (lambda t: t["meet"].append(["CC-BY-SA-4.0", "X"]), "meet names X"),
])
def test_a_bad_table_is_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        Policy(change_table(tmp_path, change))


def test_licences_of_the_real_data_all_map_to_a_known_tag(real_data):
    rules, cells = policy(), []
    for line in (real_data / "README.md").read_text(encoding="utf-8").splitlines():
        columns = [cell.strip() for cell in line.strip("|").split("|")]
        if len(columns) == 9 and re.fullmatch(r"[\d,]+", columns[2]):
            cells.append(columns[3].removesuffix("; copy from a third-party repo"))
    assert len(cells) >= 40
    for cell in cells:
        terms = rules.parse(rules.names.get(cell, cell)).terms
        assert terms and not any("unknown" in option for option in terms), cell


def test_the_47_licence_texts_of_the_real_data_are_all_in_the_table(real_data):
    ids = [row["id"] for row in read_jsonl(real_data / "corpora" / "licenses.jsonl")]
    assert len(ids) == 47
    assert [name for name in ids if policy().parse(name).problem] == []


@pytest.mark.parametrize("sentence", ["MIT or so", "MIT OR Foo-1.0", "cc by 4.0 or MIT", "CC0-1.0 or unknown"])
def test_a_sentence_with_or_in_it_offers_no_choice(sentence):
    found = policy().parse(sentence)
    assert found.terms == UNKNOWN and found.problem
    assert policy().parse("MIT OR LicenseRef-partner").terms != UNKNOWN  # a real choice stays one
