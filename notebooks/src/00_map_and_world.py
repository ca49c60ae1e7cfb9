# ---
# jupyter:
#   lifecycle:
#     rows: [S0-04, S0-10, S0-11, S1-01, S1-02, S1-03, S1-04, S1-05, S1-06, S1-83, S1-88, S1-98, S3-11.02, S3-11.04,
#       S4-02, S4-03, S4-10, S4-14, S4-15, S4-16]
# ---
# %% [markdown]
# # Which of these steps moved a weight?
#
# You have an assistant that answers returns at a shop. A customer writes, the assistant quotes a policy and decides.
# One day it decides wrong. Do you retrain it, edit a document, change a setting, or roll back? You cannot say before
# you know which steps of its life changed the model and which only used it.
#
# After this notebook you can:
#
# - prove with a hash, for every stage, whether it changed the weights;
# - serve 1,000 requests and show that not one bit of the model moved;
# - say what each training stage added, with numbers from one frozen evaluation;
# - measure how often one unchanged model contradicts itself;
# - name the layer that owns a failure before anyone says "retrain".
#
# **Needs** nothing but this repository. **Makes** no new artifact: it reads the chain that the other notebooks build.
# Measured from a warm store: half a minute of one CPU core, 0.6 GB at its peak. From an empty one the chain is built
# first: about five minutes of CPU, once.

# %% tags=["parameters"]
profile = "laptop"
seed = 0
device = ""
n_prompts = 64
n_samples = 50

# %%
from lifecycle_lib.lab.notebook import ROOT, start

lab = start("00", profile, seed, device)

# %% [markdown]
# The strip above opens every notebook: the levers in brackets are the ones it pulls. First the environment, against
# the pins in `pyproject.toml`. "My loss isn't yours" usually starts here.

# %%
import re
import sys
from importlib.metadata import version

pins = dict(re.findall(r'"([\w-]+)==([\w.]+)"', (ROOT / "pyproject.toml").read_text()))

# %%
seen = {name: version(name).split("+")[0] for name in ("torch", "numpy", "scipy", "transformers", "safetensors")}
off = [f"{name} is {has}, pinned {pins[name]}" for name, has in seen.items() if has != pins[name]]
print("Python 3.11 or newer:", sys.version_info >= (3, 11), "| as pinned:", ", ".join(off) or ", ".join(seen))

# %% [markdown]
# ## The world: one desk, one order, one strict answer
#
# Everything happens at one returns desk. A request is one line: the shop's policy lines, the order as the order store
# has it, and the customer's words.

# %%
from lifecycle_lib.desk.cases import golden_case

golden = golden_case()
print(golden.prompt.replace("<", "\n<").strip())

# %% [markdown]
# The answer is strict JSON, compared to the character. It quotes its evidence first and decides last: a model that
# writes left to right can then look at what it has just copied.

# %%
print(golden.answer)

# %% [markdown]
# Do this one by hand. Order A10234, damaged, 12 days old, damage confirmed. P-7 covers damage for 30 days. So 12 <=
# 30, and the damage is confirmed by the order store, not by the customer.

# %%
from lifecycle_lib.desk.cases import with_label_claim
from lifecycle_lib.judge.verifiers import full_verifier

days, window, confirmed = 12, 30, True
eligible = days <= window and confirmed

# %%
assert golden.eligible is eligible
print("by hand:", eligible, "| verifier pays the right answer", full_verifier(golden.answer, golden))
print("and the same with an invented label", full_verifier(with_label_claim(golden.answer), golden))
print(with_label_claim(golden.answer))

# %% [markdown]
# `P-7` is a name, not a rule. Other shops give the same id another window, so an answer learnt by heart is wrong next
# door. Here are three training requests that show a P-7 line.

# %%
from lifecycle_lib.desk.cases import draw_cases

for case in [c for c in draw_cases(200, seed, "look") if c.policy_id == "P-7"][:3]:
    print(f"{case.policy.line():18} order {case.order.status():15} -> eligible {case.eligible}")

# %% [markdown]
# ## Two loops
#
# The **building loop** changes weights: data, training, evaluation, back to data. The **product loop** turns
# thousands of times a day around weights that do not change. They touch in two places: a gate lets a checkpoint
# through, and labelled traces come back. The figure is drawn by the next cells.

# %%
def box(x, y, title, note, fill="#ffffff", width=128):
    """A labelled node, centred on (x, y)."""
    return (f'<rect x="{x - width / 2}" y="{y - 22}" width="{width}" height="44" rx="7" fill="{fill}" stroke="#111"/>'
            f'<text x="{x}" y="{y - 3}" text-anchor="middle" font-weight="bold" fill="#111">{title}</text>'
            f'<text x="{x}" y="{y + 13}" text-anchor="middle" font-size="11" fill="#333">{note}</text>')


def line(*points, dashed=False):
    """An arrow through points."""
    path, dash = " ".join(f"{x},{y}" for x, y in points), "5 4" if dashed else "none"
    return (f'<polyline points="{path}" fill="none" stroke="#111" stroke-width="1.6" stroke-dasharray="{dash}" '
            'marker-end="url(#tip)"/>')


def picture(width, height, label, *parts):
    """One SVG with a text alternative, on white so that it reads in a dark page and in print."""
    tip = ('<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
           '<path d="M0,0L8,4L0,8z" fill="#111"/></marker></defs>')
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img" '
            f'aria-label="{label}" font-family="sans-serif" font-size="13"><title>{label}</title>{tip}'
            f'<rect width="{width}" height="{height}" fill="#fff"/>{"".join(parts)}</svg>')


# %%
def dot(path, seconds, colour):
    """A dot that travels a closed path for ever: the slow loop and the fast one."""
    return (f'<circle r="6" fill="{colour}"><animateMotion dur="{seconds}s" repeatCount="indefinite" path="{path}"/>'
            "</circle>")


