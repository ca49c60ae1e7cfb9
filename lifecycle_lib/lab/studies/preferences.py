"""Preferences: three recorded experiments on the chain's SFT checkpoints, all from the same pairs.

Nothing was tuned arm by arm: every pairwise loss trains with the chain's own DPO settings (SGD).

- preference_kin: DPO, IPO, KTO, ORPO, SFT on the chosen answers, a reward model with REINFORCE and a KL leash, best of
  four by that reward model: claims left, exact pass, KL spent (of best of four an upper bound), CPU seconds. The reward
  model's road runs under AdamW, the others under SGD.
- label_noise: a share e of the pairs turned round. DPO, cDPO and robust DPO, which are told the share; and, because the
  mean gradient shrinks to 1 - 2e of itself, plain DPO at the rate over 1 - 2e: is robust DPO more than a longer step?
- dpo_adam: AdamW at two rates against SGD, each AdamW run ended where its claim is as unlikely as SGD's: does the
  format pay? And the two roads with their optimisers exchanged: the reward model's under SGD, DPO under its AdamW.

Every arm answers the same frozen cases once at temperature 1. `said` counts answers that mention the label at all, also
in JSON that no parser accepts: a claim that is never closed is not a claim removed. `kl` is the mean log-ratio of the
sampled answers to the SFT checkpoint, in nats an answer.

Left out: other habits than the invented label, pairs voted on by people.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch

from lifecycle_lib.core.seeds import make_generator, seed_everything
from lifecycle_lib.core.store import Artifact
from lifecycle_lib.desk.cases import Case, draw_cases
from lifecycle_lib.judge import evals
from lifecycle_lib.lab.design import Design, Row
from lifecycle_lib.lab.stages import TRAIN, Lab
from lifecycle_lib.model import sampling
from lifecycle_lib.model.gpt import GPT
from lifecycle_lib.model.sampling import generate
from lifecycle_lib.train import dpo, grpo, preferences, reinforce, reward_model
from lifecycle_lib.train.best_of_n import best_of_n_kl
from lifecycle_lib.train.logprobs import answer_loss, pad_rows, sum_logps
from lifecycle_lib.train.loop import FitConfig, LossFn, fit

N_ITEMS, BEST_OF, N_PROBE = 256, 4, 64
KIN = {"dpo": 0.5, "ipo": 0.1, "kto": 0.5, "orpo": 0.5}  # beta of each; IPO's asks for a gap of 5 nats
RL = reinforce.leashed(grpo.GRPOConfig(n_prompts=16, group_size=8), beta=0.05)
RL_FIT = FitConfig(steps=30, optimizer="adamw", lr=3e-4, beta2=0.999, warmup_steps=3, checkpoint_every=10_000)
RM_FIT = FitConfig(steps=20, optimizer="adamw", lr=3e-4, warmup_steps=2, checkpoint_every=10_000)
ADAM = {"3e-05": 60, "0.0001": 30}  # rate: the most steps
NOISE = (0.2, 0.4)


class Bench:
    """What the arms of one seed share: the SFT checkpoint as start and reference, the pairs, the frozen cases."""

    def __init__(self, lab: Lab) -> None:
        self.lab, self.sft, self.tok = lab, lab.sft(), lab.load_tokenizer()
        self.pad, self.eos = self.tok.special["<pad>"], self.tok.special["<eos>"]
        self.reference = lab.load(self.sft)
        self.pairs = dpo.make_pairs(draw_cases(lab.profile.n_pairs, lab.seed, "dpo"))
        self.cases = evals.frozen_cases(min(N_ITEMS, lab.profile.n_eval))
        self.made: list[Artifact] = [self.sft]

    def batches(self, pairs: Sequence[dict]) -> Callable[[int], dpo.PairBatch]:
        coded = dpo.encode_pairs(self.tok, pairs)
        ref = dpo.reference_logps(self.reference, coded, self.pad)
        return dpo.dpo_batches(coded, ref, self.lab.profile.dpo_batch, self.lab.seed, self.pad, self.lab.device)

    def answers(self, model: GPT, n_samples: int = 1) -> tuple[list[str], float]:
        """(answers at temperature 1, row case * n_samples + s; mean log-ratio to the reference in nats)."""
        prompts = [self.tok.encode(c.prompt) for c in self.cases]
        out = generate(model, prompts, eos_id=self.eos, pad_id=self.pad, max_new_tokens=48, n_samples=n_samples,
                       generator=make_generator(self.lab.seed, "preference answers"))
        repeated = [p for p in prompts for _ in range(n_samples)]
        kl = 0.0
        for i in range(0, len(repeated), 128):
            rows = pad_rows(repeated[i:i + 128], out.ids[i:i + 128], self.pad).to(self.lab.device)
            with torch.no_grad():
                kl += sum(map(sum, out.logps[i:i + 128])) - float(sum_logps(self.reference, rows).sum())
        return out.texts(self.tok), kl / len(repeated)

    def arm(self, name: str, config: dict, make: Callable[[], tuple[GPT, dict]]) -> Row:
        """{"name.rate": value} of one arm, from the store when it is there; `make` trains (timed) and adds numbers."""
        def build(folder: Path) -> dict:
            seed_everything(self.lab.seed)
            start = time.process_time()
            model, extra = make()
            seconds = time.process_time() - start
            texts, kl = self.answers(model)
            return {"measured": rates(texts, self.cases) | {"kl": kl, "cpu_s": seconds} | extra, "sources": {}}

        artifact = self.lab.make("preference_arm", {"arm": name, "n_items": N_ITEMS, **config}, {"sft": self.sft},
                                 build, (*TRAIN, dpo, preferences, reinforce, reward_model, grpo, sampling, evals,
                                         sys.modules[__name__]))
        self.made.append(artifact)
        return {f"{name}.{key}": float(value) for key, value in artifact.card["measured"].items()}

    def tuned(self, name: str, loss_fn: LossFn, pairs: Sequence[dict], beta: float, faster: float = 1.0,
              **config: object) -> Row:
        """An arm that trains on pairs with the chain's own DPO settings (SGD), its rate times `faster`, and how far the
        two answers of the last five batches have moved from the reference, in nats."""
        cfg = replace(self.lab.profile.dpo, lr=faster * self.lab.profile.dpo.lr, checkpoint_every=10_000)

        def make() -> tuple[GPT, dict]:
            model = self.lab.load(self.sft)
            history = fit(model, self.batches(pairs), loss_fn, cfg, label=name).history[-5:]
            return model, {f"{side}_change": mean(h[key] for h in history) / beta for side in ("chosen", "rejected")
                           if (key := f"{side}_reward") in history[0]}

        return self.arm(name, {"fit": cfg, "beta": beta, **config}, make)


def rates(texts: Sequence[str], cases: Sequence[Case]) -> dict:
    """Shares of the answers that say the label, claim it in valid JSON, parse, and are right to the character."""
    rows = [evals.score(t, c) for t, c in zip(texts, cases, strict=True)]
    return {"said": mean("label_created" in t for t in texts), "claim": mean(r["claim"] for r in rows),
            "valid": mean(r["valid"] for r in rows), "exact": mean(r["exact"] for r in rows)}


# ---- preference_kin ----------------------------------------------------------------------------------------

def chosen_loss(model: GPT, batch: dpo.PairBatch) -> tuple[torch.Tensor, dict[str, float]]:
    """The SFT loss of the chosen answers of a batch of pairs: imitation of the winners."""
    rows, n = batch.rows, len(batch.rows.ids) // 2
    prefix = rows.prefix and type(rows.prefix)(rows.prefix.ids, rows.prefix.mask, rows.prefix.owner[:n])
    return answer_loss(model, type(rows)(rows.ids[:n], rows.mask[:n], prefix))


def judged(bench: Bench) -> tuple[reward_model.RewardModel, dict]:
    """The reward model of this seed and what it says of held-out pairs."""
    model, _ = reward_model.train_reward_model(bench.reference, bench.tok, bench.pairs, RM_FIT,
                                               batch_size=bench.lab.profile.dpo_batch, seed=bench.lab.seed)
    held = dpo.make_pairs(draw_cases(N_PROBE, bench.lab.seed, "dpo probe"))
    chosen, rejected = (model.score(bench.tok, [p["prompt"] for p in held], [p[side] for p in held])
                        for side in ("chosen", "rejected"))
    return model, {"rm_accuracy": float((chosen > rejected).float().mean())}


def against_reward_model(bench: Bench, rl_fit: FitConfig) -> tuple[GPT, dict]:
    """Reward model, then REINFORCE with the leash: both are in the bill."""
    lab = bench.lab
    judge, extra = judged(bench)
    model = lab.load(bench.sft)
    reward = lambda texts, where: judge.score(bench.tok, [c.prompt for c in where], texts).tolist()  # noqa: E731
    feed = grpo.grpo_batches(model, bench.tok, draw_cases(lab.profile.n_pairs, lab.seed, "dpo"), reward, RL, lab.seed)
    history = fit(model, feed, reinforce.reinforce_kl(bench.reference, RL), rl_fit, label="REINFORCE").history
    return model, extra | {"proxy_change": history[-1]["reward"] - history[0]["reward"]}


def best_by_reward_model(bench: Bench) -> tuple[GPT, dict]:
    """Untrained policy, BEST_OF answers a case, the reward model picks: its rates replace those of single answers."""
    judge, extra = judged(bench)
    texts, _ = bench.answers(bench.reference, BEST_OF)
    scores = judge.score(bench.tok, [c.prompt for c in bench.cases for _ in range(BEST_OF)], texts).view(-1, BEST_OF)
    best = [texts[i * BEST_OF + int(j)] for i, j in enumerate(scores.argmax(1))]
    return bench.reference, extra | rates(best, bench.cases) | {"kl": best_of_n_kl(BEST_OF)}


def kin(lab: Lab) -> tuple[Row, list[Artifact]]:
    bench = Bench(lab)
    row = bench.arm("sft", {}, lambda: (lab.load(bench.sft), {}))
    for kind, beta in KIN.items():
        loss = preferences.kin_loss(kind, beta, reference=bench.reference)
        row |= bench.tuned(kind, loss, bench.pairs, beta=beta)
    row |= bench.tuned("sft_chosen", chosen_loss, bench.pairs, beta=1.0)
    row |= bench.arm("rm_rl", {"rm": RM_FIT, "rl": RL, "fit": RL_FIT}, lambda: against_reward_model(bench, RL_FIT))
    return row | bench.arm("best_of", {"rm": RM_FIT, "n": BEST_OF}, lambda: best_by_reward_model(bench)), bench.made


# ---- label_noise -------------------------------------------------------------------------------------------

def at_rest(said: float, share: float, beta: float) -> float:
    """Where DPO stops when `share` of the labels is wrong, as a share of answers that say the label: beta d is then the
    votes' log-odds ln((1 - share) / share), and the reference's odds fall by e^d."""
    odds = said / (1 - said) * (share / (1 - share)) ** (1 / beta)
    return odds / (1 + odds)


def noise(lab: Lab) -> tuple[Row, list[Artifact]]:
    bench, beta = Bench(lab), KIN["dpo"]
    row = bench.arm("sft", {}, lambda: (lab.load(bench.sft), {}))
    row |= bench.tuned("dpo", preferences.kin_loss("dpo", beta), bench.pairs, beta=beta)
    for share in NOISE:
        pairs, tag = preferences.with_label_noise(bench.pairs, share, lab.seed), round(100 * share)
        for name, kind in (("dpo", "dpo"), ("scaled", "dpo"), ("robust", "robust"), ("cdpo", "cdpo")):
            loss = preferences.kin_loss(kind, beta, smoothing=share)
            row |= bench.tuned(f"{name}_{tag}", loss, pairs, beta, 1 / (1 - 2 * share) if name == "scaled" else 1.0,
                               share=share)
        row[f"dpo_{tag}.rest"] = at_rest(row["sft.said"], share, beta)
        row[f"cdpo_{tag}.rest"] = at_rest(row["sft.said"], 2 * share * (1 - share), beta)  # smoothed once more
    return row, bench.made


# ---- dpo_adam ----------------------------------------------------------------------------------------------

class TailProbe:
    """Log-odds of the rejected answers' tokens from the fork on, over cases that no arm trains on. (K,)"""

    def __init__(self, bench: Bench) -> None:
        probe = dpo.encode_pairs(bench.tok, dpo.make_pairs(draw_cases(N_PROBE, bench.lab.seed, "dpo probe")))
        self.forks = [next(i for i, (a, b) in enumerate(zip(c, r)) if a != b) for _, c, r in probe]
        self.rows = pad_rows([p for p, _, _ in probe], [r for _, _, r in probe], bench.pad).to(bench.lab.device)

    @torch.no_grad()
    def __call__(self, model: GPT) -> torch.Tensor:
        logits, target = model(self.rows.ids[:, :-1]), self.rows.ids[:, 1:, None]
        odds = (logits.gather(-1, target) - logits.scatter(-1, target, -torch.inf).logsumexp(-1, keepdim=True))[..., 0]
        each = [row[kept][fork:] for row, kept, fork in zip(odds, self.rows.mask[:, 1:], self.forks)]
        return torch.stack([row[:min(map(len, each))] for row in each]).mean(0)


