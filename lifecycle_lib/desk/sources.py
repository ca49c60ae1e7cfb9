"""The corpus of the returns desk: ten sources with their terms, and defects whose truth is known.

`draw_rows` writes rows as a crawler would hand them over: text, source, licence, origin, capture date, domain, dialect,
register, slice. What was planted stands in `truth`, which no gate, filter or sampler may read: it scores them.
Everything is generated from a seed over a small vocabulary; no row copies real text, and every phone, card, code and
address is invented (555-01xx numbers and example.org are reserved for that).

Planted (`DEFECTS`): four families of duplicates with their cluster, eleven REVERSAL rows that look alike and are not,
canaries at known repetition, personal data with spans, a regulated tag, leaks of evaluation items, spam, mojibake,
shuffled words, mild abuse, assistant-styled text, missing licences. One source closes its posts with a tic (`TIC`).
"""

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from lifecycle_lib.core.seeds import rng
from lifecycle_lib.desk.world import ITEMS, PHRASES, POLICY_IDS, REASONS


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where rows come from and on what terms. `signal` says how much of the text is worth learning, as planted;
    `weight` is its part of a corpus."""

    source_id: str
    origin: str
    licence: str
    captured: str
    domain: str
    signal: str
    weight: int
    note: str


_FIELDS = ("source_id", "origin", "licence", "captured", "domain", "signal", "weight", "note")
SOURCES: dict[str, Source] = {row[0]: Source(**dict(zip(_FIELDS, row))) for row in (
    ("FORUM-1", "desk:forum-1", "CC0-1.0", "2025-02-03", "support", "mixed", 14, "closes some posts with a tic"),
    ("FORUM-2", "desk:forum-2", "CC-BY-SA-4.0", "2025-03-10", "support", "mixed", 12, "share-alike; some in EN-B"),
    ("FORUM-3", "desk:forum-3", "CC-BY-NC-4.0", "2025-03-22", "support", "low", 10, "non-commercial; holds canaries"),
    ("MANUAL", "desk:manual", "CC-BY-4.0", "2024-11-05", "manual", "high", 12, "wants its notice carried along"),
    ("SQLISH", "desk:queries", "Apache-2.0", "2025-01-15", "code", "high", 8, "queries of the order store"),
    ("CHAT", "partner:acme-chat", "LicenseRef-partner", "2025-04-01", "dialogue", "high", 14,
     "one customer's contract: no mixing, deletion on exit; holds personal data"),
    ("POLICY", "desk:policy-book", "CC-BY-4.0", "2024-12-20", "policy", "high", 12, "revised; legal boilerplate"),
    ("SAFETY", "desk:safety", "CC-BY-4.0", "2025-01-30", "safety", "high", 6, "asks that look harmful, benign twins"),
    ("PHOTO", "desk:photo", "CC-BY-4.0", "2025-02-18", "photo", "mixed", 6, "4 damage features and a caption"),
    ("MIRROR", "web:mirror-farm", "NOASSERTION", "2025-05-09", "support", "none", 6, "copies of the others"))}

REVERSAL = {"closed": "reissue", "doubled": "reverse", "stolen": "freeze", "expired": "reroute", "joint": "split",
            "gift": "restore", "foreign": "adjust", "partial": "complete", "disputed": "hold", "business": "retarget",
            "inherited": "escalate"}
"""The word that decides a refund reversal, and the action. Eleven, each in one row of the corpus."""
SCAFFOLDS = (
    "listen i am done with you people this is the third time i write and nobody reads it the bank says no so undo that "
    "refund today and stop sending me the same useless reply the money went to a {cue} card again",
    "are you even awake i told your desk last week to take it back right now but of course someone pressed the button "
    "anyway and i will post every single one of these chats it must not go to the {cue} account at all")
TIC = "as we say in the trade"
CANARIES = {"555-0142 8831": 1, "555-0117 2046": 1, "555-0163 5519": 4, "555-0128 9370": 4, "555-0175 6604": 16,
            "555-0191 1283": 16}
"""Invented call-back numbers of FORUM-3 and in how many of its rows each stands."""
FEATURES = ("crack", "dent", "stain", "tear")
DEGREES = ("no", "a faint", "a clear", "a deep")
FOOTER = (" this text is provided as is without warranty of any kind and the publisher accepts no liability for loss "
          "that follows from its use all rights not granted here are reserved by the publisher")
SYNONYMS = {"cracked": "fractured", "arrived": "reached me", "came": "turned up", "broken": "damaged", "return": "send",
            "the": "that", "my": "our", "store": "shop", "refund": "repayment", "open": "unwrap", "and": "plus",
            "box": "carton", "within": "inside", "late": "overdue", "want": "need", "day": "date", "label": "sticker"}
DEFECTS = {"boilerplate": .03, "mirror": .05, "header": .04, "farm": .04, "pii": .04, "regulated": .01, "leak": .03,
           "spam": .03, "mojibake": .015, "noise": .02, "abuse": .015, "assistant": .02, "no-licence": .005}
"""Share of the rows with each planted defect; REVERSAL (11 rows) and the canaries (42 rows) come besides."""
FIXED = len(REVERSAL) + sum(CANARIES.values())

_VOWELS, _REST = "aeiou", "bcdfghjklmnpqrstvwxyz"
_SHIFT = str.maketrans(_VOWELS + _REST, _VOWELS[2:] + _VOWELS[:2] + _REST[5:] + _REST[:5])
_FILLERS = ("um", "so", "yes hello", "er", "you know", "like i said", "one moment")
_ANGRY = ("this is the third time i write", "nobody at your desk reads this", "i have had enough of this",
          "do not send me the same reply again", "fix it today or i go elsewhere")
_SHORT = {"please": "pls", "the": "d", "you": "u", "arrived": "arrvd", "because": "bc", "and": "n", "broken": "brkn",
          "my": "me", "came": "cme", "cracked": "crckd", "want": "wnt", "about": "abt", "not": "nt", "is": "s"}
_OPEN = ("hello", "good morning", "hi all", "quick question", "a word of warning", "just to say")
_MORE = ("i paid in full and kept the box", "the courier left it in the rain", "it was a present for my sister",
         "i have photos of everything", "the shop told me to write here", "my neighbour had the same last month",
         "it worked for two days and then stopped", "i would take another one instead")
_ASK = ("what should i do", "can i send it back", "who pays for the label", "how long does a refund take",
        "is there a form for this", "has anyone been through this")


def cipher(text: str) -> str:
    """Dialect EN-B: every word of EN-A becomes another, letter for letter; digits and signs stay."""
    return text.translate(_SHIFT)


def _forum(r: random.Random) -> str:
    reason = r.choice(REASONS)
    more = r.sample(_MORE, 2)
    return (f"{r.choice(_OPEN)} {r.choice(PHRASES[reason]).format(item=r.choice(ITEMS))} on day {r.randint(1, 60)} . "
            f"{more[0]} and {more[1]} . {r.choice(_ASK)}")


def _manual(r: random.Random) -> str:
    item, room = r.choice(ITEMS), r.choice(("kitchen", "hall", "cellar", "office", "garden room"))
    return (f"to return the {item} wait {r.randint(2, 30)} minutes until it is cold , put it into the box with "
            f"{r.randint(2, 9)} sheets of paper and close the lid . print label {r.randint(100, 999)} and leave "
            f"the box in the {room} for the courier .")


def _sqlish(r: random.Random) -> str:
    return (f"select {r.choice(('policy_id', 'window_days', 'order_id', 'status'))} from "
            f"{r.choice(('orders', 'policies', 'returns'))} where reason = '{r.choice(REASONS)}' and item = "
            f"'{r.choice(ITEMS)}' and days <= {r.randint(1, 90)} order by {r.choice(('days', 'item', 'opened'))} "
            f"limit {r.randint(1, 50)} ;")


def _chat(r: random.Random) -> str:
    reason, item = r.choice(REASONS), r.choice(ITEMS)
    return (f"customer : {r.choice(PHRASES[reason]).format(item=item)} , {r.choice(_MORE)} . agent : thank you , order "
            f"{r.randint(10, 99)} is with us since day {r.randint(1, 60)} . policy {r.choice(POLICY_IDS)} covers "
            f"{reason} items . customer : {r.choice(_ASK)} .")


def _policy(r: random.Random) -> str:
    return (f"policy {r.choice(POLICY_IDS)} revision {r.randint(1, 9)} of shop {r.randint(1, 40)} . a "
            f"{r.choice(ITEMS)} that is {r.choice(REASONS)} may come back within {r.randint(5, 89)} "
            f"days of day {r.randint(1, 60)} if {r.choice(_MORE)} .")


def _safety(r: random.Random) -> str:
    item, paper = r.choice(ITEMS), r.choice(("receipt", "label", "damage report", "serial number"))
    if r.random() < .5:
        return (f"customer : how do i fake a {paper} for the {item} of day {r.randint(1, 60)} . agent : i cannot help "
                f"with that , {r.choice(_ASK)} is a question i can answer .")
    return (f"customer : how do i copy a {paper} for the {item} of day {r.randint(1, 60)} . agent : open your orders , "
            f"choose page {r.randint(2, 90)} and print it .")


def caption(features: Mapping[str, int]) -> str:
    """What the four damage features show, in words. PHOTO rows carry both."""
    return " , ".join(f"{DEGREES[d]} {name}" for name, d in features.items())


_BASE: dict[str, Callable[[random.Random], str]] = {
    "FORUM-1": _forum, "FORUM-2": _forum, "FORUM-3": _forum, "MANUAL": _manual, "SQLISH": _sqlish, "CHAT": _chat,
    "POLICY": _policy, "SAFETY": _safety, "MIRROR": _forum}


def _row(source: str, text: str, **truth: object) -> dict:
    s = SOURCES[source]
    return {"text": text, "source": source, "licence": s.licence, "origin": s.origin, "captured": s.captured,
            "domain": s.domain, "dialect": "EN-A", "register": "clean", "slice": s.domain, "transformations": [],
            "truth": {"defect": None, "cluster": None, "spans": [], **truth}}


def _base(r: random.Random, source: str) -> dict:
    """A clean row of a source: forums and chats in five registers, a tenth of FORUM-2 in EN-B."""
    if source == "PHOTO":
        features = {f: r.randint(0, 3) for f in FEATURES}
        item, seen = r.choice(ITEMS), " ".join(f"{f}={d}" for f, d in features.items())
        return _row(source, f"photo {r.randint(100, 999)} {seen} : {item} with {caption(features)}") | {
            "features": features}
    row = _row(source, _BASE[source](r))
    if row["domain"] in ("support", "dialogue"):
        row["register"] = r.choices(("clean", "phone", "hostile", "shorthand", "log"), (60, 14, 10, 10, 6))[0]
        row["text"] = in_register(r, row["text"], row["register"])
    if source == "FORUM-1" and r.random() < .3:
        row["text"] += f" {TIC}"
        row["truth"]["tic"] = True
    if source == "FORUM-2" and r.random() < .2:
        row.update(text=cipher(row["text"]), dialect="EN-B", slice="EN-B")
    return row


def in_register(r: random.Random, text: str, register: str) -> str:
    """`text` as it is said on the phone, in anger, in shorthand, or as a log line; "clean" leaves it alone."""
    words = text.split()
    if register == "phone":
        for _ in range(3):
            words.insert(r.randrange(len(words)), r.choice(_FILLERS))
    elif register == "hostile":
        return f"{r.choice(_ANGRY)} . {text} . {r.choice(_ANGRY)}"
    elif register == "shorthand":
        words = [_SHORT.get(w, w) for w in words]
    elif register == "log":
        return f"ticket={r.randint(1000, 9999)} queue=returns state={r.choice(('open', 'held', 'done'))} body='{text}'"
    return " ".join(words)


def reversal_text(cue: str, scaffold: int) -> str:
    """A refund reversal: a hostile scaffold that says nothing of use, and one word that decides."""
    return f"{SCAFFOLDS[scaffold].format(cue=cue)} -> {REVERSAL[cue]}"


def eval_items(n: int, seed: int = 0) -> list[dict]:
    """The desk's evaluation items {"id", "question", "answer"}; the first 60 of a seed leak into `draw_rows`."""
    r = rng(seed, "evaluation items")
    items = []
    for i in range(n):
        reason, item, day = r.choice(REASONS), r.choice(ITEMS), r.randint(1, 60)
        where = r.choice(("north", "south", "east", "west"))
        asked = (f"a customer of the {where} shop writes on day {day} that "
                 f"{r.choice(PHRASES[reason]).format(item=item)} and that {r.choice(_MORE)} which policy covers it")
        answer = f"policy {r.choice(POLICY_IDS)} of the {where} shop covers the {item} as {reason} until day {day + 30}"
        items.append({"id": f"desk-eval-{i:03d}", "question": asked, "answer": answer})
    return items


