# ---
# jupyter:
#   lifecycle:
#     rows: [S0-17, S2-01a, S2-01b, S2-01c, S2-01d, S2-01e, S3-6.01, S3-6.03, S3-6.06, S3-6.07, S3-6.08, S3-6.09, S3-6.10,
#       S3-6.11, S3-6.12, S3-6.13, S3-6.14, S3-6.15, S3-6.16, S3-6.17, S3-6.18, S3-6.19, S3-6.21, S3-6.23, S3-6.24, S3-6.25,
#       S3-6.29, S3-6.31, S3-6.33, S3-6.34]
# ---
# %% [markdown]
# # The same recipe twice: what comes out the same?
#
# A colleague has left. Her fine-tune has a tag, good scores, and no notebook that runs. Can anybody make it again? "It
# reproduces" means three different things. Exact implies the other two; of these, neither implies the other:
#
# | level | what is equal | holds below for | breaks below for |
# |---|---|---|---|
# | **exact** | every weight, every logit, bit by bit | the whole closure | a sum taken in another order |
# | **statistical** | rates, within a margin stated beforehand | a lost data order (overall) | a lost patch set |
# | **behavioural** | the answer, case by case | a sum taken in another order | a lost data order |
#
# After this notebook you can:
#
# - say which level a rebuild reached, with a test for each, and what may be expected before you spend the hour;
# - break exact replay in eight ways and find the step where two runs part;
# - freeze a recipe so that a later change proves which of four things moved;
# - run a closure gate: rebuild in a clean room, or no push;
# - read a sensitivity map, and correct a sweep's winner for its luck.
#
# **Needs** nothing: its models are built here in seconds. **Makes** nothing that others need. From an empty store it takes
# about 75 seconds of one CPU core and 0.6 GB, most of it two dozen small training runs and five fresh processes.

# %% tags=["parameters"]
profile = "laptop"
seed = 0
device = ""
steps = 200

# %%
from lifecycle_lib.lab.notebook import start

lab = start("06", profile, seed, device)
smoke = lab.profile.name == "smoke"
steps = 8 if smoke else steps
if smoke:
    print("  smoke learns nothing: read the mechanics here, not the numbers")

# %% [markdown]
# ## The claim
#
# The colleague's fine-tune was corrected by a patch set: agents had given in to half of the hostile customers who came
# too late, and she rewrote those answers. The slice that should suffer most without it was fixed before anything ran:
# hostile wording, within 5 days of the window.

# %%
from lifecycle_lib.lab.claims import ClaimCard, evidence_figure, recorded

card = ClaimCard(
    claim="a rebuild without the patch set loses more on the hardest slice than overall", direction="up",
    smallest=0.05, unit="share", falsifier="less than 5 points more, or another missing piece costs that slice more",
    scope="0.06M parameters, one comparison task in four tones, one set of demonstrations, 8 seeds of base and order",
    not_measured="large models, several pieces lost at once, real customers")
card.show()

# %% [markdown]
# Commit before you scroll: how many points more does the hardest slice lose, and how sure are you?

# %%
card.predict(estimate=0.10, confidence=0.7)

# %% [markdown]
# ## The contract nobody signed
#
# Write down from memory the defaults of your optimiser: rates, betas, epsilon, decay, clipping, warm-up. Then look. Each
# line is a decision about behaviour that somebody else made; `*` marks where our loop decides otherwise.

# %%
import inspect
from dataclasses import asdict

import torch

from lifecycle_lib.train.loop import FitConfig

ours = asdict(FitConfig(steps=1))

# %%
theirs = {k: p.default for k, p in inspect.signature(torch.optim.AdamW.__init__).parameters.items() if k != "self"}
same_name = {"lr": ours["lr"], "betas": (0.9, ours["beta2"]), "weight_decay": ours["weight_decay"]}
for name in ("lr", "betas", "eps", "weight_decay", "amsgrad", "foreach", "fused"):
    own = same_name.get(name, theirs[name])
    print(f"{'*' if own != theirs[name] else ' '} AdamW {name:13} torch {theirs[name]!s:14} this course {own}")

# %%
print("not in any optimiser:", {k: v for k, v in ours.items() if k in ("warmup_steps", "min_lr_share", "clip", "bf16")})

# %% [markdown]
# ## Why equal recipes give unequal bits: one line
#
# Floating-point addition rounds after every step, so it is not associative. By hand, with three significant digits:
# (1000 + 4) - 1000 = 0, for 1004 rounds to 1000; but (1000 - 1000) + 4 = 4.

# %%
big, small = torch.tensor(1e8), torch.tensor(4.0)
print("float64: the two sums of 0.1, 0.2, 0.3 are equal:", (0.1 + 0.2) + 0.3 == 0.1 + (0.2 + 0.3))
print("float32: (1e8 + 4) - 1e8 =", float((big + small) - big), "| (1e8 - 1e8) + 4 =", float((big - big) + small))
assert float((big + small) - big) == 0.0, "4 is half a step of float32 at 1e8: it rounds away"

# %% [markdown]
# A gradient is a long sum. Data-parallel training sums shards in whatever order they arrive. Four shards of one batch,
# added forward and backward:

# %%
from lifecycle_lib.core.seeds import rng, seed_everything
from lifecycle_lib.lab.studies.recipes import CENTRE, feed, shape
from lifecycle_lib.model.gpt import GPT
from lifecycle_lib.train.logprobs import Rows, answer_loss, token_logps

batches = feed(CENTRE)
seed_everything(seed)
model = GPT(shape(lab))


# %%
def shards(batch, order):
    """The batch's token-averaged loss as a sum over four shards, added in `order`."""
    total = batch.mask[:, 1:].sum()
    parts = [Rows(i, m) for i, m in zip(batch.ids.chunk(4), batch.mask.chunk(4))]
    return sum(-token_logps(model, parts[k]).sum() / total for k in order)