def two_loops():
    """Left: data, train, evaluate, route. Right: request, evidence, answer, trace. Between: the checkpoint."""
    left = [box(90, 80, "train", "weights CHANGE", "#e8e8e8"), box(270, 80, "evaluate", "frozen cases"),
            box(270, 240, "route", "who owns it?"), box(90, 240, "data", "reviewed rows")]
    right = [box(590, 80, "answer", "weights FROZEN"), box(590, 240, "trace", "inputs, output"),
             box(770, 240, "request", "a customer"), box(770, 80, "evidence", "policy text")]
    arrows = [line((154, 80), (206, 80)), line((270, 102), (270, 218)), line((206, 240), (154, 240)),
              line((90, 218), (90, 102)), line((706, 80), (654, 80)), line((590, 102), (590, 218)),
              line((654, 240), (706, 240)), line((770, 218), (770, 102)),
              line((334, 80), (362, 80)), line((498, 80), (526, 80)), line((526, 240), (334, 240), dashed=True)]
    words = ('<text x="180" y="30" text-anchor="middle">building loop: days, changes weights</text>'
             '<text x="680" y="30" text-anchor="middle">product loop: milliseconds, changes none</text>'
             '<text x="430" y="230" text-anchor="middle" font-size="11">labelled traces</text>')
    dots = [dot("M90,80 H270 V240 H90 Z", 9, "#777"), dot("M590,80 V240 H770 V80 Z", 2, "#111")]
    return picture(860, 290, "Two loops joined by a gate: building changes weights, the product loop does not", *arrows,
                   *dots, *left, *right, box(430, 80, "checkpoint", "gate passed, locked", "#d9d9d9", 132), words)


# %% [markdown]
# Open a node below the figure to see what it leaves on disk. That is the test for the rest of this notebook: does the
# checkpoint's file change, or some other file?

# %%
from IPython.display import HTML, SVG, display

DISK = {"data": "data/*.jsonl: rows with source and licence", "train": "model.safetensors, under a new fingerprint",
        "evaluate": "report.json, naming the checkpoint it is about", "route": "a row in the incident log",
        "checkpoint": "pointer.json names one release; the file stays", "evidence": "the index or the policy text",
        "answer": "nothing", "trace": "a line of traces.jsonl", "request": "nothing"}
nodes = "".join(f"<details><summary><b>{node}</b></summary>{what}</details>" for node, what in DISK.items())
display(SVG(two_loops()), HTML(nodes))
print(f"{len(DISK)} nodes in words:", *(f"{node} -> {what}" for node, what in DISK.items()), sep="\n  ")

# %% [markdown]
# A stale window in a citation: which loop owns it? The right one, node *evidence*. No training step can know that the
# shop changed its policy this morning.
#
# ## Predict first
#
# Ten things happen to our assistant below. Which of them change the weights? Edit the guesses before you run on; the
# ones here are a colleague's, and he is confident.

# %%
guesses = {"pretraining": True, "SFT": True, "preferences (DPO)": True, "verifier rewards": True, "int8 packing": False,
           "new policy text in the prompt": False, "1,000 requests": True, "frozen evaluation": False,
           "release gate": False, "temperature 0 to 1": False}

# %% [markdown]
# ## A fingerprint of the weights, by hand
#
# A model is a dictionary of named arrays. Hash every name, type, shape and byte in a fixed order: two models have the
# same fingerprint exactly when every bit agrees.

# %% tags=["algorithm"]
import hashlib

import torch


def fingerprint_of(model):
    """SHA-256 over the state dict, in name order."""
    digest = hashlib.sha256()
    for name in sorted(model.state_dict()):
        tensor = model.state_dict()[name].detach().cpu().contiguous()
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# %% [markdown]
# Before trusting it: does it agree with the library's version, and does it see a change in the last bit of one weight
# out of 0.7 million? `torch.equal` is the independent judge.

# %%
import copy

from lifecycle_lib.model.checkpoint import weights_hash
from lifecycle_lib.model.gpt import GPT

# %%
torch.manual_seed(seed)
one = GPT(lab.profile.gpt)
two = copy.deepcopy(one)
assert fingerprint_of(one) == weights_hash(one) == fingerprint_of(two)

# %%
with torch.no_grad():
    weight = two.blocks[0].mlp.w_up.weight
    weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(9.0))
same = all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values()))
print(f"{one.n_params():,} parameters; torch.equal after one last bit: {same}; "
      f"fingerprints agree: {fingerprint_of(one) == fingerprint_of(two)}")

# %% [markdown]
# ## The chain
#
# `lab.base()`, `lab.sft()` and so on ask the store for a stage. What is there comes back at once; what is missing is
# built from its parents. Training stages share one loop and differ in data and loss.

# %%
from lifecycle_lib.core.seeds import seed_everything

chain = {"base": lab.base(), "sft": lab.sft(), "dpo": lab.dpo(), "rlvr": lab.rlvr(), "int8": lab.quantised("int8")}

# %%
seed_everything(lab.seed)
models = {"random": GPT(lab.profile.gpt).eval()} | {name: lab.load(artifact) for name, artifact in chain.items()}
prints = {name: weights_hash(model) for name, model in models.items()}
for name, value in prints.items():
    print(f"{name:8} {value[:16]}")

# %% [markdown]
# Six fingerprints, and the first five rows of the table are decided: each stage's weights against those it started
# from. Now the five things that happen *around* a model. Each runs for real, on the same loaded model, and the hash
# is taken before and after.

# %%
served = lab.engine(chain["rlvr"], temperature=0.0)
tok = served.tok


def around(action):
    """(hash before, hash after) of the served model."""
    before = served.fingerprint()
    action()
    return before, served.fingerprint()


# %%
from lifecycle_lib.judge.evals import evaluate, frozen_cases
from lifecycle_lib.judge.gates import release_gate
from lifecycle_lib.serve.engine import Engine

traffic = draw_cases(1000, seed, "traffic")
some = frozen_cases(min(64, lab.profile.n_eval))

# %%
table = {stage: (prints[a], prints[b]) for stage, a, b in (
    ("pretraining", "random", "base"), ("SFT", "base", "sft"), ("preferences (DPO)", "sft", "dpo"),
    ("verifier rewards", "dpo", "rlvr"), ("int8 packing", "rlvr", "int8"))}

