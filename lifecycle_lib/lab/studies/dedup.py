"""D5: deduplication edits the distribution (curriculum S2-07, S3-1.17, S3-1.19, S3-2.10 to .14).

A corpus of `message -> action` rows and of web pages. A mirror farm copied some pages up to 64 times: true waste, and
what a model learns by heart (Lee et al. 2022, Deduplicating Training Data Makes Language Models Better). Eleven
REVERSAL rows share a hostile scaffold and differ in one word, which decides: a shingle filter takes them for copies.
Messy rows repeat a clean one with the deciding word drawn out; EN-B is a thin dialect with few turns of phrase.

Each arm filters the same corpus (corpus/dedupe, 3-word shingles) and trains a GPT of about 0.1M parameters, one word a
token, for the same number of steps. Loss falls on the action of a message and on every word of a page.

Measured: actions right on unseen wordings, by slice and over the natural mix; pages completed word for word; and
whether an evaluation set would have shown the harm, by how it is built: drawn from the corpus before or after the
filter, in natural shares or the same number a slice. An item is an unseen wording of a row that was drawn.

Left out: embeddings, learning-rate tuning an arm, the cost of the filter itself (seconds for millions of rows).
"""

import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from lifecycle_lib.core.seeds import rng
from lifecycle_lib.core.stats import mcnemar_exact
from lifecycle_lib.core.store import Artifact
from lifecycle_lib.corpus import dedupe, minhash
from lifecycle_lib.corpus.dedupe import choose, clusters_of, near_pairs, pairs_by_domain, tail
from lifecycle_lib.desk import sources
from lifecycle_lib.desk.sources import REVERSAL, cipher, reversal_text
from lifecycle_lib.desk.world import ITEMS, POLICY_IDS, REASONS
from lifecycle_lib.lab.design import Design, Row
from lifecycle_lib.lab.stages import Lab
from lifecycle_lib.lab.studies.small import Vocab, batches_of, right, row_losses, rows_of, small_stage
from lifecycle_lib.model.gpt import GPT, GPTConfig
from lifecycle_lib.train.logprobs import Rows, pad_rows, token_logps
from lifecycle_lib.train.loop import FitConfig

SHINGLE = 3  # words
CALM = ("i paid in full and kept the box", "the courier left it in the rain", "it was a present for my sister",
        "i have photos of everything here", "the shop told me to write to you", "my neighbour had the same last month",
        "it worked for two days only", "i would take another one instead", "we were away for the week",
        "the parcel came with the morning post", "nothing else was in the parcel", "i still have the paper with it",
        "the label on the lid was torn", "please tell me what comes next", "i can bring it to the counter",
        "my brother opened it for me", "it stood in the hall since then", "the bill is in the other name",
        "i ordered it for the new office", "your colleague was very kind about it", "we have two more of them at home",
        "the colour is fine by the way", "i looked at the page twice", "a friend told me about your desk")
HOSTILE = ("i am done with you people", "this is the third time i write", "nobody at your desk reads it",
           "stop sending me the same useless reply", "do it today or i post this", "are you even awake over there",
           "i told your desk last week", "of course someone pressed the button anyway", "the bank says no",
           "take it back right now", "undo that refund today", "i want my money where it was")
PAYMENT = dict(zip("credit debit prepaid student savings salary travel company shared second spare".split(),
                   REVERSAL.values()))
"""Ordinary payments and their actions: common rows, from which a model learns what a word before `card` decides."""
PAYMENT_WORDINGS = ("the money went to a {cue} card", "it should go to the {cue} account", "please use the {cue} card",
                    "it came from a {cue} account")
GOODS = ITEMS + tuple("bowl desk fan heater iron jar kite ladder mirror oven pillow quilt razor sofa table umbrella "
                      "wallet candle drill flute".split())
