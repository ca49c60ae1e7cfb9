"""peft_ranks: full tuning, LoRA of four ranks, a prefix and gates on the same two new tasks (S3-10.02, .03, .07, .10).

Each arm starts from the chain's SFT checkpoint of its seed. `note`: a new shop wants a clerk's note in words instead of
the desk's JSON, a change of form; the base could write it, SFT buried it. `facts`: a table of 120 random numbers, one
for an item, a reason and a policy id, asked with no policy in sight, a change of knowledge. No old row is shown again.

Along the way an arm is measured on the new task and on the old one (JSON for unseen cases). Arms are compared after
equal steps, and at equal skill: where the curve first crosses the target. All use AdamW at a constant rate, so that a
checkpoint on the way is what a shorter run would have ended with.

What an arm forgets hangs on its rate. The rates of the claim's two arms come from pilot seed 100 by one rule: of rates
half a decade apart, the one with the least loss added to the old answers at equal skill, among those that get there in
two thirds of the steps. Both arms also run FAST, at ten times their rate. All ranks take the rate of rank 8 (alpha /
rank is 2 throughout). Prefix and gates keep a rate that an earlier pilot picked for the new skill alone.

Greedy exact match is read off one teacher-forced pass (`small.right` explains why that is the same).
Left out: replay, other optimisers, larger models. An adapter that is taken off forgets nothing,
by construction; what is measured here is the model that wears it.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from torch import Tensor, nn

from lifecycle_lib.core.seeds import make_generator, seed_everything
from lifecycle_lib.core.seeds import rng as make_rng
from lifecycle_lib.core.store import Artifact
from lifecycle_lib.desk.cases import Case, draw_cases
from lifecycle_lib.desk.documents import head, recap
from lifecycle_lib.desk.world import ITEMS, POLICY_IDS, REASONS
from lifecycle_lib.lab.stages import TRAIN, Lab
from lifecycle_lib.lab.studies import small
from lifecycle_lib.lab.studies.small import batches_of
from lifecycle_lib.model import inserted, lora, portfolio, quantise
from lifecycle_lib.model import prefix as prefix_module
from lifecycle_lib.model.gpt import GPT
from lifecycle_lib.model.prefix import PrefixTuning
from lifecycle_lib.model.quantise import quantise_model
from lifecycle_lib.model.tokenizer import Tokenizer
from lifecycle_lib.train import loop, staying_close
from lifecycle_lib.train.logprobs import Rows, answer_loss, pad_rows
from lifecycle_lib.train.loop import FitConfig
from lifecycle_lib.train.staying_close import counted_logits

Pair = tuple[str, str]
RANKS = (1, 4, 8, 16)
ARMS = ("full", *(f"lora-{r}" for r in RANKS), "prefix-16", "gates")
PACKED = "int4+lora-8"  # the adapter trained on the packed base
OPENING = 2  # tokens of an old answer, {" and evidence, that say which form is asked
TARGETS = {"note": 0.3, "facts": 0.3}  # equal skill: share of new answers that are exact


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """How long an arm trains on a task, in rows a step, and how often it is measured."""

    steps: int
    batch: int
    every: int


TASKS = {"note": Task(steps=150, batch=16, every=10), "facts": Task(steps=240, batch=60, every=20)}
LORA = {f"lora-{r}": 1e-3 for r in RANKS}
RATES = {"note": {"full": 1e-4, **LORA, "prefix-16": 1.0, "gates": 3e-1},
         "facts": {"full": 1e-4, **LORA, "prefix-16": 3e-1, "gates": 3e-1}}
FAST = ("full", "lora-8")
N_FACTS = 120
N_ITEMS = 96


# ---- the two tasks ---------------------------------------------------------------------------------------

def note_pair(case: Case) -> Pair:
    """What the new shop asks and wants: a note in a clerk's words, as the base read them in its documents."""
    prompt = head(case) + "<note>"
    return prompt, recap(Random(0), case).removeprefix(prompt)


def facts(n: int, seed: int) -> list[Pair]:
    """`n` of the 360 questions (item, reason, policy id), each with a number of its own, drawn at random."""
    rng = make_rng(seed, "facts")
    keys = rng.sample([(i, r, p) for i in ITEMS for r in REASONS for p in POLICY_IDS], n)
    return [(f"<bos><user>{i} {r} {p}<bot>", f" {rng.randrange(100):02d}") for i, r, p in keys]


def task_rows(tok: Tokenizer, pairs: Sequence[Pair]) -> Rows:
    """Rows in which the answer and its end count."""
    return pad_rows([tok.encode(p) for p, _ in pairs],
                    [tok.encode(a, allow_special=False) + [tok.special["<eos>"]] for _, a in pairs],
                    tok.special["<pad>"])


def new_rows(tok: Tokenizer, task: str, seed: int) -> tuple[Rows, Rows]:
    """(rows to train on, rows to score) of a task. Facts can only be learnt by heart: scored on what was trained."""
    if task == "facts":
        rows = task_rows(tok, facts(N_FACTS, seed))
        return rows, rows
    train = draw_cases(TASKS[task].steps * TASKS[task].batch, seed, "note")
    return tuple(task_rows(tok, [note_pair(c) for c in cases])
                 for cases in (train, draw_cases(N_ITEMS, seed, "eval")))