# %%
new_text = golden.prompt.replace("damaged P-7 30d", "damaged P-7 07d")
table["new policy text in the prompt"] = around(lambda: served.texts([golden.prompt, new_text]))
table["1,000 requests"] = around(lambda: served.answer(traffic))
table["frozen evaluation"] = around(lambda: evaluate("rlvr", served.answer, some))
table["release gate"] = around(lambda: release_gate(19, 20, 1, 920, 1000))
table["temperature 0 to 1"] = around(lambda: Engine(served.model, tok, temperature=1.0).texts([golden.prompt], 5))

# %%
right = 0
for step, (before, after) in table.items():
    changed = before != after
    right += guesses[step] == changed
    print(f"{step:30} {'CHANGED' if changed else 'same   '}  guess {'right' if guesses[step] == changed else 'WRONG'}")
print(f"{right} of {len(table)} guesses right")

# %% [markdown]
# Two rows fool people. *1,000 requests*: an assistant does not learn from its users by being used; somebody has to
# collect, review and train. *int8 packing* does change the stored numbers, though nothing was learnt: rounding. It
# needs its own evaluation for that reason.
#
# The same on disk: the store recomputes the SHA-256 of every file of the checkpoint and compares it with the run
# card.

# %%
assert lab.store.verify(chain["rlvr"]) == []
assert fingerprint_of(lab.load(chain["rlvr"])) == prints["rlvr"]
print(f"{len(traffic):,} requests served; files that changed: {len(lab.store.verify(chain['rlvr']))}")

# %% [markdown]
# ## Where a checkpoint comes from
#
# A checkpoint is the product of everything before it. The store keeps each artifact's parents by fingerprint, so a
# released model names its whole ancestry, and editing any ancestor would have given it another name.

# %%
lineage = [*lab.store.lineage(chain["int8"]), chain["int8"]]
for artifact in lineage:
    parents = ", ".join(sorted(artifact.card["parents"])) or "nothing"
    print(f"{artifact.name:10} {artifact.fingerprint}  made from {parents}")

# %%
def lineage_picture():
    """theta_0 to theta_3 left to right, the promoted one with its lock."""
    names = {"base": "θ0 base", "sft": "θ1 SFT", "dpo": "θ2 DPO", "rlvr": "θ3 rewards", "int8": "θ3 in int8"}
    parts = []
    for i, (name, label) in enumerate(names.items()):
        x = 85 + 165 * i
        note = "promoted, LOCKED" if name == "rlvr" else f"{chain[name].card.get('steps', 0)} steps"
        parts.append(box(x, 55, label, note, "#d9d9d9" if name == "rlvr" else "#fff"))
        parts += [line((x + 64, 55), (x + 101, 55))] if i < 4 else []
    loop = line((600, 77), (600, 112), (560, 112), (560, 79), dashed=True)
    words = '<text x="612" y="108" font-size="11">product loop: 1,000 turns, same hash</text>'
    title = "Checkpoints theta 0 to theta 3, the promoted one locked while it serves"
    return picture(840, 130, title, *parts, loop, words)


display(SVG(lineage_picture()))

# %%
print("steps:", {name: artifact.card.get("steps", 0) for name, artifact in chain.items()})

# %% [markdown]
# Products differ. Ours owns every stage; many teams start from open weights; most call somebody else's model and own
# none of them. What stays on your side of the line is the same in all three.

# %%
RECIPES = {"this repository": ["pretraining", "SFT", "preferences", "rewards", "packing"],
           "open weights": ["SFT", "preferences", "preferences again", "packing"], "hosted model": []}
ALWAYS = ["evidence at request time", "output contract", "evaluation", "gate and rollback"]
for name, own in RECIPES.items():
    print(f"{name:16} trains: {', '.join(own) or 'nothing (those rows of the table vanish)'}")
print(f"{'all three':16} own:    {', '.join(ALWAYS)}")

# %% [markdown]
# ## What each stage adds
#
# The same request, the same greedy decoder, six sets of weights. Predict the base model's answer before you look: it
# has read twelve thousand desk documents, and none of them held JSON.

# %%
probe = frozen_cases(1)[0]
print(f"{probe.prompt}\n{'expected':8} {probe.answer}")

# %%
for name, model in models.items():
    [text] = Engine(model, served.tok, temperature=0.0).texts([probe.prompt])
    print(f"{name:8} {text[:110]!r}")

# %% [markdown]
# One request is an anecdote. Three probes on the frozen evaluation (512 cases whose (days, window) pairs no training
# text shows), at temperature 1, the way customers meet it: **knowledge** (quotes the right line), **format** (valid
# JSON), **manner** (claims no label that was never made).

# %%
reports = {name: lab.evaluate(artifact) for name, artifact in chain.items()}
print(f"{'':6} {'knowledge':>18} {'format':>18} {'invented claims':>18} {'exact':>18}")
for name, report in reports.items():
    cells = [f"{100 * report[k]:.0f} % ({100 * report[k + '_low']:.0f}-{100 * report[k + '_high']:.0f})"
             for k in ("evidence", "json_validity", "invented_claim_rate", "exact_pass")]
    print(f"{name:6} " + " ".join(f"{cell:>18}" for cell in cells))

# %%
import matplotlib.pyplot as plt

from lifecycle_lib.lab.figures import scorecard_figure

_ = scorecard_figure(list(reports.values()), not_measured="other seeds (see below), other wordings, real customers")
plt.show()

# %%
print("gain in exact pass by stage:", *(f"{b} {100 * (reports[b]['exact_pass'] - reports[a]['exact_pass']):+.0f} points"
                                        for a, b in zip(list(reports), list(reports)[1:])), sep="  ")

# %% [markdown]
# Left to right: the base has statistics of text and no task. SFT brings the interface, and a habit from its
# demonstrations, 30 % of which claim a label. Preferences remove the habit. Rewards add little on this one seed;
# notebook 12 asks five.

