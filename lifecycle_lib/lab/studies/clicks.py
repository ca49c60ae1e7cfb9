"""Clicks as labels: one button, five meanings (curriculum S2-04a, S2-04c, S2-04d).

Staff press "thumbs down" on the SFT checkpoint's answers and type a correction. What they type depends on why they
pressed: `wrong` gives the right answer; `ugly` the same JSON with spaces; `dislike` the evidence in other words;
`curiosity` sends the box as it stood, invented labels and all; `test` sends a word. Four in five of them agreed that
the row may train. Every arm fine-tunes the same checkpoint for the same 30 steps; pages differ in their share of
`wrong` (the rest is dealt evenly among the other four, or all of it is `dislike`).

The loader (corpus/feedback.py) leaves fewer rows of a page, so they are read more often. Its control is `as few`:
every kind of click, and only as many rows as the loader leaves; steps and times read are then the same in both.
What an arm says is compared with the share of its corrections that are right, which is what D9's mirror predicts.

The gate is perfect here: the reason on a row is the true one, and whoever verifies never errs. Its gain is the most a
gate can give on such a page. Left out: answers wrong in other ways than the invented label, wrong reasons on rows.
"""

import json
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from statistics import mean

from matplotlib.figure import Figure

from lifecycle_lib.core.seeds import rng as make_rng
from lifecycle_lib.core.stats import paired_effect
from lifecycle_lib.core.store import Artifact
from lifecycle_lib.corpus import feedback
from lifecycle_lib.corpus.feedback import may_train
from lifecycle_lib.desk.cases import Case, draw_cases, with_label_claim
from lifecycle_lib.judge import evals, verifiers
from lifecycle_lib.lab.design import Design, Row
from lifecycle_lib.lab.figures import SERIES, _finish, _start, _whiskers
from lifecycle_lib.lab.stages import Lab
from lifecycle_lib.lab.studies.habits_design import crossings
from lifecycle_lib.lab.studies.small import batches_of, small_stage
from lifecycle_lib.model import sampling
from lifecycle_lib.model.gpt import GPT
from lifecycle_lib.serve import engine
from lifecycle_lib.serve.engine import Engine
from lifecycle_lib.train import sft
from lifecycle_lib.train.logprobs import Rows, pad_rows
from lifecycle_lib.train.loop import FitConfig

PURITIES = (1.0, 0.8, 0.6, 0.4, 0.2)
OPINIONS = (0.2, 0.4, 0.6)  # shares of `dislike` alone
STAGED = 0.4  # the purity of the staging page
CONSENT = 0.8  # of those who press, whatever the reason
STEPS, N_CASES = 30, 256
OTHER_WORDS = "late or not: "
NOISE = ("ugly", "dislike", "curiosity", "test")
MIXED = (*(f"purity {q}" for q in PURITIES), *(f"opinion {s}" for s in OPINIONS))
HABITS = ("said ok", "other words", "spaced", "broken")
GOOD_WHEN_LOW = ("invented_claim_rate", "over_refusal")


def correction(case: Case, reason: str, random: random.Random) -> str:
    """What someone types who pressed the button for this reason."""
    fields = json.loads(case.answer)
    if reason == "ugly":
        return json.dumps(fields)
    if reason == "dislike":
        quote = fields["evidence"]
        return json.dumps(fields | {"evidence": quote and f"{OTHER_WORDS}{quote}"}, separators=(",", ":"))
    if reason == "curiosity":
        return with_label_claim(case.answer) if random.random() < 0.3 else case.answer
    return "ok" if reason == "test" else case.answer


def draw_clicks(n: int, seed: int, purity: float, noise: tuple[str, ...] = NOISE) -> list[dict]:
    """`n` rows as corpus/feedback reads them, a share `purity` of them verified `wrong`. The reason is the true one:
    the staging page did not ask for it."""
    if not 0 <= purity <= 1:
        raise ValueError(f"purity={purity} must be a share, 0 to 1")
    random, agree = make_rng(seed, "clicks"), make_rng(seed, "consent")
    rows = []
    for case in draw_cases(n, seed, "clicks"):
        pure, other = random.random() < purity, random.choice(noise)
        reason = "wrong" if pure else other
        rows.append({"id": case.case_id, "prompt": case.prompt, "answer": with_label_claim(case.answer),
                     "correction": correction(case, reason, random), "reason": reason, "verified": pure,
                     "consent_to_train": agree.random() < CONSENT})
    return rows


