"""Rebuild a checkpoint from its card and say how far the two agree (curriculum S3-6.08 to S3-6.10, S3-6.33).

Three levels. Exact implies the other two; of these, neither implies the other:
- exact: the weights are equal bit by bit, and so are the logits of fixed prompts;
- statistical: every rate of the frozen evaluation is equivalent within a margin stated beforehand (two one-sided tests,
  Schuirmann 1987, by interval); for one rebuild the interval is over cases, so it says nothing about other rebuilds;
- behavioural: the same answer, case by case: the share of identical texts, and Cohen's kappa (1960) of right and wrong,
  since two checkpoints that are right on 97 % of the cases agree on 94 % by chance.

Answers are greedy: at temperature 1 two different models would differ by the dice alone. What moved since the card was
written is found first, and decides what may be expected.

Left out: more than one rebuild (the interval over rebuilds is a study: see lab/studies/closures.py).
"""

import hashlib
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lifecycle_lib.core.records import read_json
from lifecycle_lib.core.stats import Effect, paired_effect, wilson
from lifecycle_lib.core.store import Artifact, Store
from lifecycle_lib.judge.evals import frozen_cases
from lifecycle_lib.lab import actuals, runcard
from lifecycle_lib.lab.design import equivalence
from lifecycle_lib.lab.stages import Lab