class Reached(Exception):
    """The claim is as unlikely as the target."""


def matched(bench: Bench, probe: TailProbe, rate: float, steps: int, target: float) -> tuple[GPT, dict]:
    """AdamW at `rate`, ended at the first step whose claim is no likelier than `target` (log-odds at the fork);
    `reached` 0: it never was, and the model is that of the last step."""
    model, draw, taken = bench.lab.load(bench.sft), bench.batches(bench.pairs), steps

    def batches(step: int) -> dpo.PairBatch:
        nonlocal taken
        if probe(model)[0] <= target:
            taken = step
            raise Reached
        return draw(step)

    cfg = FitConfig(steps=steps, optimizer="adamw", lr=rate, beta2=0.999, warmup_steps=5, checkpoint_every=10_000)
    try:
        fit(model, batches, preferences.kin_loss("dpo", KIN["dpo"]), cfg, label=f"AdamW {rate}")
    except Reached:
        pass
    return model, {"steps": taken, "reached": taken < steps}


def after(bench: Bench, probe: TailProbe, model: GPT) -> dict:
    """What `probe` says of a trained model: log-odds at the fork, how far each later token of the rejected answer fell,
    whether the least certain of them fell most; and how far the weights moved, as a share of their norm."""
    start, end = probe(bench.reference), probe(model)
    fell = (start - end)[1:]
    old, new = (torch.cat([w.detach().flatten() for w in m.parameters()]) for m in (bench.reference, model))
    return {"fork": float(end[0]), "moved": float((new - old).norm() / old.norm()),
            "weakest_fell_most": float(fell.argmax() == start[1:].argmin()),
            **{f"tail_{i}": float(x) for i, x in enumerate(start)},
            **{f"fell_{i}": float(x) for i, x in enumerate(fell, 1)}}


