"""One run from random weights to a released checkpoint: stages, evaluations, gate, release, report.

Everything heavy goes through the store, so a run stopped at any moment goes on where it was, and a second run only
reads. What the gate decides is a result, never an error. Left out: a retrieval index (the policies travel in the
prompt), traffic (a release here moves from shadow to full by itself, with the rollback rehearsed in between).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from filelock import FileLock

from lifecycle_lib.core.fingerprints import code_fingerprint
from lifecycle_lib.core.progress import bar
from lifecycle_lib.core.records import read_json, write_json, write_text
from lifecycle_lib.core.store import Artifact
from lifecycle_lib.desk import cases, world
from lifecycle_lib.judge import evals
from lifecycle_lib.judge.gates import GateDecision, GateRefused, decide
from lifecycle_lib.judge.release import Registry, Release
from lifecycle_lib.lab.report import bytes_text, rate_text, render_html, render_text, run_name, time_text
from lifecycle_lib.lab.stages import STAGES, Lab

PARENT = {"sft": "base", "dpo": "sft", "rlvr": "dpo", "int8": "rlvr", "int4": "rlvr"}
BASELINE, CANDIDATES, MUST_BLOCK = "rlvr", ("int4", "int8"), "sft"
SHOWN = ("plain", "boundary", "no_policy")  # slices whose first frozen case is printed in the report
RATE_KEYS = tuple(key + end for key in evals.RATES for end in ("", "_low", "_high"))


@dataclass(frozen=True, slots=True)
class Evaluated:
    """A stage's checkpoint with its reports at temperature 1 and greedy, and the artifacts that hold them."""

    checkpoint: Artifact
    sampled: dict
    greedy: dict
    evaluations: tuple[Artifact, Artifact]


def run(lab: Lab, say: Callable[[str], None] = print) -> dict:
    """Build, evaluate, gate, release; returns the report and writes it. `say` gets a line a stage."""
    began = datetime.now(UTC)
    done: dict[str, Evaluated] = {}
    say(f"profile {lab.profile.name}, seed {lab.seed}, device {lab.device}, store {lab.store.root}")
    for number, name in enumerate(STAGES, 1):
        if name == "base":
            artifact = lab.base()
        elif name in CANDIDATES:
            artifact = lab.quantised(name, done[PARENT[name]].checkpoint)
        else:
            artifact = getattr(lab, name)(done[PARENT[name]].checkpoint)
        done[name] = evaluate_stage(lab, artifact)
        say(f"[{number}/{len(STAGES)}] {stage_line(done[name], began)}")
    gate, decision = judge(lab, {name: one.sampled for name, one in done.items()})
    shipped = done[gate["candidate"]].checkpoint if decision is not None and decision.ships else None
    release = release_card(lab, shipped, decision)
    parts = [lab.tokenizer(), *(a for one in done.values() for a in (one.checkpoint, *one.evaluations))]
    report = {
        "stages": [stage_row(lab, name, one) for name, one in done.items()], "gate": gate, "release": release,
        "seconds": sum(a.card["wall_s"] for a in parts),
        "peak_memory_bytes": max(a.card["peak_memory_bytes"] for a in parts),
        "profile": lab.profile.name, "seed": lab.seed, "device": str(lab.device),
        "run": run_name(lab.profile.name, lab.seed, lab.corpus or lab.base_folder)}
    folder = lab.store.root / "reports" / report["run"]
    write_json(folder / "report.json", report)
    write_text(folder / "report.txt", render_text(report))
    write_text(folder / "report.html", render_html(report))
    return report


def evaluate_stage(lab: Lab, artifact: Artifact) -> Evaluated:
    """Both evaluations of one checkpoint."""
    made = []
    with bar(f"evaluating {artifact.name}", total=2) as progress:
        for temperature in (1.0, 0.0):
            made.append(lab.evaluation(artifact, temperature))
            progress.update()
    sampled, greedy = (read_json(a.file("report.json")) for a in made)
    return Evaluated(artifact, sampled, greedy, (made[0], made[1]))


def stage_line(one: Evaluated, began: datetime) -> str:
    """What a stage came to, on one line."""
    card, report = one.checkpoint.card, one.sampled
    origin = "built" if datetime.fromisoformat(card["created"]) >= began else "from the store, built"
    loss = f", held-out loss {card['held_out_loss']:.3f}" if "held_out_loss" in card else ""
    own = f", own text {card['corpus']['held_out_loss']:.3f}" if "corpus" in card else ""
    return (f"{one.checkpoint.name:<5} {origin} in {time_text(card['wall_s'])}{loss}{own}: exact pass "
            f"{rate_text(report, 'exact_pass')}, JSON {rate_text(report, 'json_validity')}, invented claims "
            f"{rate_text(report, 'invented_claim_rate')}, {bytes_text(report['weight_bytes'])}, "
            f"{report['tokens_per_s']:,.0f} tokens/s")


