"""How people really type: rates counted on public files, for desk/messy.py to follow.

Each rate is k of n with a Wilson interval and the file it was counted on; no text of a file is kept, their licences ask
for that. Four registers, as far as the files carry them:
- clean: BANKING77, questions that crowd workers typed to a bank (Casanueva et al. 2020);
- hostile: those of them with a word of anger or a double exclamation mark (a word list, few messages, wide intervals);
- phone: the SMS collection's ham, texts between private people before 2012 (Almeida et al. 2011);
- shorthand: those of them with at least one word of SHORT.
MultiDoGO (Peskov et al. 2019) is measured beside them (`chat`), but its copy has lost case and punctuation, so it
cannot be a register: it checks the typo rate only. Kinds of edits come from codespell's pairs: a list of misspellings
that somebody found, each once, mostly in source code; how often each happens stands nowhere.

A typo is counted when a word of five letters or more is written at most twice in its file, is not among the reference
words, is not shorthand, and lies one edit (insertion, deletion, substitution, swap of neighbours; Damerau 1964) from a
word used often; or when codespell lists it. This misses slips that give another word ("form" for "from"), slips of two
edits and in short words, and takes some rare words and homemade spellings for typos. `listed` counts only what
codespell lists, a floor.
"""

import csv
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from math import log2
from pathlib import Path

from lifecycle_lib.core.stats import wilson

BANK = ("support/banking77_train.csv", "support/banking77_test.csv")
SMS = "support/sms_spam_collection.tsv"
CHAT = tuple(f"support/multidogo_{d}_test.tsv" for d in ("airline", "media", "software"))
PAIRS = "typos/codespell_20k.txt"
REFERENCE = ("corpora/tinystories_sample.txt", "corpora/wizard_of_oz.txt", "corpora/state_of_the_union_1985_on.txt",
             "math/gsm8k_train_trim.jsonl", "retrieval/tau2_bank_kb.jsonl", "support/abcd_guidelines.json",
             "support/clinc150_small.json", "sft/self_instruct_seed_tasks.jsonl", "preference/oasst_en_100_trees.jsonl")
NAMES = ("pii/names_male.txt", "pii/names_female.txt")

SHORT = {"you": ("u",), "your": ("ur",), "are": ("r",), "please": ("pls", "plz"), "to": ("2",), "for": ("4",),
         "before": ("b4",), "because": ("cos", "coz", "cuz", "bcoz"), "and": ("n",), "what": ("wat", "wot"),
         "with": ("wif", "wid"), "have": ("hav",), "about": ("abt",), "back": ("bk", "bak"), "but": ("bt",),
         "the": ("da", "d"), "that": ("dat",), "this": ("dis",), "message": ("msg",), "text": ("txt",),
         "week": ("wk",), "weeks": ("wks",), "late": ("l8",), "great": ("gr8",), "thanks": ("thx", "thanx", "tnx"),
         "tomorrow": ("tmr", "tmrw", "2moro"), "today": ("2day",), "tonight": ("2nite",), "now": ("nw",),
         "not": ("nt",), "how": ("hw",), "from": ("frm",), "when": ("wen",), "just": ("jus",), "my": ("ma",),
         "want": ("wan", "wana"), "going": ("goin",), "something": ("smth",), "okay": ("ok", "k"), "see": ("c",)}
FULL_OF = {short: full for full, shorts in SHORT.items() for short in shorts}
CONTRACTED = ("don't", "didn't", "doesn't", "isn't", "wasn't", "haven't", "hasn't", "couldn't", "wouldn't", "aren't",
              "i'm", "i've", "that's", "what's", "there's", "you're", "they're")
BARE = {c.replace("'", "") for c in CONTRACTED}
ANGER = re.compile(r"\b(?:ridiculous|terrible|horrible|worst|awful|angry|furious|unacceptable|useless|disgust\w+|"
                   r"pathetic|rubbish|crap|stupid|hell|damn|scam|joke|fed up|sick of|annoy\w+|frustrat\w+|upset|"
                   r"disappointed|appalling|outrageous|nonsense|incompetent)\b|!!", re.IGNORECASE)
