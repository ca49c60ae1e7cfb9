"""Rollout speed: model/sampling beside transformers' `generate`, on the same weights and prompts.

128 rows (16 prompts of about 35 tokens, groups of 8), 22 new tokens at temperature 1. The end token is out of reach on
both sides, so each decodes exactly the same number of tokens. Prints one JSON line: tokens per second of both, their
ratio (above 1: ours is faster), and every pair. The sides take turns on one thread; the ratio is the median.
"""

import argparse
import json
import statistics
import time

import torch

from lifecycle_lib.core.seeds import make_generator, one_thread, rng, seed_everything
from lifecycle_lib.model.bridge import to_llama
from lifecycle_lib.model.gpt import GPT, GPTConfig
from lifecycle_lib.model.sampling import generate, left_pad

VOCAB, GROUPS, GROUP_SIZE, NEW, PAD = 640, 16, 8, 22, 0


def seconds(run) -> float:
    start = time.process_time()
    n_tokens = run()
    assert n_tokens == GROUPS * GROUP_SIZE * NEW, n_tokens
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two pairs: shows that it runs, not the speed")
    n_pairs = 2 if parser.parse_args().quick else 15
    one_thread()
    seed_everything(0)
    model = GPT(GPTConfig(vocab_size=VOCAB, block_size=128, n_layer=3, n_head=4, n_embd=128, token_shift=False)).eval()
    peer = to_llama(model)
    draw = rng(0, "prompts")
    prompts = [[draw.randrange(1, VOCAB) for _ in range(draw.randint(31, 39))] for _ in range(GROUPS)]
    ids, mask = left_pad([p for p in prompts for _ in range(GROUP_SIZE)], PAD)

    def ours() -> int:
        return generate(model, prompts, eos_id=-1, pad_id=PAD, max_new_tokens=NEW, temperature=1.0,
                        n_samples=GROUP_SIZE, generator=make_generator(0, "rollouts")).tokens

    @torch.inference_mode()
    def theirs() -> int:
        out = peer.generate(input_ids=ids, attention_mask=mask.long(), do_sample=True, temperature=1.0, top_k=0,
                            top_p=1.0, max_new_tokens=NEW, pad_token_id=PAD, use_cache=True)
        return (out.shape[1] - ids.shape[1]) * len(out)

    ours(), theirs()  # warm-up
    tokens = GROUPS * GROUP_SIZE * NEW
    runs = []
    for pair in range(n_pairs):
        sides = {"ours": ours, "peer": theirs}
        order = sorted(sides, reverse=pair % 2 == 1)
        runs.append({name: round(tokens / seconds(sides[name])) for name in order})
    print(json.dumps({"name": "rollout_tokens_per_cpu_s", "ours": statistics.median(r["ours"] for r in runs),
                      "peer": statistics.median(r["peer"] for r in runs),
                      "ratio": round(statistics.median(r["ours"] / r["peer"] for r in runs), 3), "runs": runs}))


if __name__ == "__main__":
    main()