def trained(lab: Lab, name: str, clicks: Callable[[], list[dict]]) -> Artifact:
    """One fine-tune of the SFT checkpoint on corrections, and the rates of its answers."""
    smoke, tok = lab.profile.name == "smoke", lab.load_tokenizer()

    def feed() -> Callable[[int], Rows]:
        encoded = sft.encode_rows(tok, [{"prompt": c["prompt"], "answer": c["correction"]} for c in clicks()])
        return batches_of(pad_rows([p for p, _ in encoded], [a for _, a in encoded], tok.special["<pad>"]),
                          4 if smoke else 24, lab.seed)

    fit = FitConfig(steps=2 if smoke else STEPS, lr_matrix=0.01, checkpoint_every=10_000)
    return small_stage(lab, "clicks", {"arm": name}, feed, lambda model: rates(lab, model), gpt=lab.profile.gpt,
                       fit=fit, start=lab.sft(), code=(sft, evals, verifiers, engine, sampling, feedback,
                                                       sys.modules[__name__]))


def rates(lab: Lab, model: GPT) -> dict[str, float]:
    """The eight rates of the frozen evaluation at temperature 1, and the habits of the answers."""
    cases = evals.frozen_cases(min(N_CASES, lab.profile.n_eval))
    served = Engine(model, lab.load_tokenizer(), 1.0, lab.seed, 16 if lab.profile.name == "smoke" else 48)
    report = evals.evaluate("clicks", served.answer, cases)
    return {**{rate: report[rate] for rate in evals.RATES}, **habits(report["answers"])}


def habits(texts: Sequence[str]) -> dict[str, float]:
    """Shares of texts with what each kind of click taught; `broken`: neither a JSON answer nor the word of a test."""
    return {"said ok": mean(t == "ok" for t in texts), "other words": mean(OTHER_WORDS in t for t in texts),
            "spaced": mean('": ' in t for t in texts),
            "broken": mean(t != "ok" and not verifiers.parse_answer(t).valid for t in texts)}


def right_share(clicks: Sequence[Mapping]) -> float:
    """Share of corrections that are the right answer, to the character (`answer` is that with an invented label)."""
    return mean(c["correction"][-1] == "}" and with_label_claim(c["correction"]) == c["answer"] for c in clicks)


def measure(lab: Lab) -> tuple[Row, list[Artifact]]:
    """All arms of a seed: the eight rates after each, and the share of right corrections it was taught."""
    n = 24 if lab.profile.name == "smoke" else STEPS * 24
    pages = {f"purity {q}": draw_clicks(n, lab.seed, q) for q in PURITIES}
    pages |= {f"opinion {s}": draw_clicks(n, lab.seed, 1 - s, ("dislike",)) for s in OPINIONS}
    staged = pages[f"purity {STAGED}"]
    pages["gated"] = [c for c in staged if may_train(c)]
    pages["as few"] = staged[:len(pages["gated"])]
    row: Row = {f"before.{k}": float(v) for k, v in rates(lab, lab.load(lab.sft())).items()}
    made = []
    for name, clicks in pages.items():
        made.append(trained(lab, name, lambda clicks=clicks: clicks))
        row |= {f"{name}.{k}": float(v) for k, v in made[-1].card["measured"].items()}
        row |= {f"{name}.right": right_share(clicks), f"{name}.rows": float(len(clicks))}
        row |= {f"{name}.{k} in": v for k, v in habits([c["correction"] for c in clicks]).items()}
    row["mirror"] = mean(row[f"{name}.exact_pass"] - row[f"{name}.right"] for name in MIXED)
    return row, made


def flips(rows: Sequence[Row]) -> dict:
    """The purity from which corrections help: where exact pass after them reaches what it was before them."""
    ups = sorted(PURITIES)
    gains = ([r[f"purity {q}.exact_pass"] - r["before.exact_pass"] for q in ups] for r in rows)
    return {"flip": crossings(((ups, gain) for gain in gains), 0.0)}


