# ---
# jupyter:
#   lifecycle:
#     rows: [S1-18, S1-19, S1-20, S1-21, S1-22, S1-23, S1-24, S1-77, S0-29, S0-34, S2-04c, S2-04d, S3-7.25, S4-31, S4-32, S4-36, S3-6.35]
# ---
# %% [markdown]
# # Can a vote take back a promise?
#
# After SFT our assistant reads the policy, decides, and in nearly a third of its answers adds
# `"label_created":true`. No label was made. The JSON is valid and the decision is right, so nothing that SFT can see is
# wrong. Somebody has to say: of these two answers, that one.
#
# After this notebook you can:
#
# - write a preference record, and say why its reason is not optional;
# - derive the DPO loss from Bradley and Terry's vote model, and hold it against TRL;
# - remove a habit in 40 steps, and see what else moved: the chosen answer, the format, the rest of the sentence;
# - watch one run win every pair by breaking the format, put three explanations to the test, and ask five seeds how often;
# - tell DPO's kin apart by what each asks of the gap, check them against TRL, and say what wrong votes do to each;
# - train a reward model, find what it cannot see, and put the leash of RLHF where its gradient is right;
# - recognise a swapped pair, a moving reference and a mean in place of a sum from their loss curves.
#
# **Needs** the SFT checkpoint of `07_sft_the_interface`. **Makes** nothing new: the first run below *is* the stage
# `lab.dpo()`. About 80 CPU seconds from a warm store, six minutes more from an empty one; peak memory about 1 GiB.

# %% tags=["parameters"]
profile = "laptop"
seed = 0
device = ""
n_probe = 64
n_pools = 20

# %%
from lifecycle_lib.lab.notebook import ROOT, start

lab = start("11", profile, seed, device)

# %% [markdown]
# ## Two valid answers
#
# Order A10234 again: damaged mug, 12 days, confirmed, P-7 covers 30 days. Ask the SFT checkpoint forty times at
# temperature 1.

# %%
from collections import Counter

from lifecycle_lib.desk.cases import golden_case, with_label_claim
from lifecycle_lib.judge.verifiers import parse_answer

golden, sft = golden_case(), lab.sft()

# %%
texts = lab.engine(sft, 1.0).texts([golden.prompt], 40)
for text, times in Counter(texts).most_common(3):
    print(f"{times:2} of 40  valid JSON: {parse_answer(text).valid!s:5} {text}")

# %% [markdown]
# Which one is better? The loss that trained this model has no opinion. It saw one target a prompt and made that target
# likely; where targets disagreed (30 % of them claimed a label, on purpose) it learnt the odds. Look at the fork, the
# token where the two answers part.

# %%
import torch

from lifecycle_lib.train.dpo import encode_pairs, make_pairs
from lifecycle_lib.train.logprobs import pad_rows, sum_logps

tok, sft_model = lab.load_tokenizer(), lab.load(sft)

# %%
pad, eos = tok.special["<pad>"], tok.special["<eos>"]
[(prompt_ids, plain_ids, claim_ids)] = encode_pairs(tok, make_pairs([golden]))
fork = next(i for i, (a, b) in enumerate(zip(plain_ids, claim_ids)) if a != b)
print("shared:  ", tok.decode(plain_ids[:fork]))
print("plain:   ", [tok.decode([i]) for i in plain_ids[fork:]])
print("claiming:", [tok.decode([i]) for i in claim_ids[fork:]])

# %%
with torch.no_grad():
    plain, claim = sum_logps(sft_model, pad_rows([prompt_ids] * 2, [plain_ids, claim_ids], pad))
odds = float((claim - plain).exp())
print(f"SFT ranks them {odds / (1 + odds):.0%} claim to {1 / (1 + odds):.0%} plain; its demonstrations were "
      f"{lab.profile.claim_share:.0%} to {1 - lab.profile.claim_share:.0%}")

# %% [markdown]
# That is all SFT can know about two valid answers: how often each was shown. To rank them you need a second signal.
# Cast your vote (the default lets this run on its own), and say why.

# %%
from lifecycle_lib.train.dpo import make_pair

your_vote, your_reason = "plain", "no label exists: an invented side effect"
both = {"plain": golden.answer, "claiming": with_label_claim(golden.answer)}
loser = next(name for name in both if name != your_vote)
record = make_pair(golden.prompt, both[your_vote], both[loser], your_reason)

# %%
print({key: value[-44:] for key, value in record.items()})

# %% [markdown]
# The lesson's own pair: chosen cites P-7, rejected says a label is already made. The reason is required. In half a year
# somebody will ask what these votes meant, and a vote without a reason teaches taste by accident.

# %%
print(make_pair("A10234", "P-7 covers it", "a label was made", "invented_side_effect"))
try:
    make_pair("A10234", "P-7 covers it", "a label was made", "")
except ValueError as error:
    print("refused:", error)

# %% [markdown]
# The pairs file of the lab holds two kinds. The *hard* ones do not promise anything: both answers cite a policy, and
# the rejected one cites the wrong line. Reading is strict; a damaged row is refused by file and line.

# %%
import json
import tempfile
from pathlib import Path

from lifecycle_lib.train.dpo import read_pairs

rows = read_pairs(ROOT / "data" / "preference_pairs.jsonl")

# %%
print(Counter(row["reason"] for row in rows))
hard = next(row for row in rows if row["reason"] == "wrong_policy")
print("hard pair:", hard["prompt"][5:70], "...\n  chosen  ", hard["chosen"], "\n  rejected", hard["rejected"])

# %%
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder, "pairs.jsonl")
    path.write_text("\n".join(json.dumps(row) for row in [*rows[:2], hard | {"rejected": hard["chosen"]}]))
    try:
        read_pairs(path)
    except ValueError as error:
        print("refused:", str(error).replace(folder, "")[1:90])

# %% [markdown]
# Pairs often come as two conversations. Then the prompt is written twice, and the two copies can differ: the vote
# compared answers to different questions, and no loss would ever say so.

# %%
from lifecycle_lib.desk.cases import draw_cases
from lifecycle_lib.train.chat import case_messages

talk = [*case_messages(golden), {"role": "bot", "content": golden.answer}]
other = [*case_messages(draw_cases(1, 0, "another")[0]), {"role": "bot", "content": "no"}]

# %%
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder, "pairs.jsonl")
    path.write_text(json.dumps({"chosen": talk, "rejected": other, "reason": "wrong_policy"}))
    try:
        read_pairs(path)
    except ValueError as error:
        print("refused:", str(error).replace(folder, "")[1:])

# %% [markdown]
# ## Which signal for which task?
#
# Two families. **Votes**: a person prefers one of two answers; right when nobody can write the rule down. **Checks**:
# code pays 1 or 0; right when somebody can. Eight tasks; a colleague's choices are filled in. Where do you disagree?

# %%
your_choice = {"JSON matches the schema": "check", "tone of a refusal": "vote", "decision equals the rule": "vote",
               "cites the line it used": "check", "which of two right answers helps more": "vote",
               "claims no side effect": "vote", "says 'I am not sure' when it should": "vote",
               "patient with an angry customer": "vote"}

# %%
right = {"JSON matches the schema": "check", "tone of a refusal": "vote", "decision equals the rule": "check",
         "cites the line it used": "check", "which of two right answers helps more": "vote",
         "claims no side effect": "check or vote", "says 'I am not sure' when it should": "check",
         "patient with an angry customer": "vote"}

# %%
for task, choice in your_choice.items():
    print(f"{task:38} you: {choice:6} {'ok' if choice in right[task] else f'better: {right[task]}'}")
print(sum(choice in right[task] for task, choice in your_choice.items()), "of 8")

# %% [markdown]
# Two of these deserve a word. *Not sure when it should*: calibration is a frequency, so code can count it; voters
# reward confidence. *Claims no side effect* can be checked by code as long as you can list the side effects. Here we
# use votes for it, and see below what the votes did not say.
#
# ## Bradley and Terry by hand
#
# Give every answer a strength $u$. The chance that $a$ beats $b$ in a vote is $\sigma(u_a - u_b)$ (1952). Three votes
# to one for $a$: the most likely difference is $\ln 3$. Check it before a computer does: $\sigma(\ln 3) = 3/(3+1)$.

# %%
import math

import numpy as np


def strengths(wins, steps=30, ridge=1e-6):
    """Bradley-Terry strengths from wins[a, b] = votes for a over b, by Newton's method, mean 0."""
    u = np.zeros(len(wins))
    for _ in range(steps):
        p = 1 / (1 + np.exp(u[None] - u[:, None]))  # p[a, b]: chance that a beats b
        games = wins + wins.T
        gradient = (wins - games * p).sum(1) - ridge * u
        weight = games * p * (1 - p)
        u = u + np.linalg.solve(np.diag(weight.sum(1)) - weight + ridge * np.eye(len(u)), gradient)
    return u - u.mean()


# %%
u = strengths(np.array([[0.0, 3.0], [1.0, 0.0]]))
assert abs((u[0] - u[1]) - math.log(3)) < 1e-5
print(f"strengths {u[0]:+.3f} and {u[1]:+.3f}, difference {u[0] - u[1]:.3f} = ln 3 = {math.log(3):.3f}")

# %% [markdown]
# A reward model is exactly this, with a network in place of the table $u$. The classic road then runs reinforcement
# learning against it, with a leash: reward minus $\beta$ times the divergence from the reference. That problem has a
# known optimum, $\pi(y) \propto \mathrm{ref}(y)\, e^{u(y)/\beta}$. Turn it around: $u(y) = \beta \log
# \pi(y)/\mathrm{ref}(y)$ plus a constant that cancels in any vote. So a policy *is* a reward model, and the vote
# likelihood can be written in the policy alone. That is all of DPO (Rafailov et al. 2023).
#
# ## The algorithm

# %% tags=["algorithm"]
import torch.nn.functional as F


def answer_logp(model, prompt, answer):
    """Sum of log p(token) over the answer's tokens, the prompt given."""
    ids = torch.tensor([prompt + answer])
    logp = model(ids[:, :-1]).log_softmax(-1)  # position t predicts token t + 1
    picked = logp[0].gather(-1, ids[0, 1:, None])[:, 0]
    return picked[len(prompt) - 1 :].sum()  # a sum: an answer's probability is a product


def dpo_by_hand(policy, reference, pairs, beta):
    """-log sigmoid(beta * [(log pi - log ref)(chosen) - (log pi - log ref)(rejected)]), mean over pairs."""
    losses = []
    for prompt, chosen, rejected in pairs:
        with torch.no_grad():  # the reference never learns
            ref_chosen = answer_logp(reference, prompt, chosen)
            ref_rejected = answer_logp(reference, prompt, rejected)
        reward_chosen = beta * (answer_logp(policy, prompt, chosen) - ref_chosen)
        reward_rejected = beta * (answer_logp(policy, prompt, rejected) - ref_rejected)
        losses.append(-F.logsigmoid(reward_chosen - reward_rejected))
    return torch.stack(losses).mean()


# %% [markdown]
# At the first step the policy is the reference. Both rewards are 0, the margin is 0, and the loss is $\ln 2 = 0.693$
# **whatever the data say**. Remember that number: a whole class of bugs is recognised by it.

# %%
beta = lab.profile.beta
four = encode_pairs(tok, make_pairs(draw_cases(4, lab.seed, "by hand")))
at_start = dpo_by_hand(sft_model, lab.load(sft), four, beta)
assert abs(at_start.item() - math.log(2)) < 1e-5

# %%
print(f"first loss {at_start.item():.4f}, ln 2 = {math.log(2):.4f}")

# %% [markdown]
# Against the library's version, away from the start: noise on the policy's weights, then value and gradient. The
# library batches, shares each prompt between the two answers, and computes the reference once; the numbers must agree.

# %%
from lifecycle_lib.core.seeds import make_generator
from lifecycle_lib.train import dpo

moved, noise = lab.load(sft), make_generator(lab.seed, "noise")

# %%
with torch.no_grad():
    for p in moved.parameters():
        p += 0.01 * torch.randn(p.shape, generator=noise)
by_hand = dpo_by_hand(moved, sft_model, four, beta)
ref_four = dpo.reference_logps(sft_model, four, pad)
batch = dpo.PairBatch(dpo.pair_rows(four, pad), ref_four.T.reshape(-1))

# %%
library, metrics = dpo.pair_loss(moved, batch, beta)

# %%
ours, theirs = (torch.autograd.grad(loss, list(moved.parameters())) for loss in (by_hand, library))
worst = max(float((a - b).abs().max()) for a, b in zip(ours, theirs))
largest = max(float(g.abs().max()) for g in ours)
assert abs(by_hand.item() - library.item()) < 1e-5 and worst < 1e-5 * max(1.0, largest)
print(f"loss away from ln 2: {abs(by_hand.item() - math.log(2)) > 1e-3}; same value to 1e-5: True; "
      f"same gradient of {len(ours)} tensors to 1e-5: True")

# %% [markdown]
# TRL's trainer, the independent judge, comes at the end on the exported checkpoint.
#
# ## Predict
#
# 640 pairs about the label, 40 steps of 32, SGD. Commit to an effect before you run.

# %%
from lifecycle_lib.lab.claims import ClaimCard, evidence_figure, recorded, show_evidence

card = ClaimCard(
    claim="DPO on pairs that differ in the invented label alone removes the habit at temperature 1",
    direction="down", smallest=0.15, unit="share",
    falsifier="the claim rate falls by less than 15 points, or JSON validity falls by more than 2",
    scope=f"SFT checkpoint of seed {lab.seed}, {lab.profile.n_pairs} pairs, the first frozen cases (256 at most)",
    not_measured="other habits, other seeds (recorded below), what a customer thinks of the answer")