def adam(lab: Lab) -> tuple[Row, list[Artifact]]:
    bench = Bench(lab)
    probe, loss = TailProbe(bench), preferences.kin_loss("dpo", KIN["dpo"])
    slow = replace(lab.profile.dpo, steps=RL_FIT.steps, checkpoint_every=10_000)

    def plain(cfg: FitConfig) -> tuple[GPT, dict]:
        model = lab.load(bench.sft)
        fit(model, bench.batches(bench.pairs), loss, cfg, label=cfg.optimizer)
        return model, after(bench, probe, model)

    def adamw(rate: str, steps: int) -> tuple[GPT, dict]:
        model, extra = matched(bench, probe, float(rate), steps, row["sgd.fork"])
        return model, extra | after(bench, probe, model)

    row = bench.arm("sft", {}, lambda: (lab.load(bench.sft), {}))
    for name, cfg in (("sgd", lab.profile.dpo), ("dpo_fast", RL_FIT)):
        row |= bench.arm(name, {"fit": cfg}, lambda c=cfg: plain(c))
    for rate, steps in ADAM.items():
        row |= bench.arm(f"adam_{rate}", {"rate": rate, "steps": steps, "target": row["sgd.fork"]},
                         lambda r=rate, n=steps: adamw(r, n))
    return row | bench.arm("rl_sgd", {"rm": RM_FIT, "rl": RL, "fit": slow},
                           lambda: against_reward_model(bench, slow)), bench.made