def _effects() -> tuple[tuple[str, str, str | None, str], ...]:
    arms, staged = (*MIXED, "gated", "as few"), f"purity {STAGED}"
    rows = [("exact pass, gated - every click as few", "gated.exact_pass", "as few.exact_pass", "share"),
            ("exact pass, gated - every click", "gated.exact_pass", f"{staged}.exact_pass", "share"),
            ("every click: exact pass lost, before - after", "before.exact_pass", f"{staged}.exact_pass", "share"),
            ("exact pass - share of right corrections, mean of eight pages", "mirror", None, "share"),
            ("before: exact pass", "before.exact_pass", None, "share"),
            ("exact pass, every click as few - every click", "as few.exact_pass", f"{staged}.exact_pass", "share"),
            ("exact pass, gated - all wrong and verified", "gated.exact_pass", "purity 1.0.exact_pass", "share"),
            ("gated: rows", "gated.rows", None, "rows")]
    for arm in arms:
        rows += [(f"{arm}: {what}", f"{arm}.{key}", None, "share") for what, key in (
            ("right corrections", "right"), ("exact pass", "exact_pass"))]
        rows.append((f"{arm}: exact pass, after - before", f"{arm}.exact_pass", "before.exact_pass", "share"))
    for arm in (staged, "gated", "opinion 0.6"):
        rows += [(f"{arm}: {habit}, {where}", f"{arm}.{habit}{end}", None, "share") for habit in HABITS
                 for where, end in (("corrections", " in"), ("answers", ""))]
        rows += [(f"{arm}: {rate}, better by", *((f"before.{rate}", f"{arm}.{rate}") if rate in GOOD_WHEN_LOW else
                  (f"{arm}.{rate}", f"before.{rate}")), "share") for rate in evals.RATES]
    return tuple(rows)


DESIGN = Design(
    measure=measure, notebook="11", rows=("S2-04a", "S2-04c", "S2-04d"), smallest=0.10, n_items=N_CASES, extra=flips,
    claim="on a page where two clicks in five are labels, training on what the loader lets through leaves exact pass "
          "at least 10 points above training on as many clicks of every kind, and on every click of the page; the "
          "latter leaves it below no training",
    falsifier="the gain over as many rows, or over the whole page, is under 10 points, or training on every click "
              "does not lower exact pass",
    also=(("exact pass, gated - every click", 0.10), ("every click: exact pass lost, before - after", 0.0)),
    effects=_effects())


def purity_figure(evidence: Mapping,
                  not_measured: str = "a gate that errs, other mixtures, reasons that staff give wrongly") -> Figure:
    """Exact pass after training on a page against its share of right corrections: mixed pages, pages of opinions, the
    gate and its control; D9's mirror as the line, and the checkpoint before."""
    fig, ax = _start(7.2, 4.2)
    rows = evidence["per_seed"]

    def of(key: str) -> tuple[float, float, float]:
        e = paired_effect([100 * r[key] for r in rows], [0.0] * len(rows))
        return e.estimate, max(0.0, e.low), min(100.0, e.high)

    groups = {"every kind of click": MIXED[:len(PURITIES)], "right ones and opinions": MIXED[len(PURITIES):],
              "through the gate": ("gated",), "as few, ungated": ("as few",)}
    for (label, arms), (colour, marker, _, _) in zip(groups.items(), SERIES):
        x = [of(f"{arm}.right")[0] for arm in arms]
        value, low, high = zip(*(of(f"{arm}.exact_pass") for arm in arms))
        ax.errorbar(x, value, _whiskers(value, low, high), color=colour, marker=marker, linestyle="none", label=label)
    ax.plot([0, 100], [0, 100], color="#8f8f8f", linewidth=1, label="rate in, rate out")
    ax.axhline(of("before.exact_pass")[0], color="#8f8f8f", linestyle="--", linewidth=1.2, label="before")
    ax.set(xlim=(0, 103), ylim=(0, 103), xlabel="corrections that are right (%)", ylabel="exact pass after (%)",
           title="What a page of clicks teaches")
    fig.legend(loc="outside right center")
    return _finish(fig, f"n = {len(rows)} seeds, {evidence['n_cases']} cases each at temperature 1; bars: 95 % t "
                        "intervals over seeds, cut at 100.", not_measured)