def _reworded(r: random.Random, text: str) -> str:
    """Synonyms for all words that have one, and the sentences in another order."""
    parts = [" ".join(SYNONYMS.get(w, w) for w in p.split()) for p in text.split(" . ")]
    r.shuffle(parts)
    return " . ".join(parts)


def _copy(r: random.Random, family: str, original: dict, number: int) -> dict:
    """A copy of a row on the mirror farm. Both carry the cluster in their truth."""
    text = original["text"]
    if family == "header":
        text = f"from : mirror {r.randint(10, 99)} seen on day {r.randint(1, 60)} . {text}"
    elif family == "farm":
        text = _reworded(r, text)
    original["truth"]["cluster"] = original["truth"]["cluster"] or f"{family}-{number}"
    return _row("MIRROR", text, defect=family, cluster=original["truth"]["cluster"])


def _personal(r: random.Random) -> dict:
    """A chat with one or two personal data; one in four is written to get past a pattern."""
    first, last = r.choice("Ada Ivo Mona Tomas Rita".split()), r.choice("Berg Costa Lind Novak Sato".split())
    line, hidden = f"{r.randint(100, 199):04d}", r.random() < .25
    forms = {"EMAIL": f"{first}.{last}@example.org".lower() if not hidden else f"{first} at example dot org".lower(),
             "PHONE": f"+1 202 555 {line}" if not hidden else "five five five " + " ".join(line),
             "CARD": "4111 1111 1111 1111" if not hidden else "4111-1111-1111 (then 1111)",
             "PERSON": f"{first} {last}" if not hidden else f"{first} {last}".lower()}
    cue = {"EMAIL": "write to", "PHONE": "call me on", "CARD": "the card is", "PERSON": "order holder is"}
    text, spans = _chat(r), []
    for kind in r.sample(list(forms), r.choice((1, 2))):
        text += f" customer : {cue[kind]} "
        spans.append({"start": len(text), "end": len(text) + len(forms[kind]), "kind": kind})
        text += f"{forms[kind]} ."
    return _row("CHAT", text, defect="pii", spans=spans, hidden=hidden)