# %% [markdown]
# ## How far does theory carry?
#
# Not having a full theory is not guessing. Imitation theory makes four forecasts, none fitted to any run: an
# untrained model spreads its bets evenly (loss ln 640); a copy of its demonstrations always gives valid JSON, claims
# a label 30 % of the time, and is exactly right the other 70 %. Recorded runs (5 seeds) say how far off each is.

# %%
import math

from lifecycle_lib.desk.documents import draw_documents
from lifecycle_lib.lab.claims import recorded
from lifecycle_lib.train.pretrain import lm_loss, pack

runs = recorded("sft_room")["per_seed"]

# %%
stream, _ = pack([tok.encode(row["text"]) for row in draw_documents(60, 0)])
first_loss = []
for run in runs:
    seed_everything(run["seed"])
    first_loss.append(lm_loss(GPT(lab.profile.gpt), stream, 96))

# %%
from lifecycle_lib.core.stats import paired_effect

LADDER = {"loss before training": (math.log(lab.profile.gpt.vocab_size), first_loss),
          "format: valid JSON": (1.0, [run["sft.json_validity"] for run in runs]),
          "manner: invented claims": (0.3, [run["sft.invented_claim_rate"] for run in runs]),
          "the decision: exact pass": (0.7, [run["sft.exact_pass"] for run in runs])}
errors = {rung: [abs(x - forecast) / forecast for x in found] for rung, (forecast, found) in LADDER.items()}

# %%
for rung, off in errors.items():
    e = paired_effect(off, [0.0] * len(off))
    print(f"{rung:26} theory {LADDER[rung][0]:.2f}, off by {100 * e.estimate:5.1f} % "
          f"[{100 * e.low:.1f}, {100 * e.high:.1f}]")
print("what a user likes          theory says nothing, and nobody here can measure it: no people")

# %%
rise = paired_effect(errors["the decision: exact pass"], errors["loss before training"])
print(f"top rung minus bottom rung: {100 * rise.estimate:.0f} points of relative error "
      f"[{100 * rise.low:.0f}, {100 * rise.high:.0f}], {rise.n} seeds, 95 % paired t")
order = sorted(errors, key=lambda rung: sum(errors[rung]))
print("smallest error first:", "; ".join(order), "| the order of the ladder:", order == list(errors))

# %% [markdown]
# So the ladder climbs as a whole and not rung by rung: what the objective fixes directly is within a percent, what
# has to be learnt from examples is more than ten times further off. Mechanism where it reaches, measurement where it
# does not, and a note of which is which.
#
# ## The same request twice
#
# Now the claim of this notebook. One checkpoint (SFT), one request, asked again and again at three temperatures.
# Commit to a number before you run.

# %%
from lifecycle_lib.lab.claims import ClaimCard

card = ClaimCard(
    claim="one frozen checkpoint, sampled at temperature 1, gives opposite decisions on the same request",
    direction="up", smallest=0.10, unit="share of requests",
    falsifier="fewer than 1 request in 10 flips between two answers, or greedy decoding flips as well",
    scope=f"SFT checkpoint, {n_prompts} frozen requests, {n_samples} answers each",
    not_measured="other seeds, long chats, other models")
card.show()

# %%
card.predict(estimate=0.5, confidence=0.8)

# %%
from lifecycle_lib.judge.verifiers import parse_answer

asked = frozen_cases(n_prompts)


def sampled(temperature):
    """Per request: number of distinct answers, and 1 if two valid answers decide differently."""
    texts = lab.engine(chain["sft"], temperature).texts([case.prompt for case in asked], n_samples)
    groups = [texts[i : i + n_samples] for i in range(0, len(texts), n_samples)]
    decided = [{d.fields["eligible"] for d in map(parse_answer, group) if d.valid} for group in groups]
    return [len(set(group)) for group in groups], [float(len(each) > 1) for each in decided]


# %%
from lifecycle_lib.core.stats import wilson

distinct, flips = {}, {}
for temperature in (0.0, 0.5, 1.0):
    distinct[temperature], flips[temperature] = sampled(temperature)
    low, high = wilson(int(sum(flips[temperature])), n_prompts)
    print(f"temperature {temperature:3}: {sum(distinct[temperature]) / n_prompts:3.1f} distinct answers of "
          f"{n_samples}; decision flips in {sum(flips[temperature]):.0f} of {n_prompts} requests "
          f"({100 * low:.0f} to {100 * high:.0f} %)")

# %%
effect = paired_effect(flips[1.0], flips[0.0])
_ = card.settle(effect)

# %% [markdown]
# Supported or not, look where the flips sit: a request two days or less from the edge of its window, or any other?

# %%
for where in ("boundary", "plain", "unconfirmed", "no_policy"):
    there = [flip for flip, case in zip(flips[1.0], asked) if case.slice == where]
    print(f"{where:12} {sum(there):2.0f} of {len(there):2} requests flip")
compare = sum(flip for flip, case in zip(flips[1.0], asked) if case.slice in ("boundary", "plain"))
print(f"{compare:.0f} of {sum(flips[1.0]):.0f} flips sit where days must be compared with a window")

# %%
from lifecycle_lib.lab.figures import style

style()
fig, axes = plt.subplots(1, 2, figsize=(7.4, 3.2))
labels = (f"distinct answers of {n_samples}", "requests with a flip (%)")
for ax, found, label, scale in zip(axes, (distinct, flips), labels, (1, 100)):
    stats = [paired_effect(found[t], [0.0] * n_prompts) for t in found]
    ax.errorbar(list(found), [scale * e.estimate for e in stats], [scale * (e.estimate - e.low) for e in stats],
                marker="o", color="#111111")
    ax.set(xlabel="temperature", ylabel=label, xticks=list(found), ylim=(-0.03 * ax.get_ylim()[1], None))
fig.supxlabel(f"n = {n_prompts} requests, one checkpoint; bars: 95 % t intervals over requests.\n"
              "Not measured here: other seeds, other prompts' lengths, real customers.", x=0.01, ha="left", fontsize=9,
              color="#606060")
plt.show()