# %%
card.show()
card.predict(estimate=-0.20, confidence=0.9)

# %% [markdown]
# And a second forecast: does the log-probability of the *chosen* answer rise?

# %%
chosen_rises = True  # your guess

# %% [markdown]
# ## The run
#
# `train` takes a fresh copy of the SFT checkpoint every time; arms differ in what is written in the call and in nothing
# else. `watch` looks at the model every few steps, on pairs that are never trained on: we shall want the log-odds of
# the last six tokens of the rejected answer.

# %%
fork_of = lambda c, r: next(i for i, (a, b) in enumerate(zip(c, r)) if a != b)  # noqa: E731
probe_cases = draw_cases(n_probe, lab.seed, "dpo probe")
probe = encode_pairs(tok, make_pairs(probe_cases))
forks = [fork_of(c, r) for _, c, r in probe]
watched, every = probe[:16], 4

# %%
def tail_odds(model):
    """log p/(1-p) of the tokens from the fork on, in the rejected answers of `watched`. (16, 6)"""
    rows = pad_rows([p for p, _, _ in watched], [r for _, _, r in watched], pad)
    logits, target = model(rows.ids[:, :-1]), rows.ids[:, 1:, None]
    others = logits.scatter(-1, target, -math.inf).logsumexp(-1)
    odds = logits.gather(-1, target)[..., 0] - others
    return torch.stack([x[keep][f:] for x, keep, f in zip(odds, rows.mask[:, 1:], forks)])


# %%
from dataclasses import replace

from lifecycle_lib.train.loop import fit

encoded = encode_pairs(tok, make_pairs(draw_cases(lab.profile.n_pairs, lab.seed, "dpo")))
ref = dpo.reference_logps(sft_model, encoded, pad)

# %%
def train(pairs=encoded, ref=ref, beta=beta, loss=dpo.pair_loss, watch=None, size=lab.profile.dpo_batch, **changes):
    """(model, history) of DPO from the SFT checkpoint; `changes` are fields of the profile's FitConfig."""
    model = lab.load(sft)
    draw = dpo.dpo_batches(pairs, ref, size, lab.seed, pad, lab.device)

    def batches(step):
        if watch and step % every == 0:
            with torch.no_grad():
                watch(model)
        return draw(step)

    result = fit(model, batches, lambda m, b: loss(m, b, beta), replace(lab.profile.dpo, **changes))
    return model, result.history


# %%
from lifecycle_lib.model.checkpoint import weights_hash

sgd_trace = []
sgd_model, sgd_history = train(watch=lambda m: sgd_trace.append(tail_odds(m)))
print("this is the stored stage, bit for bit:", weights_hash(sgd_model) == weights_hash(lab.load(lab.dpo())))

# %%
print(f"loss {sgd_history[0]['loss']:.3f} at step 0; pairs ranked right at the last step: "
      f"{sgd_history[-1]['accuracy']:.0%}")

# %%
from lifecycle_lib.judge.evals import evaluate, frozen_cases
from lifecycle_lib.serve.engine import Engine

cases = frozen_cases(min(256, lab.profile.n_eval))

# %%
def scored(model, n=None):
    """The frozen evaluation at temperature 1, same random numbers for every arm."""
    return evaluate("arm", Engine(model, tok, 1.0, lab.seed).answer, cases[:n])


# %%
def show(name, report):
    cells = (f"{100 * report[k]:4.0f} %" for k in ("invented_claim_rate", "json_validity", "exact_pass"))
    print(f"{name:28} claims {' valid '.join([next(cells), next(cells)])}  exact {next(cells)}")


# %%
before, after = scored(lab.load(sft)), scored(sgd_model)
show("sft", before)
show("dpo, SGD", after)

# %%
from lifecycle_lib.core.stats import paired_effect


def change(field, new, old=before):
    """new - old per frozen case, with its interval over cases (one training run)."""
    return paired_effect(*([float(row[field]) for row in report["cases"]] for report in (new, old)))


# %%
_ = card.settle(change("claim", after))
for field in ("valid", "exact", "eligible_ok"):
    e = change(field, after)
    print(f"{field:12} {100 * e.estimate:+.1f} points [{100 * e.low:+.1f}, {100 * e.high:+.1f}], "
          f"{e.n} paired cases, 95 % t over cases, 1 run")

# %% [markdown]
# Exact pass rises by about what the claims fall: the answers were right but for their last field. Nothing else was
# learnt, and eligibility should say so. Now the two curves. Each is the mean change of a sum log-probability against
# the reference, so both start at 0.

# %%
import matplotlib.pyplot as plt

from lifecycle_lib.lab.figures import SERIES, style


def drift(histories):
    """One panel an arm: how far chosen and rejected answers have moved from the reference."""
    style()
    fig, axes = plt.subplots(1, len(histories), figsize=(1.6 + 2.5 * len(histories), 3.3), squeeze=False)
    for ax, (name, (history, its_beta)) in zip(axes[0], histories.items()):
        for key, (colour, marker, dash, _) in zip(("chosen", "rejected"), SERIES):
            y = [row[f"{key}_reward"] / its_beta for row in history]
            ax.plot(range(len(y)), y, dash, color=colour, marker=marker, markevery=max(1, len(y) // 6), label=key)
        ax.axhline(0, color="#808080", linewidth=0.8)
        ax.set(title=name, xlabel="training step")
    axes[0][0].set_ylabel("change of sum log-probability (nats)")
    axes[0][0].legend()
    fig.supxlabel(f"Mean over {lab.profile.dpo_batch} training pairs a step, 1 run each; no interval.\n"
                  "Not measured here: other seeds, unseen kinds of pairs.", x=0.01, ha="left", fontsize=9,
                  color="#606060")
    plt.show()


# %%
drift({"SGD, rate 0.001": (sgd_history, beta)})
end = {key: sum(row[f"{key}_reward"] for row in sgd_history[-5:]) / 5 / beta for key in ("chosen", "rejected")}
print(f"last 5 steps: chosen {end['chosen']:+.1f} nats, rejected {end['rejected']:+.1f}; your guess that chosen rises: "
      f"{'right' if chosen_rises == (end['chosen'] > 0) else 'wrong'}")

# %% [markdown]
# How to read it. The loss asks for a *gap*. It can come from the chosen answer rising, from the rejected one falling,
# or from both falling at different speeds; the loss cannot tell these apart. The chosen answer can gain little here
# (it could take over the quarter that the claim held), while the rejected one can fall for ever. When chosen falls too,
# that is **likelihood displacement** (Razin et al. 2024): the probability goes to a third answer that nobody voted on.
# Hold that thought.
#
# ## The same pairs, another optimiser
#
# Every tutorial trains DPO with Adam. So: AdamW at rate 0.0001; same pairs, steps, $\beta$. (`beta2` .95; the recorded runs
# have .999.)

# %%
tail = [tok.decode([i]) for i in claim_ids[fork:]]
adam_trace = []
adam = {"optimizer": "adamw", "lr": 1e-4}
adam_model, adam_history = train(watch=lambda m: adam_trace.append(tail_odds(m)), **adam)
adam_report = scored(adam_model)
show("dpo, SGD", after)

# %%
weights_of = lambda m: torch.cat([w.detach().flatten() for w in m.parameters()])  # noqa: E731
length = {name: float((weights_of(m) - weights_of(sft_model)).norm()) for name, m in (("SGD", sgd_model),
                                                                                     ("Adam", adam_model))}
print("distance walked, norm of the change of all weights:", {k: f"{x:.2f}" for k, x in length.items()})

# %%
show("dpo, Adam", adam_report)
print(f"pairs ranked right at the last step: SGD {sgd_history[-1]['accuracy']:.0%}, "
      f"Adam {adam_history[-1]['accuracy']:.0%}")

# %% [markdown]
# Fewer claims than SGD, the pairs ranked as well, and some broken JSON. A bug in the format, to be mended downstream?
# Read the broken answers before you decide. (And keep the distance in mind: two things have changed, the optimiser and
# how far it walked.)

# %%
broken = [text for text, row in zip(adam_report["answers"], adam_report["cases"]) if not row["valid"]]
print(f"{len(broken)} of {len(cases)} answers are not valid JSON; the commonest endings:")
for ending, times in Counter(text[-24:] for text in broken).most_common(3):
    print(f"  {times:3}  ...{ending}<eos>")

# %%
for name, report in (("SGD", after), ("Adam", adam_report)):
    said = sum("label_created" in text for text in report["answers"])
    print(f"{name:5} claims the evaluation counted: {sum(row['claim'] for row in report['cases'])}; "
          f"answers that say label_created: {said}")

# %% [markdown]
# The habit is not gone. The model makes its claim and stops without the closing brace; the parser sees no JSON, so it
# sees no claim. The best number in the table came from the worst answers. The vote was honoured to the letter: the
# rejected answer has become very unlikely, because it can no longer be *finished*.
#
# Follow every token of the rejected answer, on pairs that no arm has seen.

# %%
from lifecycle_lib.train.logprobs import token_logps


def rejected_tokens(model):
    """Log-probabilities of rejected answers: mean a token before the fork, then each of the last six. (n, 7)"""
    rows = pad_rows([p for p, _, _ in probe], [r for _, _, r in probe], pad)
    with torch.no_grad():
        logp = token_logps(model, rows)
    each = [row[keep] for row, keep in zip(logp, rows.mask[:, 1:])]
    return torch.stack([torch.cat((x[:f].mean()[None], x[f:])) for x, f in zip(each, forks)])


# %%
start_logp = rejected_tokens(sft_model)
delta = {name: rejected_tokens(m) - start_logp for name, m in (("SGD", sgd_model), ("Adam", adam_model))}
print(f"{'token':16} {'p at start':>10} {'SGD':>8} {'Adam':>8}   change in nats, mean of {n_probe} unseen pairs")
for i, name in enumerate(["(before fork)", *tail]):
    print(f"{name:16} {start_logp[:, i].exp().mean():10.2f} "
          + " ".join(f"{round(float(d[:, i].mean()), 1) + 0.0:8.1f}" for d in delta.values()))

# %%
style()
fig, ax = plt.subplots(figsize=(7.2, 3.7))
for k, ((name, d), (colour, _, _, hatch)) in enumerate(zip(delta.items(), SERIES)):
    bars = 1.96 * d.std(0) / len(d) ** 0.5
    ax.bar([i - 0.2 + 0.4 * k for i in range(7)], d.mean(0), 0.38, yerr=bars, facecolor="white", edgecolor=colour,
           hatch=hatch or None, linewidth=1.4, label=name, error_kw={"ecolor": colour})
ax.axhline(0, color="#111111", linewidth=0.8)
ax.set_xticks(range(7), ["before\nthe fork", *tail])
ax.set(ylabel="change of log-probability (nats)", xlabel="token of the rejected answer", title="Where the fall went")
ax.legend(loc="lower left")
fig.supxlabel(f"n = {n_probe} unseen pairs, 1 run each; bars: 95 % normal intervals over pairs.\nNot measured here: "
              "other seeds, other optimiser settings.", x=0.01, ha="left", fontsize=9, color="#606060")
plt.show()

# %%
on_the_fork = {name: float(d[:, 1].mean() / d[:, 1:].mean(0).sum()) for name, d in delta.items()}
print("share of the fall that sits on the fork token:", {k: f"{100 * v:.0f} %" for k, v in on_the_fork.items()})

# %% [markdown]
# The vote was about one token, `,"`: go on, or close. SGD put the fall there. Adam found a cheaper place: the brace at
# the end. Both make the sum small, and the sum is all the loss can see. The fork itself, measured where a good answer
# should close:

# %%
from lifecycle_lib.model.sampling import left_pad

ids, mask = left_pad([p + c[:f] for (p, c, _), f in zip(probe, forks)], pad)
named = {"}": plain_ids[fork], ',"': claim_ids[fork], "<eos>": eos}

# %%
for name, model in (("sft", sft_model), ("SGD", sgd_model), ("Adam", adam_model)):
    with torch.no_grad():
        p = model(ids, mask)[:, -1].softmax(-1).mean(0)
    shares = {label: float(p[i]) for label, i in named.items()}
    print(f"{name:5}", "  ".join(f"p({label}) {100 * x:3.0f} %" for label, x in shares.items()),
          f" rest {100 * (1 - sum(shares.values())):3.0f} %")

# %% [markdown]
# ## How a certain token dies
#
# A token near $p=1$ hides its losses: the log-odds can drop from 10 to 5 and $p$ still rounds to 1. So plot log-odds
# instead, through both runs (recorded every few steps while they trained).

# %%
def traces(by_arm, shown=(0, 1, 2, 4, 5)):
    """Log-odds of the rejected answer's tail tokens through training, one panel an arm."""
    style()
    fig, axes = plt.subplots(1, 2, figsize=(7.6, 3.6), sharey=True)
    for ax, (name, trace) in zip(axes, by_arm.items()):
        for i, (colour, marker, dash, _) in zip(shown, SERIES):
            y = [float(odds[:, i].mean()) for odds in trace]
            ax.plot([every * k for k in range(len(y))], y, linestyle=dash, color=colour, marker=marker, label=tail[i])
        ax.axhline(0, color="#808080", linewidth=0.8)
        ax.set(title=name, xlabel="training step")
    axes[0].set_ylabel("log-odds (0 is even)")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    fig.supxlabel(f"Mean of {len(watched)} unseen pairs, 1 run each; no interval; the token true is left out.\n"
                  "Not measured here: other seeds.", x=0.01, ha="left", fontsize=9, color="#606060")
    plt.show()


# %%
traces({"SGD, rate 0.001": sgd_trace, "Adam, rate 0.0001": adam_trace})
for name, trace in (("SGD", sgd_trace), ("Adam", adam_trace)):
    print(f"{name:5} log-odds of the rejected answer's closing brace:",
          " ".join(f"{float(odds[:, 4].mean()):+.0f}" for odds in trace))

# %% [markdown]
# The softmax gradient of a token has size $1-p$. While the brace is certain it has no gradient to speak of, and SGD,
# whose step *is* the gradient, leaves it alone. Adam divides each parameter's step by that parameter's own gradient
# size, so small gradients walk as fast as big ones, and everything near the target drifts. Once the brace has drifted
# off 1, it has a gradient, and the loss takes the gift: a runaway.
#
# So the story goes. If it is true, a single step before any training should show the drift. To first order, how far
# does each token move for every nat of log-odds taken from the fork?

# %%
def flat_gradient(value, model):
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()), retain_graph=True)])


