"""Knowledge distillation: what a student can be given by a teacher, apart from the truth.

- logits (Hinton, Vinyals & Dean 2015):  loss = (1 - alpha) * CE(student, label) + alpha * T^2 * D(teacher, student),
  D between distributions softened by the temperature T. Its gradient shrinks like 1/T^2, so T^2 keeps alpha's meaning.
  D is the generalised Jensen-Shannon divergence of GKD (Agarwal et al. 2024, eq. 1), with the mixture
  m = beta * teacher + (1 - beta) * student:  D_beta = beta KL(teacher||m) + (1 - beta) KL(student||m).
  D_beta itself goes to 0 at both ends; D_beta / beta goes to KL(teacher||student) as beta falls to 0, and
  D_beta / (1 - beta) to KL(student||teacher) as it rises to 1. Here, as in TRL, beta = 0 and 1 mean those two KLs: the
  loss jumps there, and small steps of beta near an end are steps of the learning rate.
- sequences (Kim & Rush 2016): the teacher's answers, greedy or sampled, optionally only those a verifier accepts.
- preferences: the teacher ranks a student's own answers by their sum log-probability; best and worst become a pair for
  train/dpo. A sum favours short answers, as each token costs (BRIO, Liu et al. 2022, divides by a power of the length).

Teacher distributions are computed once and kept, whole or as the top k with everything else in one bucket. Merging
outcomes can only lower D, so the kept loss is a lower bound of the whole one, and equal to it without top_k.
Averages run over answer tokens. Left out: hidden states, a teacher with another tokenizer, on-policy sampling inside
the step (sample first, then `teacher_targets` on the student's rows), rows that share a prefix (refused).

Shapes: N rows, M counted tokens, V vocabulary, K kept outcomes (V, or top_k + 1).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lifecycle_lib.core.seeds import make_generator
from lifecycle_lib.model.sampling import generate
from lifecycle_lib.model.tokenizer import Tokenizer
from lifecycle_lib.train.dpo import make_pair
from lifecycle_lib.train.logprobs import Rows, shared_rows, sum_logps
from lifecycle_lib.train.staying_close import counted_logits, whole_rows


def divergence(student_logp: Tensor, teacher_logp: Tensor, beta: float = 0.0) -> Tensor:
    """Generalised Jensen-Shannon divergence in nats, one a row: (M, K), (M, K) -> (M,). At 0 and 1 the KLs themselves,
    which the divergence is not continuous with (see above).

    Raises ValueError for beta outside 0..1, or two shapes (another vocabulary, or targets of other rows)."""
    if not 0 <= beta <= 1:
        raise ValueError(f"beta={beta} must be 0 (KL from the teacher) to 1 (KL from the student)")
    if student_logp.shape != teacher_logp.shape:
        raise ValueError(f"student {tuple(student_logp.shape)} and teacher {tuple(teacher_logp.shape)} differ: logits "
                         "need one vocabulary and the same tokens; with another tokenizer use sequences")
    kl = lambda p, q: (p.exp() * (p - q)).sum(-1)  # noqa: E731  log-probabilities in, (M,) out
    if beta in (0, 1):
        return kl(teacher_logp, student_logp) if beta == 0 else kl(student_logp, teacher_logp)
    parts = torch.stack([student_logp + math.log1p(-beta), teacher_logp + math.log(beta)])
    mixture = parts.logsumexp(0)  # (M, K)
    return beta * kl(teacher_logp, mixture) + (1 - beta) * kl(student_logp, mixture)


def merge_rest(logp: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities of the outcomes `ids`, then of all others together: (M, V), (M, k) -> (M, k + 1)."""
    rest = logp.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logp.gather(-1, ids), rest], dim=-1)


