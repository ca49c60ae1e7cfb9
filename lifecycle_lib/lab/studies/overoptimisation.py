"""D4: over-optimisation in four costumes (S2-08, S1-29, S1-34, S0-35, S0-36), on the chain's SFT checkpoint.

A short SFT gives the model manners that vary (the common start of all arms). From there each proxy of `costumes` is
maximised twice: by best-of-n from one pool of samples, and by GRPO with a measurement every few steps. Gold, proxy, KL
and four alarms are read on unseen cases; a second set of unseen cases is the holdout that governors may look at.

The peak of gold is looked for on the holdout and its height read on the test cases, so that "the peak lies above the
end" is not true by selection. KL is exact per token along sampled answers (sum over the vocabulary), summed an answer.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lifecycle_lib.core.records import read_json, write_json
from lifecycle_lib.core.seeds import make_generator, rng
from lifecycle_lib.core.store import Artifact
from lifecycle_lib.desk.cases import Case, draw_cases
from lifecycle_lib.desk.world import PROVENANCE
from lifecycle_lib.judge import evals, verifiers
from lifecycle_lib.lab.stages import TRAIN, Lab
from lifecycle_lib.lab.studies import costumes
from lifecycle_lib.model import sampling
from lifecycle_lib.model.checkpoint import save_checkpoint
from lifecycle_lib.model.gpt import GPT
from lifecycle_lib.model.sampling import generate
from lifecycle_lib.train import best_of_n, grpo, loop, sft, staying_close
from lifecycle_lib.train.logprobs import Rows, answer_loss, pad_rows
from lifecycle_lib.train.loop import FitConfig

USERS = 8  # who see one training answer and click or do not
CODE = (*TRAIN, sampling, grpo, sft, best_of_n, staying_close, verifiers, costumes, sys.modules[__name__])


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much of everything. `every`: steps between two measurements."""

    start_steps: int = 60
    steps: int = 18
    every: int = 3
    n_prompts: int = 16
    group: int = 8
    n_test: int = 96
    n_holdout: int = 64
    annotated: int = 128  # cases, four answers each: what the reward model's pairs are drawn from
    pool_cases: int = 64
    pool: int = 64
    max_new_tokens: int = 56
    lr: float = 3.5e-4
    kl_stop: float = 12.0  # nats: an arm further out than this is stopped, it has shown what it had to show


SIZES = {"smoke": Size(start_steps=1, steps=3, every=3, n_prompts=2, group=4, n_test=8, n_holdout=4, annotated=4,
                       pool_cases=2, max_new_tokens=8),
         "laptop": Size(), "gpu": Size(n_test=512, n_holdout=256)}


def start(lab: Lab, size: Size) -> Artifact:
    """The common start: the chain's SFT checkpoint after a short SFT on answers whose manners vary."""
    parent, tok = lab.sft(), lab.load_tokenizer()
    fit = FitConfig(steps=size.start_steps, lr_matrix=0.01, checkpoint_every=10_000)

    def make(folder: Path) -> dict:
        model = lab.load(parent)
        cases = draw_cases(size.start_steps * 48, lab.seed, "manners")
        rows = sft.encode_rows(tok, costumes.varied_rows(cases, lab.seed))
        batches = sft.sft_batches(rows, 48, lab.seed, tok.special["<pad>"], model.cfg.block_size)
        result = loop.fit(model, lambda s: batches(s).to(lab.device), answer_loss, fit, label="manners")
        save_checkpoint(folder, model)
        where = [c for c in draw_cases(size.annotated, lab.seed, "annotated") for _ in range(4)]
        texts = answers(model, tok, where[::4], size, lab.seed, n_samples=4)[0]
        pairs = costumes.noisy_pairs(texts, [costumes.gold(t, c) for t, c in zip(texts, where)], 4, lab.seed)
        weights = costumes.fit_bradley_terry(pairs)
        write_json(folder / "reward_model.json", dict(zip(costumes.FEATURES, map(float, weights))))
        return {"steps": result.steps, "last_loss": result.losses[-1], **PROVENANCE}

    return lab.make("d4start", {"fit": fit, "size": size}, {"sft": parent, "tokenizer": lab.tokenizer()}, make, CODE)


