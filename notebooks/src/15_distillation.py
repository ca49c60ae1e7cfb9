# ---
# jupyter:
#   lifecycle:
#     rows: [S3-3.01, S3-3.02, S3-3.03, S3-3.06, S3-3.07, S3-3.08, S3-3.10, S3-3.11, S3-3.12, S3-3.16, S3-3.19, S3-3.20,
#       S3-3.22, S3-3.23, S3-3.25, S3-3.26, S3-3.28, S3-7.35]
# ---
# %% [markdown]
# # What must a small model be shown to stand in for a large one?
#
# A teacher can hand down more than answers: how sure it was, which answer it would have given next, which of your
# answers it prefers, where it looked things up. It hands down its faults by the same post. This notebook compresses your
# own model, and watches what travels.
#
# After this notebook you can:
#
# - say which constraint binds before you compress anything, and which tool moves it;
# - write the distillation loss, with its T squared and its direction, and check it against torch and TRL;
# - choose between logits, answers, rankings and traces by what they carry and what they cost;
# - make a student that beats its faulty teacher, and say what a verifier gives that filtering does not;
# - find a hole in your prompts without a single label;
# - train a student on its own words, and tell a better answer from a sharper one;
# - route with a confidence threshold, say what calibration does to that, and when a cascade cannot pay.
#
# **Needs** the finished chain (from the store, or built first in about 7 minutes of one CPU core). **Makes** no artifact.
# From a warm store it takes a little over a minute of one CPU core and 1.2 GB of memory, TRL included.

# %% tags=["parameters"]
profile = "laptop"
seed = 0
device = ""
live_steps = 40
temperature = 2.0

# %%
from lifecycle_lib.lab.notebook import start

lab = start("15", profile, seed, device)

# %% [markdown]
# ## The constraint comes first
#
# Nobody needs a small model. Somebody has a kiosk with 1 MB for weights, a chip that affords 0.55 million multiply-adds
# a token, and a floor: at most 5 points of exact pass below the teacher. Three constraints; which one binds? A token costs
# one multiply-add a weight, and for attention 2 T C a layer, counted here at T = 60 tokens, about a whole request.

# %%
from dataclasses import replace

import torch

from lifecycle_lib.model.memory import weight_bytes
from lifecycle_lib.model.quantise import quantise_model

teacher, tok = lab.load(lab.rlvr()).cpu(), lab.load_tokenizer()
LIMIT, CONTEXT = {"bytes": 1_000_000, "multiply-adds": 550_000}, 60
layers = sorted({0, teacher.cfg.n_layer - 1})  # the student will keep the first and the last layer

# %%
def keep_layers(model, kept):
    """A student made of some of its teacher's layers (the start that DistilBERT takes; Sanh et al. 2019)."""
    student = type(model)(replace(model.cfg, n_layer=len(kept)))
    weights = {k: v for k, v in model.state_dict().items() if not k.startswith("blocks.")}
    for new, old in enumerate(kept):
        weights |= {f"blocks.{new}.{k}": v for k, v in model.blocks[old].state_dict().items()}
    student.load_state_dict(weights)
    return student


# %%
def paths(model):
    return {"fp32": model, "int8": quantise_model(model, 8), "int4": quantise_model(model, 4)}


# %%
for who, model in (("teacher", teacher), ("student", keep_layers(teacher, layers))):
    for bits, packed in paths(model).items():
        products = model.n_params() + 2 * CONTEXT * model.cfg.n_embd * model.cfg.n_layer  # weights, then scores and sums of attention
        cost = {"bytes": weight_bytes(packed), "multiply-adds": products}
        print(f"{who} {bits}", *(f"{v:>10,} {k} {'ok ' if v <= LIMIT[k] else 'OVER'}" for k, v in cost.items()))

# %% [markdown]
# Read it before you train anything. If bytes bind, int8 alone is enough and nobody has to distil. Multiply-adds bind:
# rounding does not remove one. So a layer has to go, and the rest of this notebook asks what it costs. (Had latency been
# the limit, our int8 would even have lost: it unpacks in each forward.)
#
# A student without its middle layer is broken at first. How broken?

# %%
import copy

from lifecycle_lib.judge.evals import evaluate, frozen_cases
from lifecycle_lib.serve.engine import Engine

cases = frozen_cases(lab.profile.n_eval)
reports = {}

# %%
def exam(name, model, heat=0.0):
    """The frozen evaluation of a copy of `model`, kept in `reports`."""
    reports[name] = evaluate(name, Engine(copy.deepcopy(model), tok, heat, seed).answer, cases)
    return reports[name]["exact_pass"]


# %%
for name, model in (("teacher", teacher), ("layer cut", keep_layers(teacher, layers))):
    print(f"{name:9} exact pass {100 * exam(name, model):5.1f} %")

# %% [markdown]
# ## The claim
#
# What a teacher's probabilities are worth beside plain answers is measured where many students can be trained: on a
# small desk (`hat late 31 30 ->`, answer `yes` or `no`), a teacher of 112,000 parameters, students of 16,000.

# %%
from lifecycle_lib.lab.claims import ClaimCard

card = ClaimCard(
    claim="with 256 rows, a student learns more from its teacher's softened distributions (T = 4) than from the right "
          "answers: an estimate of 3 points or more, an interval above 0",
    direction="up", smallest=0.03, unit="share",
    falsifier="an estimate under 3 points, an interval that reaches 0, or distributions dealt out at random among rows with "
              "the same answer gain as much",
    scope="students a seventh of the teacher's size, 1,000 unseen cases, 5 seeds",
    not_measured="teachers that are wrong (below), other vocabularies, large models")
card.show()

# %% [markdown]
# ## A near miss, by hand
#
# Two cases, both answered `yes`. The window is 30 days; one parcel came back after 3, the other after 29. A label says
# `yes` twice. A teacher says .99 and .60: the second was close. That number is the lesson.
#
# How far is a student that says .50 from each? Kullback-Leibler by hand, then by the library.

# %%
from math import log

from lifecycle_lib.train.distil import divergence

two = lambda p: torch.tensor([[p, 1 - p]]).log()  # noqa: E731
for p in (0.99, 0.60):
    by_hand = p * log(p / 0.5) + (1 - p) * log((1 - p) / 0.5)
    got = divergence(two(0.5), two(p)).item()
    assert abs(got - by_hand) < 1e-6
    print(f"teacher {p:.2f}, student 0.50: {by_hand:.3f} nats (label alone: {log(2):.3f} both times)")

# %% [markdown]
# The label pulls equally hard on both. The teacher lets the close case stay close, which is where the boundary is.
#
# ## The loss on one screen
#
# Soften both distributions by a temperature T, so that the unlikely answers become visible; measure how far the student
# is from the teacher; multiply by T squared; mix with the ordinary loss on the label. `beta` picks the direction: 0 asks
# the student to cover all that the teacher would say, 1 to say only what the teacher would say. Between them stands GKD's
# generalised Jensen-Shannon divergence D, which compares both with a mixture.

# %% tags=["algorithm"]
import math

import torch.nn.functional as F


def kl(p, q):
    """KL(p || q) of log-probabilities, a row each. (M, V), (M, V) -> (M,)"""
    return (p.exp() * (p - q)).sum(-1)


def inline_loss(student, teacher, labels, T=2.0, alpha=1.0, beta=0.0):
    """(1 - alpha) * label loss + alpha * T^2 * divergence. Logits (M, V), labels (M,) -> a number."""
    s, t = F.log_softmax(student / T, -1), F.log_softmax(teacher / T, -1)
    if beta == 0:
        apart = kl(t, s)  # forward: dear where the teacher speaks and the student is silent
    elif beta == 1:
        apart = kl(s, t)  # reverse: dear where the student speaks and the teacher is silent
    else:
        m = torch.logsumexp(torch.stack([t + math.log(beta), s + math.log(1 - beta)]), 0)  # the mixture
        apart = beta * kl(t, m) + (1 - beta) * kl(s, m)
    soft = T**2 * apart.mean()  # softening shrinks the gradient by 1/T^2: give it back
    return (1 - alpha) * F.cross_entropy(student, labels) + alpha * soft


# %% [markdown]
# The judges: torch's `kl_div` (which takes its arguments the other way round) and TRL's `generalized_jsd_loss` (which
# leaves T squared to you). Value and gradient, 1e-5.

# %%
from importlib.util import find_spec

from lifecycle_lib.core.seeds import make_generator

has_trl = bool(find_spec("trl") and find_spec("datasets"))
if has_trl:
    from trl.experimental.gkd import GKDConfig, GKDTrainer
else:
    print("TRL is not installed here: torch and the library judge alone. pip install '.[peers]' brings it")

g = make_generator(seed, "oracle")
s = (2 * torch.randn(64, 40, generator=g)).requires_grad_()
t = 2 * torch.randn(64, 40, generator=g)
labels = torch.randint(0, 40, (64,), generator=g)

# %%
def kl_div(beta, T=2.0):
    a, b = (F.log_softmax(x / T, -1) for x in ((s, t) if beta == 0 else (t, s)))
    return T**2 * F.kl_div(a, b, reduction="batchmean", log_target=True)


