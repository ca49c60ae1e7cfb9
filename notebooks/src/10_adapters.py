# ---
# jupyter:
#   lifecycle:
#     rows: [S3-10.01, S3-10.02, S3-10.03, S3-10.04, S3-10.05, S3-10.07, S3-10.08, S3-10.09, S3-10.10, S3-10.12, S3-10.19, S3-10.21, S3-10.22, S3-10.25, S3-7.23, S0-30, S0-75n, S2-03a, S2-03b]
# ---
# %% [markdown]
# # How much of a model must move to learn something new?
#
# Full tuning changes every weight for every customer. An adapter trains a few thousand numbers beside frozen ones, can
# be taken off, swapped, or added to another. That is often sold as "the same skill, less memory, less forgetting". Some
# of it is true. This notebook measures which.
#
# After this notebook you can:
#
# - write LoRA in 30 lines, derive why B starts at zero, and match peft in value and gradient;
# - read from data what rank buys, for a change of *form* and for a table of *facts*;
# - say what an adapter saves (optimiser state) and what it does not (activations, seconds, the old skill);
# - merge, and say what unmerging cannot give back;
# - run several adapters on one base: swap, switch off, route row by row, add up, pack the base to four bits.
#
# **Needs** the SFT checkpoint (from the store, or built first in about 5 minutes of one CPU core). **Makes** two adapters
# and a portfolio folder that is thrown away. From a warm store about 80 seconds of one CPU core and 0.8 GB of memory; the
# first time a minute more, for four runs of fine-tuning.

# %% tags=["parameters"]
profile = "laptop"
seed = 0
device = ""
rank = 8

# %%
from lifecycle_lib.lab.notebook import start

lab = start("10", profile, seed, device)

# %% [markdown]
# ## The claim
#
# "LoRA learns less and forgets less" (Biderman et al. 2024) was measured on 7B models. Here it is tried on ours, at
# equal *skill*, not at equal steps: whoever has learnt nothing has forgotten nothing. And each method at its *gentlest
# rate that gets there*: whoever runs at a rate for speed measures the rate.

# %%
from lifecycle_lib.core.stats import Effect, paired_effect
from lifecycle_lib.lab.claims import ClaimCard, recorded, show_evidence

# %%
card = ClaimCard(
    claim="at equal skill on a new task, each at its gentlest rate, LoRA of rank 8 forgets less than full tuning",
    direction="up", smallest=0.05, unit="share",
    falsifier="of the old exact answers, averaged over two tasks, it keeps less than 5 points more",
    scope="0.69M parameters, two new tasks, AdamW at a constant rate, alpha / rank = 2, no replay, 5 seeds",
    not_measured="large models, replay, other optimisers, long training, more than two tasks")
card.show()

# %% [markdown]
# ## One layer by hand
#
# A frozen layer computes `W x`. LoRA adds `(alpha / rank) B A x`. Take W = (1, 2), A = (3, -1), B = (0.5), alpha = 2,
# rank 1 and x = (1, 1). What comes out, and what would merging write into W?

# %%
import torch

torch.manual_seed(seed)
W, A, B, x = (torch.tensor(t) for t in ([[1.0, 2.0]], [[3.0, -1.0]], [[0.5]], [1.0, 1.0]))
out, delta = W @ x + 2.0 * B @ (A @ x), 2.0 * B @ A
assert out.item() == 3 + 2 * 0.5 * 2 == 5.0 and delta.tolist() == [[3.0, -1.0]]
print("output:", out.item(), "| merged W:", (W + delta).tolist(), "| merged output:", ((W + delta) @ x).item())

# %% [markdown]
# ## Predict
#
# Two new tasks on the same checkpoint, no old row shown again:
#
# - **note**: a new shop wants a clerk's note in words, not JSON. The base once read such notes; SFT buried them.
# - **facts**: 120 random numbers, one for an item, a reason and a policy id. Nothing in the prompt helps.
#
# At equal skill, how many points more of the *old* answers does LoRA keep exact, and how sure are you that it is 5?

# %%
guess, confidence = 0.1, 0.7  # the literature's direction
card.predict(guess, confidence)

# %% [markdown]
# ## LoRA on one screen
#
# Wrap a linear layer; freeze it; train A and B. That is all.

# %% tags=["algorithm"]
from torch import nn


class LoRA(nn.Module):
    """W x + (alpha / rank) B A x, W frozen. W (O, I), A (R, I), B (O, R)."""

    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.linear, self.scale = linear.requires_grad_(False), alpha / rank
        bound = linear.in_features ** -0.5
        self.A = nn.Parameter(torch.empty(rank, linear.in_features).uniform_(-bound, bound))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))  # zero: the base, until it learns

    def forward(self, x):  # (..., I) -> (..., O)
        return self.linear(x) + self.scale * (x @ self.A.T) @ self.B.T

    def delta(self):  # what merging would add to W
        return self.scale * self.B @ self.A


def wrap(model, rank, alpha, names=("wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down")):
    """Freeze the model and put LoRA on every linear layer with one of these names; returns {path: LoRA}."""
    model.requires_grad_(False)
    paths = [p for p, m in model.named_modules() if isinstance(m, nn.Linear) and p.split(".")[-1] in names]
    layers = {p: LoRA(model.get_submodule(p), rank, alpha) for p in paths}
    for path, layer in layers.items():
        model.set_submodule(path, layer)
    return layers


# %% [markdown]
# **Why is B zero, and not A too?** With `g` the gradient at the layer's output, `dL/dB = s g (A x)'` and
# `dL/dA = s (B' g) x'`. B = 0 leaves the base's answers as they were, and only A's gradient is zero: B moves in step
# one, A from step two. Both zero: both gradients are zero, forever. Both random: training starts from a damaged model.

# %%
def first_gradients(zero_a, zero_b):
    """Largest change of an output before training, and the largest gradients of A and B."""
    layer = LoRA(nn.Linear(6, 5, bias=False), rank=2, alpha=4)
    nn.init.zeros_(layer.A) if zero_a else None
    None if zero_b else nn.init.normal_(layer.B)
    v = torch.randn(3, 6)
    layer(v).square().sum().backward()
    moved = (layer(v) - layer.linear(v)).abs().max().item()
    return moved, layer.A.grad.abs().max().item(), layer.B.grad.abs().max().item()


# %%
for name, zeros in {"B zero": (False, True), "both zero": (True, True), "both random": (False, False)}.items():
    moved, grad_a, grad_b = first_gradients(*zeros)
    print(f"{name:12} answers change: {moved > 0!s:5}  A learns in step 1: {grad_a > 0!s:5}  B: {grad_b > 0}")

# %% [markdown]
# ## The judge: peft, on your own checkpoint
#
# The SFT model, wrapped by the cell above, by the library and by peft, with the same A and a B that is not zero. Equal
# logits and equal gradients, to 1e-5 of the largest?

# %%
import logging

logging.disable(logging.WARNING)
from peft import LoraConfig, get_peft_model

from lifecycle_lib.model import lora
from lifecycle_lib.model.bridge import to_hf

# %%
sft, tok = lab.sft(), lab.load_tokenizer()
ours, mine = lab.load(sft).cpu(), lab.load(sft).cpu()
cfg = lora.LoRAConfig(rank=rank, alpha=2.0 * rank)
adapter, layers = lora.make_adapter(ours, cfg, seed), wrap(mine, rank, 2.0 * rank)

# %%
theirs = get_peft_model(to_hf(ours), LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(cfg.targets)))
twins = {p: next(m for n, m in theirs.named_modules() if n.endswith(p) and hasattr(m, "lora_A")) for p in adapter}
lora.attach(ours, adapter)
with torch.no_grad():
    for path, layer in adapter.items():
        layer.b.normal_(std=0.05)
        layers[path].A.copy_(layer.a), layers[path].B.copy_(layer.b)
        twins[path].lora_A["default"].weight.copy_(layer.a)
        twins[path].lora_B["default"].weight.copy_(layer.b)

# %%
from lifecycle_lib.desk.cases import draw_cases

