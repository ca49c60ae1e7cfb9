"""Clicks as labels: one button, five meanings (curriculum S2-04a, S2-04c, S2-04d).

Staff press "thumbs down" on the SFT checkpoint's answers and type a correction. What they type depends on why they
pressed: `wrong` gives the right answer; `ugly` the same JSON with spaces; `dislike` the evidence in other words;
`curiosity` sends the box as it stood, invented labels and all; `test` sends a word. Every arm fine-tunes the same
checkpoint for the same steps on the same number of corrections; only the share of verified `wrong` ones differs (the
rest is dealt evenly among the other four, or all of it is `dislike`).

Left out: answers that are wrong in other ways than the invented label, people who are wrong about what is wrong.
"""

import json
import random
import sys
from collections.abc import Callable

from lifecycle_lib.core.seeds import rng as make_rng
from lifecycle_lib.core.store import Artifact
from lifecycle_lib.corpus import feedback
from lifecycle_lib.corpus.feedback import may_train
from lifecycle_lib.desk.cases import Case, draw_cases, with_label_claim
from lifecycle_lib.judge import evals, verifiers
from lifecycle_lib.lab.design import Design, Row
from lifecycle_lib.lab.stages import Lab
from lifecycle_lib.lab.studies.habits import crossing
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
STEPS, N_CASES = 30, 256
NOISE = ("ugly", "dislike", "curiosity", "test")
GOOD_WHEN_LOW = ("invented_claim_rate", "over_refusal")


def correction(case: Case, reason: str, random: random.Random) -> str:
    """What someone types who pressed the button for this reason."""
    fields = json.loads(case.answer)
    if reason == "ugly":
        return json.dumps(fields)
    if reason == "dislike":
        quote = fields["evidence"]
        return json.dumps(fields | {"evidence": quote and f"late or not: {quote}"}, separators=(",", ":"))
    if reason == "curiosity":
        return with_label_claim(case.answer) if random.random() < 0.3 else case.answer
    return "ok" if reason == "test" else case.answer


def draw_clicks(n: int, seed: int, purity: float, noise: tuple[str, ...] = NOISE) -> list[dict]:
    """`n` rows as corpus/feedback reads them, a share `purity` of them verified `wrong`. The reason is the true one:
    the staging page did not ask for it."""
    if not 0 <= purity <= 1:
        raise ValueError(f"purity={purity} must be a share, 0 to 1")
    random = make_rng(seed, "clicks")
    rows = []
    for case in draw_cases(n, seed, "clicks"):
        pure, other = random.random() < purity, random.choice(noise)
        reason = "wrong" if pure else other
        rows.append({"id": case.case_id, "prompt": case.prompt, "answer": with_label_claim(case.answer),
                     "correction": correction(case, reason, random), "reason": reason, "consent_to_train": True,
                     "verified": pure})
    return rows


def trained(lab: Lab, name: str, clicks: Callable[[], list[dict]]) -> Artifact:
    """One fine-tune of the SFT checkpoint on corrections, and the eight rates of the frozen evaluation at
    temperature 1."""
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
    cases = evals.frozen_cases(min(N_CASES, lab.profile.n_eval))
    served = Engine(model, lab.load_tokenizer(), 1.0, lab.seed, 16 if lab.profile.name == "smoke" else 48)
    report = evals.evaluate("clicks", served.answer, cases)
    return {rate: report[rate] for rate in evals.RATES}


def measure(lab: Lab) -> tuple[Row, list[Artifact]]:
    n = (2 * 4) if lab.profile.name == "smoke" else STEPS * 24
    made = {f"purity {q}": trained(lab, f"purity {q}", lambda q=q: draw_clicks(n, lab.seed, q)) for q in PURITIES}
    for share in OPINIONS:
        made[f"opinion {share}"] = trained(
            lab, f"opinion {share}", lambda s=share: draw_clicks(n, lab.seed, 1 - s, ("dislike",)))
    made["gated"] = trained(lab, "gated", lambda: [c for c in draw_clicks(n, lab.seed, STAGED) if may_train(c)])
    row: Row = {f"before.{k}": v for k, v in rates(lab, lab.load(lab.sft())).items()}
    row |= {f"{name}.{k}": v for name, a in made.items() for k, v in a.card["measured"].items()}
    purities = sorted(PURITIES)
    row["flip"] = crossing(purities, [row[f"purity {q}.exact_pass"] - row["before.exact_pass"] for q in purities], 0.0)
    return row, list(made.values())


def _effects() -> tuple[tuple[str, str, str | None, str], ...]:
    arms = (*(f"purity {q}" for q in PURITIES), *(f"opinion {s}" for s in OPINIONS), "gated")
    staged = f"purity {STAGED}"
    rows = [("exact pass, verified only - all clicks", "gated.exact_pass", f"{staged}.exact_pass", "share")]
    rows += [(f"{arm}: exact pass, after - before", f"{arm}.exact_pass", "before.exact_pass", "share") for arm in arms]
    for arm in (staged, "gated", "opinion 0.6"):
        rows += [(f"{arm}: {rate}, better by", *((f"before.{rate}", f"{arm}.{rate}") if rate in GOOD_WHEN_LOW else
                  (f"{arm}.{rate}", f"before.{rate}")), "share") for rate in evals.RATES]
    return (*rows, ("before: exact pass", "before.exact_pass", None, "share"),
            ("purity at which corrections begin to help", "flip", None, "share"))


DESIGN = Design(
    measure=measure, notebook="08", rows=("S2-04a", "S2-04b", "S2-04c", "S2-04d"), smallest=0.10, n_items=N_CASES,
    claim="a loader that lets only verified and consented `wrong` rows through leaves exact pass at least 10 points "
          "higher than training on every click of a page where two in five are such rows; and clicks of that page "
          "leave the model worse than no training",
    falsifier="the gain is under 10 points, or training on every click does not lower exact pass",
    also=(("every click: exact pass lost, before - after", 0.0),),
    effects=(*_effects(), ("every click: exact pass lost, before - after", "before.exact_pass",
                           f"purity {STAGED}.exact_pass", "share")))