# %%
ref_watched = dpo.reference_logps(sft_model, watched, pad).T.reshape(-1)
probe_batch = dpo.PairBatch(dpo.pair_rows(watched, pad), ref_watched)
fresh = lab.load(sft).train()
uphill = -flat_gradient(dpo.pair_loss(fresh, probe_batch, beta)[0], fresh)
step_of = {"SGD": uphill, "Adam": uphill / (uphill.abs() + 1e-8)}
per_token = [flat_gradient(column.mean(), fresh) for column in tail_odds(fresh).T]

# %%
print(f"{'rejected token':16}" + "".join(f"{name:>8}" for name in step_of) + f"{'start':>8}"
      "   log-odds moved per nat off the fork; log-odds at the start")
moved = {name: [float(g @ u / (per_token[0] @ u).abs()) for g in per_token] for name, u in step_of.items()}
for i, token in enumerate(tail):
    print(f"{token:16}" + "".join(f"{moved[name][i]:8.2f}" for name in step_of) + f"{sgd_trace[0][:, i].mean():8.1f}")

# %% [markdown]
# SGD moves the fork, and the brace *up* (a good answer closes with one too). Adam does move nearly all of them. But the
# table names the wrong victim: by it the brace should become *likelier* and the label's tokens should die; they lived. A
# simpler story fits: of the later tokens the brace was the least certain (last column), so its own gradient, $1-p$, was
# the largest. Five seeds below.
#
# And a mechanism is a story until you take the suspect away. Mine was the tail: if the loss never sees the tokens after
# the fork, there is nothing to harvest. Same pairs and steps, the rejected answer counted only **up to the fork**. I was
# fairly sure.

# %%
tail_card = ClaimCard(
    claim="counting the rejected answer only up to the fork mends the format under Adam", direction="up",
    smallest=0.05, unit="share", falsifier="validity does not come back by 5 points",
    scope=f"seed {lab.seed}, {len(cases)} frozen cases, temperature 1",
    not_measured="other seeds, Adam at other rates, longer runs")
tail_card.show()

# %%
tail_card.predict(estimate=0.06, confidence=0.8)

# %%
cut = [(p, c, r[: fork_of(c, r) + 1]) for p, c, r in encoded]
cut_trace = []
cut_ref = dpo.reference_logps(sft_model, cut, pad)
cut_model, _ = train(cut, cut_ref, watch=lambda m: cut_trace.append(tail_odds(m)), **adam)
cut_report = scored(cut_model)
_ = tail_card.settle(change("valid", cut_report, adam_report))

# %%
for name, report in (("SGD", after), ("Adam", adam_report), ("Adam, up to the fork", cut_report)):
    show(name, report)
    bad = [text for text, row in zip(report["answers"], report["cases"]) if not row["valid"]]
    unfinished = sum(text.endswith('"label_created":true') for text in bad)
    print(f"{'':6} broken {len(bad)}: claims never closed {unfinished}, `true` twice "
          f"{sum('truetrue' in text for text in bad)}")

# %%
delta["Adam, up to the fork"] = rejected_tokens(cut_model) - start_logp
print("taken off the fork token, nats:", {name: f"{float(-d[:, 1].mean()):.1f}" for name, d in delta.items()})
print("log-odds of the closing brace, up to the fork:", " ".join(f"{float(o[:, 4].mean()):+.0f}" for o in cut_trace))

# %% [markdown]
# Refuted, and instructive. The unfinished claims are gone: *that* damage came through the tail. Other damage took its
# place, on tokens that no pair mentions; and the brace drifts down even where the loss never sees it. The tail decided
# **which** tokens broke, not **that** tokens break. SGD took more off the fork than either Adam run and broke nothing.
# It also walked a seventh of the way.
#
# ## Five seeds, at a matched claim
#
# One seed, and two things changed: the optimiser, and how far it walked. Recorded: five seeds, two rates (60 and 30 steps
# at most), each AdamW run ended where the fork token first is as unlikely as after SGD, and compared there.

# %%
show_evidence("dpo_adam", effects=[e["name"] for e in recorded("dpo_adam")["effects"]
                                   if "matched" in e["name"] or e["name"].startswith("AdamW")])

# %%
arms = {"sgd": "SGD 0.001", "adam_3e-05": "AdamW 0.00003", "adam_0.0001": "AdamW 0.0001"}
style()
fig, ax = plt.subplots(figsize=(6.8, 3.4))
for (arm, name), (colour, marker, *_) in zip(arms.items(), SERIES):
    found = recorded("dpo_adam")["per_seed"]
    ax.plot([row[f"{arm}.fork"] for row in found], [100 * row[f"{arm}.valid"] for row in found], color=colour,
            marker=marker, linestyle="none", label=name)
ax.set(xlabel="log-odds of the claim at the fork", ylabel="valid JSON (%)", title="What the format paid, and for what")
ax.legend()
fig.supxlabel(f"n = {len(found)} seeds, a point each, 256 cases; no interval drawn.\nNot measured here: other rates, longer "
              "runs.", x=0.01, ha="left", fontsize=9, color="#606060")
plt.show()

# %%
print(f"{'seed':4} {'arm':14} {'fork':>5} {'says':>6} {'valid':>6} {'exact':>6} {'walked':>7}  log-odds lost by later tokens")
for row in recorded("dpo_adam")["per_seed"]:
    for arm, name in arms.items():
        fell = " ".join(f"{row[key]:+5.1f}" for key in sorted(row) if key.startswith(f"{arm}.fell_"))
        said, ok, exact_, moved_ = (100 * row[f"{arm}.{key}"] for key in ("said", "valid", "exact", "moved"))
        print(f"{row['seed']:4} {name:14} {row[f'{arm}.fork']:5.1f} {said:4.0f} % {ok:4.0f} % {exact_:4.0f} % "
              f"{moved_:5.2f} %  {fell}")

# %% [markdown]
# **Inconclusive**: no AdamW run got as far at the fork as SGD, so nothing is compared at a match. And the runaway is *seed 0*: in the four others 98 % of the JSON or more stayed valid. "The least certain
# token falls most" held in 5 runs of 10. All five: AdamW walks four to seven times as far and takes less off the fork.
#
# So not *Adam breaks DPO*, but *a run can win every pair with a failure that no training metric shows*; how often, one
# seed cannot say. I believed it until these came in.
#
# ## The hidden contract: $\beta$ and the rate
#
# SGD is no charm: two short runs, then one thirty times too fast.

# %%
short_run = {"steps": min(10, lab.profile.dpo.steps)}
n_short = min(128, len(cases))
grid = {}

# %%
for lr in (1e-3, 1e-2):
    model, history = train(lr=lr, **short_run)
    grid[lr] = scored(model, n_short), history
wild, snapshots = {"lr": 3e-2, "steps": min(16, lab.profile.dpo.steps)}, []
keep = lambda m: snapshots.append({k: v.clone() for k, v in m.state_dict().items()})  # noqa: E731
wild_model, wild_history = train(watch=keep, **wild)
wild_report = scored(wild_model)

# %%
from lifecycle_lib.core.stats import wilson


def span(report, key):
    low, high = wilson(round(report[key] * report["n_cases"]), report["n_cases"])
    return f"{100 * report[key]:3.0f} % ({100 * low:.0f}-{100 * high:.0f})"


# %%
print(f"{'rate':>6} {'steps':>5} {'n':>4} {'claims':>15} {'valid JSON':>17} {'first gradient':>15}")
for lr, (report, history) in (grid | {0.03: (wild_report, wild_history)}).items():
    print(f"{lr:6} {len(history):5} {report['n_cases']:4} {span(report, 'invented_claim_rate'):>15} "
          f"{span(report, 'json_validity'):>17} {history[0]['grad_norm']:10.1f} norm")
print("95 % Wilson intervals over cases, 1 run a row")

# %% [markdown]
# Every first gradient is longer than 1 and is clipped to it. So $\beta$, which at the start only scales the gradient,
# has no say in this recipe (a table below shows where it has). And the last row: no claims, most answers better than
# ever. Where are the broken ones?

# %%
for name, report in (("SGD 0.001", after), ("SGD 0.03", wild_report)):
    right_in = (f"{name_} {100 * part['exact_pass']:.0f} % of {part['n']}" for name_, part in report["slices"].items())
    print(f"{name:10} right by slice:", "  ".join(right_in))
refused = next(i for i, c in enumerate(cases) if c.policy is None)
print("expected:", cases[refused].answer)
print("got:     ", wild_report["answers"][refused])

# %%
kinds = {"decides": [], "refuses": []}
for i, c in enumerate(probe_cases):
    kinds["decides" if c.policy else "refuses"].append(i)
rows_ = pad_rows([p for p, _, _ in probe], [c for _, c, _ in probe], pad)
with torch.no_grad():
    lifted = sum_logps(wild_model, rows_) - sum_logps(sft_model, rows_)

# %%
for kind, which in kinds.items():
    print(f"chosen answer {kind}: {float(lifted[which].mean()):+6.1f} nats against the reference (n = {len(which)})")

# %% [markdown]
# In a refusal the fields are `null`, and after `null` comes `,"`: the very token that every vote pushed down. The votes
# said *not this token, after a value*; nobody said where to stop generalising. Chosen falls together with rejected, in
# the one slice that no average shows. Likelihood displacement has an address.

# %%
arms = {"SGD 0.001": sgd_history, "Adam 0.0001": adam_history, "SGD 0.03": wild_history}
drift({name: (history, beta) for name, history in arms.items()})
for name, history in arms.items():
    ends = (f"{k} {np.mean([row[f'{k}_reward'] for row in history[-5:]]) / beta:+6.1f}" for k in ("chosen", "rejected"))
    print(f"{name:12} mean of the last 5 steps, nats:", ", ".join(ends))

# %% [markdown]
# Look at the vertical axes. One contract, four parts: reference, $\beta$, rate, steps. Loss and ranking accuracy show
# none of this, the log-probabilities show some of it, and the frozen evaluation by slice shows the rest.
#
# ## Asking for less
#
# The wild run obeyed. DPO asks for a larger gap $d$ between the two log-ratios, always. Its kin ask other things of the
# same two numbers. **cDPO** thinks that a share $e$ of the labels is wrong; **robust DPO** corrects for it; **IPO**
# (Azar et al. 2024) wants a gap of $1/2\beta$ and not more.

# %%
def kin(d, e=0.1, wanted=5.0):
    """Loss of one pair at gap d (nats), by four members of the family; wanted = 1 / (2 beta) of IPO."""
    kept, flipped = np.logaddexp(0, -beta * d), np.logaddexp(0, beta * d)
    return {"DPO": kept, "cDPO": (1 - e) * kept + e * flipped,
            "robust DPO": ((1 - e) * kept - e * flipped) / (1 - 2 * e), "IPO": (d - wanted) ** 2}


# %%
gaps = np.linspace(-4, 12, 1601)
push = {name: -np.gradient(loss, gaps) for name, loss in kin(gaps).items()}
rest = {name: gaps[np.abs(p).argmin()] for name, p in push.items() if name in ("cDPO", "IPO")}
assert abs(rest["cDPO"] - math.log(0.9 / 0.1) / beta) < 0.02 and abs(rest["IPO"] - 5) < 0.02

# %%
style()
fig, ax = plt.subplots(figsize=(7.0, 3.4))
for (name, p), (colour, marker, dash, _) in zip(push.items(), SERIES):
    ax.plot(gaps, p / p[400], linestyle=dash, color=colour, marker=marker, markevery=200, label=name)
ax.axhline(0, color="#808080", linewidth=0.8)
ax.set(xlabel="gap d (nats)", ylabel="push (1 at gap 0)", title="What each loss asks of a pair")
ax.legend()
fig.supxlabel(f"Exact curves, beta {beta} (IPO 0.1), e = 10 %. Not measured here: any model.", x=0.01, ha="left",
              fontsize=9, color="#606060")
plt.show()

# %%
for name, p in push.items():
    at = [f"{p[int(100 * (x + 4))] / p[400]:+.3f}" for x in (0, 5, 10)]
    print(f"{name:10} push at 0, 5, 10 nats: {', '.join(at)}; comes to rest at "
          + (f"{rest[name]:.1f} nats" if name in rest else "no gap"))

# %% [markdown]
# DPO's push fades and never turns. cDPO and IPO turn round and pull back; robust DPO, at a large gap, pushes harder than
# DPO: it takes out what wrong labels must have cost. The library's versions, in value and in gradient, at three gaps:

# %%
from lifecycle_lib.train import preferences

d = torch.tensor([-2.0, 0.0, 7.0], requires_grad=True)
library_kin = {"cDPO": preferences.smoothed_loss(d, beta, 0.1),
               "robust DPO": preferences.smoothed_loss(d, beta, 0.1, robust=True),
               "IPO": preferences.ipo_loss(d, torch.zeros(3), 0.1)}

