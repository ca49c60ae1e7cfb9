"""Seconds a GRPO update: ours against TRL's GRPOTrainer, one thread each, on the same weights and rollouts.

16 prompts of about 35 tokens, 8 answers each of at most 24 tokens, loss type dapo. Two clocks:

- update: sampling is left out of both, the rollouts are fixed, so that every loss must agree (from the second step on
  the ratio is not 1);
- step: sampling, decoding, scoring and update, each library with its own generation, the same verifier, the same
  prompts. Most answers end early, at uneven lengths, as answers do. Samples differ, so losses are compared by the
  first clock alone.

Both run three AdamW steps from the same start, in turn. TRL is timed between its own step callbacks (which enclose its
generation), with gradient checkpointing off.
"""

import argparse
import copy
import json
import os
import statistics
import tempfile
import time

from dpo_step import LR, STEPS, check_equal, run_ours, run_trl, setting, trl_args  # first: it sets the environment

# isort: split
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from lifecycle_lib.core.seeds import make_generator
from lifecycle_lib.desk.cases import Case, draw_cases
from lifecycle_lib.judge.verifiers import full_verifier
from lifecycle_lib.model.bridge import to_llama
from lifecycle_lib.model.gpt import GPT
from lifecycle_lib.model.tokenizer import Tokenizer
from lifecycle_lib.train import grpo
from lifecycle_lib.train.logprobs import shared_rows, token_logps
from lifecycle_lib.train.loop import FitConfig, fit

GROUP, MAX_NEW = 8, 24


