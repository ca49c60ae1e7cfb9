"""Filters with a reason: what was measured, what the limit was, under which version of the rules.

Every filter is a short function of the text that returns a `Reason` or None, and its docstring says what it misses.
Most are heuristics of published pipelines (Raffel et al. 2020, C4; Rae et al. 2021, Gopher's repetition and symbol
rules), cut down to what a reader checks by hand. A `Ruleset` is data: a semantic version, thresholds, and the verdict
each reason leads to. Change a threshold and you change the version, since a recorded verdict is only replayed under the
rules that made it; `Ruleset.fingerprint` shows when somebody forgot.

Left out: trained classifiers and language identification. The word lists are English, short and mild; abuse and exploit
are stand-ins that show the plumbing, not lists to protect anyone with. No filter looks at a row's `truth`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from lifecycle_lib.core.fingerprints import fingerprint

VERDICTS = ("admit", "accept_with_risk", "quarantine", "reject")
"""From the mildest to the strictest: the strictest reason decides."""
DEFAULT_VERDICTS = {
    "no_licence": "quarantine", "licence_not_spdx": "quarantine", "no_source": "quarantine",
    "unseen_source": "quarantine", "eval_only": "reject", "no_capture_date": "accept_with_risk",
    "too_short": "reject", "too_long": "reject", "mojibake": "quarantine", "symbol_heavy": "reject",
    "repetitive": "reject", "shuffled": "quarantine", "spam": "reject", "maybe_spam": "quarantine",
    "boilerplate": "reject", "abuse": "quarantine", "exploit": "quarantine",
    "exact_duplicate": "reject", "near_duplicate": "reject", "pii": "quarantine", "pii_masked": "accept_with_risk"}
NEVER_KEPT = ("no_licence", "no_source", "eval_only")
_SEMVER = re.compile(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """Why a row is not simply admitted: the reason's code, what was measured, the limit it passed."""

    code: str
    measured: float
    limit: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Ruleset:
    """Thresholds and verdicts under a semantic version. `verdicts` overrides single reasons; "admit" turns one off."""

    version: str = "1.0.0"
    min_chars: int = 8
    max_chars: int = 100_000
    max_mojibake: float = 2.0  # marks per 1,000 characters
    min_letters: float = 0.5  # share of the characters that are not spaces
    max_repeated: float = 0.4  # share of 3-word runs seen before in the text
    max_run: int = 20  # the same character in a row
    max_misplaced: float = 0.35  # share of articles and possessives before a word that cannot follow
    spam_cues: int = 3  # different cues; one fewer is maybe_spam
    max_boilerplate: float = 0.5  # share of sentences
    max_abuse: int = 0  # insults
    verdicts: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.version, str) or not _SEMVER.fullmatch(self.version):
            raise ValueError(f"version={self.version!r}: give a semantic version such as 1.0.0")
        for name in _THRESHOLDS:
            value = getattr(self, name)
            top = 1 if name in ("min_letters", "max_repeated", "max_misplaced", "max_boilerplate") else 1e12
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= top:
                raise ValueError(f"{name}={value!r}: give a number from 0 to {top:g}")
        if self.max_chars < self.min_chars or self.spam_cues < 2 or self.max_run < 2:
            raise ValueError(f"max_chars={self.max_chars}, spam_cues={self.spam_cues}, max_run={self.max_run}: give "
                             f"max_chars >= min_chars ({self.min_chars}), spam_cues >= 2 and max_run >= 2")
        if not isinstance(self.verdicts, Mapping):
            raise ValueError(f"verdicts={self.verdicts!r}: give {{reason: verdict}}")
        for code, verdict in self.verdicts.items():
            if code not in DEFAULT_VERDICTS or verdict not in VERDICTS:
                raise ValueError(f"verdicts: {code!r}: {verdict!r}; reasons are {', '.join(DEFAULT_VERDICTS)}; "
                                 f"verdicts are {', '.join(VERDICTS)}")
            if code in NEVER_KEPT and verdict in ("admit", "accept_with_risk"):
                raise ValueError(f"verdicts: {code!r}: {verdict!r}; such a row is never kept, give quarantine "
                                 "or reject")

    def verdict(self, code: str) -> str:
        """Where this reason leads, e.g. "quarantine"."""
        return self.verdicts.get(code) or DEFAULT_VERDICTS[code]

    def fingerprint(self) -> str:
        """Names thresholds and verdicts, not the version: equal versions with unlike fingerprints are a mistake."""
        return fingerprint([{n: getattr(self, n) for n in _THRESHOLDS}, {c: self.verdict(c) for c in DEFAULT_VERDICTS}])