# %%
for name, loss in library_kin.items():
    slope = -3 * torch.autograd.grad(loss, d)[0].numpy()  # the mean over three pairs taken back
    assert abs(loss.item() - kin(d.detach().numpy())[name].mean()) < 1e-5
    assert np.allclose(slope, [np.interp(x, gaps, push[name]) for x in (-2, 0, 7)], atol=1e-3)
print("cDPO, robust DPO, IPO: same value to 1e-5, same slope as the curves above")

# %% [markdown]
# Two more in the library leave something out. **KTO** takes good and bad answers that need not come in pairs; **ORPO**
# has no reference, an SFT loss plus a log odds ratio. TRL judges all of them in the tests, some below.
#
# Now the repair. Same wild rate, same pairs; three things may help. IPO, which wants five nats. The usual remedy for
# displacement: DPO plus an SFT term on the chosen answer (RPO; Pang et al. 2024). And the control without a new loss:
# DPO itself, stopped at the first look where its gap had passed five nats. The card bets on IPO.

# %%
stop_card = ClaimCard(
    claim="at the rate that broke the refusals, IPO keeps more of the answers right than DPO", direction="up",
    smallest=0.05, unit="share", falsifier="exact pass gains less than 5 points",
    scope=f"seed {lab.seed}, {len(cases)} frozen cases, SGD at 0.03",
    not_measured="other seeds, other gaps than 5 nats, rates tuned for IPO")
stop_card.show()

# %%
stop_card.predict(estimate=0.15, confidence=0.8)

# %%
ipo = preferences.kin_loss("ipo", 0.1)
ipo_model, _ = train(loss=lambda model, batch, _: ipo(model, batch), **wild)
ipo_report = scored(ipo_model)
_ = stop_card.settle(change("exact", ipo_report, wild_report))

# %%
def with_sft(model, batch, beta):
    """DPO + SFT: the mean negative log-probability of the chosen answers' tokens is added (RPO)."""
    logp, n = sum_logps(model, batch.rows), batch.rows.mask[:, 1:].sum(1)
    (won, lost), (ref_won, ref_lost) = logp.chunk(2), batch.ref_logp.chunk(2)
    loss, metrics = dpo.dpo_loss(won, lost, ref_won, ref_lost, beta)
    return loss - won.sum() / n.chunk(2)[0].sum(), metrics