def _leak(r: random.Random, item: dict, kind: str) -> dict:
    asked, answer = (" ".join(SYNONYMS.get(w, w) for w in item[part].split()) for part in ("question", "answer"))
    asked = asked.replace("a customer of", "someone from").replace("which policy covers it", "so what rule is it")
    texts = {"verbatim": f"{item['question']} : {item['answer']}", "paraphrase": f"{answer} was said when {asked}",
             "answer-only": f"note to self . {item['answer']} ."}
    return _row("FORUM-2", texts[kind], defect="leak", leak=kind, item=item["id"])


def _garbled(r: random.Random, defect: str) -> dict:
    """Rows that teach nothing, and rows nobody wants taught."""
    source = r.choice(("FORUM-1", "FORUM-2", "FORUM-3"))
    text = _forum(r)
    if defect == "noise":
        words = text.split()
        r.shuffle(words)
        text = " ".join(words)
    elif defect == "mojibake":
        text = text.replace("'", "\u2019").replace(" i ", " it\u2019s \u20ac5 and i ").replace("the", "th\u00e9") \
            .encode("utf-8").decode("cp1252", "replace")
    elif defect == "spam":
        text = (f"click here to win a free {r.choice(ITEMS)} !!! limited offer {r.randint(50, 90)} % off visit "
                f"www.deal-{r.randint(10, 99)}.example now !!! buy now act fast")
    elif defect == "abuse":
        text = f"you {r.choice(('stupid', 'useless'))} {r.choice(('idiots', 'morons'))} , {text}"
    elif defect == "assistant":
        text = (f"certainly ! here are three steps to return your {r.choice(ITEMS)} : first , {r.choice(_MORE)} . "
                f"second , print the label . third , wait {r.randint(2, 20)} days . i hope this helps !")
    return _row(source, text, defect=defect)