# %%
for beta in (0.0, 0.3, 1.0):
    judged = {"inline": inline_loss(s, t, labels, beta=beta),
              "library": 4 * divergence(*(F.log_softmax(x / 2, -1) for x in (s, t)), beta).mean()}
    if has_trl:
        judged["TRL"] = 4 * GKDTrainer.generalized_jsd_loss(s[None], t[None], labels[None], beta=beta, temperature=2.0)
    judged |= {} if beta == 0.3 else {"torch": kl_div(beta)}
    grads = {name: torch.autograd.grad(loss, s)[0] for name, loss in judged.items()}
    apart = max((grads[n] - grads["inline"]).abs().max().item() for n in judged)
    assert apart < 1e-5 and max(abs(v.item() - judged["inline"].item()) for v in judged.values()) < 1e-5
    print(f"beta {beta}: {judged['inline'].item():.4f}, {', '.join(judged)} agree in value and gradient")

# %% [markdown]
# Is `beta` a dial from one KL to the other? Look at the middle number: no. D goes to 0 at both ends; what tends to the KLs is
# D / beta and D / (1 - beta) (Agarwal et al. 2024). At exactly 0 and 1 the code, as TRL's, jumps to the KLs by convention.

# %%
for beta in (0.001, 0.01, 0.5, 0.99, 0.999):
    d = inline_loss(s, t, labels, beta=beta).item()
    print(f"beta {beta:5}: D {d:.4f}", f"  D / beta {d / beta:.3f}" if beta < 0.1 else "",
          f"  D / (1 - beta) {d / (1 - beta):.3f}" if beta > 0.9 else "")

# %% [markdown]
# Whoever sweeps beta near an end sweeps the learning rate.
#
# ## Break it on purpose
#
# Two bugs that train without an error. First: T squared forgotten. Then: the arguments of `kl_div` swapped.

# %%
def pull(T, squared=True):
    """Length of the gradient at the student's logits."""
    loss = inline_loss(s, t, labels, T=T) / (1 if squared else T**2)
    return torch.autograd.grad(loss, s)[0].norm().item()


# %%
for T in (1.0, 2.0, 4.0, 8.0):
    print(f"T {T:.0f}: gradient {pull(T):.3f}   T squared forgotten: {pull(T, False):.3f}")
check_scale = lambda p: p(8.0) > 0.2 * p(2.0)  # noqa: E731
assert check_scale(pull) and not check_scale(lambda T: pull(T, False))

# %%
teacher_says = torch.tensor([[0.49, 0.49, 0.02]]).log()  # two good answers
one_answer, hedge = torch.tensor([[0.96, 0.02, 0.02]]).log(), torch.tensor([[0.3, 0.3, 0.4]]).log()
for name, beta in (("forward", 0.0), ("reverse", 1.0)):
    print(f"{name}: one of the two answers {divergence(one_answer, teacher_says, beta).item():.2f} nats, "
          f"both and some nonsense {divergence(hedge, teacher_says, beta).item():.2f}")
assert divergence(one_answer, teacher_says, 0.0) > divergence(hedge, teacher_says, 0.0)
assert divergence(one_answer, teacher_says, 1.0) < divergence(hedge, teacher_says, 1.0)

# %% [markdown]
# With T squared forgotten, a student at T = 8 and alpha = .5 trains on labels almost alone, and the curve looks fine (the
# clinic below has such a student). At alpha = 1, as in every run of this notebook, nothing is left to weigh it against: AdamW
# and Muon ignore a loss's scale, and the bug sleeps until somebody adds labels. With the direction swapped, a student that
# cannot match everything prefers one of the two good answers to both with some nonsense. Both bugs pass a review by eye.
#
# ## Predict
#
# What do 256 rows of teacher logits gain over 256 right answers? A colleague writes: about 4 points, probably.

# %%
card.predict(estimate=0.04, confidence=0.70)
filter_repairs_greedy = True  # "a verifier in front of greedy answers makes the student better than its teacher"

# %% [markdown]
# ## Ask the teacher once, and keep what it said
#
# The transfer set is 2,560 prompts from the log of closed tickets, right answers attached. The teacher reads each once.
# Of its 640 probabilities a token we keep the 16 largest and put the rest in one bucket. Merging can only lower the
# divergence, so the kept loss never exaggerates.

# %%
from lifecycle_lib.desk.cases import draw_cases
from lifecycle_lib.train.distil import teacher_targets
from lifecycle_lib.train.logprobs import pad_rows
from lifecycle_lib.train.sft import encode_rows

n_rows = 64 * live_steps

# %%
def rows_of(asked):
    """Training rows with the right answers."""
    encoded = encode_rows(tok, [{"prompt": c.prompt, "answer": c.answer} for c in asked])
    return pad_rows([p for p, _ in encoded], [a for _, a in encoded], tok.special["<pad>"])


# %%
closed_tickets = [c for c in draw_cases(2 * n_rows, seed, "distil") if c.slice != "unconfirmed"][:n_rows]
rows = rows_of(closed_tickets)
targets = teacher_targets(teacher, rows, temperature, top_k=16)
whole = len(targets.logp) * tok.vocab_size * 4
print(f"{len(rows.ids)} rows, {len(targets.logp):,} answer tokens; kept {targets.nbytes / 1e6:.1f} MB, all of it would be "
      f"{whole / 1e6:.0f} MB")
print(f"mass in the rest bucket at T = {temperature:.0f}: {100 * targets.rest:.1f} %")

# %% [markdown]
# The student starts from the cut and sees the teacher's distributions.

# %%
from functools import partial

from lifecycle_lib.train.distil import distil_batches, distil_loss
from lifecycle_lib.train.loop import FitConfig, fit


def train(student, rows, targets, steps, label, **rates):
    """Train in place; returns the history."""
    for p in student.parameters():
        p.requires_grad_(True)
    return fit(student, distil_batches(rows, targets, 64, seed), partial(distil_loss, alpha=1.0),
               FitConfig(steps=steps, checkpoint_every=10_000, **rates), label=label).history


# %%
students = {}
students["logits"] = keep_layers(teacher, layers)
train(students["logits"], rows, targets, live_steps, "logits")
print(f"logits, {len(rows.ids)} closed tickets: exact pass {100 * exam('logits', students['logits']):.1f} %")
assert lab.profile.name == "smoke" or reports["logits"]["exact_pass"] > reports["layer cut"]["exact_pass"] + 0.2

# %% [markdown]
# Would right answers have done as well? Where do soft targets pay? One seed of one student cannot say. Over five seeds of the
# small desk, every student 300 steps of 64 rows:

# %%
import matplotlib.pyplot as plt
import numpy as np

from lifecycle_lib.core.stats import paired_effect
from lifecycle_lib.lab.claims import recorded
from lifecycle_lib.lab.figures import SERIES, style

needed = recorded("distillation")["per_seed"]
SIZES = (64, 256, 1024, 4096)

# %%
def mean_of(rows, key):
    """Effect of one recorded number over seeds, in percent."""
    return paired_effect([100 * r[key] for r in rows], [0.0] * len(rows))


# %%
def bars(effects):
    """matplotlib's (2, n) error bars."""
    return [[e.estimate - e.low for e in effects], [e.high - e.estimate for e in effects]]


# %%
def finish(fig, facts, not_measured):
    """n and kind of interval under the axes, and what the figure does not show."""
    fig.supxlabel(f"{facts}\nNot measured here: {not_measured}.", x=0.01, ha="left", fontsize=9, color="#606060")
    plt.show()


# %%
def share_of(study, name):
    """A recorded share as text, in percent."""
    e = next(e for e in recorded(study)["effects"] if e["name"] == name)
    return f"{100 * e['estimate']:.0f} % [{100 * e['low']:.0f}, {100 * e['high']:.0f}]"


# %%
style()
fig, ax = plt.subplots(figsize=(7.2, 4.2))
drawn = {"logits": "teacher's distributions, T = 4", "truth": "right answers", "greedy": "teacher's greedy answers"}
for (arm, label), (colour, marker, line, _), shift in zip(drawn.items(), SERIES, (1, 1.05, 0.95)):
    e = [mean_of(needed, f"{arm}.{n}.right") for n in SIZES]
    ax.errorbar([n * shift for n in SIZES], [x.estimate for x in e], bars(e), color=colour, marker=marker, linestyle=line,
                label=label)
for arm, label, marker, shift in (("shuffled", "256 rows: another row's distribution", "x", 1.15),
                                  ("cool", "256 rows: distributions at T = 1", "+", 0.87)):
    e = mean_of(needed, f"{arm}.256.right")
    ax.errorbar([256 * shift], [e.estimate], bars([e]), fmt=marker, color=SERIES[3][0], label=label)
ax.set_xscale("log")
ax.set_xticks(SIZES, SIZES)
ax.minorticks_off()
ax.set(xlabel="rows", ylabel="right on unseen cases (%)", title="Near misses are worth rows")
ax.legend(loc="lower right")
finish(fig, f"n = {len(needed)} seeds, 1,000 unseen cases each; bars: 95 % t intervals over seeds.",
       "larger students, teachers with another vocabulary")