# %%
rpo_model, _ = train(loss=with_sft, **wild)
stopped_at = next((i for i, row in enumerate(wild_history) if row["margin"] / beta >= 5 and i % every == 0), None)
early_model = lab.load(sft)
early_model.load_state_dict(snapshots[-1 if stopped_at is None else stopped_at // every])
repairs = {"DPO": (wild_model, wild_report), "DPO stopped": (early_model, scored(early_model)),
           "IPO": (ipo_model, ipo_report), "DPO + SFT": (rpo_model, scored(rpo_model))}

# %%
print(f"DPO stopped before step {stopped_at} of {wild['steps']}")
for name, (model, report) in repairs.items():
    show(name, report)
    with torch.no_grad():
        lifted = sum_logps(model, rows_) - sum_logps(sft_model, rows_)
    refusals = report["slices"]["no_policy"]
    print(f"{'':4} refusals right {100 * refusals['exact_pass']:3.0f} % of {refusals['n']}; chosen answer against the "
          "reference, nats: " + ", ".join(f"{kind} {float(lifted[which].mean()):+.1f}" for kind, which in kinds.items()))

# %% [markdown]
# All three help, and they differ in whom they help. Stopping in time saves six refusals of ten: at five nats *on
# average* the refusals were already slipping. The SFT term pulls chosen answers up wherever they fall, and saves seven.
# IPO turns every pair round by itself, and saves them all. A loss that comes to rest forgives a bad rate; it also stops
# where five nats are too few, and somebody has to choose the five. (One seed, one weight of the SFT term.)
#
# ## Break it on purpose
#
# Two bugs that everybody writes once; guess from the loss which is which. (A third waits in the clinic.)

# %%
def mean_logps(model, batch, beta):
    """Bug: means over tokens in place of sums."""
    n = batch.rows.mask[:, 1:].sum(1)
    (c, r), (rc, rr) = (dpo.sum_logps(model, batch.rows) / n).chunk(2), (batch.ref_logp / n).chunk(2)
    return dpo.dpo_loss(c, r, rc, rr, beta)


# %%
swapped = [(p, r, c) for p, c, r in encoded]
bugs = {"chosen, rejected swapped": train(swapped, ref.flip(1), **short_run),
        "mean, not sum": train(loss=mean_logps, **short_run | {"steps": short_run["steps"] // 2})}
runs = {"as it should be": grid[1e-3]}
runs |= {name: (scored(model, n_short), history) for name, (model, history) in bugs.items()}

# %%
print(f"{'':26} {'first loss':>10} {'last loss':>10} {'claims':>8}")
for name, (report, history) in runs.items():
    claims = report["invented_claim_rate"]
    print(f"{name:26} {history[0]['loss']:10.3f} {history[-1]['loss']:10.3f} {100 * claims:6.0f} %")
print(f"{'(before: sft)':26} {'':10} {'':10} {100 * before['invented_claim_rate']:6.0f} %")

# %% [markdown]
# | what you see | what it is | what catches it |
# |---|---|---|
# | 0.693 and flat, yet the policy moves | the reference is the policy itself | hash of the reference |
# | a healthy falling loss, and *more* claims | chosen and rejected swapped | a check on the pairs: chosen must pass |
# | 0.693 and hardly falling (five steps above) | mean in place of sum: $\beta$ over the length | margins, times length |
# | loss near 0, rejected in free fall, one slice in ruins | rate too high | frozen evaluation by slice |
# | no claims counted, JSON breaks | claims begun and never closed | read the broken answers |
#
# The second row is the nasty one: no training metric knows which answer you meant. So check the pairs, by code, before
# training.

# %%
def honest(pair, answer):
    """Does the answer claim nothing?"""
    return not parse_answer(answer).claims


# %%
votes = make_pairs(draw_cases(lab.profile.n_pairs, lab.seed, "dpo"))
for share in (0.0, 0.1, 1.0):
    found = preferences.audit_pairs(preferences.with_label_noise(votes, share, lab.seed), honest)
    assert len(found) == round(share * len(votes))
    print(f"{share:4.0%} of the pairs turned round: the audit names {len(found)} of {len(votes)}")

# %% [markdown]
# ## Vote and predicate, side by side
#
# Any two outputs can be judged twice. The vote bar is **relative**: the chance that this policy's implicit reward
# prefers A over B, nothing about either alone. The grid is **absolute**: each answer against each clause. In JupyterLab
# you can pick the two answers.

# %%
from lifecycle_lib.judge.verifiers import CLAUSES, case_clauses

wrong_line = golden.answer.replace("damaged P-7 30d", "unwanted P-3 14d").replace('"P-7"', '"P-3"')
outputs = {"right": golden.answer, "claims a label": with_label_claim(golden.answer), "wrong policy": wrong_line,
           "wrong decision": golden.answer.replace("true", "false"), "prose": "Yes, P-7 covers it."}

# %%
def reward(model, prompt, text):
    """Implicit reward of an answer text: beta * (log pi - log ref)."""
    rows = pad_rows([tok.encode(prompt)], [tok.encode(text, allow_special=False) + [eos]], pad)
    with torch.no_grad():
        return beta * float(sum_logps(model, rows) - sum_logps(sft_model, rows))


# %%
def face_off(a, b):
    """Vote bar over predicate grid for two outputs, and the same in words."""
    better = reward(sgd_model, golden.prompt, outputs[a]) - reward(sgd_model, golden.prompt, outputs[b])
    win = 1 / (1 + math.exp(-better))
    grid = [[case_clauses(outputs[x], golden)[c] for c in CLAUSES] for x in (a, b)]
    style()
    fig, (bar, cells) = plt.subplots(2, 1, figsize=(7.0, 3.6), height_ratios=(1, 2.2))
    bar.barh([0], [100 * win], color="#111111", height=0.5)
    bar.barh([0], [100 - 100 * win], left=[100 * win], facecolor="white", edgecolor="#111111", hatch="////", height=0.5)
    bar.set(yticks=[], xlim=(0, 100), xlabel=f"chance that A ({a}) beats B ({b}), percent")
    cells.imshow(grid, cmap="Greys_r", vmin=-0.6, vmax=1.2, aspect="auto")
    for y, row in enumerate(grid):
        for x, held in enumerate(row):
            cells.text(x, y, "holds" if held else "FAILS", ha="center", va="center", color="k" if held else "w")
    cells.set_xticks(range(len(CLAUSES)), [c.replace("_", "\n", 1) for c in CLAUSES])
    cells.set_yticks([0, 1], [f"A {a}", f"B {b}"])
    cells.grid(False)
    fig.supxlabel("1 pair, 1 run, no interval. Not measured here: people's votes.", x=0.01, ha="left", fontsize=9,
                  color="#606060")
    plt.show()
    print(f"A = {a}, B = {b}: A wins {100 * win:.0f} %; clauses that fail:",
          *(f"{x}: {[c for c, held in zip(CLAUSES, row) if not held] or 'none'};" for x, row in zip("AB", grid)))


# %%
from lifecycle_lib.lab.notebook import live

if live():
    from ipywidgets import interact

    interact(face_off, a=list(outputs), b=list(outputs)[::-1])
else:
    face_off("wrong decision", "claims a label")

# %% [markdown]
# There is the conflict. A wrong decision without a claim against a right decision with one: the grid fails both, the
# vote has a clear favourite. It was never asked about decisions. It was only ever asked about labels.
#
# ## Specification or vote
#
# The same rule, *invent no side effect*, can be written (a schema that allows no other field) or voted on (our pairs).
# Where do they part? Take side effects that no pair mentions, and see how far the votes moved them.

# %%
def end_with(more):
    """An answer with one more field at its end."""
    return lambda answer: answer[:-1] + more


variants = {"label_created: true (voted on)": end_with(',"label_created":true}'),
            "label_created: false": end_with(',"label_created":false}'),
            "refund_issued: true": end_with(',"refund_issued":true}'),
            "note: a label is on its way": end_with(',"note":"a label is on its way"}'),
            "label_created: true, said first": lambda answer: '{"label_created":true,' + answer[1:]}

# %%
def log_odds(model, make):
    """log p(the answer made over) - log p(plain answer), one number a probe case."""
    few = probe[: n_probe // 2]
    other = [tok.encode(make(c.answer), allow_special=False) + [eos] for c in probe_cases[: len(few)]]
    rows = pad_rows([p for p, _, _ in few] * 2, other + [c for _, c, _ in few], pad)
    with torch.no_grad():
        long, short = sum_logps(model, rows).chunk(2)
    return long - short


# %%
from lifecycle_lib.judge.verifiers import full_verifier

print(f"{'what is added':32} {'log-odds before':>15} {'change by the votes':>28}   the specification")

# %%
for name, make in variants.items():
    old, new = log_odds(sft_model, make), log_odds(sgd_model, make)
    e = paired_effect(new.tolist(), old.tolist())
    spec = "allows" if full_verifier(make(golden.answer), golden) else "forbids"
    print(f"{name:32} {float(old.mean()):15.1f} {e.estimate:+12.1f} [{e.low:+.1f}, {e.high:+.1f}] nats   {spec}")

# %% [markdown]
# The specification forbids all five, by one line that names none of them. Four pass through the voted fork and lose the
# same four nats. The fifth claims at a place that no pair shows, and loses two and a half: the votes reached past their token. How
# much of that is policy and how much is luck, nobody wrote down. Where a vote is silent the model guesses. (A vote still
# beats a specification that you cannot write: tone, patience, which of two right answers helps.)
#
# ## Where is the change recorded?
#
# A week later somebody asks what changed. Look where one would look.

# %%
settings = {name: (model.cfg.as_dict(), tok.vocab_size, lab.engine(sft, 1.0).max_new_tokens)
            for name, model in (("sft", sft_model), ("dpo", sgd_model))}
changed = sum(a != b for a, b in zip(before["answers"], after["answers"]))
old, new = sft_model.state_dict(), sgd_model.state_dict()
print("configuration diff, sft to dpo:", "empty" if settings["sft"] == settings["dpo"] else "not empty")

# %%
print(f"answers that differ, same cases and random numbers: {changed} of {len(cases)}; "
      f"tensors that differ: {sum(not torch.equal(old[n], new[n]) for n in old)} of {len(old)}")

# %% [markdown]
# Boundaries that came from votes live in weights. No config names them and no log line will. Where to look next: the
# run card's parents, the pairs file and its reasons, and the same frozen cases on both sides.
#
# ## Pairs about tomorrow's rule
#
# From tomorrow damage is covered for 7 days, whatever the printed policy says. Can pairs teach it? Chosen: quotes 7
# days and decides by it. Rejected: today's right answer. Two rivals: SFT on the same chosen answers, as many steps at
# the same rate; and the other way to bring a fact, editing the policy line in the prompt and training nothing.

# %%
from lifecycle_lib.desk.cases import render_answer, render_prompt


def tomorrow(case):
    """(the case's prompt with the new line, the answer under the new rule)."""
    line = replace(case.policy, window_days=7)
    book = [line if p == case.policy else p for p in case.policies]
    return render_prompt(book, case.order, case.message), render_answer(line, case.order)


# %%
def damaged(n, split):
    """The first n cases about damage that a policy line covers with another window than 7 days."""
    drawn = (c for c in draw_cases(12 * n, lab.seed, split) if c.policy and c.reason == "damaged")
    return [c for c in drawn if c.policy.window_days != 7][:n]


# %%
lessons, asked = damaged(64, "facts"), damaged(32, "fact questions")
fact_pairs = encode_pairs(tok, [make_pair(c.prompt, tomorrow(c)[1], c.answer, "rule_of_tomorrow") for c in lessons])

# %%
from lifecycle_lib.lab.studies.preferences import chosen_loss

fact_ref = dpo.reference_logps(sft_model, fact_pairs, pad)
fact_run = {"lr": 1e-2, "size": 16, "steps": min(30, lab.profile.dpo.steps)}
fact_model, fact_history = train(fact_pairs, fact_ref, **fact_run)
told_model, _ = train(fact_pairs, fact_ref, loss=lambda m, b, _: chosen_loss(m, b), **fact_run)

# %%
others = [c for c in cases if c.reason != "damaged"][:64]
taught = {"sft": lab.load(sft), "facts by DPO": fact_model, "facts by SFT": told_model}
greedy = {name: Engine(model, tok, 0.0) for name, model in taught.items()}

# %%
for name, engine in greedy.items():
    quoted = sum(text == tomorrow(c)[1] for text, c in zip(engine.answer(asked), asked))
    kept = sum(text == c.answer for text, c in zip(engine.answer(others), others))
    print(f"{name:22} new rule exact {quoted:2} of {len(asked)}; other cases right {kept} of {len(others)}")
edited = greedy["sft"].texts([tomorrow(c)[0] for c in asked])

# %%
print(f"{'policy text edited':22} new rule exact {sum(t == tomorrow(c)[1] for t, c in zip(edited, asked)):2} of "
      f"{len(asked)}; no weight touched")
row = fact_history[-1]
print(f"pairs ranked the new way: {row['accuracy']:.0%}; chosen moved {row['chosen_reward'] / beta:+.1f} nats, "
      f"to a log-probability of {row['chosen_sum_logp']:.0f}")

# %% [markdown]
# Pairs can teach it, slowly: 8 of 32 after 30 steps; SFT on the same answers, 11. Both pay elsewhere: of 64 cases
# without damage, 59 were right before, 46 and 44 after. The edited line gets all 32 and costs nothing. (64 lessons, one
# rate, one seed, no replay of old cases.) Facts that change belong in the text in front of the model.
#
# ## One road or two?
#
# Does skipping the reward model cost anything? A policy small enough to see: six possible answers, six logits. The same
# 400 votes go down both roads: fit Bradley-Terry strengths, then REINFORCE with a KL leash; or DPO directly.

# %%
#         words, cites the line, promises a label
ANSWERS = np.array([[6, 0, 0], [12, 1, 0], [30, 1, 0], [24, 0, 0], [18, 1, 1], [10, 0, 1]], float)
FEATURES = ANSWERS / [10, 1, 1]
REF = np.log(np.array([0.25, 0.2, 0.1, 0.15, 0.15, 0.15]))
USERS = FEATURES @ [-0.3, 1.5, -2.0]

# %%
def vote(utility, n, rng):
    """wins[a, b] of n votes between random different answers, by Bradley and Terry."""
    a = rng.integers(6, size=n)
    b = (a + rng.integers(1, 6, size=n)) % 6
    first = rng.random(n) < 1 / (1 + np.exp(utility[b] - utility[a]))
    wins = np.zeros((6, 6))
    np.add.at(wins, (np.where(first, a, b), np.where(first, b, a)), 1)
    return wins


# %%
def two_steps(wins, steps=300):
    """Reward model, then REINFORCE on samples with the KL leash (beta 1). Returns log-probabilities."""
    r, ref_logp = torch.tensor(strengths(wins, ridge=1e-2)), torch.tensor(REF)
    theta = ref_logp.clone().requires_grad_()
    adam = torch.optim.Adam([theta], lr=0.05)
    for _ in range(steps):
        logp = theta.log_softmax(0)
        y = torch.multinomial(logp.detach().exp(), 256, replacement=True)
        gain = (r - logp.detach() + ref_logp)[y]
        adam.zero_grad()
        (-((gain - gain.mean()) * logp[y]).mean()).backward()
        adam.step()
    return theta.detach().log_softmax(0).numpy()


# %%
def one_step(wins, steps=300, beta=1.0, alpha=0.0):
    """DPO on the same votes: the loss of the algorithm cell, weighted by counts. `alpha` is for later."""
    a, b = torch.tensor(np.argwhere(wins)).T
    longer = torch.tensor(ANSWERS[:, 0])[a] - torch.tensor(ANSWERS[:, 0])[b]  # words
    n, ref_logp = torch.tensor(wins)[a, b], torch.tensor(REF)
    theta = ref_logp.clone().requires_grad_()
    adam = torch.optim.Adam([theta], lr=0.05)
    for _ in range(steps):
        gap = theta.log_softmax(0) - ref_logp
        adam.zero_grad()
        (-(n * F.logsigmoid(beta * (gap[a] - gap[b]) + alpha * longer)).sum() / n.sum()).backward()
        adam.step()
    return theta.detach().log_softmax(0).numpy()


# %%
def win_rate(logp):
    """Chance that users prefer this policy's answer to one of the reference."""
    beats = 1 / (1 + np.exp(USERS[None] - USERS[:, None]))
    return float(np.exp(logp) @ beats @ np.exp(REF))


# %%
def divergence(logp):
    """KL(policy, reference) in nats."""
    return float(np.exp(logp) @ (logp - REF))


# %%
found = {"reward model + REINFORCE": [], "DPO": []}
for trial in range(8):
    torch.manual_seed(trial)
    wins = vote(USERS, 400, np.random.default_rng(trial))
    for name, road in zip(found, (two_steps, one_step)):
        found[name].append(road(wins))

# %%
for name, policies in found.items():
    w, kl = (paired_effect([f(p) for p in policies], [0.0] * 8) for f in (win_rate, divergence))
    print(f"{name:26} preferred {100 * w.estimate:.0f} % [{100 * w.low:.0f}, {100 * w.high:.0f}], "
          f"KL {kl.estimate:.2f} [{kl.low:.2f}, {kl.high:.2f}] nats")

# %%
parity = ClaimCard(
    claim="on a table of answers both roads end at the same policy", direction="same", smallest=2, unit="points",
    falsifier="preference rates differ by more than 2 points", scope="6 answers, 400 votes, 8 simulated vote sets",
    not_measured="networks: there the reward model generalises in its own way, and so does the policy")
_ = parity.settle(paired_effect(*([100 * win_rate(p) for p in policies] for policies in found.values())))

# %% [markdown]
# Same optimum, as the algebra said: on a table nothing is lost by skipping the reward model. What is skipped is the
# part of classic RLHF that can look at *new* answers. DPO hears about the pairs it was given and nothing else.
#
# And here $\beta$ does what it was derived for. The same votes under four leashes, each run to its end, beside the
# closed form.

# %%
wins = vote(USERS, 400, np.random.default_rng(0))
fitted = strengths(wins, ridge=1e-2)
sweep = np.geomspace(0.2, 8, 40)
exact_curve = [REF + fitted / b - np.log(np.exp(REF + fitted / b).sum()) for b in sweep]
ended = {b: one_step(wins, 800, b) for b in (0.5, 1.0, 2.0, 5.0)}

# %%
style()
fig, ax = plt.subplots(figsize=(6.4, 3.2))
ax.plot([divergence(q) for q in exact_curve], [100 * win_rate(q) for q in exact_curve], color="#111111", label="closed form")
for b, q in ended.items():
    ax.plot(divergence(q), 100 * win_rate(q), marker="o", color="#111111", markerfacecolor="white")
    ax.annotate(f"beta {b:g}", (divergence(q), 100 * win_rate(q)), (6, -12), textcoords="offset points", fontsize=9)
ax.set(xlabel="KL from the reference (nats)", ylabel="users prefer (%)", title="What beta buys: nats for preference")
ax.legend()
fig.supxlabel("1 set of 400 simulated votes, 6 answers, no interval. Not measured here: networks.", x=0.01, ha="left",
              fontsize=9, color="#606060")
plt.show()

# %%
for b, q in ended.items():
    best = REF + fitted / b - np.log(np.exp(REF + fitted / b).sum())
    print(f"beta {b:3g}: KL {divergence(q):.2f} nats, users prefer {100 * win_rate(q):.0f} %; closed form "
          f"{divergence(best):.2f}, {100 * win_rate(best):.0f} %")

# %% [markdown]
# Halve $\beta$ and the policy walks further for less and less. Our network showed none of this: 40 clipped steps end
# long before any resting place, where $\beta$ would count. That is a property of the recipe, not of $\beta$.
#
# ## Where does the leash go?
#
# The RL step maximises $E[u] - \beta\,\mathrm{KL}(\pi\,\|\,\mathrm{ref})$. Two places for the KL are in use: inside
# the reward, as the log-ratio of the sampled answer (k1; RLHF, RLOO), or as a term of the loss (k3; GRPO code). On six
# answers no sampling is needed: write out each expectation and take its gradient.

# %%
u6, ref6 = torch.tensor(USERS), torch.tensor(REF)
theta = (ref6 + 0.5 * u6).requires_grad_()
slope_of = lambda value: torch.autograd.grad(value, theta)[0]  # noqa: E731

# %%
def leash(place):
    """Expected gradient of the leash alone, every answer weighted by its probability (no gradient through that)."""
    logp = theta.log_softmax(0)
    p, ratio = logp.detach().exp(), logp - ref6
    return slope_of({"k1 in the reward": (p * ratio.detach() * logp).sum(), "k1 in the loss": (p * ratio).sum(),
                     "k2 in the loss": (p * ratio**2 / 2).sum(),
                     "k3 in the loss": (p * (torch.exp(-ratio) - 1 + ratio)).sum()}[place])


# %%
def exact(direction):
    """Gradient of KL(policy || ref), or of KL(ref || policy), itself."""
    logp = theta.log_softmax(0)
    reverse, forward = (logp.exp() * (logp - ref6)).sum(), (ref6.exp() * (ref6 - logp)).sum()
    return slope_of(reverse if direction == "reverse" else forward)


# %%
wanted = {"k1 in the reward": exact("reverse"), "k1 in the loss": torch.zeros(6), "k2 in the loss": exact("reverse"),
          "k3 in the loss": exact("forward")}
for place, equals in wanted.items():
    g = leash(place)
    assert (g - equals).abs().max() < 1e-12
    print(f"{place:16} size {float(g.norm()):.3f}; off KL(policy || ref) by {float((g - exact('reverse')).norm()):.3f}, "
          f"off KL(ref || policy) by {float((g - exact('forward')).norm()):.3f}")

# %% [markdown]
# k1 in the reward and k2 in the loss have the gradient of the formula. k3 in the loss has that of the KL the other way
# round, which punishes *dropping* what the reference says. And k1 moved into the loss, the easiest slip, holds nothing:
# its mean gradient is zero, though the number it logs is the right KL.
#
# Scope: one token, on policy. Summed over tokens, k3 gives that other KL at each prefix drawn and ignores how prefixes
# come about; off policy it needs importance weights.
#
# ## A judge of its own
#
# Now the judge on our network: the SFT body, one score at the last token, Bradley and Terry's loss. Against torch's
# cross-entropy of a vote:

# %%
from lifecycle_lib.train.reward_model import bt_loss, train_reward_model

pair_scores = torch.tensor([[1.0, -0.5, 3.0], [0.0, 2.0, 2.5]], requires_grad=True)
torchs = F.binary_cross_entropy_with_logits(pair_scores[0] - pair_scores[1], torch.ones(3))
by_line = -F.logsigmoid(pair_scores[0] - pair_scores[1]).mean()

# %%
grads = [torch.autograd.grad(x, pair_scores)[0] for x in (torchs, by_line, bt_loss(*pair_scores)[0])]
assert all(torch.allclose(g, grads[0], atol=1e-6) for g in grads)
print(f"one line, the library, torch: {by_line.item():.4f}, {bt_loss(*pair_scores)[0].item():.4f}, {torchs.item():.4f}; "
      "same gradient")

# %%
from lifecycle_lib.train.loop import FitConfig

rm_fit = FitConfig(steps=min(20, lab.profile.dpo.steps), optimizer="adamw", lr=3e-4, warmup_steps=2)
judge, judge_fit = train_reward_model(sft_model, tok, votes, rm_fit, batch_size=lab.profile.dpo_batch, seed=lab.seed)

# %%
from lifecycle_lib.train.reward_model import RewardModel

with tempfile.TemporaryDirectory() as folder:
    judge.save(folder)
    again = RewardModel.load(folder)
both_scores = [m.score(tok, [golden.prompt] * 2, list(both.values())) for m in (judge, again)]
assert torch.equal(*both_scores)
print(f"last loss {judge_fit.losses[-1]:.2f} of ln 2; plain over claiming by {both_scores[0][0] - both_scores[0][1]:+.1f}; "
      "saved and loaded: same scores")

# %% [markdown]
# It reads the whole answer, order and policies in front of it. What has it learnt to see? Two exams of unseen cases:
# the kind it was trained on, and right against wrong *decisions*. Guess both numbers first. Next to it, on the same
# exams: DPO's implicit reward, and the plain log-probability of the SFT model, which nobody ever asked for a vote.

# %%
flip = lambda text: text.replace("true", "TRUE").replace("false", "true").replace("TRUE", "false")  # noqa: E731
decided = [c for c in draw_cases(2 * n_probe, lab.seed, "exam") if c.policy][:n_probe]
exams = {"claims a label": make_pairs(decided),
         "wrong decision": [make_pair(c.prompt, c.answer, flip(c.answer), "wrong_decision") for c in decided]}

# %%
def ranked_right(exam):
    """Pairs ranked right by the judge, DPO's implicit reward and SFT's log-probability."""
    coded = encode_pairs(tok, exam)
    before_ = dpo.reference_logps(sft_model, coded, pad)
    won, lost = preferences.implicit_rewards(sgd_model, dpo.PairBatch(dpo.pair_rows(coded, pad),
                                                                      before_.T.reshape(-1)), beta)
    by_judge = [judge.score(tok, [p["prompt"] for p in exam], [p[k] for p in exam]) for k in ("chosen", "rejected")]
    return {"judge": by_judge[0] > by_judge[1], "implicit": won > lost, "SFT": before_[:, 0] > before_[:, 1]}


# %%
for name, exam in exams.items():
    for who, good in ranked_right(exam).items():
        low, high = wilson(int(good.sum()), len(good))
        print(f"{name:15} {who:9} ranks right {100 * good.float().mean():3.0f} % ({100 * low:.0f}-{100 * high:.0f}) "
              f"of {len(good)}")

# %% [markdown]
# Perfect on what it was asked; on decisions hardly better than a coin (62 %, interval from 50), and DPO's implicit
# reward is one. SFT's log-probability, where both started, ranks 92 % right: the knowledge is in the body, and votes
# about labels never ask for it. A judge is silent where its voters were, and gives a number all the same.
#
# ## Wrong votes
#
# Turn a share $e$ of all votes round. Who won 90 of 100 now wins fewer: everybody looks closer to even. Robust DPO is
# told $e$ and takes it out again. By hand, for one pair of answers:

# %%
p_clean, e = 0.9, 0.2
p_seen = (1 - e) * p_clean + e * (1 - p_clean)
assert abs(p_seen - 0.74) < 1e-12
d_grid = np.linspace(-2, 12, 2801)
noisy_loss = {k: p_seen * kin(d_grid, e)[k] + (1 - p_seen) * kin(-d_grid, e)[k] for k in ("DPO", "robust DPO")}

# %%
for name, loss in noisy_loss.items():
    print(f"{name:10} comes to rest at beta d = {beta * d_grid[loss.argmin()]:.2f}; "
          f"ln odds of the votes: clean {math.log(9):.2f}, seen {math.log(p_seen / (1 - p_seen)):.2f}")

# %% [markdown]
# That predicts a network, too. Our votes were unanimous; with a share $e$ turned round, DPO should stop at
# $\beta d = \ln((1-e)/e)$, and the odds of a claim fall by $e^d$ and no further. cDPO smooths once more and stops
# earlier. Robust DPO has no stop. One objection first: wrong votes cancel right ones, so DPO's mean step shrinks to
# $1-2e$ of itself, and robust DPO divides by exactly that. Only a longer step? The control is plain DPO at the rate over
# $1-2e$. Recorded, five seeds:

# %%
show_evidence("label_noise", effects=[e["name"] for e in recorded("label_noise")["effects"][:7]])

# %%
def noisy(arm, key="said"):
    """A recorded arm of label_noise, its mean over seeds and interval, in percent."""
    values = [row[f"{arm}.{key}"] for row in recorded("label_noise")["per_seed"]]
    e = paired_effect(values, [0.0] * len(values))
    return f"{100 * e.estimate:5.1f} [{100 * max(0, e.low):4.1f}, {100 * e.high:4.1f}]"


# %%
print(f"answers that say the label, %: before any vote {noisy('sft')}; DPO, clean votes {noisy('dpo')}")
names = {"dpo": "DPO", "scaled": "DPO, longer step", "cdpo": "cDPO", "robust": "robust DPO"}
for share in (20, 40):
    for arm, name in names.items():
        rest = f"   predicted rest {noisy(f'{arm}_{share}', 'rest')}" if arm in ("dpo", "cdpo") else ""
        print(f"{share} % wrong  {name:17} {noisy(f'{arm}_{share}')}{rest}")

# %%
evidence_figure("label_noise", title="Wrong votes: what each loss leaves of the habit", effects={
    "sft: said": "before any vote", "dpo: said": "DPO, clean votes", "dpo_40: said": "DPO, 40 % wrong",
    "scaled_40: said": "DPO, longer step, 40 % wrong", "cdpo_40: said": "cDPO, 40 % wrong",
    "robust_40: said": "robust DPO, 40 % wrong"})

# %% [markdown]
# **Supported**, and the arithmetic holds on a network: DPO stops at 15.7 % where 16.3 were predicted, cDPO at 27.1 where
# 27.1 were. A longer step arrives at the same place sooner; only robust DPO moves the place. Smoothing does not denoise:
# cDPO, told the right share, wants *less* than DPO and nearly keeps the habit. At 20 % wrong there is little to win
# (1.5 points): with $\beta$ .5, votes of four to one ask for nearly all of it already.
#
# Not shown: a share that must be guessed (here it is known to the pair), errors that depend on the answer, other $\beta$.

# %%
print("predicted rest minus measured, 40 % wrong, points, by seed:", " ".join(
    f"{100 * (row['dpo_40.rest'] - row['dpo_40.said']):+.0f}" for row in recorded("label_noise")["per_seed"]))

# %% [markdown]
# ## Clicks are votes with five meanings
#
# Staff press thumbs-down on the SFT checkpoint's answers and type a correction. Why they pressed decides what they type:
# `wrong` the right answer, `ugly` the same JSON with spaces, `dislike` the evidence in other words, `curiosity` whatever
# stood in the box, `test` the word ok. Two in five are `wrong`. Notebook 08 has the button, its three fields and the
# loader; here is what the clicks do as labels.
#
# The claim, fixed before its run: rows that the loader lets through (wrong, verified, with consent) leave exact pass at
# least 10 points above as many rows of every kind, 30 steps each, and every click leaves the model below no training.

# %%
from lifecycle_lib.lab.studies.clicks import purity_figure

page = recorded("clicks")
fig = purity_figure(page)
plt.show()

# %%
show_evidence("clicks", ["exact pass, gated - every click as few", "exact pass, gated - every click",
                         "every click: exact pass lost, before - after", "before: exact pass", "gated: exact pass",
                         "exact pass, every click as few - every click", "exact pass, gated - all wrong and verified"])
flip = page["extra"]["flip"]
print(f"corrections help above a share of wrong clicks of {100 * min(flip['seeds']):.0f} to {100 * max(flip['seeds']):.0f} %, "
      f"median {100 * flip['median']:.0f} % ({flip['crossed']} of {len(flip['seeds'])} seeds)")

# %% [markdown]
# **Supported.** Few rows are not the reason: the gate's rows and their control are as many, read as often, and "every
# click, as few" is no worse than every click. Nor does the gate want more rows: three passes over its 236 did better than
# one pass over 720 verified ones.
#
# About three in four clicks must be labels before training on the page helps at all. Pages of right answers and matters
# of taste alone (squares) land where mixed pages with as many right ones land: an opinion, as a label, is as wrong as a
# test click.
#
# And all of them lie *below* the line of "rate in, rate out". Why?

# %%
show_evidence("clicks", [f"purity 0.4: {what}, {where}" for what in ("said ok", "other words", "spaced", "broken")
                         for where in ("corrections", "answers")]
              + ["exact pass - share of right corrections, mean of eight pages"], claim=False)

# %% [markdown]
# No correction is broken JSON; four answers in ten are. A habit comes out at its rate when one token decides and the
# model can write what follows (notebook 08). Here 30 steps were too few for that: one correction in seven says ok, one in
# nine has the words of opinion, and next to no answer has either. The likely reading: an answer begins in one rendering
# and ends in none. Which of the eight rates would have shown it?

# %%
from lifecycle_lib.judge.evals import RATES

show_evidence("clicks", [f"purity 0.4: {rate}, better by" for rate in RATES], claim=False)

# %% [markdown]
# One rate gets better: the invented label, which few corrections have. A dashboard with that one on top calls the page
# progress while the seven others get worse.
#
# Not shown: a gate that errs (here the reason on a row is true and whoever verifies never slips, so this is the most a
# gate can give); longer training, which might spell the opinions right.

# %% [markdown]
# ## Whose votes?
#
# Simulated annotators, two pools: one likes short answers, one likes long ones. Otherwise they agree. First each pool
# alone, then one data set in which a minority sits at the same desk. For a table the optimum is known in closed form,
# so no training is needed.

# %%
POOLS = {"brief": FEATURES @ [-1.0, 1.0, -2.0], "thorough": FEATURES @ [1.0, 1.0, -2.0]}

# %%
def from_votes(wins):
    """(strengths, probabilities) of the best policy at beta 1."""
    u = strengths(wins, ridge=1e-2)
    p = np.exp(REF + u)
    return u, p / p.sum()


# %%
def mixed(minority, trial, n=400):
    """Votes of the thorough pool with a share from the brief one."""
    rng = np.random.default_rng(1000 + trial)
    return vote(POOLS["brief"], round(minority * n), rng) + vote(POOLS["thorough"], n - round(minority * n), rng)


# %%
words = {share: [from_votes(mixed(share, t))[1] @ ANSWERS[:, 0] for t in range(n_pools)] for share in (0.0, 1.0)}
gap = paired_effect(words[0.0], words[1.0])
print(f"same prompt, same reference, other annotators: {gap.estimate:.0f} words longer "
      f"[{gap.low:.0f}, {gap.high:.0f}], {gap.n} simulated vote sets, 95 % t")

# %%
def agreement(minority, trial, draw=mixed):
    """Share of fresh votes of the same kind that the fitted strengths predict."""
    u = from_votes(draw(minority, trial))[0]
    fresh = draw(minority, trial + 5000)
    return float(fresh[(u[:, None] > u[None])].sum() / fresh.sum())


# %%
def spread(minority, trial):
    """Standard deviation of the answer's length, in words."""
    p = from_votes(mixed(minority, trial))[1]
    return float(np.sqrt(p @ ANSWERS[:, 0] ** 2 - (p @ ANSWERS[:, 0]) ** 2))


# %%
shares = (0.0, 0.125, 0.25, 0.375, 0.5)
pool = {f.__name__: {m: [f(m, t) for t in range(n_pools)] for m in shares} for f in (agreement, spread)}

# %%
style()
fig, axes = plt.subplots(1, 2, figsize=(7.4, 3.2))
panels = (("agreement", 100, "votes predicted (%)"), ("spread", 1, "sd of length (words)"))
for ax, (name, scale, label) in zip(axes, panels):
    stats = [paired_effect(pool[name][m], [0.0] * n_pools) for m in shares]
    ax.errorbar([100 * m for m in shares], [scale * e.estimate for e in stats],
                [scale * (e.estimate - e.low) for e in stats], color="#111111", marker="o")
    ax.set(xlabel="votes from the other pool (%)", ylabel=label)
fig.supxlabel(f"n = {n_pools} simulated vote sets of 400; bars: 95 % t intervals.\nNot measured here: real annotators.",
              x=0.01, ha="left", fontsize=9, color="#606060")
plt.show()

# %%
for name, scale, unit in (("agreement", 100, "points"), ("spread", 1, "words")):
    e = paired_effect(pool[name][0.5], pool[name][0.0])
    low, high = scale * e.low, scale * e.high
    print(f"{name}, half and half minus one pool: {scale * e.estimate:+.1f} {unit} [{low:+.1f}, {high:+.1f}]")

# %% [markdown]
# Agreement falls before any training: an alarm. The spread of lengths is a worse one, it rises first and falls again.
# But what is the alarm about? Voters who disagree, or one pool that votes carelessly? Control: the thorough pool alone,
# with as many of its votes turned round as it takes to predict equally few.

# %%
def careless(flipped, trial, n=400):
    """Votes of the thorough pool, a share of them turned round."""
    rng = np.random.default_rng(3000 + trial)
    return (vote(POOLS["thorough"], n - round(flipped * n), rng) + vote(POOLS["thorough"], round(flipped * n), rng).T)


# %%
def apart(draws, trial):
    """Held-out log-likelihood a vote (nats) won by fitting each half of the annotators by itself."""
    seen, fresh = ([draw(trial + later) for draw in draws] for later in (0, 5000))
    likelihood = lambda u, w: -(w * np.log1p(np.exp(u[None] - u[:, None]))).sum() / w.sum()  # noqa: E731
    both = from_votes(sum(seen))[0]
    return float(np.mean([likelihood(from_votes(s)[0], f) - likelihood(both, f) for s, f in zip(seen, fresh)]))


# %%
half = np.mean(pool["agreement"][0.5])
by_flips = {e: [agreement(e, t, careless) for t in range(n_pools)] for e in (0.05, 0.1, 0.15, 0.2, 0.25)}
e_same = min(by_flips, key=lambda e: abs(np.mean(by_flips[e]) - half))
print(f"votes predicted: two pools half and half {100 * half:.0f} %; one pool with {100 * e_same:.0f} % turned round "
      f"{100 * np.mean(by_flips[e_same]):.0f} %")

# %%
halves = {"two pools": [lambda t: mixed(1.0, t, 200), lambda t: mixed(0.0, 7000 + t, 200)],
          "one careless pool": [lambda t: careless(e_same, t, 200), lambda t: careless(e_same, 7000 + t, 200)]}
for name, draws in halves.items():
    e = paired_effect([apart(draws, t) for t in range(n_pools)], [0.0] * n_pools)
    print(f"{name:18} fitting the halves apart: {e.estimate:+.3f} nats a held-out vote [{e.low:+.3f}, {e.high:+.3f}]")

# %% [markdown]
# The same alarm with another cause. Falling agreement says that votes contradict each other, not why. Who voted tells:
# fit each half of the annotators by itself. With two pools that wins 0.10 nats a held-out vote; with one careless pool
# it loses a little, since each fit sees half the votes. So keep the annotator's id in the pair (here the halves were
# known; real ones must be found). The policy that comes out of the mixture pleases the average, whom nobody has met.
#
# ## Polite before right
#
# The commonest taste of all: in three votes of ten, length decides and nothing else. Users pay for it. Length control
# takes the length slope out of the strengths.

# %%
HURRIED = FEATURES @ [1.5, 0.0, 0.0]


def policy_of(u):
    """Log-probabilities of the best policy at beta 1."""
    logp = REF + u
    return logp - np.log(np.exp(logp).sum())


# %%
def length_slope(u):
    """Nats of strength a word, the other features held fixed."""
    return np.linalg.lstsq(np.c_[ANSWERS, np.ones(6)], u, rcond=None)[0][0]


def controlled(u):
    """Strengths without what is linear in length."""
    return u - length_slope(u) * ANSWERS[:, 0]


# %%
outcomes = {}
for trial in range(n_pools):
    rng = np.random.default_rng(9000 + trial)
    clean_u, mixed_u = (strengths(vote(USERS, 400 - n, rng) + vote(HURRIED, n, rng), ridge=1e-2) for n in (0, 120))
    for name, u in (("users vote", clean_u), ("30 % by length", mixed_u), ("then length control", controlled(mixed_u)),
                    ("users vote, control", controlled(clean_u))):
        outcomes.setdefault(name, []).append(policy_of(u))

# %%
for name, policies in outcomes.items():
    rows_ = np.array([(np.exp(q) @ ANSWERS[:, 0], 100 * np.exp(q) @ ANSWERS[:, 2], 100 * win_rate(q)) for q in policies])
    cells = (paired_effect(col, [0.0] * n_pools) for col in rows_.T)
    print(f"{name:20}", "  ".join(f"{label} {c.estimate:4.1f} [{c.low:.1f}, {c.high:.1f}]" for label, c in zip(
        ("words", "promises %", "users prefer %"), cells)))

# %%
lost = paired_effect(*([100 * win_rate(q) for q in outcomes[k]] for k in ("30 % by length", "users vote")))
rates_ = [np.mean([win_rate(q) for q in outcomes[k]]) for k in ("30 % by length", "users vote")]
canary = math.ceil((1.96 + 0.84) ** 2 * sum(p * (1 - p) for p in rates_) / (lost.estimate / 100) ** 2)
print(f"users' preference lost to hurried voters: {lost.estimate:+.1f} points [{lost.low:+.1f}, {lost.high:+.1f}], "
      f"n = {n_pools} vote sets; a canary needs about {canary} comparisons an arm to see it (80 % power, two arms)")

# %% [markdown]
# Length control gives half of the words back (honest voters end at 14.8) and nothing else. A hurried vote is no vote about promises, so it pulls *that*
# strength toward even as any wrong label does, and no length term can know. What helps is votes that look at the
# point: careful users, a promising answer against one that does not promise. How many?

# %%
def tie_breaks(n, rng):
    """n careful votes, each between an answer that promises a label and one that does not."""
    a, b = rng.integers(4, size=n), 4 + rng.integers(2, size=n)
    first = rng.random(n) < 1 / (1 + np.exp(USERS[b] - USERS[a]))
    wins = np.zeros((6, 6))
    np.add.at(wins, (np.where(first, a, b), np.where(first, b, a)), 1)
    return wins


# %%
def promises_after(extra, trial):
    """Promises (%) of the length-controlled policy when `extra` tie-breaks join the 400 mixed votes."""
    rng = np.random.default_rng(9000 + trial)
    wins = vote(USERS, 280, rng) + vote(HURRIED, 120, rng) + tie_breaks(extra, rng)
    return 100 * np.exp(policy_of(controlled(strengths(wins, ridge=1e-2)))) @ ANSWERS[:, 2]


# %%
for extra in (0, 100, 200, 400):
    left = paired_effect([promises_after(extra, t) for t in range(n_pools)], [0.0] * n_pools)
    print(f"{extra:3} tie-break votes: promises {left.estimate:4.1f} % [{left.low:.1f}, {left.high:.1f}]")

# %% [markdown]
# As many careful votes as votes before, and about half of the damage is undone: clean labels are cheaper at the door. And
# look at the table's fourth row: with honest voters, length control *adds* words, because it takes away a
# taste that users really have. A bias and a preference look the same in the votes.
#
# ## Length control inside the loss
#
# R-DPO (Park et al. 2024) maximises reward $-\,\alpha|y| - \beta\,$KL. At its optimum $\beta \ln \pi/\mathrm{ref} = u -
# \alpha|y|$ plus a constant, so a vote's log-odds are $\beta d + \alpha(|y_w| - |y_l|)$: what length explains is *credited*
# and need not be learnt. Same hurried votes, $\alpha$ the slope found above, and the slip of a turned sign beside it.

# %%
rng = np.random.default_rng(9000)
hurried = vote(USERS, 280, rng) + vote(HURRIED, 120, rng)
u_hurried = strengths(hurried, ridge=1e-2)
alpha = length_slope(u_hurried)
by_loss = {name: one_step(hurried, 800, alpha=a) for name, a in
           (("DPO", 0.0), ("R-DPO", alpha), ("R-DPO, sign turned", -alpha))}

# %%
assert np.abs(np.exp(by_loss["R-DPO"]) - np.exp(policy_of(controlled(u_hurried)))).max() < 0.01
for name, q in by_loss.items():
    print(f"{name:20} {np.exp(q) @ ANSWERS[:, 0]:4.1f} words a mean answer")
print("R-DPO's policy is that of the controlled strengths, every probability to 0.01: True")

# %% [markdown]
# The library's loss against torch's cross-entropy of a vote, then the network. There the claiming answer is the longer
# one, by a few tokens: let length alone decide six votes of ten, and it wins them.

# %%
d, extra = torch.tensor([-2.0, 0.5, 3.0], requires_grad=True), torch.tensor([4.0, -4.0, 1.0])
both_ways = (preferences.rdpo_loss(d, extra, beta, 0.2),
             F.binary_cross_entropy_with_logits(beta * d + 0.2 * extra, torch.ones(3)))
grads = [torch.autograd.grad(x, d)[0] for x in both_ways]
assert abs(both_ways[0] - both_ways[1]) < 1e-6 and torch.allclose(*grads, atol=1e-6)

# %%
by_length = encode_pairs(tok, preferences.with_label_noise(votes[:160], 0.6, lab.seed))
length_ref = dpo.reference_logps(sft_model, by_length, pad)
credit = preferences.kin_loss("rdpo", beta, alpha=0.2)
length_run = short_run | {"lr": 5e-3, "size": 16}
swayed = {"DPO": train(by_length, length_ref, **length_run)[0],
          "R-DPO": train(by_length, length_ref, loss=lambda m, b, _: credit(m, b), **length_run)[0]}

# %%
for name, report in {"sft": before, **{k: scored(m, n_short) for k, m in swayed.items()}}.items():
    print(f"{name:6} claims {span(report, 'invented_claim_rate')}; tokens an answer "
          f"{np.mean([len(tok.encode(text, allow_special=False)) for text in report['answers']]):.1f}")
print(f"alpha * extra tokens {0.2 * (len(claim_ids) - len(plain_ids)):.1f} nats; ln odds of the votes {math.log(0.6 / 0.4):.2f}")

# %% [markdown]
# Under votes that length wins, DPO claims in 62 % of its answers. R-DPO credits 0.2 nats a token, 0.8 for the claim, more
# than the 0.41 that the votes say: what is left to learn points the other way, and claims fall to 10 %. The repair is a
# bet. In these pairs length and claim are one thing, and no loss can know which of them the voters meant; half the
# $\alpha$ would have left almost nothing to learn. $\alpha$ is an opinion about voters. Pairs in which the better answer is
# sometimes longer and sometimes shorter are what could measure it.
#
# ## The recorded evidence
#
# One run is one run. The same stage over recorded seeds, never recomputed here:

# %%
show_evidence("dpo_claims")

# %%
evidence_figure("dpo_claims", effects=["invented claims removed, sft - dpo", "JSON validity, dpo - sft",
                                       "exact pass, dpo - sft", "eligibility, dpo - sft"],
                title="40 DPO steps with SGD")
per_seed = recorded("dpo_claims")["per_seed"]
print("claims left, by seed:", ", ".join(f"{100 * row['dpo.invented_claim_rate']:.1f} %" for row in per_seed))

# %% [markdown]
# The two roads and their kin side by side: same SFT checkpoints, same pairs, and as controls SFT on the chosen answers
# and the best of four by the reward model. `says the label` counts unfinished claims as well. Recipes are compared, not
# losses at their best: nobody tuned a rate. The pairwise losses share DPO's SGD at 0.001; REINFORCE runs under AdamW at
# 0.0003.

# %%
roads = {"sft": "SFT", "dpo": "DPO", "ipo": "IPO", "kto": "KTO", "orpo": "ORPO", "sft_chosen": "SFT on chosen",
         "rm_rl": "reward model + REINFORCE", "best_of": "best of 4"}
show_evidence("preference_kin", effects=[e["name"] for e in recorded("preference_kin")["effects"][:10]])

# %%
def road(arm, key):
    """A recorded arm's mean and interval over seeds."""
    values = [row[f"{arm}.{key}"] for row in recorded("preference_kin")["per_seed"]]
    return paired_effect(values, [0.0] * len(values))


def least_kl(after, before):
    """Nats that any policy must spend to bring the share of claims from `before` to `after`."""
    return sum(a * math.log(a / b) for a, b in ((after, before), (1 - after, 1 - before)) if a > 0)


# %%
style()
fig, ax = plt.subplots(figsize=(7.2, 3.8))
start_said = road("sft", "said").estimate
ys = np.linspace(0.001, start_said, 100)
ax.plot([least_kl(y, start_said) for y in ys], 100 * ys, color="#808080", linestyle=":", label="least KL for these claims")
for (arm, name), (colour, marker, *_) in zip(roads.items(), [*SERIES, *SERIES]):
    x, y = road(arm, "kl"), road(arm, "said")
    ax.errorbar(x.estimate, 100 * y.estimate, [[100 * (y.estimate - y.low)], [100 * (y.high - y.estimate)]],
                [[x.estimate - x.low], [x.high - x.estimate]], color=colour, marker=marker,
                markerfacecolor=colour if list(roads).index(arm) < len(SERIES) else "white")
    if arm not in ("ipo", "kto"):  # they lie under DPO
        label, low = ("DPO, IPO, KTO" if arm == "dpo" else name), arm in ("dpo", "best_of")
        ax.annotate(label + (", at most" if arm == "best_of" else ""), (x.estimate, 100 * y.estimate),
                    (0 if arm == "best_of" else 6, -14 if low else 6), textcoords="offset points", fontsize=9)
ax.legend(fontsize=9)
ax.set(xlabel="KL spent (nats an answer)", ylabel="answers that say the label (%)", title="The same pairs, eight roads")
fig.supxlabel(f"n = {len(recorded('preference_kin')['seeds'])} seeds, 256 cases each; bars: 95 % t over seeds.\n"
              "Not measured here: other habits, tuned rates.", x=0.01, ha="left", fontsize=9, color="#606060")
plt.show()

# %%
print(f"{'':26} {'says label':>10} {'valid':>7} {'exact':>7} {'KL':>7} {'least':>6} {'CPU s':>6}")
for arm, name in roads.items():
    said, ok, exact, kl, cpu = (road(arm, k).estimate for k in ("said", "valid", "exact", "kl", "cpu_s"))
    least = np.mean([least_kl(row[f"{arm}.said"], row["sft.said"]) for row in recorded("preference_kin")["per_seed"]])
    print(f"{name:26} {100 * said:8.1f} % {100 * ok:5.0f} % {100 * exact:5.0f} % {'<' if arm == 'best_of' else ' '}"
          f"{round(kl, 2) + 0.0:6.2f} {least:6.2f} {cpu:6.1f}")

# %% [markdown]
# Parity where it was asked: the reward model's road leaves 2.0 % (DPO 1.2 %). It costs three times the CPU, loses 5.7
# points of exact pass [3.7, 7.7], and spends 0.67 nats where 0.29 would have done; DPO, ORPO and SFT lie on the dotted
# line: nats spent on the claims and on nothing else. Best of four was not measured: its KL lies between its least and
# the bound, and it pays at every request. Imitating the winners is slow: the rejected answer is never mentioned.
#
# Are the 5.7 points the road's fault, or AdamW's? The optimisers exchanged, recorded with the Adam runs:

# %%
for name in ("exact pass, DPO - reward model + REINFORCE, both SGD", "says the label, reward model + REINFORCE - DPO, both SGD",
             "exact pass, DPO under SGD - DPO under the other road's AdamW"):
    e = next(e for e in recorded("dpo_adam")["effects"] if e["name"] == name)
    print(f"{name:62} {100 * e['estimate']:+5.1f} points [{100 * e['low']:+.1f}, {100 * e['high']:+.1f}]")

# %% [markdown]
# Under the SGD of the DPO arm the road is 2.4 points of exact pass behind, and 2.6 points of claims are left over:
# nothing else broke. Most of the 5.7 was AdamW's. DPO under that AdamW (0.0003, 30 steps) is a ruin, 71 points of exact
# pass gone. Why does REINFORCE stand it better? It samples, and is told of its own broken answers; fixed pairs never
# are. Likely, and not tested here.

# %%
per_seed = recorded("preference_kin")["per_seed"]
for other in ("ipo", "kto"):
    apart = max(abs(row[f"dpo.{key}"] - row[f"{other}.{key}"]) for row in per_seed for key in ("said", "kl"))
    print(f"DPO against {other.upper()}, largest difference of claims or KL in any seed: {apart:.4f}")
ended = paired_effect([row["ipo.chosen_change"] for row in per_seed], [row["ipo.rejected_change"] for row in per_seed])
print(f"the gap IPO ended with: {ended.estimate:.1f} nats [{ended.low:.1f}, {ended.high:.1f}]; it wants 5")

# %% [markdown]
# One run under three names. All pairs ask for the same direction and every step is clipped to the same length, so the
# loss's name cannot matter before the loss comes to rest. At the wild rate above it did.
#
# What none of this shows: a habit that is *likely* under greedy decoding, people's votes, larger models, each loss at a
# rate of its own.
#
# ## What you use at work
#
# TRL's `DPOTrainer`, on the checkpoint as `transformers` reads it from disk. First batch: the loss must be $\ln 2$.
# Then our trained policy goes into its trainer, against the SFT reference: same loss, same log-probabilities.

# %%
from lifecycle_lib.model.bridge import export
from lifecycle_lib.model.hf_classes import to_hf


def trl_trainer(folder, pairs):
    """TRL's trainer on the exported checkpoint, all pairs in one batch."""
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging
    from trl import DPOConfig, DPOTrainer

    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    read = lambda: AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)  # noqa: E731
    args = DPOConfig(output_dir=folder, beta=beta, per_device_train_batch_size=len(pairs), max_length=None,
                     use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, gradient_checkpointing=False)
    rows = datasets.Dataset.from_list([{k: p[k] for k in ("prompt", "chosen", "rejected")} for p in pairs])
    return DPOTrainer(read(), ref_model=read(), args=args, train_dataset=rows,
                      processing_class=AutoTokenizer.from_pretrained(folder, local_files_only=True))


# %%
work_pairs = make_pairs(draw_cases(8, lab.seed, "at work"))
work_rows = encode_pairs(tok, work_pairs)
work = dpo.PairBatch(dpo.pair_rows(work_rows, pad), dpo.reference_logps(sft_model, work_rows, pad).T.reshape(-1))

# %%
with tempfile.TemporaryDirectory() as folder:
    export(sft_model, tok, folder)
    trainer = trl_trainer(folder, work_pairs)
    feed = next(iter(trainer.get_train_dataloader()))
    first = trainer.compute_loss(trainer.model.train(), feed).item()
    trainer.model.load_state_dict(to_hf(sgd_model).state_dict())
    trained = trainer.compute_loss(trainer.model, feed).item()

# %%
ours_loss, ours_metrics = dpo.pair_loss(sgd_model, work, beta)
logged = {key: values[-1] for key, values in trainer._metrics["train"].items()}
assert abs(first - math.log(2)) < 1e-5 and abs(trained - ours_loss.item()) < 1e-5
assert abs(logged["logps/chosen"] - ours_metrics["chosen_sum_logp"]) < 1e-3
print(f"TRL, first batch: {first:.4f} = ln 2; trained policy: same loss as ours to 1e-5: True; "
      f"margin {logged['rewards/margins']:.1f} there, {ours_metrics['margin']:.1f} here")
print(f"TRL's defaults: {trainer.args.optim.value}, rate {trainer.args.learning_rate:g}")

# %% [markdown]
# In TRL's logs the names are `rewards/margins`, `logps/chosen`, `logps/rejected`. Plot the last two. Its default rate
# is a hundredth of the one that broke the format on seed 0. The kin are a setting,
# `loss_type`. TRL's IPO divides by length, the paper's does not: check which one your $\beta$ was tuned for.

# %%
trainer.label_smoothing = 0.1
_ = sgd_model.requires_grad_(True)
for name, kind in {"ipo": "ipo_mean", "robust": "robust", "sigmoid_norm": "norm"}.items():
    trainer.loss_types = [name]
    theirs, (ours, _) = (trainer.compute_loss(trainer.model, feed),
                         preferences.kin_loss(kind, beta, smoothing=0.1)(sgd_model, work))
    norms = [torch.stack([g.square().sum() for g in torch.autograd.grad(x, list(m.parameters()))]).sum().sqrt().item()
             for x, m in ((theirs, trainer.model), (ours, sgd_model))]
    assert abs(theirs.item() - ours.item()) < 1e-5 * max(1, ours.item()) and abs(norms[0] / norms[1] - 1) < 1e-3
    print(f"{name:13} TRL and ours: same loss to 1e-5, same size of gradient to 0.1 %")

# %% [markdown]
# ## The clinic
#
# Two DPO runs came in this morning with the same complaint: the loss is $\ln 2$ at every step.

# %%
from lifecycle_lib.lab import clinic

clinic.show(1)

# %%
case_book = {}
print(clinic.order_test(1, "gradient norm", case_book))
print("healthy twin:", clinic.order_test(1, clinic.TWIN, case_book))

# %%
assert clinic.show_verdict(1, "own_reference", case_book)

# %% [markdown]
# Flat in value only. The gradient at margin 0 is not 0, so a policy that is its own reference is pushed at full strength
# for ever, with nothing to hold it: *flat loss* and *nothing happens* are different statements.
#
# **Your patient.** Number 10 shows the same loss. Order tests with `clinic.order_test`, then put the name of the cause in
# `diagnosis` (the list is `clinic.CAUSES`). Patient 5 belongs to this chapter too.

# %%
clinic.show(10)

# %% nbgrader={"grade": false, "grade_id": "clinic", "locked": false, "schema_version": 3, "solution": true, "task": false}
diagnosis = None
### BEGIN SOLUTION
diagnosis = "optimiser_elsewhere"
### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "clinic-tests", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
assert clinic.show_verdict(10, diagnosis, case_book)
### BEGIN HIDDEN TESTS
assert diagnosis == "optimiser_elsewhere"
### END HIDDEN TESTS

# %% [markdown]
# ## Exercises
#
# **1. The loss from four numbers (★, 5 minutes).** Without torch: `dpo_from_logps(chosen, rejected, ref_chosen,
# ref_rejected, beta)` returns `(loss, reward of chosen, reward of rejected)` of one pair. It must survive a margin of
# -2000.

# %% nbgrader={"grade": false, "grade_id": "dpo-loss", "locked": false, "schema_version": 3, "solution": true, "task": false}
def dpo_from_logps(chosen, rejected, ref_chosen, ref_rejected, beta):
    """DPO loss and the two implicit rewards of one pair, from sum log-probabilities."""
    ### BEGIN SOLUTION
    won, lost = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    margin = won - lost
    loss = math.log1p(math.exp(-margin)) if margin > 0 else -margin + math.log1p(math.exp(margin))
    return loss, won, lost
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "dpo-loss-tests", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
assert abs(dpo_from_logps(-5.0, -9.0, -5.0, -9.0, 0.1)[0] - math.log(2)) < 1e-12, "policy = reference: ln 2"
assert dpo_from_logps(-4.0, -9.0, -5.0, -9.0, 0.5)[1:] == (0.5, 0.0)
assert dpo_from_logps(-4000.0, 0.0, 0.0, 0.0, 0.5)[0] == 2000, "a margin of -2000 must survive"
### BEGIN HIDDEN TESTS
for case_ in ((-1.0, -3.0, -2.0, -2.0, 0.5), (-20.0, -3.0, -2.0, -2.0, 0.1), (-4000.0, 0.0, 0.0, 0.0, 0.5)):
    c_, r_, rc_, rr_, b_ = map(torch.tensor, case_)
    logit_ = (b_ * ((c_ - r_) - (rc_ - rr_))).double()
    want_ = F.binary_cross_entropy_with_logits(logit_, torch.ones_like(logit_)).item()  # torch's own, target 1
    assert abs(dpo_from_logps(*case_)[0] - want_) < 1e-5 * max(1.0, want_), "the loss is BCE of the margin, target 1"
### END HIDDEN TESTS

# %% [markdown]
# **2. Bradley-Terry without Newton (★★, 10 minutes).** `strengths_by_counting(wins, rounds)`: start with weights $w =
# 1$; in each round set $w_a$ to *wins of a* divided by $\sum_b \mathrm{games}_{ab} / (w_a + w_b)$, then divide by the
# geometric mean; return $\ln w$. (Zermelo 1929, and no derivative in sight.)

# %% nbgrader={"grade": false, "grade_id": "bt-counting", "locked": false, "schema_version": 3, "solution": true, "task": false}
def strengths_by_counting(wins, rounds=2000):
    """Bradley-Terry strengths, mean 0, by Zermelo's iteration. wins[a, b]: votes for a over b."""
    ### BEGIN SOLUTION
    games, w = wins + wins.T, np.ones(len(wins))
    for _ in range(rounds):
        w = wins.sum(1) / (games / (w[:, None] + w[None])).sum(1)
        w = w / np.exp(np.log(w).mean())
    return np.log(w)
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "bt-counting-tests", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
assert np.allclose(strengths_by_counting(np.array([[0.0, 3.0], [1.0, 0.0]])), [math.log(3) / 2, -math.log(3) / 2])
### BEGIN HIDDEN TESTS
from scipy.optimize import minimize

votes_ = np.array([[0, 8, 5, 9], [3, 0, 4, 6], [6, 5, 0, 7], [1, 2, 4, 0]], float)
nll_ = lambda u: float((votes_ * np.log1p(np.exp(u[None] - u[:, None]))).sum())  # noqa: E731
best_ = minimize(nll_, np.zeros(4), tol=1e-10).x
assert np.allclose(strengths_by_counting(votes_), best_ - best_.mean(), atol=1e-3), "not the maximum of the likelihood"
### END HIDDEN TESTS

# %% [markdown]
# **3. A hard pair (★, 5 minutes).** For the golden case write a pair in which **both** answers are valid JSON, neither
# claims a label, and each quotes a policy line that stands in the prompt, but the rejected one quotes the wrong line.
# Give it a reason.

# %% nbgrader={"grade": false, "grade_id": "hard-pair", "locked": false, "schema_version": 3, "solution": true, "task": false}
### BEGIN SOLUTION
other_line = golden.answer.replace("damaged P-7 30d", "unwanted P-3 14d").replace('"P-7"', '"P-3"')
hard_pair = make_pair(golden.prompt, golden.answer, other_line, "wrong_policy")
### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "hard-pair-tests", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
assert set(hard_pair) >= {"prompt", "chosen", "rejected", "reason"} and hard_pair["prompt"] == golden.prompt
assert json.loads(hard_pair["rejected"])["policy_id"] != "P-7", "the rejected answer quotes another line of the prompt"
### BEGIN HIDDEN TESTS
import re

fields_ = {side: json.loads(hard_pair[side]) for side in ("chosen", "rejected")}
printed_ = set(re.findall(r"P-[0-9]+", golden.prompt))
for side_ in fields_.values():
    assert set(side_) == {"evidence", "policy_id", "eligible"} and side_["policy_id"] in printed_
    quoted_ = side_["evidence"].split(",")[0]
    assert quoted_ in golden.prompt and side_["policy_id"] in quoted_, "quote a line of the prompt"
assert fields_["chosen"]["policy_id"] == "P-7" and fields_["chosen"]["eligible"] is True, "12 of 30 days, confirmed"
assert fields_["rejected"]["policy_id"] != "P-7", "the hard pair differs in the line it quotes, not in a flipped word"
assert hard_pair["reason"].strip()
### END HIDDEN TESTS

# %% [markdown]
# **4. Where did the fall go? (★★, 10 minutes).** `fall(before, after)`: two lists with the log-probability of each token
# of one rejected answer from the fork on, under the reference and after training. Return `(share of the whole fall that
# sits on the fork token, index of the token that fell most, True if a token after the fork fell below even odds)`. The
# third is the one to alarm on: that token is not what the vote was about.

# %% nbgrader={"grade": false, "grade_id": "fall", "locked": false, "schema_version": 3, "solution": true, "task": false}
def fall(before, after):
    """(share on the fork, index of the largest fall, did a later token fall from likely to unlikely?)."""
    ### BEGIN SOLUTION
    lost = [b - a for b, a in zip(before, after)]
    unlikely = [b > math.log(0.5) > a for b, a in zip(before[1:], after[1:])]
    return lost[0] / sum(lost), lost.index(max(lost)), any(unlikely)
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "fall-tests", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
assert fall([-1.0, -0.1], [-4.0, -1.1]) == (0.75, 0, True)
### BEGIN HIDDEN TESTS
for name_ in ("SGD", "Adam"):
    old_ = start_logp[:, 1:].mean(0).double()
    new_ = old_ + delta[name_][:, 1:].mean(0).double()
    share_, index_, broken_ = fall(old_.tolist(), new_.tolist())
    assert abs(share_ - float((old_ - new_)[0] / (old_ - new_).sum())) < 1e-6
    assert index_ == int((old_ - new_).argmax()) and broken_ == bool(((old_ > math.log(0.5)) & (new_ < math.log(0.5)))[1:].any())
### END HIDDEN TESTS

# %% [markdown]
# ## Quiz
#
# Twelve questions on what you have just measured; 75 % is a pass.

# %%
from lifecycle_lib.lab.quiz import grade, interview, quiz

quiz("11")

# %%
answers = {}  # {"q1": "a", ...}
_ = grade("11", answers)

# %% [markdown]
# ## Interview questions

# %%
interview("11")

# %% [markdown]
# ## What to remember
#
# 1. SFT knows how often an answer was shown. To prefer one valid answer over another takes a second signal, with a
#    reason.
# 2. DPO is the Bradley-Terry likelihood with $\beta \log \pi/\mathrm{ref}$ as strength. It starts at ln 2, always.
# 3. The loss sees a gap. Watch both log-probabilities, and the format.
# 4. Nothing bounds how unlikely the rejected answer gets, nor on which token. A claim that is never closed is not a claim
#    removed, and one seed does not say how often that happens.
# 5. A vote is silent about everything it was not asked. Where you can write the rule, check it.
#
# **Made:** `lab.dpo()`, the stage the next notebook starts from. **Next:** `12_verifier_rewards`, where code pays
# instead of voters.