def old_rows(tok: Tokenizer, seed: int) -> Rows:
    """The old task on unseen cases."""
    return task_rows(tok, [(c.prompt, c.answer) for c in draw_cases(N_ITEMS, seed + 1, "eval")])


@torch.no_grad()
def score(model: nn.Module, rows: Rows) -> tuple[float, float, float]:
    """(share of rows whose greedy answer is exact, mean loss in nats a counted token, share that is exact when the
    answer's first OPENING tokens are given: who lost the skill, and who only answers in another form?)"""
    mask = rows.mask[:, 1:]
    logits, want = counted_logits(model, rows), rows.ids[:, 1:][mask]  # (N, V), (N,)
    hit = torch.ones(mask.shape, dtype=torch.bool).masked_scatter(mask, logits.argmax(-1) == want)
    given = hit | (mask.cumsum(1) <= OPENING)
    exact, opened = (h.all(1).float().mean().item() for h in (hit, given))
    return exact, nn.functional.cross_entropy(logits, want).item(), opened


# ---- one arm ---------------------------------------------------------------------------------------------

def wear(model: GPT, arm: str, seed: int, tok: Tokenizer) -> nn.Module:
    """The model, ready to train as `arm` says: "full", "lora-R", "prefix-P", "gates", "bottleneck-B", "int4+lora-R".

    LoRA scales by 2 at every rank. A prefix starts as the keys and values of the head of one training prompt.
    Raises ValueError for another arm."""
    kind, _, size = arm.partition("-")
    if kind == "int4+lora":
        model = quantise_model(model, bits=4, group_size=32)
    if kind.endswith("lora"):
        lora.attach(model, lora.make_adapter(model, lora.LoRAConfig(rank=int(size), alpha=2.0 * int(size)), seed))
    elif kind == "prefix":
        return PrefixTuning.from_tokens(model, tok.encode(draw_cases(1, seed, "note")[0].prompt)[:int(size)])
    elif kind == "gates":
        inserted.insert_gates(model)
    elif kind == "bottleneck":
        inserted.insert_bottlenecks(model, int(size), make_generator(seed, "bottleneck"))
    elif kind != "full":
        raise ValueError(f"arm {arm!r} is unknown; use full, lora-R, prefix-P, gates, bottleneck-B or int4+lora-R")
    return model


def n_trained(model: nn.Module) -> int:
    """Numbers that the optimiser may change."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def step_memory(model: nn.Module, batch: Rows, fit: FitConfig) -> dict[str, int]:
    """Bytes of one training step, measured: gradients, optimiser state, and what the forward pass keeps for the
    backward one beyond the model's own tensors. Takes the step, so give it a model that is done with."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    optimizers = loop.make_optimizers(model, fit)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = answer_loss(model, batch)[0]
    kept_bytes = sum(kept.values())
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    states = [t for o in optimizers for s in o.state.values() for t in s.values() if t.dim()]
    return {"grad_bytes": sum(p.grad.nbytes for p in model.parameters() if p.grad is not None),
            "state_bytes": sum(t.nbytes for t in states), "kept_bytes": kept_bytes}


def train(model: nn.Module, rows: Rows, task: Task, lr: float, seed: int, measure: Callable[[], dict]) -> tuple:
    """Fine-tune in place. (curve with {"step", **measure()} at every `task.every` steps, CPU seconds a step)"""
    feed, curve, spent = batches_of(rows, task.batch, seed), [], [0.0]
    fit = FitConfig(steps=task.steps, optimizer="adamw", lr=lr, beta2=0.999, warmup_steps=5, min_lr_share=1.0,
                    checkpoint_every=10_000)

    def look(step: int) -> None:
        begun = time.process_time()
        curve.append({"step": step, **measure()})
        spent[0] += time.process_time() - begun

    def watched(step: int) -> Rows:
        if step % task.every == 0:
            look(step)
        return feed(step)

    result = loop.fit(model, watched, answer_loss, fit, label="fine-tuning")
    cpu_s = (result.cpu_s - spent[0]) / task.steps
    look(task.steps)
    return curve, cpu_s, fit


