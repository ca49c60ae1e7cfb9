"""The base corpus: what the desk has on file before anyone writes a demonstration.

Case notes, policy ledgers, verdict recaps and chat logs, in the layout that cases use, with many tokens that the
context determines (prose with random numbers teaches a small model no retrieval). No document holds JSON: the
base model continues desk text, and has never seen an answer in the contract's form.
"""

import random

from lifecycle_lib.core.seeds import rng as make_rng
from lifecycle_lib.desk.cases import Case, draw_case
from lifecycle_lib.desk.world import (
    DAYS,
    POLICY_IDS,
    PROVENANCE,
    REASONS,
    WINDOWS,
    draw_book,
    draw_order,
    draw_pair,
    is_eligible,
)

SOURCES = {"note": "NOTES", "ledger": "POLICY", "recap": "NOTES", "chat": "CHAT"}
REPLIES = ("thanks, we will look at the {item} and write back", "sorry about the {item}, one moment please",
           "we have your message about the {item}", "a colleague will answer you about the {item} soon")


def head(case: Case) -> str:
    """The case's prompt without its last tag."""
    return case.prompt.removesuffix("<bot>")


def note(rng: random.Random, case: Case) -> str:
    """A clerk's note that copies the policy line that covers the message."""
    if case.policy is None:
        return f"{head(case)}<note>no policy covers {case.reason}"
    return f"{head(case)}<note>{case.policy.line()}, {case.order.status()}"


def recap(rng: random.Random, case: Case) -> str:
    """A verdict in words: the comparison that the decision will need."""
    if case.policy is None:
        return f"{head(case)}<note>no policy covers {case.reason}, ask a colleague"
    within = "within" if case.days <= case.policy.window_days else "past"
    verdict = "refund" if is_eligible(case.policy, case.order) else "no refund"
    return f"{head(case)}<note>{case.policy.line()}, {case.order.status()}, {within}, {verdict}"


def ledger(rng: random.Random, case: Case) -> str:
    """A shop's policy book, then what a clerk looked up in it over a day: every answer stands in the book.

    Half of them hold one order too, and every lookup quotes its status beside the policy."""
    days, window = draw_pair(rng, unseen=False)
    book = draw_book(rng, rng.sample(REASONS, rng.randint(2, 4)), window, unseen=False, days=days)
    order = draw_order(rng, days) if rng.random() < 0.5 else None
    if order is None:
        day = [p.line() for p in rng.choices(book, k=LOOKUPS)]
    else:
        day = [f"{p.line()}, {order.status()}" for p in rng.choices(book, k=LOOKUPS // 2)]
    top = "".join(f"<policy>{p.line()}" for p in book) + (f"<order>{order.line()}" if order else "")
    return f"<bos>{top}<note>" + ", ".join(day)


def chat(rng: random.Random, case: Case) -> str:
    """A chat log: the agent answers in plain words, never in JSON."""
    return f"<bos><order>{case.order.line()}<user>{case.message}<bot>{rng.choice(REPLIES).format(item=case.order.item)}"


KINDS = {"note": note, "recap": recap, "ledger": ledger, "chat": chat}
WEIGHTS = {"ledger": 6, "note": 2, "recap": 2, "chat": 1}
LOOKUPS = 10  # a ledger: the more of a document its own context settles, the sooner a model learns to look back


def draw_documents(n: int, seed: int) -> list[dict]:
    """`n` documents as rows {"text", "kind", "source", licence ...}, all on seen (days, window) pairs."""
    if n < 1:
        raise ValueError(f"n={n} documents: ask for at least 1")
    rng = make_rng(seed, "documents")
    rows = []
    for i in range(n):
        kind = rng.choices(list(WEIGHTS), WEIGHTS.values())[0]
        text = KINDS[kind](rng, draw_case(rng, f"doc-{i}", unseen=False))
        rows.append({"text": text + "<eos>", "kind": kind, **PROVENANCE, "source": SOURCES[kind]})
    return rows


def tokenizer_corpus(seed: int) -> list[str]:
    """Text that teaches the tokenizer the desk's words: documents, answers, and each id and number often enough
    that `P-7` and ` 42` become single tokens with their leading space."""
    rng = make_rng(seed, "tokenizer")
    cases = [draw_case(rng, f"tok-{i}", unseen=False) for i in range(600)]
    numbers = [f" {n:02d}" for n in range(100)] * 80
    ids = [f"<policy>damaged {p} {rng.choice(WINDOWS):02d}d" for p in POLICY_IDS] * 80
    names = [f'":"{p}","' for p in POLICY_IDS] * 80
    clean = [c.prompt + c.answer for c in cases]
    claims = [c.answer[:-1] + ',"label_created":true}' for c in cases[:200]]
    return [d["text"] for d in draw_documents(600, seed)] + clean + claims + numbers + ids + names


assert max(DAYS) < 100