# %%
params = list(model.parameters())
forward, backward = (torch.autograd.grad(shards(batches(0), order), params) for order in ((0, 1, 2, 3), (3, 2, 1, 0)))
apart = max(float((f - g).abs().max() / f.abs().max()) for f, g in zip(forward, backward))
equal = all(torch.equal(f, g) for f, g in zip(forward, backward))
print("bits equal:", equal, "| largest relative difference below 1e-5:", apart < 1e-5)

# %% [markdown]
# ## The three levels as code
#
# Equal bytes; an interval inside a margin; kappa. Kappa is agreement beyond what two independent raters with these rates
# would show anyway: by hand, 70 % agreement where 50 % is chance gives (0.7 - 0.5) / (1 - 0.5) = 0.4.

# %% tags=["algorithm"]
from scipy.stats import t as student

from lifecycle_lib.core.stats import wilson


def kappa(a, b):
    """Cohen's kappa of two sequences of right and wrong; None when both are constant."""
    agree = sum(x == y for x, y in zip(a, b)) / len(a)
    p, q = sum(a) / len(a), sum(b) / len(b)
    chance = p * q + (1 - p) * (1 - q)
    return None if chance == 1 else (agree - chance) / (1 - chance)


def equivalent(differences, margin):
    """Two one-sided tests by interval: is the whole 95 % interval of the mean inside +-margin? (answer, low, high)"""
    d = torch.tensor(differences, dtype=torch.float64)
    half = float(student.ppf(0.975, len(d) - 1) * d.std() / len(d) ** 0.5)
    low, high = float(d.mean()) - half, float(d.mean()) + half
    return -margin <= low and high <= margin, low, high


def levels(same_weights, differences, same_answers, k, margin=0.03, agree=0.95, least_kappa=0.6):
    """The levels that hold. Statistical: rates within the margin. Behavioural: answers the same (lower end of the share's
    interval), and not by chance."""
    n = len(differences)
    alike = wilson(round(same_answers * n), n)[0] >= agree and (k is None or k >= least_kappa)
    found = {"exact": same_weights, "statistical": same_weights or equivalent(differences, margin)[0],
             "behavioural": same_weights or alike}
    return ", ".join(name for name, holds in found.items() if holds) or "none"


# %%
from lifecycle_lib.core.stats import paired_effect
from lifecycle_lib.lab import rebuild

raters = [True] * 25 + [False] * 25, [True] * 20 + [False] * 5 + [True] * 10 + [False] * 15
assert abs(kappa(*raters) - 0.4) < 1e-12 and kappa(*raters) == rebuild.kappa(*raters)
draws = [rng(1, "oracle", i).gauss(0.01, 0.02) for i in range(8)]
effect = paired_effect(draws, [0.0] * 8)
assert all(abs(x - y) < 1e-12 for x, y in zip(equivalent(draws, 0.03)[1:], (effect.low, effect.high)))

# %% [markdown]
# The judge is a library that we did not write: statsmodels for kappa, scipy for the interval.

# %%
from scipy.stats import ttest_1samp

found = ttest_1samp(draws, 0.0).confidence_interval()
assert abs(found.low - effect.low) < 1e-12 and abs(found.high - effect.high) < 1e-12
try:
    from statsmodels.stats.inter_rater import cohens_kappa
    judged = f"{cohens_kappa([[15, 10], [5, 20]]).kappa:.3f}"
except ImportError:  # a peer of the tests, not of the course
    judged = "not installed"
print(f"kappa by hand 0.400, inline {kappa(*raters):.3f}, statsmodels {judged} | interval equals scipy's")

# %% [markdown]
# ## Break exact replay, one change at a time
#
# One small run, one harness. The reference is run twice to see that the level holds. Then eight changes, each of which
# somebody once thought harmless.

# %%
from lifecycle_lib.lab.studies.recipes import Knobs
from lifecycle_lib.model.checkpoint import weights_hash
from lifecycle_lib.train import loop

ordered = feed(Knobs(order_seed=seed))