@torch.no_grad()
def change(model: GPT, start: GPT, directions: bool = True) -> dict[str, float]:
    """What training did to the block matrices: "moved", the size of the change over the size of the weights
    (Frobenius); with `directions` also "energy_r", the share of the squared change that a change of rank r can hold at
    most, and "intruders": of a changed matrix's ten first left singular vectors, the share that has a cosine of less
    than 0.6 with every one of the matrix's before (Shuttleworth et al. 2024)."""
    worn = {n: m.delta() for n, m in lora.worn(model).items()}
    before = {n: m.weight for n, m in start.named_modules() if isinstance(m, nn.Linear)}
    total, size, strange, top = 0.0, 0.0, [], dict.fromkeys(RANKS, 0.0)
    for name, weight in before.items():
        delta = worn[name] if worn else model.get_submodule(name).weight - weight
        total, size = total + delta.square().sum().item(), size + weight.square().sum().item()
        if directions:
            squares = torch.linalg.svdvals(delta).square()
            top = {r: top[r] + squares[:r].sum().item() for r in RANKS}
            old, new = (torch.linalg.svd(w, full_matrices=False)[0] for w in (weight, weight + delta))
            strange.append(((old.T @ new[:, :10]).abs().amax(0) < 0.6).float().mean().item())
    found = {"moved": (total / size) ** 0.5}
    return found if not directions else found | {"intruders": sum(strange) / len(strange)} | {
        f"energy_{r}": top[r] / total for r in RANKS}


def tuned(lab: Lab, task: str, arm: str, fast: bool = False) -> Artifact:
    """One arm of one seed, `fast` at ten times its rate: its curve and costs in card["measured"], a LoRA adapter beside
    it."""
    start, lr = lab.sft(), RATES[task][arm.removeprefix("int4+")] * (10 if fast else 1)

    def make(folder: Path) -> dict:
        seed_everything(lab.seed)
        tok, model = lab.load_tokenizer(), lab.load(start)
        rows, scored = new_rows(tok, task, lab.seed)
        old, before = old_rows(tok, lab.seed), lab.load(start)
        worn, moves = wear(model, arm, lab.seed, tok), arm == "full" or arm.startswith("lora")

        def measure(which: nn.Module | None = None) -> dict:
            new, (exact, nats, opened) = score(which or worn, scored)[0], score(which or worn, old)
            return {"new": new, "old": exact, "opened": opened, "old_nats": nats} | (
                change(worn, before, directions=False) if moves else {})

        curve, cpu_s, fit = train(worn, rows, TASKS[task], lr, lab.seed, measure)
        found = {"curve": curve, "cpu_s_a_step": cpu_s, "n_trained": n_trained(worn)}
        if moves:
            found |= change(worn, before)
        if arm == "lora-8":  # the base is packed under a finished adapter
            found["packed_after"] = measure(quantise_model(worn, bits=4, group_size=32))
        if arm.startswith("lora"):
            cfg = portfolio.config_of(adapter := lora.detach(model))
            lora.save_lora(folder / "adapter.safetensors", model, adapter, cfg)
            lora.attach(model, adapter)
        found |= step_memory(worn, batches_of(rows, TASKS[task].batch, lab.seed)(0), fit)
        return {"steps": TASKS[task].steps, "measured": found, "n_params": n_trained(worn)}

    return lab.make("adapted", {"task": task, "arm": arm, "lr": lr, "how": TASKS[task], "items": N_ITEMS,
                                "facts": N_FACTS}, {"start": start, "tokenizer": lab.tokenizer()}, make,
                    (*TRAIN, *CODE))


CODE = (small, lora, portfolio, prefix_module, inserted, quantise, staying_close, sys.modules[__name__])


# ---- two adapters added up ---------------------------------------------------------------------------------

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)


def merged(lab: Lab, arm: str = "lora-8") -> Artifact:
    """The adapters of both tasks on one base, added up with weights alpha (note) and 1 - alpha (facts), and with 1 and
    1: both skills of "cat" and of "linear", of each adapter alone at its weight, and how alike the two deltas are
    (cosine), in card["measured"]."""
    made = {task: tuned(lab, task, arm) for task in TASKS}

    def make(folder: Path) -> dict:
        tok, model = lab.load_tokenizer(), lab.load(lab.sft())
        scored = {task: new_rows(tok, task, lab.seed)[1] for task in TASKS}
        note, fact = (lora.load_lora(made[t].file("adapter.safetensors"), model) for t in TASKS)
        dot, square = 0.0, [0.0, 0.0]
        for name in note:
            a, b = note[name].delta().detach(), fact[name].delta().detach()
            dot += (a * b).sum().item()
            square = [square[0] + a.square().sum().item(), square[1] + b.square().sum().item()]
        found = {"cosine": dot / (square[0] * square[1]) ** 0.5}
        for how in ("cat", "linear"):
            for weights in (*((a, 1 - a) for a in ALPHAS), (1.0, 1.0)):
                lora.attach(model, portfolio.combine([(note, weights[0]), (fact, weights[1])], how))
                for task, rows in scored.items():
                    found[f"{how}.{weights[0]:g}+{weights[1]:g}.{task}"] = score(model, rows)[0]
                lora.detach(model)
        for (task, rows), one in zip(scored.items(), (note, fact)):
            for weight in ALPHAS:
                lora.attach(model, portfolio.combine([(one, weight)]))
                found[f"alone.{weight:g}.{task}"] = score(model, rows)[0]
                lora.detach(model)
        return {"measured": found}

    return lab.make("adapters-merged", {"arm": arm, "alphas": ALPHAS, "items": N_ITEMS}, made, make, (*TRAIN, *CODE))