# %% [markdown]
# The control: does anything but chance differ? The same generator seed must give the same texts again, and greedy
# decoding one single text. And the price of sampling over recorded seeds:

# %%
again = [lab.engine(chain["sft"], 1.0).texts([golden.prompt], 20) for _ in range(2)]
print("same generator seed, same 20 answers:", again[0] == again[1], "| greedy distinct answers:", max(distinct[0.0]))
price = paired_effect([run["sft_greedy.exact_pass"] for run in runs], [run["sft.exact_pass"] for run in runs])
print(f"exact pass, greedy minus temperature 1: {100 * price.estimate:.0f} points [{100 * price.low:.0f}, "
      f"{100 * price.high:.0f}], {price.n} seeds, 95 % paired t")

# %% [markdown]
# When is greedy *still* not repeatable? When a tie is decided by rounding. Serve the same request alone and in a
# crowd: sums run in another order, the last bits differ, and a near tie can tip.

# %%
from lifecycle_lib.model.sampling import left_pad

crowd, mask = left_pad([tok.encode(c.prompt) for c in (golden, *traffic[:63])], tok.special["<pad>"])
model = served.model
with torch.no_grad():
    alone = model(torch.tensor([tok.encode(golden.prompt)]))[0, -1]
    crowded = model(crowd, mask)[0, -1]
print("bit for bit the same logits:", torch.equal(alone, crowded),
      "| largest difference under 0.0001:", bool((alone - crowded).abs().max() < 1e-4))

# %% [markdown]
# ## Five instincts that a developer brings
#
# **Rebuild.** Code rebuilds from source. A checkpoint rebuilds only from source *and* seed *and* data in the same
# order. A toy of 3 steps shows it.

# %%
from lifecycle_lib.train.logprobs import answer_loss, pad_rows
from lifecycle_lib.train.loop import FitConfig, fit
from lifecycle_lib.train.sft import encode_rows, make_demonstrations

rows = encode_rows(tok, make_demonstrations(draw_cases(48, seed, "toy"), 0.0, seed))
three_steps = FitConfig(steps=3, warmup_steps=1)


def toy(its_seed, data):
    """Hash of a fresh model after three steps of 16 rows."""
    seed_everything(its_seed)
    model = GPT(lab.profile.gpt)
    batches = lambda i: pad_rows(*map(list, zip(*data[16 * i : 16 * i + 16])), tok.special["<pad>"])  # noqa: E731
    fit(model, batches, answer_loss, three_steps)
    return weights_hash(model)


# %%
first = toy(1, rows)
print("same seed, same order:  same weights:", toy(1, rows) == first)
print("other seed:             same weights:", toy(2, rows) == first)
print("two rows swapped:       same weights:", toy(1, [rows[20], *rows[1:20], rows[0], *rows[21:]]) == first)

# %% [markdown]
# **Bug locality.** A bug has a line. The 40 steps of preference training removed one habit; where in the checkpoint
# did that happen?

# %%
old, new = (models[name].state_dict() for name in ("sft", "dpo"))
moved = sum(int((old[key] != new[key]).sum()) for key in old) / sum(t.numel() for t in old.values())
print(f"{100 * moved:.0f} % of the numbers moved")

# %%
size = torch.cat([((new[key] - old[key]).abs() / old[key].abs().clamp(min=1e-6)).flatten() for key in old]).median()
push = {key: float((new[key] - old[key]).square().sum()) for key in old}
most = max(push, key=push.get)
print(f"half of them by under {1e6 * size:.0f} millionths of their value; "
      f"{100 * push[most] / sum(push.values()):.0f} % of the movement is in {most}, which every request reads")

# %% [markdown]
# **Patch isolation.** Fix one line and the rest stays. So take one request that SFT gets wrong when greedy, train on
# that single row until it is right, and look at the others.

# %%
held = frozen_cases(min(256, lab.profile.n_eval))
before = lab.engine(chain["sft"], 0.0).answer(held)
broken = next((i for i, case in enumerate(held) if before[i] != case.answer), 0)
print(f"greedy SFT: {sum(a != c.answer for a, c in zip(before, held))} of {len(held)} wrong; patching number {broken}")

# %%
[(prompt_ids, answer_ids)] = encode_rows(tok, [{"prompt": held[broken].prompt, "answer": held[broken].answer}])
patch = pad_rows([prompt_ids], [answer_ids], tok.special["<pad>"])

# %%
patched = lab.engine(chain["sft"], 0.0)
steps = 0
while patched.answer([held[broken]]) != [held[broken].answer] and steps < 40:
    patched.model.requires_grad_(True)
    fit(patched.model, lambda i: patch, answer_loss, FitConfig(steps=2, optimizer="adamw", lr=3e-4, warmup_steps=0))
    steps += 2

# %%
from lifecycle_lib.core.stats import mcnemar_exact

after = patched.answer(held)
others = [i for i in range(len(held)) if i != broken]
changed = sum(before[i] != after[i] for i in others)
lost = sum(before[i] == held[i].answer != after[i] for i in others)
won = sum(after[i] == held[i].answer != before[i] for i in others)

# %%
low, high = wilson(changed, len(others))
print(f"patched in {steps} steps: {after[broken] == held[broken].answer}; {changed} of {len(others)} other answers "
      f"changed ({100 * low:.0f} to {100 * high:.0f} %): {lost} broken, {won} mended, "
      f"McNemar p = {mcnemar_exact(lost, won):.2f}")

# %% [markdown]
# **Readable diff.** A reviewer reads a diff. Here are both kinds for SFT to DPO: the numbers, and the behaviour.

# %%
name = "blocks.0.mlp.w_up.weight"
delta = (new[name] - old[name]).flatten()[:6]
print("weights:  ", ", ".join(f"{float(x):+.0e}" for x in delta), f"... and so on, {len(old)} tensors")