def answers(model: GPT, tok, cases: Sequence[Case], size: Size, seed: int, n_samples: int = 1,
            ) -> tuple[list[str], list[list[int]]]:
    """(texts, token ids) of answers at temperature 1, row case * n_samples + sample."""
    end = tok.special["<eos>"]
    out = generate(model.eval(), [tok.encode(c.prompt) for c in cases], eos_id=end, pad_id=tok.special["<pad>"],
                   max_new_tokens=size.max_new_tokens, n_samples=n_samples,
                   generator=make_generator(seed, "answers", n_samples))
    return out.texts(tok), out.ids


def scorers(begin: Artifact) -> dict[str, Callable[[str, Case], float]]:
    """Every score an answer is read with; the reward model's weights are those of this seed."""
    weights = np.array([read_json(begin.file("reward_model.json"))[f] for f in costumes.FEATURES])
    return {"thumbs": costumes.click_probability, "reward_model": lambda t, c: float(costumes.features(t) @ weights),
            "rubric": lambda t, c: costumes.rubric(t), "twin": lambda t, c: costumes.rubric(t, 1),
            "text_match": costumes.text_match, "verifier": costumes.outcome, "gold": costumes.gold}


def reward(name: str, score: dict[str, Callable], seed: int) -> grpo.RewardFn:
    """What an arm is paid. thumbs: the share of 8 users who click. "mixed X": half X (0 to 1) and half the verifier."""

    def paid(i: int, text: str, case: Case) -> float:
        proxy = name.removeprefix("mixed ")
        value = score[proxy](text, case)
        if proxy == "thumbs":
            random_ = rng(seed, "clicks", case.case_id, i)
            value = sum(random_.random() < value for _ in range(USERS)) / USERS
        if proxy == name:
            return value
        return (1 / (1 + np.exp(-value)) if proxy == "reward_model" else value) / 2 + costumes.outcome(text, case) / 2

    return lambda texts, cases: [paid(i, t, c) for i, (t, c) in enumerate(zip(texts, cases))]


# ---- measuring ---------------------------------------------------------------------------------------------

def watched_cases(size: Size) -> tuple[list[Case], list[Case]]:
    """(test, holdout): unseen cases, no case in both."""
    return evals.frozen_cases(size.n_test), draw_cases(size.n_holdout, 77, "eval")


@torch.no_grad()
def distance(model: GPT, ref: GPT, rows: Rows) -> tuple[float, float]:
    """(KL(model || ref) in nats an answer, entropy in nats a token), exact at every token of sampled answers."""
    logits = [m(rows.ids[:, :-1])[rows.mask[:, 1:]] for m in (model, ref)]  # (N, V)
    kl = staying_close.kl_tokens(*logits, direction="reverse")
    logp = torch.log_softmax(logits[0], -1)
    return float(kl.sum() / len(rows.ids)), float(-(logp.exp() * logp).sum(-1).mean())


def snapshot(model: GPT, ref: GPT, tok, size: Size, score: dict[str, Callable], seed: int) -> dict[str, float]:
    """Every score on test and holdout cases, KL, and the alarms' signals, of one answer a case at temperature 1."""
    test, holdout = watched_cases(size)
    cases, training = test + holdout, model.training
    texts, ids = answers(model, tok, cases, size, seed)
    kl, entropy = distance(model, ref, pad_rows([tok.encode(c.prompt) for c in cases], ids, tok.special["<pad>"]))
    model.train(training)
    row = {"kl": kl, "entropy": entropy, "tokens": sum(map(len, ids)) / len(ids)}
    for name, fn in score.items():
        values = np.array([fn(t, c) for t, c in zip(texts, cases)])
        row |= {name: values[:len(test)].mean(), f"holdout.{name}": values[len(test):].mean()}
    return {k: float(v) for k, v in row.items()}


class FarEnough(Exception):
    """Ends an arm whose KL has passed `kl_stop`."""