@dataclass(frozen=True, slots=True)
class Targets:
    """What the teacher said at every counted token of some rows, at one temperature."""

    logp: Tensor  # (M, K)
    ids: Tensor | None  # (M, k): which tokens were kept; None: all
    starts: Tensor  # (N + 1,): row i owns starts[i]:starts[i + 1]
    temperature: float

    @property
    def nbytes(self) -> int:
        return self.logp.nbytes + (0 if self.ids is None else self.ids.nbytes)

    @property
    def rest(self) -> float:
        """Mean mass outside the kept tokens: what top_k threw together."""
        return 0.0 if self.ids is None else float(self.logp[:, -1].exp().mean())

    def to(self, device: torch.device) -> "Targets":
        return Targets(self.logp.to(device), None if self.ids is None else self.ids.to(device), self.starts,
                       self.temperature)

    def of(self, rows: Tensor) -> "Targets":
        """The targets of these rows, in this order."""
        where = torch.cat([torch.arange(int(self.starts[i]), int(self.starts[i + 1])) for i in rows])
        lengths = (self.starts[1:] - self.starts[:-1])[rows]
        return Targets(self.logp[where], None if self.ids is None else self.ids[where],
                       F.pad(lengths.cumsum(0), (1, 0)), self.temperature)


@torch.no_grad()
def teacher_targets(model, rows: Rows, temperature: float = 1.0, top_k: int | None = None, part: int = 128) -> Targets:
    """Run the teacher once over `rows` and keep its softened distribution at every counted token, on the CPU.

    Raises ValueError for a temperature that is not positive, top_k outside 1..V-1, or rows with a shared prefix."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature} must be positive and finite; 1 to 4 is common")
    vocab = model.cfg.vocab_size
    if top_k is not None and not 1 <= top_k < vocab:
        raise ValueError(f"top_k={top_k} must be 1 to {vocab - 1}; leave it out to keep all {vocab}")
    logps, ids = [], []
    for i in range(0, len(whole_rows(rows).ids), part):
        r = Rows(rows.ids[i:i + part], rows.mask[i:i + part]).to(model.device)
        logp = torch.log_softmax(counted_logits(model, r).float() / temperature, -1)
        if top_k is not None:
            ids.append(logp.topk(top_k).indices)
            logp = merge_rest(logp, ids[-1])
        logps.append(logp.cpu())
    starts = F.pad(rows.mask[:, 1:].sum(1).cumsum(0), (1, 0))
    return Targets(torch.cat(logps), torch.cat(ids).cpu() if ids else None, starts.cpu(), temperature)


@dataclass(frozen=True, slots=True)
class DistilBatch:
    """Rows and what the teacher said on them; no targets: the labels alone."""

    rows: Rows
    targets: Targets | None

    def to(self, device: torch.device) -> "DistilBatch":
        return DistilBatch(self.rows.to(device), self.targets and self.targets.to(device))


def distil_batches(rows: Rows, targets: Targets | None, batch_size: int, seed: int) -> Callable[[int], DistilBatch]:
    """batches(step): rows in a fresh order each epoch, the same for every signal; fewer rows than a batch: all.

    Raises ValueError when the targets were made on other rows, or the rows share a prefix."""
    n = len(whole_rows(rows).ids)
    if targets is not None and not torch.equal(rows.mask[:, 1:].sum(1).cpu(), targets.starts.diff()):
        raise ValueError(f"targets of {len(targets.starts) - 1} rows, {len(targets.logp)} tokens, do not fit {n} rows "
                         f"with {int(rows.mask[:, 1:].sum())} counted tokens; run teacher_targets on these rows")

    def batches(step: int) -> DistilBatch:
        epoch, i = divmod(step, max(1, n // batch_size))
        order = torch.randperm(n, generator=make_generator(seed, "distil order", epoch))
        pick = order[i * batch_size:(i + 1) * batch_size]
        mask = rows.mask[pick]
        width = int(mask.any(0).nonzero().max()) + 1  # no column behind the last answer
        return DistilBatch(Rows(rows.ids[pick, :width], mask[:, :width]), targets and targets.of(pick))

    return batches


def distil_loss(model, batch: DistilBatch, alpha: float = 1.0, beta: float = 0.0) -> tuple[Tensor, dict[str, float]]:
    """(1 - alpha) * hard loss + alpha * T^2 * divergence, means over answer tokens. Without targets: the hard loss.

    Raises ValueError for alpha outside 0..1."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha} must be 0 (labels alone) to 1 (teacher alone)")
    rows, said = batch.rows, batch.targets
    logits = counted_logits(model, rows).float()  # (M, V)
    hard = F.cross_entropy(logits, rows.ids[:, 1:][rows.mask[:, 1:]])
    if said is None:
        return hard, {"hard": float(hard.detach())}
    logp = torch.log_softmax(logits / said.temperature, -1)
    if said.ids is not None:
        logp = merge_rest(logp, said.ids)
    soft = said.temperature**2 * divergence(logp, said.logp, beta).mean()
    return (1 - alpha) * hard + alpha * soft, {"hard": float(hard.detach()), "soft": float(soft.detach())}