# %%
rows_of = {stage: {row["case_id"]: row for row in reports[stage]["cases"]} for stage in ("sft", "dpo")}
pairs = [(rows_of["sft"][key], rows_of["dpo"][key]) for key in rows_of["sft"]]
print("behaviour:", f"{sum(a['claim'] and not b['claim'] for a, b in pairs)} claims gone, "
      f"{sum(b['claim'] and not a['claim'] for a, b in pairs)} new; "
      f"{sum(b['exact'] and not a['exact'] for a, b in pairs)} answers mended, "
      f"{sum(a['exact'] and not b['exact'] for a, b in pairs)} broken, of {len(pairs)}")

# %% [markdown]
# **Determinism** you have met above. The five rows:
#
# | instinct from code | what happened here | what to do instead |
# |---|---|---|
# | rebuild from source | two rows swapped: other weights | pin data, order, seed; keep a run card |
# | same input, same output | decisions flipped at temperature 1 | score rates over many samples |
# | a bug has a line | most numbers moved | bisect by stage |
# | a patch is local | one row changed other answers | rerun the whole frozen evaluation |
# | read the diff | 0.7 million numbers | diff the behaviour |

# %% [markdown]
# Not every instinct misleads. Sort six of them into *helps*, *helps with limits*, *misleads* before you run this.

# %%
INSTINCTS = {"version what you ship": ("helps", "one hash names one release"),
             "keep a tested way back": ("helps", "a rollback moves a pointer, no weights"),
             "unit tests": ("helps with limits", "they hold for the thirteen functions below, not for sampled answers"),
             "fix the bug where it is": ("misleads", f"one patched row changed {changed} other answers"),
             "read the diff": ("misleads", f"{len(old)} tensors of small numbers"),
             "twice the machines, twice the load": ("helps with limits", "true for serving; training has one queue")}
for instinct, (kind, evidence) in INSTINCTS.items():
    print(f"{instinct:35} {kind:18} {evidence}")

# %% [markdown]
# ## Break it on purpose: a server that learns
#
# A colleague lets the server learn from every request: one tiny gradient step after each answer. Would you notice?

# %%
leaky = lab.engine(chain["rlvr"], 0.0)


def answer_and_learn(case):
    """Answers, then takes one small step on its own output."""
    text = leaky.answer([case])[0]
    leaky.model.requires_grad_(True)
    logits = leaky.model(torch.tensor([leaky.tok.encode(case.prompt + text)]))
    logits.log_softmax(-1).amax(-1).mean().neg().backward()
    with torch.no_grad():
        for p in leaky.model.parameters():
            p -= 1e-5 * p.grad
            p.grad = None
    return text


# %%
promoted = leaky.fingerprint()
learnt = [answer_and_learn(case) for case in some[:16]]
same_texts = sum(a == b for a, b in zip(leaky.answer(some), served.answer(some)))
print(f"answers as before: {same_texts} of {len(some)}; "
      f"hash says: {'untouched' if leaky.fingerprint() == promoted else 'the weights MOVED while serving'}")
assert leaky.fingerprint() != promoted

# %% [markdown]
# The evaluation sees nothing; the hash does at once. That is why the promoted checkpoint is locked by its hash and
# why `judge/release.py` refuses a file that differs by one byte.
#
# ## Five parts of the assistant that are not weights
#
# Users meet an assembly. Swap one part at a time, same checkpoint, and look at what they would see.

# %%
from dataclasses import replace

short = replace(golden.policy, window_days=7)
week = replace(golden, policy=short, policies=(short, golden.policies[1]))
unconfirmed = replace(golden, order=replace(golden.order, damage_confirmed=False))


def seen(case=golden, temperature=0.0, limit=48, guard=False):
    """What the user sees of one request through this assembly."""
    engine = lab.engine(chain["sft"], temperature)
    engine.max_new_tokens = limit
    [text] = engine.answer([case])
    return "handed to a person" if guard and not full_verifier(text, case) else text


# %%
swaps = {"as it stands": {}, "evidence: 7-day policy": {"case": week}, "order store: unconfirmed": {"case": unconfirmed},
         "decoder: temperature 1": {"temperature": 1.0}, "server: limit 12 tokens": {"limit": 12},
         "guard, at temperature 1": {"temperature": 1.0, "guard": True}}

# %%
for part, change in swaps.items():
    text = seen(**change)
    verdict = "right" if text == change.get("case", golden).answer else "safe" if text.startswith("handed") else "wrong"
    print(f"{part:24} {verdict:5} {text}")
print("checkpoint untouched:", lab.engine(chain["sft"]).fingerprint() == prints["sft"])

# %% [markdown]
# Five parts swapped, one checkpoint. Watch the second line. The quote must follow the new text, because quoting reads
# what is there; whether 12 days lie within 7 is a comparison, and *that* skill sits in the weights. Fresh evidence
# can still be decided wrongly, so a policy update reruns the evaluation too.

# %% [markdown]
# ## Stage contracts, and two ledgers
#
# A stage has inputs, outputs and a gate, like any build step. The run cards already say most of it.

# %%
GATES = {"base": "held-out loss falls", "sft": "JSON valid, frozen evaluation", "dpo": "claims fall, format stays",
         "rlvr": "exact pass up, shuffled rewards not", "int8": "within 1 point of its parent"}
for name, gate in GATES.items():
    run_card = chain[name].card
    print(f"{name:5} in: {', '.join(sorted(run_card['parents'])):18} out: {', '.join(sorted(run_card['files'])):44} "
          f"gate: {gate}")

# %% [markdown]
# Training and serving are two engineering problems with two bills. One is paid once and fails by drifting or
# diverging; the other is paid per request and fails by being slow, stale or down. Where do they meet?

# %% tags=["nbval-ignore-output"]
training_s = sum(chain[name].card["cpu_s"] for name in ("base", "sft", "dpo", "rlvr"))
per_answer_ms = reports["rlvr"]["answer_p50_ms"]
print(f"training the chain, once: {training_s:.0f} CPU s   |   one answer: {per_answer_ms:.1f} ms")
print(f"serving has cost as much as training after {1000 * training_s / per_answer_ms:,.0f} requests")

# %% [markdown]
# ## Thirteen small functions
#
# The course leans on thirteen functions, each with one exact result. Predict each right-hand side before you run.

