"""Messy language: a customer's message as people type it, at rates that were counted on real files.

`make_messy` takes one plain sentence ("my mug arrived cracked") and gives what a thumb makes of it. Five causes, each
with its own random stream, so that switching one on or off leaves the draws of the others as they were:
- typos: one edit in a word of five letters or more; kinds and places from codespell's pairs, how often by register;
- casing: case, closing punctuation, apostrophes;
- shorthand: u, pls, 2;
- several: a greeting, and a second matter in the same message, as often as messages hold two question marks;
- order: the second matter before the reason, or the thing named last ("it came broken, the mug").
The rates stand in data/messy_rates.json with n, interval and file (desk/messy_measure.py counts them). The truth stays
as it was: no cause touches the order, and a second matter never names one of the four reasons of this order.

Chosen, not measured: how often the thing is named last (`NAMED_LAST`), which letter is inserted, the wordings. How
often a message holds a second matter no file says: two question marks are a low guess, several sentences a high one.
Left out: more sentences on one matter, slips that give another word, two slips in a word, slips in words under five
letters, emoji, other languages.
"""

import random
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lifecycle_lib.core.records import check_fields, read_json
from lifecycle_lib.core.seeds import rng
from lifecycle_lib.desk.messy_measure import (
    CONTRACTED,
    GREETING,
    LENGTHS,
    LONE_I,
    NEAR,
    SHORT,
    SHORTEST,
    edit_of,
    has_double,
    js_divergence,
    letter_class,
    measure,
    read_files,
    text_rates,
    trigrams,
)
from lifecycle_lib.desk.messy_measure import (
    REGISTERS as MEASURED,
)
from lifecycle_lib.desk.world import ITEMS, PHRASES, REASONS

RATES_FILE = Path(__file__).resolve().parents[2] / "data" / "messy_rates.json"
CAUSES = ("typos", "casing", "shorthand", "several", "order")
REGISTERS = tuple(MEASURED)
NAMED_LAST = 0.1
GREETINGS = ("hi", "hello", "hey")
SECOND = ("how do i send it back?", "how long does the money take?", "can i pay by card next time?",
          "what is your phone number?", "did you get my last message?", "is the shop open on sunday?",
          "can you please send me the receipt?", "do you have my new address?", "are you there?",
          "what happens next?", "can i talk to a person now?", "do i need to print something?")
COMPLAINTS = ("this is ridiculous.", "your service is terrible.", "i am sick of your shop.", "i am really upset.",
              "i have written to you before and you just do not answer.", "this is the worst shop.",
              "do you even read this?", "why does nobody answer?")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
_WORD = re.compile(r"[A-Za-z']+")
_THING = rf"(?:my|the) (?:{'|'.join(ITEMS)})"

CUSTOMER_WORDINGS = {
    "damaged": ("the {item} turned up in bits", "there's a chip out of the {item}", "my {item} leaks",
                "the {item} doesn't work, something rattles inside", "the handle came off my {item}",
                "one corner of the {item} is crushed", "the {item} has a big scratch", "my {item} is bent",
                "the courier dropped my {item}", "the {item} didn't survive the trip", "the {item} was shattered",
                "the {item} fell apart in my hands", "the {item} is snapped in two", "what a mess, a ruined {item}",
                "only splinters left of the {item}", "the {item} has a hole"),
    "late": ("still waiting for the {item}", "the {item} should have been here last week", "the {item} took forever",
             "my {item} isn't here yet", "you promised friday and the {item} came on tuesday",
             "my {item} got here when we had left", "the {item} was for her birthday and that's over",
             "it has been over a month for one {item}", "we needed the {item} on sunday, it came today",
             "the {item} was stuck in the depot for days", "the {item} wasn't here in time",
             "you said two days for the {item}, it was nine", "no sign of the {item} until this morning",
             "the {item} is way behind schedule", "the tracking of my {item} hasn't moved since monday",
             "slowest {item} ever"),
    "unwanted": ("it turns out we have a {item} already", "i bought the {item} by mistake", "my wife hates the {item}",
                 "the {item} doesn't suit the room", "the {item} isn't what i hoped for", "i'm not keeping the {item}",
                 "i found a cheaper {item} elsewhere", "i can't use the {item}", "i have second thoughts on the {item}",
                 "the {item} is fine but we don't need it", "i'd rather have my money than the {item}",
                 "the {item} was a gift and she has one", "i ordered two, one {item} is enough",
                 "no space for the {item} in our flat", "we are moving and can't take the {item}",
                 "no use for a {item} any more"),
    "wrong": ("i ordered blue and the {item} is green", "that's not my {item} in the box", "i asked for a large {item}",
              "the box says {item} but it isn't one", "this {item} belongs to another customer",
              "the label says {item}, inside is something else", "the {item} doesn't match the picture",
              "somebody packed another {item}", "not the model i chose, this {item} is older",
              "the {item} has someone's name on it", "you mixed up my {item} with another order",
              "this {item} isn't from my basket", "you gave me the left {item}, i need the right one",
              "the {item} came in a set i never asked for", "what is this, where is my real {item}",
              "the number on the {item} is not the one on my bill"),
}
"""Wordings of customers, which no teacher of ours imagines (`world.PHRASES` is what it imagines). The last quarter of
each row is for evaluation alone: what nobody has sent yet."""
FRESH = 4