# %%
ids = torch.tensor([tok.encode(c.prompt)[:28] for c in draw_cases(8, seed, "peft")])
logits = [ours(ids), mine(ids), theirs(input_ids=ids).logits]
for y in logits:
    y.log_softmax(-1)[..., 7].mean().backward()

# %%
pairs = [(a, b) for p, own in adapter.items() for a, b in (
    (own.a.grad, layers[p].A.grad), (own.b.grad, layers[p].B.grad),
    (own.a.grad, twins[p].lora_A["default"].weight.grad), (own.b.grad, twins[p].lora_B["default"].weight.grad))]
largest = max(a.abs().max().item() for a, _ in pairs)
assert all((y - logits[0]).abs().max() < 1e-5 * logits[0].abs().max() for y in logits)
assert max((a - b).abs().max().item() for a, b in pairs) < 1e-5 * largest
print(f"{len(adapter)} layers: cell, library and peft agree in logits and in every gradient of A and B")

# %%
n_numbers, n_all = lora.n_trained(adapter), ours.n_params() - lora.n_trained(adapter)
by_formula = sum(rank * sum(own.base.weight.shape) for own in adapter.values())
assert n_numbers == by_formula
print(f"rank {rank} trains {n_numbers:,} numbers beside {n_all:,} frozen ones ({100 * n_numbers / n_all:.1f} %)")
_ = lora.detach(ours)

# %% [markdown]
# ## Train: one seed, live
#
# Full tuning and LoRA of rank 8 on both tasks, the same steps, at a constant rate, so that a checkpoint on the way is
# what a shorter run would have ended with. The rate of each comes from a pilot seed by one rule: of rates half a decade
# apart, the one with the least loss added to the old answers at equal skill, among those that get there in two thirds
# of the steps.

# %%
from lifecycle_lib.lab.studies.adapters import FAST, RATES, TARGETS, TASKS, tuned

print({task: {arm: RATES[task][arm] for arm in FAST} for task in TASKS}, "and FAST: ten times that")

# %%
live = {(task, arm): tuned(lab, task, arm).card["measured"] for task in TASKS for arm in FAST}
for (task, arm), found in live.items():
    first, last = found["curve"][0], found["curve"][-1]
    print(f"{task:6} {arm:7} new skill {100 * first['new']:3.0f} -> {100 * last['new']:3.0f} %   old answers: exact "
          f"{100 * first['old']:3.0f} -> {100 * last['old']:3.0f} %, loss {first['old_nats']:.2f} -> "
          f"{last['old_nats']:.2f} nats")

# %%
import matplotlib.pyplot as plt

from lifecycle_lib.lab.figures import SERIES, style


# %%
def finish(fig, facts, not_measured):
    """n and kind of interval under the axes, and what the figure does not show."""
    fig.supxlabel(f"{facts}\nNot measured here: {not_measured}.", x=0.01, ha="left", fontsize=9, color="#606060")
    plt.show()

# %%
per_seed = recorded("peft_ranks")["per_seed"]


def walk(row, label, task, key):
    """A recorded curve of one seed: the numbers at its checkpoints, in order."""
    steps = range(0, TASKS[task].steps + 1, TASKS[task].every)
    return [row[f"{task}.{label}.{key}@{step}"] for step in steps]

# %%
style()
fig, axes = plt.subplots(1, 2, figsize=(9.4, 3.8), sharey=True)
for ax, task in zip(axes, TASKS):
    for label, (colour, marker, line, _) in zip((*FAST, *(f"{arm} fast" for arm in FAST)), SERIES):
        new, lost = (walk(per_seed[0], label, task, k) for k in ("new", "lost"))
        ax.plot([100 * n for n in new], lost, color=colour, marker=marker, markersize=4, linestyle=line, label=label)
    ax.axvline(100 * TARGETS[task], color="#808080", linestyle=":", linewidth=1.2)
    ax.set(title=task, xlabel="new answers that are exact (%)")
    ax.set_yscale("symlog", linthresh=0.1)
axes[0].set_ylabel("loss added to old answers\n(nats a token, log scale above 0.1)")
axes[0].legend()
finish(fig, "n = 1 recorded seed; a marker is a checkpoint, from the left; dotted: equal skill.", "other seeds (below)")

# %%
from lifecycle_lib.lab.studies.adapters_design import at_skill, lost

for (task, arm), found in live.items():
    at = at_skill(lost(found["curve"]), TARGETS[task])
    print(f"{task:6} {arm:7} {'reaches' if at['reached'] else 'never reaches'} {100 * TARGETS[task]:.0f} %, at step "
          f"{at['step']:3.0f}: old answers exact {100 * at['old']:2.0f} %, {at['lost']:.2f} nats added")

# %% [markdown]
# Each marker is a checkpoint; lower is gentler at the same skill. Ten times the rate lies far above: a fast LoRA
# overwrites the old answers in its first steps, before anything is learnt. (The first version of this experiment ran
# there, at rates picked for the new skill alone, and blamed LoRA for all of it.) No old row was in the batches, and an
# adapter does not prevent forgetting *while it is worn*. Taken off, it has changed nothing:

# %%
from lifecycle_lib.model.checkpoint import weights_hash

# %%
base = lab.load(sft).cpu().eval()
hash_before, plain = weights_hash(base), base(ids)
note, fact = (lora.load_lora(tuned(lab, t, "lora-8").file("adapter.safetensors"), base) for t in TASKS)

# %%
lora.attach(base, note)
worn = base(ids)
lora.detach(base)
assert torch.equal(base(ids), plain) and weights_hash(base) == hash_before
print(f"worn: logits move by up to {(worn - plain).abs().max():.0f}; off: bit for bit the base, hash {hash_before[:12]}")

# %% [markdown]
# ## What five seeds say
#
# Recorded: five seeds, seven arms and two tasks. Four ranks of LoRA at the rate of rank 8, a prefix of 16 (a section of
# its own below), and gates: IA3, one learned factor a key, value and MLP channel. Prefix and gates run at a rate picked
# for the new skill alone, so read their skill, not their forgetting. First: what the same steps buy.

# %%
from lifecycle_lib.lab.studies.adapters import ARMS, Task, new_rows, score, train, wear

rows = {t: new_rows(tok, t, seed) for t in TASKS}


def over_seeds(key, minus=None, there=()):
    """Mean with its interval over the seeds where all of `there` are 1, of one number or of a paired difference."""
    rows = [r for r in per_seed if all(r[k] for k in there)]
    return paired_effect([r[key] for r in rows], [r[minus] if minus else 0.0 for r in rows])


def bars(es):
    """Intervals of shares as error bars in percent, cut at 0 and 100: a share has no other values."""
    return [[100 * (e.estimate - max(0, e.low)) for e in es], [100 * (min(1, e.high) - e.estimate) for e in es]]

# %%
def steps_to_skill(task, arm):
    """Mean steps to equal skill, over the seeds that got there, and how many did."""
    steps = [r[f"{task}.{arm}.at.step"] for r in per_seed if r[f"{task}.{arm}.at.reached"]]
    return f"{sum(steps) / len(steps):6.0f} ({len(steps)} of {len(per_seed)})" if steps else f"  never (0 of {len(per_seed)})"

# %%
fig, axes = plt.subplots(1, 2, figsize=(9.4, 3.8), sharey=True)
for ax, (key, label) in zip(axes, (("new", "new answers that are exact (%)"), ("old", "old answers that are exact (%)"))):
    for shift, task, (colour, marker, _, _) in zip((-0.12, 0.12), TASKS, SERIES):
        es = [over_seeds(f"{task}.{arm}.{key}") for arm in ARMS]
        ax.errorbar([100 * e.estimate for e in es], [i + shift for i in range(len(ARMS))], xerr=bars(es), color=colour,
                    marker=marker, linestyle="none", label=task)
    ax.set_xlabel(label)
axes[0].set_yticks(range(len(ARMS)), ARMS)
axes[0].invert_yaxis()
axes[1].legend()
finish(fig, f"n = {len(per_seed)} seeds; bars: 95 % t intervals over seeds, cut at 0 and 100; after equal steps.",
       "longer training, the best rate of each rank")