# %%
from lifecycle_lib.judge.verifiers import TrustedOrder, verify_decision
from lifecycle_lib.model.bigram import count_bigrams, most_likely_next, token_loss
from lifecycle_lib.train.dpo import make_pair
from lifecycle_lib.train.sft import audit_targets, make_example

# %%
counts = count_bigrams(["damaged return eligible"] * 2 + ["damaged return review", "late return review"])
print("S1-07", most_likely_next(counts, "damaged"), most_likely_next(counts, "return"))
print("S1-08", round(token_loss(0.80), 3), round(token_loss(0.20), 3))

# %%
example = make_example(golden.order, golden.policy)
print("S1-13", example["target"])
print("S1-14", audit_targets([example["target"], {"eligible": True, "evidence": "x"}]))
print("S1-21", make_pair("A10234", "P-7 covers it", "a label was made", "invented_side_effect")["reason"])

# %%
from lifecycle_lib.judge.evals import golden_answer_passes, recorded_answers, score_recorded
from lifecycle_lib.model.memory import gib_for_weights
from lifecycle_lib.serve.evidence import answer_from_policy

# %%
trusted = TrustedOrder("A10234", "damaged", 12, True)
right = example["target"]
outputs = [right, right | {"eligible": False}, right | {"label_created": True}]
print("S1-26", [verify_decision(o, trusted, 30, "P-7").reward for o in outputs])

# %%
for text in ("P-7: damage reported within 7 days", "P-7: damage reported within 30 days"):
    found = answer_from_policy(trusted, text)
    print("S1-36", found.decision, found.policy_id, found.checkpoint)

# %%
print("S1-45", gib_for_weights(8e9, 2), "|", gib_for_weights(8e9, 0.5))
print("S1-51", golden_answer_passes())
print("S1-52", score_recorded(recorded_answers()))

# %%
from lifecycle_lib.judge.trace_router import action_for, owner_for_failure

for symptom in ("stale policy", "missing policy_id", "promised label", "slow first token", "release regression", "odd"):
    print(f"S1-57 {symptom:18} -> {owner_for_failure(symptom)}")

# %%
print("S1-65", release_gate(19, 20, 1, 920, 1000))
for symptom in ("stale policy", "invalid schema", "slow first token"):
    print(f"S1-67 {symptom:18} -> {action_for(symptom)}")

# %% [markdown]
# ## The map, with fog
#
# What do we know about each lever? Solid: settled by mechanism. Fog: the width of the interval in the recorded
# evidence; where nothing has been recorded, all fog.

# %%
from lifecycle_lib.lab.claims import RESULTS, recorded

KNOWN = ["serving moves no weight", "DPO starts at ln 2", "int8 halves the bits of fp16"]
LEVERS = {"SFT data": "sft_room", "preferences": "dpo_claims", "rewards": "rlvr_gain", "weak rewards": "weak_verifier",
          "fewer bits": "quantisation", "user liking": None}

# %%
fog = {}
for lever, evidence in LEVERS.items():
    known = evidence and (RESULTS / f"{evidence}.json").is_file()
    first_effect = recorded(evidence)["effects"][0] if known else {"low": 0, "high": 1}
    fog[lever] = min(1.0, first_effect["high"] - first_effect["low"])
    print(f"{lever:14} fog {100 * fog[lever]:3.0f} %" + ("" if known else "   nothing recorded"))

# %%
def fog_map():
    """Known levers on top, measured ones below, each under as much fog as its interval is wide."""
    parts = [box(150 + 270 * i, 50, text, "mechanism", "#d9d9d9", 240) for i, text in enumerate(KNOWN)]
    for i, (lever, width) in enumerate(fog.items()):
        x = 85 + 135 * i
        parts.append(box(x, 150, lever, f"interval {100 * width:.0f} points" if width < 1 else "no record", width=126))
        parts.append(f'<rect x="{x - 66}" y="125" width="132" height="50" rx="8" fill="#888" '
                     f'opacity="{0.9 * width ** 0.5:.2f}"/>')
    title = "Map of levers: settled by mechanism above; below, fog as thick as the interval is wide"
    return picture(850, 200, title, *parts)


display(SVG(fog_map()))
thick, thin = max(fog, key=fog.get), min(fog, key=fog.get)
print(f"thickest fog: {thick}, {100 * fog[thick]:.0f} points | thinnest: {thin}, {100 * fog[thin]:.0f} points")

# %% [markdown]
# A note for every single number you will ever be shown: *which result would change your mind?* If none would, it was
# not evidence.
#
# ## What you use at work
#
# The same check with `transformers`: our checkpoint as a model of that library, `generate`, and a hash before and
# after. The bridge copies tensors, so answers must agree to the character and weights to the bit.

# %%
from lifecycle_lib.model.hf_classes import to_hf

hf = to_hf(models["rlvr"]).eval()
hf_before = fingerprint_of(hf)
ids = torch.tensor([tok.encode(golden.prompt)])
out = hf.generate(ids, max_new_tokens=48, do_sample=False, eos_token_id=tok.special["<eos>"],
                  pad_token_id=tok.special["<pad>"])

# %%
text = tok.decode(out[0, ids.shape[1] :].tolist()).removesuffix("<eos>")
print("transformers:", text)
print("same text as ours:", text == served.texts([golden.prompt])[0], "| hash kept:", fingerprint_of(hf) == hf_before)

# %% [markdown]
# ## Exercises
#
# **1. Read the log (★, 3 minutes).** Which of these lines say that numbers in a checkpoint changed? Put their letters
# in `moved_weights`.
#
# | | line |
# |---|---|
# | a | `step 240 loss 1.92 grad_norm 0.81` |
# | b | `index refreshed: 12 documents embedded again` |
# | c | `LoRA merged into the base, rank 8` |
# | d | `KV cache warmed with the system prompt` |
# | e | `temperature 0.7 -> 0.2` |
# | f | `packed to int4, group 32` |
# | g | `pointer.json: release 12 -> release 11` |
# | h | `DPO step 12 margin 0.84` |