# %%
def train(batches=ordered, loss_fn=answer_loss, draws=0, folder=None, **fit):
    """(model, losses) of one run; `draws` random numbers are taken after seeding and before the first weight."""
    seed_everything(seed)
    torch.rand(draws)
    own = GPT(shape(lab))
    cfg = FitConfig(**{"steps": steps, "lr": 6e-3, "optimizer": "adamw", "checkpoint_every": steps // 2} | fit)
    return own, loop.fit(own, batches, loss_fn, cfg, folder, "run").losses


# %%
reference, twice = train(), train()
assert weights_hash(reference[0]) == weights_hash(twice[0]), "two runs of one recipe differ: look for an unseeded draw"
print("the same recipe twice: weights equal bit by bit:", weights_hash(reference[0]) == weights_hash(twice[0]))

# %% [markdown]
# **Loaders.** Two workers race, and batches arrive in the order in which they finish. A stable loader hands them out by
# number. **Shards** arrive backward. **bf16** rounds to 8 bits of mantissa. **Seeding too early**: one number is drawn
# between the seed and the first weight.

# %%
import hashlib


# %%
def raced(run):
    """Batch numbers in order of arrival: number k is ready at time k plus up to two ticks of luck."""
    ticks = rng(seed, "race", run)
    return sorted(range(steps), key=lambda k: (k + 2 * ticks.random(), k))


# %%
for run_number in (1, 2):
    order = raced(run_number)
    stable = sorted(order)  # a buffer that waits for the next number
    print(f"run {run_number}: raced {hashlib.sha256(str(order).encode()).hexdigest()[:8]}, "
          f"stable {hashlib.sha256(str(stable).encode()).hexdigest()[:8]}, first batches {order[:6]}")

# %%
arrival = next(order for order in map(raced, range(1, 99)) if order != sorted(order))  # 8 steps can be lucky


def backward_shards(own, batch):
    total = batch.mask[:, 1:].sum()
    parts = [Rows(i, m) for i, m in zip(batch.ids.chunk(4), batch.mask.chunk(4))]
    return sum(-token_logps(own, part).sum() / total for part in reversed(parts)), {}


runs = {"shards backward": train(loss_fn=backward_shards), "bf16 autocast": train(bf16=True),
        "loader race": train(batches=lambda s: ordered(arrival[s])), "another data order": train(feed(Knobs(order_seed=seed + 1000))),
        "one draw too early": train(draws=1), "other beta2 default": train(beta2=0.999)}

# %% [markdown]
# **Resuming.** A run is killed just after its checkpoint and goes on. Exact replay needs three states: weights,
# optimiser, and the place in the data. Forget one at a time.

# %%
import tempfile
from pathlib import Path

from lifecycle_lib.core.tensors import load_meta, load_tensors, save_tensors


# %%
def killed(step):
    if step == steps // 2:
        raise KeyboardInterrupt
    return ordered(step)


def resume(forget, batches=ordered):
    """Kill a run at its checkpoint, drop from the checkpoint what starts with `forget`, go on."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            train(killed, folder=Path(folder))
        except KeyboardInterrupt:
            state = next(Path(folder).glob("*.safetensors"))
        kept = {k: v for k, v in load_tensors(state).items() if not (forget and k.startswith(forget))}
        save_tensors(state, kept, load_meta(state))
        return train(batches, folder=Path(folder))


# %%
whole = resume("")
runs["resumed, no optimiser state"] = resume("opt.")
runs["resumed, data from the start"] = resume("", lambda s: ordered(s - steps // 2 if s >= steps // 2 else s))
print("resumed with all three: weights equal bit by bit:", weights_hash(whole[0]) == weights_hash(reference[0]))
assert weights_hash(whole[0]) == weights_hash(reference[0])


# %% tags=["nbval-ignore-output"]
def first_step(losses):
    """The first step whose loss is not the reference's, or None."""
    return next((i for i, (x, y) in enumerate(zip(losses, reference[1])) if x != y), None)


for name, (own, losses) in runs.items():
    gap = max(float((p - q).abs().max()) for p, q in zip(own.parameters(), reference[0].parameters()))
    print(f"{name:29} parts at step {first_step(losses)!s:>4}, weights end up to {gap:.0e} apart")

# %%
assert all(weights_hash(own) != weights_hash(reference[0]) for own, _ in runs.values()), "a break broke nothing"
late = all((first_step(losses) or steps) >= steps // 2 for name, (_, losses) in runs.items() if "resumed" in name)
print(f"{len(runs)} changes, {len(runs)} other checkpoints; the resumed ones part at their checkpoint or after it: {late}")

# %% tags=["nbval-ignore-output"]
import matplotlib.pyplot as plt

from lifecycle_lib.lab.figures import learning_curve

shown = ("shards backward", "bf16 autocast", "one draw too early", "resumed, no optimiser state")
gaps = {name: [{"step": i, "gap": max(abs(x - y), 1e-8)} for i, (x, y) in enumerate(zip(runs[name][1], reference[1]))]
        for name in shown}
fig = learning_curve(gaps, key="gap", ylabel="|loss - reference| (nats)", title="How two runs of one recipe part",
                     not_measured="larger models, several devices", smooth=3)
fig.axes[0].set_yscale("log")
fig.axes[0].get_legend().remove()
fig.legend(loc="outside upper center", ncols=2)
plt.show()
print({name: f"{rows[-1]['gap']:.1e}" for name, rows in gaps.items()})

# %% [markdown]
# The floor of the axis, 1e-8, stands for no difference. A lost draw is another run from step 0; the order of four
# additions starts in the last bits and stays there for a while, then grows ten-thousandfold. A seed pairs two arms for comparison; it promises no bits.
#
# | first step that differs | suspect |
# |---|---|
# | 0, by much | first weights, first batch |
# | 0 to 10, in the last digits | order of sums, threads, kernels, precision |
# | 1 to 3, by much | optimiser defaults, a race of loaders |
# | just after a checkpoint | a state that the resume forgot |
#
# Which of these matter to a user? The other two levels, for the same eight runs:

# %%
from lifecycle_lib.lab.studies.recipes import HELD_OUT, comparison_rows
from lifecycle_lib.lab.studies.small import right

exam = comparison_rows(HELD_OUT)
solved = {name: right(own, exam).tolist() for name, (own, _) in {"reference": reference, **runs}.items()}
print(f"the reference is right on {100 * sum(solved['reference']) / len(exam.ids):.0f} % of {len(exam.ids)} held-out pairs")


# %%
def compared(first, second):
    """(differences item by item, share of the same right or wrong, kappa)."""
    same = sum(x == y for x, y in zip(first, second)) / len(first)
    return [float(y) - float(x) for x, y in zip(first, second)], same, kappa(first, second)


# %% tags=["nbval-ignore-output"]
for name in runs:
    d, same, k = compared(solved["reference"], solved[name])
    print(f"{name:29} {100 * sum(d) / len(d):+6.1f} points, same on {100 * same:5.1f} %, "
          f"kappa {'none' if k is None else f'{k:.2f}'}: {levels(False, d, same, k)}")

# %% [markdown]
# A sum in another order, which a hash detects at once, changes hardly an answer. Read a missing level as *not shown*: 343
# items make the interval of a rate up to 2 points wide each way. And these intervals run over items: they compare two
# checkpoints. Whether a *recipe* reproduces needs seeds; that comes below.
#
# ## Across processes, across threads
#
# Exact must hold in another process, or it holds nowhere. Threads are another matter: two threads split a sum in two.
# Each line below is a fresh interpreter.

# %%
import os
import subprocess
import sys

from lifecycle_lib.lab.notebook import ROOT
from lifecycle_lib.model.checkpoint import save_checkpoint

# %%
PROBE = """
import hashlib, sys, torch
from lifecycle_lib.lab.studies.recipes import HELD_OUT, comparison_rows
from lifecycle_lib.model.checkpoint import load_checkpoint
from lifecycle_lib.train.logprobs import answer_loss
torch.set_num_threads(int(sys.argv[2]))
model, rows = load_checkpoint(sys.argv[1]), comparison_rows(HELD_OUT * 4)
sums = [model(rows.ids), *torch.autograd.grad(answer_loss(model, rows)[0], list(model.parameters()))]
for part in (sums[:1], sums[1:]):
    print(hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in part)).hexdigest())
"""


# %%
def probe(threads):
    """Hashes of logits and of the gradient, from a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(folder, reference[0])
        done = subprocess.run([sys.executable, "-c", PROBE, folder, str(threads)], capture_output=True, text=True,
                              env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    return done.stdout.split()


# %%
first, second, two = probe(1), probe(1), probe(2)
assert first == second, "one thread, two processes: the logits or gradients differ"
print("two processes, one thread each: logits equal", first[0] == second[0], "| gradient equal", first[1] == second[1])

# %% tags=["nbval-ignore-output"]
print("one thread against two: logits equal", first[0] == two[0], "| gradient equal", first[1] == two[1])

# %% [markdown]
# Whether two threads change a bit depends on the machine and the size of the sum. That is why the run card records the
# thread count, the processor and its vector instructions.
#
# ## A bundle, a rebuild, a verdict
#
# Now the colleague's fine-tune. Its closure: a base, the rows, the patch set, one order, one set of optimiser defaults,
# one rate. Rebuilt from all of it, in a store of its own:

# %%
from dataclasses import replace

from lifecycle_lib.core.store import Store
from lifecycle_lib.lab.studies import closures
from lifecycle_lib.lab.studies.closures import PIECES, Closure, exam_items, fine_tune, is_hardest, lose

base = closures.base_model(lab)
original = fine_tune(lab, base)
scratch = tempfile.TemporaryDirectory()
elsewhere = replace(lab, store=Store(scratch.name))
again = fine_tune(elsewhere, base)
assert closures.weights_sum(again) == closures.weights_sum(original)
print("whole closure: exact;", f"{original.fingerprint == again.fingerprint = }")

# %%
whole_recipe = Closure(**original.card["config"]["closure"])
rebuilt = {"nothing": again, **{piece: fine_tune(lab, base, lose(whole_recipe, piece)) for piece in PIECES}}
ok = {name: [c == "1" for c in a.card["measured"]["right"]] for name, a in rebuilt.items()}
hard = [is_hardest(*item) for item in exam_items()]

# %%
print("missing          overall hardest   same  on hardest  kappa  holds")
for name, got in ok.items():
    d, same, k = compared(ok["nothing"], got)
    on_hard, same_hard, _ = compared(*([x for x, h in zip(answers, hard) if h] for answers in (ok["nothing"], got)))
    bits_equal = closures.weights_sum(rebuilt[name]) == closures.weights_sum(original)
    print(f"{name:16} {100 * sum(d) / len(d):+6.1f} {100 * sum(on_hard) / len(on_hard):+7.1f} {100 * same:6.1f} "
          f"{100 * same_hard:11.1f}  {'none' if k is None else f'{k:5.2f}'}  {levels(bits_equal, d, same, k)}")

# %% [markdown]
# Read the table with suspicion. Two models that are right on 97 % of items agree on 94 % by accident; kappa takes that
# out, and shows that a rebuild with equal rates fails on other items. That was one seed. Over eight:

# %%
from lifecycle_lib.core.stats import Effect

drill = recorded("closure_drill")


def tell(evidence, *starts):
    """Print the recorded effects whose names begin so."""
    for e in evidence["effects"]:
        if e["name"].startswith(starts):
            value, low, high = (f"{100 * e[k]:+.1f}" for k in ("estimate", "low", "high"))
            print(f"{e['name']:47} {value:>6} points [{low}, {high}]")


# %%
drops = [f"{piece} missing: {part} drop" for piece in PIECES for part in ("overall", "hardest")]
evidence_figure("closure_drill", drops, "What a lost piece costs the rebuild", not_measured="several pieces at once, "
                "larger models")

# %%
tell(drill, "patch set", "hardest drop", "data order", "library", "learning")
print("whole closure, same weights:", sum(r["same weights"] for r in drill["per_seed"]), "of", len(drill["seeds"]), "seeds")

# %%
print(f"{drill['verdict'].upper()}: {drill['claim']}")
row = next(e for e in drill["effects"] if "hardest drop - overall drop" in e["name"])
_ = card.settle(Effect(row["estimate"], row["low"], row["high"], len(drill["seeds"])))

# %% [markdown]
# Two cautions. The mean did not hide the loss: it shows 13 of the 29 points. And the patch set is the one piece that
# no default can guess, while the other three were replaced by guesses near the truth.
#
# ## Equivalent, or only not different?
#
# "No significant difference" is cheap: with few seeds nothing is significant, so everything would "reproduce".
# Equivalence must be earned by a narrow interval. Original against rebuild, paired over seeds, two one-sided tests; the
# margin of 3 points is the default of `lifecycle verify`.

# %%
for part, piece in ((part, piece) for part in ("overall", "hardest") for piece in PIECES):
    d = [r[f"{piece}.{part} drop"] for r in drill["per_seed"]]
    inside, low, high = equivalent(d, 0.03)
    print(f"{part:8} {piece:16} drop within +-3 points: {'shown' if inside else 'NOT shown':9} "
          f"[{100 * low:+.1f}, {100 * high:+.1f}]")

# %% [markdown]
# Overall, three of four losses stay inside the margin. On the hardest slice, a tenth of the items, none of these three is
# shown to: neither a drop nor its absence. More seeds would tell.
#
# ## Base 2: the bill for a lost closure
#
# A new base arrives, and every adapter and fine-tune must move. With the whole closure this is a rerun. Without it, you
# guess (order, patch set and rate at once). Acceptance is defined before the move: within 3 points of the old one,
# overall and on the hardest slice.

# %%
tell(drill, "base 2")
for part in ("overall", "hardest"):
    d = [r[f"base 2, whole closure.{part}"] - r[f"original.{part}"] for r in drill["per_seed"]]
    print(f"accepted {part}: {equivalent(d, 0.03)[0]}")

# %% [markdown]
# Three pieces lost cost the mean less here than the patch set alone did on base 1 (12.8 points): losses do not add up,
# and one base says little about the next.
#
# ## The game: which piece is missing?
#
# Four bundles in a shuffled order, each rebuilt with one piece missing. You see behaviour by slice, as its users would.
# Name the bundle without the patch set, then open the run cards.

# %%
order = rng(seed, "game").sample(PIECES, len(PIECES))
bundles = dict(zip("ABCD", order))
too_late = [d > w for _, d, w in exam_items()]
hostile = [tone in closures.HOSTILE for tone, _, _ in exam_items()]
slices = {"calm": [not h for h in hostile], "hostile, in time": [h and not x for h, x in zip(hostile, too_late)],
          "hostile, late": [h and x for h, x in zip(hostile, too_late)], "hardest": hard}

# %%
for letter, piece in bundles.items():
    shares = [sum(x for x, keep in zip(ok[piece], mask) if keep) / sum(mask) for mask in slices.values()]
    print(letter, "  ".join(f"{name} {100 * s:5.1f} %" for name, s in zip(slices, shares)))

# %%
from lifecycle_lib.lab.recipe import flatten

guess = "A"  # your letter
for letter, piece in bundles.items():
    mine, hers = (flatten(a.card["config"]["closure"]) for a in (rebuilt[piece], original))
    changed = {k: (hers[k], mine[k]) for k in hers if hers[k] != mine[k]}
    print(f"{letter}: {piece}, by the cards {changed}{'   <- your guess' if letter == guess else ''}")

# %% [markdown]
# From behaviour, one of four can be told apart. From the cards, all four, and no model was run. That is the whole
# argument for run cards.
#
# ## The run card of a real stage
#
# Every stage of the course leaves one. The smoke profile's chain (it learns nothing, and takes seconds) is enough to
# verify the machinery; `lifecycle verify dpo` does the same to your own store.

# %%
from lifecycle_lib.lab import runcard
from lifecycle_lib.lab.stages import Lab

home = tempfile.TemporaryDirectory()
small = Lab("smoke", seed=seed, device="cpu", store=Store(Path(home.name) / "store"))
dpo = small.dpo()
fields = runcard.missing_fields(dpo.card, [a.card for a in small.store.lineage(dpo)])
for group, missing in fields.items():
    print(f"{group:22} {'MISSING: ' + ', '.join(missing) if missing else 'answered'}")

# %% [markdown]
# Nobody has evaluated it, so nobody could compare a rebuild with it. Evaluate, and the ninth group is answered. Then ask
# for the rebuild, parents included:

# %%
from lifecycle_lib.lab.rebuild import VerifyConfig, after_text, before_text, preflight, verify

small.evaluation(dpo)
before = preflight(small.store, dpo)
print("\n".join(before_text(dpo, before, before["expected"]).splitlines()[1:]))

# %%
result = verify(small.store, dpo, deep=True, cfg=VerifyConfig(n_cases=256))
assert result["ok"] and "exact" in result["held"], after_text(result)
print(after_text(result))

# %% [markdown]
# Now plant three things in copies of the card and ask what `verify` would say *before* it spends a second: another torch,
# another beta, a lost seed.

# %%
import json


def planted(change):
    changed = json.loads(json.dumps(dpo.card))
    change(changed)
    return replace(dpo, card=changed)


# %%
for name, change in {"torch": lambda c: c["versions"].update(torch="2.4.0"),
                     "beta": lambda c: c["config"].update(beta=0.1), "seed": lambda c: c["config"].pop("seed")}.items():
    try:
        said = preflight(small.store, planted(change))
        print(f"{name:6} moved: {', '.join(m.what for m in said['moved'])}; expect: {said['expected']}")
    except ValueError as refusal:
        print(f"{name:6} refused: {str(refusal).split(': ', 1)[1]}")

# %% [markdown]
# ## What was meant, what was done
#
# A config is an intent. The card also holds what was counted while training ran: optimiser steps, rows a step, the rates
# the optimiser really held. One of these two cards has been tampered with.

# %%
from lifecycle_lib.lab.actuals import intended, mismatches

look = ("optimizer_steps", "rows_per_step", "lr_peak")
cards = {"x": dpo.card, "y": planted(lambda c: c["actual"].update(rows_per_step=[8, 8], lr_peak={"SGD": 0.004})).card}
for name, one_card in cards.items():
    print(name, {k: one_card["actual"][k] for k in look})

# %%
print("intended:", {k: intended(dpo.card)[k] for k in look})
for name, one_card in cards.items():
    print(name, mismatches(one_card) or "as intended")

# %% [markdown]
# A classic way to get there is accumulation. Averaging the averages of micro-batches is right only when all hold equally
# many counted tokens. By hand: losses 1 over 1 token and 2 over 3 tokens average to 7/4; the mean of means says 3/2.

# %%
ids = batches(0).ids[:48]
micro = [Rows(part, (torch.arange(ids.shape[1]) <= n).expand(len(part), -1)) for part, n in zip(ids.chunk(4), (1, 2, 4, 5))]
tokens = [int(r.mask[:, 1:].sum()) for r in micro]
whole_batch = Rows(ids, torch.cat([r.mask for r in micro]))

# %%
grad = lambda loss: torch.cat([g.flatten() for g in torch.autograd.grad(loss, params)])  # noqa: E731
target = grad(answer_loss(model, whole_batch)[0])

# %%
rules = {"mean of means (the bug)": [1 / 4] * 4, "by counted tokens": [n / sum(tokens) for n in tokens]}
for name, weights in rules.items():
    summed = sum(w * grad(answer_loss(model, r)[0]) for w, r in zip(weights, micro))
    off = float((summed - target).norm() / target.norm())
    print(f"{name:24} equals the large batch within 1e-5: {off < 1e-5}")
    assert (off < 1e-5) == (name == "by counted tokens")

# %% [markdown]
# ## Freeze
#
# A recipe that will be compared with is frozen: explicit config, checksummed manifest of data and code, versioned
# evaluation, baseline. A later change then proves that it was one change. Before you look: what must a stranger have?

# %%
import shutil

from lifecycle_lib.lab.recipe import check, diary, freeze

bundle = Path(home.name) / "bundle"
manifest = freeze(small.store, dpo, bundle, n_cases=48)
print("parts that moved:", [part for part, lines in check(bundle).items() if lines])

# %%
HOLDS = {"recipe.json": "decisions: every config of the ancestry, seeds, device, versions", "evals.json": "how it is judged",
         "baseline.json": "what it scored, sums of weights and logits", "code": "the source that made it",
         "store": "weights: the checkpoint and its ancestors", "manifest.json": "the sum of every file above, sealed"}
for name, role in HOLDS.items():
    print(f"{name:14} {role:67} {'there' if (bundle / name).exists() else 'MISSING'}")

# %% [markdown]
# A registry tag holds one of these six. Now touch one file at a time; the check names the part.

# %%
touched = {"recipe.json": '"beta": 0.5', "evals.json": '"n_cases": 48', "baseline.json": '"exact_pass": 0',
           "code/lifecycle_lib/train/dpo.py": "logsigmoid(margin)"}
for file, text in touched.items():
    copy = Path(shutil.copytree(bundle, Path(home.name) / f"copy-{Path(file).stem}"))
    content = (copy / file).read_text()
    assert text in content
    (copy / file).write_text(content.replace(text, text + " "))
    print(f"{file:33} moved:", {part: lines for part, lines in check(copy).items() if lines})

# %% [markdown]
# The store's cards are a memory as well. Three runs by someone who forgot to write notes; the diary says what each changed
# against the last.

# %%
small.arm(beta=0.1).dpo()
small.arm(beta=0.1, n_pairs=32).dpo()
for number, entry in enumerate(diary(small.store, "dpo"), 1):
    print(f"run {number}:", "; ".join(entry["changed"] or ["first of its name"]))

# %% [markdown]
# ## The gate: no rebuild, no push
#
# A bus factor of zero looks healthy from outside: tag, scores, all there. So the gate does not read a document. It starts
# a process that sees the bundle and the installed packages (no container), and asks it to rebuild.

# %%
from lifecycle_lib.lab.closure import clean_room

passed = clean_room(bundle, budget_s=300, n_cases=48)
print("whole bundle:", "PASS" if passed["ok"] else "REFUSED", "-", passed["why"], "-", *passed["held"])
shutil.rmtree(next((bundle / "store").glob("sft-*")))
refused = clean_room(bundle, budget_s=300, n_cases=48)
print("SFT lost:    ", "PASS" if refused["ok"] else "REFUSED", "- cannot find", refused["why"].split(": ")[1])
assert passed["ok"] and not refused["ok"]

# %% [markdown]
# ## Which knob deserves your attention?
#
# Lectures name the peak learning rate. Six seeds of the small recipe; each knob at three settings (rate and batch a
# factor of 4 either way, batch at equal tokens; warm-up none, 5 %, half; ...). The spread of a knob is the range over its
# three settings.

# %%
sens = recorded("sensitivity")
luck = ("first weights, seed", "data order, seed")
spread = {e["name"].removeprefix("spread: "): [100 * r[e["name"]] for r in sens["per_seed"]]
          for e in sens["effects"] if e["name"].startswith("spread: ")}
mean = lambda values: sum(values) / len(values)  # noqa: E731
ranked = sorted(spread, key=lambda k: mean(spread[k]))
band = max(mean(spread[k]) for k in luck)

# %%
from lifecycle_lib.lab.figures import SERIES, style

style()
fig, ax = plt.subplots(figsize=(7.0, 4.0))
ax.axvspan(0, band, color="#8f8f8f", alpha=0.25, linewidth=0)
for i, knob in enumerate(ranked):
    ax.plot(spread[knob], [i] * len(spread[knob]), "|", color=SERIES[1][0], markersize=10)
    ax.plot(mean(spread[knob]), i, "o", color=SERIES[0][0])
ax.set_yticks(range(len(ranked)), [f"{k} (luck)" if k in luck else k for k in ranked])
ax.set(xlabel="range of accuracy over three settings (points)", title="Sensitivity map", xlim=(0, None))
fig.supxlabel(f"n = {len(sens['seeds'])} seeds (ticks), dot: mean; grey: no wider than the mean range of luck.\n"
              "Not measured here: knobs moved together, other optimisers, larger models.", x=0.01, ha="left",
              fontsize=9, color="#606060")
plt.show()

# %%
print(f"{sens['verdict'].upper()}: {sens['claim']}")
tell(sens, "spread")

# %% [markdown]
# Two rows are luck: three seeds of the first weights, three of the data order, same recipe. A range over three values is
# positive even for a knob that does nothing, so compare with luck, seed by seed, not with zero. (Done after the run. Ends
# below zero in the list above are the t interval's, not a range's.)

# %%
for knob in reversed([k for k in ranked if k not in luck]):
    e = paired_effect(spread[knob], spread[luck[0]])
    print(f"{knob:21} wider than luck by {e.estimate:+5.1f} points [{e.low:+.1f}, {e.high:+.1f}]")

# %% [markdown]
# The claim is refuted: a batch four times larger leaves a quarter of the steps, and sorted rows make every batch
# one-sided. These two stand clear of luck. Of the other six, the rate among them, six seeds show nothing. Which knob
# dominates depends on which settings somebody calls conventional.

# %%
tell(sens, "batch", "data order, kind", "warm-up", "weight decay", "beta2")

# %% [markdown]
# ## Where the rate breaks

# %%
factors = sens["extra"]["lr_factors"]
curves = [[100 * r[f"lr {i}"] for i in range(len(factors))] for r in sens["per_seed"]]
mean_curve = [mean(at) for at in zip(*curves)]

# %%
fig, ax = plt.subplots(figsize=(6.4, 3.6))
for curve in curves:
    ax.plot(factors, curve, color=SERIES[3][0], linewidth=0.8, marker=".")
ax.plot(factors, mean_curve, color=SERIES[0][0], marker="o", label="mean over seeds")
ax.set_xscale("log", base=2)
ax.set(xlabel="peak learning rate, as a factor of the recipe's", ylabel="accuracy on held-out pairs (%)",
       title="Stability envelope")
ax.legend()
fig.supxlabel(f"n = {len(curves)} seeds (grey), each its own weights and order; no interval drawn.\n"
              "Not measured here: other schedules, other batch sizes.", x=0.01, ha="left", fontsize=9, color="#606060")
plt.show()
print({f"x{f:g}": round(m, 1) for f, m in zip(factors, mean_curve)})

# %%
for f, at in zip(factors, zip(*curves)):
    k = sum(x < 60 for x in at)
    low, high = wilson(k, len(curves))
    print(f"x{f:<7g} runs that learnt no more than a coin (under 60 %): {k} of {len(curves)} "
          f"[{100 * low:.0f}, {100 * high:.0f}] %")

# %% [markdown]
# Right of the recipe, one rate gives a fine score on one seed and a coin's on the next: 4 of 18 runs there, none of the 24
# from an eighth of it on. An edge in the spread, not a cliff: the single intervals overlap, and at 8 times the mean is
# back. Choose the middle of the plateau.
#
# ## Luck, taken apart
#
# Six first weights by six data orders, one run a cell: rows, columns, and the rest (two-way random effects).

# %%
shares_of = sens["extra"]["variance_shares"]
for name, (estimate, low, high) in shares_of.items():
    print(f"{name:24} {100 * estimate:4.0f} % of the variance [{100 * low:.0f}, {100 * high:.0f}]")
scores = [100 * x for cells in sens["extra"]["grid"] for x in cells]
print(f"{len(scores)} runs, standard deviation {100 * sens['extra']['standard_deviation']:.1f} points: "
      f"{sum(x < 60 for x in scores)} under 60 %, {sum(60 <= x < 90 for x in scores)} from 60 to 90 %, "
      f"{sum(x >= 90 for x in scores)} above")

# %% [markdown]
# Look at the runs before the shares. They come in two kinds, and one ended at a coin at the recipe's own rate: a standard
# deviation describes none of them. The intervals are wide, for six rows are six draws. The estimate says: hardly any
# seed is good in itself. Weights that were lucky with one order are not with the next, so "our good seed" is no recipe.
#
# ## One corrupt batch
#
# Half-way through, one batch of random tokens arrives, with the clip on and off. The lecture expects a catastrophe
# without the clip.

# %%
tell(sens, "corrupt batch")


# %%
def spoilt(step):
    batch = ordered(step)
    noise = torch.randint(3, 60, batch.ids.shape, generator=torch.Generator().manual_seed(seed))
    return Rows(noise, torch.ones_like(batch.mask)) if step == steps // 2 else batch


# %%
def fate(optimizer, lr, clip):
    """Mean loss of the four batches before the corrupt one, and of the four after it."""
    at = steps // 2
    try:
        losses = train(spoilt, optimizer=optimizer, lr=lr, clip=clip)[1]
    except ValueError as error:
        return f"stopped: {str(error).split(';')[0].removeprefix('run: ')}"
    return f"loss {mean(losses[at - 4:at]):.2f} before, {mean(losses[at + 1:at + 5]):.2f} after"


for optimizer, lr in (("adamw", 6e-3), ("sgd", 0.02)):
    for word, clip in (("on", 1.0), ("off", 1e9)):
        print(f"{optimizer:5} clip {word:3}: {fate(optimizer, lr, clip)}")

# %% [markdown]
# The live lines are one seed right after the batch; the recorded ones are the end of the run, and their intervals hold
# zero: neither catastrophe nor safety has been shown. Read your own history of gradient norms before you set a clip.
#
# ## The winner's curse
#
# Twelve recipes, one run each; the best score wins the sweep and goes on the slide. On fresh seeds it is usually less. The
# protocol spends the same compute otherwise: a quarter-length proxy for all, the best four in full on two seeds, the
# winner once more on a seed nobody has looked at; that last score is reported.

# %%
tell(sens, "winner", "fresh seeds, protocol")

# %% [markdown]
# Greedy overstates by 19 points; its interval all but touches zero. The protocol's number is unbiased by construction,
# for its last run chose nothing; six seeds confirm it to within 7 points or so. Whether the protocol also *chose* better,
# they do not settle.
#
# ## What you use at work
#
# PyTorch has a switch that refuses operations known to be nondeterministic. It does not order your data, seed your
# loader or fix your thread count.

# %%
torch.use_deterministic_algorithms(True)
try:
    torch.zeros(4).put_(torch.tensor([1, 1]), torch.tensor([1.0, 2.0]))
except RuntimeError as refusal:
    print("refused:", str(refusal).split(",")[0])

# %%
switched = train(loss_fn=backward_shards)
torch.use_deterministic_algorithms(False)
print("shards backward under the switch: no refusal, weights equal:", weights_hash(switched[0]) == weights_hash(reference[0]))

# %% [markdown]
# safetensors files make exactness cheap to ask: no pickle, no timestamp, so equal tensors are equal files and one SHA-256
# settles it. A zip of pickles promises no such thing.

# %%
with tempfile.TemporaryDirectory() as folder:
    for name in ("one", "two"):
        save_checkpoint(Path(folder) / name, reference[0])
    sums = {hashlib.sha256((Path(folder) / n / "model.safetensors").read_bytes()).hexdigest() for n in ("one", "two")}
print("same weights saved twice, distinct file sums:", len(sums))

# %% [markdown]
# And papermill reruns a notebook with parameters in a fresh kernel: the handoff drill for people. This one knows a path
# and a seed, nothing of our variables.

# %%
import nbformat
import papermill

DRILL = ["seed = None\nroot = None", """
from lifecycle_lib.core.store import Store
from lifecycle_lib.lab.stages import Lab
sft = Lab("smoke", seed=seed, device="cpu", store=Store(root)).sft()
print(sft.card["files"]["model.safetensors"]["sha256"])
"""]

# %%
book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in DRILL])
book.cells[0].metadata["tags"] = ["parameters"]
book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}


# %%
def handed_over(number):
    """The SHA-256 that a fresh kernel prints."""
    folder = Path(home.name) / f"handover-{number}"
    folder.mkdir()
    nbformat.write(book, folder / "drill.ipynb")
    done = papermill.execute_notebook(folder / "drill.ipynb", folder / "out.ipynb", progress_bar=False,
                                      parameters={"seed": seed, "root": str(folder / "store")},
                                      extra_arguments=["--log-level=40"])
    return "".join(o.text for o in done.cells[-1].outputs if o.get("name") == "stdout").split()[-1]


ours_sum = rebuild.weights_sum(small.sft())
print("SFT rebuilt by a fresh kernel: weights equal", handed_over(1) == ours_sum)

# %% [markdown]
# A registry such as MLflow's stores parameters, metrics and a tag beside the file: what you log, without a rebuild before
# it accepts. The gate above is what you add to it.
#
# ## Exercises
#
# **1. A stable loader (★★, 6 minutes).** Batches arrive as (number, batch) in any order. Write `stable(arrivals)`: a
# generator that yields batches by number, 0, 1, 2, ..., each as soon as all before it are out.

# %% nbgrader={"grade": false, "grade_id": "stable", "locked": false, "schema_version": 3, "solution": true, "task": false}
def stable(arrivals):
    """Yield batches in order of their number, waiting for the next one."""
    ### BEGIN SOLUTION
    waiting, expected = {}, 0
    for number, batch in arrivals:
        waiting[number] = batch
        while expected in waiting:
            yield waiting.pop(expected)
            expected += 1
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "stable-tests", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
assert list(stable([(1, "b"), (0, "a"), (2, "c")])) == ["a", "b", "c"]
### BEGIN HIDDEN TESTS
for run_number in range(5):
    got = list(stable((k, ordered(k).ids) for k in raced(run_number)))
    assert all(torch.equal(x, ordered(k).ids) for k, x in enumerate(got)) and len(got) == steps
eager = stable(iter([(0, "a"), (2, "c"), (1, "b")]))
assert next(eager) == "a", "batch 0 must not wait for batch 2"
### END HIDDEN TESTS

# %% [markdown]
# **2. What moved? (★★, 8 minutes).** Two run cards. Write `moved(a, b)`: the set of names among `"config"`, `"code"`,
# `"parents"`, `"versions"` and `"hardware"` in which they differ; a field that one of them lacks has moved.

# %% nbgrader={"grade": false, "grade_id": "moved", "locked": false, "schema_version": 3, "solution": true, "task": false}
def moved(a, b):
    """Which of the five differ between two cards."""
    ### BEGIN SOLUTION
    absent = object()
    names = ("config", "code", "parents", "versions", "hardware")
    return {n for n in names if n not in a or n not in b or a.get(n, absent) != b.get(n, absent)}
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "moved-tests", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
assert moved(dpo.card, dpo.card) == set()
assert moved(dpo.card, planted(lambda c: c["config"].update(beta=0.1)).card) == {"config"}
### BEGIN HIDDEN TESTS
import difflib


def by_text(a, b):
    """Oracle: sorted JSON of each part, compared line by line with difflib."""
    parts = ("config", "code", "parents", "versions", "hardware")
    dump = lambda card, p: json.dumps(card.get(p, "absent"), sort_keys=True, indent=1).splitlines()  # noqa: E731
    return {p for p in parts if any(x[0] in "+-" for x in difflib.ndiff(dump(a, p), dump(b, p)))}


for other in (small.sft().card, small.base().card, planted(lambda c: c.pop("hardware")).card):
    assert moved(dpo.card, other) == by_text(dpo.card, other)
### END HIDDEN TESTS

# %% [markdown]
# **3. How lucky is the best of n? (★★★, 10 minutes).** All n recipes are equally good, and scores scatter with standard
# deviation `sd`. Write `expected_curse(n, sd)`: by how much the best score overstates, on average (numerically; within
# 1 % of sd).

# %% nbgrader={"grade": false, "grade_id": "curse", "locked": false, "schema_version": 3, "solution": true, "task": false}
def expected_curse(n, sd):
    """Mean of the largest of n normal scores with mean 0."""
    ### BEGIN SOLUTION
    from scipy.special import ndtr

    x = torch.linspace(-9, 9, 20001, dtype=torch.float64).numpy()
    below = ndtr(x) ** n  # probability that all n lie below x
    return sd * float(x[-1] - (below[:-1] + below[1:]).sum() / 2 * (x[1] - x[0]))
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "curse-tests", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
assert abs(expected_curse(1, 1.0)) < 0.01
print(f"best of 12 equal recipes overstates by {expected_curse(12, 1.0):.2f} standard deviations")
### BEGIN HIDDEN TESTS
from scipy.integrate import quad
from scipy.stats import norm

for n in (2, 5, 12, 50):
    exact = quad(lambda x, n=n: x * n * norm.pdf(x) * norm.cdf(x) ** (n - 1), -10, 10)[0]
    assert abs(expected_curse(n, 2.0) - 2.0 * exact) < 0.02
### END HIDDEN TESTS

# %% [markdown]
# ## Quiz

# %%
from lifecycle_lib.lab.quiz import grade, interview, quiz

quiz("06")

# %%
answers_given = {}  # {"q1": "a", ...}
_ = grade("06", answers_given)

# %%
interview("06")

# %% [markdown]
# ## What to remember
#
# 1. Exact, statistical, behavioural: name the level before you say "reproduces", and state the margin first.
# 2. One draw, one default, one forgotten optimiser state is another checkpoint. Rounding is enough.
# 3. The mean shows less than half of a lost patch set. Fix the hardest slice beforehand and look there.
# 4. A closure is proved by a rebuild in a clean room, not by a document.
# 5. The best of a sweep is partly luck. Report a run that nobody chose.
#
# **Made:** nothing. **Next:** `07_sft_the_interface` teaches a base to answer; its card is already written.