# %%
print(f"{'':10}" + "".join(f"{t + ': new skill':>18}{'steps to 30 %':>18}" for t in TASKS))
for arm in ARMS:
    print(f"{arm:10}" + "".join(f"{100 * over_seeds(f'{t}.{arm}.new').estimate:16.0f} %{steps_to_skill(t, arm):>18}"
                                for t in TASKS))

# %%
show_evidence("peft_ranks", ["rank pays more on facts than on note: (16 - 1) - (16 - 1)",
                             "note: new skill, lora-16 - lora-1", "facts: new skill, lora-16 - lora-1",
                             "note: new skill, prefix-16 - lora-8", "facts: new skill, prefix-16 - lora-8"],
              claim=False)

# %% [markdown]
# Rank pays on both tasks; on facts a little more, by an interval that hardly clears zero. The prefix learns less than
# rank 8 on both; gates, the smallest arm, learn the facts and hardly the form. But these are equal, short, unfinished
# runs at one rate. Can rank 1 not *hold* the facts, or has it not *finished*?

# %%
slow = wear(lab.load(sft).cpu(), "lora-1", seed, tok)
longer, _, _ = train(slow, rows["facts"][0], Task(steps=480, batch=60, every=160), 3 * RATES["facts"]["lora-1"], seed,
                     lambda: {"new": score(slow, rows["facts"][1])[0]})
print("rank 1, three times the rate, twice the steps:", ", ".join(f"{c['step']}: {100 * c['new']:.0f} %" for c in longer))

# %% [markdown]
# It had not finished. At a common rate a higher rank takes longer steps, so a sweep like the one above measures *speed*,
# not room. "LoRA Without Regret" (Schulman, 2025) says so of large models: on small data LoRA equals full tuning if it
# sits on every layer, and wants about ten times full's rate, at any rank. The pilot's rule found that tenfold by itself.
# (rsLoRA and DoRA tie size to rank differently; not tried.)
#
# ## How many directions did full tuning use?
#
# What share of the squared size of a change could a change of rank r hold (singular values)? Full tuning's own, LoRA's,
# and a null: random numbers in matrices of the same shapes.

# %%
def energy(deltas):
    """Share of the squared size in the first 1, 4, 8, 16 directions."""
    squares = [torch.linalg.svdvals(d.detach()).square() for d in deltas]
    return [sum(s[:r].sum() for s in squares).item() / sum(s.sum() for s in squares).item() for r in (1, 4, 8, 16)]


# %%
g = torch.Generator().manual_seed(seed)
null = energy([torch.randn(own.base.weight.shape, generator=g) for own in note.values()])
print("rank                  1    4    8   16")
print("random          ", *(f"{100 * e:3.0f} %" for e in null))
for task in TASKS:
    for arm in ("full", "lora-8"):
        es = [over_seeds(f"{task}.{arm}.energy_{r}").estimate for r in (1, 4, 8, 16)]
        print(f"{task:6} {arm:8} ", *(f"{100 * e:3.0f} %" for e in es))

# %%
spread = paired_effect(*([r[f"{t}.full.energy_8"] for r in per_seed] for t in ("note", "facts")))
print(f"full, 8 directions, note - facts: {100 * spread.estimate:+.0f} points "
      f"[{100 * spread.low:+.0f}, {100 * spread.high:+.0f}]")
for task in TASKS:
    print(f"{task:6} moved, of the matrices' size: " + ", ".join(
        f"{arm} {100 * over_seeds(f'{task}.{arm}.moved').estimate:.0f} %" for arm in ARMS[:5]))
show_evidence("peft_ranks", [f"{t}: intruder directions, lora-8 - full" for t in TASKS], claim=False)

# %% [markdown]
# Against the null, full tuning's change is concentrated, for form more than for facts: that is what low rank rests on
# (LoRA's own 100 % is by construction). Two warnings. LoRA of rank 8 moved the matrices about four times as far, most of
# it in *one* direction. And of the ten strongest directions of a tuned matrix 13 points more are new ones than after full
# tuning. Shuttleworth et al. (2024) call them intruders and tie them to forgetting. Keep that in mind.
#
# ## The verdict, at equal skill
#
# Where each curve crosses 30 % new skill, interpolated between two checkpoints; seeds in which an arm never got there
# cannot be compared and drop out.

# %%
first = recorded("peft_ranks")["effects"][0]
spared = Effect(first["estimate"], first["low"], first["high"], first["n"])
_ = card.settle(spared)

# %%
show_evidence("peft_ranks", [e for t in TASKS for e in (f"{t}: old exact kept, lora-8 - full",
                                                        f"{t}: old loss spared, full - lora-8",
                                                        f"{t}: steps to equal skill, lora-8 - full")]
              + ["old exact answers once their form is given, lora-8 - full"], claim=False)

# %% [markdown]
# Loss alone would hide what happened: it counts how *confidently* wrong an answer is. So here is everything at equal
# skill: exact old answers; exact once their first two tokens are given (who lost the skill, and who only speaks the new
# form?); loss; and how far the matrices moved.

# %%
print(f"{'at equal skill':22}{'seeds':>6}{'step':>6}{'old exact':>11}{'form given':>12}{'nats added':>12}{'moved':>8}")
for task in TASKS:
    for arm in (*FAST, *(f"{arm} fast" for arm in FAST)):
        rows_ = [r for r in per_seed if r[f"{task}.{arm}.at.reached"]]
        step, old, opened, nats, moved = (sum(r[f"{task}.{arm}.at.{k}"] for r in rows_) / max(1, len(rows_))
                                          for k in ("step", "old", "opened", "lost", "moved"))
        print(f"{task:6} {arm:15}{len(rows_):6}{step:6.0f}{100 * old:9.0f} %{100 * opened:10.0f} %{nats:12.2f}"
              f"{100 * moved:6.0f} %")

# %%
show_evidence("peft_ranks", [f"{t}: old loss spared by a tenth of the rate, {arm}" for t in TASKS for arm in FAST],
              claim=False)

# %% [markdown]
# Refuted, with the sign reversed: over the four seeds that can be compared (in the fifth, full tuning ended just short on
# the note) LoRA keeps 41 points *fewer* old answers exact. On facts that is clear, at the same number of steps; on the
# note the interval holds zero, and LoRA was there sooner, so a finer grid of rates might have spared more. Two things
# that the loss hides: once the form is given, a difference is no longer shown, so part of the loss is not skill but which
# question is being answered. And for LoRA a tenfold rate costs more than ten times what the choice of method does.

# %%
fig, axes = plt.subplots(1, 2, figsize=(9.4, 3.8), sharey=True)
families = {"full": ("full", "full fast"), "LoRA": ("lora-1", "lora-4", "lora-8", "lora-16", "lora-8 fast")}
for ax, task in zip(axes, TASKS):
    for (family, arms), (colour, marker, _, _) in zip(families.items(), SERIES):
        at = [{k: r[f"{task}.{a}.at.{k}"] for k in ("moved", "lost")} for a in arms for r in per_seed
              if r[f"{task}.{a}.at.reached"]]
        ax.scatter([100 * p["moved"] for p in at], [p["lost"] for p in at], color=colour, marker=marker, s=24, label=family)
    ax.set(title=task, xscale="log", xlabel="change of the matrices, % of their size")
    ax.set_yscale("symlog", linthresh=0.1)
    ax.minorticks_off()
    ax.set_xticks([3, 10, 30, 100], ["3", "10", "30", "100"])
axes[0].set_ylabel("loss added to old answers\n(nats a token, log scale above 0.1)")
axes[1].legend()
finish(fig, f"A point is one arm of one of {len(per_seed)} seeds at equal skill; arms that never got there are missing.",
       "changes made equal in size on purpose")

