"""A reward model: Bradley and Terry's strengths with a network in place of the table (Ouyang et al. 2022, eq. 1).

loss = -log sigmoid(r(x, yw) - r(x, yl) - margin): the chance that the chosen answer wins a vote is the sigmoid of the
difference of two scores, so a score means nothing alone and a constant may be added to all of them. The body is the
GPT, the score one number read off the features of the answer's last token (its <eos>); on a Llama body this is
transformers' LlamaForSequenceClassification. The optional margin (a score gap that the voters stated) is Llama 2's.

Differs from TRL's RewardTrainer in cost alone: the two answers of a pair share one reading of their prompt.
Left out: centring rewards, ensembles, process rewards.

Shapes: B answers, C features.
"""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lifecycle_lib.core.seeds import make_generator
from lifecycle_lib.core.tensors import load_tensors, save_tensors
from lifecycle_lib.model.checkpoint import load_checkpoint, save_checkpoint
from lifecycle_lib.model.gpt import GPT
from lifecycle_lib.model.tokenizer import Tokenizer
from lifecycle_lib.train.dpo import PairBatch, dpo_batches, encode_pairs, one_each
from lifecycle_lib.train.logprobs import Rows, pad_rows
from lifecycle_lib.train.loop import FitConfig, FitResult, fit


def bt_loss(chosen_scores: Tensor, rejected_scores: Tensor,
            margin: Tensor | float | None = None) -> tuple[Tensor, dict[str, float]]:
    """Mean -log sigmoid(chosen - rejected - margin) over pairs, (B,) each; ln 2 when all scores are equal.

    `margin` is (B,) or one number. Raises ValueError for other shapes."""
    one_each(chosen_scores=chosen_scores, rejected_scores=rejected_scores,
             **({"margin": margin} if isinstance(margin, Tensor) and margin.dim() else {}))
    gap = chosen_scores - rejected_scores
    loss = -F.logsigmoid(gap if margin is None else gap - margin).mean()
    return loss, {"accuracy": float((gap > 0).float().mean()), "margin": float(gap.detach().mean()),
                  "mean_reward": float(torch.cat((chosen_scores, rejected_scores)).detach().mean())}


class RewardModel(nn.Module):
    """A GPT body and one linear score of the last answer token's features."""

    def __init__(self, body: GPT, head: Tensor) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Parameter(head)  # (C,)

    @classmethod
    def from_gpt(cls, model: GPT, seed: int = 0) -> "RewardModel":
        """A copy of the policy's body under a small random head."""
        head = 0.02 * torch.randn(model.cfg.n_embd, generator=make_generator(seed, "reward head"))
        return cls(copy.deepcopy(model).requires_grad_(True), head.to(model.device))

    @property
    def device(self) -> torch.device:
        return self.body.device

    def forward(self, rows: Rows) -> Tensor:
        """Scores (B,) of the answers in `rows`, which may share their prompts. Raises ValueError for a row with no
        answer token."""
        if not bool(rows.mask.any(1).all()):
            raise ValueError(f"row {int((~rows.mask.any(1)).nonzero()[0])} has no answer token to score")
        cache = None
        if rows.prefix is not None:
            cache = self.body.new_cache(len(rows.prefix.ids), rows.prefix.ids.shape[1] + rows.ids.shape[1])
            self.body.hidden(rows.prefix.ids, rows.prefix.mask, cache)
            cache.select(rows.prefix.owner)
        h = self.body.hidden(rows.ids, cache=cache)  # (B, T, C)
        last = (rows.mask * torch.arange(rows.mask.shape[1], device=h.device)).argmax(1)
        return h[torch.arange(len(h), device=h.device), last] @ self.head

    @torch.no_grad()
    def score(self, tok: Tokenizer, prompts: Sequence[str], answers: Sequence[str], part: int = 256) -> Tensor:
        """Scores (B,) of answer texts, <eos> added to each, on the CPU."""
        eos, out = tok.special["<eos>"], []
        for i in range(0, len(prompts), part):
            rows = pad_rows([tok.encode(p) for p in prompts[i:i + part]],
                            [tok.encode(a, allow_special=False) + [eos] for a in answers[i:i + part]],
                            tok.special["<pad>"], self.body.cfg.block_size)
            out.append(self(rows.to(self.device)).cpu())
        return torch.cat(out)

    def save(self, folder: Path) -> None:
        """The body as a checkpoint, the head beside it."""
        save_checkpoint(folder, self.body)
        save_tensors(Path(folder) / "head.safetensors", {"head": self.head})

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu") -> "RewardModel":
        """What `save` wrote, in eval mode. Raises ValueError for a missing or damaged file, or a head of another
        width than the body."""
        body, state = load_checkpoint(folder, device), load_tensors(Path(folder) / "head.safetensors")
        if set(state) != {"head"} or state["head"].shape != (body.cfg.n_embd,):
            found = {k: tuple(v.shape) for k, v in state.items()}
            raise ValueError(f"{Path(folder) / 'head.safetensors'}: holds {found}, "
                             f"expected one head of ({body.cfg.n_embd},); it belongs to another body")
        return cls(body, state["head"].to(device)).eval()


def reward_loss(model: RewardModel, batch: PairBatch) -> tuple[Tensor, dict[str, float]]:
    """`bt_loss` of a batch of pairs: one forward pass for chosen and rejected together."""
    chosen, rejected = model(batch.rows).chunk(2)
    return bt_loss(chosen, rejected)


def train_reward_model(policy: GPT, tok: Tokenizer, pairs: Sequence[dict], cfg: FitConfig, *, batch_size: int = 32,
                       seed: int = 0, label: str = "reward model") -> tuple[RewardModel, FitResult]:
    """A reward model on the body of `policy`, fitted to the votes in `pairs`."""
    model = RewardModel.from_gpt(policy, seed)
    no_reference = torch.zeros(len(pairs), 2)
    batches = dpo_batches(encode_pairs(tok, pairs), no_reference, batch_size, seed, tok.special["<pad>"], model.device)
    return model, fit(model, batches, reward_loss, cfg, label=label)