GREETING = re.compile(r"(?:hi|hello|hey|hai|dear|good (?:morning|evening|afternoon))\b", re.IGNORECASE)
KEYBOARD = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
LENGTHS = {"5-6": (5, 6), "7-8": (7, 8), "9+": (9, 99)}
SHORTEST = 5  # letters of a word that may carry a typo
KINDS = ("double", "undouble", "insert", "delete", "swap", "substitute")
PLACES = ("first", "inner", "last")
WORD = re.compile(r"[a-z0-9']+")
LONE_I = re.compile(r"(?<![\w'])[iI](?![\w'.])")
FITTED = ("all_caps", "lower_start", "lower_i", "no_stop", "bang", "no_apostrophe", "greeting", "question_first")


def neighbours() -> dict[str, str]:
    """Each letter's neighbours on a QWERTY keyboard: left and right, and the two that touch it above and below."""
    near: dict[str, set[str]] = {c: set() for row in KEYBOARD for c in row}
    for y, row in enumerate(KEYBOARD):
        for x, c in enumerate(row):
            for dy, dx in ((0, -1), (0, 1), (-1, 0), (-1, 1), (1, 0), (1, -1)):
                if 0 <= y + dy < 3 and 0 <= x + dx < len(KEYBOARD[y + dy]):
                    near[c].add(KEYBOARD[y + dy][x + dx])
    return {c: "".join(sorted(s)) for c, s in near.items()}


NEAR = neighbours()


def rate(k: int, n: int) -> dict:
    """k of n with its 95 % Wilson interval. Raises ValueError when n is 0: there was no occasion to count on."""
    low, high = wilson(k, n)
    return {"k": k, "n": n, "rate": round(k / n, 6), "low": round(low, 6), "high": round(high, 6)}


def edit_of(wrong: str, right: str) -> tuple[str, int, str, str] | None:
    """(kind, index in `right`, letter of `right`, letter typed) of the one edit between two words, or None."""
    i = 0
    while i < min(len(wrong), len(right)) and wrong[i] == right[i]:
        i += 1
    a, b = wrong[i:], right[i:]
    if len(a) == len(b) + 1 and a[1:] == b:
        return ("double" if i and a[0] == right[i - 1] else "insert"), i, "", a[0]
    if len(b) == len(a) + 1 and b[1:] == a:
        return ("undouble" if i and b[0] == right[i - 1] else "delete"), i, b[0], ""
    if len(a) == len(b) and a:
        if a[1:] == b[1:]:
            return "substitute", i, b[0], a[0]
        if len(a) > 1 and a[0] == b[1] and a[1] == b[0] and a[2:] == b[2:]:
            return "swap", i, b[:2], a[:2]
    return None


def place_of(index: int, kind: str, word: str) -> str:
    """Where in the word: at its first letter, at its last, or between. A swap and an insertion have one place fewer
    or more than the word has letters."""
    end = len(word) - (kind == "swap") - 1 + (kind in ("insert", "double"))
    return "first" if index == 0 else "last" if index >= end else "inner"


def has_double(word: str) -> bool:
    return any(x == y for x, y in zip(word, word[1:]))


def letter_class(was: str, typed: str) -> str:
    """A letter typed for another: a vowel for a vowel, a neighbouring key, or any other."""
    return "vowel" if was in "aeiou" and typed in "aeiou" else "near" if typed in NEAR.get(was, "") else "other"


def edit_rates(edits: Iterable[tuple[str, str]]) -> dict:
    """Single edits among (wrong, right) pairs: kinds, apart for words with a doubled letter; places by kind; letters
    typed for letters."""
    kinds = {"plain": Counter(), "doubled": Counter()}
    places: dict[str, Counter] = {kind: Counter() for kind in KINDS}
    letters = Counter()
    n_pairs = 0
    for wrong, right in edits:
        n_pairs += 1
        found = edit_of(wrong, right)
        if found is None or not (wrong + right).isalpha() or not right.isascii() or len(right) < SHORTEST:
            continue
        kind, i, was, typed = found
        kinds["doubled" if has_double(right) else "plain"][kind] += 1
        places[kind][place_of(i, kind, right)] += 1
        if kind == "substitute":
            letters[letter_class(was, typed)] += 1
    total = sum(sum(c.values()) for c in kinds.values())
    return {"single_edit": rate(total, n_pairs),
            "kinds": {have: {kind: rate(c[kind], sum(c.values())) for kind in KINDS if have == "doubled" or
                             kind != "undouble"} for have, c in kinds.items()},
            "places": {kind: {p: rate(c[p], sum(c.values())) for p in PLACES} for kind, c in places.items()},
            "letters": {what: rate(letters[what], sum(letters.values())) for what in ("vowel", "near", "other")}}