# %% [markdown]
# In both families, who moved much further forgot more, and at equal skill LoRA stands to the right: it reaches the skill
# through few directions and must push them harder. But full tuning's fast runs moved less and forgot as much: size is
# not the whole story, and nobody set it. Not shown: models ten thousand times as large (Biderman's), a smaller alpha,
# lower rates with more steps, replay (notebook 09).
#
# ## What it costs
#
# Gradients and optimiser state follow from a formula, 4 + 8 bytes a trained number in AdamW. What the forward pass keeps
# for the backward one does not: A's gradient needs the layer's input, as W's would. Bytes are measured, on one batch.

# %%
print(f"{'MB':10}{'trained':>10}{'weights':>9}{'grads + state':>15}{'kept for backward':>19}{'in all':>8}{'to full':>9}")
whole = None
for arm in ARMS:
    r = {k: per_seed[0][f"note.{arm}.{k}"] for k in ("n_trained", "held_bytes", "kept_bytes")}
    assert r["held_bytes"] == 12 * r["n_trained"]
    weights = 4 * (n_all + (0 if arm == "full" else r["n_trained"]))
    whole = whole or weights + r["held_bytes"] + r["kept_bytes"]
    total = weights + r["held_bytes"] + r["kept_bytes"]
    print(f"{arm:10}{r['n_trained']:10,.0f}{weights / 1e6:9.2f}{r['held_bytes'] / 1e6:15.2f}{r['kept_bytes'] / 1e6:19.1f}"
          f"{total / 1e6:8.1f}{total / whole:9.2f}")

# %% [markdown]
# The saving is real and it is in one column. On a large model and a short batch that column is most of the memory; here,
# as in any long context, the kept activations are, and the whole shrinks far less than the count of trained numbers.
# Seconds: the two arms take turns on the same batches, so that a busy machine is busy for both.

# %%
import time

from lifecycle_lib.lab.studies.small import batches_of
from lifecycle_lib.train.logprobs import answer_loss


# %%
def clocked(model, optimizer, batch):
    """CPU seconds of one training step."""
    begun = time.process_time()
    optimizer.zero_grad()
    answer_loss(model, batch)[0].backward()
    optimizer.step()
    return time.process_time() - begun


# %% tags=["nbval-ignore-output"]
racers = {arm: wear(lab.load(sft).cpu(), arm, seed, tok) for arm in ("full", "lora-1", "lora-8", "lora-16")}
optimizers = {arm: torch.optim.AdamW([p for p in m.parameters() if p.requires_grad]) for arm, m in racers.items()}
feed = batches_of(rows["note"][0], 16, seed)
taken = [{arm: clocked(m, optimizers[arm], feed(step)) for arm, m in racers.items()} for step in range(22)][2:]
for arm in racers:
    e = paired_effect([t[arm] / t["full"] for t in taken], [0.0] * len(taken))
    print(f"{arm:8} CPU seconds a step, to full: {e.estimate:.2f} [{e.low:.2f}, {e.high:.2f}], {len(taken)} steps")

# %% [markdown]
# No method here is twice as fast as another: the frozen weights still carry the forward pass and the gradient to the
# inputs. What LoRA skips, W's own gradient and update, it spends on two more products a layer.
#
# ## Other places to put few numbers
#
# **A bottleneck** (Houlsby et al. 2019) sits behind a layer, `y + up(gelu(down(y)))`, `up` zero at the start. Its
# nonlinearity cannot be folded into W: it is never merged. Count its numbers, train it, take it out.

# %%
from lifecycle_lib.lab.studies.adapters import old_rows
from lifecycle_lib.model.inserted import remove

# %%
old = old_rows(tok, seed)
housed = wear(lab.load(sft).cpu(), "bottleneck-8", seed, tok)
n_bottleneck = sum(p.numel() for p in housed.parameters() if p.requires_grad)
assert n_bottleneck == base.cfg.n_layer * 2 * (2 * 8 * base.cfg.n_embd)  # two a block, d x b down, b x d up

# %%
train(housed, rows["note"][0], Task(steps=60, batch=16, every=60), 3e-3, seed, dict)
print(f"{n_bottleneck:,} numbers, 60 steps at one untuned rate: {100 * score(housed, rows['note'][1])[0]:.0f} % of the "
      f"notes, {100 * score(housed, old)[0]:.0f} % of the old answers exact")

# %%
remove(housed)
assert weights_hash(housed) == hash_before
print("removed: the base's hash is what it was")

# %% [markdown]
# **A prefix** (Li & Liang 2021) is learned keys and values in front of every layer: memories of tokens nobody wrote. They
# live in the key-value cache, so serving needs no new code. Started from a real text it *is* that text's cache, which is
# a check, made here on a Llama twin (in our own model the first token also looks at its left neighbour's features, which
# a prefix does not hold).

# %%
from lifecycle_lib.model.gpt import GPT, GPTConfig
from lifecycle_lib.model.prefix import PrefixTuning

# %%
llama = GPT(GPTConfig(vocab_size=64, block_size=32, n_layer=2, n_head=2, n_embd=32, token_shift=False))
some = torch.randint(0, 64, (3, 9), generator=torch.Generator().manual_seed(seed))
head = [5, 9, 11, 2]
read = torch.cat((torch.tensor([head] * 3), some), 1)
own = PrefixTuning.from_tokens(llama, head)
assert (own(some) - llama(read)[:, 4:]).abs().max() < 1e-5
print(f"a prefix of 4 tokens, {own.k.numel() + own.v.numel()} numbers: the same as having read the four tokens")

# %% [markdown]
# It moves attention, not weights: it can only mix in values from a few more places. Li and Liang found training the keys
# and values themselves unstable and put an MLP behind them; ours has none, so the table above is a lower bound for
# prefixes. Against peft's `PrefixTuning`, value and gradient, for a prefix that nobody could have written:

# %%
from peft import PrefixTuningConfig

from lifecycle_lib.model.bridge import to_llama