def make_rollouts(model: GPT, tok: Tokenizer, prompts: list[list[int]], group: int, max_new: int,
                  rewards: torch.Tensor) -> tuple[grpo.Rollouts, list[list[int]]]:
    """Random answers of uneven lengths under `model`, with their advantages; and the answers' ids."""
    gen = make_generator(0, "rollouts")
    n = len(prompts) * group
    lengths = torch.randint(max_new // 2, max_new + 1, (n,), generator=gen).tolist()
    answers = [torch.randint(8, tok.vocab_size, (k,), generator=gen).tolist() for k in lengths]
    rows = shared_rows(prompts, answers, [i for i in range(len(prompts)) for _ in range(group)], tok.special["<pad>"])
    with torch.no_grad():
        old = token_logps(model, rows)
    return grpo.Rollouts(rows, old, rewards, grpo.group_advantages(rewards, group), {}, []), answers


def trl_grpo(model: GPT, tok: Tokenizer, prompts: list[list[int]], batch: grpo.Rollouts, answers: list[list[int]],
             folder: str, group: int = GROUP, max_new: int = MAX_NEW, reward: object = None,
             **more: object) -> GRPOTrainer:
    """TRL's trainer, its sampling replaced by the fixed rollouts; the batch is in `trainer.fixed`. With a `reward` its
    sampling stays."""
    n = len(answers)
    args = GRPOConfig(**trl_args(folder, **{
        "per_device_train_batch_size": n, "num_generations": group, "max_completion_length": max_new, "beta": 0.0,
        "loss_type": "dapo", **more}))
    rows = Dataset.from_list([{"prompt": tok.decode(p)} for p in prompts])
    trainer = GRPOTrainer(to_llama(model), reward_funcs=reward or (lambda completions, **_: [0.0] * len(completions)),
                          args=args, train_dataset=rows, processing_class=tok.to_transformers())
    if reward is not None:
        return trainer
    left, right, pad = max(map(len, prompts)), max(map(len, answers)), tok.special["<pad>"]
    repeated = [p for p in prompts for _ in range(group)]
    mask = torch.tensor([[1] * len(a) + [0] * (right - len(a)) for a in answers])
    old = torch.zeros(n, right)
    old[mask.bool()] = batch.old_logps[batch.rows.mask[:, 1:]]
    trainer.fixed = {
        "prompt_ids": torch.tensor([[pad] * (left - len(p)) + p for p in repeated]),
        "prompt_mask": torch.tensor([[0] * (left - len(p)) + [1] * len(p) for p in repeated]),
        "completion_ids": torch.tensor([a + [pad] * (right - len(a)) for a in answers]), "completion_mask": mask,
        "advantages": batch.advantages, "old_per_token_logps": old, "num_items_in_batch": mask.sum()}
    trainer._prepare_inputs = lambda _: trainer.fixed
    return trainer


def endings(model: GPT, tok: Tokenizer) -> GPT:
    """A copy with a long random row for the end token: its logit varies by some 4 from place to place, so that answers
    end early, at uneven lengths."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        row = model.wte.weight[tok.special["<eos>"]]
        row.copy_(4 * torch.randn(len(row), generator=make_generator(0, "endings")) / len(row) ** 0.5)
    return model


def whole_step(model: GPT, tok: Tokenizer, cases: list[Case], batch: grpo.Rollouts, answers: list[list[int]],
               ) -> tuple[list[float], list[float], dict[str, float]]:
    """(our seconds, TRL's seconds, mean answer tokens of both) of STEPS whole steps each."""
    cfg = grpo.GRPOConfig(n_prompts=len(cases), group_size=GROUP, max_new_tokens=MAX_NEW)
    policy, lengths, pace = copy.deepcopy(model), {"ours": [], "peer": []}, []
    draw = grpo.grpo_batches(policy, tok, cases, lambda texts, where: list(map(full_verifier, texts, where)), cfg, 0)

    def batches(step: int) -> grpo.Rollouts:
        pace.append(time.perf_counter())
        rolled = draw(step)
        lengths["ours"].append(rolled.metrics["answer_tokens"])
        return rolled

    fit(policy, batches, lambda m, b: grpo.rollout_loss(m, b, cfg),
        FitConfig(steps=STEPS, optimizer="adamw", lr=LR, beta2=0.999, warmup_steps=0, min_lr_share=1.0))
    pace.append(time.perf_counter())
    by_prompt = {tok.decode(tok.encode(c.prompt)): c for c in cases}

    def reward(prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: object) -> list[float]:
        lengths["peer"].append(statistics.mean(map(len, completion_ids)))
        return [full_verifier(t, by_prompt[p]) for t, p in zip(completions, prompts)]

    with tempfile.TemporaryDirectory() as folder:
        prompts = [tok.encode(c.prompt) for c in cases]
        _, peer = run_trl(trl_grpo(model, tok, prompts, batch, answers, folder, reward=reward))
    return [b - a for a, b in zip(pace, pace[1:])], peer, {k: statistics.mean(v) for k, v in lengths.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smaller network, one run")
    quick = parser.parse_args().quick
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model, tok = setting(*(1, 32) if quick else ())
    cases = draw_cases(16, 0, "rlvr")
    prompts = [tok.encode(c.prompt) for c in cases]
    rewards = torch.rand(16 * GROUP, generator=make_generator(0, "rewards")).round()
    batch, answers = make_rollouts(model, tok, prompts, GROUP, MAX_NEW, rewards)
    cfg = grpo.GRPOConfig(n_prompts=16, group_size=GROUP, max_new_tokens=MAX_NEW)
    times: dict[str, list[float]] = {"ours": [], "peer": [], "step": [], "peer_step": []}
    ending = endings(model, tok)
    runs = 1 if quick else 5
    for _ in range(runs):
        losses, seconds = run_ours(model, batch, lambda m, b: grpo.rollout_loss(m, b, cfg))
        times["ours"].append(statistics.median(seconds))
        with tempfile.TemporaryDirectory() as folder:
            peer_losses, seconds = run_trl(trl_grpo(model, tok, prompts, batch, answers, folder))
        check_equal(losses, peer_losses)
        times["peer"].append(statistics.median(seconds))
        whole, peer_whole, lengths = whole_step(ending, tok, cases, batch, answers)
        times["step"].append(statistics.median(whole))
        times["peer_step"].append(statistics.median(peer_whole))
    for name, ours, peer, more in (("grpo_update_s_vs_trl", "ours", "peer", {}),
                                   ("grpo_step_s_vs_trl", "step", "peer_step", {"answer_tokens": lengths})):
        mine, theirs = (statistics.median(times[k]) for k in (ours, peer))
        print(json.dumps({"name": name, "ours": round(mine, 5), "peer": round(theirs, 5),
                          "ratio": round(theirs / mine, 3), "runs": runs, **more}))


if __name__ == "__main__":
    main()