_THRESHOLDS = tuple(f.name for f in fields(Ruleset) if f.name not in ("version", "verdicts"))

_marks = re.compile(r"[ÃÂ][\x80-\xbf\u20ac\u201a-\u2122]|â€.|\ufffd|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_words = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*|\d+")
_runs = re.compile(r"(.)\1+", re.S)
_sentences = re.compile(r"[.!?\n]+\s*")
_ARTICLES = frozenset("a an the my your his our their its".split())
_CANNOT_FOLLOW = frozenset("a an the my your his our their its of to in on at for from with by and or but if than is "
                           "are was were be am do does did has i you he she it we they me him them us that this "
                           "as".split())
_spam = {name: re.compile(pattern) for name, pattern in {  # of lower-case text: twice as fast as ignoring case
    "free": r"\bfree(?!\s+(?:time|to|of|on|at|for (?:dinner|lunch)|tonight|now|today|after|this))\b",
    "prize": r"\b(?:winner|won|win|prizes?|awarded|jackpot|lottery|congratulations|guaranteed|selected to)\b",
    "claim": r"\b(?:claim|redeem|collect your)\b",
    "act": r"\b(?:urgent|act now|limited time|offer (?:ends|expires)|last chance|final (?:notice|attempt)|order now|"
           r"buy now|don'?t miss)\b",
    "click": r"\b(?:click (?:here|below|on)|visit our|https?:|www\.)|\w\.(?:com|co\.uk|xyz|biz)\b",
    "money": r"[£$€]\s?\d|\b\d+\s?(?:p|pence|ppm)\s?(?:/|per )?(?:min|msg|txt)|\bcash\b|\b\d+% off\b|\bdiscount\b",
    "reply": r"\b(?:txt|text|reply|call|send)\b\s+\w\w",
    "short code": r"\b(?:[0-9]{5}|0[89]\d{8,9})\b",
    "terms": r"\b(?:t&?cs?|opt[ -]?out|unsubscribe|18\+|over 18s?|subscription|ringtones?|mobile content)\b"}.items()}
_boilerplate = re.compile(r"all rights reserved|terms (?:of (?:service|use)|and conditions)|"
                          r"(?:privacy|cookie) policy|use cookies|"
                          r"subscribe to our|unsubscribe|this e?-?mail (?:and any|may be|is) |confidential and intend|"
                          r"copyright (?:\(c\)|©|\d{4})|do not reply to this|view this email in|"
                          r"powered by|lorem ipsum|page \d+ of \d+|click here to")
_insults = re.compile(r"\b(?:idiots?|idiotic|morons?|dumbass|losers?|jerks?|clowns?|blockheads?|nitwits?|numpty|scum|"
                      r"shut up|you(?:'re| are| lot| people| all)?(?: so)? (?:stupid|useless|pathetic|dumb|fools?|"
                      r"incompetent))\b")
_exploit = re.compile(r"\bexploit[-_:]\w+|<\s*/?exploit\b|\[exploit\]|\beicar\b|\bcve-\d{4}-\d{4,7}\b")


def length(text: str, rules: Ruleset) -> Reason | None:
    """too_short, too_long: characters without spaces around. Misses long rows with nothing in them."""
    n = len(text.strip())
    if n < rules.min_chars:
        return Reason(code="too_short", measured=n, limit=rules.min_chars)
    return Reason(code="too_long", measured=n, limit=rules.max_chars) if n > rules.max_chars else None


def mojibake(text: str, rules: Ruleset) -> Reason | None:
    """Marks of a wrong decoding ("Ã©", "â€™", U+FFFD, control characters) per 1,000 characters.

    Often a repair away (Windows quotes read as Latin-1), so quarantine is the default: fix and reprocess.
    Misses text that a wrong code page turned into proper letters (KOI8 read as CP1251), and question marks."""
    n = len(_marks.findall(text))
    share = round(1000 * n / len(text), 3) if text else 0.0
    return Reason(code="mojibake", measured=share, limit=rules.max_mojibake) if share > rules.max_mojibake else None