def _of(arms: Sequence[str], keys: Sequence[str], *only: tuple[str, ...]) -> tuple[tuple, ...]:
    unit = {"kl": "nats", "cpu_s": "CPU s", "steps": "steps", "fork": "log-odds"}
    return tuple((f"{arm}: {'kl_bound' if (arm, key) == ('best_of', 'kl') else key}", f"{arm}.{key}", None,
                  unit.get(key, "share"), *only) for arm in arms for key in keys)


ARMS = ("sft", *KIN, "sft_chosen", "rm_rl", "best_of")
KIN_DESIGN = Design(
    measure=kin, notebook="11", rows=("S1-20", "S1-22", "S3-6.35"), smallest=0.05, equivalence=True,
    claim="from the same pairs, a reward model with REINFORCE and a KL leash leaves as many invented claims as DPO "
          "(within 5 points)",
    falsifier="the shares of answers that say the label differ by more than 5 points", n_items=N_ITEMS,
    effects=(("says the label, reward model + REINFORCE - DPO", "rm_rl.said", "dpo.said", "share"),
             ("exact pass, reward model + REINFORCE - DPO", "rm_rl.exact", "dpo.exact", "share"),
             ("KL, reward model + REINFORCE - DPO", "rm_rl.kl", "dpo.kl", "nats"),
             ("CPU, reward model + REINFORCE - DPO", "rm_rl.cpu_s", "dpo.cpu_s", "CPU s"),
             *((f"says the label, {arm} - DPO", f"{arm}.said", "dpo.said", "share")
               for arm in ("ipo", "kto", "orpo", "sft_chosen", "best_of")),
             ("reward model: held-out pairs ranked right", "rm_rl.rm_accuracy", None, "share"),
             *_of(ARMS, ("said", "valid", "exact", "kl", "cpu_s")),
             *((f"{arm}: {side} sum log-probability, end - reference", f"{arm}.{side}_change", None, "nats")
               for arm in KIN for side in ("chosen", "rejected"))))

