"""Direct preference optimisation (Rafailov et al. 2023, eq. 7).

loss = -log sigmoid(beta * [(log pi(yw) - log ref(yw)) - (log pi(yl) - log ref(yl))]),  with sum log-probabilities
of the chosen answer yw and the rejected answer yl. The reference is the policy before the first step, and its
log-probabilities are computed once. The implicit reward of an answer is beta * (log pi - log ref).

Here DPO trains with SGD and momentum. Nothing bounds how unlikely the rejected answer may become, and not only at the
token where the two answers part. SGD at 1e-3 moved the token at the fork and little else, in five seeds of five; AdamW
at 3e-5 and 1e-4 took less off the fork and in one seed broke the format (claims without their closing brace, which no
parser counts); AdamW at 3e-4 broke it in all, SGD at 3e-2 in the one tried. Leaving the common tail out of the rejected
answer did not mend AdamW. Notebook 11 shows where the probability goes.

Label smoothing, IPO, KTO and the rest of the family: train/preferences.py. Left out: ranked lists, images, tools.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lifecycle_lib.core.records import check_fields, read_jsonl
from lifecycle_lib.core.seeds import rng as make_rng
from lifecycle_lib.desk.cases import Case, with_label_claim
from lifecycle_lib.desk.world import PROVENANCE, SPECIAL_TOKENS
from lifecycle_lib.model.tokenizer import Tokenizer
from lifecycle_lib.train.chat import check_messages, render
from lifecycle_lib.train.logprobs import Rows, shared_rows, sum_logps


def dpo_loss(chosen_logp: Tensor, rejected_logp: Tensor, ref_chosen_logp: Tensor, ref_rejected_logp: Tensor,
             beta: float) -> tuple[Tensor, dict[str, float]]:
    """Mean DPO loss over pairs; all inputs are sum log-probabilities, (B,).

    At the first step the policy is the reference, so the loss is ln 2 = 0.693 whatever the data.
    Raises ValueError for a beta that is not positive, or inputs that are not all (B,)."""
    if not 0 < beta < math.inf:
        raise ValueError(f"beta={beta} must be positive and finite; 0.1 is a common start")
    one_each(chosen_logp=chosen_logp, rejected_logp=rejected_logp, ref_chosen_logp=ref_chosen_logp,
             ref_rejected_logp=ref_rejected_logp)
    chosen_reward = beta * (chosen_logp - ref_chosen_logp)  # (B,)
    rejected_reward = beta * (rejected_logp - ref_rejected_logp)
    margin = chosen_reward - rejected_reward
    loss = -F.logsigmoid(margin).mean()
    metrics = {"margin": margin.mean(), "accuracy": (margin > 0).float().mean(), "chosen_sum_logp": chosen_logp.mean(),
               "rejected_sum_logp": rejected_logp.mean(), "chosen_reward": chosen_reward.mean(),
               "rejected_reward": rejected_reward.mean()}
    return loss, {k: float(v.detach()) for k, v in metrics.items()}


def one_each(**values: Tensor) -> None:
    """Refuses values that are not one number a pair: (B, 1) beside (B,) would broadcast to B x B pairs that nobody
    voted on. Raises ValueError with every name and shape."""
    shapes = {name: tuple(value.shape) for name, value in values.items()}
    if len(set(shapes.values())) > 1 or any(len(s) != 1 or s[0] == 0 for s in shapes.values()):
        raise ValueError(f"{', '.join(f'{name} has shape {s}' for name, s in shapes.items())}; all must be (B,), one "
                         "number a pair and at least one pair: squeeze the extra axis, or mend the batch")


def make_pair(prompt: str, chosen: str, rejected: str, reason: str) -> dict:
    """One preference record (lesson S1-21). The reason is required: a pair nobody can explain
    teaches taste by accident.

    Raises ValueError for an empty reason, equal answers or an empty field."""
    for name, value in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected), ("reason", reason)):
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"preference pair: {name} is {value!r}; "
                             "every pair needs a prompt, two answers and a reason")
    if chosen == rejected:
        raise ValueError(f"preference pair: chosen and rejected are both {chosen!r}; "
                         "equal answers carry no preference")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "reason": reason}


def read_pairs(path: Path) -> list[dict]:
    """Pairs of a JSONL file, each {"prompt", "chosen", "rejected", "reason"} as text, or conversational:
    {"chosen": [messages], "rejected": [messages], "reason"}, which is rendered to the first form.

    Raises ValueError naming FILE:LINE for a bad row: a field missing or empty, equal answers, no reason, two
    conversations that differ before their last message."""
    rows = []
    for line, row in enumerate(read_jsonl(path, required={"reason": str}), 1):
        where = f"{path}:{line}"
        if isinstance(row.get("chosen"), list) or isinstance(row.get("rejected"), list):
            row = row | _from_messages(row, where)
        check_fields(row, {"prompt": str, "chosen": str, "rejected": str}, where)
        try:
            make_pair(row["prompt"], row["chosen"], row["rejected"], row["reason"])
        except ValueError as err:
            raise ValueError(f"{where}: {err}") from None
        rows.append(row)
    return rows


def _from_messages(row: dict, where: str) -> dict:
    """A conversational pair as prompt, chosen, rejected: the last message is the bot's, the others are the prompt."""
    check_fields(row, {"chosen": list, "rejected": list}, where)
    for side in ("chosen", "rejected"):
        check_messages(row[side], f"{where}: {side}")
        if row[side][-1]["role"] != "bot" or len(row[side]) < 2:
            raise ValueError(f"{where}: {side} must be a prompt and then the bot's answer; it has {len(row[side])} "
                             f"messages and ends with {row[side][-1]['role']!r}")
        for i, m in enumerate(row[side], 1):
            if tags := [t for t in SPECIAL_TOKENS if t in m["content"]]:
                raise ValueError(f"{where}: {side}, message {i} contains the tag {tags[0]}; tags come from the "
                                 "renderer alone, so take it out")
    chosen, rejected = (row[side][:-1] for side in ("chosen", "rejected"))
    for i in range(max(len(chosen), len(rejected))):
        a, b = (f"{m[i]['role']} {m[i]['content']!r}" if i < len(m) else "nothing" for m in (chosen, rejected))
        if a != b:
            raise ValueError(f"{where}: the two prompts differ at message {i + 1}: chosen has {a}, rejected has {b}; "
                             "a vote compares two answers to one prompt")
    prompt = render(chosen)
    if "prompt" in row and row["prompt"] not in (prompt, chosen):
        raise ValueError(f"{where}: prompt {row['prompt']!r} is not what both conversations begin with ({prompt!r}); "
                         "drop the field or mend it")
    return {"prompt": prompt, "chosen": row["chosen"][-1]["content"], "rejected": row["rejected"][-1]["content"]}


