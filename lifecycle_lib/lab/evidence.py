"""Multi-seed evidence: an experiment per claim, run over seeds, written to data/results/NAME.json.

A design measures a dict of numbers per seed (all arms of one seed share the base and the eval items). The runner
puts seeds in parallel processes and writes paired effects with 95 % t intervals over seeds (Wilson intervals for
shares of seeds) and the verdict. Stages and evaluations come from the store, so a stopped run goes on where it was.
The files are never written by hand.
"""

import argparse
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import mean

from lifecycle_lib.core.progress import bar
from lifecycle_lib.core.records import read_json, write_json
from lifecycle_lib.core.seeds import one_thread
from lifecycle_lib.core.stats import paired_effect, pass_at_k, verdict
from lifecycle_lib.core.store import Artifact, Store
from lifecycle_lib.judge import evals
from lifecycle_lib.judge.gates import decide
from lifecycle_lib.lab.design import Design, Row, summarise
from lifecycle_lib.lab.profiles import PROFILES
from lifecycle_lib.lab.stages import Lab, reward_of
from lifecycle_lib.lab.studies import STUDIES
from lifecycle_lib.model.memory import ideal_bytes, weight_bytes

RATES = ("json_validity", "policy_id", "eligibility", "exact_pass", "invented_claim_rate", "refusal")


def rates(lab: Lab, artifact: Artifact, label: str, temperature: float = 1.0) -> Row:
    """The frozen evaluation of one arm, as {"label.rate": value}."""
    report = lab.evaluate(artifact, temperature)
    row = {f"{label}.{rate}": report[rate] for rate in RATES}
    return row | {f"{label}.exact.{s}": part["exact_pass"] for s, part in report["slices"].items()}


def pass_at_8(lab: Lab, artifact: Artifact, n_cases: int = 256) -> Row:
    """pass@1 and pass@8 at temperature 1 on the first cases of the frozen evaluation: the ceiling RL moves toward."""
    cases = evals.frozen_cases(min(n_cases, lab.profile.n_eval))
    texts = lab.engine(artifact).texts([c.prompt for c in cases], n_samples=8)
    right = [sum(t == c.answer for t in texts[8 * i:8 * i + 8]) for i, c in enumerate(cases)]
    return {f"sft.pass_at_{k}": mean(pass_at_k(8, c, k) for c in right) for k in (1, 8)}


def sft_room(lab: Lab) -> tuple[Row, list[Artifact]]:
    base, sft = lab.base(), lab.sft()
    clean = lab.arm(claim_share=0.0).sft()
    return (rates(lab, base, "base") | rates(lab, sft, "sft") | rates(lab, sft, "sft_greedy", 0.0)
            | rates(lab, clean, "clean") | pass_at_8(lab, sft)), [base, sft, clean]


def dpo_claims(lab: Lab) -> tuple[Row, list[Artifact]]:
    sft, dpo = lab.sft(), lab.dpo()
    more_sft = lab.arm(claim_share=0.0, sft=lab.profile.dpo, sft_batch=lab.profile.dpo_batch).sft(sft)
    history = read_json(dpo.file("history.json"))
    drift = {f"dpo.{k}_change": history[-1][k] - history[0][k] for k in ("chosen_sum_logp", "rejected_sum_logp")}
    return (rates(lab, sft, "sft") | rates(lab, dpo, "dpo") | rates(lab, more_sft, "more_sft") | drift), \
        [sft, dpo, more_sft]


def rlvr_gain(lab: Lab) -> tuple[Row, list[Artifact]]:
    sft = lab.sft()
    full, shuffled = lab.rlvr(sft), lab.rlvr(sft, shuffle=True)
    return (rates(lab, sft, "sft") | rates(lab, full, "rlvr") | rates(lab, shuffled, "shuffled")
            | rates(lab, sft, "sft_greedy", 0.0) | rates(lab, full, "rlvr_greedy", 0.0)), [sft, full, shuffled]


def weak_verifier(lab: Lab) -> tuple[Row, list[Artifact]]:
    sft = lab.sft()
    cases = evals.frozen_cases(lab.profile.n_eval)
    before = lab.evaluate(sft)
    row, made = rates(lab, sft, "sft"), [sft]
    for name in ("full", "shape_only", "eligible_true_only", "length"):
        arm = lab.rlvr(sft, reward=name)
        report = lab.evaluate(arm)
        gate = decide(report, lab.evaluate(lab.rlvr()), lab.profile.gate)
        row |= rates(lab, arm, name)
        row[f"{name}.proxy_before"] = mean(reward_of(name)(before["answers"], cases))
        row[f"{name}.proxy_after"] = mean(reward_of(name)(report["answers"], cases))
        row[f"{name}.blocked"] = float(not gate.ships)
        made.append(arm)
    return row, made


