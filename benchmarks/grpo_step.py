"""Seconds a GRPO update: ours against TRL's GRPOTrainer, one thread each, on the same weights and rollouts.

16 prompts of about 35 tokens, 8 answers each of at most 24 tokens, loss type dapo. Sampling is left out of both: the
rollouts are fixed, so that every loss must agree. Both run three AdamW steps from the same start, in turn; from the
second step on the ratio is not 1. TRL is timed between its own step callbacks, with gradient checkpointing off.
"""

import argparse
import json
import os
import statistics
import tempfile

from dpo_step import check_equal, run_ours, run_trl, setting, trl_args  # first: it sets the environment

# isort: split
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from lifecycle_lib.core.seeds import make_generator
from lifecycle_lib.desk.cases import draw_cases
from lifecycle_lib.model.bridge import to_llama
from lifecycle_lib.model.gpt import GPT
from lifecycle_lib.model.tokenizer import Tokenizer
from lifecycle_lib.train import grpo
from lifecycle_lib.train.logprobs import shared_rows, token_logps

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
    return grpo.Rollouts(rows, old, grpo.group_advantages(rewards, group), {}, []), answers


def trl_grpo(model: GPT, tok: Tokenizer, prompts: list[list[int]], batch: grpo.Rollouts, answers: list[list[int]],
             folder: str, group: int = GROUP, max_new: int = MAX_NEW, **more: object) -> GRPOTrainer:
    """TRL's trainer, its sampling replaced by the fixed rollouts; the batch is in `trainer.fixed`."""
    n = len(answers)
    args = GRPOConfig(**trl_args(folder, **{
        "per_device_train_batch_size": n, "num_generations": group, "max_completion_length": max_new, "beta": 0.0,
        "loss_type": "dapo", **more}))
    rows = Dataset.from_list([{"prompt": tok.decode(p)} for p in prompts])
    trainer = GRPOTrainer(to_llama(model), reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
                          args=args, train_dataset=rows, processing_class=tok.to_transformers())
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smaller network, one run")
    quick = parser.parse_args().quick
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model, tok = setting(*(1, 32) if quick else ())
    prompts = [tok.encode(c.prompt) for c in draw_cases(16, 0, "rlvr")]
    rewards = torch.rand(16 * GROUP, generator=make_generator(0, "rewards")).round()
    batch, answers = make_rollouts(model, tok, prompts, GROUP, MAX_NEW, rewards)
    cfg = grpo.GRPOConfig(n_prompts=16, group_size=GROUP, max_new_tokens=MAX_NEW)
    times: dict[str, list[float]] = {"ours": [], "peer": []}
    runs = 1 if quick else 5
    for _ in range(runs):
        losses, seconds = run_ours(model, batch, lambda m, b: grpo.rollout_loss(m, b, cfg))
        times["ours"].append(statistics.median(seconds))
        with tempfile.TemporaryDirectory() as folder:
            peer_losses, seconds = run_trl(trl_grpo(model, tok, prompts, batch, answers, folder))
        check_equal(losses, peer_losses)
        times["peer"].append(statistics.median(seconds))
    ours, peer = (statistics.median(t) for t in times.values())
    print(json.dumps({"name": "grpo_step_s_vs_trl", "ours": round(ours, 5), "peer": round(peer, 5),
                      "ratio": round(peer / ours, 3), "runs": runs}))


if __name__ == "__main__":
    main()