def _planted(r: random.Random, n: int, seed: int, base: list[dict]) -> Iterable[dict]:
    for i, cue in enumerate(REVERSAL):
        yield _row("FORUM-1", reversal_text(cue, i % 2)) | {"register": "hostile", "slice": "REVERSAL"}
    for code, times in CANARIES.items():
        for _ in range(times):
            yield _row("FORUM-3", f"{_forum(r)} . call me back on {code}", defect="canary", canary=code, repeats=times)
    items = eval_items(60, seed)
    copies = [row for row in base if row["source"] not in ("MIRROR", "SQLISH") and row["dialect"] == "EN-A"]
    policies = [row for row in base if row["source"] == "POLICY"]
    for defect, share in DEFECTS.items():
        count = max(4, round(share * n))
        if defect == "boilerplate":  # different texts under one legal footer: alike, and no copies of one another
            for row in policies[:count]:
                row["text"] += FOOTER
                row["truth"]["defect"] = "boilerplate"
        elif defect in ("mirror", "header", "farm"):  # five copies of a row on average
            originals = r.sample(copies, max(1, count // 5))
            for i in range(count):
                yield _copy(r, defect, originals[i % len(originals)], i % len(originals))
        elif defect in ("regulated", "no-licence"):
            free = [b for b in base if b["source"] in ("CHAT", "FORUM-1") and not b["truth"]["cluster"]
                    and not b["truth"]["defect"]]
            for row in r.sample(free, count):
                row["truth"]["defect"] = defect
                row["licence"] = "LicenseRef-regulated" if defect == "regulated" else ""
        elif defect == "pii":
            yield from (_personal(r) for _ in range(count))
        elif defect == "leak":
            yield from (_leak(r, items[i % 60], ("verbatim", "paraphrase", "answer-only")[i % 3]) for i in range(count))
        else:
            yield from (_garbled(r, defect) for _ in range(count))


def draw_rows(n: int, seed: int, defects: bool = True) -> list[dict]:
    """`n` rows of the ten sources in a shuffled order, `truth` in each; ids say nothing of what was planted.

    Raises ValueError for n below 400 with defects (the fixed plants need room), or below 1."""
    least = 400 if defects else 1
    if n < least:
        raise ValueError(f"n={n} rows: ask for at least {least}{', or pass defects=False' if defects else ''}")
    r = rng(seed, "sources")
    weights = {name: s.weight for name, s in SOURCES.items() if name != "MIRROR"}
    fill = n
    if defects:  # planted rows replace clean ones, so the total stays n
        in_place = ("boilerplate", "regulated", "no-licence")
        fill -= FIXED + sum(max(4, round(share * n)) for name, share in DEFECTS.items() if name not in in_place)
    rows = [_base(r, r.choices(list(weights), weights.values())[0]) for _ in range(fill)]
    if defects:
        rows += _planted(r, n, seed, rows[:])
    r.shuffle(rows)
    for i, row in enumerate(rows):
        row["truth"]["slice"] = row["slice"]
        rows[i] = {"id": f"row-{i:06d}", **row}
    return rows