def quantisation(lab: Lab) -> tuple[Row, list[Artifact]]:
    made = [lab.rlvr(), lab.quantised("int8"), lab.quantised("int4")]
    row: Row = {}
    for name, artifact in zip(("fp32", "int8", "int4"), made):
        model = lab.load(artifact)
        row |= rates(lab, artifact, name) | rates(lab, artifact, f"{name}_greedy", 0.0)
        row[f"{name}.memory_bytes"] = weight_bytes(model)
        row[f"{name}.disk_bytes"] = artifact.file("model.safetensors").stat().st_size
    n_params = lab.load(made[0]).n_params()
    return row | {"int8.ideal_bytes": ideal_bytes(n_params, 8), "int4.ideal_bytes": ideal_bytes(n_params, 4)}, made


def _slices(arm: str, control: str) -> tuple[tuple[str, str, str, str], ...]:
    return tuple((f"{arm}: exact, {s}", f"{arm}.exact.{s}", f"{control}.exact.{s}", "share")
                 for s in ("plain", "boundary", "unconfirmed", "no_policy"))


CHAIN: dict[str, Design] = {
    "sft_room": Design(
        measure=sft_room, notebook="07", rows=("S1-09", "S1-12", "S1-14"), smallest=0.1,
        claim="SFT turns a base that answers no JSON into a reader, and flawed demonstrations (30 % invent a label) "
              "are what leaves room at temperature 1",
        falsifier="clean demonstrations leave the same exact pass at temperature 1 as flawed ones (interval reaches 0)",
        effects=(("exact pass, clean - flawed demonstrations", "clean.exact_pass", "sft.exact_pass", "share"),
                 ("base: JSON validity", "base.json_validity", None, "share"),
                 ("sft: JSON validity", "sft.json_validity", None, "share"),
                 ("sft: policy id, temperature 1", "sft.policy_id", None, "share"),
                 ("sft: policy id, greedy", "sft_greedy.policy_id", None, "share"),
                 ("sft: exact pass, temperature 1", "sft.exact_pass", None, "share"),
                 ("sft: exact pass, greedy", "sft_greedy.exact_pass", None, "share"),
                 ("sft: invented claims, temperature 1", "sft.invented_claim_rate", None, "share"),
                 ("clean: invented claims, temperature 1", "clean.invented_claim_rate", None, "share"),
                 ("sft: pass@1", "sft.pass_at_1", None, "share"), ("sft: pass@8", "sft.pass_at_8", None, "share"))),
    "dpo_claims": Design(
        measure=dpo_claims, notebook="11", rows=("S1-20", "S1-22"), smallest=0.15,
        also=(("JSON validity, dpo - sft", -0.01),),
        claim="DPO on pairs that differ in the invented label alone removes it without breaking the format",
        falsifier="the invented-claim rate falls by less than 15 points, or JSON validity by more than 1 point",
        effects=(("invented claims removed, sft - dpo", "sft.invented_claim_rate", "dpo.invented_claim_rate", "share"),
                 ("sft: invented claims", "sft.invented_claim_rate", None, "share"),
                 ("dpo: invented claims", "dpo.invented_claim_rate", None, "share"),
                 ("JSON validity, dpo - sft", "dpo.json_validity", "sft.json_validity", "share"),
                 ("exact pass, dpo - sft", "dpo.exact_pass", "sft.exact_pass", "share"),
                 ("eligibility, dpo - sft", "dpo.eligibility", "sft.eligibility", "share"),
                 ("invented claims, as many SFT steps on clean answers", "more_sft.invented_claim_rate", None, "share"),
                 ("claims removed beyond those SFT steps, more_sft - dpo", "more_sft.invented_claim_rate",
                  "dpo.invented_claim_rate", "share"),
                 ("chosen sum log-probability, end - start", "dpo.chosen_sum_logp_change", None, "nats"),
                 ("rejected sum log-probability, end - start", "dpo.rejected_sum_logp_change", None, "nats"))),
    "rlvr_gain": Design(
        measure=rlvr_gain, notebook="12", rows=("S1-27",), smallest=0.10,
        also=(("exact pass, rlvr - shuffled rewards", 0.0),),
        claim="verifier rewards raise exact pass at temperature 1 by at least 10 points over the same SFT checkpoint",
        falsifier="the gain is under 10 points, or shuffled rewards gain as much",
        effects=(("exact pass, rlvr - sft", "rlvr.exact_pass", "sft.exact_pass", "share"),
                 ("exact pass, shuffled rewards - sft", "shuffled.exact_pass", "sft.exact_pass", "share"),
                 ("exact pass, rlvr - shuffled rewards", "rlvr.exact_pass", "shuffled.exact_pass", "share"),
                 ("invented claims, rlvr - sft", "rlvr.invented_claim_rate", "sft.invented_claim_rate", "share"),
                 ("eligibility, rlvr - sft", "rlvr.eligibility", "sft.eligibility", "share"),
                 ("sft: exact pass", "sft.exact_pass", None, "share"),
                 ("rlvr: exact pass", "rlvr.exact_pass", None, "share"),
                 ("exact pass, rlvr at temperature 1 - sft greedy", "rlvr.exact_pass", "sft_greedy.exact_pass",
                  "share"),
                 ("exact pass greedy, rlvr - sft", "rlvr_greedy.exact_pass", "sft_greedy.exact_pass", "share"))),
    "weak_verifier": Design(
        measure=weak_verifier, notebook="12", also=(("shape_only: its own reward, after - before", 0.1),),
        arms=("shape_only", "eligible_true_only", "length"),
        rows=("S1-28", "S1-29", "S1-34"), smallest=0.10,
        claim="a verifier that checks shape and policy id only is cheated: its reward rises while exact pass falls",
        falsifier="exact pass under the weak verifier falls by less than 10 points, or its own reward does not rise",
        effects=(("exact pass lost to shape_only, sft - arm", "sft.exact_pass", "shape_only.exact_pass", "share"),
                 *((f"{v}: its own reward, after - before", f"{v}.proxy_after", f"{v}.proxy_before", "reward")
                   for v in ("shape_only", "eligible_true_only", "length", "full")),
                 *((f"{v}: exact pass, arm - sft", f"{v}.exact_pass", "sft.exact_pass", "share")
                   for v in ("shape_only", "eligible_true_only", "length", "full")),
                 *((f"{v}: invented claims, arm - sft", f"{v}.invented_claim_rate", "sft.invented_claim_rate", "share")
                   for v in ("shape_only", "eligible_true_only", "full")),  # "length" leaves few answers that parse
                 *((f"{v}: blocked by the gate", f"{v}.blocked", None, "share of seeds")
                   for v in ("shape_only", "eligible_true_only", "length", "full")))),
    "quantisation": Design(
        measure=quantisation, notebook="16", equivalence=True, rows=("S1-46", "S0-37", "S3-3.30"), smallest=0.01,
        claim="packed int8 answers within 1 point of fp32",
        falsifier="int8 differs from fp32 by more than 1 point (interval leaves [-0.01, 0.01])",
        effects=(("exact pass, int8 - fp32", "int8.exact_pass", "fp32.exact_pass", "share"),
                 ("exact pass, int4 - fp32", "int4.exact_pass", "fp32.exact_pass", "share"),
                 ("exact pass greedy, int8 - fp32", "int8_greedy.exact_pass", "fp32_greedy.exact_pass", "share"),
                 ("exact pass greedy, int4 - fp32", "int4_greedy.exact_pass", "fp32_greedy.exact_pass", "share"),
                 *_slices("int8_greedy", "fp32_greedy"), *_slices("int4_greedy", "fp32_greedy"),
                 *((f"{q}: {b}", f"{q}.{key}", None, "bytes") for q in ("fp32", "int8", "int4") for b, key in
                   (("in memory", "memory_bytes"), ("on disk", "disk_bytes"))),
                 ("int8: ideal", "int8.ideal_bytes", None, "bytes"),
                 ("int4: ideal", "int4.ideal_bytes", None, "bytes"))),
}