def one_edit_away(word: str) -> Iterable[str]:
    """All words one edit from `word`, letters only (Norvig's list)."""
    parts = [(word[:i], word[i:]) for i in range(len(word) + 1)]
    for a, b in parts:
        if b:
            yield a + b[1:]
        if len(b) > 1:
            yield a + b[1] + b[0] + b[2:]
        for c in "abcdefghijklmnopqrstuvwxyz":
            yield a + c + b
            if b:
                yield a + c + b[1:]


class Words:
    """Which words are known, and which are used often enough to be what somebody meant to type.

    `reference` and `own` are counts in edited text and in the file that is measured."""

    def __init__(self, reference: Counter, own: Counter, pairs: Sequence[tuple[str, str]]) -> None:
        self.right_of = dict(pairs)
        both = reference + own
        self.often = {w for w, n in both.items() if n >= 10} - self.right_of.keys()
        self.known = ({w for w, n in reference.items() if n >= 2} | {w for w, n in own.items() if n >= 3}
                      | set(self.right_of.values())) - self.right_of.keys()
        self._cache: dict[str, str | None] = {}

    def is_known(self, word: str) -> bool:
        stems = (word, *(word.removesuffix(s) for s in ("s", "es", "ed", "ing", "er", "ly", "d", "'s")))
        return any(s in self.known for s in stems)

    def meant(self, word: str) -> str | None:
        """What a typo stands for, or None for a word that is none as counted here."""
        if word not in self._cache:
            self._cache[word] = self._meant(word) if len(word) >= SHORTEST and word.isalpha() else None
        return self._cache[word]

    def _meant(self, word: str) -> str | None:
        if word in BARE or word in FULL_OF:  # counted as what they are
            return None
        if word in self.right_of or self.is_known(word):
            return self.right_of.get(word)
        return min((w for w in one_edit_away(word) if w in self.often and len(w) >= SHORTEST), default=None)


def typo_rates(texts: Sequence[str], words: Words) -> dict:
    """Share of words with a typo, by length of the word that was meant; codespell's floor; all unknown words."""
    seen = [w for t in texts for w in WORD.findall(t.lower().replace("’", "'")) if w.isalpha() and len(w) >= SHORTEST]
    part = {name: [w for w in seen if a <= len(words.meant(w) or w) <= b] for name, (a, b) in LENGTHS.items()}
    return {"typo": {name: rate(sum(words.meant(w) is not None for w in ws), len(ws))
                     for name, ws in part.items()},
            "listed": rate(sum(w in words.right_of for w in seen), len(seen)),
            "unknown": rate(sum(not words.is_known(w) for w in seen), len(seen))}


def short_rates(texts: Sequence[str]) -> dict:
    """For each word with a short form: share of its uses that are short, and how often each form; words never seen are
    left out."""
    counts = Counter(w for t in texts for w in WORD.findall(t.lower()))
    found = {}
    for full, shorts in SHORT.items():
        forms = [counts[s] for s in shorts]
        if n := sum(forms) + counts[full]:
            found[full] = {**rate(sum(forms), n), "forms": forms}
    return found


def sentences(text: str) -> list[str]:
    return [s for s in re.split(r"(?<=[.!?])\s+", text.strip()) if re.search(r"\w", s)]