def stage_row(lab: Lab, name: str, one: Evaluated) -> dict:
    """A stage as the report keeps it: rates at temperature 1 and greedy, costs, sample answers, identity."""
    card, keep = one.checkpoint.card, ("weight_bytes", "tokens_per_s", "ttft_p50_ms", "ttft_p95_ms", "answer_p50_ms",
                                       "answer_p95_ms", "p95_ms", "slices", "eval_fingerprint")
    sometimes = ("steps", "n_params", "first_loss", "last_loss", "held_out_loss", "corpus", "public")
    more = {key: card[key] for key in sometimes if key in card}
    return {"name": name, "n_cases": one.sampled["n_cases"], **{key: one.sampled[key] for key in (*RATE_KEYS, *keep)},
            "seconds": card["wall_s"], "cpu_s": card["cpu_s"], "peak_memory_bytes": card["peak_memory_bytes"],
            "eval_seconds": sum(a.card["wall_s"] for a in one.evaluations),
            "fingerprint": one.checkpoint.fingerprint, **more,
            "greedy": {"n_cases": one.greedy["n_cases"], **{key: one.greedy[key] for key in RATE_KEYS}},
            "samples": samples(lab, one.sampled)}


def samples(lab: Lab, report: Mapping) -> list[dict]:
    """The answers to the first frozen case of each slice in SHOWN; the same cases at every stage."""
    found = []
    frozen = evals.frozen_cases(lab.profile.n_eval)
    for name in SHOWN:
        at = next((i for i, case in enumerate(frozen) if case.slice == name), None)
        if at is not None:
            found.append({"slice": name, "case_id": frozen[at].case_id, "prompt": frozen[at].prompt,
                          "expected": frozen[at].answer, "answer": report["answers"][at],
                          "verdict": verdict(report["cases"][at])})
    return found


def verdict(row: Mapping) -> str:
    """One scored answer in words: "right", or "wrong: " and the first thing that is."""
    if row["exact"]:
        return "right"
    faults = {"invents a side effect": row["claim"], "not the agreed JSON": not row["valid"],
              "policy": not row["policy_id_ok"], "evidence": not row["evidence_ok"], "decision": not row["eligible_ok"]}
    return "wrong: " + next((fault for fault, here in faults.items() if here), "not as agreed to the character")


# ---- gate and release --------------------------------------------------------------------------------------

def one_decision(lab: Lab, candidate: Mapping, baseline: Mapping) -> tuple[dict, GateDecision | None]:
    """The gate's word on one candidate, as a dict and as decided. Evidence that cannot be judged blocks."""
    try:
        decision = decide(candidate, baseline, lab.profile.gate)
    except GateRefused as refused:
        return {"candidate": candidate["name"], "decision": "BLOCK", "reasons": [f"evidence refused: {refused}"],
                "checks": []}, None
    return {"candidate": candidate["name"]} | decision.as_dict(), decision


def judge(lab: Lab, reports: Mapping[str, Mapping]) -> tuple[dict, GateDecision | None]:
    """Candidates from the smallest up, until one ships; then the checkpoint that must not pass, as a proof."""
    considered, decision = [], None
    for name in CANDIDATES:
        verdict_on, decision = one_decision(lab, reports[name], reports[BASELINE])
        considered.append(verdict_on)
        if decision is not None and decision.ships:
            break
    blocked, _ = one_decision(lab, reports[MUST_BLOCK], reports[BASELINE])
    return considered[-1] | {"baseline": BASELINE, "temperature": 1.0, "considered": considered,
                             "must_block": blocked}, decision


def release_card(lab: Lab, artifact: Artifact | None, decision: GateDecision | None) -> dict:
    """Release a shipped checkpoint through the registry and name its whole ancestry. A second call changes nothing."""
    if artifact is None or decision is None:
        return {"state": "none", "name": None, "release_id": None, "fingerprint": None, "lineage": []}
    lineage = [{"name": a.name, "fingerprint": a.fingerprint, "seconds": a.card["wall_s"]}
               for a in (*lab.store.lineage(artifact), artifact)]
    tokenizer = lab.tokenizer()
    run = run_name(lab.profile.name, lab.seed, lab.corpus or lab.base_folder)
    release = Release.of(
        f"{artifact.name}-{run}", checkpoint=artifact.fingerprint,
        index="none: policies travel in the prompt", prompt=code_fingerprint([world, cases])[:16],
        gate=decision.gate_version,
        paths=[one.path / name for one in (artifact, tokenizer) for name in one.card["files"]])
    registry = Registry(lab.store.root / "releases")
    with FileLock(lab.store.root / "locks" / "releases.lock"):
        registry.repair()
        state = registry.states().get(release.release_id) or registry.register(release) and "candidate"
        while state in ("candidate", "shadow", "canary"):
            if state != "candidate" and registry.current() is not None:
                registry.drill(release.release_id)
            state = registry.promote(release.release_id, decision)
        served = registry.current()
    return {"state": state, "name": release.name, "release_id": release.release_id, "fingerprint": artifact.fingerprint,
            "served_now": served.name if served else None, "lineage": lineage}