def make_pairs(cases: Sequence[Case]) -> list[dict]:
    """One pair a case: the plain answer is preferred to the same answer with an invented label."""
    reason = "invented_side_effect"
    return [make_pair(c.prompt, c.answer, with_label_claim(c.answer), reason) | {"id": c.case_id} | PROVENANCE
            for c in cases]


@dataclass(frozen=True, slots=True)
class PairBatch:
    """2B rows (chosen then rejected) and the reference's sum log-probabilities, (2B,)."""

    rows: Rows
    ref_logp: Tensor


def encode_pairs(tok: Tokenizer, pairs: Sequence[dict]) -> list[tuple[list[int], list[int], list[int]]]:
    """(prompt, chosen, rejected) token ids of every pair; answers end in <eos>."""
    eos = [tok.special["<eos>"]]
    return [(tok.encode(p["prompt"]), tok.encode(p["chosen"], allow_special=False) + eos,
             tok.encode(p["rejected"], allow_special=False) + eos) for p in pairs]


def pair_rows(encoded: Sequence[tuple[list[int], list[int], list[int]]], pad_id: int) -> Rows:
    """All chosen answers, then all rejected ones; the two answers of a pair share one reading of their prompt."""
    prompts, chosen, rejected = map(list, zip(*encoded))
    return shared_rows(prompts, chosen + rejected, list(range(len(prompts))) * 2, pad_id)


@torch.no_grad()
def reference_logps(model, encoded: Sequence, pad_id: int, batch_size: int = 64) -> Tensor:
    """Sum log-probabilities (n, 2) of (chosen, rejected) under the frozen reference: computed once, kept."""
    parts = []
    for i in range(0, len(encoded), batch_size):
        logp = sum_logps(model, pair_rows(encoded[i:i + batch_size], pad_id).to(model.device))
        parts.append(logp.view(2, -1).T.cpu())
    return torch.cat(parts)


def dpo_batches(encoded: Sequence, ref: Tensor, batch_size: int, seed: int, pad_id: int,
                device: torch.device) -> Callable[[int], PairBatch]:
    """batches(step): `batch_size` pairs drawn without replacement within an epoch."""
    if len(encoded) < batch_size:
        raise ValueError(f"{len(encoded)} pairs cannot fill a batch of {batch_size}")
    per_epoch = len(encoded) // batch_size

    def batches(step: int) -> PairBatch:
        epoch, i = divmod(step, per_epoch)
        order = make_rng(seed, "dpo order", epoch).sample(range(len(encoded)), len(encoded))
        pick = order[i * batch_size:(i + 1) * batch_size]
        return PairBatch(pair_rows([encoded[j] for j in pick], pad_id).to(device), ref[pick].T.reshape(-1).to(device))

    return batches


def pair_loss(model, batch: PairBatch, beta: float) -> tuple[Tensor, dict[str, float]]:
    """`dpo_loss` of a PairBatch: one forward pass for chosen and rejected together."""
    chosen, rejected = sum_logps(model, batch.rows).chunk(2)
    ref_chosen, ref_rejected = batch.ref_logp.chunk(2)
    return dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta)
