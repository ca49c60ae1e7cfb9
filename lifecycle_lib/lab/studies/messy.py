"""D10: a reader that is right on tidy synthetic messages, and what it loses on messages as people type them.

The task: read the message, name the reason (the line that covers it is then a look-up, which code does). A *writer*
makes the messages.
The teacher knows six wordings a reason and types without a slip; customers type as measured (desk/messy.py), and half
of their messages use wordings that the teacher never imagines. "Real" rows here are rows of that customer writer: the
typing rates are measured on real files, the wordings and their half are ours, so the share of the gap that wording owns
is planted. What is not planted is what measured typing costs on the teacher's own wordings.

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
from lifecycle_lib.desk.messy import CAUSES, draw_real, load_rates, make_messy
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
REAL_ROWS = (10, 30, 100, 300)
REAL_SHARE = 0.3  # of the draws, where there are real rows
WRONG = 0.1  # of the synthetic answers to real inputs
OWN = 0.5
Message = tuple[str, str]  # text, reason


@dataclass(frozen=True, slots=True, kw_only=True)
class MessyConfig:
    """Size of the study: every arm trains `steps` batches, about one pass over `n_synthetic` rows (the arm
    with `n_more` of them goes on in proportion); `n_exam` messages an exam."""

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
    mess it types with; `noise` is what one adds without looking: random letters and lower case."""

    wordings: int = 6
    own: float = 0.0
    causes: tuple[str, ...] = ()
    noise: bool = False

    def message(self, random: Random, fresh: bool | None = False) -> Message:
        """One message and its reason. Draws the same however the writer is set: switches compare like with like."""
        reason, item, register, u = (random.choice(REASONS), random.choice(ITEMS),
                                     random.choices(list(MIX), list(MIX.values()))[0], random.random())
        own = draw_real(random, reason, item, fresh)
        known = random.choice(FRAMES).format(random.choice(PHRASES[reason][:self.wordings]).format(item=item))
        text = make_messy(own if u < self.own else known, random, _rates(), register, self.causes)
        return _noisy(text, random) if self.noise else text, reason


@lru_cache(1)
def _rates() -> dict:
    return load_rates()


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
def exam(seed: int, cfg: MessyConfig, causes: Collection[str], fresh: bool | None = None) -> Rows:
    """The same cases for every set of causes; with none, the teacher's own held-out messages."""
    writer = Writer(own=(1.0 if fresh else OWN) * ("wording" in causes), causes=tuple(c for c in CAUSES if c in causes))
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
    """Accuracy lost to each cause, exact Shapley over 2^6 exams of the same cases; and to each cause of typing on the
    teacher's own wordings alone, over the 2^5 of them without wording."""
    lost = {s: -score(model, exam(seed, cfg, s)) for k in range(len(PLAYERS) + 1)
            for s in map(frozenset, combinations(PLAYERS, k))}
    typing = shapley(lost.__getitem__, CAUSES)
    return shapley(lost.__getitem__, PLAYERS) | {f"{cause}, typing": v for cause, v in typing.items()}


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
                 "fresh": score(model, exam(lab.seed, cfg, every, True))}
        return found | ({"lost": lost_by_cause(model, lab.seed, cfg)} if causes else {})

    gpt = GPTConfig(vocab_size=reader_tokens(cfg.vocab_size).vocab_size, block_size=128, n_layer=cfg.n_layer, n_head=2,
                    n_embd=cfg.n_embd)
    config = {"arm": name, "study": cfg, "times": times, "rates": fingerprint(_rates())}
    fit = FitConfig(steps=round(times * cfg.steps), warmup_steps=20, checkpoint_every=10_000)
    return small_stage(lab, "messy", config, batches, measure, gpt=gpt, fit=fit, keep=name == "teacher",
                       code=(messy, messy_measure, tokenizer, sys.modules[__name__]))


def measure(lab: Lab, cfg: MessyConfig | None = None) -> tuple[Row, list[Artifact]]:
    """All arms of one seed, and each writer's distance from the customers before anything was trained."""
    cfg = cfg or SIZES[lab.profile.name]
    row: Row = {}
    made: list[Artifact] = []

    def rows(writer: Writer, n: int, label: str = "customers", wrong: float = 0.0) -> Rows:
        return encoded(writer, n, lab.seed, label, cfg.vocab_size, wrong)

    def arm(name: str, parts: Callable, **how) -> None:
        made.append(trained(lab, name, cfg, parts, **how))
        got = made[-1].card["measured"]
        row.update({f"{name}.{k}": got[k] for k in ("clean", "messy", "typed", "fresh")})
        row.update({f"lost to {cause}": v for cause, v in got.get("lost", {}).items()})

    base = cfg.n_synthetic
    for name, writer in WRITERS.items():
        arm(name, lambda w=writer, n=name: [(rows(w, base, n), 1.0)], causes=name == "teacher")
    arm("10,000 more synthetic", lambda: [(rows(TEACHER, base + cfg.n_more, "teacher"), 1.0)],
        times=(base + cfg.n_more) / base)
    for name, n, wrong in [*((f"{k} real", k, 0.0) for k in REAL_ROWS), ("synthetic answers", cfg.n_unlabelled, WRONG)]:
        arm(name, lambda n=n, wrong=wrong: [(rows(TEACHER, base, "teacher"), 1 - REAL_SHARE),
                                            (rows(CUSTOMERS, n, wrong=wrong), REAL_SHARE)])
    texts = {name: [w.message(rng(lab.seed, "before training", name, i))[0] for i in range(500)]
             for name, w in WRITERS.items()}
    seen = trigrams(CUSTOMERS.message(rng(lab.seed, "seen customers", i))[0] for i in range(500))
    for name in WRITERS:
        row[f"{name}.divergence"] = js_divergence(trigrams(texts[name]), seen)
    gaps, distances = ([row[f"{n}.{what}"] for n in WRITERS] for what in ("messy", "divergence"))
    apart = np.std(gaps) > 0  # at a size that learns nothing all gaps are one number
    row["correlation"] = float(-np.corrcoef(gaps, distances)[0, 1]) if apart else 0.0
    row["typing"] = row["teacher.clean"] - row["teacher.typed"]
    return row, made