DESIGNS: dict[str, Design] = CHAIN | STUDIES


def cheated(arm: str, rows: Sequence[Row]) -> dict:
    """Was this verifier cheated? Supported when its own reward rose and exact pass fell by 10 points or more, both at
    98.3 % intervals (Bonferroni over the three weak verifiers); refuted when one of the two cannot have been
    so large."""
    confidence = 1 - 0.05 / 3
    gain = paired_effect([r[f"{arm}.proxy_after"] for r in rows], [r[f"{arm}.proxy_before"] for r in rows], confidence)
    loss = paired_effect([r["sft.exact_pass"] for r in rows], [r[f"{arm}.exact_pass"] for r in rows], confidence)
    both = {verdict(gain, 0.1), verdict(loss, 0.1)}
    return {"verdict": both.pop() if len(both) == 1 else "refuted" if "refuted" in both else "inconclusive",
            "own reward gained": [gain.estimate, gain.low, gain.high],
            "exact pass lost": [loss.estimate, loss.low, loss.high]}


def measure_seed(name: str, profile: str, seed: int, root: str, device: str | None) -> dict:
    """One seed's row, from the store when it is there. Runs in a worker process."""
    one_thread()
    os.environ["LIFECYCLE_QUIET"] = "1"
    lab = Lab(PROFILES[profile](), seed=seed, device=device, store=Store(root))
    row, made = DESIGNS[name].measure(lab)
    cards = [a.card for a in made]
    return {"seed": seed, "row": row, "cards": [a.fingerprint for a in made],
            "seconds": sum(c["wall_s"] for c in cards), "device": str(lab.device)}


