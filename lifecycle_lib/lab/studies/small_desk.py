"""The returns desk, small enough for a model of some 0.1M parameters: the same text, whole words as tokens.

Cases, asks, answers, scorers and the release gate are those of the real chain, to the character. Two things shrink:
numbers run from 1 to 30 instead of 99, and a token is a whole word with its leading space (`Pieces`), so a case is
about 35 tokens. What a small desk shows about order and mechanism carries over; its step counts do not.
"""

import re
from collections.abc import Callable, Sequence
from functools import cache
from random import Random

from lifecycle_lib.core.seeds import rng as make_rng
from lifecycle_lib.desk import documents
from lifecycle_lib.desk.cases import Case
from lifecycle_lib.desk.safety import ROLES, Ask, draw_asks
from lifecycle_lib.desk.world import ITEMS, PHRASES, POLICY_IDS, REASONS, SPECIAL_TOKENS, Order, Policy, held_out
from lifecycle_lib.judge import evals
from lifecycle_lib.lab.studies.small import Vocab, rows_of
from lifecycle_lib.model.gpt import GPT, GPTConfig
from lifecycle_lib.model.sampling import generate
from lifecycle_lib.train.logprobs import Rows

NUMBERS = range(1, 31)
ORDERS = tuple(f"A{10000 + 37 * i}" for i in range(16))
PIECE = re.compile(r'<\w+>|\{"evidence":"|\{"evidence":null,"policy_id":null,"eligible":|","policy_id":"|'
                   r'","eligible":|\{"refused":"|"?\}|,"label_created":true|,| ?[\w\'-]+')
LOOKUPS = 6


class Pieces(Vocab):
    """A vocabulary of whole words that keeps the text exact: each piece carries its own leading space."""

    def encode(self, text: str) -> list[int]:
        """Ids of the pieces of `text`. Raises ValueError for text that no piece spells, or an unknown piece."""
        pieces = PIECE.findall(text)
        if "".join(pieces) != text:
            raise ValueError(f"text {text!r} is no desk text: pieces spell only {''.join(pieces)!r}")
        return [self.index[p] if p in self.index else self._unknown(p) for p in pieces]

    def _unknown(self, piece: str) -> int:
        raise ValueError(f"piece {piece!r} is not in the vocabulary of {len(self)}; add it")

    def decode(self, ids) -> str:
        return "".join(self.words[i] for i in ids)


def draw_small_case(rng: Random, case_id: str, unseen: bool) -> Case:
    """One case with two policies, one of which covers the reason; (days, window) held out as in the real desk."""
    def window(day: int, inside: bool) -> int:
        """A window that `day` is inside of or past, of the wanted kind; any of that kind when there is none."""
        fits = [w for w in NUMBERS if held_out(day, w) == unseen]
        return rng.choice([w for w in fits if (day <= w) == inside] or fits)

    days = rng.choice(NUMBERS)
    reasons, ids = rng.sample(REASONS, 2), rng.sample(POLICY_IDS, 2)
    book = [Policy(reason=r, policy_id=i, window_days=window(days, rng.random() < 0.5))
            for r, i in zip(reasons, ids)]
    order = Order(order_id=rng.choice(ORDERS), item=rng.choice(ITEMS), days=days, damage_confirmed=rng.random() < 0.7)
    message = rng.choice(PHRASES[reasons[0]]).format(item=order.item)
    policy = book[0]
    rng.shuffle(book)
    return Case(case_id=case_id, reason=reasons[0], policies=tuple(book), order=order, message=message, policy=policy)


def small_cases(n: int, seed: int, split: str) -> list[Case]:
    """`n` small cases of a split; "eval" draws unseen (days, window) pairs, every other name seen ones."""
    rng = make_rng(seed, "small cases", split)
    return [draw_small_case(rng, f"{split}-{i:05d}", split == "eval") for i in range(n)]


def small_asks(role: str, n: int, seed: int, split: str) -> list[Ask]:
    return draw_asks(role, n, seed, split, draw_small_case)


def small_documents(n: int, seed: int) -> list[str]:
    """The small base corpus: lookups in a policy book (a third), clerks' notes, recaps, chat logs. No JSON, no asks."""
    rng = make_rng(seed, "small documents")
    texts = []
    for i in range(n):
        case = draw_small_case(rng, f"doc-{i}", False)
        kind = rng.choice(("lookups", "lookups", "note", "recap", "recap", "chat"))
        if kind == "lookups":
            lines = rng.choices(case.policies, k=LOOKUPS)
            texts.append(documents.head(case) + "<note>" + ", ".join(p.line() for p in lines))
        else:
            texts.append(documents.KINDS[kind](rng, case))
    return texts


@cache
def vocabulary() -> Pieces:
    """Every piece that small cases, documents, asks and answers can hold; the same for every seed."""
    texts = small_documents(1000, 0)
    for role in ROLES:
        for ask in small_asks(role, 1000, 0, "train"):
            texts += [ask.prompt, ask.answer]
    for twin in small_asks("twin", 500, 0, "eval") + small_asks("harmful", 500, 0, "eval"):
        texts.append(twin.prompt)
    texts += [c.prompt + c.answer for c in small_cases(1000, 0, "train")]
    texts += ["".join(f" {n:02d}d" for n in NUMBERS), *POLICY_IDS, *SPECIAL_TOKENS, '{"evidence":null,"policy_id":'
              'null,"eligible":', "null", "true", "false", ',"label_created":true', "<note>", " day"]
    return Pieces(sorted({p for t in texts for p in PIECE.findall(t)}))


def small_gpt(vocab: Pieces, n_embd: int = 64, n_layer: int = 2) -> GPTConfig:
    return GPTConfig(vocab_size=len(vocab), block_size=64, n_layer=n_layer, n_head=4, n_embd=n_embd)


def small_rows(vocab: Pieces, things: Sequence[Case | Ask]) -> Rows:
    """Training rows: the answer counts."""
    return rows_of(vocab, [t.prompt.removeprefix("<bos>") for t in things], [t.answer for t in things])


def document_rows(vocab: Pieces, texts: Sequence[str]) -> Rows:
    """Pretraining rows: every token counts."""
    return rows_of(vocab, [""] * len(texts), [t.removeprefix("<bos>") for t in texts], whole=True)


def answers(model: GPT, vocab: Pieces, things: Sequence[Case | Ask]) -> list[str]:
    """Greedy answers as text, without the end token."""
    prompts = [[1, *vocab.encode(t.prompt.removeprefix("<bos>"))] for t in things]
    out = generate(model, prompts, eos_id=2, pad_id=0, max_new_tokens=16, temperature=0.0)
    return out.texts(vocab)


def launch_report(name: str, model: GPT, vocab: Pieces, cases: Sequence[Case], p95_ms: float,
                  answer: Callable | None = None) -> dict:
    """A report that judge/gates.decide takes, on small cases. `p95_ms` was measured by the caller."""
    return evals.evaluate(name, answer or (lambda c: answers(model, vocab, c)), cases, checkpoint_fp=name,
                          weight_bytes=4 * model.n_params(), p95_ms=p95_ms)