def text_rates(texts: Sequence[str]) -> dict:
    """Case, punctuation, apostrophes, sentences: what make_messy is to follow, counted in one way for real texts and
    for generated ones."""
    letters = [t for t in texts if re.search(r"[a-zA-Z]", t)]
    n = len(letters)
    first = [re.search(r"[a-zA-Z]", t).group() for t in letters]  # type: ignore[union-attr]
    caps = [t for t in letters if t.upper() == t and sum(c.isalpha() for c in t) >= 8]
    cased = [t for t in letters if t.upper() != t]
    lone = Counter(w for t in cased for w in LONE_I.findall(t, 1))  # the first letter has its own rate
    low = " ".join(letters).lower().replace("’", "'")
    whole = sum(len(re.findall(rf"\b{c}\b", low)) for c in CONTRACTED)
    bare = sum(len(re.findall(rf"\b{c.replace(chr(39), '')}\b", low)) for c in CONTRACTED)
    parts = [sentences(t) for t in letters]
    several = [p for p in parts if len(p) > 1]
    asked = [p for p in several if sum("?" in s for s in p) == 1]
    return {"all_caps": rate(len(caps), n),
            "lower_start": rate(sum(c.islower() for c in first), n),
            "lower_i": rate(lone["i"], lone["i"] + lone["I"]),
            "no_stop": rate(sum(t.rstrip()[-1].isalnum() for t in letters), n),
            "bang": rate(sum("!" in t for t in letters), n),
            "no_apostrophe": rate(bare, bare + whole),
            "greeting": rate(sum(bool(GREETING.match(t.strip())) for t in letters), n),
            "several": rate(len(several), n),
            "two_questions": rate(sum(t.count("?") > 1 for t in letters), n),
            "question_first": rate(sum("?" in p[0] for p in asked), len(asked)),
            "words_mean": round(sum(len(t.split()) for t in letters) / n, 3)}


def fit_report(texts: Sequence[str], of: dict) -> list[dict]:
    """Each fitted rate of generated texts beside the measured one, with z: their distance in standard errors of the
    generated count. Shorthand words count from 30 occasions on. A second matter is a second sentence here, where
    nothing else makes one."""
    got, rows = text_rates(texts), []
    pairs = [(name, got[name], of[name]["rate"]) for name in FITTED]
    pairs.append(("second matter", got["several"], of["two_questions"]["rate"]))
    pairs += [(f"{w} -> {'/'.join(SHORT[w])}", r, of["short"].get(w, {"rate": 0.0})["rate"])
              for w, r in short_rates(texts).items() if r["n"] >= 30]
    for name, r, want in pairs:
        error = (max(want * (1 - want), 1 / r["n"]) / r["n"]) ** 0.5
        rows.append({"name": name, "measured": want, "generated": r["rate"], "n": r["n"],
                     "z": (r["rate"] - want) / error})
    return rows


def trigrams(texts: Iterable[str]) -> Counter:
    """Character trigrams, two spaces before each text and one after."""
    return Counter(p[i:i + 3] for t in texts for p in (f"  {t} ",) for i in range(len(p) - 2))


def js_divergence(p: Counter, q: Counter) -> float:
    """Jensen-Shannon divergence of two count tables in bits (Lin 1991): 0 the same, 1 nothing in common."""
    n, m = p.total(), q.total()
    if not n or not m:
        raise ValueError(f"{n} and {m} n-grams: a divergence needs text on both sides")
    total = 0.0
    for key in p.keys() | q.keys():
        a, b = p[key] / n, q[key] / m
        mid = (a + b) / 2
        total += (a * log2(a / mid) if a else 0.0) + (b * log2(b / mid) if b else 0.0)
    return total / 2


