"""The forgetting ledger: what every stage did to every skill, and what keeps the old ones (curriculum S4-25, S3-9.27).

A ledger is a matrix a[stage][skill], shares in [0, 1], stages in the order they ran. Two summaries:
  forgetting   f(k) = max over earlier stages of a[l][k], minus a[last][k], may be negative; its mean F over the skills
               taught before the last stage   (Chaudhry et al. 2018: what was taught last cannot be forgotten yet)
  backward transfer  BWT = mean over the stages i before the last of a[last][own(i)] - a[i][own(i)],
                     own(i) the skill that stage i taught   (Lopez-Paz & Ranzato 2017, equation 3)
A path that learnt less has less to forget: read F beside the peaks and the scores at the end. Orders leave out
different skills, so they are compared by the mean of all three at the end (their equation 2) and by BWT.

Measured twice. On the chain itself: base, SFT, DPO, verifier rewards, greedy, on the frozen cases, and its documents in
bits a token. And on a small desk model that is taught reading, refusing and chatting one after the other, with five
ways to lose less: replay, KL on old rows, LoRA (merged after each stage; twice the steps, adapters learn more slowly
here), another order, everything at once.

Changed after the run, on its rows: F averaged all three skills, the base's chat among them; and that the policy is kept
when taught last was a clause of the claim. Whatever comes last is kept: it is a sanity line now.
Left out: more than three stages, growing a network, Fisher weights.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean

import torch

from lifecycle_lib.core.seeds import make_generator, seed_everything
from lifecycle_lib.core.seeds import rng as make_rng
from lifecycle_lib.core.store import Artifact
from lifecycle_lib.desk import documents
from lifecycle_lib.desk.cases import Case
from lifecycle_lib.desk.documents import REPLIES, draw_documents
from lifecycle_lib.desk.safety import Ask, score_asks
from lifecycle_lib.desk.world import PHRASES, REASONS
from lifecycle_lib.judge import evals
from lifecycle_lib.judge.verifiers import parse_answer
from lifecycle_lib.lab.design import Design, Row
from lifecycle_lib.lab.stages import TRAIN, Lab
from lifecycle_lib.lab.studies import erosion
from lifecycle_lib.lab.studies.erosion import CODE, Arm, ErosionConfig, alignment, base, erode
from lifecycle_lib.lab.studies.small import batches_of, row_losses, rows_of
from lifecycle_lib.lab.studies.small_desk import (
    Pieces,
    answers,
    document_rows,
    small_asks,
    small_cases,
    small_documents,
    small_rows,
    vocabulary,
)
from lifecycle_lib.model import lora
from lifecycle_lib.model.gpt import GPT
from lifecycle_lib.train.logprobs import Rows, pad_rows
from lifecycle_lib.train.staying_close import stack

Ledger = Sequence[Mapping[str, float]]  # one row a stage, in order: {skill: score}

CHAIN_STAGES = ("base", "sft", "dpo", "rlvr")
CHAIN_SKILLS = ("json", "copying", "comparison", "exact", "no_policy", "no_claim")
SKILLS = ("json", "copying", "comparison", "exact", "no_policy", "refusal", "twins", "chat")
SCORED = (*SKILLS, "bits")
POLICY_FIRST, POLICY_LAST = ("policy", "reading", "chat"), ("reading", "chat", "policy")
OWN = {"reading": "exact", "policy": "refusal", "chat": "chat"}  # the skill that a stage teaches


@dataclass(frozen=True, slots=True, kw_only=True)
class Path:
    """One way through the stages: their order, how each is trained, and for how many times the usual steps. `joint`:
    all rows at once, as many steps."""

    order: tuple[str, ...] = POLICY_FIRST
    arm: Arm = Arm()
    joint: bool = False
    times: int = 1


PATHS = {"none": Path(), "replay 5 %": Path(arm=Arm(replay=0.05)), "KL, old rows": Path(arm=Arm(kl=1.0, kl_old=2)),
         "LoRA r=16": Path(arm=Arm(rank=16, lr=5e-3), times=2), "policy last": Path(order=POLICY_LAST),
         "all at once": Path(joint=True)}
STEPS = {"smoke": 2, "laptop": 90, "gpu": 90}  # a stage


# ---- the two summaries -------------------------------------------------------------------------------------

def forgetting(ledger: Ledger) -> dict[str, float]:
    """f(k) of every skill: its best score at an earlier stage, minus its last. Needs two stages."""
    if len(ledger) < 2:
        raise ValueError(f"{len(ledger)} stage: forgetting compares the last with earlier ones; give at least 2")
    if odd := {tuple(sorted(row)) for row in ledger[1:]} - {tuple(sorted(ledger[0]))}:
        raise ValueError(f"stages score different skills: {sorted(ledger[0])} and {sorted(odd.pop())}")
    return {skill: max(row[skill] for row in ledger[:-1]) - ledger[-1][skill] for skill in ledger[0]}


def backward_transfer(ledger: Ledger, own: Sequence[str]) -> float:
    """BWT over stages that each taught one skill: ledger[i] was measured after the stage that taught own[i]."""
    if len(ledger) != len(own) or len(own) < 2:
        raise ValueError(f"{len(ledger)} stages with {len(own)} taught skills: give one skill a stage, at least 2")
    return sum(ledger[-1][k] - ledger[i][k] for i, k in enumerate(own[:-1])) / (len(own) - 1)


# ---- the chain ---------------------------------------------------------------------------------------------

def chain_ledger(lab: Lab, n_documents: int = 200) -> tuple[Row, list[Artifact]]:
    """"chain.stage.skill" for the four trained stages, greedy, and "chain.stage.bits" of held-out documents."""
    tok, row, made = lab.load_tokenizer(), {}, []
    texts = draw_documents(n_documents, evals.EVAL_SEED)
    ids = [tok.encode(d["text"])[:lab.profile.gpt.block_size] for d in texts]
    rows = pad_rows([i[:1] for i in ids], [i[1:] for i in ids], tok.special["<pad>"])
    for stage in CHAIN_STAGES:
        made.append(lab.stage(stage))
        row |= {f"chain.{stage}.{k}": v for k, v in report_skills(lab.evaluate(made[-1], 0.0)).items()}
        row[f"chain.{stage}.bits"] = bits(lab.load(made[-1]), rows)
    for skill, value in forgetting([{k: row[f"chain.{s}.{k}"] for k in CHAIN_SKILLS} for s in CHAIN_STAGES]).items():
        row[f"chain.forgetting.{skill}"] = value
    return row, made


def report_skills(report: Mapping) -> dict[str, float]:
    """The skills that a frozen evaluation's report shows. `no_claim`: answers that are valid and invent nothing."""
    n = len(report["cases"])
    return {"json": report["json_validity"], "copying": report["policy_id"], "comparison": report["eligibility"],
            "exact": report["exact_pass"], "no_policy": report["slices"]["no_policy"]["exact_pass"],
            "no_claim": sum(c["valid"] and not c["claim"] for c in report["cases"]) / n}


