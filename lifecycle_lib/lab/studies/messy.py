"""D10: a reader that is right on tidy synthetic messages, and what it loses on messages as people type them.

The task: read the message, name the reason (the line that covers it is then a look-up, which code does). A *writer*
makes the messages.
The teacher knows six wordings a reason and types without a slip. The writer of the exam types as measured
(desk/messy.py), and half of its messages use wordings that the teacher never imagines. That half and these wordings
are designed: the share of the gap that wording owns is planted, and a row of the exam's writer beats augmentation there
by construction. Measured are the rates of typing. What they cost on the teacher's own wordings (`typed`) is a result
under two choices of ours: what a second matter says, and a tokenizer that saw the teacher's text alone. How often a
second matter comes is scored at a low guess (as often as two question marks) and at a high one (several sentences).

The exam's writer is a generator, no customer: what a row that somebody sent is worth is not measured here.

Causes are switched on one by one over the same cases with the same draws; their shares are exact Shapley values
(Shapley 1953) over all 2^6 combinations, read from one trained model: nothing is retrained.
"""

import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from math import factorial, log
from random import Random
from statistics import mean

import numpy as np
import torch
from scipy.stats import pearsonr
from torch.nn.functional import pad

from lifecycle_lib.core.fingerprints import fingerprint
from lifecycle_lib.core.seeds import rng
from lifecycle_lib.core.store import Artifact
from lifecycle_lib.desk import messy, messy_measure
from lifecycle_lib.desk.messy import CAUSES, draw_customer, load_rates, make_messy
from lifecycle_lib.desk.messy_measure import js_divergence, trigrams
from lifecycle_lib.desk.world import ITEMS, PHRASES, REASONS, SPECIAL_TOKENS
from lifecycle_lib.lab.design import Design, Row
from lifecycle_lib.lab.stages import Lab
from lifecycle_lib.lab.studies.small import batches_of, right, small_stage
from lifecycle_lib.model import tokenizer
from lifecycle_lib.model.gpt import GPT, GPTConfig
from lifecycle_lib.model.tokenizer import Tokenizer
from lifecycle_lib.train.logprobs import Rows, pad_rows
from lifecycle_lib.train.loop import FitConfig

FRAMES = ("{}", "hello, {}", "hello, {}. please help.", "could you help me? {}", "{}. what can i do?",
          "good morning, {}")
MIX = {"clean": 0.25, "phone": 0.4, "shorthand": 0.25, "hostile": 0.1}  # chosen: no file says who writes to a shop
PLAYERS = (*CAUSES, "wording")
ROWS = (10, 30, 100, 300)  # of the exam's writer
SHARE = 0.3  # of the draws, where there are such rows
WRONG = 0.1  # of a machine's answers to messages of the exam's writer
OWN = 0.5
AMONG = {k: f"{k} of the exam's writer" for k in ROWS}
MACHINE, LONGER, MORE = "3,000 of them, machine answers", "three times the steps", "10,000 more synthetic"
MORE_ONLY = f"{MORE}, as many steps"
EXAMS = ("clean", "messy", "typed", "fresh")
Message = tuple[str, str]  # text, reason


@dataclass(frozen=True, slots=True, kw_only=True)
class MessyConfig:
    """Size of the study: every arm trains `steps` batches, about one pass over `n_synthetic` rows (`MORE`, with
    `n_more` rows on top, and its control `LONGER` go on in proportion); `n_exam` messages an exam."""

    steps: int = 110
    batch: int = 48
    n_synthetic: int = 5000
    n_more: int = 10_000
    n_exam: int = 400
    n_unlabelled: int = 3000
    vocab_size: int = 450
    n_embd: int = 64
    n_layer: int = 2