def load_rates(path: str | Path = RATES_FILE) -> dict[str, Any]:
    """The file of rates. Raises ValueError when it is missing, of another format, or short of a register."""
    rates = read_json(path)
    check_fields(rates, {"format": str, "registers": dict, "edits": dict}, str(path))
    if missing := [r for r in REGISTERS if r not in rates["registers"]]:
        raise ValueError(f"{path}: register {missing[0]!r} is missing; count again with: lifecycle data messy FOLDER")
    return rates


def draw_customer(random: random.Random, reason: str, item: str, fresh: bool | None = None) -> str:
    """A customer's wording, the first of each list more often than the last (weights 1/rank).

    `fresh`: True draws from the evaluation's own quarter, False from the rest, None from all."""
    words = CUSTOMER_WORDINGS[reason]
    words = words if fresh is None else words[-FRESH:] if fresh else words[:-FRESH]
    return random.choices(words, [1 / (i + 1) for i in range(len(words))])[0].format(item=item)


def sample_messages(n: int, rates: Mapping, register: str, seed: int = 0) -> list[str]:
    """`n` messages of one register, half in the teacher's wordings and half in customers'."""
    random, texts = rng(seed, "messages", register), []
    for i in range(n):
        reason, item = random.choice(REASONS), random.choice(ITEMS)
        own, known = draw_customer(random, reason, item), random.choice(PHRASES[reason]).format(item=item)
        texts.append(make_messy(own if i % 2 else known, random, rates, register))
    return texts