def bits(model: GPT, rows: Rows) -> float:
    """Bits a token over the counted tokens of all rows."""
    counted = rows.mask[:, 1:].sum(-1)
    return float((row_losses(model, rows) * counted).sum() / counted.sum()) / math.log(2)


# ---- the small desk, stage by stage ------------------------------------------------------------------------

def uncovered(case: Case, seed: int) -> Case:
    """The same case with a message that neither policy line covers: the right answer is every field null."""
    rng = make_rng(seed, "uncovered", case.case_id)
    reason = rng.choice([r for r in REASONS if r not in {p.reason for p in case.policies}])
    return replace(case, case_id=f"{case.case_id}-none", reason=reason, policy=None,
                   message=rng.choice(PHRASES[reason]).format(item=case.order.item))


def reading_cases(n: int, seed: int, split: str) -> list[Case]:
    """Ordinary cases, one in five of which no policy covers."""
    return [uncovered(c, seed) if i % 5 == 4 else c for i, c in enumerate(small_cases(n, seed, split))]


def chat_rows(vocab: Pieces, n: int, seed: int) -> Rows:
    """Chat logs (no policy lines in sight): the agent answers in plain words."""
    rng = make_rng(seed, "chat")
    parts = [documents.chat(rng, c).removeprefix("<bos>").split("<bot>") for c in small_cases(n, seed, "chat")]
    return rows_of(vocab, [f"{p}<bot>" for p, _ in parts], [a for _, a in parts])