FILLERS = tuple(" ".join(HOSTILE).split())
DRAWN_OUT = {reason: reason + 3 * reason[-1] for reason in REASONS}  # damaged -> damagedddd
REPEATS, PAGES_EACH, PAGE_PROMPT, PAGE_WORDS = (1, 4, 16, 64), 6, 8, 24
SLICES = ("plain", "messy", "EN-B", "REVERSAL")
PAGE_VOCABULARY = tuple(dict.fromkeys(" ".join(CALM + HOSTILE).split()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much text and training. Every arm trains `steps` steps of `batch` rows."""

    plain: int = 650
    payment: int = 200  # of the plain ones
    messy: int = 16
    dialect: int = 40
    pages_each: int = PAGES_EACH  # of every number of repeats
    steps: int = 360
    batch: int = 32
    lr: float = 3e-3  # of embeddings and norms
    n_embd: int = 64
    n_layer: int = 2
    items: int = 400  # of an evaluation build
    wordings: int = 8  # of a row in the pool the builds draw from, for slices of under 100 rows


SIZES = {"smoke": Size(plain=60, payment=20, messy=8, dialect=8, pages_each=1, steps=4, n_embd=16, n_layer=1, items=40,
                       wordings=2), "laptop": Size(), "gpu": Size()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One filter. `threshold` above 1 filters nothing; `domains` leaves messages alone; `protect` leaves slices of
    under 50 rows alone."""

    threshold: float = 2.0
    rule: str = "shortest"
    per_cluster: int = 1
    protect: bool = False
    domains: bool = False


ARMS: dict[str, Arm] = {
    "off": Arm(), **{f"{t}": Arm(threshold=t) for t in (.95, .9, .8, .7, .6)},
    **{f"0.8 {rule}": Arm(threshold=.8, rule=rule) for rule in ("random", "hardest", "medoid")},
    "0.8 keep 2": Arm(threshold=.8, per_cluster=2), "0.8 keep 4": Arm(threshold=.8, per_cluster=4),
    "0.8 protected": Arm(threshold=.8, protect=True), "0.8 pages only": Arm(threshold=.8, domains=True)}
QUICK = ("off", "0.9", "0.8", "0.8 protected")


# ---- the corpus ----------------------------------------------------------------------------------------------

@dataclass(frozen=True, slots=True)
class Corpus:
    """`rows` {"text", "prompt", "answer", "slice", "key", "domain"}; `pages`: (whole page, repeats), before copying;
    `table`: the policy of every (reason, item)."""

    rows: list[dict] = field(repr=False)
    pages: list[tuple[str, int]] = field(repr=False)
    table: dict[tuple[str, str], str] = field(repr=False)


def _message(slice_: str, key: tuple[str, ...], prompt: str, answer: str) -> dict:
    return {"text": f"{prompt} {answer}", "prompt": prompt, "answer": answer, "slice": slice_, "key": key,
            "domain": "message"}


def wording(r: random.Random, slice_: str, key: tuple[str, ...], table: dict) -> dict:
    """A message of a slice about a key, (reason, item) or (card,). A REVERSAL one is a scaffold as a person in a rage
    would type it: words missing, words too many, and either scaffold around any cue."""
    if slice_ == "REVERSAL":
        words = []
        for word in r.choice(sources.SCAFFOLDS).format(cue=key[0]).split():
            words += [word] * (word == key[0] or r.random() >= .15) + [r.choice(FILLERS)] * (r.random() < .15)
        return _message(slice_, key, f"{' '.join(words)} ->", REVERSAL[key[0]])
    if len(key) == 1:
        around = r.sample(CALM, 3)
        return _message(slice_, key, f"{' '.join(around)} {r.choice(PAYMENT_WORDINGS).format(cue=key[0])} ->",
                        PAYMENT[key[0]])
    reason, item = key
    clauses = r.sample(CALM[:4] if slice_ == "EN-B" else CALM, 2 if slice_ == "EN-B" else 3)
    if slice_ == "plain" and r.random() < .15:
        clauses[r.randrange(3)] = r.choice(HOSTILE)
    said = f"{DRAWN_OUT[reason] if slice_ == 'messy' else reason} {item} {' '.join(clauses)}"
    return _message(slice_, key, f"{cipher(said) if slice_ == 'EN-B' else said} ->", table[key])


def draw_corpus(seed: int, size: Size) -> Corpus:
    """The unfiltered corpus of a seed; pure in (seed, size)."""
    r = rng(seed, "dedup corpus")
    keys = [(reason, item) for reason in REASONS for item in GOODS]
    table = {key: r.choice(POLICY_IDS) for key in keys}
    rows = [wording(r, "plain", r.choice(keys), table) for _ in range(size.plain - size.payment)]
    again = r.sample(rows, size.messy)
    rows += [wording(r, "plain", (card,), table) for card in r.choices(list(PAYMENT), k=size.payment)]
    for row in again:  # the customer writes again, in anger: a near-copy of a clean row
        reason = row["key"][0]
        rows.append(_message("messy", row["key"], row["prompt"].replace(reason, DRAWN_OUT[reason], 1), row["answer"]))
    rows += [wording(r, "EN-B", key, table)
             for key in r.sample([k for k in keys if k[1] in ITEMS], size.dialect)]
    for i, cue in enumerate(REVERSAL):
        prompt, answer = reversal_text(cue, i % 2).split(" -> ")
        rows.append(_message("REVERSAL", (cue,), f"{prompt} ->", answer))
    pages = [(" ".join(r.choices(PAGE_VOCABULARY, k=PAGE_WORDS)), n) for n in REPEATS for _ in range(size.pages_each)]
    for number, (page, repeats) in enumerate(pages):
        for copy in range(repeats):
            words = page.split()
            if copy and number % 3:  # one in three is copied as it is, one under another header, one rewritten
                words[number % 3 - 1] = r.choice(PAGE_VOCABULARY)
            text = " ".join(words)
            rows.append({"text": text, "prompt": "", "answer": text, "slice": "page", "key": (number,),
                         "domain": "page"})
    return Corpus(rows, pages, table)


def vocabulary() -> Vocab:
    words = " ".join([*REASONS, *DRAWN_OUT.values(), *GOODS, *POLICY_IDS, *REVERSAL, *REVERSAL.values(), *CALM,
                      *HOSTILE, *PAYMENT, *PAYMENT_WORDINGS, *sources.SCAFFOLDS, "->"]).replace("{cue}", "").split()
    return Vocab([*words, *map(cipher, (*REASONS, *ITEMS, *" ".join(CALM[:4]).split()))])


VOCAB = vocabulary()


def encode(rows: Sequence[dict]) -> Rows:
    """The action counts in a message, every word in a page."""
    prompts = [[1, *VOCAB.encode(row["prompt"])] for row in rows]
    return pad_rows(prompts, [[*VOCAB.encode(row["answer"]), 2] for row in rows], 0)


def row_loss(model: GPT, rows: Rows) -> tuple[Tensor, dict[str, float]]:
    """Mean over the rows of the mean loss of their counted tokens: a page weighs as much as a message."""
    n = rows.mask[:, 1:].sum(-1).clamp(min=1)
    return -(token_logps(model, rows).sum(-1) / n).mean(), {}


# ---- one arm -------------------------------------------------------------------------------------------------

def kept_by(arm: Arm, rows: Sequence[dict], seed: int, scores: Sequence[float] | None = None) -> dedupe.Choice:
    """What the filter keeps."""
    if arm.threshold > 1:
        return dedupe.Choice(kept=tuple(range(len(rows))), removed=(), rule="all")
    texts = [row["text"] for row in rows]
    pairs = near_pairs(texts, arm.threshold, SHINGLE, "word")
    if arm.domains:
        pairs = pairs_by_domain(pairs, [row["domain"] for row in rows], {"page": arm.threshold, "message": 2.0})
    protect = tail([row["slice"] for row in rows], 50) if arm.protect else None
    return choose(clusters_of(len(rows), pairs), texts, arm.rule, arm.per_cluster, scores, protect, seed, k=SHINGLE)


def item_pool(corpus: Corpus, seed: int, size: Size) -> list[dict]:
    """Unseen wordings of every message of the corpus, each with the row it stands for: one, or `wordings` of a row of
    a slice under 100 rows. Its natural mix is the corpus's own."""
    r, counts, pool = rng(seed, "dedup items"), Counter(row["slice"] for row in corpus.rows), []
    seen = {row["prompt"] for row in corpus.rows}
    for i, row in enumerate(corpus.rows):
        wanted = size.wordings if counts[row["slice"]] < 100 else 1
        while row["domain"] == "message" and wanted:
            item = wording(r, row["slice"], row["key"], corpus.table)
            if item["prompt"] not in seen:
                pool.append(item | {"row": i})
                wanted -= 1
    return pool


def trained(lab: Lab, name: str, arm: Arm, size: Size) -> Artifact:
    """Filter, train, measure. Its card holds the accuracies, the pages completed, and the right items as a string."""
    corpus = draw_corpus(lab.seed, size)
    off = trained(lab, "off", ARMS["off"], size) if arm.rule == "hardest" else None
    scores = row_losses(lab.load(off), encode(corpus.rows)).tolist() if off else None
    choice = kept_by(arm, corpus.rows, lab.seed, scores)
    kept = [corpus.rows[i] for i in choice.kept]
    pool = item_pool(corpus, lab.seed, size)

    def measure(model: GPT) -> dict:
        hits = right(model, encode(pool)).tolist()
        by_slice = {s: [h for h, item in zip(hits, pool) if item["slice"] == s] for s in SLICES}
        accuracy = {s: sum(v) / len(v) for s, v in by_slice.items()}
        weight = Counter(row["slice"] for row in corpus.rows if row["domain"] == "message")
        said = [page.split() for page, _ in corpus.pages]
        whole = right(model, rows_of(VOCAB, [" ".join(p[:PAGE_PROMPT]) for p in said],
                                     [" ".join(p[PAGE_PROMPT:]) for p in said])).tolist()
        verbatim = {str(n): [float(w) for w, (_, k) in zip(whole, corpus.pages) if k == n] for n in REPEATS}
        tokens = sum(len(row["text"].split()) for row in kept)
        left = Counter(row["slice"] for row in kept)
        return {"accuracy": accuracy, "mean": sum(accuracy[s] * weight[s] for s in SLICES) / weight.total(),
                "verbatim": {n: sum(v) / len(v) for n, v in verbatim.items()}, "rows": len(kept), "tokens": tokens,
                "kept": {s: left[s] for s in (*SLICES, "page")}, "hits": "".join(str(int(h)) for h in hits)}

    gpt = GPTConfig(vocab_size=len(VOCAB), block_size=64, n_layer=size.n_layer, n_head=4, n_embd=size.n_embd)
    return small_stage(lab, "dedup", {"arm": name, "filter": arm, "study": size},
                       lambda: batches_of(encode(kept), size.batch, lab.seed), measure, gpt=gpt,
                       parents={"scores": off} if off else None, keep=name == "off", loss_fn=row_loss,
                       fit=FitConfig(steps=size.steps, lr=size.lr, warmup_steps=20, checkpoint_every=10_000),
                       code=(dedupe, minhash, sources, sys.modules[__name__]))


# ---- would an evaluation have shown it? ----------------------------------------------------------------------

BUILDS = {"after": (True, False), "before": (False, False), "before, by slice": (False, True),
          "after, by slice": (True, True)}
"""(drawn from the filtered corpus?, the same number of every slice?)"""


def build(pool: Sequence[dict], corpus: Corpus, kept: Sequence[int], how: str, n: int, seed: int) -> list[int]:
    """The items of one evaluation set, as positions in the pool: rows are drawn, an item of a drawn row is asked.

    In natural shares every row counts once. By slice: n / 4 items of each slice that has rows left, or all it has."""
    after, by_slice = BUILDS[how]
    r, alive = rng(seed, "dedup build", how), set(kept)
    of_row: dict[int, list[int]] = {}
    for position, item in enumerate(pool):
        if not after or item["row"] in alive:
            of_row.setdefault(item["row"], []).append(position)
    if not by_slice:
        rows = r.sample(sorted(of_row), min(n, len(of_row)))
        return [r.choice(of_row[row]) for row in rows]
    drawn = []
    for s in SLICES:
        of_slice = [p for row in sorted(of_row) for p in of_row[row] if corpus.rows[row]["slice"] == s]
        drawn += r.sample(of_slice, min(n // len(SLICES), len(of_slice)))
    return drawn


def alarm(items: Sequence[int], pool: Sequence[dict], before: str, after: str, slice_: str | None = None) -> bool:
    """Does a model lose significantly more items than it wins (exact McNemar, two-sided p < .05)? With `slice_`: on the
    items of that slice, at .05 / 4 for the four slices looked at. No items: no alarm."""
    asked = [i for i in items if slice_ is None or pool[i]["slice"] == slice_]
    lost = sum(before[i] == "1" > after[i] for i in asked)
    won = sum(after[i] == "1" > before[i] for i in asked)
    return lost > won and mcnemar_exact(lost, won) < (.05 if slice_ is None else .05 / len(SLICES))


def measure(lab: Lab, size: Size | None = None, arms: Sequence[str] = tuple(ARMS)) -> tuple[Row, list[Artifact]]:
    """All arms of one seed. Every arm must come with "off"; the builds need "0.8"."""
    size = size or SIZES[lab.profile.name]
    made = {name: trained(lab, name, ARMS[name], size) for name in dict.fromkeys(("off", "0.8", *arms))}
    found = {name: a.card["measured"] for name, a in made.items()}
    row: Row = {}
    for name, m in found.items():
        row |= {f"{name}.{s}": v for s, v in m["accuracy"].items()}
        row |= {f"{name}.mean": m["mean"], f"{name}.verbatim": (m["verbatim"]["16"] + m["verbatim"]["64"]) / 2}
        row |= {f"{name}.verbatim x{n}": v for n, v in m["verbatim"].items()}
        row |= {f"{name}.kept {s}": float(v) for s, v in m["kept"].items()}
        row |= {f"{name}.tokens": m["tokens"] / found["off"]["tokens"],
                f"{name}.cpu_s": made[name].card["train_cpu_s"]}
    corpus = draw_corpus(lab.seed, size)
    pool = item_pool(corpus, lab.seed, size)
    kept = kept_by(ARMS["0.8"], corpus.rows, lab.seed).kept
    for how in BUILDS:
        items = build(pool, corpus, kept, how, size.items, lab.seed)
        hits = found["off"]["hits"], found["0.8"]["hits"]
        row[f"{how}: items"] = float(len(items))
        row[f"{how}: REVERSAL items"] = float(sum(pool[i]["slice"] == "REVERSAL" for i in items))
        row[f"{how}: alarm"] = float(alarm(items, pool, *hits, "REVERSAL"))
        row[f"{how}: silent"] = 1 - row[f"{how}: alarm"]
        row[f"{how}: alarm on the whole"] = float(alarm(items, pool, *hits))
    return row, list(made.values())


def _across(arms: Sequence[str], what: str) -> tuple[tuple[str, str, str | None, str], ...]:
    return tuple((f"{arm}: {what}", f"{arm}.{what}", None, "share") for arm in arms)


DESIGN = Design(
    measure=measure, notebook="04", smallest=0.05, n_items=400, items="unseen wordings in an evaluation build",
    rows=("S2-07a", "S2-07b", "S2-07e", "S3-1.17", "S3-1.19", "S3-2.10", "S3-2.12", "S3-2.13", "S3-2.14"),
    claim="removing near-copies at .8 lets the mean and verbatim completion improve while it deletes a rare skill: "
          "accuracy on REVERSAL falls by at least 5 points, an evaluation drawn after the filter does not see it, and "
          "leaving small slices alone brings it back",
    falsifier="REVERSAL accuracy is unaffected at .8 (the interval of the fall excludes 5 points), or the mean falls "
              "by more than 2 points, or verbatim completion does not fall, or tail protection gives nothing back, or "
              "the evaluation drawn after the filter raises the alarm on half of the seeds or more",
    also=(("mean, .8 - no filter", -0.02), ("verbatim, no filter - .8", 0.0), ("REVERSAL, .8 protected - .8", 0.0),
          ("drawn after the filter: silent", 0.5), ("drawn before, by slice: alarm", 0.5)),
    effects=(
        ("REVERSAL, no filter - .8", "off.REVERSAL", "0.8.REVERSAL", "share"),
        ("mean, .8 - no filter", "0.8.mean", "off.mean", "share"),
        ("verbatim, no filter - .8", "off.verbatim", "0.8.verbatim", "share"),
        ("REVERSAL, .8 protected - .8", "0.8 protected.REVERSAL", "0.8.REVERSAL", "share"),
        ("drawn after the filter: silent", "after: silent", None, "share of seeds"),
        ("drawn before, by slice: alarm", "before, by slice: alarm", None, "share of seeds"),
        ("drawn before the filter: alarm", "before: alarm", None, "share of seeds"),
        ("drawn after, by slice: alarm", "after, by slice: alarm", None, "share of seeds"),
        ("drawn after: alarm on the whole", "after: alarm on the whole", None, "share of seeds"),
        ("drawn before: alarm on the whole", "before: alarm on the whole", None, "share of seeds"),
        ("REVERSAL, .9 - .8", "0.9.REVERSAL", "0.8.REVERSAL", "share"),
        ("REVERSAL, .9 - no filter", "0.9.REVERSAL", "off.REVERSAL", "share"),
        ("REVERSAL, .8 pages only - .8", "0.8 pages only.REVERSAL", "0.8.REVERSAL", "share"),
        ("REVERSAL, .8 keep 2 - .8", "0.8 keep 2.REVERSAL", "0.8.REVERSAL", "share"),
        ("REVERSAL, .8 keep 4 - .8", "0.8 keep 4.REVERSAL", "0.8.REVERSAL", "share"),
        ("verbatim, .8 keep 4 - .8", "0.8 keep 4.verbatim", "0.8.verbatim", "share"),
        ("verbatim, .95 - .8", "0.95.verbatim", "0.8.verbatim", "share"),
        ("mean, .8 protected - no filter", "0.8 protected.mean", "off.mean", "share"),
        ("mean, .8 protected - .8", "0.8 protected.mean", "0.8.mean", "share"),
        ("plain, .8 - no filter", "0.8.plain", "off.plain", "share"),
        ("messy, .95 - .9", "0.95.messy", "0.9.messy", "share"),
        ("messy, keep random - keep shortest", "0.8 random.messy", "0.8.messy", "share"),
        ("messy, keep hardest - keep shortest", "0.8 hardest.messy", "0.8.messy", "share"),
        ("messy, keep medoid - keep shortest", "0.8 medoid.messy", "0.8.messy", "share"),
        ("EN-B, .8 - .6", "0.8.EN-B", "0.6.EN-B", "share"),
        ("plain, .8 - .6", "0.8.plain", "0.6.plain", "share"),
        ("tokens an epoch, .8", "0.8.tokens", None, "share of no filter"),
        *(e for what in (*SLICES, "mean", "verbatim") for e in _across(list(ARMS), what)),
        *_across(["off", "0.8"], "verbatim x1"), *_across(["off", "0.8"], "verbatim x4"),
        *_across(["off", "0.8"], "verbatim x16"), *_across(["off", "0.8"], "verbatim x64")))