@dataclass(frozen=True, slots=True)
class Answers:
    """Teacher answers that became targets: (prompt number, token ids with the end), and what they cost."""

    kept: list[tuple[int, list[int]]]
    n_prompts: int
    tokens: int  # decoded in all, refused answers included

    @property
    def coverage(self) -> float:
        """Share of the prompts that got a target."""
        return len(self.kept) / self.n_prompts

    @property
    def tokens_per_target(self) -> float:
        return self.tokens / len(self.kept)


def teacher_answers(model, prompts: Sequence[list[int]], *, eos_id: int, pad_id: int, temperature: float = 0.0,
                    candidates: int = 1, accept: Callable[[int, list[int]], bool] | None = None,
                    generator: torch.Generator | None = None, max_new_tokens: int = 48) -> Answers:
    """One target a prompt: the first of its candidates that ended and that `accept(prompt number, ids)` takes.

    Raises ValueError when no answer at all was accepted, and for several greedy candidates: they are equal."""
    if temperature == 0 and candidates > 1:
        raise ValueError(f"candidates={candidates} at temperature 0 are the same answer; sample, or draw 1")
    out = generate(model, list(prompts), eos_id=eos_id, pad_id=pad_id, max_new_tokens=max_new_tokens,
                   temperature=temperature, n_samples=candidates, generator=generator)
    kept = []
    for i in range(len(prompts)):
        drawn = (j for j in range(i * candidates, (i + 1) * candidates) if out.ended[j])
        first = next((out.ids[j] for j in drawn if accept is None or accept(i, out.ids[j])), None)
        if first is not None:
            kept.append((i, first))
    if not kept:
        raise ValueError(f"none of {len(out.ids)} teacher answers was accepted: there is nothing to imitate; read "
                         "some, then mend the teacher, the prompt or the verifier")
    return Answers(kept, len(prompts), out.tokens)


@torch.no_grad()
def teacher_scores(model, tok: Tokenizer, prompts: Sequence[str], candidates: Sequence[Sequence[str]],
                   part: int = 64) -> list[list[float]]:
    """Sum log-probability that the teacher gives to each candidate of each prompt, end token included: of two answers
    that please it alike a token, the shorter scores higher. Audit the pairs for length before you train on them."""
    eos, pad = tok.special["<eos>"], tok.special["<pad>"]
    scores = []
    for i in range(0, len(prompts), part):
        asked, texts = prompts[i:i + part], candidates[i:i + part]
        owner = [j for j, row in enumerate(texts) for _ in row]
        answers = [tok.encode(t, allow_special=False) + [eos] for row in texts for t in row]
        flat = iter(sum_logps(model, shared_rows([tok.encode(p) for p in asked], answers, owner, pad)).tolist())
        scores += [[next(flat) for _ in row] for row in texts]
    return scores


def rank_pairs(prompts: Sequence[str], candidates: Sequence[Sequence[str]], scores: Sequence[Sequence[float]],
               reason: str = "teacher_ranking") -> list[dict]:
    """Best against worst candidate of each prompt, as pairs for train/dpo; prompts without a difference give none.

    Raises ValueError naming the prompt whose scores do not match its candidates or are not finite."""
    pairs = []
    for i, (prompt, texts, given) in enumerate(zip(prompts, candidates, scores, strict=True)):
        if len(texts) != len(given) or not all(map(math.isfinite, given)):
            raise ValueError(f"prompt {i}: scores {list(given)} for {len(texts)} candidates; one finite score each")
        best, worst = max(zip(given, texts)), min(zip(given, texts))
        if best[0] > worst[0] and best[1] != worst[1]:
            pairs.append(make_pair(prompt, best[1], worst[1], reason))
    return pairs