def concluded(name: str, profile: str, per_seed: Sequence[dict]) -> dict:
    """What a design says of its rows: claim, effects with intervals, verdict, and the rows themselves."""
    design = DESIGNS[name]
    if design.derive:
        per_seed = [{**r, **design.derive(r)} for r in per_seed]
    effects, decided = summarise(design, per_seed)
    return {"id": name, "claim": design.claim, "notebook": design.notebook, "rows": list(design.rows),
            "seeds": [r["seed"] for r in per_seed], "effects": effects, "verdict": decided,
            "falsifier": design.falsifier, "smallest_effect": design.smallest, "interval": "95 % paired t over seeds",
            "profile": profile, "n_cases": design.n_items or PROFILES[profile]().n_eval, "items": design.items,
            "per_seed": list(per_seed), "arms": {arm: cheated(arm, per_seed) for arm in design.arms},
            **({"extra": design.extra(per_seed)} if design.extra else {})}


def conclude_again(name: str, out: Path) -> dict:
    """Rewrite a recorded file from its own rows: effects, verdict and extra as the design has them now; trains nothing.

    Raises ValueError for an unknown name or a file that is not there, KeyError where a row lacks what is asked."""
    check_name(name)
    if not (path := out / f"{name}.json").is_file():
        raise ValueError(f"{path}: no such evidence; measure it with: lifecycle evidence {name}")
    kept = read_json(path)
    made = {k: kept[k] for k in ("run_cards", "device", "seconds", "wall_s")}
    evidence = {**concluded(name, kept["profile"], kept["per_seed"]), **made}
    write_json(path, evidence)
    return evidence


def check_name(name: str) -> None:
    """Raises ValueError for evidence that has no design."""
    if name not in DESIGNS:
        raise ValueError(f"evidence {name!r} is unknown; use one of {', '.join(DESIGNS)}")


def run(name: str, seeds: Sequence[int], out: Path, profile: str = "laptop", root: str = "store",
        workers: int = 2, device: str | None = None) -> dict:
    """Run one design over `seeds` and write its evidence file.

    Raises ValueError for an unknown name or fewer than 2 seeds."""
    check_name(name)
    if profile not in PROFILES:
        raise ValueError(f"profile {profile!r} is unknown; use one of {', '.join(PROFILES)}")
    if len(set(seeds)) < 2:
        raise ValueError(f"seeds {list(seeds)}: an interval over seeds needs at least 2 different ones")
    start = time.perf_counter()
    Store(root)
    jobs = [(name, profile, s, root, device) for s in seeds]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool, bar(name, len(jobs)) as progress:
        futures = [pool.submit(measure_seed, *job) for job in jobs]
        results = []
        for future in futures:
            results.append(future.result())
            progress.update()
    evidence = {**concluded(name, profile, [{"seed": r["seed"], **r["row"]} for r in results]),
                "run_cards": sorted({c for r in results for c in r["cards"]}), "device": results[0]["device"],
                "seconds": round(sum(r["seconds"] for r in results), 1),
                "wall_s": round(time.perf_counter() - start, 1)}
    write_json(out / f"{name}.json", evidence)
    return evidence


def main(args: argparse.Namespace) -> int:
    """`lifecycle evidence NAME ...`"""
    for name in args.names or list(DESIGNS):
        evidence = conclude_again(name, Path(args.out)) if args.from_rows else run(
            name, range(args.seeds), Path(args.out), args.profile, args.store, args.workers, args.device)
        print(f"{name}: {evidence['verdict']}  ({evidence['claim']})\n  falsified by: {evidence['falsifier']}")
        for e in evidence["effects"]:
            own_n = f"  n = {e['n']}" if "n" in e else ""
            print(f"  {e['name']:72} {e['estimate']:12.4g}  [{e['low']:.4g}, {e['high']:.4g}] {e['unit']}{own_n}")
        print(f"written: {Path(args.out) / name}.json")
    return 0