LEVELS = ("exact", "statistical", "behavioural")
RATES = {"exact_pass": "exact", "json_validity": "valid", "policy_id": "policy_id_ok", "eligibility": "eligible_ok",
         "invented_claim_rate": "claim"}  # rate: its field in a scored row


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyConfig:
    """`margin`: rates within plus or minus this are equivalent. Two checkpoints behave alike when the share of
    identical answers, at the lower end of its interval, reaches `agree` and kappa, where defined, `least_kappa`."""

    margin: float = 0.03
    agree: float = 0.95
    least_kappa: float = 0.6
    n_cases: int = 512

    def __post_init__(self) -> None:
        for name in ("margin", "agree", "least_kappa"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be a share between 0 and 1")
        if not 2 <= self.n_cases <= 512:
            raise ValueError(f"n_cases={self.n_cases}: the frozen evaluation has 512 cases; give 2 to 512")


def pick(store: Store, wanted: str) -> Artifact:
    """The artifact whose fingerprint starts with `wanted`, or the newest of that name (said on stderr if it has
    namesakes). Raises ValueError when there is none."""
    named = [a for a in store.list() if a.name == wanted]
    if len(named) > 1:
        print(f"{wanted}: the newest of {len(named)} of that name, {named[-1].fingerprint}", file=sys.stderr)
    return store.find(named[-1].fingerprint if named else wanted)


def has_report(store: Store, artifact: Artifact) -> bool:
    """Does the store hold an evaluation of this checkpoint?"""
    return any(a.name == "eval" and a.card["parents"].get("checkpoint") == artifact.fingerprint for a in store.list())


def preflight(store: Store, artifact: Artifact, corpus: str | Path | None = None) -> dict[str, Any]:
    """Before anything is built: missing fields by group, what moved, the level to expect, actuals against intents.

    Raises ValueError for an artifact that no stage makes, or a card without what a rebuild needs."""
    ancestors = store.lineage(artifact)
    planned = runcard.plan(artifact, ancestors, corpus)
    moved = runcard.recipe_moves(artifact.card, planned) + runcard.environment_moves(artifact.card)
    missing = runcard.missing_fields(artifact.card, [a.card for a in ancestors], has_report(store, artifact))
    try:
        off = actuals.mismatches(artifact.card)
    except ValueError:  # no actuals: a missing field, named above
        off = []
    return {"missing": {group: fields for group, fields in missing.items() if fields}, "moved": moved,
            "expected": runcard.expected_level(moved), "actuals_off": off}


def rebuild(store: Store, artifact: Artifact, into: Store, *, deep: bool = False, seed: int | None = None,
            corpus: str | Path | None = None) -> Artifact:
    """The artifact made again in `into`, from the parents in `store`; with `deep`, parents are made again as well.

    `seed` replaces the card's own (never in parents). Raises ValueError as `preflight` does."""
    ancestors = store.lineage(artifact)
    parent = runcard.parent_of(artifact, ancestors)
    if deep and parent is not None:
        parent = rebuild(store, parent, into, deep=True, corpus=corpus)
    lab = runcard.lab_of(artifact.card, ancestors, into, seed, corpus)
    return runcard.make_stage(lab, artifact.card, parent)


@torch.no_grad()
def logits_sum(lab: Lab, artifact: Artifact, n_prompts: int = 8) -> str:
    """SHA-256 of the logits after the first prompts of the frozen evaluation."""
    model, tok, digest = lab.load(artifact), lab.load_tokenizer(), hashlib.sha256()
    for case in frozen_cases(n_prompts):
        ids = torch.tensor([tok.encode(case.prompt)], device=lab.device)
        digest.update(model(ids)[0, -1].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def weights_sum(artifact: Artifact) -> str:
    """SHA-256 of its weight file, from the card. Raises ValueError when it holds no weights."""
    if "model.safetensors" not in artifact.card["files"]:
        raise ValueError(f"{artifact.name}-{artifact.fingerprint}: holds no weights; give a checkpoint")
    return artifact.card["files"]["model.safetensors"]["sha256"]


def kappa(a: Sequence[bool], b: Sequence[bool]) -> float | None:
    """Cohen's kappa of two raters on the same items: agreement beyond what their rates alone would give.

    None when it is not defined (both raters say the same of every item). Raises ValueError for no items or unequal
    lengths."""
    if not a or len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} labels: give as many of each, at least one")
    seen = sum(x == y for x, y in zip(a, b)) / len(a)
    p, q = sum(a) / len(a), sum(b) / len(b)
    chance = p * q + (1 - p) * (1 - q)
    return None if chance == 1 else (seen - chance) / (1 - chance)


def compare(first: Mapping[str, Any], second: Mapping[str, Any], cfg: VerifyConfig) -> dict[str, Any]:
    """Statistical and behavioural agreement of two reports over the same cases: second - first.

    Raises ValueError when they scored different cases."""
    if first["eval_fingerprint"] != second["eval_fingerprint"]:
        raise ValueError("the two reports scored different evaluations; evaluate both on the same cases")
    rates = {}
    for rate, field in RATES.items():
        a, b = ([float(row[field]) for row in report["cases"]] for report in (first, second))
        effect = _at_least_as_wide(paired_effect(b, a), wilson(0, len(a))[1])
        rates[rate] = {"first": sum(a) / len(a), "second": sum(b) / len(b), "difference": effect.estimate,
                       "low": effect.low, "high": effect.high, "verdict": equivalence(effect, cfg.margin)}
    same = sum(x == y for x, y in zip(first["answers"], second["answers"], strict=True))
    low, high = wilson(same, len(first["answers"]))
    k = kappa(*([row["exact"] for row in report["cases"]] for report in (first, second)))
    return {"n_cases": len(first["cases"]), "margin": cfg.margin, "rates": rates,
            "statistical": all(r["verdict"] == "supported" for r in rates.values()),
            "same_answers": same, "same_low": low, "same_high": high, "kappa": k,
            "behavioural": low >= cfg.agree and (k is None or k >= cfg.least_kappa)}


def _at_least_as_wide(effect: Effect, half: float) -> Effect:
    """The t interval, widened to what no disagreement in n cases can show: it would have width 0 there."""
    return Effect(effect.estimate, min(effect.low, effect.estimate - half), max(effect.high, effect.estimate + half),
                  effect.n)


def held(exact: bool, agreement: Mapping[str, Any]) -> list[str]:
    """The levels that hold. Equal weights answer alike, however few cases were asked."""
    return [name for name in LEVELS if exact or agreement.get(name)]


def report_of(lab: Lab, artifact: Artifact) -> dict[str, Any]:
    """The greedy report of a checkpoint, made in lab's store."""
    return read_json(lab.evaluation(artifact, 0.0).file("report.json"))


def verify(store: Store, artifact: Artifact, *, deep: bool = False, seed: int | None = None,
           corpus: str | Path | None = None, cfg: VerifyConfig | None = None) -> dict[str, Any]:
    """Rebuild `artifact` in a store of its own and compare. Nothing is written to `store`.

    The result is JSON: preflight, fingerprints, exact (weights, logits), agreement, held, ok. `ok`: no field is
    missing, no actual is off its intent, and the expected level holds (statistical for another seed). If the recipe
    moved it is never ok: what the present code builds is another thing, however alike."""
    cfg = cfg or VerifyConfig()
    before = preflight(store, artifact, corpus)
    expected = "statistical" if seed is not None and before["expected"] == "exact" else before["expected"]
    with tempfile.TemporaryDirectory(prefix="lifecycle-verify-") as folder:
        into = Store(folder)
        again = rebuild(store, artifact, into, deep=deep, seed=seed, corpus=corpus)
        lab = runcard.lab_of(artifact.card, store.lineage(artifact), into, corpus=corpus)
        lab.profile = replace(lab.profile, n_eval=cfg.n_cases)
        exact = {"weights": weights_sum(artifact) == weights_sum(again),
                 "logits": logits_sum(lab, artifact) == logits_sum(lab, again)}
        agreement = compare(report_of(lab, artifact), report_of(lab, again), cfg)
    levels = held(all(exact.values()), agreement)
    result = {"artifact": f"{artifact.name}-{artifact.fingerprint}", "rebuilt": f"{again.name}-{again.fingerprint}",
              "deep": deep, "seed": seed, **before, "moved": [asdict(m) for m in before["moved"]],
              "expected": expected, "exact": exact, "agreement": agreement, "held": levels}
    return result | {"ok": not why_not(result)}


def why_not(result: Mapping[str, Any]) -> list[str]:
    """Every reason why a result of `verify` is not ok, for a person; [] if it is."""
    why = [f"{m['what']} moved" for m in result["moved"] if m["kind"] == "recipe"]
    if not why and result["expected"] not in result["held"]:
        why.append(f"{result['expected']} was expected, and does not hold")
    why += [f"the card lacks {', '.join(fields)}" for fields in result["missing"].values()]
    return why + result["actuals_off"]


def before_text(artifact: Artifact, before: Mapping[str, Any], expected: str) -> str:
    """What a person should know before the rebuild starts."""
    lines = [f"{artifact.name}-{artifact.fingerprint}"]
    lines += [f"  MISSING in the card  {group}: {', '.join(fields)}" for group, fields in before["missing"].items()]
    lines += [f"  moved  {m.what}: {m.card} in the card, {m.here} here ({m.kind})" for m in before["moved"]]
    lines += [f"  not as intended  {line}" for line in before["actuals_off"]]
    if not before["moved"]:
        lines.append("  nothing moved since the card was written")
    return "\n".join([*lines, f"  expect: {expected}"])


def after_text(result: Mapping[str, Any]) -> str:
    """The three levels, with their numbers."""
    exact, a = result["exact"], result["agreement"]
    yes = {True: "equal", False: "DIFFERENT"}
    held = "follows from equal weights" if all(exact.values()) else "within the margin" if a["statistical"] else \
        "NOT shown to be within the margin"
    lines = [f"exact        weights {yes[exact['weights']]}, logits {yes[exact['logits']]}",
             f"statistical  {held} (+-{100 * a['margin']:g} points, {a['n_cases']} cases, greedy, 95 % over cases)"]
    lines += [f"  {name:<20} {100 * r['first']:5.1f} % -> {100 * r['second']:5.1f} %   {100 * r['difference']:+.1f} "
              f"[{100 * r['low']:+.1f}, {100 * r['high']:+.1f}]  {r['verdict']}" for name, r in a["rates"].items()]
    k = "not defined" if a["kappa"] is None else f"{a['kappa']:.2f}"
    lines.append(f"behavioural  {a['same_answers']} of {a['n_cases']} answers identical "
                 f"[{100 * a['same_low']:.0f}, {100 * a['same_high']:.0f}] %, kappa of right and wrong {k}")
    return "\n".join([*lines, f"holds: {', '.join(result['held']) or 'none'}; expected: {result['expected']}"])