def calibrate(folder: str | Path, n: int = 2000) -> dict[str, Any]:
    """`measure(folder)`, and what was not fitted: how far `n` generated messages lie from real ones in character
    trigrams (bits), beside two halves of the real file, and in length and messages of several sentences."""
    rates, real = measure(folder), read_files(Path(folder))
    rates["not_fitted"] = {}
    for register, (part, _) in MEASURED.items():
        texts, made = real[part], sample_messages(n, rates, register)
        rng(0, "halves", register).shuffle(texts)
        k = min(n, len(texts) // 2)
        a, b, g = (trigrams(t) for t in (texts[:k], texts[k:2 * k], made[:k]))
        of, got = rates["registers"][register], text_rates(made)
        rates["not_fitted"][register] = {
            "texts": k, "trigrams_generated_real": round(js_divergence(g, a), 4),
            "trigrams_real_real": round(js_divergence(a, b), 4),
            "words_mean": [of["words_mean"], got["words_mean"]],
            "several": [of["several"]["rate"], got["several"]["rate"]]}
    return rates


def tidy(text: str) -> str:
    """A sentence with its capital, its I and its full stop."""
    text = re.sub(r"(?<![\w'])i(?![\w])", "I", text.strip())
    text = text if text[-1] in ".!?" else f"{text}."
    return re.sub(r"(^|[.!?] )([a-z])", lambda m: m[1] + m[2].upper(), text)


def make_messy(message: str, rng: random.Random, rates: Mapping, register: str = "phone",
               causes: Collection[str] = CAUSES) -> str:
    """`message` as somebody of this register types it; with no causes, tidy. Draws once from `rng`, whatever comes.

    Raises ValueError for an empty message, an unknown register or an unknown cause."""
    if not message.strip():
        raise ValueError("message is empty; give one plain sentence")
    if register not in rates["registers"]:
        raise ValueError(f"register {register!r} is unknown; use one of {', '.join(rates['registers'])}")
    if unknown := set(causes) - set(CAUSES):
        raise ValueError(f"cause {sorted(unknown)[0]!r} is unknown; use some of {', '.join(CAUSES)}")
    of = rates["registers"][register]
    streams = {cause: random.Random(rng.getrandbits(64)) for cause in CAUSES}
    text = _compose(message.strip(), streams, of, register, causes)
    if "shorthand" in causes:
        text = _WORD.sub(lambda m: _short(m[0], streams["shorthand"], of["short"]), text)
    if "typos" in causes:
        text = _WORD.sub(lambda m: _typo(m[0], streams["typos"], of["typo"], rates["edits"]), text)
    return _cased(text, streams["casing"], of) if "casing" in causes else tidy(text)


def _compose(text: str, streams: Mapping[str, random.Random], of: Mapping, register: str,
             causes: Collection[str]) -> str:
    """The message with its greeting and its second matter, in their order; a full stop between them."""
    several, order = streams["several"], streams["order"]
    greet, more = several.random() < of["greeting"]["rate"], several.random() < of["two_questions"]["rate"]
    second = several.choice(COMPLAINTS if register == "hostile" else SECOND)
    greeting = several.choice(GREETINGS)
    early, last = order.random() < early_share(of), order.random() < NAMED_LAST
    if "order" in causes and last:
        text = named_last(text)
    if "several" not in causes:
        return text
    if more:
        stop = "" if text[-1] in ".!?" else "."
        text = f"{second} {text}" if early and "order" in causes else f"{text}{stop} {second}"
    return f"{greeting}, {text}" if greet and not GREETING.match(text) else text


def early_share(of: Mapping) -> float:
    """How often the second matter comes first, e. Counted was m, among questions that kept their mark; a share d
    of the marks at the end is lost (dropped, or turned into "!"): m = e / (e + (1 - e)(1 - d))."""
    m, d = of["question_first"]["rate"], of["no_stop"]["rate"] + of["bang"]["rate"]
    return m * (1 - d) / (1 - m * d)


def named_last(text: str) -> str:
    """The thing moved away from where it stood: "it came broken, the mug"; unchanged where that is no English."""
    if m := re.fullmatch(rf"({_THING}) ([^,]+)", text):
        return f"it {m[2]}, {m[1]}"
    if m := re.fullmatch(rf"([^,]+) ({_THING})", text):
        return f"{m[2]}, {m[1]} it"
    return text


def _short(word: str, random: random.Random, short: Mapping) -> str:
    if word not in short or random.random() >= short[word]["rate"]:
        return word
    return random.choices(SHORT[word], short[word]["forms"])[0]


def _typo(word: str, random: random.Random, typo: Mapping, edits: Mapping) -> str:
    if len(word) < SHORTEST or not word.isalpha():
        return word
    name = next(n for n, (low, high) in LENGTHS.items() if low <= len(word) <= high)
    return slip(word, random, edits) if random.random() < typo[name]["rate"] else word


def _pick(random: random.Random, rates: Mapping) -> str:
    return random.choices(list(rates), [r["k"] for r in rates.values()])[0]


def slip(word: str, random: random.Random, edits: Mapping) -> str:
    """`word`, five letters or more in lower case, with one edit drawn by the measured kinds, places and letters."""
    kind = _pick(random, edits["kinds"]["doubled" if has_double(word) else "plain"])
    what, places = _pick(random, edits["letters"]), dict(edits["places"][kind])
    while places:
        place = _pick(random, places)
        ends = len(word) - (kind == "swap") - 1 + (kind in ("insert", "double"))
        spots = [0] if place == "first" else [ends] if place == "last" else list(range(1, ends))
        random.shuffle(spots)
        for i in spots:
            if typed := _edits_at(word, kind, i, what):
                return random.choice(typed)
        del places[place]
    return slip(word, random, edits)  # no such place in this word: another kind


def _edits_at(word: str, kind: str, i: int, what: str) -> list[str]:
    """All results of this kind of edit at index i. A letter is inserted beside its neighbours on the keyboard."""
    a, b = word[:i], word[i:]
    near = "".join(NEAR.get(c, "") for c in (*a[-1:], *b[:1]))
    typed = {"double": [a + a[-1:] + b], "swap": [a + b[1:2] + b[:1] + b[2:]], "insert": [a + c + b for c in near],
             "substitute": [a + c + b[1:] for c in LETTERS if letter_class(b[:1], c) == what]}
    return [w for w in typed.get(kind, [a + b[1:]]) if (edit_of(w, word) or ("", -1))[:2] == (kind, i)]


def _cased(text: str, random: random.Random, of: Mapping) -> str:
    """Case, closing punctuation and apostrophes by the register's rates, from the tidy form."""
    text = tidy(text)
    caps, lower, end = (random.random() for _ in range(3))
    text = LONE_I.sub(lambda m: "i" if m.start() and random.random() < of["lower_i"]["rate"] else m[0], text)
    text = re.sub("|".join(rf"\b{c}\b" for c in CONTRACTED),
                  lambda m: m[0].replace("'", "") if random.random() < of["no_apostrophe"]["rate"] else m[0], text,
                  flags=re.IGNORECASE)
    if end < of["no_stop"]["rate"]:
        text = text.rstrip(".!?")
    elif end < of["no_stop"]["rate"] + of["bang"]["rate"]:
        text = text.rstrip(".!?") + "!"
    if caps < of["all_caps"]["rate"]:
        return text.upper()
    start = of["lower_start"]["rate"] / (1 - of["all_caps"]["rate"])  # an upper-case message has no small start
    return text[0].lower() + text[1:] if lower < start else text