# %%
peer = get_peft_model(to_llama(llama), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
own = PrefixTuning(llama, 4, torch.Generator().manual_seed(seed), std=0.5)
flat = lambda k, v: torch.stack([k, v], 1).permute(3, 0, 1, 2, 4).reshape(4, -1)  # noqa: E731
weight = peer.prompt_encoder["default"].embedding.weight

# %%
with torch.no_grad():
    weight.copy_(flat(own.k, own.v))
pair = own(some), peer(input_ids=some, attention_mask=torch.ones_like(some)).logits
for y in pair:
    y.square().sum().backward()
assert (pair[0] - pair[1]).abs().max() < 1e-5
assert (flat(own.k.grad, own.v.grad) - weight.grad).abs().max() < 1e-5
print(f"peft's prefix tuning: same logits, same gradient for all {weight.numel()} numbers")

# %% [markdown]
# ## Merge, and the way back
#
# Merging adds `delta` into W: no extra work at serving. Unmerging subtracts it again. How far from the base is what comes
# back, in weights and in the desk's answers? In int8 every merge means rounding the sum to codes again.

# %%
from lifecycle_lib.model.portfolio import config_of

cfg8 = config_of(note)


def apart(before, after):
    """Largest error in units of the mean |weight|, and the share of weights that are not what they were."""
    off = torch.cat([(after[p] - w).float().flatten() for p, w in before.items()])
    size = torch.cat([w.float().abs().flatten() for w in before.values()]).mean()
    return (off.abs().max() / size).item(), (off != 0).float().mean().item()


# %%
def there_and_back(dtype):
    """Merge and unmerge in this precision: how far apart, and exact old answers before and after."""
    model = lab.load(sft).cpu().to(dtype)
    before, first = {p: model.get_submodule(p).weight.clone() for p in note}, score(model, old)[0]
    again = lora.make_adapter(model, cfg8, seed)
    with torch.no_grad():
        for p, layer in again.items():
            layer.a.copy_(note[p].a), layer.b.copy_(note[p].b)
    lora.attach(model, again)
    lora.unmerge(model, lora.merge(model))
    lora.detach(model)
    return *apart(before, {p: model.get_submodule(p).weight for p in note}), first, score(model, old)[0]


# %%
def told(name, worst, changed, first, last):
    print(f"{name:9} worst error {worst:.0e} of a mean weight, {100 * changed:3.0f} % of the weights changed; old answers "
          f"exact {100 * first:.1f} % -> {100 * last:.1f} %")


for dtype in (torch.float64, torch.float32, torch.bfloat16):
    told(str(dtype)[6:], *there_and_back(dtype))

# %%
from lifecycle_lib.model.quantise import dequantise_weight, quantise_model, quantise_weight

codes = lambda w: dequantise_weight(*quantise_weight(w, "int8"), "int8")  # noqa: E731
w0 = {p: codes(base.get_submodule(p).weight) for p in note}  # the served int8 base, unpacked

# %%
with torch.no_grad():
    back = {p: codes(codes(w + note[p].delta()) - note[p].delta()) for p, w in w0.items()}
    ends = []
    for weights in (w0, back):
        served8 = lab.load(sft).cpu()
        for p, w in weights.items():
            served8.get_submodule(p).weight.copy_(w)
        ends.append(score(served8, old)[0])
told("int8", *apart(w0, back), *ends)

# %% [markdown]
# The weights do not come back: a hash fails in every row, and in int8 hardly one weight is what it was (its scale moved
# too). The answers did come back here, last column. So "roll back by subtracting" is a claim that only a test can make;
# keep the float base and the adapter's file, and rollback is a swap. A packed base cannot hold the sum at all:

# %%
packed = quantise_model(base, bits=4, group_size=32)
lora.attach(packed, lora.make_adapter(packed, cfg8, seed))

# %%
try:
    lora.merge(packed)
except ValueError as refusal:
    print("refused:", refusal)

# %% [markdown]
# ## One base, several adapters
#
# A portfolio holds adapters by name. `use` swaps, `use(None)` rolls back, `route` lets every row of one batch name its
# own adapter: the base multiplies the batch once, each adapter only its rows.

# %%
from lifecycle_lib.model.portfolio import Portfolio

shop = Portfolio(base, {"note": note, "facts": fact})
for name in ("note", "facts", None):
    shop.use(name)
    print(f"{name!s:6} logits differ from the base by {(base(ids) - plain).abs().max():.1f}")
assert torch.equal(base(ids), plain)

# %%
with torch.no_grad():
    alone = {}
    for name in ("note", "facts", None):
        shop.use(name)
        alone[name] = base(ids)
    names = ["note", None, "facts", "facts", None, "note", "note", None]
    shop.route(names)
    routed = base(ids)

# %%
apart = max((routed[i] - alone[n][i]).abs().max().item() for i, n in enumerate(names))
assert apart < 1e-4
print("one batch, three policies: every row is what its adapter alone would have said")

# %% [markdown]
# Same batch in peft: `adapter_names`. Three adapters' worth of answers from one model, and the same numbers?

# %%
mixed = get_peft_model(to_hf(lab.load(sft).cpu()), LoraConfig(r=8, lora_alpha=16, target_modules=list(cfg8.targets)),
                       adapter_name="note")
mixed.add_adapter("facts", LoraConfig(r=8, lora_alpha=16, target_modules=list(cfg8.targets)))

# %%
with torch.no_grad():
    for name, given in (("note", note), ("facts", fact)):
        for path, layer in given.items():
            twin = next(m for n, m in mixed.named_modules() if n.endswith(path) and hasattr(m, "lora_A"))
            twin.lora_A[name].weight.copy_(layer.a), twin.lora_B[name].weight.copy_(layer.b)
    his = mixed.eval()(input_ids=ids, adapter_names=[n or "__base__" for n in names]).logits
assert (his - routed).abs().max() < 1e-4
print("peft's mixed batch gives the same logits, row by row")

# %% [markdown]
# **Who routes?** Traffic of three kinds: the desk's own cases, notes, facts. Four ways to serve it: everything to the
# base; the true kind; a rule on the prompt's own text that knows what a note and what a fact look like, and sends
# everything else to the base; and a tenant table in which one shop in ten is listed under the wrong adapter.

# %%
import re

from lifecycle_lib.core.seeds import rng
from lifecycle_lib.desk.world import ITEMS, POLICY_IDS, REASONS
from lifecycle_lib.train.logprobs import Rows

# %%
kinds = {None: old, "note": rows["note"][1], "facts": rows["facts"][1]}
n_each = min(len(r.ids) for r in kinds.values())
traffic = [(kind, i) for kind in kinds for i in range(n_each)]


# %%
FACT = re.compile(rf".*<user>({'|'.join(ITEMS)}) ({'|'.join(REASONS)}) ({'|'.join(POLICY_IDS)})<bot>")


def rule(text):
    """What a prompt's own text says; what it does not know goes to the base."""
    return "note" if text.endswith("<note>") else "facts" if FACT.fullmatch(text) else None


def careless(text):
    """The same, with an adapter for the rest."""
    return "note" if text.endswith("<note>") else None if "<policy>" in text else "facts"


# %%
def by_rule(kind, i):
    """The rule, on the prompt of a row: what is neither answer nor padding."""
    asked = kinds[kind].ids[i][~kinds[kind].mask[i]].tolist()
    return rule(tok.decode([t for t in asked if t != tok.special["<pad>"]]))

# %%
draw = rng(seed, "tenants")
wrong = {None: "note", "note": "facts", "facts": None}
table = {t: wrong[t[0]] if draw.random() < 0.1 else t[0] for t in traffic}

# %%
routers = {"all to the base": lambda k, i: None, "true kind": lambda k, i: k, "rule on the prompt": by_rule,
           "tenant table": lambda k, i: table[k, i]}


# %%
def served(router):
    """Exact answers by kind of traffic, each adapter on the rows that the router sent to it."""
    right = {kind: 0.0 for kind in kinds}
    for adapter_name in (None, "note", "facts"):
        shop.use(adapter_name)
        for kind, r in kinds.items():
            pick = torch.tensor([i for i in range(n_each) if router(kind, i) == adapter_name], dtype=torch.long)
            if len(pick):
                right[kind] += score(base, Rows(r.ids[pick], r.mask[pick]))[0] * len(pick) / n_each
    shop.use(None)
    return right


# %%
for name, router in routers.items():
    missed = sum(router(k, i) != k for k, i in traffic) / len(traffic)
    share = served(router)
    print(f"{name:19} misrouted {100 * missed:3.0f} %   exact: desk {100 * share[None]:3.0f} %, "
          f"note {100 * share['note']:3.0f} %, facts {100 * share['facts']:3.0f} %")

# %% [markdown]
# With the right router the portfolio keeps the old skill in full, whatever the adapters forget while they are worn: the
# strongest case for adapters on this page is *isolation*. The price is that somebody must own the router. The rule's 0 %
# is cheap, though: it was written by someone who knew the three kinds. What about a stranger?

# %%
strangers = ["<bos><user>is anybody there<bot>", "<bos><order>A72052 chair 03d confirmed<user>thank you<bot>",
             f"<bos><user>{ITEMS[0]} {REASONS[0]}<bot>"]
for text in strangers:
    print(f"{text:62} rule: {rule(text)!s:6} careless: {careless(text)}")

# %% [markdown]
# A router fails safest when each adapter must be *earned* by a positive match: the unknown lands where all the old tests
# were run.

# %%
import tempfile
from pathlib import Path

import numpy as np

from lifecycle_lib.model.portfolio import load_portfolio

# %%
with tempfile.TemporaryDirectory() as folder:
    shop.save(Path(folder), {"note": {"owner": "shop 2", "rollback": "use(None)"}, "facts": {"owner": "shop 3"}})
    again = load_portfolio(Path(folder), lab.load(sft).cpu())
    sizes = {f.name: f.stat().st_size for f in Path(folder).glob("*.safetensors")}
    try:
        load_portfolio(Path(folder), lab.load(lab.base()).cpu())
    except ValueError as refusal:
        print("refused:", str(refusal).split(": ", 1)[1])
print(sizes, "bytes, beside", 4 * n_all, "for a full copy;", sorted(again.adapters))

# %% [markdown]
# ## Add two adapters up
#
# If note and facts live in different directions, their sum should have both skills. "cat" is the exact weighted sum of
# the two changes. peft's "linear" adds A to A and B to B, and `(B1 + B2)(A1 + A2)` has cross terms nobody trained.

# %%
from lifecycle_lib.lab.studies.adapters import ALPHAS
from lifecycle_lib.model.portfolio import combine

# %%
path = next(iter(note))
exact = 0.5 * note[path].delta() + 0.5 * fact[path].delta()
for how in ("cat", "linear"):
    off = (combine([(note, 0.5), (fact, 0.5)], how)[path].delta() - exact).norm() / exact.norm()
    print(f"{how:7} rank {config_of(combine([(note, 0.5), (fact, 0.5)], how)).rank:2}: distance from the true sum "
          f"{'0' if off < 1e-5 else 'over 10 %' if off > 0.1 else 'under 10 %'}")

# %%
fig, axes = plt.subplots(1, 2, figsize=(9.4, 3.4), sharey=True)
for ax, how in zip(axes, ("cat", "linear")):
    for task, (colour, marker, line, _) in zip(TASKS, SERIES):
        es = [over_seeds(f"merge.{how}.{a:g}+{1 - a:g}.{task}") for a in ALPHAS]
        ax.errorbar(ALPHAS, [100 * e.estimate for e in es], yerr=bars(es), color=colour, marker=marker, linestyle=line,
                    label=task)
        by_itself = [over_seeds(f"merge.alone.{w:g}.{task}").estimate for w in (ALPHAS if task == "note" else ALPHAS[::-1])]
        ax.plot(ALPHAS, [100 * a for a in by_itself], color=colour, linestyle=":", linewidth=1.2, label=f"{task}, alone")
    ax.set(title=how, xlabel="weight of the note adapter (facts: the rest)")
axes[0].set_ylabel("new answers that are exact (%)")
axes[1].legend()
finish(fig, f"n = {len(per_seed)} seeds; bars: 95 % t intervals, cut at 0 and 100; dotted: that adapter alone.",
       "adapters trained to be merged, TIES, DARE")

# %%
for how in ("cat", "linear"):
    both = ", ".join(f"{t} {100 * over_seeds(f'merge.{how}.1+1.{t}').estimate:.0f} %" for t in TASKS)
    half = ", ".join(f"{t} {100 * over_seeds(f'merge.{how}.0.5+0.5.{t}').estimate:.0f} %" for t in TASKS)
    print(f"{how:7} halves: {half};  weights 1 and 1: {both}")
print("alone at half its weight:", ", ".join(f"{t} {100 * over_seeds(f'merge.alone.0.5.{t}').estimate:.0f} %" for t in TASKS))
show_evidence("peft_ranks", ["two adapters added: weaker skill at the best alpha",
                             "cosine of the two adapters' changes"], claim=False)

# %% [markdown]
# Read the dotted lines first. Alone at half its weight neither adapter has its skill any more: what the halves lose is
# mostly *scale*. Interference shows at one and one: little is left of either, by the exact sum too. The cosine is that of
# any two unrelated changes of this size; for this one pair it predicted nothing. No weight keeps both skills. Here the
# answer is a router.
#
# **A stack cannot be unpicked.** Train facts *on top of* a merged note adapter, then take note away from under it: is
# what is left the facts adapter?

# %%
top = lab.load(sft).cpu()
under = lora.load_lora(tuned(lab, "note", "lora-8").file("adapter.safetensors"), top)
lora.attach(top, under)
lora.merge(top)
second = lora.make_adapter(top, cfg8, seed)
lora.attach(top, second)

# %%
_ = train(top, rows["facts"][0], TASKS["facts"], RATES["facts"]["lora-8"], seed, dict)
stacked = {t: score(top, rows[t][1])[0] for t in TASKS}

# %%
lora.detach(top)
lora.unmerge(top, under)  # note's change leaves the weights ...
lora.detach(top)
lora.attach(top, second)  # ... and the adapter that learnt on top of it stays
left = score(top, rows["facts"][1])[0]
print(f"note under facts: facts {100 * stacked['facts']:.0f} %, note {100 * stacked['note']:.0f} %; "
      f"note removed: facts {100 * left:.0f} % (trained alone: {100 * live['facts', 'lora-8']['curve'][-1]['new']:.0f} %)")

# %% [markdown]
# (One seed.) Order of removal matters: the second adapter was a correction to a model that no longer exists. Train
# adapters on the bare base if they are to come and go by themselves.
#
# ## A four-bit base under a full-precision adapter
#
# Packed weights stay frozen codes, A and B float beside them (QLoRA's arrangement). Two orders: train on the packed base,
# or train on the float one and pack afterwards. Which keeps the new skill? Recorded, five seeds:

# %%
show_evidence("peft_ranks", ["note: new skill on int4, trained there - packed after",
                             "facts: new skill on int4, trained there - packed after",
                             "note: new skill, int4 trained there - float",
                             "facts: new skill, int4 trained there - float"], claim=False)
for task in TASKS:
    print(f"{task:6} float base {100 * over_seeds(f'{task}.lora-8.new').estimate:.0f} %, packed after "
          f"{100 * over_seeds(f'{task}.packed_after.new').estimate:.0f} %, trained on int4 "
          f"{100 * over_seeds(f'{task}.int4+lora-8.new').estimate:.0f} %")

# %%
from lifecycle_lib.model.memory import weight_bytes

lora.detach(packed)
print(f"base {weight_bytes(base):,} bytes in float32, {weight_bytes(packed):,} packed; the packed one is another base:",
      weights_hash(packed)[:12] != hash_before[:12])
kept = {arm: per_seed[0][f"note.{arm}.kept_bytes"] / 1e6 for arm in ("lora-8", "int4+lora-8")}
print(f"kept for backward: {kept['lora-8']:.1f} MB on float, {kept['int4+lora-8']:.1f} MB on int4")

# %% [markdown]
# On facts, packing the base under a finished adapter costs skill, and training on the packed base does not; on the note
# nothing is shown either way. Hence: retest after packing. The kept bytes go *up* on int4: each layer unpacks its weight
# in every forward pass, and the backward pass needs it again (a real kernel unpacks twice instead).
#
# ## What an adapter costs a token
#
# Greedy decoding through the library, one request at a time, in CPU milliseconds a token: the base, the merged model, one
# adapter worn, sums of rank 16 and 64 worn. The five take turns, so that a busy machine is busy for all of them.

# %%
from lifecycle_lib.serve.engine import Engine

# %%
served_as = {"base": lab.load(sft).cpu()}

# %%
for label, n_copies in {"merged": 1, "one adapter, rank 8": 1, "sum of 2, rank 16": 2, "sum of 8, rank 64": 8}.items():
    served_as[label] = model = lab.load(sft).cpu()
    own = lora.load_lora(tuned(lab, "note", "lora-8").file("adapter.safetensors"), model)
    lora.attach(model, combine([(own, 1 / n_copies)] * n_copies))
_ = lora.merge(served_as["merged"])

# %% tags=["nbval-ignore-output"]
clock = {label: [] for label in served_as}
for case in draw_cases(20, seed, "latency"):
    for label, model in served_as.items():
        engine, begun = Engine(model, tok), time.process_time()
        engine.answer([case])
        clock[label].append(1000 * (time.process_time() - begun) / engine.tokens)
for label, times in clock.items():
    e = paired_effect([t / b for t, b in zip(times, clock["base"])], [1.0] * len(times))
    print(f"{label:20} {np.median(times):5.2f} ms a token, {100 * e.estimate:+4.0f} % "
          f"[{100 * e.low:+.0f}, {100 * e.high:+.0f}] over the base")

# %% [markdown]
# Merged, the same matrices hold other numbers: whatever its line shows is this clock's noise, so hold the others against
# that. Worn, two small products a layer cost calls more than arithmetic at this size. Isolation or speed: that is the
# trade.
#
# ## The quiet-hour p99
#
# A story in a simulation: an adapter that nobody asks for is dropped after `timeout`, and the next request waits for the
# reload. Requests come at random (Poisson) at rates made up here, few at night. In which hours is the slowest one in a
# hundred a reload?

# %%
RATE = np.array([3, 2, 1, 1, 2, 4, 12, 40, 90, 120, 140, 150, 140, 130, 130, 120, 110, 90, 60, 40, 25, 15, 8, 5])  # an hour
TIMEOUT_S, LOAD_MS, BUSY_MS = 900.0, 2500.0, 40.0


def days(n, seed):
    """Arrival times in s over n days, hour by hour. (requests,)"""
    g = np.random.default_rng(seed)
    return np.concatenate([np.sort(3600 * (24 * d + h) + 3600 * g.random(g.poisson(RATE[h])))
                           for d in range(n) for h in range(24)])


# %%
arrivals = days(400, seed)
cold = np.diff(arrivals, prepend=-1e9) > TIMEOUT_S
latency_ms, hour = BUSY_MS + LOAD_MS * cold, (arrivals // 3600 % 24).astype(int)
for h in (3, 6, 7, 8, 11, 21):
    here = hour == h
    print(f"{h:02}:00 {RATE[h]:4} an hour: cold {100 * cold[here].mean():5.1f} % (formula "
          f"{100 * np.exp(-RATE[h] * TIMEOUT_S / 3600):5.1f} %), p50 {np.percentile(latency_ms[here], 50):4.0f} ms, "
          f"p99 {np.percentile(latency_ms[here], 99):4.0f} ms")

# %% [markdown]
# A gap longer than the timeout has probability exp(-rate x timeout): p99 jumps where that passes 1 %, at about 18
# requests an hour here. (06:00 is colder than its own rate says: its first gap began in a quieter hour.) The vendor bills
# active time and shows a p50: neither sees it.
#
# ## An adapter gate
#
# Each adapter does its job. May it replace the desk's model for everybody? The release gate looks at the desk's frozen
# cases, where accuracy on notes says nothing. (Limits on JSON and invented labels are set where this SFT base itself
# passes with so few cases; what is left to decide is the drop in exact answers and the slices.)

# %%
from lifecycle_lib.judge.evals import evaluate, frozen_cases
from lifecycle_lib.judge.gates import GateConfig, decide

# %%
judged = frozen_cases(min(160, lab.profile.n_eval))
limits = GateConfig(min_cases=40, min_slice_cases=1, max_invented_claim_rate=0.5, min_json_validity=0.5)


def report(name, model):
    """The launch suite on a slice of the frozen cases, greedy."""
    engine = Engine(model, tok)
    return evaluate(name, engine.answer, judged, name, weight_bytes=weight_bytes(model),
                    p95_ms=engine.latency(judged[:3])["ttft_p95_ms"])


# %%
before = report("base", base)
after = {"switched off": report("off", base)}
for name, own in (("note worn", note), ("facts worn", fact)):
    lora.attach(base, own)
    after[name] = report(name, base)
    _ = lora.detach(base)

# %%
for name, r in after.items():
    print(f"{name:13} desk exact {100 * r['exact_pass']:3.0f} % (base {100 * before['exact_pass']:.0f} %): "
          f"{decide(r, before, limits)}")

# %% [markdown]
# Worn by everybody it is blocked, however well it does its own task; behind a router it never meets these cases.
# What must be rerun when something changes?
#
# | change | bytes that move | rerun | roll back |
# |---|---|---|---|
# | one adapter | one file | its tasks, shared suite, router | `use(None)`, at once |
# | adapter on packed base | one file | all of that on the packed base | swap |
# | merged adapter | the checkpoint | everything | the old checkpoint |
# | the base | the checkpoint, *every* adapter | everything, for every adapter | all of them together |

# %%
one, whole = sizes["note.safetensors"], 4 * n_all
print(f"bytes to move and to keep for rollback: adapter {one:,}, checkpoint {whole:,}; more than {whole // one} adapters "
      "weigh as much as one more checkpoint")

# %% [markdown]
# ## Break it on purpose
#
# Three bugs that train or serve without an error message, each with the check that catches it.

# %%
def check_start(make):
    """A fresh adapter leaves the logits as they are."""
    model = lab.load(sft).cpu()
    want = model(ids)
    make(model)
    return torch.equal(model(ids), want)


# %%
def check_merge(merge_fn):
    """Merged logits are the worn ones."""
    model = lab.load(sft).cpu()
    lora.attach(model, given := lora.load_lora(tuned(lab, "note", "lora-8").file("adapter.safetensors"), model))
    want = model(ids)
    merge_fn(model, given)
    return (model(ids) - want).abs().max().item() < 1e-2


# %%
def check_route(order):
    """Row i gets what names[i] asks for."""
    shop_ = Portfolio(base, {"note": note, "facts": fact})
    shop_.route(order(names))
    got = base(ids)
    shop_.use(None)
    return max((got[i] - alone[n][i]).abs().max().item() for i, n in enumerate(names)) < 1e-3


# %%
def random_b(model):
    for layer in wrap(model, rank, 2.0 * rank).values():
        nn.init.normal_(layer.B, std=0.02)


# %%
def forgets_scale(model, given):
    lora.detach(model)
    with torch.no_grad():
        for layer in given.values():
            layer.base.weight += layer.b @ layer.a


# %%
trials = {"starts as the base": (check_start, lambda m: wrap(m, rank, 2.0 * rank), random_b),
          "merged = worn": (check_merge, lambda m, g: lora.merge(m), forgets_scale),
          "rows keep their adapter": (check_route, list, lambda n: sorted(n, key=str))}
for name, (check, sound, broken) in trials.items():
    assert check(sound) and not check(broken)
    print(f"{name:24} sound passes, broken is caught: {check.__doc__}")

# %% [markdown]
# The third is what a server does that sorts its queue by adapter and forgets to unsort. And one that is no bug but a
# documented default of a merge: half an adapter plus half of the same adapter, by "linear".

# %%
twice = combine([(note, 0.5), (note, 0.5)], "linear")[path].delta()
print(f"half + half, 'linear': {(twice.norm() / note[path].delta().norm()).item():.2f} times the adapter")

# %% [markdown]
# ## Symptoms
#
# | you see | usually it is | look at |
# |---|---|---|
# | loss flat from step 1 | A and B both zero | their gradients |
# | worn right, merged wrong | alpha / rank forgotten or applied twice | merged against worn logits |
# | fine in float, poor in int4 | adapter never met the packed base | the base's hash |
# | sum of two adapters has neither skill | scale, interference | each alone at its weight |
# | old skill gone "although it is only an adapter" | it is worn on old traffic | the router |
# | p99 high at night only | reload after the keep-warm timeout | gap between requests |
# | forgets ten times more | a rate for speed | old answers at equal skill |
#
# Where does a strange adapter push, relative to its weights?

# %%
push = {p: (own.delta().norm() / own.base.weight.norm()).item() for p, own in note.items()}
for p in sorted(push, key=push.get)[:-4:-1]:
    print(f"{p:22} {100 * push[p]:.0f} % of the weights' size")

# %% [markdown]
# **Where no adapter helps.** Facts that change daily belong in the prompt (13). A wrong mixture is wrong at any rank (03).
# A suite that does not ask sees nothing (17). A slow queue stays slow (16).
#
# ## What you use at work
#
# peft on the same checkpoint: same start, same batches, same optimiser. Logits and gradients agreed at one point above;
# do the runs stay together? Five steps, then losses, weights and logits. Then `save_pretrained`, and the file on a fresh
# base: the same logits?

# %%
from peft import PeftModel

# %%
feed = batches_of(rows["note"][0], 16, seed)
ours = lab.load(sft).cpu()
lora.attach(ours, adapter := lora.make_adapter(ours, cfg8, seed))
theirs = get_peft_model(to_hf(lab.load(sft).cpu()), LoraConfig(r=8, lora_alpha=16, target_modules=list(cfg8.targets)))

# %%
twins = {p: next(m for n, m in theirs.named_modules() if n.endswith(p) and hasattr(m, "lora_A")) for p in adapter}
with torch.no_grad():
    for path, layer in adapter.items():
        twins[path].lora_A["default"].weight.copy_(layer.a)

# %%
def five_steps(params, loss_of):
    """AdamW at 1e-3 on five batches; the losses."""
    optimizer, losses = torch.optim.AdamW([p for p in params if p.requires_grad], lr=1e-3, weight_decay=0.0), []
    for step in range(5):
        loss = loss_of(feed(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# %%
def hf_loss(r):
    labels = r.ids.masked_fill(~r.mask, -100)
    return theirs(input_ids=r.ids, labels=labels).loss


# %%
a, b = five_steps(ours.parameters(), lambda r: answer_loss(ours, r)[0]), five_steps(theirs.parameters(), hf_loss)
assert max(abs(x - y) for x, y in zip(a, b)) < 1e-4
trained = [(u, v) for p, own in adapter.items() for u, v in ((own.a, twins[p].lora_A["default"].weight),
                                                             (own.b, twins[p].lora_B["default"].weight))]
with torch.no_grad():
    off = max(((u - v).norm() / v.norm()).item() for u, v in trained)
    logit = (ours(ids) - theirs(input_ids=ids).logits).abs().max() / ours(ids).abs().max()
assert off < 1e-2 and logit < 1e-3
print(f"five steps of peft and of ours: losses within 1e-4, every A and B within 1 %, logits within 0.1 % of the largest; "
      f"they fell: {a[-1] < a[0]}")

# %%
with tempfile.TemporaryDirectory() as folder:
    theirs.save_pretrained(folder)
    fresh = PeftModel.from_pretrained(to_hf(lab.load(sft).cpu()), folder).eval()
    files = sorted(f.name for f in Path(folder).iterdir() if f.name != "README.md")
with torch.no_grad():
    same = (fresh(input_ids=ids).logits - theirs.eval()(input_ids=ids).logits).abs().max().item()
assert same < 1e-4
print(files, "on a fresh base: the same logits")

# %% [markdown]
# (Not bit for bit: AdamW divides by the size of the gradient, so where one is nearly zero, rounding decides the first
# step.) peft's folder names its base by *path*, and loads onto any base of the same shape without a word. Ours carries
# the base's hash. At work, write the hash into the adapter's card and check it yourself.

# %% [markdown]
# ## The clinic
#
# An adapter passed its gate, was merged for speed, and came back.

# %%
from lifecycle_lib.lab import clinic

clinic.show(13)

# %%
case_book = {}
print(clinic.order_test(13, "largest difference of a logit", case_book))
print("healthy twin:", clinic.order_test(13, clinic.TWIN, case_book))

# %%
assert clinic.show_verdict(13, "merge_without_scale", case_book)

# %% [markdown]
# Scores would have found it a day later. Logits before and after the merge find it at once. The rest of the ward:
# `lifecycle clinic`.

# %% [markdown]
# ## Exercises
#
# **1. How many numbers? (★, 5 minutes).** `lora_numbers(shapes, rank)`: trained numbers for LoRA on matrices of these
# (O, I) shapes; and `break_even(O, I)`: the smallest rank at which LoRA trains at least as many numbers as W has.

# %% nbgrader={"grade": false, "grade_id": "numbers", "locked": false, "schema_version": 3, "solution": true, "task": false}
def lora_numbers(shapes, rank):
    ### BEGIN SOLUTION
    return sum(rank * (o + i) for o, i in shapes)
    ### END SOLUTION


def break_even(o, i):
    ### BEGIN SOLUTION
    return -(-o * i // (o + i))
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "numbers-tests", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
assert lora_numbers([(2, 3)], 4) == 20 and break_even(128, 128) == 64
### BEGIN HIDDEN TESTS
counted = get_peft_model(to_hf(lab.load(sft).cpu()), LoraConfig(r=5, target_modules=list(cfg8.targets)))
shapes_ = [tuple(base.get_submodule(p).weight.shape) for p in note]
assert lora_numbers(shapes_, 5) == counted.get_nb_trainable_parameters()[0]
assert all(break_even(o, i) * (o + i) >= o * i > (break_even(o, i) - 1) * (o + i) for o, i in ((7, 9), (640, 128)))
### END HIDDEN TESTS

# %% [markdown]
# **2. The best adapter there is (★★, 10 minutes).** Given a change D (O, I), `factors(D, r)` returns B (O, r) and A (r, I)
# with B A as near to D as rank r allows (Frobenius). With it you can *extract* an adapter from two checkpoints.

# %% nbgrader={"grade": false, "grade_id": "factors", "locked": false, "schema_version": 3, "solution": true, "task": false}
def factors(D, r):
    ### BEGIN SOLUTION
    U, S, V = torch.linalg.svd(D, full_matrices=False)
    return U[:, :r] * S[:r], V[:r]
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "factors-tests", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
given = torch.outer(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.0, 1.0]))
b_, a_ = factors(given, 1)
assert b_.shape == (2, 1) and a_.shape == (1, 3) and torch.allclose(b_ @ a_, given, atol=1e-5)
### BEGIN HIDDEN TESTS
D_ = np.random.default_rng(2).normal(size=(9, 7))
singular = np.linalg.svd(D_, compute_uv=False)
for r_ in (1, 3, 6):
    b_, a_ = factors(torch.tensor(D_), r_)
    error = np.linalg.norm(D_ - (b_ @ a_).numpy())
    assert abs(error - np.sqrt((singular[r_:] ** 2).sum())) < 1e-8  # Eckart and Young: nothing nearer exists
### END HIDDEN TESTS

# %% [markdown]
# **3. Equal skill (★★, 8 minutes).** Two runs, measured along the way. `forgotten_at(skill, lost, target)`: what a run has
# lost where its skill *first* crosses the target, linear between two checkpoints; None if it never does.

# %% nbgrader={"grade": false, "grade_id": "equal", "locked": false, "schema_version": 3, "solution": true, "task": false}
def forgotten_at(skill, lost, target):
    ### BEGIN SOLUTION
    for i, s in enumerate(skill):
        if s >= target:
            return lost[0] if i == 0 else lost[i - 1] + (target - skill[i - 1]) / (s - skill[i - 1]) * (lost[i] - lost[i - 1])
    return None
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "equal-tests", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
assert forgotten_at([0.0, 0.2, 0.6], [0.0, 1.0, 2.0], 0.3) == 1.25
assert forgotten_at([0.0, 0.2], [0.0, 1.0], 0.3) is None  # not its last checkpoint: that is not equal skill
### BEGIN HIDDEN TESTS
rise_ = np.sort(np.random.default_rng(3).random(12))  # where a curve only rises, numpy's interpolation is an oracle
cost_ = np.random.default_rng(4).random(12)
for target_ in (rise_[0] + 1e-6, 0.3, 0.5, rise_[-1]):
    assert abs(forgotten_at(list(rise_), list(cost_), target_) - np.interp(target_, rise_, cost_)) < 1e-9
assert abs(forgotten_at([0, 0.4, 0.1, 0.5], [0, 2, 3, 4], 0.3) - 1.5) < 1e-12  # the first crossing counts
### END HIDDEN TESTS

# %% [markdown]
# ## Quiz

# %%
from lifecycle_lib.lab.quiz import grade, interview, quiz

quiz("10")

# %%
answers_given = {}  # {"q1": "a", ...}
_ = grade("10", answers_given)

# %%
interview("10")

# %% [markdown]
# ## What to remember
#
# 1. B is zero so that the base answers until something is learnt; alpha / rank belongs to the adapter, merged or not.
# 2. LoRA saves gradients and optimiser state; hardly activations, hardly seconds. And not the old skill while it is worn:
#    at equal skill, each at its gentlest rate, it kept fewer old answers than full tuning. The rate cost more still.
# 3. A rank sweep at equal steps and one rate measures speed: rank 1 held the facts once it was allowed to finish.
# 4. Isolation is the gift: off is bit for bit, a router keeps the old skill. Merging gives that away for speed.
# 5. A packed base, or a new one, is another base. The hash says so; the suite says whether it matters.
#
# **Made:** nothing that stays beside the store. **Next:** `11_preferences_dpo` moves answers without new rows,
# `16_memory_quantization_latency` takes the bytes further.