NOISE_DESIGN = Design(
    measure=noise, notebook="11", rows=("S1-22", "S0-29"), smallest=0.05, n_items=N_ITEMS,
    claim="with 40 % of the pairs turned round, robust DPO leaves fewer answers that say the label than DPO at the "
          "rate over 1 - 2e (5 points or more)",
    falsifier="it leaves as many (interval reaches 0), or under 5 points fewer",
    effects=(("says the label at 40 % noise, DPO at 5 times the rate - robust DPO", "scaled_40.said", "robust_40.said",
              "share"),
             ("says the label at 40 % noise, DPO - robust DPO", "dpo_40.said", "robust_40.said", "share"),
             ("says the label at 20 % noise, DPO at 1.7 times the rate - robust DPO", "scaled_20.said",
              "robust_20.said", "share"),
             ("says the label at 20 % noise, DPO - robust DPO", "dpo_20.said", "robust_20.said", "share"),
             ("says the label at 40 % noise, cDPO - DPO", "cdpo_40.said", "dpo_40.said", "share"),
             ("says the label, DPO at 20 % noise - clean", "dpo_20.said", "dpo.said", "share"),
             ("says the label, DPO at 40 % noise - clean", "dpo_40.said", "dpo.said", "share"),
             *((f"says the label at {n} % noise, {name} - where it should rest", f"{arm}_{n}.said", f"{arm}_{n}.rest",
                "share") for n in (20, 40) for arm, name in (("dpo", "DPO"), ("cdpo", "cDPO"))),
             *_of(("sft", "dpo", *(f"{arm}_{n}" for n in (20, 40) for arm in ("dpo", "scaled", "robust", "cdpo"))),
                  ("said", "valid", "exact", "kl"))))

ADAM_DESIGN = Design(
    measure=adam, notebook="11", rows=("S3-6.35", "S1-22"), smallest=0.02, n_items=N_ITEMS,
    claim="stopped where the claim is as unlikely as after SGD, AdamW at 1e-4 has broken more of the format",
    falsifier="valid JSON under AdamW at 1e-4 is within 2 points of SGD's or above it",
    effects=(*((f"{name}, SGD - AdamW {rate} at matched claim", f"sgd.{key}", f"adam_{rate}.{key}", "share",
                (f"adam_{rate}.reached",))
               for rate in reversed(ADAM) for name, key in (("valid JSON", "valid"), ("exact pass", "exact"))),
             ("exact pass, DPO - reward model + REINFORCE, both SGD", "sgd.exact", "rl_sgd.exact", "share"),
             ("says the label, reward model + REINFORCE - DPO, both SGD", "rl_sgd.said", "sgd.said", "share"),
             ("exact pass, DPO under SGD - DPO under the other road's AdamW", "sgd.exact", "dpo_fast.exact", "share"),
             *((f"AdamW {r}: reached SGD's claim", f"adam_{r}.reached", None, "share of seeds") for r in ADAM),
             *((f"AdamW {r}: the least certain later token fell most", f"adam_{r}.weakest_fell_most", None,
                "share of seeds") for r in ADAM),
             *_of(("sft", "sgd", "rl_sgd", "dpo_fast"), ("said", "claim", "valid", "exact", "kl")),
             *_of(("sgd", "dpo_fast"), ("fork", "moved")),
             *(e for r in ADAM for e in _of([f"adam_{r}"], ("said", "claim", "valid", "exact", "kl", "steps", "fork",
                                                            "moved"), (f"adam_{r}.reached",)))))