# %%
from lifecycle_lib.lab.claims import show_evidence

for n in SIZES:
    print(f"{n:5} rows:", ", ".join(f"{arm} {mean_of(needed, f'{arm}.{n}.right').estimate:.1f} %" for arm in drawn))
verdict = card.settle(paired_effect([r["logits.256.right"] for r in needed], [r["truth.256.right"] for r in needed]))
show_evidence("distillation", ["right, logits - right answers, 256 rows", "right, logits - shuffled logits, 256 rows",
                               "right, logits at T = 4 - at T = 1, 256 rows", "right, logits at T = 1 - right answers, 256 rows",
                               "right, shuffled logits - right answers, 256 rows"])

# %% [markdown]
# The shuffled control is what makes this a finding. Its distributions are as soft, deal out the same confidence, and
# belong to other rows with the same answer: one level of label smoothing, whose own gain over labels is not shown either way.
# What helps is knowing *which* case was close. Whether T = 1 helps is open too: read the interval.
#
# One doubt remains. 300 steps of 256 rows are 75 epochs: labels may overfit where distributions do not. So let each signal
# stop where 200 held-out cases say, at 30, 100 or 300 steps:

# %%
show_evidence("distil_controls", [f"right, logits - right answers, {n} rows, each at its best length" for n in (256, 64)]
              + [f"best length, {kind}, {n} rows" for n in (256, 64) for kind in ("logits", "truth")])

# %% [markdown]
# The doubt is not borne out: nearly every choice fell on 300 steps, the longest on offer, for labels as for distributions, and
# the gain stays. Longer runs, other optimisers and a tuned smoothing were not tried.
#
# ## The scorecard
#
# Back to your own student. Paired with its teacher, case by case, by slice: the mean first.

# %%
from lifecycle_lib.core.stats import mcnemar_exact


def right_on(name, kept=lambda row: True):
    return np.array([row["exact"] for row in reports[name]["cases"] if kept(row)], dtype=float)


# %%
def interval(difference):
    """95 % bootstrap interval over cases, in points."""
    boot = np.random.default_rng(0).choice(100 * difference, (2000, len(difference))).mean(1)
    return np.percentile(boot, [2.5, 97.5])


# %%
def compare(a, b, kept=lambda row: True):
    """Exact pass of a and b, their paired difference in points with its interval, and McNemar's p."""
    x, y = right_on(a, kept), right_on(b, kept)
    low, high = interval(y - x)
    p = mcnemar_exact(int((x > y).sum()), int((y > x).sum()))
    return (f"{100 * x.mean():5.1f} -> {100 * y.mean():5.1f} %  {100 * (y - x).mean():+5.1f} [{low:+.1f}, {high:+.1f}]  "
            f"p {p:.3f}")


# %%
slices = sorted({row["slice"] for row in reports["teacher"]["cases"]})
print(f"{'all':12}", compare("teacher", "logits"))
for part in slices:
    print(f"{part:12}", compare("teacher", "logits", lambda row, part=part: row["slice"] == part))
lost = {part: int((right_on("teacher", k) - right_on("logits", k)).sum()) for part in slices
        for k in [lambda row, part=part: row["slice"] == part]}
print("cases lost, net:", lost)

# %% [markdown]
# The mean fell; a layer is gone and training took seconds. Now look at `unconfirmed`: damage that nobody confirmed, where
# a wrong answer pays out money. It fell by far the most, and it is 8 % of the cases: a mean can look mended while
# this stays as it is. What happened? (Other slices fell too; the control below tells the two apart.)
#
# ## A hole, found without labels
#
# Closed tickets hold no unconfirmed damage: those stay open until somebody looks. The transfer set inherited the gap.
# Labels would show it, but served prompts have none. The teacher is a stand-in: let both answer 512 served prompts, and
# ask *where* they disagree.

# %%
import json
from collections import Counter

served = draw_cases(512 if lab.profile.name != "smoke" else 48, seed, "served")
prompts = [c.prompt for c in served]
said = {name: Engine(copy.deepcopy(model), tok, 0.0, seed).sample(prompts)
        for name, model in (("teacher", teacher), ("student", students["logits"]))}
texts = {name: [tok.decode(ids[:-1]) for ids in out.ids] for name, out in said.items()}

# %%
def kind(answer):
    """What the teacher read in the case: reason and status, from its own quote."""
    try:
        quote = json.loads(answer)["evidence"]
        return f"{quote.split()[0]}, {quote.split()[-1]}" if quote else "no policy"
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return "unreadable"


# %%
apart = [a != b for a, b in zip(texts["teacher"], texts["student"])]
seen, differ = (Counter(kind(a) for a, d in zip(texts["teacher"], apart) if d or every) for every in (True, False))
doubt_of = {name: -np.mean([sum(lp) for lp, a in zip(said["student"].logps, texts["teacher"]) if kind(a) == name]) for name in seen}
for name, n in sorted(seen.items(), key=lambda kv: -differ[kv[0]] / kv[1]):
    print(f"{name:22} {n:4} served, student disagrees in {100 * differ[name] / n:3.0f} %, its own doubt {doubt_of[name]:.2f} nats an answer")

# %% [markdown]
# One line of disagreement stands out, and it names the hole. Could the student have told us itself, by being unsure? The last
# column is its doubt, grouped the same way. And ungrouped: how much of the top of the list is unconfirmed damage?

# %%
doubt = np.argsort([sum(lp) for lp in said["student"].logps])
hidden = np.array([c.slice == "unconfirmed" for c in served])
top = max(1, int(hidden.sum()))
by_apart = np.mean(hidden[np.array(apart)]) if any(apart) else 0.0
print(f"unconfirmed damage: {100 * hidden.mean():.0f} % of traffic, {100 * by_apart:.0f} % of disagreements, "
      f"{100 * hidden[doubt[:top]].mean():.0f} % of the {top} answers the student doubts most")
show_evidence("distillation", ["hole found by disagreement - by the student's doubt", "recalls right, prompts with recalls",
                               "recalls right, prompts without", "recalls right, 64 recalls added",
                               "all right, prompts without recalls - with"], claim=False)

# %% [markdown]
# On the small desk the prompts lacked recalls, one case in ten. The student failed most of those past their window; its own
# doubt found about twice as many of them as chance, the teacher two of three. **A student's doubt is a poor guide to what it
# was never shown.** (Grouped by kind, above, it is less blind, with no gap to act on.) Ask a model that was.
#
# The repair needs no new labels either: a few prompts of the missing kind, the teacher's word on them, some old rows
# beside them. Two controls: as many more steps on old rows alone, and a student whose prompts had no hole to begin with.

