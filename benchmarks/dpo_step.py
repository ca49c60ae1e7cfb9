"""Seconds a DPO step: ours against TRL's DPOTrainer, one thread each, on the same weights and the same 32 pairs.

Both run three optimiser steps from the same start with AdamW at a constant rate, in turn; every loss must agree.
TRL is timed between its own step callbacks (no data loading), with gradient checkpointing off. Its default computes
the frozen reference in every step; `peer_precomputed` is TRL with the reference computed beforehand, as ours is.
"""

# ruff: noqa: E402  (the environment is set before torch is imported)
import argparse
import copy
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = os.environ["LIFECYCLE_QUIET"] = "1"
warnings.simplefilter("ignore")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from datasets import Dataset, disable_progress_bars
from transformers import TrainerCallback
from transformers.utils import logging
from trl import DPOConfig, DPOTrainer

from lifecycle_lib.core.seeds import seed_everything
from lifecycle_lib.desk.cases import draw_cases
from lifecycle_lib.desk.documents import tokenizer_corpus
from lifecycle_lib.desk.world import SPECIAL_TOKENS
from lifecycle_lib.model.bridge import to_llama
from lifecycle_lib.model.gpt import GPT, GPTConfig
from lifecycle_lib.model.tokenizer import Tokenizer
from lifecycle_lib.train import dpo
from lifecycle_lib.train.loop import FitConfig, fit

STEPS, LR, BETA = 3, 1e-4, 0.1


class StepClock(TrainerCallback):
    """Seconds of every optimiser step of a trainer."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: object, **kwargs: object) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        self.seconds.append(time.perf_counter() - self.began)


def setting(n_layer: int = 3, n_embd: int = 128) -> tuple[GPT, Tokenizer]:
    """The laptop profile's network (without token shift, so that it is a Llama) and its tokenizer."""
    seed_everything(0)
    tok = Tokenizer.train(tokenizer_corpus(0), 640, SPECIAL_TOKENS)
    return GPT(GPTConfig(vocab_size=tok.vocab_size, n_layer=n_layer, n_embd=n_embd, token_shift=False)), tok


def trl_args(folder: str, **more: object) -> dict:
    """What every TRL trainer here is given: this CPU, float32, no files, a constant learning rate."""
    disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    return {"output_dir": folder, "use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no",
            "disable_tqdm": True, "logging_steps": 1, "max_steps": STEPS, "learning_rate": LR,
            "lr_scheduler_type": "constant", "gradient_checkpointing": False, "beta": BETA, **more}


def trl_dpo(model: GPT, tok: Tokenizer, pairs: list[dict], folder: str, precompute: bool = False) -> DPOTrainer:
    """TRL's trainer with `model` as policy and as reference, all pairs in one batch."""
    rows = Dataset.from_list([{k: p[k] for k in ("prompt", "chosen", "rejected")} for p in pairs])
    args = DPOConfig(**trl_args(folder, per_device_train_batch_size=len(pairs), max_length=None,
                                precompute_ref_log_probs=precompute))
    return DPOTrainer(to_llama(model), ref_model=to_llama(model), args=args, train_dataset=rows,
                      processing_class=tok.to_transformers())


def run_trl(trainer: DPOTrainer) -> tuple[list[float], list[float]]:
    """(losses, seconds) of STEPS steps."""
    clock = StepClock()
    trainer.add_callback(clock)
    trainer.log = lambda logs, *args, **kwargs: trainer.state.log_history.append(dict(logs))  # print nothing
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row], clock.seconds


def run_ours(model: GPT, batch: object, loss_fn: object) -> tuple[list[float], list[float]]:
    """(losses, seconds) of STEPS steps of `fit`, with TRL's optimiser settings."""
    clock: list[float] = []

    def batches(step: int) -> object:
        clock.append(time.perf_counter())
        return batch

    cfg = FitConfig(steps=STEPS, optimizer="adamw", lr=LR, beta2=0.999, warmup_steps=0, min_lr_share=1.0)
    result = fit(copy.deepcopy(model), batches, loss_fn, cfg)
    clock.append(time.perf_counter())
    return result.losses, [b - a for a, b in zip(clock, clock[1:])]


def check_equal(ours: list[float], peer: list[float]) -> None:
    worst = max(abs(a - b) for a, b in zip(ours, peer, strict=True))
    if not worst < 1e-5:
        raise SystemExit(f"the losses differ by {worst}: ours {ours}, TRL {peer}; the times compare nothing")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smaller network, one run")
    quick = parser.parse_args().quick
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model, tok = setting(*(1, 32) if quick else ())
    pairs = dpo.make_pairs(draw_cases(32, 0, "dpo"))
    encoded = dpo.encode_pairs(tok, pairs)
    pad = tok.special["<pad>"]
    batch = dpo.PairBatch(dpo.pair_rows(encoded, pad), dpo.reference_logps(model, encoded, pad).T.reshape(-1))
    times: dict[str, list[float]] = {"ours": [], "peer": [], "precomputed": []}
    runs = 1 if quick else 5
    for _ in range(runs):
        losses, seconds = run_ours(model, batch, lambda m, b: dpo.pair_loss(m, b, BETA))
        times["ours"].append(statistics.median(seconds))
        for name in ("peer", "precomputed"):
            with tempfile.TemporaryDirectory() as folder:
                peer_losses, seconds = run_trl(trl_dpo(model, tok, pairs, folder, name == "precomputed"))
            check_equal(losses, peer_losses)
            times[name].append(statistics.median(seconds))
    ours, peer, precomputed = (statistics.median(t) for t in times.values())
    print(json.dumps({"name": "dpo_step_s_vs_trl", "ours": round(ours, 5), "peer": round(peer, 5),
                      "ratio": round(peer / ours, 3), "runs": runs, "peer_precomputed": round(precomputed, 5),
                      "ratio_precomputed": round(precomputed / ours, 3)}))


if __name__ == "__main__":
    main()