def read_files(folder: Path) -> dict[str, list[str]]:
    """Texts by set: bank, hostile, sms, shorthand, chat. Raises ValueError naming a missing or misshapen file."""
    bank = []
    for name in BANK:
        rows = list(csv.DictReader(_text(folder, name).splitlines()))
        if not rows or "text" not in rows[0]:
            raise ValueError(f"{folder / name}:1: no column 'text'; give BANKING77's train.csv and test.csv")
        bank += [r["text"].strip() for r in rows]
    sms = [line.split("\t", 1)[1].strip() for line in _text(folder, SMS).splitlines() if line.startswith("ham\t")]
    sms = [re.sub(r"&lt;.*?&gt;|&\w+;", "", t) for t in sms]  # masked numbers and entities
    chat = []
    for name in CHAT:
        for line in _text(folder, name).splitlines()[1:]:
            cells = line.split("\t")
            if len(cells) == 6 and cells[5] != "contentonly":  # turns that only hand over a name or a number
                pairs = zip(cells[3].split(), cells[4].split())
                chat.append(" ".join(w for w, slot in pairs if slot == "O"))
    if not sms or not chat:
        raise ValueError(f"{folder}: {len(sms)} SMS and {len(chat)} chat turns; the files are not what they were")
    return {"bank": bank, "hostile": [t for t in bank if ANGER.search(t)], "sms": [t for t in sms if t],
            "shorthand": [t for t in sms if FULL_OF.keys() & set(WORD.findall(t.lower()))],
            "chat": [c for c in chat if c]}


def _text(folder: Path, name: str) -> str:
    try:
        return (folder / name).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{folder / name}: cannot be read ({error.strerror}); give the folder with the public data"
                         ) from error


def read_pairs(folder: Path) -> list[tuple[str, str]]:
    pairs = [line.lower().split("->") for line in _text(folder, PAIRS).splitlines()]
    for number, pair in enumerate(pairs, start=1):
        if len(pair) != 2:
            raise ValueError(f"{folder / PAIRS}:{number}: not 'wrong->right'; give codespell's dictionary")
    return [(a, b) for a, b in pairs]


def reference_counts(folder: Path) -> Counter:
    counts: Counter = Counter()
    for name in REFERENCE:
        counts.update(WORD.findall(_text(folder, name).lower().replace("\\n", " ").replace("’", "'")))
    for name in NAMES:
        counts.update(dict.fromkeys(WORD.findall(_text(folder, name).lower()), 2))
    return counts


def words_of(texts: Iterable[str]) -> list[str]:
    return [w for t in texts for w in WORD.findall(t.lower().replace("’", "'"))]


REGISTERS = {"clean": ("bank", " + ".join(BANK)), "phone": ("sms", f"{SMS} (ham)"),
             "hostile": ("hostile", " + ".join(BANK) + " (a word of anger, or !!)"),
             "shorthand": ("shorthand", f"{SMS} (ham with a word of SHORT)")}


def measure(folder: str | Path) -> dict:
    """All rates of the files under `folder`, ready for data/messy_rates.json; the same bytes on every run."""
    folder = Path(folder)
    pairs, texts = read_pairs(folder), read_files(folder)
    reference = reference_counts(folder)
    known = {part: Words(reference, Counter(words_of(texts[part])), pairs) for part in ("bank", "sms", "chat")}
    registers = {}
    for name, (part, file) in REGISTERS.items():
        words = known["sms" if part in ("sms", "shorthand") else "bank"]
        registers[name] = {"file": file, "texts": len(texts[part]), **text_rates(texts[part]),
                           **typo_rates(texts[part], words), "short": short_rates(texts[part])}
    typed = [(w, m) for part, words in known.items() for w in words_of(texts[part]) if (m := words.meant(w))]
    files = sorted({*BANK, SMS, *CHAT, PAIRS, *REFERENCE, *NAMES})
    return {"format": "lifecycle messy rates 1",
            "files": {f: hashlib.sha256((folder / f).read_bytes()).hexdigest() for f in files},
            "registers": registers, "edits": {"file": PAIRS, **edit_rates(pairs)},
            "beside": {"chat": {"file": " + ".join(CHAT), "texts": len(texts["chat"]),
                                **typo_rates(texts["chat"], known["chat"]), "short": short_rates(texts["chat"])},
                       "edits of customers": {"file": "typos found in BANKING77, SMS and MultiDoGO",
                                              **edit_rates(typed)}}}


def dumps(rates: dict) -> str:
    """JSON with one rate a line: a small file that a reader can follow."""
    text = json.dumps(rates, indent=1)
    return re.sub(r"\{\s+(\"k\":[^{}]*?)\s+\}", lambda m: "{" + re.sub(r"\s+", " ", m[1]) + "}", text) + "\n"