# %%
missing = [c for c in draw_cases(9000, seed, "targeted") if c.slice == "unconfirmed"]
n_new = 6 * live_steps
mended = rows_of(missing[:n_new] + closed_tickets[:3 * n_new])
everything = rows_of(draw_cases(n_rows, seed, "distil"))  # as the closed tickets were drawn, nothing left out
for name, begin, shown, how in (
        ("repaired", students["logits"], mended, {"optimizer": "adamw", "lr": 1e-3, "warmup_steps": 2}),
        ("old rows", students["logits"], rows_of(closed_tickets[:4 * n_new]), {"optimizer": "adamw", "lr": 1e-3, "warmup_steps": 2}),
        ("no hole", keep_layers(teacher, layers), everything, {})):
    students[name] = copy.deepcopy(begin)
    train(students[name], shown, teacher_targets(teacher, shown, temperature, top_k=16),
          live_steps if name == "no hole" else max(2, live_steps * 2 // 5), name, **how)
    exam(name, students[name])

# %%
for name in ("old rows", "repaired", "no hole"):
    print(f"logits -> {name}")
    for part in slices:
        print(f"  {part:12}", compare("logits", name, lambda row, part=part: row["slice"] == part))
print(f"{'all':14}", compare("teacher", "repaired"), " (teacher -> repaired)")

# %% [markdown]
# Old rows mend what more training mends, and not the hole. Without a hole `unconfirmed` never fell, and the other slices fell
# as far: that loss is the missing layer's and the short training's.
#
# Is it inside the floor of 5 points? The interval answers, not the estimate: if its lower end reaches below -5, the floor
# is not shown to hold, and a gate should say so.

# %%
floor = -5.0
low, _ = interval(right_on("repaired") - right_on("teacher"))
print(f"lower end {low:+.1f} points against a floor of {floor:+.0f}: "
      f"{'holds' if low >= floor else 'not shown to hold; train longer, keep a wider student, or route (below)'}")

# %% [markdown]
# ## A teacher with faults
#
# Teachers supply signal, not truth. The small desk's second teacher learnt from clerks who let hats through late in 7
# cases of 10. Decoded greedily it is wrong on every late hat: 8 % of all cases. You have a perfect verifier: it knows the rule.
# A colleague puts it in front of the teacher's greedy answers: wrong ones are dropped, so the student is better than the
# teacher. Your forecast is above.

# %%
faults = recorded("teacher_faults")["per_seed"]
ARMS = {"truth": "right answers (control)", "logits": "logits", "sampled": "1 sample", "greedy": "greedy",
        "greedy + filter": "greedy, verified", "sampled + filter": "1 sample, verified",
        "sampled x 8 + filter": "first right of 8", "hot x 8 + filter": "first right of 8, T = 2"}
wrong = {arm: mean_of(faults, f"{arm}.hat_wrong") for arm in ("teacher", *ARMS)}
right = {arm: mean_of(faults, f"{arm}.right") for arm in ("teacher", *ARMS)}

# %%
fig, axes = plt.subplots(1, 2, figsize=(9.6, 4.2), sharey=True)
y = range(len(ARMS), -1, -1)
for ax, part, title in ((axes[0], wrong, "Late hats let through (%)"), (axes[1], right, "Right on all unseen cases (%)")):
    e = list(part.values())
    ax.errorbar([x.estimate for x in e], list(y), xerr=bars(e), fmt="o", color=SERIES[0][0])
    ax.set(title=title, xlabel="percent")
axes[1].axvline(right["teacher"].estimate, color="#808080", linestyle="--", linewidth=1.2)
axes[0].set_yticks(list(y), ["TEACHER, greedy", *ARMS.values()])
finish(fig, f"n = {len(faults)} seeds; bars: 95 % t intervals over seeds; dashed: the greedy teacher.",
       "verifiers that are wrong themselves (below)")

# %%
for arm in ("teacher", *ARMS):
    covered = [r[f"{arm}.hat_coverage"] for r in faults if f"{arm}.hat_coverage" in r]
    cover = f"late hats with a target {100 * np.mean(covered):3.0f} %" if covered else ""
    print(f"{arm:22} late hats wrong {wrong[arm].estimate:5.1f} %   right {right[arm].estimate:.1f} %   {cover}")
show_evidence("teacher_faults", ["right, 8 samples + filter - greedy teacher", "right, 8 samples + filter - sampled teacher",
                                 "right, greedy answers + filter - greedy answers", "right, 8 samples + filter - truth"])
for arm in ("greedy + filter", "sampled x 8 + filter"):
    print(f"late hats wrong by seed, {arm:21}", *(f"{100 * r[f'{arm}.hat_wrong']:4.0f}" for r in faults))
beaten = paired_effect([r["greedy + filter.right"] for r in faults], [r["teacher.right"] for r in faults]).low > 0
print("forecast, greedy answers behind a verifier beat the teacher:",
      "right" if beaten == filter_repairs_greedy else "not shown")

# %% [markdown]
# **A filter can only drop; it cannot write.** In front of greedy answers it left next to no late hat: the fault became a hole,
# and what a student does there is luck. Eight samples give it something to pick, and the student beats its teacher.
#
# By how much? By what the verifier knows: verified samples and right answers end level. With two possible answers, refusing
# `yes` *is* saying `no`: a perfect verifier is a label. Filtering earns its price where checking is easier than writing. And
# verifiers err. This one passes one wrong answer in ten:

# %%
for arm in ("greedy + leaky filter", "sampled x 8 + leaky filter"):
    print(f"{arm:27}", ", ".join(f"{what} {share_of('distil_controls', f'{what}, {arm}')}" for what in (
        "late hats with a target", "late hats wrong", "confidence in the wrong yes", "right")))

# %% [markdown]
# Behind greedy answers the fault is back: every late hat it passes is wrong, and one with a target in nine teaches the rule of
# the clerks. Behind eight samples a right answer mostly comes first: most of the gain survives, with the verifier's error as
# the student's doubt. A verifier's error rate counts where the teacher is *always* wrong.
#
# Hotter is no free lunch. What does an accepted target cost?

# %%
for arm in ("greedy + filter", "sampled + filter", "sampled x 8 + filter", "hot x 8 + filter", "hot + filter"):
    cost, cover = (np.mean([r[f"{arm}.{k}"] for r in faults]) for k in ("tokens_per_target", "coverage"))
    print(f"{arm:21} {cost:5.1f} tokens a target, {100 * cover:3.0f} % of prompts covered, student "
          f"{mean_of(faults, f'{arm}.right').estimate:.1f} % right")
show_evidence("teacher_faults", ["right, sampled + filter - sampled x 8 + filter", "right, hot x 8 + filter - sampled x 8 + "
                                 "filter", "right, hot - sampled x 8 + filter"], claim=False)

# %% [markdown]
# The expected best point between cold and hot did not show. Greedy fails for want of anything to pick, heat without a
# verifier costs points, and behind the verifier everything sampled ends level: one sample did what eight did, at an
# eighth of the price, because some covered hats were enough for the rule to generalise. Buy candidates when a slice stays
# empty, not by habit.
#
# ## What rides along: habits
#
# Two closing words, each in 30 % of the clerks' answers. `regards` is spread evenly. `kindly` sits in one kind of case,
# where two answers of three carry it. What does each signal make of them?

# %%
for word in ("kindly", "regards"):
    row = [f"{arm} {mean_of(faults, f'{arm}.{word}').estimate:.0f} %" for arm in ("teacher", "logits", "sampled", "greedy")]
    print(f"{word:8}", ",  ".join(row))

# %% [markdown]
# Logits and samples hand a habit down at its rate. Greedy answers hand down the majority *of each context*: the even
# habit vanishes, the clustered one grows by half. "Greedy amplifies" and "greedy cleans" are both true; ask how the habit
# is spread.
#
# Your own chain has such a habit: the SFT checkpoint claims labels it never made. As a teacher, what would it write?

# %%
from lifecycle_lib.judge.verifiers import full_verifier

sft_prompts = served[:128]
for heat in (1.0, 0.0):
    wrote = lab.engine(lab.sft(), heat).answer(sft_prompts)
    claims = sum("label_created" in text for text in wrote)
    passed = [full_verifier(text, case) for text, case in zip(wrote, sft_prompts)]
    kept = sum("label_created" in text for text, ok in zip(wrote, passed) if ok)
    print(f"SFT teacher at temperature {heat:.0f}: claims in {100 * claims / len(wrote):.0f} % of the targets; "
          f"{100 * np.mean(passed):.0f} % pass the verifier, claims left among those: {kept}")

# %% [markdown]
# ## What rides along: confidence
#
# On late hats the teacher says `yes` with probability .7: it has its doubts. How sure is each student of the same mistake?

# %%
sure = {arm: mean_of(faults, f"{arm}.hat_yes") for arm in ("teacher", "logits", "sampled", "greedy")}
print(", ".join(f"{arm} {e.estimate:.0f} %" for arm, e in sure.items()))
show_evidence("teacher_faults", [f"{what}, {arm} - teacher" for what in ("confidence in the wrong yes", "calibration error")
                                 for arm in ("logits", "sampled", "greedy")], claim=False)

# %% [markdown]
# Greedy answers carry the mistake and drop the doubt: the same error, now certain. Samples spread it over many answers.
# Logits (here at T = 1, along sampled answers, as many rows as the others) hand it down case by case, with the narrowest
# interval. If somebody downstream routes by confidence, that difference is the product.
#
# ## Students that teach students
#
# Five generations: each trains a fresh student on answers of the one before to fresh prompts (model collapse, Shumailov et
# al. 2024). Sampled; greedy; sampled and verified; and sampled, with half of each generation's rows from the clerks' own
# file (Gerstgrasser et al. 2024). Generation 0 read 16,384 rows and is seven times larger: compare 5 with 1.

# %%
kept_file = recorded("distil_controls")["per_seed"]
LINES = {"self": ("sampled", faults), "self greedy": ("greedy", faults), "self + filter": ("sampled, verified", faults),
         "self + file": ("sampled, beside the file", kept_file)}
fig, axes = plt.subplots(1, 2, figsize=(9.6, 3.8))
for (line, (label, source)), (colour, marker, dash, _) in zip(LINES.items(), SERIES):
    e = [mean_of(faults, "teacher.right")] + [mean_of(source, f"{line}.{g}.right") for g in range(1, 6)]
    axes[0].errorbar(range(6), [x.estimate for x in e], np.array(bars(e)), color=colour, marker=marker, linestyle=dash, label=label)
    if line in ("self", "self + file"):
        e = [mean_of(kept_file, "teacher.entropy_given")] + [mean_of(kept_file, f"{line}.{g}.entropy_given") for g in range(1, 6)]
        axes[1].errorbar(range(6), [x.estimate / 100 for x in e], np.array(bars(e)) / 100, color=colour, marker=marker, linestyle=dash)
axes[0].set(title="Right (%)", xlabel="generation (0: the faulty teacher)", ylabel="right on unseen cases (%)")
axes[1].set(title="Variety, the prompt given", xlabel="generation", ylabel="entropy of an answer (nats)")
axes[0].legend()
finish(fig, f"n = {len(faults)} seeds, 1,024 rows a generation, half of them old beside the file; bars: 95 % t intervals over seeds.",
       "more generations, generations that continue from the same weights")

# %%
show_evidence("teacher_faults", [f"right, generation 5 - 1, {line}" for line in ("self", "self greedy", "self + filter")], claim=False)
show_evidence("distil_controls", ["right, generation 5, beside the file - alone"]
              + [f"{what}, generation 5 - 1, {line}" for line in ("self", "self + file")
                 for what in ("right", "entropy of an answer given its prompt", "regards")], claim=False)
for line, (label, source) in LINES.items():
    print(f"{label:25} right by generation:", *(f"{mean_of(source, f'{line}.{g}.right').estimate:.1f}" for g in range(1, 6)))

# %% [markdown]
# Each generation adds its own errors, and narrows: the entropy of an answer *given its prompt* nearly halves, the rarer word
# fades. (Pooled over prompts it rises: errors look like variety.) Old rows slow both; what they save by generation 5 only just
# clears 0. Behind a perfect verifier the planted mistake dies out.
#
# ## Rows the student writes itself
#
# So far students read what others wrote. At work a student reads its own words; one slip, and it stands where no row of its
# training stood: **prefix mismatch**. On-policy distillation trains it there: the student answers, the teacher says at each
# token what it would have said (GKD, Agarwal et al. 2024; MiniLLM, Gu et al. 2024).

# %%
from lifecycle_lib.model.sampling import generate
from lifecycle_lib.train.distil import DistilBatch
from lifecycle_lib.train.staying_close import counted_logits


def graded(writer, asked, turn):
    """One answer a case as `writer` says it now, at temperature 1, with the teacher's distribution at each token."""
    coded = [tok.encode(c.prompt) for c in asked]
    wrote = generate(writer, coded, eos_id=tok.special["<eos>"], pad_id=tok.special["<pad>"],
                     generator=make_generator(seed, "own rows", turn))
    own = pad_rows(coded, wrote.ids, tok.special["<pad>"])
    return DistilBatch(own, teacher_targets(teacher, own))


# %% [markdown]
# No label is asked, and no verifier. One of the student's answers, as its teacher grades it: the reverse KL at each token
# that costs over a tenth of a nat. Of up to 128 answers, the dearest.

# %%
def nats(student, batch, beta):
    """Divergence at every answer token. (M,)"""
    with torch.no_grad():
        return divergence(counted_logits(student, batch.rows).log_softmax(-1), batch.targets.logp, beta)


# %%
own, theirs = (graded(who, served[:128], 0) for who in (students["logits"], teacher))
grade_of, starts = nats(students["logits"], own, 1.0), own.targets.starts
worst = max(range(len(own.rows.ids)), key=lambda i: float(grade_of[starts[i]:starts[i + 1]].sum()))
pieces = [tok.decode([t]) for t in own.rows.ids[worst][own.rows.mask[worst]].tolist()]
print("".join(p + (f" [{v:.1f}] " if v > 0.1 else "") for p, v in zip(pieces, grade_of[starts[worst]:starts[worst + 1]])))
for name, batch in (("its own answers", own), ("its teacher's", theirs)):
    print(f"forward KL on {name:15} {nats(students['logits'], batch, 0.0).mean():.4f} nats a token")

# %% [markdown]
# The brackets say where it went wrong, token by token; a verifier would have said "wrong" once. The two last lines are a
# test for mismatch: were the student worse on its own words, the first number would be the larger.
#
# How poor a writer may the student be? Take the cut model before any mending. It gets next to nothing right, so a verifier's
# groups are uniform and their advantages zero (`12_verifier_rewards`). The teacher's grade is not.

# %%
tickets = closed_tickets[:384]


def from_the_cut(own_rows, beta):
    """The cut model, six steps on fresh answers: its own as it is then, or its teacher's."""
    learner = keep_layers(teacher, layers).requires_grad_(True)
    fit(learner, lambda step: graded(learner if own_rows else teacher, tickets[64 * step:64 * step + 64], step),
        partial(distil_loss, beta=beta), FitConfig(steps=6, warmup_steps=4, checkpoint_every=10_000), label="from the cut")
    return learner


# %%
first = graded(keep_layers(teacher, layers), tickets[:64], 0)
told = [tok.decode(ids[mask].tolist()).replace("<eos>", "") for ids, mask in zip(first.rows.ids, first.rows.mask)]
print(f"cut model: {sum(a == c.answer for a, c in zip(told, tickets))} of 64 answers right, "
      f"{nats(keep_layers(teacher, layers), first, 1.0).mean():.1f} nats a token from its teacher")
for name, how in (("teacher's rows, forward", (False, 0.0)), ("own rows, reverse", (True, 1.0))):
    now = Engine(from_the_cut(*how), tok, 0.0, seed).answer(cases[:128])
    print(f"6 steps, {name:24} exact pass {100 * np.mean([a == c.answer for a, c in zip(now, cases)]):.0f} %")

# %% [markdown]
# One seed, six steps, and two things changed at once: who writes, and which way the divergence is taken. The recorded
# experiment crosses them, with your chain's SFT checkpoint as the teacher, from a weak start and from an abler one. In all
# arms: the same prompts, 16 steps of 64, one answer each at temperature 1, read once by the teacher; a learning rate an
# arm, chosen on a seed that is not reported. Decide before you look: whose rows, which direction, from which start?

# %%
on_policy_card = ClaimCard(
    claim="from an able start, reverse KL on its own answers leaves a student more right answers at temperature 1 than "
          "forward KL on its teacher's: an estimate of 3 points or more, an interval above 0",
    direction="up", smallest=0.03, unit="share",
    falsifier="an estimate under 3 points, an interval that reaches 0, or reverse KL on the teacher's answers gains as much",
    scope="answers of 21 tokens, equal steps, prompts and teacher readings, 5 seeds, frozen cases",
    not_measured="long answers, many rounds, students of another family, the cost of sampling")
on_policy_card.show()
on_policy_card.predict(estimate=0.03, confidence=0.50)

# %%
from lifecycle_lib.lab.claims import evidence_figure

PAIRS = ("own, reverse - teacher's, forward", "own, forward - teacher's, forward", "teacher's, reverse - teacher's, forward",
         "own, reverse - own, forward", "own, reverse - teacher's, reverse")
evidence_figure("on_policy", [f"right, {begin}: {pair}" for begin in ("able", "weak") for pair in PAIRS],
                "Whose rows, and which direction", not_measured="long answers, many rounds, the cost of sampling")

# %%
crossed = recorded("on_policy")["per_seed"]
on_policy_card.settle(paired_effect([r["able: own, reverse.right"] for r in crossed],
                                    [r["able: teacher's, forward.right"] for r in crossed]))
show_evidence("on_policy", [f"right, able: {pair}" for pair in PAIRS])

# %% [markdown]
# The recipe gains 4 points, so the card's own effect holds. The record still says *inconclusive*: its falsifier also asked
# who did it. Reverse KL on the *teacher's* answers gained 6. Own rows are not shown to be better in either direction, and
# with forward KL they cost 3. Here the direction did the work, not the writer. What kind of work?

# %%
print(f"{'':26} right  greedy  invented  entropy  mismatch (entropy; forward KL, own - teacher's answers: millinats a token)")
for name in ("teacher", *(f"{begin}{arm}" for begin in ("weak", "able") for arm in (" start", *(f": {a}" for a in (
        "teacher's, forward", "teacher's, reverse", "own, forward", "own, reverse"))))):
    shares = [mean_of(crossed, f"{name}.{key}").estimate for key in ("right", "greedy right", "claims")]
    entropy, at_home, away = (1000 * np.mean([r[f"{name}.{key}"] for r in crossed])
                              for key in ("entropy, own", "forward, teacher's", "forward, own"))
    print(f"{name:26} {shares[0]:5.1f} {shares[1]:7.1f} {shares[2]:9.1f} {entropy:8.0f} {away - at_home:+9.0f}")

# %% [markdown]
# Greedy, no gain is shown. Reverse KL leaves less entropy, though still more than the teacher's, so a sample is more often what
# the student held likeliest anyway: sharpening, the control of `12_verifier_rewards`. And mode-seeking left the invented labels
# at the teacher's 30 %: a choice of one token is no mode that a student lacks room for.
#
# There is a mismatch, shown from the weak start. Why no gain from own rows? Perhaps because 21 tokens leave slips no room to
# compound. **Not shown here:** long answers, many rounds, `lmbda` mixtures, MiniLLM's term for how the prefix was chosen, and
# the price: a teacher's answers keep, a student's are old after a step.

# %%
show_evidence("on_policy", [f"{what}: {PAIRS[0]}" for what in ("right greedy, able", "right greedy, weak", "invented labels, able")]
              + ["forward KL, own - teacher's answers: weak start", "forward KL, own - teacher's answers: able start"],
              claim=False)

# %% [markdown]
# **Not tried here: subliminal learning.** A trait can ride on rows that have nothing to do with it, lists of numbers say,
# filtered of every trace, if student and teacher began from the same weights (Cloud et al. 2025). Our students do begin as
# cuts of their teacher.
#
# ## Rankings
#
# A third signal: the student answers, the teacher only says which answer it likes better, by the log-probability it gives the
# whole answer. That is a sum: every token costs, so short answers are favoured. Before you train on a ranking, audit it, and
# rank by the mean a token for comparison (BRIO, Liu et al. 2022, divides by a power of the length).

# %%
from lifecycle_lib.train.distil import rank_pairs, teacher_scores

asked = draw_cases(192 if lab.profile.name != "smoke" else 40, seed, "ranking")
drawn = Engine(copy.deepcopy(students["repaired"]), tok, 1.0, seed).texts([c.prompt for c in asked], 8)
candidates = [[text if text.strip() else "(nothing)" for text in drawn[8 * i:8 * i + 8]] for i in range(len(asked))]
scores = teacher_scores(teacher, tok, [c.prompt for c in asked], candidates)
a_token = [[x / (len(tok.encode(t, allow_special=False)) + 1) for x, t in zip(row, texts_)] for row, texts_ in zip(scores, candidates)]
pairs, by_mean = (rank_pairs([c.prompt for c in asked], candidates, x) for x in (scores, a_token))
truth = {c.prompt: c.answer for c in asked}

# %%
TESTS = {"preferred is right": lambda p: p["chosen"] == truth[p["prompt"]],
         "rejected is right": lambda p: p["rejected"] == truth[p["prompt"]],
         "preferred is longer": lambda p: len(p["chosen"]) > len(p["rejected"]),
         "preferred is shorter": lambda p: len(p["chosen"]) < len(p["rejected"])}
for name, made in (("by sum", pairs), ("by mean", by_mean)):
    print(f"{name:8} {len(made)} pairs from {len(asked)} prompts:",
          ", ".join(f"{what} {100 * np.mean([test(p) for p in made]):.0f} %" for what, test in TESTS.items()))

# %%
from lifecycle_lib.train import dpo

pad, encoded = tok.special["<pad>"], dpo.encode_pairs(tok, pairs)
ranked = copy.deepcopy(students["repaired"])
kept = dpo.reference_logps(ranked, encoded, pad)
batches = dpo.dpo_batches(encoded, kept, min(32, len(encoded)), seed, pad, torch.device("cpu"))
fit(ranked, batches, lambda m, b: dpo.pair_loss(m, b, lab.profile.beta),
    FitConfig(steps=12, optimizer="sgd", lr=1e-2, warmup_steps=2, checkpoint_every=10_000), label="ranking")
for name, model in (("repaired, T = 1", students["repaired"]), ("ranked, T = 1", ranked)):
    exam(name, model, 1.0)
print("exact pass at temperature 1:", compare("repaired, T = 1", "ranked, T = 1"))
print("unranked greedy - ranked at temperature 1:", compare("ranked, T = 1", "repaired"))

# %% [markdown]
# The pairs are mostly right against wrong, and on this desk, whose answers are all about as long, length decides little. A
# gain at temperature 1 need not be knowledge: the last line asks whether the same student, decoded greedily and never ranked,
# already has it. A ranking says less than a distribution: one bit a pair.
#
# ## Traces
#
# The fourth signal is what the teacher *did*. In a trace the prompt hides the order's facts; the teacher calls a tool,
# reads the result, answers. The loss falls on call and answer. Were the result counted too, the student would learn to
# write it: an invented lookup.

# %%
from lifecycle_lib.train.traces import follow, make_trace, order_store, trace_rows

trace = make_trace(asked[0])
row = trace_rows(tok, [trace])
print("reads  ", tok.decode(row.ids[0].tolist()))
print("learns ", tok.decode(row.ids[0][row.mask[0]].tolist()))

# %% [markdown]
# Traces wear out when the tool changes. Here is that on the small desk (an order id is one token there): one student saw
# traces of a single tool name, another the same traces under fifteen names, each declared in its prompt after `<note>`.
# Then the tool is renamed. Predict three numbers for each: old name, a name only the second has seen, a brand-new one.

# %%
from lifecycle_lib.core.seeds import rng, seed_everything
from lifecycle_lib.lab.studies.small_desk import ORDERS, Pieces, small_cases, small_gpt, vocabulary

NAMES = [f"{verb}_{noun}" for verb in ("lookup", "find", "get", "read", "open") for noun in ("order", "parcel", "ticket")]
RENAMED = {"old name": "lookup_order", "one of the fifteen": "find_ticket", "brand-new": "fetch_order"}

# %%
class Words(Pieces):
    """The small desk's words as a tokenizer."""

    special = {"<eos>": 2, "<pad>": 0}

    def encode(self, text, allow_special=True):
        return super().encode(text)


# %%
words = Words([*vocabulary().words[3:], *NAMES, *RENAMED.values(), *(f" {order}" for order in ORDERS)])

# %%
def trace_student(names):
    """A small student of traces under these names."""
    seed_everything(seed)
    student, pick = type(teacher)(small_gpt(words, n_layer=1)), rng(seed, "tool names")
    learnt = trace_rows(words, [make_trace(c, pick.choice(names)) for c in small_cases(1024, seed, "traces")])
    train(student, learnt, None, 2 * live_steps, "traces")
    return student


# %%
posed = small_cases(150, seed, "eval")
for name, names in (("one name", NAMES[:1]), ("fifteen names", NAMES)):
    tracer = trace_student(names)
    taken = {what: np.mean([f.taken for f in follow(tracer, words, [make_trace(c, tool) for c in posed],
                                                    order_store(posed, tool), 12)]) for what, tool in RENAMED.items()}
    print(f"{name:14}", ", ".join(f"{what}: {100 * share:.0f} % of calls taken" for what, share in taken.items()))

# %% [markdown]
# Many names teach the student to read the name instead of remembering it, but only among names it has seen. The brand-new one
# is a token that no row ever trained, in this vocabulary of words: zero is as much the tokenizer's verdict as the student's,
# and one seed. So vary the names in the traces, *and* let code write the name (`14_structured_outputs_and_tools`).
#
# ## Two compressions at once
#
# Does a distilled model bear rounding as well as its teacher? All four combinations; an interaction is what the pair
# loses beyond the sum of both.

# %%
for name, model in (("teacher", teacher), ("repaired", students["repaired"])):
    for bits in (8, 4):
        exam(f"{name} int{bits}", quantise_model(model, bits))
        print(f"{name:8} int{bits}: exact pass", compare(name, f"{name} int{bits}"))

# %%
parts = [right_on(n) for n in ("teacher", "repaired", "teacher int4", "repaired int4")]
together = (parts[3] - parts[1]) - (parts[2] - parts[0])
print("int4 costs the student {:+.1f} points beyond what it costs the teacher [{:+.1f}, {:+.1f}]".format(
    100 * together.mean(), *interval(together)))

# %% [markdown]
# ## A cascade
#
# Away from the kiosk, on a server that holds both: the student answers; if it is not sure enough, the teacher answers instead.
# Sure means: the probability it gave its own answer. Cost: bytes of weights read for each token, which is what a decoding
# chip waits for. Both are rounded to int8, which you just saw to be free; beside an unrounded teacher any student looks cheap.

# %%
tier, large = quantise_model(students["repaired"], 8), quantise_model(teacher, 8)
price = weight_bytes(tier) / weight_bytes(large)

# %%
def confident(asked):
    """(probability of its own answer, is it right, is the teacher right), one a case."""
    outs = [Engine(copy.deepcopy(m), tok, 0.0, seed).sample([c.prompt for c in asked]) for m in (tier, large)]
    hits = [np.array([tok.decode(x[:-1]) == c.answer for x, c in zip(o.ids, asked)]) for o in outs]
    return np.exp([sum(lp) for lp in outs[0].logps]), *hits


# %%
sure, student_ok, teacher_ok = confident(cases)
print(f"the small tier costs {100 * price:.0f} % of the rounded teacher; alone {100 * student_ok.mean():.1f} % right, teacher "
      f"{100 * teacher_ok.mean():.1f} %")

# %%
def curve(score):
    """(cost, right) for every number of cases handed to the teacher, least sure first. (N + 1,), (N + 1,)"""
    order = np.argsort(score, kind="stable")
    gain = np.concatenate([[0.0], np.cumsum((teacher_ok.astype(float) - student_ok)[order])])
    return price + np.arange(len(score) + 1) / len(score), (student_ok.sum() + gain) / len(score)


# %% [markdown]
# Raw confidence is not a probability of being right. Calibrate it on 256 fresh cases, with one temperature for all. Does
# the curve improve? Decide before you run.

# %%
from scipy.optimize import minimize_scalar

fresh_sure, fresh_ok, _ = confident(draw_cases(256 if lab.profile.name != "smoke" else 40, seed, "calibration"))

# %%
def scaled(p, c):
    """Confidence through one logistic curve: sigmoid(c * logit(p))."""
    p = np.clip(p, 1e-12, 1 - 1e-12)
    return 1 / (1 + ((1 - p) / p) ** c)


# %%
def surprise(c):
    q = np.clip(scaled(fresh_sure, c), 1e-6, 1 - 1e-6)
    return -np.mean(np.where(fresh_ok, np.log(q), np.log(1 - q)))


# %%
scale = minimize_scalar(surprise, bounds=(0.05, 5), method="bounded").x
calibrated = scaled(sure, scale)
identical = np.array_equal(curve(sure)[1], curve(calibrated)[1])
print(f"the curve of calibrated confidence is the curve of raw confidence, point for point: {identical}")

# %%
def at(score, threshold):
    """(share handed over, right, cost) of the cascade that trusts a student whose score is at least `threshold`."""
    over = score < threshold
    return over.mean(), np.where(over, teacher_ok, student_ok).mean(), price + over.mean()


# %%
for name, score in (("raw", sure), ("calibrated", calibrated)):
    handed, got, cost = at(score, 0.9)
    kept_ok = student_ok[score >= 0.9]
    print(f"{name:11} trust at .9: hands over {100 * handed:3.0f} %, right {100 * got:.1f} %, cost {cost:.2f} teachers; "
          f"student right where trusted: {100 * kept_ok.mean() if len(kept_ok) else float('nan'):.1f} %")

# %%
fig, ax = plt.subplots(figsize=(6.8, 4.0))
cost, got = curve(sure)
by_luck = student_ok.mean() + (cost - price) * (teacher_ok.mean() - student_ok.mean())
oracle = curve(np.where(student_ok >= teacher_ok, 1.0, 0.0))[1]
for values, label, (colour, _, line, _) in ((got, "least sure first", SERIES[0]), (by_luck, "by luck", SERIES[3]),
                                           (oracle, "perfect router", SERIES[2])):
    ax.plot(cost, 100 * values, color=colour, linestyle=line, label=label)
for (name, score), (colour, marker, _, _) in zip((("raw", sure), ("calibrated", calibrated)), SERIES[1:]):
    _, y_at, x_at = at(score, 0.9)
    ax.plot([x_at], [100 * y_at], marker, color=colour, markersize=9, label=f"trust at .9, {name}")
ax.plot([1], [100 * teacher_ok.mean()], "D", color="#111111", label="the teacher alone")
ax.set(xlabel="cost (1: the teacher alone)", ylabel="exact pass (%)", title="What a second opinion costs")
ax.legend(loc="lower right")
finish(fig, f"n = {len(cases)} frozen cases, one seed, no interval drawn.", "batching, two models in memory, other seeds")

# %%
enough = int(np.argmax(got >= teacher_ok.mean() - 1e-9))  # cases to hand over until nothing is lost
handed = enough / len(got[1:])
print(f"as good as the teacher: {100 * handed:.0f} % handed over, at cost {cost[enough]:.2f}; the teacher alone costs 1.00")
print(f"cheaper than the teacher: under {100 * (1 - price):.0f} % handed over, {100 * max(got[cost < 1], default=math.nan):.1f} % right at best; "
      f"to pay, this router needs a student that costs under {100 * (1 - handed):.0f} % of its teacher")

# %% [markdown]
# One curve for all confidences keeps the order of the cases, so it cannot change whom you hand over first: **the curve
# stays, the point moves**. Calibration makes `.9` mean 9 of 10, so that a requirement can set the threshold. To change the
# curve you need information: another signal, or a map per slice.
#
# Does it pay? **Only while the share handed over is under 1 minus the student's price.** These tiers are one layer apart; the
# printed line says how cheap a student would have to be.
#
# ## When does it pay?
#
# Distillation spends once and saves at every request. Break-even: training seconds by seconds saved a request. These are
# clocks of this machine.

# %% tags=["nbval-ignore-output"]
import time


def cpu_s(work):
    start = time.process_time()
    work()
    return time.process_time() - start


some = served[:64]
serve = {n: cpu_s(lambda m=m: Engine(copy.deepcopy(m), tok, 0.0, seed).answer(some)) / len(some)
         for n, m in (("teacher", teacher), ("student", students["repaired"]))}
labels_s = cpu_s(lambda: teacher_targets(teacher, rows_of(closed_tickets[:256]), temperature, 16)) * n_rows / 256
step_s = cpu_s(lambda: train(keep_layers(teacher, layers), rows, targets, 2, "clock")) / 2
spent, saved = labels_s + live_steps * step_s, serve["teacher"] - serve["student"]
print(f"teacher {1000 * serve['teacher']:.1f} ms a request in a batch of 64, student {1000 * serve['student']:.1f} ms")
print(f"asking the teacher {labels_s:.1f} s, training {live_steps * step_s:.1f} s; asking again each step instead of keeping "
      f"its answers would cost the same {labels_s:.1f} s for every pass")
for share in (0.5, 1.0, 2.0):
    print(f"saving x {share}: break-even after {spent / (saved * share):,.0f} requests" if saved > 0 else "never: no saving")

# %% [markdown]
# Half the saving, twice the requests. The sum leaves out the dearest item, a person who finds the hole.
#
# ## What you use at work
#
# TRL's `GKDTrainer` is this loss with three differences. It applies no T squared; its `temperature` heats the *sampling*
# of on-policy answers, not the loss, which always runs at T = 1; by default half of its batches are the student's own
# samples (`lmbda`). With `lmbda=0, beta=0` it must be ours at T = 1: loss, every weight's gradient, four steps.

# %%
import logging
import tempfile

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from lifecycle_lib.model.bridge import export

# %%
logging.disable(logging.WARNING)
disable_progress_bar()
folder = tempfile.TemporaryDirectory()
for name, model in (("teacher", teacher), ("student", students["repaired"])):
    export(copy.deepcopy(model), tok, f"{folder.name}/{name}")
theirs = {name: AutoModelForCausalLM.from_pretrained(f"{folder.name}/{name}") for name in ("teacher", "student")}

# %%
few = closed_tickets[:8]
rows_at_work = [{"messages": [{"role": "user", "content": c.prompt}, {"role": "assistant", "content": c.answer}]} for c in few]
if has_trl:
    import datasets

    datasets.disable_progress_bars()
    args = GKDConfig(output_dir=folder.name, use_cpu=True, bf16=False, report_to=[], save_strategy="no", disable_tqdm=True,
                     gradient_checkpointing=False, per_device_train_batch_size=8, max_length=128, lmbda=0.0, beta=0.0,
                     max_steps=4, learning_rate=1e-3, lr_scheduler_type="constant", logging_steps=1, max_grad_norm=0.0,
                     optim="adamw_torch", weight_decay=0.0)
    trainer = GKDTrainer(theirs["student"], theirs["teacher"], args=args, train_dataset=datasets.Dataset.from_list(rows_at_work),
                         processing_class=AutoTokenizer.from_pretrained(f"{folder.name}/student"))

# %%
from lifecycle_lib.train.distil import DistilBatch

ours, eight = copy.deepcopy(students["repaired"]), rows_of(few)
batch = DistilBatch(eight, teacher_targets(teacher, eight, temperature=1.0))
if has_trl:
    our_loss, their_loss = distil_loss(ours, batch)[0], trainer.compute_loss(trainer.model, trainer.data_collator(rows_at_work))
    named = dict(trainer.model.model.gpt.named_parameters())
    pairs_of = zip(torch.autograd.grad(our_loss, list(ours.parameters())),
                   torch.autograd.grad(their_loss, [named[n] for n, _ in ours.named_parameters()]))
    apart = max((a - b).abs().max().item() for a, b in pairs_of)
    assert abs(our_loss.item() - their_loss.item()) < 1e-5 and apart < 1e-5
    print("loss and the gradient of every weight agree within 1e-5")
else:
    print("TRL is not installed here: nothing to compare with. pip install '.[peers]' and run this section again")

# %%
import contextlib
import io

# %%
if has_trl:
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
adamw, losses = torch.optim.AdamW(ours.parameters(), lr=1e-3, weight_decay=0.0), []
for _ in range(4):
    loss, _ = distil_loss(ours, batch)
    adamw.zero_grad()
    loss.backward()
    adamw.step()
    losses.append(loss.item())
if has_trl:
    logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    drift = max((p - named[n]).abs().max().item() for n, p in ours.named_parameters())
    assert max(abs(a - b) for a, b in zip(losses, logged)) < 1e-3 and drift < 1e-3
    print("four AdamW steps: the same losses within 1e-3, weights within 1e-3")

# %% [markdown]
# ## Symptoms
#
# | you see | usually it is | look at |
# |---|---|---|
# | high T trains like labels | T squared forgotten | gradient norm against T |
# | one of several good answers only | direction swapped | entropy of both |
# | logits help no more than labels | sure teacher, T too low | T = 4 |
# | mean fine, complaints anyway | hole in the prompts | disagreement by kind |
# | verified student repeats the fault | greedy targets | coverage of the slice |
# | a habit grows | greedy targets, clustered habit | rate by context |
# | wrong, and surer than the teacher | answers, no distributions | confidence on its errors |
# | calls a tool that is gone | one name in all traces | success after a rename |
#
# ## Your table of signals
#
# Filled from what was measured above.

# %%
def percent(arm, key):
    return f"{mean_of(faults, f'{arm}.{key}').estimate:.0f} %"


# %%
print(f"{'signal':22} {'fault inherited':>16} {'sure of it':>11} {'habit (67 % late)':>18} {'needs of the teacher'}")
for arm, needs in {"logits": "its probabilities", "sampled": "its answers", "greedy": "its answers",
                   "sampled x 8 + filter": "8 answers, and a verifier"}.items():
    print(f"{arm:22} {percent(arm, 'hat_wrong'):>16} {percent(arm, 'hat_yes'):>11} {percent(arm, 'kindly'):>18}  {needs}")
print(f"{'ranking':22} {len(pairs)} pairs from {8 * len(asked)} answers; needs a student that already answers")

# %% [markdown]
# ## The clinic
#
# A student has a good teacher, and labels half of which are wrong. It should follow the teacher.

# %%
from lifecycle_lib.lab import clinic

clinic.show(17)

# %%
case_book = {}
print(clinic.order_test(17, "gradient of the soft part / of the hard part, step 1", case_book))
print("healthy twin:", clinic.order_test(17, clinic.TWIN, case_book))

# %%
assert clinic.show_verdict(17, "forgotten_t2", case_book)

# %% [markdown]
# A weight of .9 on the soft part means little while its gradient is a fiftieth of the other's: the student ends near a coin on
# decisions, its twin near the teacher. No optimiser undoes that, as it is a ratio of two parts. Print both once. The rest of
# the ward: `lifecycle clinic`.

# %% [markdown]
# ## Exercises
#
# **1. Which way was it trained? (★★, 10 minutes).** You find logits of a student and its teacher, both (M, V), and the gradient of
# the loss at the student's logits, (M, V); T = 1, alpha = 1, the mean over rows. Write `which_beta(student, teacher, gradient)`:
# the `beta` of 0.0, 0.5 and 1.0 whose loss has that gradient. Use `inline_loss`, or derive it.

# %% nbgrader={"grade": false, "grade_id": "which-beta", "locked": false, "schema_version": 3, "solution": true, "task": false}
def which_beta(student, teacher, gradient):
    """0.0 (forward KL), 0.5 (Jensen-Shannon) or 1.0 (reverse KL)."""
    ### BEGIN SOLUTION
    z = student.detach().clone().requires_grad_()
    unused = torch.zeros(len(z), dtype=torch.long)
    miss = {b: (torch.autograd.grad(inline_loss(z, teacher, unused, T=1.0, beta=b), z)[0] - gradient).abs().max().item()
            for b in (0.0, 0.5, 1.0)}
    return min(miss, key=miss.get)
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "which-beta-tests", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
z, v = torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([[0.0, 2.0, 0.0]])
assert which_beta(z, v, z.softmax(-1) - v.softmax(-1)) == 0.0, "forward KL has the gradient of cross-entropy: student - teacher"
### BEGIN HIDDEN TESTS
for hidden_seed in range(4):  # in closed form: reverse KL's gradient at z is q * (r - sum q r), r = log q - log p
    h = make_generator(hidden_seed, "hidden")
    z, v = 2 * torch.randn(5, 7, generator=h), 2 * torch.randn(5, 7, generator=h)
    q, p = z.softmax(-1), v.softmax(-1)
    r, m = q.log() - p.log(), ((q + p) / 2).log()
    centred = {1.0: r, 0.5: (q.log() - m) / 2}
    for b, x in centred.items():
        assert which_beta(z, v, q * (x - (q * x).sum(-1, keepdim=True)) / 5) == b, b
    assert which_beta(z, v, (q - p) / 5) == 0.0
### END HIDDEN TESTS

# %% [markdown]
# **2. The rest bucket (★★, 8 minutes).** Keep the teacher's `k` likeliest outcomes, merge all others into one, for both
# distributions. Write `kept_kl(teacher, student, k)` in nats, numpy arrays of probabilities in.

# %% nbgrader={"grade": false, "grade_id": "rest", "locked": false, "schema_version": 3, "solution": true, "task": false}
def kept_kl(teacher, student, k):
    """KL(teacher || student) over k + 1 outcomes: the teacher's top k, and the rest."""
    ### BEGIN SOLUTION
    top = np.argsort(-np.asarray(teacher))[:k]
    p, q = (np.append(np.asarray(x)[top], 1 - np.asarray(x)[top].sum()) for x in (teacher, student))
    return float(sum(a * np.log(a / b) for a, b in zip(p, q) if a > 0))
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "rest-tests", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
t_probs, s_probs = np.array([0.7, 0.2, 0.06, 0.04]), np.array([0.4, 0.3, 0.1, 0.2])
print("kept 1, 2, 3 of 4:", [round(kept_kl(t_probs, s_probs, k), 4) for k in (1, 2, 3)])
### BEGIN HIDDEN TESTS
from scipy.stats import entropy

assert abs(kept_kl(t_probs, s_probs, 3) - entropy(t_probs, s_probs)) < 1e-9, "with one outcome in the rest, nothing is merged"
a, b = (np.random.default_rng(i).dirichlet(np.ones(30)) for i in (1, 2))
steps_up = [kept_kl(a, b, k) for k in range(1, 30)]
assert all(x <= y + 1e-12 for x, y in zip(steps_up, steps_up[1:])) and steps_up[-1] <= entropy(a, b) + 1e-9
### END HIDDEN TESTS

# %% [markdown]
# **3. Name the error (★★★, 15 minutes).** Write `tag(text, case)`, first match wins: `right`; `fabrication` (claims an
# action: any field beyond the three); `omission` (no JSON object, a field missing, or nulls although a policy covers the
# case); `conflation` (policy id or window of the *other* policy line); `hallucination` (another id, number or word that
# stands nowhere in the prompt); else `wrong decision`.

# %% nbgrader={"grade": false, "grade_id": "tag", "locked": false, "schema_version": 3, "solution": true, "task": false}
import re


def tag(text, case):
    """One of right, fabrication, omission, conflation, hallucination, wrong decision."""
    ### BEGIN SOLUTION
    if text == case.answer:
        return "right"
    try:
        said = json.loads(text)
    except ValueError:
        return "omission"
    fields = {"evidence", "policy_id", "eligible"}
    if not isinstance(said, dict) or set(said) - fields:
        return "fabrication" if isinstance(said, dict) else "omission"
    if set(said) != fields or (case.policy and None in said.values()):
        return "omission"
    named = re.findall(r"P-\d|\d\dd|[a-z]+", f"{said['policy_id']} {said['evidence']}".replace("None", ""))
    others = [w for p in case.policies if p != case.policy for w in (p.policy_id, f"{p.window_days:02d}d")]
    own = (case.policy_id, f"{case.window_days or 0:02d}d", f"{case.days:02d}d")
    if any(w in others and w not in own for w in named):
        return "conflation"
    return "hallucination" if any(w not in case.prompt for w in named) else "wrong decision"
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "tag-tests", "locked": true, "points": 4, "schema_version": 3, "solution": false, "task": false}
from lifecycle_lib.desk.cases import with_label_claim

one = next(c for c in cases if c.policy)
assert tag(one.answer, one) == "right" and tag(with_label_claim(one.answer), one) == "fabrication"
for name in ("teacher", "logits", "repaired"):
    tags = Counter(tag(text, case) for text, case in zip(reports[name]["answers"], cases))
    print(f"{name:14}", ", ".join(f"{k} {n}" for k, n in tags.most_common() if k != "right"))
### BEGIN HIDDEN TESTS
covered_cases = [c for c in draw_cases(60, 77, "eval") if c.policy and len({p.window_days for p in c.policies}) == 2][:8]
for c in covered_cases:  # 40 labelled outputs: five a case
    other = next(p for p in c.policies if p != c.policy)
    nowhere = next(f"P-{i}" for i in range(1, 10) if f"P-{i}" not in c.prompt)
    flip = '"eligible":false' if c.eligible else '"eligible":true'
    labelled = {"fabrication": with_label_claim(c.answer), "omission": c.answer.replace('"policy_id"', '"policy"', 1)[:-40],
                "conflation": c.answer.replace(c.policy_id, other.policy_id),
                "hallucination": c.answer.replace(c.policy_id, nowhere),
                "wrong decision": re.sub(r'"eligible":\w+', flip, c.answer)}
    for label, text in labelled.items():
        assert tag(text, c) == label, f"{text} is {label}, tagged {tag(text, c)}"
assert len(covered_cases) == 8
### END HIDDEN TESTS

# %% [markdown]
# Read the tags beside the rates. The teacher's errors are decisions it gets wrong about text it quoted right; in the
# committed run, cutting a layer brought back another kind, the quote from the wrong policy line. A rate alone hides that.
#
# ## Quiz

# %%
from lifecycle_lib.lab.quiz import grade, interview, quiz

quiz("15")

# %%
answers_given = {}  # {"q1": "a", ...}
_ = grade("15", answers_given)

# %%
interview("15")

# %% [markdown]
# ## What to remember
#
# 1. Constraint first. Rounding saves bytes, distilling saves work; they are different tools.
# 2. Soft targets pay where rows are few and the teacher's doubt is real. Keep T squared, and know the direction.
# 3. A filter cannot write: sample, then verify, count what each kind of case got, and ask what the verifier alone is worth.
# 4. Greedy answers hand down mistakes without their doubts, and habits by majority. Distributions hand down both as they
#    are.
# 5. A student's doubt is a poor guide to what it was never shown. Ask the teacher where they differ.
#
# **Made:** nothing; all students live and die here. **Next:** `16_memory_quantization_latency` rounds the weights,
# `17_evaluation_you_can_trust` asks how far to believe a scorecard.