# %% nbgrader={"grade": false, "grade_id": "log-lines", "locked": false, "schema_version": 3, "solution": true, "task": false}
### BEGIN SOLUTION
moved_weights = set("acfh")
### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "log-lines-tests", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
assert moved_weights <= set("abcdefgh"), "letters a to h only"
### BEGIN HIDDEN TESTS
from torch import nn


def changes(act):
    """Does `act` change a plain torch layer?"""
    torch.manual_seed(0)
    layer = nn.Linear(8, 8)
    kept = [p.detach().clone() for p in layer.parameters()]
    act(layer)
    return not all(torch.equal(a, b) for a, b in zip(kept, layer.parameters()))


def sgd(layer):
    layer(torch.ones(2, 8)).square().sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()


def edit(layer, change):
    with torch.no_grad():
        layer.weight.copy_(change(layer.weight))


acts = {"a": sgd, "b": lambda m: torch.ones(12, 8) @ m.weight, "c": lambda m: edit(m, lambda w: w + torch.ones(8, 8)),
        "d": lambda m: m(torch.ones(1, 8)), "e": lambda m: (m(torch.ones(1, 8)) / 0.2).softmax(-1),
        "f": lambda m: edit(m, lambda w: (w * 7).round() / 7), "g": lambda m: nn.Linear(8, 8), "h": sgd}
assert moved_weights == {key for key, act in acts.items() if changes(act)}
### END HIDDEN TESTS

# %% [markdown]
# **2. Which tensors moved? (★★, 8 minutes).** Write `moved_tensors(before, after)` for two state dicts: the sorted
# names whose tensors differ in any bit, in type, in shape, or exist on one side only.

# %% nbgrader={"grade": false, "grade_id": "moved", "locked": false, "schema_version": 3, "solution": true, "task": false}
def moved_tensors(before, after):
    """Sorted names of tensors that are not the same on both sides."""
    ### BEGIN SOLUTION
    def same(name):
        a, b = before.get(name), after.get(name)
        return a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b)

    return sorted(name for name in {*before, *after} if not same(name))
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "moved-tests", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
two_layers = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)).state_dict()
assert moved_tensors(two_layers, dict(two_layers)) == []
assert moved_tensors(two_layers, two_layers | {"1.bias": two_layers["1.bias"] + 1}) == ["1.bias"]
### BEGIN HIDDEN TESTS
half = {key: value.to(torch.float64) for key, value in two_layers.items()}
assert moved_tensors(two_layers, half) == sorted(two_layers), "a change of type is a change"
assert moved_tensors(two_layers, {k: v for k, v in two_layers.items() if k != "0.bias"}) == ["0.bias"]
assert moved_tensors(two_layers, two_layers | {"0.bias": two_layers["0.bias"].view(2, 2)}) == ["0.bias"]
import numpy as np

ours, theirs = models["sft"].state_dict(), models["rlvr"].state_dict()
by_numpy = sorted(k for k in ours if not np.array_equal(ours[k].numpy(), theirs[k].numpy()))
assert moved_tensors(ours, theirs) == by_numpy
### END HIDDEN TESTS

# %% [markdown]
# **3. How often must you ask? (★★, 5 minutes).** A model gives the wrong decision with probability `p`. Write
# `asks_needed(p, confidence)`: the fewest independent samples after which you have seen it at least once with that
# probability. For `p = 0.02`, one demo of 10 requests proves little; how little?

# %% nbgrader={"grade": false, "grade_id": "asks", "locked": false, "schema_version": 3, "solution": true, "task": false}
def asks_needed(p, confidence):
    """Smallest n with 1 - (1 - p)**n >= confidence."""
    ### BEGIN SOLUTION
    n = 1
    while 1 - (1 - p) ** n < confidence:
        n += 1
    return n
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "asks-tests", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
assert asks_needed(0.5, 0.75) == 2
print("asks to meet a 2 % failure with 95 % probability:", asks_needed(0.02, 0.95))
### BEGIN HIDDEN TESTS
from scipy.stats import geom

for p in (0.01, 0.02, 0.1, 0.3, 0.9):
    for confidence in (0.5, 0.9, 0.95, 0.99):
        assert asks_needed(p, confidence) == int(geom.ppf(confidence, p)), (p, confidence)
### END HIDDEN TESTS

# %% [markdown]
# ## Quiz
#
# Ten questions, each about something measured above. 75 % is a pass. In JupyterLab you get buttons; elsewhere, text.

# %%
from lifecycle_lib.lab.quiz import grade, interview, quiz

quiz("00")

# %%
answers = {}  # {"q1": "a", ...}
_ = grade("00", answers)

# %% [markdown]
# ## Interview questions

# %%
interview("00")

# %% [markdown]
# ## Six words to keep
#
# The words of this course are in `data/glossary.json`. Six carry this notebook; each stands on those before it. Rest
# the pointer on a word, or read on.

# %%
from lifecycle_lib.core.records import read_json

glossary = read_json(ROOT / "data" / "glossary.json")
CONCEPTS = {"weights": "-", "checkpoint": "weights", "stage": "checkpoint", "evidence": "weights",
            "frozen evaluation": "checkpoint", "gate": "frozen evaluation"}
display(HTML(" &rarr; ".join(f'<abbr title="{glossary[term]["meaning"]}">{term}</abbr>' for term in CONCEPTS)))
for term, needs in CONCEPTS.items():
    print(f"{term:18} needs {needs:18} {glossary[term]['meaning']}")

# %% [markdown]
# ## What to remember
#
# 1. Training and packing change the numbers; evidence, decoding, evaluation and release do not. Prove it by hash.
# 2. A checkpoint is the product of its whole ancestry. The run card names it.
# 3. One frozen model still contradicts itself when it samples. Score rates, not anecdotes.
# 4. Theory fixed the first loss and little else. Everything a user cares about has to be measured.
# 5. Ask which layer owns the failure first. Most of them are not weights.
#
# **Made:** nothing new; the chain is in the store. **Next:** `01_bigram_to_gpt` starts where the weights do, at
# random.
