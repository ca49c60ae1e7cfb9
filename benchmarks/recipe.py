"""How much CPU time the recipe saves: seconds to the validation loss that a plain recipe ends with.

Peer: nanoGPT's published CPU recipe for character-level tinyshakespeare (4 layers, 4 heads, 128 wide, block 64,
batch 12, 2,000 steps of AdamW at 1e-3 with beta2 .99, published validation loss 1.88) on the network it was published
for, GPT-2, from transformers. Ours: a GPT of the same shape with token shift, Muon 0.02 and AdamW 0.003, batch 32,
160 steps. Both through train.loop.fit, one thread, validation on the last tenth of the text. The ratio counts only if
our validation loss is at most the peer's, and the peer's at most 1.90; otherwise the exit status is 1. nanoGPT's
weight decay is left out: it spares norms and positions, the loop here would not, and the peer ends 0.01 lower so.

The saving is network and optimiser together. `--same-shape` puts the plain recipe on our own GPT without token shift
instead: it ends far lower (1.68), so most of the distance to GPT-2 is the network, and ours then trains 450 steps.

    python benchmarks/recipe.py [--quick] [--same-shape]     4 minutes of one core; --quick: seconds, proves nothing

Prints one JSON line: CPU seconds of training, ratio = ours / peer (smaller is better), medians over `runs`.
"""

# ruff: noqa: E402  (the environment is set before torch is imported)

import argparse
import json
import os
import statistics
import sys
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from lifecycle_lib.core.seeds import one_thread, seed_everything
from lifecycle_lib.model.bridge import PublicModel
from lifecycle_lib.model.gpt import GPT, GPTConfig
from lifecycle_lib.train.logprobs import answer_loss
from lifecycle_lib.train.loop import FitConfig, fit
from lifecycle_lib.train.pretrain import lm_batches, lm_loss

BLOCK = 64  # characters a row predicts; a row holds one more, its first is context only
PEER_LOSS = 1.90
PLAIN = FitConfig(steps=2000, optimizer="adamw", lr=1e-3, beta2=0.99, warmup_steps=100)
OURS = FitConfig(steps=160, lr=3e-3, lr_matrix=0.02, warmup_steps=10)
SAME_SHAPE_STEPS = 450
SHAPE = {"n_layer": 4, "n_head": 4, "n_embd": 128}


def read_text() -> str:
    """tinyshakespeare, or an exit that says where it was looked for."""
    folder = Path(os.environ.get("LIFECYCLE_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    for path in (folder / "corpora" / "tinyshakespeare.txt", folder / "tinyshakespeare.txt"):
        if path.is_file():
            return path.read_text(encoding="utf-8")
    sys.exit(f"recipe: no corpora/tinyshakespeare.txt in {folder}; put the public text there, or point LIFECYCLE_DATA "
             "at the folder that has it")


def network(kind: str, vocab_size: int) -> nn.Module:
    """Random weights, about 0.8M: "gpt2", "plain" (our GPT without token shift) or "ours"."""
    if kind == "gpt2":
        no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        return PublicModel(GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, n_positions=BLOCK + 1, bos_token_id=0,
                                                      eos_token_id=0, **SHAPE, **no_dropout)))
    return GPT(GPTConfig(vocab_size=vocab_size, block_size=BLOCK + 1, token_shift=kind == "ours", **SHAPE))


def train(name: str, ids: torch.Tensor, vocab_size: int, kind: str, batch: int, cfg: FitConfig, seed: int,
          max_rows: int) -> tuple[float, float]:
    """(CPU seconds of training, validation loss in nats a character)."""
    cut = int(0.9 * len(ids))
    seed_everything(seed)
    model = network(kind, vocab_size)
    result = fit(model, lm_batches(ids[:cut], batch, BLOCK + 1, seed), answer_loss, cfg, label=name)
    return result.cpu_s, lm_loss(model, ids[cut:], BLOCK + 1, max_rows=max_rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="1/40 of the steps; checks the script, not the claim")
    parser.add_argument("--same-shape", action="store_true", help="the plain recipe on our own network")
    parser.add_argument("--runs", type=int, default=1, help="seeds (default 1)")
    args = parser.parse_args()
    one_thread()
    text = read_text()
    letters = {c: i for i, c in enumerate(sorted(set(text)))}
    ids = torch.tensor([letters[c] for c in text])
    plain, ours = PLAIN, replace(OURS, steps=SAME_SHAPE_STEPS) if args.same_shape else OURS
    if args.quick:
        plain, ours = (replace(c, steps=max(2, c.steps // 40), warmup_steps=1) for c in (plain, ours))
    peer = "plain" if args.same_shape else "gpt2"
    max_rows = 64 if args.quick else 2000  # 2,000 rows of 64 characters: all of the last tenth but the end
    a, b = [], []
    for seed in range(args.runs):
        a.append(train("plain recipe", ids, len(letters), peer, 12, plain, seed, max_rows))
        b.append(train("our recipe", ids, len(letters), "ours", 32, ours, seed, max_rows))
    peer_s, peer_loss, ours_s, ours_loss = (statistics.median(x) for x in (*zip(*a), *zip(*b)))
    name = "recipe-same-shape" if args.same_shape else "recipe"
    print(json.dumps({"name": name, "ours": round(ours_s, 2), "peer": round(peer_s, 2),
                      "ratio": round(ours_s / peer_s, 3), "runs": args.runs, "peer_loss": round(peer_loss, 4),
                      "ours_loss": round(ours_loss, 4)}))
    if not args.quick and not (peer_loss <= PEER_LOSS and ours_loss <= peer_loss):
        sys.exit(f"recipe: the ratio does not count: peer {peer_loss:.4f} has to be at most {PEER_LOSS}, and ours "
                 f"{ours_loss:.4f} at most the peer's")


if __name__ == "__main__":
    main()