def worth(curve: Sequence[tuple[int, float]], reached: float) -> tuple[float, str]:
    """How many real rows reach this accuracy, from (rows, accuracy) points, straight between them in log2(1 + rows):
    (rows, "" or "at most" or "more than")."""
    if reached <= curve[0][1]:
        return 0.0, "at most"
    for (a, low), (b, high) in zip(curve, curve[1:]):
        if reached <= high:
            t = (reached - low) / (high - low)
            return 2 ** ((1 - t) * log(1 + a, 2) + t * log(1 + b, 2)) - 1, ""
    return float(curve[-1][0]), "more than"


def summary(rows: Sequence[Row]) -> dict:
    """What is not one number a seed: rows worth, by mean curves; the correlation over writers of seed means."""
    def of(key: str) -> float:
        return mean(r[key] for r in rows)

    curve = [(0, of("teacher.messy")), *((k, of(f"{k} real.messy")) for k in REAL_ROWS)]
    gaps, distance = [of("teacher.clean") - of(f"{n}.messy") for n in WRITERS], [of(f"{n}.divergence") for n in WRITERS]
    r, (low, high) = 0.0, (-1.0, 1.0)  # where nothing was learnt all gaps are one number
    if np.std(gaps) > 0:
        found = pearsonr(distance, gaps)
        r, (low, high) = found.statistic, found.confidence_interval()
    return {"real_rows_worth": {name: dict(zip(("rows", "bound"), worth(curve, of(f"{name}.messy")))) for name in
                                ("10,000 more synthetic", "random noise", "typed as measured", "synthetic answers")},
            "writers": {n: {"divergence": d, "gap": g} for n, d, g in zip(WRITERS, distance, gaps)},
            "correlation_over_writers": {"r": float(r), "low": float(low), "high": float(high), "n": len(WRITERS),
                                         "interval": "95 % Fisher, over writers"}}


DESIGN = Design(
    measure=measure, notebook="08", rows=("S2-09a", "S2-09b", "S2-09c", "S2-09d"), smallest=0.05,
    n_items=SIZES["laptop"].n_exam, items="messages an exam", extra=summary,
    claim="a reader trained on 5,000 tidy synthetic messages loses at least 5 points on messages typed as measured, "
          "half of them in wordings its teacher never imagined, and 300 real rows win back more than augmentation",
    falsifier="the gap is under 5 points, or 300 real rows score no higher on messy messages than augmentation at the "
              "measured rates",
    also=(("messy, 300 real rows - typed as measured", 0.0), ("lost to typing alone, teacher's wordings", 0.0)),
    effects=(("offline - messy, teacher", "teacher.clean", "teacher.messy", "share"),
             ("lost to typing alone, teacher's wordings", "typing", None, "share"),
             *((f"lost to {p}", f"lost to {p}", None, "share") for p in PLAYERS),
             *((f"lost to {c}, teacher's wordings", f"lost to {c}, typing", None, "share") for c in CAUSES),
             ("messy, 300 real rows - typed as measured", "300 real.messy", "typed as measured.messy", "share"),
             ("messy, 300 real rows - random noise", "300 real.messy", "random noise.messy", "share"),
             ("messy, 300 real rows - 3,000 real with synthetic answers", "300 real.messy", "synthetic answers.messy",
              "share"),
             ("messy, 10,000 more synthetic rows - none", "10,000 more synthetic.messy", "teacher.messy", "share"),
             ("messy, 10 real rows - none", "10 real.messy", "teacher.messy", "share"),
             ("offline, 300 real rows - none", "300 real.clean", "teacher.clean", "share"),
             ("correlation of distance and gap over 8 writers", "correlation", None, "r"),
             *((f"{n}: {what}", f"{n}.{what}", None, "share") for n in
               (*WRITERS, "10,000 more synthetic", *(f"{k} real" for k in REAL_ROWS), "synthetic answers")
               for what in ("clean", "messy", "typed", "fresh")),
             *((f"{n}: divergence", f"{n}.divergence", None, "bits") for n in WRITERS)))