SIZES = {"smoke": MessyConfig(steps=4, batch=8, n_synthetic=60, n_more=120, n_exam=20, n_unlabelled=30, n_embd=16,
                              n_layer=1),
         "laptop": MessyConfig(), "gpu": MessyConfig()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Writer:
    """Who writes a message: how many wordings a reason it knows, the share `own` in customers' wordings, the causes of
    mess it types with; `noise` is what one adds without looking: random letters and lower case; `chatty`: a second
    matter as often as a message has several sentences."""

    wordings: int = 6
    own: float = 0.0
    causes: tuple[str, ...] = ()
    noise: bool = False
    chatty: bool = False

    def message(self, random: Random, fresh: bool | None = False) -> Message:
        """One message and its reason. Draws the same however the writer is set: switches compare like with like."""
        reason, item, register, u = (random.choice(REASONS), random.choice(ITEMS),
                                     random.choices(list(MIX), list(MIX.values()))[0], random.random())
        own = draw_customer(random, reason, item, fresh)
        known = random.choice(FRAMES).format(random.choice(PHRASES[reason][:self.wordings]).format(item=item))
        text = make_messy(own if u < self.own else known, random, _rates(self.chatty), register, self.causes)
        return _noisy(text, random) if self.noise else text, reason


@lru_cache(2)
def _rates(chatty: bool = False) -> dict:
    rates = load_rates()
    for of in rates["registers"].values() if chatty else ():
        of["two_questions"] = of["several"]
    return rates


def _noisy(text: str, random: Random, share: float = 0.03) -> str:
    """The usual augmentation: each letter dropped, doubled or replaced at a guessed rate, half in lower case."""
    text = text.lower().rstrip(".") if random.random() < 0.5 else text
    edits: tuple[Callable[[str], str], ...] = (lambda c: "", lambda c: c + c, lambda c: random.choice(messy.LETTERS))
    return "".join(random.choice(edits)(c) if c.isalpha() and random.random() < share else c for c in text)


TEACHER = Writer()
CUSTOMERS = Writer(own=OWN, causes=CAUSES)
WRITERS = {"teacher": TEACHER, "narrow teacher": Writer(wordings=2), "random noise": Writer(noise=True),
           "shorthand added": Writer(causes=("shorthand",)), "typed as measured": Writer(causes=CAUSES),
           "a quarter in customers' words": Writer(own=0.25), "customers' words, tidy": Writer(own=OWN),
           "customers": CUSTOMERS}


def row_of(message: Message) -> tuple[str, str]:
    """(prompt, answer): the message in the desk's layout, and the reason it gives."""
    return f"<bos><user>{message[0]}<bot>", f"{message[1]}<eos>"


@lru_cache(2)
def reader_tokens(vocab_size: int) -> Tokenizer:
    """Byte BPE over the teacher's text alone: a typo falls apart into shorter tokens, down to bytes."""
    random = rng(0, "messy tokenizer")
    texts = ["".join(row_of(TEACHER.message(random))) for _ in range(2000)]
    return Tokenizer.train(texts, vocab_size, SPECIAL_TOKENS)


def drawn(writer: Writer, n: int, seed: int, label: str, fresh: bool | None = False,
          wrong: float = 0.0) -> list[tuple[str, str]]:
    """`n` rows of a writer, one stream a row. A share `wrong` of the answers names another reason."""
    rows = []
    for i in range(n):
        random = rng(seed, label, i)
        text, reason = writer.message(random, fresh)
        if random.random() < wrong:
            reason = random.choice([r for r in REASONS if r != reason])
        rows.append(row_of((text, reason)))
    return rows


def encode(rows: Sequence[tuple[str, str]], vocab_size: int) -> Rows:
    """Token rows, the longest first."""
    tok = reader_tokens(vocab_size)
    ids = sorted(((tok.encode(p), tok.encode(a)) for p, a in rows), key=lambda row: -len(row[0]))
    return pad_rows([p for p, _ in ids], [a for _, a in ids], 0)


@lru_cache(3)
def encoded(writer: Writer, n: int, seed: int, label: str, vocab_size: int, wrong: float = 0.0) -> Rows:
    return encode(drawn(writer, n, seed, label, wrong=wrong), vocab_size)


@lru_cache(80)
def exam(seed: int, cfg: MessyConfig, causes: Collection[str], fresh: bool | None = None,
         chatty: bool = False) -> Rows:
    """The same cases for every set of causes; with none, the teacher's own held-out messages."""
    writer = Writer(own=(1.0 if fresh else OWN) * ("wording" in causes), chatty=chatty,
                    causes=tuple(c for c in CAUSES if c in causes))
    return encode(drawn(writer, cfg.n_exam, seed, "exam", fresh), cfg.vocab_size)


def shapley(value: Callable[[frozenset[str]], float], players: Sequence[str]) -> dict[str, float]:
    """Each player's mean marginal contribution over all orders. `value` is asked for every subset; the shares sum to
    value(all) - value(none)."""
    n, shares = len(players), {}
    for p in players:
        rest = [q for q in players if q != p]
        shares[p] = sum(factorial(k) * factorial(n - k - 1) / factorial(n)
                        * (value(frozenset(s) | {p}) - value(frozenset(s)))
                        for k in range(n) for s in combinations(rest, k))
    return shares


def score(model: GPT, rows: Rows, part: int = 50) -> float:
    """Share of rows answered right by greedy decoding, in parts of like length (`encode` sorts)."""
    total = 0.0
    for i in range(0, len(rows.ids), part):
        width = int((rows.ids[i] != 0).sum())
        total += right(model, Rows(rows.ids[i:i + part, :width], rows.mask[i:i + part, :width])).float().sum().item()
    return total / len(rows.ids)


def lost_by_cause(model: GPT, seed: int, cfg: MessyConfig) -> dict[str, float]:
    """Accuracy lost to each cause, exact Shapley over 2^6 exams of the same cases; to each `alone`, and to each when it
    comes `last` (they differ where causes meet); and to each cause of typing on the teacher's own wordings, over the
    2^5 exams without wording."""
    lost = {s: -score(model, exam(seed, cfg, s)) for k in range(len(PLAYERS) + 1)
            for s in map(frozenset, combinations(PLAYERS, k))}
    typing, none, every = shapley(lost.__getitem__, CAUSES), frozenset(), frozenset(PLAYERS)
    ends = {f"{p}, alone": lost[frozenset({p})] - lost[none] for p in PLAYERS}
    ends |= {f"{p}, last": lost[every] - lost[every - {p}] for p in PLAYERS}
    return shapley(lost.__getitem__, PLAYERS) | {f"{cause}, typing": v for cause, v in typing.items()} | ends


def trained(lab: Lab, name: str, cfg: MessyConfig, parts: Callable[[], list[tuple[Rows, float]]],
            times: float = 1, causes: bool = False) -> Artifact:
    """One arm: rows in `parts` with their share of the draws, `times` as many steps."""
    def batches() -> Callable[[int], Rows]:
        data = parts()
        width = max(r.ids.shape[1] for r, _ in data)
        ids, mask = (torch.cat([pad(getattr(r, what), (0, width - r.ids.shape[1])) for r, _ in data])
                     for what in ("ids", "mask"))
        weights = torch.cat([torch.full((len(r.ids),), share / len(r.ids)) for r, share in data])
        return batches_of(Rows(ids, mask), cfg.batch, lab.seed, weights if len(data) > 1 else None)

    def measure(model: GPT) -> dict:
        every = frozenset(PLAYERS)
        found = {"clean": score(model, exam(lab.seed, cfg, frozenset())),
                 "messy": score(model, exam(lab.seed, cfg, every)),
                 "typed": score(model, exam(lab.seed, cfg, frozenset(CAUSES))),
                 "chatty": score(model, exam(lab.seed, cfg, frozenset(CAUSES), chatty=True)),
                 "fresh": score(model, exam(lab.seed, cfg, every, True))}
        return found | ({"lost": lost_by_cause(model, lab.seed, cfg)} if causes else {})

    gpt = GPTConfig(vocab_size=reader_tokens(cfg.vocab_size).vocab_size, block_size=128, n_layer=cfg.n_layer, n_head=2,
                    n_embd=cfg.n_embd)
    config = {"arm": name, "study": cfg, "times": times, "rates": fingerprint(_rates())}
    fit = FitConfig(steps=round(times * cfg.steps), warmup_steps=20, checkpoint_every=10_000)
    return small_stage(lab, "messy", config, batches, measure, gpt=gpt, fit=fit, keep=name == "teacher",
                       code=(messy, messy_measure, tokenizer, sys.modules[__name__]))


def measure(lab: Lab, cfg: MessyConfig | None = None) -> tuple[Row, list[Artifact]]:
    """All arms of one seed, and each writer's distance from the exam's before anything was trained."""
    cfg = cfg or SIZES[lab.profile.name]
    row: Row = {}
    made: list[Artifact] = []

    def rows(writer: Writer, n: int, label: str = "customers", wrong: float = 0.0) -> Rows:
        return encoded(writer, n, lab.seed, label, cfg.vocab_size, wrong)

    def arm(name: str, parts: Callable, **how) -> None:
        made.append(trained(lab, name, cfg, parts, **how))
        got = made[-1].card["measured"]
        row.update({f"{name}.{k}": got[k] for k in (*EXAMS, "chatty")})
        row.update({f"lost to {cause}": v for cause, v in got.get("lost", {}).items()})

    base = cfg.n_synthetic
    for name, writer in WRITERS.items():
        arm(name, lambda w=writer, n=name: [(rows(w, base, n), 1.0)], causes=name == "teacher")
    more, times = base + cfg.n_more, (base + cfg.n_more) / base
    for name, n, k in ((MORE, more, times), (LONGER, base, times), (MORE_ONLY, more, 1)):
        arm(name, lambda n=n: [(rows(TEACHER, n, "teacher"), 1.0)], times=k)
    for name, n, wrong in [*((AMONG[k], k, 0.0) for k in ROWS), (MACHINE, cfg.n_unlabelled, WRONG)]:
        arm(name, lambda n=n, wrong=wrong: [(rows(TEACHER, base, "teacher"), 1 - SHARE),
                                            (rows(CUSTOMERS, n, wrong=wrong), SHARE)])
    texts = {name: [w.message(rng(lab.seed, "before training", name, i))[0] for i in range(500)]
             for name, w in WRITERS.items()}
    seen = trigrams(CUSTOMERS.message(rng(lab.seed, "seen customers", i))[0] for i in range(500))
    for name in WRITERS:
        row[f"{name}.divergence"] = js_divergence(trigrams(texts[name]), seen)
    row |= {"typing": row["teacher.clean"] - row["teacher.typed"],
            "chatty": row["teacher.clean"] - row["teacher.chatty"]}
    return row, made


def worth(curve: Sequence[tuple[int, float]], reached: float) -> tuple[float, str]:
    """How many rows reach this accuracy, from (rows, accuracy) points, straight between them in log2(1 + rows):
    (rows, "" or "at most" or "more than")."""
    if reached <= curve[0][1]:
        return 0.0, "at most"
    for (a, low), (b, high) in zip(curve, curve[1:]):
        if reached <= high:
            t = (reached - low) / (high - low)
            return 2 ** ((1 - t) * log(1 + a, 2) + t * log(1 + b, 2)) - 1, ""
    return float(curve[-1][0]), "more than"


def summary(rows: Sequence[Row]) -> dict:
    """What is not one number a seed: rows worth, by mean curves; the correlation over writers of seed means, without
    the exam's own writer, whose distance is that of two samples of one text."""
    def of(key: str) -> float:
        return mean(r[key] for r in rows)

    worths = {}
    for exam_name in ("messy", "typed"):
        curve = [(0, of(f"teacher.{exam_name}")), *((k, of(f"{AMONG[k]}.{exam_name}")) for k in ROWS)]
        worths[exam_name] = {name: dict(zip(("rows", "bound"), worth(curve, of(f"{name}.{exam_name}"))))
                             for name in (MORE, LONGER, "random noise", "typed as measured", MACHINE)}
    points = {n: (of(f"{n}.divergence"), of("teacher.clean") - of(f"{n}.messy")) for n in WRITERS}
    distance, gaps = zip(*(at for n, at in points.items() if n != "customers"))
    r, (low, high) = 0.0, (-1.0, 1.0)  # where nothing was learnt all gaps are one number
    if np.std(gaps) > 0:
        found = pearsonr(distance, gaps)
        r, (low, high) = found.statistic, found.confidence_interval()
    return {"rows_worth": worths, "writers": {n: {"divergence": d, "gap": g} for n, (d, g) in points.items()},
            "correlation_over_writers": {"r": float(r), "low": float(low), "high": float(high), "n": len(gaps),
                                         "interval": "95 % Fisher, over writers"}}


ARMS = (*WRITERS, MORE, LONGER, MORE_ONLY, *AMONG.values(), MACHINE)
MOST = AMONG[ROWS[-1]]
DESIGN = Design(
    measure=measure, notebook="08", rows=("S2-09a", "S2-09b", "S2-09c", "S2-09d"), smallest=0.05,
    n_items=SIZES["laptop"].n_exam, items="messages an exam", extra=summary,
    claim="a reader trained on 5,000 tidy synthetic messages loses at least 5 points on messages typed as measured, "
          "half of them in wordings its teacher never imagined, and 300 rows of the exam's writer win back more than "
          "augmentation",
    falsifier="the gap is under 5 points, or 300 rows of the exam's writer score no higher on messy messages than "
              "augmentation at the measured rates",
    also=((f"messy, {MOST} - typed as measured", 0.0), ("lost to typing alone, teacher's wordings", 0.0)),
    effects=(("offline - messy, teacher", "teacher.clean", "teacher.messy", "share"),
             ("lost to typing alone, teacher's wordings", "typing", None, "share"),
             ("the same, a second matter as often as several sentences", "chatty", None, "share"),
             *((f"lost to {p}{end}", f"lost to {p}{end}", None, "share") for end in ("", ", alone", ", last")
               for p in PLAYERS),
             *((f"lost to {c}, teacher's wordings", f"lost to {c}, typing", None, "share") for c in CAUSES),
             *((f"{what}, {MOST} - {other}", f"{MOST}.{what}", f"{other}.{what}", "share")
               for what in ("messy", "typed", "fresh") for other in ("typed as measured", "random noise", MACHINE)),
             *((f"messy, {a} - {b}", f"{a}.messy", f"{b}.messy", "share") for a, b in (
                 (MORE, "teacher"), (LONGER, "teacher"), (MORE_ONLY, "teacher"), (MORE, LONGER),
                 (AMONG[ROWS[0]], "teacher"))),
             (f"offline, {MOST} - teacher", f"{MOST}.clean", "teacher.clean", "share"),
             *((f"{n}: {what}", f"{n}.{what}", None, "share") for n in ARMS for what in EXAMS),
             *((f"{n}: divergence", f"{n}.divergence", None, "bits") for n in WRITERS)))
