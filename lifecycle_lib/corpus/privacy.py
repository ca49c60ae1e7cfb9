"""Personal data in text: short detectors, each of which says what it misses, and a mask.

`find_pii` runs the detectors in the order of `DETECTORS`; where two spans overlap, the earlier detector keeps its span
(an email is not also a domain), within one detector the longer, then the one further left. Checks that cost nothing
come with the patterns: Luhn's check digit for cards (ISO/IEC 7812), mod 97 for IBANs (ISO 13616), ranges for IP
addresses and US social security numbers.

How often they are right is measured, not claimed: `score_spans` counts against labelled spans, by kind, with Wilson
intervals. The spans of one template are alike, so those intervals are too narrow for templated text: hold templates
out (`privacy_eval.split_by_template`).

Left out: place names, organisations, nationalities and bare years, which no short pattern tells from other words;
names without a cue (`privacy_eval.TokenClassifier` finds some of those); languages other than English for the cue
words. No list of names or places is used.
"""

import ipaddress
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lifecycle_lib.core.stats import wilson

Found = Iterator[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Span:
    """Characters `start` to `end` (exclusive) of a text, of one kind."""

    start: int
    end: int
    kind: str
    text: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise ValueError(f"span {self.start}..{self.end} of {self.kind}: start must be 0 or more and below end")

    def overlaps(self, other: "Span") -> bool:
        return self.start < other.end and other.start < self.end


def luhn(digits: str) -> bool:
    """Luhn's check: double every second digit from the right but the first, subtract 9 above 9, sum divides by 10."""
    total = 0
    for i, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + i % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def iban_ok(text: str) -> bool:
    """ISO 13616: the first four characters moved to the end, letters as 10..35, leave 1 modulo 97."""
    code = re.sub(r"\s", "", text).upper()
    return int("".join(str(int(c, 36)) for c in code[4:] + code[:4])) % 97 == 1


def _all(pattern: str, flags: int = 0) -> Callable[[str], Found]:
    """A detector of every match of a pattern; the group that matched, where it has groups, is the span."""
    compiled = re.compile(pattern, flags)
    return lambda text: (m.span(m.lastindex or 0) for m in compiled.finditer(text))


_email = _all(r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,8}\b")
_url = _all(r"\b(?:https?://|www\.)[^\s<>\"')\]]+|"
            r"(?<![\w@.-])(?:[a-z0-9-]{1,63}\.){1,4}(?:com|org|net|io|edu|gov|info|co\.uk|de|fr|nl|eu)\b(?!@)", re.I)
_digit_runs = re.compile(r"(?<![\w.+-])\d(?:[ -]?\d){11,18}(?![\w-]|\.\d)")
_iban = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")
_ip = re.compile(r"(?<![\w.:])(?:\d{1,3}(?:\.\d{1,3}){3}|[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7})(?![\w:]|\.\d)")
_ssn = _all(r"(?<![\w-])(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-])")
_phone = re.compile(r"(?<![\w/#$-])(?<!\d[.,: ])(?:\+|\(\+?)?\d(?:[ .()-]{0,2}\d){6,14}(?!\w|[ .()/:,-]\d)")
_id = _all(r"\b(?:licen[cs]e|passport|account|customer|member(?:ship)?|national)(?: (?:number|no\.?|id|#))?(?: is|:) "
           r"(?=\S*\d\S*\d\S*\d)([A-Z0-9][A-Z0-9-]{4,24})\b", re.I)
_phone_cue = re.compile(r"(?:phone|call|tel|mobile|cell|fax|contact|number|text me)\b[^\n]{0,25}\n?[^\n]{0,5}$",
                        re.I)
_months = "(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*"
_date = re.compile(rf"(?<![\w/.-])(?:\d{{4}}-\d\d?-\d\d?(?:[ T]\d\d:\d\d(?::\d\d)?)?|\d\d?/\d\d?/(?:\d{{4}}|\d\d)|"
                   rf"\d\d?\.\d\d?\.\d{{4}}|\d\d?(?:st|nd|rd|th)?(?: of)? {_months}\.?,? \d{{4}}|"
                   rf"{_months}\.? \d\d?(?:st|nd|rd|th)?,? \d{{4}})(?![\w/-]|\.\d)", re.I)
_birth_cue = re.compile(r"\b(?:born|birth|birthday|dob|d\.o\.b\.?)\b[^\n.!?,]{0,25}$", re.I)
_streets = "street|str|st|road|rd|avenue|ave|lane|ln|boulevard|blvd|highway|hwy|parkway"
_Streets = "Drive|Dr|Courts?|Ct|Squares?|Way|Place|Pl|Terrace|Close|Crescent|Row|Gardens|Walk|Alley"  # also plain words
_word = r"[^\W\d_][\w'.-]{0,24}"
_address = _all(
    rf"\b\d{{1,6}}[A-Za-z]?,? (?:\d{{1,5}} )?(?:(?:{_word} ){{1,3}}(?:{_streets})\b\.?|(?-i:(?:[^\W\d_a-z][\w'.-]* )"
    rf"{{1,4}}(?:{_Streets})\b\.?)|(?:rue|via|calle) {_word})"
    rf"(?:[,\s]+(?:apt|suite|unit|flat|room|floor)\.? ?#?\w{{1,6}})?|"  # 12 High Street, Flat 3
    rf"\b(?:p\.? ?o\.?|psc|unit) ?(?:\d{{1,5}},? )?box \d+(?:\s+(?:apo|fpo|dpo) [a-z]{{2}} \d{{5}})?|"  # PO Box 12
    rf"\b(?:apo|fpo|dpo) a[aep] \d{{5}}\b|\b(?:apt|suite|flat)\.? \d{{1,5}}\b|"
    rf"\b(?:\w{{2,20}} )?\w{{2,20}}"
    rf"(?:stra(?:ss|ß)e|straat|gatan?|gaten|vej|vej[ae]n|vägen|veien|tie|katu|laan|weg) \d{{1,4}}\b|"
    rf"\b(?:\w{{2,20}} ){{1,3}}(?:út|utca|útja|u\.|tér|str|ulica) \d{{1,4}}\b|"
    rf"\b(?:via|calle|rue|avenida|rua|piazza|viale|vicolo|ul\.) (?:{_word} ){{1,4}}\d{{1,4}}\b", re.I)
_zip = _all(r"(?:\bzip(?: ?code)?|\bpost(?:al)? ?code|\bpostcode)(?: is|:|=)?\s{0,2}"
            r"([A-Z0-9]{2,5}(?:[ -][A-Z0-9]{2,4})?)\b(?<=\d|[A-Z])|"
            r"\b[A-Z]{1,2}\d[A-Z\d]? \d[A-Z]{2}\b|\b[A-Z]\d[A-Z] \d[A-Z]\d\b|\b[A-Z]{2} \d{5}(?:-\d{4})?\b")
_age = _all(r"\b(1?\d{1,2})(?=[ -]years?[ -]old\b| ?y/o\b| ?yo\b)|"
            r"\b(?:aged?|turned|turning)(?: is|:)? (1?\d{1,2})\b(?![.,]?\d| ?%)", re.I)
_cap = r"[^\W\d_a-zß-ÿ](?:(?:[\w-]|['’](?=[A-Z]))+|\.)"  # a capital and more, or an initial; no possessive
_name = rf"({_cap}(?: (?:(?:van|von|de|da|der|del|la|bin|al|el|of) ){{0,2}}{_cap}){{0,3}})"
_person = _all(
    rf"\b(?:Mr|Mrs|Ms|Miss|Dr|Prof|Sir|Madam|Messrs)\b\.? {_name}|"
    rf"(?i:\bname(?: is|:| was)|\bcall(?:s|ed)?(?: me| him| her)?|\bdear|\bsigned(?: by)?:?|"
    rf"\b(?:order|account|card) ?holder(?: is|:)?|\b(?:ordered|directed|written) by|\battn:?|\bbeneficiary:?|"
    rf"\b(?:speak|spoke|talk|talked|meet|met|follow up) (?:to|with)|\bsaid|\baccount of)[ \t]{{1,8}}{_name}|"
    rf"(?i:\bregards|\bsincerely|\bthanks|\bcheers),?\n{_name}|"
    rf"\b(?:I'm|I am|i'm|i am|This is|this is) ({_cap}(?: {_cap}){{1,3}}|{_cap}(?=,))")
_secret = _all(r"(?:password|passwd|passcode|passphrase|pwd|\bpin|secret|api[ _-]?key|token)(?: is|:| ?=)\s{0,2}"
               r"[\"']?(?=\S*[\d!@#$%^&*_])([^\s\"',;]{4,128}?)(?=[\"',;.]?(?:\s|$))|"
               r"\b(?:sk-[\w-]{16,128}|AKIA[A-Z0-9]{16}|gh[pousr]_\w{20,128})\b|"
               r"-----BEGIN [A-Z ]*PRIVATE KEY-----", re.I)


def emails(text: str) -> Found:
    """name@host.tld. Misses "john at mail dot com" (see `obfuscated`), quoted local parts, hosts without a dot."""
    return _email(text)


def urls(text: str) -> Found:
    """http(s)://..., www..., and bare domains of a few common endings. Misses other bare domains (shop.xyz)."""
    return _url(text)


def secrets(text: str) -> Found:
    """The value after "password is", "pin:", "api key =" and such, common key prefixes, private key headers.

    Misses a password without a digit or symbol ("password is correct" would be one), and one with no cue."""
    return _secret(text)


def ibans(text: str) -> Found:
    """Country, check digits, up to 30 characters, modulo 97 as ISO 13616. Misses lower case and mistyped numbers."""
    return (m.span() for m in _iban.finditer(text) if iban_ok(m[0]))


def cards(text: str) -> Found:
    """12 to 19 digits, spaces or hyphens between, that pass Luhn. Misses mistyped numbers; one in ten other numbers of
    that length (order ids, tracking numbers) passes by chance."""
    return (m.span() for m in _digit_runs.finditer(text) if luhn(re.sub("[ -]", "", m[0])) and len(set(m[0])) > 2)


def ips(text: str) -> Found:
    """IPv4 and IPv6 that the standard library accepts. Takes a version number of four parts (1.2.3.4) for one."""
    for m in _ip.finditer(text):
        try:
            ipaddress.ip_address(m[0])
        except ValueError:
            continue
        if len(m[0]) > 3:
            yield m.span()


def ssns(text: str) -> Found:
    """US 123-45-6789, never-issued blocks left out. Misses it without hyphens."""
    return _ssn(text)


def dates(text: str) -> Found:
    """2021-03-04 (with a time), 3/4/2021, 4.3.2021, 4 March 2021, March 4, 2021. Misses bare years, "last Monday"."""
    return (m.span() for m in _date.finditer(text) if not _birth_cue.search(text[max(0, m.start() - 60):m.start()]))


def births(text: str) -> Found:
    """A date at most 25 characters after "born", "birthday" or "dob". Misses one without the word, or before it."""
    return (m.span() for m in _date.finditer(text) if _birth_cue.search(text[max(0, m.start() - 60):m.start()]))


def id_numbers(text: str) -> Found:
    """The value after "passport number is", "licence:", "account no. is" and such, of 5 characters or more with three
    digits. Misses one without the word before it, and one of letters."""
    return _id(text)


def phones(text: str) -> Found:
    """7 to 15 digits with +, brackets or separators; without any of them only near "phone", "call" and such.

    Misses shorter numbers and extensions; takes some reference numbers written in groups for phone numbers."""
    for m in _phone.finditer(text):
        groups = re.findall(r"\d+", m[0])
        thousands = len(groups) > 1 and all(g == "000" for g in groups[1:])  # 2 000 000
        if thousands or re.fullmatch(r"(?:19|20)\d\d.{1,3}(?:19|20)\d\d", m[0]):  # 1990 - 1995
            continue
        if len(groups) > 1 or m[0][0] in "+(" or _phone_cue.search(text[max(0, m.start() - 60):m.start()]):
            yield m.span()


def addresses(text: str) -> Found:
    """Number and street with an English street word, PO boxes and military mail, "Suite 12", and common European street
    forms. Misses a street name alone, most foreign forms, and the town and country after the street."""
    return _address(text)


def zips(text: str) -> Found:
    """A code after "zip" or "postcode", US state and five digits, British and Canadian forms. Misses bare digits."""
    return _zip(text)


def ages(text: str) -> Found:
    """The number of "38 years old", "38-year-old", "38 y/o", "aged 38", "turned 38". Misses "he is 38", and words."""
    return _age(text)


def persons(text: str) -> Found:
    """Capitalised words after a title (Mrs.) or a cue ("my name is", "speak to", "Dear", "order holder").

    Misses every name without a cue and names in lower case; takes a company after "contact" or "called" for one."""
    return _person(text)


DETECTORS: dict[str, Callable[[str], Found]] = {
    "EMAIL": emails, "SECRET": secrets, "URL": urls, "IBAN": ibans, "CARD": cards, "IP": ips, "US_SSN": ssns,
    "BIRTH_DATE": births, "DATE": dates, "ADDRESS": addresses, "ZIP": zips, "ID_NUMBER": id_numbers, "PHONE": phones,
    "AGE": ages, "PERSON": persons}

_at_dot = _all(r"\b[\w.+-]{1,64}\s?(?:\(at\)|\[at\]|\bat\b|@)\s?[\w-]{1,63}"
               r"(?:\s?(?:\(dot\)|\[dot\]|\bdot\b|\.)\s?[a-z]{2,63}\b){1,3}(?<=[a-z])", re.I)
_spaced = re.compile(r"(?<![\w.])\d(?:[ ._*-]{1,3}\d){8,18}(?!\w)")


def obfuscated(text: str) -> Iterator[Span]:
    """What people write to hide from a filter: "john at mail dot com", "4 1 1 1 - 1 1 1 1 ...", "5.5.5_1.2.3...".

    Needs "dot" or a full stop before an ending, so takes "meet at noon. see you" for an address at times: off by
    default. Misses number words ("four one one"), homoglyphs and text in pictures."""
    yield from (Span(a, b, "EMAIL", text[a:b]) for a, b in _at_dot(text))
    for m in _spaced.finditer(text):
        digits = re.sub(r"\D", "", m[0])
        yield Span(*m.span(), "CARD" if len(digits) >= 12 and luhn(digits) else "PHONE", m[0])


def find_pii(text: str, obfuscation: bool = False) -> list[Span]:
    """Spans of personal data in order of appearance, none overlapping another; see the top for who wins.

    `obfuscation` adds the written-out forms. Raises ValueError when `text` is not a string."""
    if not isinstance(text, str):
        raise ValueError(f"text is a {type(text).__name__}: give a string")
    taken: list[Span] = []
    covered = bytearray(len(text))  # 1 where a span lies
    found = [[Span(a, b, kind, text[a:b]) for a, b in detector(text)] for kind, detector in DETECTORS.items()]
    if obfuscation:
        found.append(list(obfuscated(text)))
    for spans in found:
        for span in sorted(spans, key=lambda s: (s.start - s.end, s.start)):
            if not any(covered[span.start:span.end]):
                taken.append(span)
                covered[span.start:span.end] = b"\1" * (span.end - span.start)
    return sorted(taken, key=lambda s: s.start)


def mask(text: str, spans: Sequence[Span]) -> str:
    """`text` with each span replaced by its kind in brackets, as "[EMAIL]".

    Raises ValueError for spans that overlap or leave the text: masking them would leave part of one behind."""
    out, at = [], 0
    for span in sorted(spans, key=lambda s: s.start):
        if span.start < at or span.end > len(text):
            raise ValueError(f"span {span.start}..{span.end} of {span.kind}: overlaps the one before or passes the end "
                             f"({len(text)} characters); give spans of this text, as find_pii makes them")
        out += [text[at:span.start], f"[{span.kind}]"]
        at = span.end
    return "".join([*out, text[at:]])


@dataclass(slots=True, kw_only=True)
class Score:
    """Counts for one kind: `hit` of `gold` spans found as this kind, `correct` of `found` ones; `touched` by any kind,
    `covered` of `characters`: what a mask of everything found would hide. `missed` is the text of what no span touched.

    Rates are None where there is nothing to divide by."""

    gold: int = 0
    hit: int = 0
    touched: int = 0
    found: int = 0
    correct: int = 0
    characters: int = 0
    covered: int = 0
    missed: list[str] = field(default_factory=list)

    @property
    def recall(self) -> float | None:
        return self.hit / self.gold if self.gold else None

    @property
    def precision(self) -> float | None:
        return self.correct / self.found if self.found else None

    @property
    def recall_interval(self) -> tuple[float, float] | None:
        return wilson(self.hit, self.gold) if self.gold else None

    @property
    def precision_interval(self) -> tuple[float, float] | None:
        return wilson(self.correct, self.found) if self.found else None


def score_spans(gold: Sequence[Sequence[Span]], found: Sequence[Sequence[Span]], match: str = "overlap"
                ) -> dict[str, Score]:
    """Score of each kind over documents; `gold[i]` and `found[i]` are the spans of document i.

    "overlap": one shared character and the same kind are a hit; "exact": the same start, end and kind. Raises
    ValueError for no gold span at all, unequal lengths, an unknown match."""
    if match not in ("overlap", "exact"):
        raise ValueError(f"match={match!r}: use 'overlap' or 'exact'")
    if len(gold) != len(found):
        raise ValueError(f"{len(gold)} documents with gold spans, {len(found)} searched: give both for each document")
    if not any(gold):
        raise ValueError("no gold span in any document: recall has no evidence; label some, or give the right file")
    scores: dict[str, Score] = {}

    def hits(span: Span, others: Sequence[Span]) -> bool:
        return any(o.kind == span.kind and (o.overlaps(span) if match == "overlap" else
                                            (o.start, o.end) == (span.start, span.end)) for o in others)

    for truth, guesses in zip(gold, found):
        for span in truth:
            score = scores.setdefault(span.kind, Score())
            score.gold += 1
            score.hit += hits(span, guesses)
            touched = [o for o in guesses if o.overlaps(span)]
            score.touched += bool(touched)
            score.characters += span.end - span.start
            score.covered += sum(min(o.end, span.end) - max(o.start, span.start) for o in touched)
            if not touched:
                score.missed.append(span.text)
        for span in guesses:
            score = scores.setdefault(span.kind, Score())
            score.found += 1
            score.correct += hits(span, truth)
    return scores


def privacy_report(rows: Sequence[Mapping[str, Any]], detect: Callable[[str], list[Span]] = find_pii,
                   match: str = "overlap", merge: Mapping[str, str] | None = None, examples: int = 3) -> dict[str, Any]:
    """Precision and recall by kind over rows {"text", "spans"}, most gold spans first, and what is missed.

    Each span is a Span or a dict with start, end, kind. `merge` renames kinds on both sides ({"BIRTH_DATE": "DATE"}
    where the labels do not tell them apart). Returns {"table": [one dict a kind], "never_found": kinds with gold spans
    and no hit, "unlabelled": kinds found without a gold span, "n_rows", "match"}. Raises what score_spans does."""
    rename = merge or {}

    def spans_of(text: str, spans: Sequence[Any]) -> list[Span]:
        places = [s if isinstance(s, Span) else Span(s["start"], s["end"], s["kind"]) for s in spans]
        return [Span(s.start, s.end, rename.get(s.kind, s.kind), text[s.start:s.end]) for s in places]

    gold = [spans_of(row["text"], row["spans"]) for row in rows]
    scores = score_spans(gold, [spans_of(row["text"], detect(row["text"])) for row in rows], match)
    table = []
    for kind, s in sorted(scores.items(), key=lambda item: (-item[1].gold, item[0])):
        seen = list(dict.fromkeys(s.missed))
        table.append({"kind": kind, "gold": s.gold, "hit": s.hit, "recall": s.recall, "recall_interval":
                      s.recall_interval, "found": s.found, "correct": s.correct, "precision": s.precision,
                      "precision_interval": s.precision_interval, "touched": s.touched,
                      "characters_hidden": s.covered / s.characters if s.characters else None,
                      "missed": seen[:: max(1, len(seen) // examples)][:examples] if seen else []})
    return {"table": table, "never_found": [t["kind"] for t in table if t["gold"] and not t["hit"]],
            "unlabelled": [t["kind"] for t in table if not t["gold"]], "n_rows": len(rows), "match": match}