def arm(lab: Lab, size: Size, begin: Artifact, name: str, beta: float = 0.0) -> Artifact:
    """GRPO from the common start on the reward `name`, measured before the first step, along the way and at the end.
    `beta` is the price of a nat a token from the start."""
    cfg = grpo.GRPOConfig(n_prompts=size.n_prompts, group_size=size.group, max_new_tokens=size.max_new_tokens,
                          beta=beta)
    fit = FitConfig(steps=size.steps, optimizer="adamw", lr=size.lr, beta2=0.999, warmup_steps=3, min_lr_share=1.0,
                    checkpoint_every=10_000)

    def make(folder: Path) -> dict:
        model, ref, tok, score = lab.load(begin), lab.load(begin).eval(), lab.load_tokenizer(), scorers(begin)
        train = draw_cases(size.steps * size.n_prompts, lab.seed, "d4")
        draw = grpo.grpo_batches(model, tok, train, reward(name, score, lab.seed), cfg, lab.seed)
        curve: list[dict] = []

        def look(step: int) -> None:
            curve.append({"step": step, **snapshot(model, ref, tok, size, score, lab.seed)})

        def batches(step: int) -> grpo.Rollouts:
            if step % size.every == 0:
                look(step)
                if curve[-1]["kl"] > size.kl_stop:
                    raise FarEnough
            return draw(step)

        try:
            loop.fit(model, batches, lambda m, b: grpo.rollout_loss(m, b, cfg, ref), fit, label=name)
            look(size.steps)
        except FarEnough:
            model.eval()
        said = answers(model, tok, watched_cases(size)[0][:8], size, lab.seed)[0]
        write_json(folder / "curve.json", {"curve": curve, "said": said})
        return {"steps": curve[-1]["step"], **PROVENANCE}

    return lab.make("d4arm", {"arm": name, "grpo": cfg, "fit": fit, "size": size}, {"start": begin}, make, CODE)


def pool(lab: Lab, size: Size, begin: Artifact) -> Artifact:
    """Best-of-n on every proxy, from one pool of answers of the common start to test cases."""
    def make(folder: Path) -> dict:
        model, tok, score = lab.load(begin), lab.load_tokenizer(), scorers(begin)
        cases = watched_cases(size)[0][:size.pool_cases]
        texts, _ = answers(model, tok, cases, size, lab.seed, n_samples=size.pool)
        where = [c for c in cases for _ in range(size.pool)]
        scores = {k: np.reshape([fn(t, c) for t, c in zip(texts, where)], (-1, size.pool)) for k, fn in score.items()}
        ns = [2**i for i in range(size.pool.bit_length()) if 2**i <= size.pool]
        curves = {p: {str(n): {what: float(best_of_n.best_of_n(scores[p], scores[what], n).mean())
                               for what in (p, "gold", "verifier", "twin")}
                      | {"kl": float(best_of_n.pool_kl(scores[p], n).mean())} for n in ns}
                  for p in (*costumes.PROXIES, "verifier")}
        alike = {p: 0.0 if scores[p].std() == 0 or scores["gold"].std() == 0 else
                 float(np.corrcoef(scores[p].ravel(), scores["gold"].ravel())[0, 1]) for p in curves}
        write_json(folder / "pool.json", {"curves": curves, "correlation_with_gold": alike})
        return {"steps": 0, **PROVENANCE}

    return lab.make("d4pool", {"size": size}, {"start": begin}, make, CODE)


def imitate(lab: Lab, size: Size, begin: Artifact, rounds: int) -> Artifact:
    """SFT on the winners of the verifier: as many rollouts in all as a GRPO arm, in `rounds` rounds of sample, keep,
    imitate (1: rejection sampling; more: expert iteration). Measured at the end."""
    each = size.steps * size.n_prompts // rounds  # cases a round
    cfg = grpo.GRPOConfig(n_prompts=each, group_size=size.group, max_new_tokens=size.max_new_tokens)

    def make(folder: Path) -> dict:
        model, ref, tok, score = lab.load(begin), lab.load(begin).eval(), lab.load_tokenizer(), scorers(begin)
        train, steps = draw_cases(size.steps * size.n_prompts, lab.seed, "d4"), 0
        for i in range(rounds):
            try:
                kept = best_of_n.winners(model.eval(), tok, train[i * each:(i + 1) * each],
                                         reward("verifier", score, lab.seed), cfg, lab.seed, i)
            except ValueError:
                continue  # nobody won (a model that has learnt nothing): this round teaches nothing
            batch = min(64, len(kept))
            fit = FitConfig(steps=len(kept) // batch, optimizer="adamw", lr=size.lr, beta2=0.999, warmup_steps=3,
                            min_lr_share=1.0, checkpoint_every=10_000)
            batches = sft.sft_batches(kept, batch, lab.seed + i, tok.special["<pad>"], model.cfg.block_size)
            loop.fit(model, batches, lambda m, rows: answer_loss(m, rows.to(lab.device)), fit, label=f"winners {i + 1}")
            steps += fit.steps
        last = {"step": steps, **snapshot(model, ref, tok, size, score, lab.seed)}
        write_json(folder / "curve.json", {"curve": [last]})
        return {"steps": steps, **PROVENANCE}

    config = {"rounds": rounds, "grpo": cfg, "size": size}
    return lab.make("d4winners", config, {"start": begin}, make, CODE)
