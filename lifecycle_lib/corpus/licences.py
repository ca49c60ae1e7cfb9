"""Licences as policy tags: SPDX expressions parsed by license-expression, a table of tags, and a lattice.

A tag says what a licence permits (`commercial-ok`) or asks (all others). One option is a set of tags; `A OR B` leaves
the licensee a choice, so terms are a set of options:

    A AND B    both bind      every option of A joined with every option of B
    A OR B     we may choose  the options of A and those of B
    A WITH E   an exception only adds permission: the tags of A; an exception nobody knows makes it unknown
    joining    restrictions add up; commercial-ok stays only if both sides have it

Options that ask strictly more than another are dropped, which makes join idempotent, commutative, associative and
monotone (the lattice of up-sets). The tag of a mix, a checkpoint, an adapter, a merge is the join of all that went in.
`share-alike` and `partner-only` name the licence that binds, "share-alike:CC-BY-SA-4.0": two of them can conflict.

What is in no table, empty, NOASSERTION, NONE, or not an SPDX expression is `unknown`, and unknown is never permitted in
production. A LicenseRef is document-local: it means what the table says, never what another document's LicenseRef of
that name meant (so license-expression's LicenseRef aliases are off).

The table (data/rights/policy_tags.json) is a policy to be signed by whoever owns it, and no legal advice.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import license_expression as spdx

from lifecycle_lib.core.fingerprints import fingerprint
from lifecycle_lib.core.records import read_json

TAGS = ("commercial-ok", "attribution", "share-alike", "no-derivatives", "non-commercial", "partner-only",
        "research-only", "regulated", "unknown")
NAMED = ("share-alike", "partner-only")  # tags that carry the licence that binds
NOT_COMMERCIAL = ("non-commercial", "research-only", "unknown")
MAX_CHARACTERS = 1000  # of an expression
NO_CLAIM = ("", "NOASSERTION", "NONE")
PLANS = ("OPEN", "RESTRICTED", "API", "ONPREM", "NONE")
TABLE = Path(__file__).resolve().parents[2] / "data" / "rights" / "policy_tags.json"

Option = frozenset[str]  # tags that hold together
Terms = frozenset[Option]  # the licensee may choose one
UNKNOWN: Terms = frozenset({frozenset({"unknown"})})


def base_tag(tag: str) -> str:
    """`share-alike` of `share-alike:CC-BY-SA-4.0`."""
    return tag.partition(":")[0]


def join_options(a: Option, b: Option) -> Option:
    """Both bind: restrictions add up, the permission commercial-ok needs both."""
    return frozenset((a | b) - {"commercial-ok"} | (a & b & {"commercial-ok"}))


def asks_no_more(a: Option, b: Option) -> bool:
    """Is `a` at or below `b` in the lattice: is all that `b` allows allowed under `a`?"""
    return join_options(a, b) == b


def prune(options: Iterable[Option]) -> Terms:
    """Without the options that another one makes pointless."""
    own = set(options)
    return frozenset(o for o in own if not any(p != o and asks_no_more(p, o) for p in own))


def join(*terms: Terms) -> Terms:
    """The terms under which all of `terms` are kept. Raises ValueError for none: an empty mix has no terms."""
    if not terms:
        raise ValueError("join of no terms: a mix of nothing has no rights; give the terms of at least one source")
    return functools.reduce(lambda a, b: prune(join_options(x, y) for x in a for y in b), terms)


def choice(a: Terms, b: Terms) -> Terms:
    """`A OR B`."""
    return prune(a | b)


def text_of(terms: Terms) -> str:
    """Terms for a person: "attribution, commercial-ok | unknown"."""
    return " | ".join(sorted(", ".join(sorted(o)) or "nothing permitted, nothing asked" for o in terms))


@dataclass(frozen=True, slots=True)
class Licence:
    """An expression as given and as normalised, its terms, and why it is unknown ("" if it is not)."""

    given: str
    expression: str
    terms: Terms
    problem: str = ""


@functools.cache
def _spdx() -> spdx.Licensing:
    """The SPDX ids and their deprecated spellings; no LicenseRef, which is local to a document."""
    def local(key: str) -> bool:
        return key.startswith("LicenseRef-")
    return spdx.load_licensing_from_license_index([
        {"key": entry["spdx_license_key"], "is_deprecated": False, "is_exception": entry["is_exception"],
         "aliases": [k for k in entry["other_spdx_license_keys"] if not local(k)]}
        for entry in spdx.get_license_index()
        if entry.get("spdx_license_key") and not local(entry["spdx_license_key"]) and not entry["is_deprecated"]])


class Policy:
    """The table: which licence asks what, which plans admit which tags, which share-alike licences may meet.

    `names` translates what some data sets say of themselves ("CC BY 4.0") for whoever imports them; `parse` never uses
    it: a row states SPDX or is unknown.

    Raises ValueError naming file, entry and fix: an id that SPDX does not know and that is no LicenseRef, an id in two
    groups, an unknown tag, a group both commercial-ok and not.
    """

    def __init__(self, path: str | Path = TABLE) -> None:
        self.path = Path(path)
        table = read_json(self.path)
        for field, kind in {"version": str, "groups": list, "plans": dict, "meet": list, "names": dict}.items():
            if not isinstance(table, dict) or not isinstance(table.get(field), kind):
                raise ValueError(f"{path}: field {field!r} must be a {kind.__name__}; copy {TABLE.name} and edit it")
        self.version, self.plans, self.names = table["version"], table["plans"], table["names"]
        self.fingerprint = fingerprint(table)
        self.tags: dict[str, Option] = {}
        for group in table["groups"]:
            self._add(group)
        self.meet = [frozenset(group) for group in table["meet"]]
        if loose := sorted(set().union(*self.meet) - set(self.tags)):
            raise ValueError(f"{path}: meet names {', '.join(loose)}, which no group lists; add them or drop them")
        if tuple(sorted(self.plans)) != tuple(sorted(PLANS)):
            raise ValueError(f"{path}: plans are {', '.join(self.plans)}; give exactly {', '.join(PLANS)}")
        for name, plan in self.plans.items():
            self._check_tags(f"plan {name}", plan.get("admits", ()))
        self.needs: dict[str, list[str]] = table.get("needs", {})
        self._parsed = functools.lru_cache(maxsize=4096)(self._parse)

    def _check_tags(self, where: str, tags: Any) -> None:
        if not isinstance(tags, list) or not tags or (bad := sorted(set(tags) - set(TAGS))):
            raise ValueError(f"{self.path}: {where}: tags {tags!r}; give a list of {', '.join(TAGS)}"
                             + (f" (not {', '.join(bad)})" if tags and isinstance(tags, list) else ""))

    def _add(self, group: dict[str, Any]) -> None:
        ids, tags = group.get("licences", []), group.get("tags")
        self._check_tags(f"group of {', '.join(ids[:2])}", tags)
        if "commercial-ok" in tags and set(tags) & set(NOT_COMMERCIAL):
            raise ValueError(f"{self.path}: group of {', '.join(ids[:2])}: commercial-ok together with "
                             f"{', '.join(sorted(set(tags) & set(NOT_COMMERCIAL)))}; keep one")
        for name in ids:
            known = _spdx().unknown_license_keys(name) == [] or name.startswith("LicenseRef-")
            if not known or name in self.tags:
                raise ValueError(f"{self.path}: {name}: " + ("is in two groups; keep one" if name in self.tags else
                                 "is not an SPDX id; use the id of spdx.org/licenses, or LicenseRef-NAME"))
            self.tags[name] = frozenset(f"{t}:{name}" if t in NAMED else t for t in tags)

    def parse(self, given: Any) -> Licence:
        """An SPDX expression with its terms; never raises: what cannot be read is `unknown`, with the problem."""
        return self._parsed(given if isinstance(given, str) else "")

    def _parse(self, text: str) -> Licence:
        if text.strip() in NO_CLAIM:
            return Licence(text, "NOASSERTION", UNKNOWN, "no licence is claimed")
        if len(text) > MAX_CHARACTERS:
            return Licence(text, "NOASSERTION", UNKNOWN, f"{len(text)} characters, more than {MAX_CHARACTERS}")
        try:
            tree = _spdx().parse(text)
            # "MIT or so" is a sentence: with a word in it that is no licence, no branch of an OR may be chosen
            if foreign := [key for key in _spdx().unknown_license_keys(tree) if not key.startswith("LicenseRef-")]:
                return Licence(text, "NOASSERTION", UNKNOWN, f"{', '.join(foreign)}: no SPDX id and no LicenseRef-NAME")
            terms, problems = self._terms(tree)
        except (spdx.ExpressionError, spdx.ParseError) as error:
            return Licence(text, "NOASSERTION", UNKNOWN, f"not an SPDX expression ({' '.join(str(error).split())})")
        return Licence(text, tree.render(), terms, "; ".join(problems))

    def _terms(self, tree: Any) -> tuple[Terms, list[str]]:
        """Terms of a parsed expression, and what in it is unknown."""
        if isinstance(tree, (spdx.AND, spdx.OR)):
            parts = [self._terms(part) for part in tree.args]
            both = join if isinstance(tree, spdx.AND) else choice
            return functools.reduce(both, (p[0] for p in parts)), [text for p in parts for text in p[1]]
        if isinstance(tree, spdx.LicenseWithExceptionSymbol):
            known = _spdx().known_symbols.get(tree.exception_symbol.key)
            if known is None or not known.is_exception:
                return UNKNOWN, [f"{tree.exception_symbol.key} is no exception that SPDX lists"]
            return self._terms(tree.license_symbol)
        if tree.key not in self.tags:
            return UNKNOWN, [f"{tree.key} is in no group of {self.path.name}"]
        return frozenset({self.tags[tree.key]}), []

    def spdx_ids(self, given: Any) -> list[str]:
        """The ids of an expression that SPDX publishes a text for, in order; exceptions included."""
        expression = self.parse(given).expression
        names = [] if expression == "NOASSERTION" else _spdx().license_keys(expression)
        return [name for name in names if name in _spdx().known_symbols]

    def mix(self, licences: Iterable[str]) -> Terms:
        """The terms of a mix of texts under these licences; of a checkpoint, adapter or merge trained on them."""
        return join(*(self.parse(licence).terms for licence in sorted(set(licences))))

    def may_meet(self, a: str, b: str) -> bool:
        """May one work be passed on under both share-alike licences? Pairs are listed; chains are not followed."""
        return a == b or any({a, b} <= group for group in self.meet)


@functools.cache
def policy(path: str | Path = TABLE) -> Policy:
    """The table at `path`, read once a process."""
    return Policy(path)
