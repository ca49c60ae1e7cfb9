"""Pretraining speed: our GPT and loss beside transformers' LlamaForCausalLM, same weights, batches and AdamW.

Prints one JSON line: tokens per CPU second of both, their ratio (above 1: ours is faster), and every pair. The two
sides take turns, block by block, on one thread; the ratio is the median over pairs.
"""

import argparse
import json
import statistics
import time

import torch

from lifecycle_lib.core.seeds import one_thread, seed_everything
from lifecycle_lib.model.bridge import to_llama
from lifecycle_lib.model.gpt import GPT, GPTConfig
from lifecycle_lib.train.logprobs import Rows, answer_loss

BATCH, BLOCK, VOCAB = 48, 96, 640


def block_s(step, model, batches) -> float:
    """CPU seconds for one block of optimiser steps."""
    start = time.process_time()
    for ids in batches:
        step(model, ids)
    return time.process_time() - start


def make_step(model, loss_fn):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)

    def step(model, ids) -> float:
        loss = loss_fn(model, ids)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two short pairs: shows that it runs, not the speed")
    quick = parser.parse_args().quick
    n_pairs, n_steps = (2, 1) if quick else (7, 5)
    one_thread()
    seed_everything(0)
    ours = GPT(GPTConfig(vocab_size=VOCAB, block_size=128, n_layer=3, n_head=4, n_embd=128, token_shift=False)).train()
    peer = to_llama(ours).train()
    peer.config.use_cache = False
    batches = [torch.randint(VOCAB, (BATCH, BLOCK)) for _ in range(n_steps)]
    our_step = make_step(ours, lambda m, ids: answer_loss(m, Rows(ids, torch.ones_like(ids, dtype=torch.bool)))[0])
    peer_step = make_step(peer, lambda m, ids: m(input_ids=ids, labels=ids).loss)
    first = our_step(ours, batches[0]), peer_step(peer, batches[0])  # warm-up, and the same loss on both sides
    assert abs(first[0] - first[1]) < 1e-4, first
    tokens = BATCH * BLOCK * n_steps
    runs = []
    for pair in range(n_pairs):
        sides = {"ours": (our_step, ours), "peer": (peer_step, peer)}
        order = sorted(sides, reverse=pair % 2 == 1)
        runs.append({name: round(tokens / block_s(*sides[name], batches)) for name in order})
    print(json.dumps({"name": "pretrain_tokens_per_cpu_s", "ours": statistics.median(r["ours"] for r in runs),
                      "peer": statistics.median(r["peer"] for r in runs),
                      "ratio": round(statistics.median(r["ours"] / r["peer"] for r in runs), 3), "runs": runs}))


if __name__ == "__main__":
    main()