def stage_rows(vocab: Pieces, stage: str, n: int, seed: int) -> Rows:
    if stage == "chat":
        return chat_rows(vocab, n, seed)
    return small_rows(vocab, reading_cases(n, seed, "train") if stage == "reading" else alignment(seed, n, True))


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A chat log's prompt, for `answers`."""

    prompt: str
    replies: frozenset[str]


def exam(seed: int, n_cases: int, n_asks: int) -> tuple[list[Case], list[Ask], list[Ask], list[ChatPrompt]]:
    cases = reading_cases(n_cases, seed, "eval")
    chats = [ChatPrompt(f"<bos><order>{c.order.line()}<user>{c.message}<bot>",
                        frozenset(r.format(item=c.order.item) for r in REPLIES))
             for c in small_cases(n_asks, seed, "eval chat")]
    return cases, small_asks("harmful", n_asks, seed, "eval"), small_asks("twin", n_asks, seed, "eval"), chats


def skills(model: GPT, vocab: Pieces, asked: tuple, documents: Rows) -> dict[str, float]:
    """Every skill of SKILLS as a share, and "bits" a token of held-out documents. `twins`: decided in the contract."""
    cases, harmful, twins, chats = asked
    report = evals.evaluate("small", lambda c: answers(model, vocab, c), cases)
    shown = report_skills(report)
    said = [answers(model, vocab, part) for part in (harmful, twins, chats)]
    return {**{k: shown[k] for k in SKILLS if k in shown},
            "refusal": score_asks(harmful, said[0])["any_refusal"],
            "twins": sum(parse_answer(t).valid for t in said[1]) / len(twins),
            "chat": sum(t in c.replies for c, t in zip(chats, said[2])) / len(chats), "bits": bits(model, documents)}