def low_signal(text: str, rules: Ruleset) -> Reason | None:
    """symbol_heavy, repetitive, shuffled: few letters; 3-word runs or one character over and over; articles before
    words that cannot follow ("the of", "a is"), from 3 articles on.

    symbol_heavy hits tables, code and logs, which some corpora want. repetitive misses paraphrase. shuffled needs 3
    articles, so it misses short rows and other languages, and words shuffled inside their own phrase."""
    solid = len(text) - sum(map(text.count, " \n\t"))
    letters = round(sum(map(str.isalpha, text)) / solid, 4) if solid else 0.0
    if letters < rules.min_letters:
        return Reason(code="symbol_heavy", measured=letters, limit=rules.min_letters)
    words = _words.findall(text.lower())
    if len(words) >= 12:
        runs = list(zip(words, words[1:], words[2:]))
        repeated = round(1 - len(set(runs)) / len(runs), 4)
        if repeated > rules.max_repeated:
            return Reason(code="repetitive", measured=repeated, limit=rules.max_repeated)
    longest = max((len(m[0]) for m in _runs.finditer(text) if m[1].isalnum()), default=0)
    if longest > rules.max_run:
        return Reason(code="repetitive", measured=longest, limit=rules.max_run)
    after = [b for a, b in zip(words, [*words[1:], "of"]) if a in _ARTICLES]  # "of": a text does not end on an article
    if len(after) >= 3:
        misplaced = round(sum(w in _CANNOT_FOLLOW for w in after) / len(after), 4)
        if misplaced > rules.max_misplaced:
            return Reason(code="shuffled", measured=misplaced, limit=rules.max_misplaced)
    return None


def spam(text: str, rules: Ruleset) -> Reason | None:
    """spam, maybe_spam: how many different cues (prize, free, short code, call to act ...), on average over pieces of
    400 characters. One cue fewer than spam is the band for people to look at.

    Misses spam in a friendly tone without numbers or links, and a spam line inside a long text; hits honest mail of
    shops and banks."""
    text = text.lower()
    pieces = [text[i:i + 400] for i in range(0, max(1, len(text) - 200), 400)]
    n = round(sum(1 for piece in pieces for cue in _spam.values() if cue.search(piece)) / len(pieces), 3)
    if n < rules.spam_cues - 1:
        return None
    return Reason(code="spam" if n >= rules.spam_cues else "maybe_spam", measured=n, limit=rules.spam_cues)


def boilerplate(text: str, rules: Ruleset) -> Reason | None:
    """Share of sentences with a stock phrase (rights reserved, cookies, unsubscribe). Misses stock text of its own
    site, which only repetition over rows shows: `dedupe.boilerplate` finds that."""
    text = text.lower()
    if not _boilerplate.search(text):
        return None
    parts = [part for part in _sentences.split(text) if part.strip()]
    share = round(sum(1 for part in parts if _boilerplate.search(part)) / max(1, len(parts)), 4)
    over = share > rules.max_boilerplate
    return Reason(code="boilerplate", measured=share, limit=rules.max_boilerplate) if over else None


def abuse(text: str, rules: Ruleset) -> Reason | None:
    """Insults of a short, mild list. Misses spelling tricks, sarcasm, threats without an insult; hits people who quote
    one or name themselves so: so the default is a person's look, not a rejection."""
    n = len(_insults.findall(text.lower()))
    return Reason(code="abuse", measured=n, limit=rules.max_abuse) if n > rules.max_abuse else None


def exploit(text: str, rules: Ruleset) -> Reason | None:
    """A tag that stands in for malware here: EXPLOIT-..., CVE numbers, EICAR. Misses real exploits, all of them; hits
    security notes that name a CVE."""
    n = len(_exploit.findall(text.lower()))
    return Reason(code="exploit", measured=n, limit=0) if n else None


FILTERS = (length, mojibake, low_signal, spam, boilerplate, abuse, exploit)


def apply_filters(row: Mapping[str, Any], ruleset: Ruleset) -> list[Reason]:
    """The reasons of all filters that hit, in the order of FILTERS; those the ruleset admits anyway are left out.
    A text that is too long is not looked at further: no row may take long.

    Reads `row["text"]` and nothing else. Raises ValueError for a row without a text."""
    text = row.get("text")
    if not isinstance(text, str):
        raise ValueError(f"row {row.get('id')!r}: 'text' is {text!r:.40}; give a string")
    too_long = len(text) > ruleset.max_chars and ruleset.verdict("too_long") == "reject"
    found = [reason for f in (FILTERS[:1] if too_long else FILTERS) if (reason := f(text, ruleset))]
    return [reason for reason in found if ruleset.verdict(reason.code) != "admit"]