def small_ledger(lab: Lab, cfg: ErosionConfig, name: str, path: Path) -> Artifact:
    """One path of one seed; card["measured"] holds the rows "base" and one a stage, in order."""
    vocab, start, steps = vocabulary(), base(lab, cfg), path.times * STEPS[lab.profile.name]

    def make(folder) -> dict:
        seed_everything(lab.seed)
        model, seed = lab.load(start), lab.seed
        asked = exam(seed, cfg.n_cases // 2, cfg.n_asks)
        held = document_rows(vocab, small_documents(200, seed + 10_000))
        rows = {s: stage_rows(vocab, s, cfg.n_rows // 2, seed) for s in path.order}
        old = document_rows(vocab, small_documents(cfg.n_rows // 2, seed))
        measured = [{"stage": "base", **skills(model, vocab, asked, held)}]
        stages = [("all", _all(list(rows.values())), 3 * steps)] if path.joint else \
            [(s, rows[s], steps) for s in path.order]
        for stage, new, n in stages:
            reference = lab.load(start)
            reference.load_state_dict(model.state_dict())
            erode(model, batches_of(new, cfg.batch, seed), path.arm, (0, n), lambda m: {}, reference, old, seed)
            if path.arm.rank:
                lora.merge(model)
            old = _even(old, new, seed)
            measured.append({"stage": stage, **skills(model, vocab, asked, held)})
        return {"steps": 3 * steps, "measured": measured, "n_params": model.n_params()}

    config = {"path": path, "study": cfg, "steps": steps}
    return lab.make("ledger", config, {"start": start}, make, (*TRAIN, *CODE, erosion, sys.modules[__name__]))


def _all(parts: Sequence[Rows]) -> Rows:
    out = parts[0]
    for part in parts[1:]:
        out = stack(out, part)
    return out


def _even(old: Rows, new: Rows, seed: int) -> Rows:
    """Old and new rows to replay from, in one pool; the later stage counts as much as all before it."""
    n = min(len(old.ids), len(new.ids))
    g = make_generator(seed, "pool", n)
    picks = [torch.randperm(len(r.ids), generator=g)[:n] for r in (old, new)]
    return stack(*(Rows(r.ids[p], r.mask[p]) for r, p in zip((old, new), picks)))


def measure(lab: Lab, cfg: ErosionConfig | None = None) -> tuple[Row, list[Artifact]]:
    """The chain and every small path of one seed, as "path.stage number.skill"."""
    cfg = cfg or erosion.SIZES[lab.profile.name]
    row, made = chain_ledger(lab)
    for name, path in PATHS.items():
        made.append(small_ledger(lab, cfg, name, path))
        row |= {f"{name}.{i}.{k}": m[k] for i, m in enumerate(made[-1].card["measured"]) for k in SCORED}
    return row, made


def summaries(row: Row) -> Row:
    """What a seed's ledgers come to: each path's end, its best on the way, forgetting and backward transfer."""
    out: Row = {}
    for name, path in PATHS.items():
        ledger = [{k: row[f"{name}.{i}.{k}"] for k in SCORED} for i in range(2 if path.joint else 1 + len(path.order))]
        out |= {f"{name}.last.{k}": v for k, v in ledger[-1].items()}
        out |= {f"{name}.peak.{k}": max(m[k] for m in ledger) for k in OWN.values()}
        out[f"{name}.taught"] = mean(ledger[-1][k] for k in OWN.values())
        if not path.joint:
            lost = forgetting([{k: m[k] for k in OWN.values()} for m in ledger])
            out |= {f"{name}.forgetting.{k}": v for k, v in lost.items()}
            out[f"{name}.forgetting"] = mean(lost[OWN[s]] for s in path.order[:-1])
            out[f"{name}.bwt"] = backward_transfer(ledger[1:], [OWN[s] for s in path.order])
    return out


ONE_BY_ONE = [name for name, path in PATHS.items() if not path.joint]
DESIGN = Design(
    measure=measure, derive=summaries, notebook="09", smallest=0.10,
    rows=("S4-25", "S4-26", "S3-9.03", "S3-9.27", "S3-9.28", "S3-4.01"),
    claim="stages that run one after the other forget: replaying 5 % of what came before lowers the mean forgetting of "
          "the skills taught first by at least 10 points, and the chain's own SFT costs its documents at least half a "
          "bit a token",
    falsifier="replay lowers mean forgetting by under 10 points, or the documents cost less than half a bit a token "
              "more after SFT",
    also=(("documents, bits a token, chain: sft - base", 0.5),),
    items="frozen cases on the chain; 200 cases and 96 asks a role on the small desk",
    effects=(("mean forgetting, none - replay 5 %", "none.forgetting", "replay 5 %.forgetting", "share"),
             ("documents, bits a token, chain: sft - base", "chain.sft.bits", "chain.base.bits", "bits"),
             ("taught skills at the end, mean, replay 5 % - none", "replay 5 %.taught", "none.taught", "share"),
             ("taught skills at the end, mean, policy last - policy first", "policy last.taught", "none.taught",
              "share"),
             ("backward transfer, policy last - policy first", "policy last.bwt", "none.bwt", "share"),
             ("sanity, refusal at the end, policy last - policy first", "policy last.last.refusal", "none.last.refusal",
              "share"),
             *((f"{n}: mean forgetting", f"{n}.forgetting", None, "share") for n in ONE_BY_ONE),
             *((f"{n}: forgetting of {k}", f"{n}.forgetting.{k}", None, "share") for n in ONE_BY_ONE
               for k in OWN.values()),
             *((f"{n}: backward transfer", f"{n}.bwt", None, "share") for n in ONE_BY_ONE),
             *((f"{n}: taught skills at the end, mean", f"{n}.taught", None, "share") for n in PATHS),
             *((f"{n}: best {k} on the way", f"{n}.peak.{k}", None, "share") for n in PATHS for k in OWN.values()),
             *((f"{n}: {k} at the end", f"{n}.last.{k}", None, "bits a token" if k == "bits" else "share")
               for n in PATHS for k in SCORED),
             *((f"none, after {('base', *POLICY_FIRST)[i]}: {k}", f"none.{i}.{k}", None,
                "bits a token" if k == "bits" else "share") for i in range(4) for k in SCORED),
             *((f"chain, {s}: {k}", f"chain.{s}.{k}", None, "bits a token" if k == "bits" else "share")
               for s in CHAIN_STAGES for k in (*CHAIN_SKILLS, "bits")),
             *((f"chain: forgetting of {k}", f"chain.forgetting.{k}", None, "share") for k in CHAIN_SKILLS)))
