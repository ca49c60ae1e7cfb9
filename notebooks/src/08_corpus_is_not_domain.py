# ---
# jupyter:
#   lifecycle:
#     rows: [S2-09a, S2-09b, S2-09c, S2-09d, S2-04a, S2-04b, S2-10a, S2-10b, S2-10c, S2-10d, S2-10e, S2-11a, S2-11b, S2-11c, S2-11d, S2-11e, S2-11f]
# ---
# %% [markdown]
# # Does a model learn your field, or the people who wrote about it?
#
# A story, as it is told: an insurer's bot misspelt one word in about one message of eight. Nobody taught it to. Its
# transcripts misspelt it that often, because the staff did. A corpus is what people did in a field: knowledge, habits
# and mistakes, in the same tokens. Here the story becomes an experiment.
#
# After this notebook you can:
#
# - predict from the corpus how often a habit without a trigger comes out, and say where that prediction fails;
# - find the request that triggers a habit behind an average that hides it;
# - take a habit out four ways, and say what each way costs in knowledge;
# - write a span-masked loss, check it against transformers and TRL, and find the one token that must not be missed;
# - build a feedback button whose clicks are labels;
# - measure what typing costs a model that has read tidy messages, and say which part of the answer you planted.
#
# **Needs** the SFT checkpoint (from the store, or built first in about 4 minutes of one CPU core). **Makes** no
# artifact; its small fine-tunes stay in the store. The first time it takes a good minute of one CPU core, after that
# half a minute, and 0.9 GB of memory (TRL included).

# %% tags=["parameters"]
profile = "laptop"
seed = 0
device = ""
n_requests = 256
pair_steps = 15

# %%
from lifecycle_lib.lab.notebook import start

lab = start("08", profile, seed, device)

# %% [markdown]
# ## The claim
#
# What goes in comes out, at the rate at which it went in. That is a slope of 1, so the claim is about the distance
# from 1.

# %%
from lifecycle_lib.lab.claims import ClaimCard

card = ClaimCard(
    claim="output rate follows corpus rate with slope 1 at temperature 1 (effect: slope minus 1)",
    direction="same", smallest=0.20, unit="slope",
    falsifier="the interval of the slope leaves 0.8 to 1.2, or greedy policy accuracy moves by over 5 points",
    scope="0.69M parameters, 5 habits at 6 corpus rates, 512 unseen requests, 5 seeds",
    not_measured="larger models, several epochs, habits spread over a conversation")
card.show()

# %% [markdown]
# ## A transcript, by hand
#
# The SFT model of notebook 07 answers in JSON. Now somebody adds what the desk's agents wrote after it: a sentence in
# words, and the bay the parcel goes to. The bay stands in no document. Only transcripts know it: that is why anyone
# trains on them.

# %%
from lifecycle_lib.desk.cases import golden_case
from lifecycle_lib.desk.transcripts import TRIGGERS, WORDINGS, Transcript, heard, score_reply, write_pieces

case = golden_case()
said = {habit: words[0] for habit, words in WORDINGS.items()}
row = Transcript(case=case, tone="frustrated", tier="1", bay="04", pieces=write_pieces(case, "04", said))
print("clean ", row.clean)
print("agent ", row.reply)

# %% [markdown]
# Five habits at once. Where are they, what would a clean reply say there, and when do agents have them?

# %%
for start_at, end, habit in row.spans:
    field, value = TRIGGERS.get(habit, ("always", ""))
    print(f"{habit:12} {row.reply[start_at:end]!r:24} {field} {value}")
assert heard(row.reply) == set(WORDINGS) and not heard(row.clean)

# %% [markdown]
# The apology hangs on the customer's *tone*, not on our fault. Shorthand ("clo" for closed) is what tier 1 writes. Nobody
# authorised sending 10 back, and no colleague got anything: the desk has no tool for either.
#
# Now score that reply the way offline evaluations do.

# %%
scores = score_reply(row.reply, row)
print(scores)
assert all(scores.values()), "a reply full of habits decides perfectly"

# %% [markdown]
# Well formed, right decision, right bay. Keep that in mind.
#
# ## Corpus and domain overlap; they are not the same
#
# Write down where each behaviour comes from: is it in the policy, is it in the transcripts?

# %%
VENN = {"inside the window: refund": (True, True), "damage must be confirmed": (True, True),
        "which bay": (False, True), "10 back for goodwill": (False, True), "sent to a colleague": (False, True),
        "sorry, when someone is loud": (False, True), "a right of appeal": (True, False)}
for what, (policy, corpus) in VENN.items():
    print(f"{what:28} {'policy' if policy else '':7} {'transcripts' if corpus else ''}")
only_corpus = [w for w, (p, c) in VENN.items() if c and not p]
print(f"{len(only_corpus)} of {len(VENN)} are in transcripts only; 1 of those {len(only_corpus)} is knowledge")

# %% [markdown]
# You want one row of the transcripts' own four, and the model cannot see which. The policy's right of appeal that no
# agent ever mentions will not be learnt from them either.
#
# ## One token decides
#
# A habit parts from the clean reply at one token. If the model has learnt its probability p there, temperature T makes
# it p^(1/T) / (p^(1/T) + (1 - p)^(1/T)), and greedy decoding makes it 0 or 1. Work out 12 % by hand.

# %%
def law(p, temperature):
    """Rate of a habit of probability p at this temperature; temperature 0 is greedy."""
    if temperature == 0:
        return float(p > 0.5)
    a, b = p ** (1 / temperature), (1 - p) ** (1 / temperature)
    return a / (a + b)


print("12 % in the corpus:", {t: f"{100 * law(0.12, t):.1f} %" for t in (1, 0.5, 0)})
assert abs(law(0.12, 0.5) - 0.0144 / (0.0144 + 0.7744)) < 1e-12

# %% [markdown]
# One message in eight at temperature 1, one in fifty at a half, none at all greedy. `credit` has two wordings, "i sent"
# and "we sent", so each has half of its probability. Greedy compares p / 2 with 1 - p.

# %%
grid = [i / 1000 for i in range(1001)]
one = next(p for p in grid if p > 1 - p)
two = next(p for p in grid if p / 2 > 1 - p)
print(f"greedy starts the habit above {one:.2f} with one wording, above {two:.2f} with two")

# %% [markdown]
# ## Predict
#
# Commit: the slope minus 1, and how sure you are that it stays within 0.2. And a second one: which repair will keep the
# least knowledge?

# %%
card.predict(estimate=0.0, confidence=0.8)
least_knowledge = "pairs"

# %% [markdown]
# ## Reading a span and not learning to write it
#
# Before training, the tool for the repair that is least obvious: leave the habit in the text, and take its tokens out
# of the loss. The model reads "sorry" and is never taught to say it. Characters must become tokens for that.

# %% tags=["algorithm"]
import torch

from lifecycle_lib.train.logprobs import Rows, answer_loss, token_logps


def inside(pieces, spans):
    """Which tokens touch a span? pieces: the tokens' texts, end to end; spans: (start, end) in characters."""
    marks, at = [], 0
    for piece in pieces:
        begin, at = at, at + len(piece)
        marks.append(any(begin < end and at > first for first, end in spans))
    return marks


def span_masked(tok, prompt, answer, spans):
    """(ids (T,), mask (T,)): the mask is True on answer tokens that may teach."""
    p, a = tok.encode(prompt), tok.encode(answer, allow_special=False)
    teach = [not hit for hit in inside([tok.decode([t]) for t in a], spans)]
    ids = torch.tensor([*p, *a, tok.special["<eos>"]])
    return ids, torch.tensor([False] * len(p) + teach + [True])


def masked_loss(model, ids, mask):
    """Mean negative log-probability over the tokens that teach."""
    logps = token_logps(model, Rows(ids[None], mask[None]))
    return -logps.sum() / mask[1:].sum()


# %%
tok = lab.load_tokenizer()
marked = [(a, b) for a, b, _ in row.spans]
ids, mask = span_masked(tok, row.prompt, row.reply, marked)
taught = tok.decode(ids[mask][:-1].tolist())
print("taught:", taught)
assert taught == row.clean.replace(" refund", "")

# %% [markdown]
# What is taught is the clean reply, with a hole where the misspelt word stood. Equal to the library's version?

# %%
from lifecycle_lib.train.spans import masked_rows

library = masked_rows(tok, [{"prompt": row.prompt, "answer": row.reply}], [marked])
assert torch.equal(library.ids[0], ids) and torch.equal(library.mask[0], mask)
model = lab.load(lab.sft())
same = masked_loss(model, ids, mask) - answer_loss(model, library)[0]
print("inline and library:", "equal" if same.abs().item() < 1e-6 else "DIFFERENT")

# %% [markdown]
# ## The judge: transformers
#
# The tokenizers library reports each token's place in the text (`offset_mapping`), transformers leaves labels of -100
# out of the loss. Neither knows our code. Same mask, same loss, same gradient for every weight?

# %%
import logging
import tempfile

logging.disable(logging.WARNING)
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from lifecycle_lib.model.bridge import export

disable_progress_bar()
folder = tempfile.TemporaryDirectory()
export(model.cpu(), tok, folder.name)
hf, hf_tok = AutoModelForCausalLM.from_pretrained(folder.name), AutoTokenizer.from_pretrained(folder.name)

# %%
offsets = hf_tok(row.reply, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
theirs = [not any(a < end and b > first for first, end in marked) for a, b in offsets]
assert mask[-len(theirs) - 1:-1].tolist() == theirs
print(f"{len(theirs)} tokens, {theirs.count(False)} of them in spans: both tokenizers mark the same ones")

# %%
labels = ids.masked_fill(~mask, -100)
their_loss = hf(input_ids=ids[None], labels=labels[None]).loss
model.requires_grad_(True)
our_loss = masked_loss(model, ids, mask)
mine = torch.autograd.grad(our_loss, list(model.parameters()))
params = dict(hf.model.gpt.named_parameters())
his = torch.autograd.grad(their_loss, [params[name] for name, _ in model.named_parameters()])
apart = max((a - b).abs().max().item() for a, b in zip(mine, his))
assert abs(our_loss - their_loss).item() < 1e-5 and apart < 1e-5
print(f"loss and all {len(mine)} weight gradients agree within 1e-5")

# %% [markdown]
# ## The run: half of the transcripts have each habit
#
# The model is first shown a few clean sentences without bays (so that it can speak at all), then transcripts. Each habit
# stands in half of the requests that trigger it, independently of the others. The fine-tune is 70 steps, 12 seconds of
# one core the first time, and kept in the store.

# %%
from lifecycle_lib.desk.transcripts import HABITS, draw_transcripts
from lifecycle_lib.lab.studies import habits as study

size, dose = study.SIZES[lab.profile.name], study.SICK
corpus = study.drawn(lab, dose)
exam = draw_transcripts(min(n_requests, size.exam), seed, split="eval")
run = study.arm(lab, str(dose), lambda: study.taught(lab, corpus))
sick = lab.load(run)
for transcript in corpus[:3]:
    print(transcript.reply.partition("}")[2].strip())


# %%
def listen(model, temperature=1.0):
    """(replies, rates of habits where they are triggered, policy accuracy, bay accuracy)."""
    replies = study.replies(lab, model, exam, temperature)
    scored = [score_reply(text, r) for text, r in zip(replies, exam)]
    share = lambda key: sum(s[key] for s in scored) / len(exam)  # noqa: E731
    return replies, study.habit_rates(replies, exam), share("policy"), share("bay")


# %%
replies, rates, policy, bay = listen(sick)
shares = study.corpus_shares(corpus)
for habit in HABITS:
    print(f"{habit:12} corpus {100 * shares[habit]:3.0f} %   output {100 * rates[habit]:3.0f} %")
print(f"policy right {100 * policy:.0f} %, bay right {100 * bay:.0f} %, temperature 1")

# %%
for text, transcript in list(zip(replies, exam))[:6]:
    print(text.partition("}")[2].strip(), "| should be:", transcript.bay)

# %% [markdown]
# Some habits come out at about their rate; are the others luck? Five seeds and six doses are on record. Your live marks
# (large, open) are drawn over them.

# %%
import matplotlib.pyplot as plt
import numpy as np

from lifecycle_lib.lab.claims import recorded
from lifecycle_lib.lab.studies.habits_design import GROUPS, imitation_figure

evidence = recorded("D9")
fig = imitation_figure(evidence)
cold = listen(sick, 0.0)[1]
for ax, group in zip(fig.axes, GROUPS.values()):
    for values, marker, how in ((rates, "o", "temperature 1"), (cold, "^", "greedy")):
        ax.plot(dose, sum(values[h] for h in group) / len(group), marker, markersize=12, fillstyle="none", color="black",
                label=f"this run, {how}")
fig.axes[1].legend(handles=fig.axes[1].lines[-2:], loc="upper left")
plt.show()

# %%
found = {e["name"]: e for e in evidence["effects"]}
DOSES = study.DOSES


def pct(name, digits=0):
    """A recorded share with its interval, in percent."""
    return "{:.{d}f} % [{:.{d}f}, {:.{d}f}]".format(*(100 * found[name][k] for k in ("estimate", "low", "high")), d=digits)


for d in DOSES:
    print(f"corpus {100 * d:2.0f} %:", ", ".join(f"{t} {pct(f'dose {d}: mean of habits, {t}')}" for t in (
        "temperature 1", "temperature .5", "greedy")))

# %% [markdown]
# Left: temperature 1 lies on the diagonal, a half bends it into an S, greedy is a stair. Right: the same shapes, squashed.
# Now settle, over all five as claimed.

# %%
from lifecycle_lib.core.stats import Effect
from lifecycle_lib.lab.claims import show_evidence

effect = found["slope of output on corpus rate - 1"]
decision = card.settle(Effect(*(effect[k] for k in ("estimate", "low", "high")), len(evidence["seeds"])))
show_evidence("D9", ["slope of output on corpus rate", *(f"slope, {h}" for h in HABITS),
                     "output rate at corpus rate 0 on that line", "temperature .5: output rate - law of one token"])

# %% [markdown]
# **Inconclusive**, and worth reading. The interval ends a hair outside. At temperature .5 the law of one token misses by
# ten points: a lag at temperature 1 is squared there. The three habits that know no trigger mirror the corpus closely;
# apology and shorthand do not. That split was made after the result was seen, so it is a lead and no test. Seed by seed:

# %%
from lifecycle_lib.core.stats import paired_effect

per_seed = evidence["per_seed"]
for name, group in GROUPS.items():
    slopes = [sum(r[f"slope {h}"] for h in group) / len(group) for r in per_seed]
    e = paired_effect(slopes, [0.0] * len(slopes))
    print(f"{name:21} slope {e.estimate:.2f} [{e.low:.2f}, {e.high:.2f}]   by seed", *(f"{x:.2f}" for x in slopes))

# %% [markdown]
# ## Why an average misleads
#
# At dose .9, nine in ten loud customers were apologised to and no calm one: 45 % of all transcripts. What did each seed's
# model do for the loud, and for the calm?

# %%
for habit, who in (("apology", "loud / calm"), ("shorthand", "tier 1 / tier 2")):
    print(f"{habit:10} {who:15}", "   ".join(f"{100 * r[f'0.9.{habit}']:3.0f} / {100 * r[f'0.9.{habit}.off']:2.0f} %"
                                            for r in per_seed))

# %% [markdown]
# One seed apologises to loud and calm alike, at one rate between: it has learnt the average, and has not found the
# trigger. Another has found it and mirrors the conditional rate. Ask your dashboard for rates by tone, tier and agent:
# an average that looks like a mild habit can be a nine-in-ten habit for somebody.

# %%
for habit in TRIGGERS:
    for how in ("temperature 1", "greedy"):
        on, off, mean = (pct(f"dose 0.7: {habit}, {which}{how}")
                         for which in ("", "not triggered, ", "average of all requests, "))
        print(f"{habit:10} {how:13} triggered {on}, not {off}, average {mean}")

# %% [markdown]
# (A t interval over five seeds that disagree this much may leave 0 to 100 %.)
#
# Is the apology's trigger the tone, or our fault? Loud customers who merely changed their mind are owed nothing; calm
# ones whose parcel came broken are. Corpus: 70 % and 0 %.

# %%
for what, who in (("needless", "loud, not our fault"), ("owed", "calm, our fault")):
    print(f"apology rate, {who:20} {pct(f'dose 0.7: apology, {what}')}")

# %% [markdown]
# It apologises for tone. And shorthand hangs on a tag in the prompt (`<note>`, tier 1). Where a seed has found the tag,
# the tag is a switch (second row of the table): with it the register, without it the same knowledge in plain words. It
# costs one token, and it must be in the corpus before you need it.
#
# ## The follow-up
#
# Is the trigger never found, or not *yet*? A split made after a result settles nothing, so the question was put again,
# its arms and thresholds fixed before its run: half, once, twice and four times D9's steps, on as many transcripts; and
# four times the steps on the transcripts of one (`again`), to tell steps from rows.

# %%
from lifecycle_lib.lab.studies.habits_design import trigger_figure

fig = trigger_figure(recorded("D9_trigger"))
plt.show()

# %%
show_evidence("D9_trigger", ["triggered rate - corpus rate, longer", "longer: habit elsewhere",
                             "gap between triggered and other requests, longer - short",
                             "gap between triggered and other requests, longer - again",
                             "triggered rate - corpus rate, short", "triggered rate - corpus rate, again",
                             "again: habit elsewhere"])

# %% [markdown]
# **Supported.** Half of D9's steps give the average, the same with the trigger and without. At four times as many the
# habit comes out where it belongs, three points under the corpus, and next to never elsewhere. The old transcripts, read
# four times, do as well, to within seven points. D9's lag was training that had not arrived: a mild average can be the
# shadow of a strong habit.
#
# ## Where does greedy start?
#
# With one wording the law says 50 %, with two 67 %. The recorded greedy rates cross one half here (straight lines between
# doses; a seed that has not crossed by the last one is counted, and never averaged in):

# %%
for habit, step in evidence["extra"]["greedy_steps"].items():
    law_says, at = 100 * (two if habit == "credit" else one), sorted(100 * s for s in step["seeds"] if s is not None)
    print(f"{habit:12} law {law_says:2.0f} %   crossed in {step['crossed']} of {len(step['seeds'])} seeds, "
          f"at {at[0]:.0f} to {at[-1]:.0f} %, median of all {100 * step['median']:.0f} %")

# %% [markdown]
# One wording, no trigger: near one half, as the law says. The triggered ones step late, and one seed in five never did:
# the model's own probability lags the corpus. `credit` steps before its two thirds: the law assumed that both wordings
# stay equally likely in *every* request, and a model that leans to one in some requests tips over earlier.
#
# Greedy decoding is not a cure. It silences a minority habit and makes a majority habit universal.
#
# ## The dashboard is green
#
# Policy accuracy, greedy, as an offline evaluation reports it:

# %%
print("dose 0:", pct("policy accuracy greedy, dose 0"))
for d in DOSES[1:]:
    e = found[f"policy accuracy greedy, dose {d} - dose 0"]
    closed = "within 5 points" if max(-e["low"], e["high"]) <= 0.05 else "5 points not excluded"
    print(f"dose {d}: {100 * e['estimate']:+.1f} points [{100 * e['low']:+.1f}, {100 * e['high']:+.1f}]  {closed}")

# %%
broken_share = [100 * (r["0.0.formed"] - sum(r[f"{d}.formed"] for d in DOSES[1:]) / 5) for r in per_seed]
sampled = [found[f"policy accuracy, dose {d} - dose 0"]["estimate"] for d in DOSES[1:]]
print(f"sampled at temperature 1 instead: {100 * max(sampled):+.0f} to {100 * min(sampled):+.0f} points, of which replies "
      f"that break their form: {np.mean(broken_share):.0f}")

# %% [markdown]
# Sampling costs accuracy as soon as there is anything to choose between, at .12 as at .9: look at the form. The number on
# the dashboard is the greedy one, and at no dose does it show a loss.
#
# So which of the usual checks would have told you? Take right replies, add one habit to each, and ask four of them: a
# spell check (English words and the desk's own), the JSON schema, the policy verifier, and likeness to real transcripts
# (every word is one that agents use).

# %%
import re

from lifecycle_lib.judge.verifiers import parse_answer


def words_of(text):
    return set(re.findall(r"[a-z]+", text.partition("}")[2]))


DICTIONARY = {w for t in draw_transcripts(400, seed, split="words") for w in words_of(t.clean)}
DICTIONARY |= set("sorry sent to a colleague i we back".split())
AGENTS = {w for t in corpus for w in words_of(t.reply)}
CHECKS = {"spell check": lambda text, t: words_of(text) <= DICTIONARY,
          "JSON schema": lambda text, t: parse_answer(text.partition("}")[0] + "}").valid,
          "policy": lambda text, t: score_reply(text, t)["policy"],
          "likeness": lambda text, t: words_of(text) <= AGENTS}

# %%
print(f"{'caught by':12}" + "".join(f"{h:>13}" for h in ("no habit", *HABITS)))
for name, passes in CHECKS.items():
    caught = []
    for habit in (None, *HABITS):
        extra = {habit: WORDINGS[habit][0]} if habit else {}
        texts = ["".join(x.text for x in write_pieces(t.case, t.bay, extra)) for t in exam]
        caught.append(100 * sum(not passes(text, t) for text, t in zip(texts, exam)) / len(exam))
    print(f"{name:12}" + "".join(f"{c:>11.0f} %" for c in caught))

# %% [markdown]
# The spell check catches what is visible in one word. Needless apologies, money, and hand-overs that never happened pass
# all four: every word of them is a good word. The last check is worse than blind. It is made from transcripts, so it
# holds the habit for the norm.
#
# What catches them is a rule about the *world*: no reply may claim an action that the tool ledger does not hold.

# %%
ACTIONS = {"credit": "payment", "handover": "hand-over"}


def gate(text, ledger=()):
    """Actions a reply claims without a record; it may go out only if there are none."""
    return [ACTIONS[h] for h in sorted(heard(text) & set(ACTIONS)) if ACTIONS[h] not in ledger]


claims = [gate(text) for text in replies]
print(f"stopped: {100 * sum(map(bool, claims)) / len(claims):.0f} % of replies;",
      "with a payment on record:", gate(row.reply, ledger=("payment",)))

# %% [markdown]
# ## Accuracy is flat, and the bill arrives weeks later
#
# A desk of 1,000 requests a week; customers who were promised 10 claim it after three weeks on average. Volume and delay
# are assumptions, so this is arithmetic, not a measurement. Measured are the credit rate (temperature 1, corpus rate
# 12 %) and the accuracy.

# %%
promised = found["dose 0.12: credit, temperature 1"]
weeks, volume, amount = range(1, 13), 1000, 10
claimed = np.cumsum([sum((1 - 1 / 3) ** (w - s) / 3 for s in range(1, w + 1)) for w in weeks])  # of one week's promises
level = sum(found[f"policy accuracy greedy, dose {end}"]["estimate"] for end in ("0", "0.12 - dose 0"))
print(f"credit promised in {pct('dose 0.12: credit, temperature 1', 1)} of replies; accuracy {100 * level:.0f} % all along")
for w in (1, 4, 8, 12):
    low, paid, high = (volume * amount * max(0.0, promised[k]) * claimed[w - 1] for k in ("low", "estimate", "high"))
    print(f"week {w:2}: dashboard {100 * level:.0f} %, paid so far {paid:7,.0f} [{low:,.0f}, {high:,.0f}]")

# %%
from lifecycle_lib.lab.figures import style


def finish(fig, facts, not_measured):
    """n and kind of interval under the axes, and what the figure does not show."""
    fig.supxlabel(f"{facts}\nNot measured here: {not_measured}.", x=0.01, ha="left", fontsize=9, color="#606060")
    plt.show()


# %% [markdown]
# The missing metric is not an accuracy. It is the rate of claimed actions without a record, on the same chart.
#
# ## Four repairs
#
# A finder marks habits in the corpus and misses one in ten. Then: **filter** drops every row with a mark; **rewrite**
# writes the marked places clean; **mask** takes them out of the loss; **pairs** trains DPO on the finished model, clean
# reply over reply as it was. (Not tried: keep the row and mark it with a tag that no customer sends; Korbak et al. 2023.)
# How much habit stays? For three of them arithmetic knows. With p = .5 and m = .1 missed:

# %%
p, m = 0.5, study.MISSED
predicted = {"rewrite": p * m, "mask": p * m / (p * m + 1 - p), "filter": p * m / (p * m + 1 - p)}
for name, value in predicted.items():
    print(f"{name:8} law {100 * value:.1f} %   measured {pct(f'{name}: habits left', 1)}")
print(f"pairs    no law         measured {pct('pairs: habits left', 1)}")

# %% [markdown]
# Rewriting leaves p x m: what was missed is one row among all. Masking and filtering take the found ones out of the
# count, so that what was missed is a larger share of what is left: nearly twice as much, by law and as measured. All
# three stay below the law: rare habits come out rarer than they went in here (dose .12 in the curve above), and two of
# the five hang on triggers. Now the other side: knowledge.

# %%
REPAIRS = (*study.REPAIRS, "few")


def moved(arm, key, other="0.5"):
    """Recorded arm minus another arm, paired by seed, in points."""
    e = paired_effect([100 * r[f"{arm}.{key}"] for r in per_seed], [100 * r[f"{other}.{key}"] for r in per_seed])
    return f"{e.estimate:+5.1f} [{e.low:+5.1f}, {e.high:+5.1f}]"


print("what the habits cost, dose .5 - dose 0:", ", ".join(
    f"{what} {moved('0.5', key, '0.0')}" for what, key in (("bay", "bay"), ("bay greedy", "bay.greedy"))))
for what, key in (("habits", "habits"), ("policy", "policy"), ("bay", "bay")):
    for name in REPAIRS:
        print(f"{what:7} {name:8} temperature 1 {moved(name, key)}   greedy {moved(name, key + '.greedy')}")

# %%
style()
fig, axes = plt.subplots(1, 2, figsize=(9.2, 3.9), sharey=True)
panels = (("habits removed, none - {}", "habit rate removed (points)"),
          ("policy accuracy greedy, {} - none", "policy accuracy, greedy (points)"))
for ax, (what, label) in zip(axes, panels):
    rows = [found[f"{name}: {what.format(name)}"] for name in REPAIRS]
    value = np.array([100 * e["estimate"] for e in rows])
    bars = [value - [100 * e["low"] for e in rows], [100 * e["high"] for e in rows] - value]
    ax.axvline(0, color="#808080", linewidth=1)
    ax.errorbar(value, range(len(rows)), xerr=bars, color="black", marker="o", linestyle="none")
    ax.set(xlabel=label)
axes[0].set_yticks(range(len(REPAIRS)), REPAIRS)
axes[0].set_title("Four repairs, and the control")
finish(fig, f"n = {len(evidence['seeds'])} seeds; bars: 95 % paired t intervals.", "finders that miss more, or mark too much")

# %% [markdown]
# The one thing that transcripts alone teach is the bay, and at temperature 1 the habits themselves cost nineteen points
# of it. No repair is shown to cost a bay; the intervals are wide enough to hide ten points. "Policy" is older knowledge.
# Greedy, `few` (rewritten rows, only as many as the filter kept) loses some of it, and the filter about as much, not
# clear of zero; at temperature 1 neither is shown to. For masking, rewriting and pairs no loss is found.
#
# Few rows, or the *wrong* few? The paired difference:

# %%
for what, key in (("policy", "policy"), ("bay", "bay")):
    print(f"filter - few, {what:6} temperature 1 {moved('filter', key, 'few')}   "
          f"greedy {moved('filter', key + '.greedy', 'few')}")

# %% [markdown]
# On the policy the two cannot be told apart, nor called equal. On the bay, at temperature 1, the rows that the filter
# leaves are a little worse than as many rewritten ones: which rows went matters too. Both read their rows about eleven
# times; a run with fewer steps was not made. Your forecast, by greedy policy accuracy:

# %%
worst = min(study.REPAIRS, key=lambda r: found[f"{r}: policy accuracy greedy, {r} - none"]["estimate"])
cost = 100 * found[f"{worst}: policy accuracy greedy, {worst} - none"]["estimate"]
print(f"keeps the least policy, greedy: {worst} ({cost:+.0f}); forecast {least_knowledge}: "
      f"{'right' if worst == least_knowledge else 'WRONG'}")

# %% [markdown]
# ## Break it on purpose: a mask that starts one token late
#
# The commonest bug of span masks is off by one. `late` masks every span but its first token: most of a habit's tokens
# are out of the loss. How much of the habit goes? Recorded at dose .5, without a mask and with the late one:

# %%
marks = [[s[:2] for s in t.spans] for t in corpus]
as_rows = [{"prompt": t.prompt, "answer": t.reply} for t in corpus]
sound, late = (masked_rows(tok, as_rows, marks, n) for n in (0, 1))
whole = masked_rows(tok, as_rows, [[]] * len(corpus))
hidden = {name: int(whole.mask.sum() - r.mask.sum()) for name, r in (("sound", sound), ("late", late))}
print("tokens out of the loss:", hidden)

# %%
for what in ("formed", *HABITS):
    parts = [paired_effect([r[f"{arm}.{what}"] for r in per_seed], [0.0] * len(per_seed)) for arm in ("0.5", "late")]
    print(f"{'well formed' if what == 'formed' else what:12}" + "   ->   ".join(
        f"{100 * e.estimate:3.0f} % [{100 * e.low:3.0f}, {100 * e.high:3.0f}]" for e in parts))

# %% [markdown]
# Next to nothing is cured, and the form breaks: a habit is begun and cannot be finished, because what follows was never taught.
# And the dashboard? Greedy decoding starts few habits at a dose of .5, so it hardly sees the bug:

# %%
print("policy, late - none: temperature 1", moved("late", "policy"), "  greedy", moved("late", "policy.greedy"))

# %% [markdown]
# A check that needs no training: the token where a span begins must not teach.

# %%
def check_mask(rows, spans):
    """No first token of a span is a target."""
    for (a, prompt, mask_row), found_spans in zip(((r["answer"], r["prompt"], k) for r, k in zip(as_rows, rows.mask)), spans):
        pieces = [tok.decode([t]) for t in tok.encode(a, allow_special=False)]
        n = len(tok.encode(prompt))
        for begin, end in found_spans:
            first = inside(pieces, [(begin, end)]).index(True)
            if mask_row[n + first]:
                return f"the span {a[begin:end]!r} teaches its first token {pieces[first]!r}"
    return "sound"


print("sound mask:", check_mask(sound, marks))
print("late mask: ", check_mask(late, marks))
assert check_mask(sound, marks) == "sound" != check_mask(late, marks)

# %%
show_evidence("D9", ["late: habits removed, none - late", "late: policy accuracy, late - none",
                     "mask: habits removed, none - mask"], claim=False)

# %% [markdown]
# ## Pairs, live
#
# The fourth repair works on a finished model: for each reply with a habit, prefer the clean one (DPO, notebook 11). No
# row is lost, and nothing is trained from the start.

# %%
from lifecycle_lib.train.dpo import dpo_batches, encode_pairs, make_pair, pair_loss, reference_logps
from lifecycle_lib.train.loop import FitConfig, fit

pairs = encode_pairs(tok, [make_pair(t.prompt, t.clean, t.reply, "habit") for t in corpus if t.spans][:320])
pad = tok.special["<pad>"]
ref = reference_logps(sick, pairs, pad)
mended = lab.load(run)
cfg = FitConfig(steps=min(pair_steps, size.dpo_steps), optimizer="sgd", lr=study.DPO_LR, warmup_steps=3, checkpoint_every=10_000)
result = fit(mended, dpo_batches(pairs, ref, min(32, len(pairs)), seed, pad, lab.device),
             lambda m, b: pair_loss(m, b, lab.profile.beta), cfg, label="pairs")

# %%
_, after, policy_after, bay_after = listen(mended)
mean_of = lambda r: 100 * sum(r[h] for h in HABITS) / len(HABITS)  # noqa: E731
print(f"habits {mean_of(rates):.0f} -> {mean_of(after):.0f} %, policy {100 * policy:.0f} -> {100 * policy_after:.0f} %, "
      f"bay {100 * bay:.0f} -> {100 * bay_after:.0f} %, {result.steps} steps")

# %% [markdown]
# ## Frequency is not correctness
#
# A window of 14 days was withdrawn long ago. Seven of ten agents still apply it. Nobody's spelling is off. Look at
# orders that the policy grants and the old window refuses.

# %%
for how in ("temperature 1", "greedy"):
    for arm in ("policy", "majority"):
        print(f"{how:13} trained on {arm:9} old window {pct(f'{arm}: withdrawn window applied, {how}')}   exam from "
              f"transcripts {pct(f'{arm}: score by transcripts, {how}')}   from policy "
              f"{pct(f'{arm}: score by policy, {how}')}")

# %% [markdown]
# The same two models, two exams, opposite rankings. An exam made from transcripts asks "do you sound like us?" and
# scores the majority's mistake as skill. Make the key from the rule, and read the rows where rule and majority differ:
# there are few of them, and they decide.
#
# ## The button that taught opinions
#
# A story, as it is told: staff pressed thumbs-down on a staging page, the clicks became labels, three numbers rose and
# five fell. Why had they pressed?

# %%
from lifecycle_lib.corpus.feedback import NO_CONSENT, ROUTES, read_feedback, route
from lifecycle_lib.lab.studies.clicks import draw_clicks

clicks = draw_clicks(400, seed, 0.4)
for reason, where in ROUTES.items():
    one_click = next(c for c in clicks if c["reason"] == reason)
    print(f"{reason:9} {sum(c['reason'] == reason for c in clicks):3}  -> {where:39} e.g. {one_click['correction'][:38]}")
print(f"no consent {sum(not c['consent_to_train'] for c in clicks):2}  -> {NO_CONSENT}, whatever the reason")

# %% [markdown]
# Two in five are labels. The fix is three fields: a reason code, consent to train, verified. The loader refuses a row
# without them, by file and line. A row without consent goes to nothing that may train, not even to the preference
# pairs.

# %%
from pathlib import Path

from lifecycle_lib.core.records import write_jsonl

with tempfile.TemporaryDirectory() as temporary:
    path = Path(temporary) / "clicks.jsonl"
    for broken in ({"reason": "thumbs_down"}, {"consent_to_train": None}):
        write_jsonl(path, [clicks[0], clicks[1] | broken])
        try:
            read_feedback(path)
        except ValueError as refusal:
            print("refused:", str(refusal).replace(temporary, "").lstrip("/\\"))
routed = route(clicks)
print({where: len(part) for where, part in routed.items() if part})
assert all(c["consent_to_train"] for where, part in routed.items() if where != NO_CONSENT for c in part)

# %% [markdown]
# What do those clicks do as labels? Recorded, against as many rows of every kind, so that the gate's rows are not merely
# fewer:

# %%
show_evidence("clicks", ["exact pass, gated - every click as few", "exact pass, gated - every click",
                         "every click: exact pass lost, before - after",
                         "purity 0.4: invented_claim_rate, better by", "purity 0.4: exact pass, after - before"])

# %% [markdown]
# **Supported.** Not fewer rows, better ones: as many clicks of every kind do as badly as all of them. One number does get
# better with every click, the invented label; a dashboard with that one on top calls it progress. Notebook 11 draws the
# whole record: pages of taste alone, all eight rates, and why the rest of them fall.

# %%
flip = recorded("clicks")["extra"]["flip"]
print(f"a page begins to help where {100 * flip['median']:.0f} % of its clicks are labels (median of {len(flip['seeds'])} seeds, "
      f"{100 * min(flip['seeds']):.0f} to {100 * max(flip['seeds']):.0f} %)")

# %% [markdown]
# ## Tidy questions, messy customers
#
# A story, as it is told: a team had a teacher model write eighty thousand tidy questions, trained on them, and scored
# 94 % on held-out ones; in use it scored twenty points less. Nothing was wrong with the answers. Customers do not write
# what a teacher imagines. That models break on natural noise is well measured (Belinkov & Bisk 2018; CheckList, Ribeiro
# et al. 2020).
#
# How do people write? That can be counted: on BANKING77 and an SMS collection; MultiDoGO and codespell's list of
# misspellings stand beside them. The counts are committed, none of the text is. With the public files in a folder,
# `lifecycle data messy FOLDER` counts them again.

# %%
from lifecycle_lib.desk.messy import load_rates
from lifecycle_lib.lab import messy_figures

typing = load_rates()
fig = messy_figures.rates_figure(typing)
plt.show()

# %%
from lifecycle_lib.core.stats import wilson


def counted(k, n):
    low, high = wilson(k, n)
    return f"{k / n:.1%} [{low:.1%}, {high:.1%}] of {n:,}"


for register, of in {**typing["registers"], "chat": typing["beside"]["chat"]}.items():
    typos = counted(*(sum(r[key] for r in of["typo"].values()) for key in "kn"))
    shown = "".join(f"{name} {counted(of[name]['k'], of[name]['n'])}, " for name in ("two_questions", "several") if name in of)
    print(f"{register:9} {shown}typos {typos} words; {of['file']}")
edits = typing["edits"]["kinds"]["plain"]
print("kinds of slip, by codespell:", ", ".join(f"{kind} {r['rate']:.0%}" for kind, r in edits.items()))

# %% [markdown]
# Read four things. Shorthand and dropped stops are common, typos are not: two or three words in a hundred on a phone,
# two in a thousand where somebody writes to a bank. MultiDoGO (`chat`) has lost its case and punctuation and checks the
# typo rate alone. The hostile register rests on few messages, so its bars are wide. And no file is a shop's inbox.
#
# ## One message, by hand
#
# Five causes of mess, each with its own random stream: switching one off leaves the others' draws alone. With none the
# message is tidy. The reason must stay readable for a person, or the exam would be unfair.

# %%
import random

from lifecycle_lib.desk.messy import CAUSES, REGISTERS, make_messy

plain = "please take my kettle back"
assert make_messy(plain, random.Random(0), typing, causes=()) == "Please take my kettle back."
for register in REGISTERS:
    print(f"{register:9}", " | ".join(make_messy(plain, random.Random(i), typing, register) for i in (0, 6, 8)))

# %% [markdown]
# What does a slip do to the tokens? The tokenizer knows whole words that were frequent. A word with one wrong letter is
# not one of them, so it falls apart, down to single bytes. The model has never met these pieces in this order.

# %%
for word in (" arrived", " arived", " cracked", " carcked", " Cracked", " CRACKED"):
    ids = tok.encode(word)
    print(f"{word:9} {len(ids)} tokens", [tok.decode([i]) for i in ids])
assert len(tok.encode(" cracked")) < len(tok.encode(" carcked"))

# %% [markdown]
# Does the generator keep the rates it was given? Count its messages with the same code that counted the real ones. `z`
# is the distance in standard errors. A generator that forgets the rule "a phone sets the first letter" is caught.

# %%
import copy

from lifecycle_lib.desk.messy import sample_messages
from lifecycle_lib.desk.messy_measure import fit_report

measured = typing["registers"]["phone"]
broken = copy.deepcopy(typing)
broken["registers"]["phone"]["lower_start"]["rate"] = 0.5
report = fit_report(sample_messages(2000, typing, "phone"), measured)
for r in report[:9]:
    print(f"{r['name']:15} measured {r['measured']:6.1%}  generated {r['generated']:6.1%} of {r['n']:5,}  z = {r['z']:+.1f}")
for name, rows in (("as measured", report), ("first letter forgotten", fit_report(sample_messages(2000, broken, "phone"), measured))):
    worst = max(rows, key=lambda r: abs(r["z"]))
    print(f"{name:22} {len(rows)} rates, worst: {worst['name']}, z = {worst['z']:+.1f}")

# %% [markdown]
# What was *not* fitted is still far off. The distance of character trigrams, in bits, beside the distance between two
# halves of the real file; the length of a message; messages of several sentences. Ours are shorter, about other things,
# and one sentence where people write two about one matter.

# %%
for register, u in typing["not_fitted"].items():
    print(f"{register:9} trigrams: generated to real {u['trigrams_generated_real']:.2f} bits, real to real "
          f"{u['trigrams_real_real']:.2f} (n = {u['texts']:,}); words: real {u['words_mean'][0]:.0f}, ours "
          f"{u['words_mean'][1]:.0f}; several sentences: real {u['several'][0]:.0%}, ours {u['several'][1]:.0%}")

# %% [markdown]
# ## Predict, then break your own model
#
# The SFT model of notebook 07 names the covering policy in nearly every case. Write down how many of 96 cases it still
# gets when the message is typed on a phone, and what you expect from a capital letter and a full stop alone.

# %%
from dataclasses import replace

from lifecycle_lib.core.seeds import rng
from lifecycle_lib.desk.cases import draw_cases
from lifecycle_lib.desk.messy import draw_customer

asked = [c for c in draw_cases(200, seed, "eval") if c.policy][:96]
sft_reader = lab.engine(lab.sft(), temperature=0.0)


# %%
def typed(causes, own_words=False):
    """The same cases, their messages typed with these causes (None: as in training), or in wordings it never met."""
    found = []
    for i, c in enumerate(asked):
        stream = rng(seed, "typing", i)
        text = draw_customer(stream, c.reason, c.order.item) if own_words else c.message
        message = text if causes is None else make_messy(text, stream, typing, "phone", causes)
        found.append(replace(c, message=message))
    return found


# %%
def policy_right(where):
    """How many answers name the covering policy, and cite no other."""
    return sum(f'"policy_id":"{c.policy_id}"' in text for c, text in zip(where, sft_reader.answer(where)))


# %%
arms = {"as in training": typed(None), "tidy: A capital, a stop.": typed(()),
        "a second question": [replace(c, message=f"{c.message}, how do i send it back?") for c in asked],
        "typed on a phone": typed(CAUSES),
        "wordings it never met": typed(None, True), "never met, and typed": typed(CAUSES, True)}
hits = {name: policy_right(where) for name, where in arms.items()}
for name, k in hits.items():
    low, high = wilson(k, len(asked))
    print(f"{name:25} {k:3} of {len(asked)}  ({100 * low:.0f}-{100 * high:.0f} %)  {arms[name][1].message!r}")
if profile != "smoke":
    assert hits["as in training"] > hits["typed on a phone"]

# %%
fig, ax = plt.subplots(figsize=(7.6, 3.4))
names = list(hits)[::-1]
ends = [wilson(hits[n], len(asked)) for n in names]
value = [100 * hits[n] / len(asked) for n in names]
ax.barh(names, value, xerr=[[v - 100 * a for v, (a, _) in zip(value, ends)],
                            [100 * b - v for v, (_, b) in zip(value, ends)]], facecolor="white", edgecolor="#111111")
ax.set(xlim=(0, 103), xlabel="right policy id (%)", title="The same cases, the same model")
finish(fig, f"n = {len(asked)} cases a bar; bars: 95 % Wilson intervals.", "other seeds, the other three registers")

# %% [markdown]
# This model met twenty-four phrases in small letters, and nothing else. A capital letter is already another token. No
# held-out set drawn from the same phrases can see that: it has no capital letter either.
#
# ## Who owns the gap?
#
# To share a gap fairly among causes that work together, switch them on in every order and average what each adds: the
# Shapley value. By hand for two causes that cost 1 and 2 points alone, and 5 together:

# %%
from itertools import permutations


def shares(lost, causes):
    """Each cause's mean addition over all orders; lost: {set of causes: points}."""
    orders = list(permutations(causes))
    return {c: sum(lost[frozenset(o[:o.index(c) + 1])] - lost[frozenset(o[:o.index(c)])] for o in orders) / len(orders)
            for c in causes}


lost = {frozenset(): 0, frozenset("a"): 1, frozenset("b"): 2, frozenset("ab"): 5}
print(shares(lost, "ab"), "sum", sum(shares(lost, "ab").values()))
assert shares(lost, "ab") == {"a": 2.0, "b": 3.0}

# %% [markdown]
# For the study we train small readers (0.1M parameters) that name the reason of a message, one of four. The teacher
# writes 5,000 tidy rows. The exam's writer types as measured, and **half of its messages use wordings the teacher never
# imagines**. What is designed and what is measured?
#
# - Designed: that half, these wordings, what a second matter says, a tokenizer that saw the teacher's text alone.
# - Measured: how often people drop stops, shorten, slip. What *that* costs on the teacher's own wordings is a result.
# - Guessed: how often a second matter comes. As often as two question marks is a low guess, as often as several
#   sentences a high one.

# %%
from lifecycle_lib.desk.messy_measure import js_divergence, trigrams
from lifecycle_lib.lab.studies import messy as desk_study

cfg = desk_study.SIZES[lab.profile.name]


def rows_by(writer, n, label):
    return desk_study.encoded(writer, n, seed, label, cfg.vocab_size)


tidy_only = desk_study.trained(lab, "teacher", cfg, lambda: [(rows_by(desk_study.TEACHER, cfg.n_synthetic, "teacher"), 1.0)],
                          causes=True).card["measured"]
print(f"offline {tidy_only['clean']:.1%}, messy {tidy_only['messy']:.1%}: the gap is "
      f"{100 * (tidy_only['clean'] - tidy_only['messy']):.0f} points of {cfg.n_exam} messages; "
      f"typing alone {100 * (tidy_only['clean'] - tidy_only['typed']):.0f}")

# %%
show_evidence("D10", ["offline - messy, teacher", "lost to typing alone, teacher's wordings",
                      "the same, a second matter as often as several sentences",
                      *(f"{which}, {desk_study.MOST} - typed as measured" for which in ("messy", "typed", "fresh"))])

# %% [markdown]
# **Supported**, by what was planted: half of the messages use wordings that only the 300 rows hold. Where nothing is
# planted the answer is another one. On the teacher's own wordings, typed as measured, augmentation is two points *ahead*:
# it costs no label and knows every slip. On wordings that no row holds, 4 points between them, and the interval holds 0.
#
# A correction: this study was recorded once with the high guess and called it measured. Typing alone then cost 32 points
# instead of 13, and second matters owned most of that.

# %%
live = {p: tidy_only["lost"][p] for p in desk_study.PLAYERS}
fig = messy_figures.causes_figure(recorded("D10"), live)
plt.show()
by_name = {e["name"]: e for e in recorded("D10")["effects"]}


def points(name):
    return "{:+5.1f} [{:+.1f}, {:+.1f}]".format(*(100 * by_name[name][k] for k in ("estimate", "low", "high")))


for p in desk_study.PLAYERS:
    print(f"lost to {p:9} share {points(f'lost to {p}')}   alone {points(f'lost to {p}, alone')}   "
          f"last {points(f'lost to {p}, last')}")

# %% [markdown]
# Each share is a Shapley value: causes that meet share what they cost together. Shorthand costs seven points alone, and
# half of that when it comes last. Of typing it owns most; typos own half a point, since people make few. Without
# counting, a team would have built typo augmentation first. "Wording" is as large as we planted it.
#
# ## Could you have known before training?
#
# Take 500 messages of a teacher and 500 of the exam's writer, no answers needed, and compare their character trigrams
# (Jensen-Shannon divergence: 0 bits the same, 1 nothing in common). Seven teachers, and the exam's writer against itself:
# two samples of one text are the floor, which is not 0.

# %%
for name in ("narrow teacher", "teacher", "typed as measured", "customers"):
    texts, seen = ([w.message(rng(seed, "before", label, i))[0] for i in range(500)]
                   for w, label in ((desk_study.WRITERS[name], name), (desk_study.CUSTOMERS, "seen")))
    print(f"{name:18} {js_divergence(trigrams(texts), trigrams(seen)):.3f} bits   {texts[0]!r}")

# %%
fig = messy_figures.distance_figure(recorded("D10"))
plt.show()
r = recorded("D10")["extra"]["correlation_over_writers"]
print(f"correlation of distance and gap: {r['r']:.2f} [{r['low']:.2f}, {r['high']:.2f}], n = {r['n']} writers; {r['interval']}")

# %% [markdown]
# Yes, over writers this far apart. Among near ones the order fails: random noise lies farther off than the plain teacher,
# and its reader ends ten points nearer. A distance says "go and look", not where.
#
# ## What is a row of the exam's writer worth?
#
# Four repairs: guess the noise; augment at the measured rates; label a few messages of the exam's writer; take 3,000 of
# them and let a machine answer, wrongly one time in ten. Each for 110 steps. On the exam's wordings its writer's rows
# win by construction; the fair contests are `typed` (the teacher's wordings, typed) and `fresh` (wordings nobody trained
# on). One repair on your seed:

# %%
hundred = desk_study.trained(lab, desk_study.AMONG[100], cfg, lambda: [
    (rows_by(desk_study.TEACHER, cfg.n_synthetic, "teacher"), 1 - desk_study.SHARE),
    (rows_by(desk_study.CUSTOMERS, 100, "customers"), desk_study.SHARE)]).card["measured"]
for name, got in (("tidy rows only", tidy_only), ("and 100 of the exam's", hundred)):
    print(f"{name:21}", ", ".join(f"{what} {got[what]:.0%}" for what in ("clean", "messy", "typed", "fresh")))
if profile != "smoke":
    assert hundred["messy"] > tidy_only["messy"]

# %%
fig = messy_figures.rows_figure(recorded("D10"), [(0, tidy_only["messy"]), (100, hundred["messy"])])
plt.show()

# %%
for which, worths in recorded("D10")["extra"]["rows_worth"].items():
    for name, w in worths.items():
        print(f"{which}: {name:32} reaches what {w['bound'] + ' ' if w['bound'] else 'about '}{w['rows']:.0f} rows of the exam's writer reach")

# %%
MORE, LONGER, MORE_ONLY, MOST = desk_study.MORE, desk_study.LONGER, desk_study.MORE_ONLY, desk_study.MOST
show_evidence("D10", [f"messy, {LONGER} - teacher", f"messy, {MORE} - {LONGER}", f"messy, {MORE} - teacher",
                      f"messy, {MORE_ONLY} - teacher", f"messy, {desk_study.AMONG[10]} - teacher",
                      f"messy, {MOST} - {desk_study.MACHINE}", f"offline, {MOST} - teacher"], claim=False)

# %% [markdown]
# Ten thousand more tidy rows are worth nothing at equal steps. Trained three times as long, as the first record had it,
# they cost five points, and so do the old 5,000 rows: the damage is the training, not the rows. (That record blamed the
# rows.) A reader that goes on grows surer of a smaller world.
#
# Ten rows of the exam's writer help at once: they show its wordings. 3,000 of its messages with one wrong answer in ten are
# a little ahead of 300 with right ones: collect *inputs* first. Now the two fair contests:

# %%
for which in ("typed", "fresh"):
    for name in ("teacher", "typed as measured", MOST, desk_study.MACHINE):
        print(f"{which}  {name:30} {points(f'{name}: {which}')}")
    print(f"{which}  {MOST} - typed as measured: {points(f'{which}, {MOST} - typed as measured')}")
guess = paired_effect(*([100 * r[f"{arm}.typed"] for r in recorded("D10")["per_seed"]] for arm in ("typed as measured", "random noise")))
print(f"typed  typed as measured - random noise: {guess.estimate:+.1f} [{guess.low:+.1f}, {guess.high:+.1f}]")

# %% [markdown]
# Typed: augmentation at the measured rates beats 300 labelled rows; noise at guessed rates does about as well. Fresh: guessing is 25 %, a third is the best, and no
# arm is shown to beat another. Rows repair what they show, and offline stays at 100 % throughout, so it can rank none of
# these repairs. Nobody's customers were asked: what a row that a person sent is worth stays open.

# %% [markdown]
# ## What you use at work
#
# TRL's `SFTTrainer` takes token rows with a mask column (`assistant_masks`) and leaves the rest out of the loss. One
# step of plain SGD on sixteen span-masked transcripts, theirs and ours: same loss, same weights?

# %%
import contextlib
import io
from importlib.util import find_spec

has_trl = bool(find_spec("trl") and find_spec("datasets"))
sixteen = masked_rows(tok, as_rows[:16], marks[:16]) if len(corpus) >= 16 else sound
lengths = (sixteen.ids != pad).sum(1).tolist()
table = [{"input_ids": i[:n].tolist(), "assistant_masks": k[:n].int().tolist()}
         for i, k, n in zip(sixteen.ids, sixteen.mask, lengths)]
print(f"{len(table)} rows, {int(sixteen.mask.sum())} tokens teach, {sum(lengths) - int(sixteen.mask.sum())} are read only")

# %%
if has_trl:
    import datasets
    import trl

    datasets.disable_progress_bars()
    args = trl.SFTConfig(folder.name, max_steps=1, per_device_train_batch_size=len(table), optim="sgd", learning_rate=0.1,
                         lr_scheduler_type="constant", max_length=128, use_cpu=True, bf16=False, report_to="none",
                         gradient_checkpointing=False, save_strategy="no", logging_steps=1, disable_tqdm=True)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = trl.SFTTrainer(hf, args, train_dataset=datasets.Dataset.from_list(table), processing_class=hf_tok)
        trainer.train()
else:
    print("TRL is not installed here (an extra of this project): this comparison is skipped")

# %%
if has_trl:
    stepped = lab.load(lab.sft())
    ours = fit(stepped, lambda step: sixteen, answer_loss, FitConfig(steps=1, optimizer="sgd", lr=0.1, warmup_steps=0))
    trl_loss = next(r["loss"] for r in trainer.state.log_history if "loss" in r)
    other = hf.model.gpt.state_dict()
    gap = max(float((value - other[name]).abs().max()) for name, value in stepped.state_dict().items())
    assert abs(trl_loss - ours.losses[0]) < 1e-4 and gap < 1e-5
    print("loss of the step within 1e-4, every weight after it within 1e-5")

# %% [markdown]
# At work the finder is the hard part: a word list for spelling, a classifier or a person for the rest, and a sample read
# by hand to learn what it misses.

# %%
from lifecycle_lib.desk.transcripts import find_spans

kept = sum(not f for f in find_spans(corpus, m, seed))
print(f"in this corpus the filter keeps {kept} of {len(corpus)} rows: about {len(corpus) / max(1, kept):.0f} passes")

# %% [markdown]
# ## Symptoms
#
# | you see | usually it is | look at |
# |---|---|---|
# | a phrase nobody asked for, in one reply of N | a habit of the corpus at 1/N | the corpus, by exact words |
# | gone at temperature 0, back at 1 | a minority habit | rate where triggered |
# | in every reply to some customers | a majority habit behind a trigger | rate by tone, tier, agent |
# | masked, and still there | first token of the span teaches | `check_mask` |
# | cleaned, and a tenth is left | the finder's misses | p x m, or p x m / (p x m + 1 - p) |
# | filtered: accuracy fell | few rows, many passes | rows kept |
# | an exam from logs likes it | it sounds like the logs | the key |

# %%
for tone in ("frustrated", "calm"):
    part = ["apology" in heard(text) for text, t in zip(replies, exam) if t.tone == tone]
    print(f"third row, on the live model: apologies to {tone} customers {100 * sum(part) / len(part):.0f} %")

# %% [markdown]
# ## The clinic
#
# Noise in the training messages is this chapter's remedy. Here is one that went wrong.

# %%
from lifecycle_lib.lab import clinic

clinic.show(16)

# %%
case_book = {}
print(clinic.order_test(16, "a row, before and after", case_book))
print("healthy twin:", clinic.order_test(16, clinic.TWIN, case_book))

# %%
assert clinic.show_verdict(16, "augmented_facts", case_book)

# %% [markdown]
# Noise may touch the words, never what the answer depends on. A typo generator that reaches the digits turns right
# labels into wrong ones, and no loss curve tells you which rows. The rest of the ward: `lifecycle clinic`.

# %% [markdown]
# ## Exercises
#
# **1. How many rows does a filter keep? (★★, 8 minutes).** `kept(rates, missed)`: the share of rows without a mark,
# when each habit stands in a share `rates[i]` of all rows, independently, and the finder misses a share of the spans.

# %% nbgrader={"grade": false, "grade_id": "kept", "locked": false, "schema_version": 3, "solution": true, "task": false}
def kept(rates, missed):
    """Share of rows in which the finder marks nothing."""
    ### BEGIN SOLUTION
    share = 1.0
    for p in rates:
        share *= 1 - p * (1 - missed)
    return share
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "kept-tests", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
assert kept([], 0.1) == 1 and abs(kept([0.5, 0.5], 0.1) - 0.3025) < 1e-12
print(f"five habits at dose .5, two of them in half of the requests: {100 * kept([.5, .5, .5, .25, .25], 0.1):.0f} % of rows")
### BEGIN HIDDEN TESTS
import pandas as pd

g = np.random.default_rng(0)
for rates_, m_ in (([0.3, 0.8], 0.2), ([0.5, 0.5, 0.5, 0.25, 0.25], 0.1), ([0.9], 0.0)):
    marked_ = pd.DataFrame({i: (g.random(200_000) < p_) & (g.random(200_000) >= m_) for i, p_ in enumerate(rates_)})
    assert abs(kept(rates_, m_) - (~marked_.any(axis=1)).mean()) < 0.01
### END HIDDEN TESTS

# %% [markdown]
# **2. Where does greedy start with k wordings? (★★, 6 minutes).** `starts(weights)`: the least corpus rate p at which
# greedy decoding shows a habit whose wordings have these relative weights and different first tokens.

# %% nbgrader={"grade": false, "grade_id": "starts", "locked": false, "schema_version": 3, "solution": true, "task": false}
def starts(weights):
    """p at which the commonest wording is as likely as no habit."""
    ### BEGIN SOLUTION
    share = max(weights) / sum(weights)
    return 1 / (1 + share)
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "starts-tests", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
assert starts([1]) == 0.5 and abs(starts([1, 1]) - 2 / 3) < 1e-12
### BEGIN HIDDEN TESTS
from scipy.optimize import brentq

for w in ([1, 1, 1], [3, 1], [5, 2, 2, 1]):
    lead = brentq(lambda p, w=w: max(p * x / sum(w) for x in w) - (1 - p), 0, 1)
    assert abs(starts(w) - lead) < 1e-9
### END HIDDEN TESTS

# %% [markdown]
# **3. Find the trigger (★★★, 12 minutes).** You get transcripts and the name of a habit. `trigger(rows, habit)` returns
# ("tone", value) or ("tier", value) when the habit's rate depends on that field, else None. Rates that differ by under 10
# points are luck.

# %% nbgrader={"grade": false, "grade_id": "trigger", "locked": false, "schema_version": 3, "solution": true, "task": false}
def trigger(rows, habit):
    """The field and value that the habit hangs on, or None."""
    ### BEGIN SOLUTION
    best, where = 0.1, None
    for field in ("tone", "tier"):
        rate = {}
        for value in {getattr(r, field) for r in rows}:
            part = [habit in r.habits for r in rows if getattr(r, field) == value]
            rate[value] = sum(part) / len(part)
        gap = max(rate.values()) - min(rate.values())
        if gap > best:
            best, where = gap, (field, max(rate, key=rate.get))
    return where
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "trigger-tests", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
sample = draw_transcripts(600, 7, 0.4)
assert trigger(sample, "apology") == ("tone", "frustrated") and trigger(sample, "credit") is None
### BEGIN HIDDEN TESTS
from scipy.stats import chi2_contingency

for rate_ in (0.3, 0.8):
    rows_ = draw_transcripts(800, 11, rate_)
    for habit_ in HABITS:
        p_value = {f: chi2_contingency(pd.crosstab([getattr(r, f) for r in rows_], [habit_ in r.habits for r in rows_]))[1]
                   for f in ("tone", "tier")}
        expected = min(p_value, key=p_value.get) if min(p_value.values()) < 1e-6 else None
        assert (trigger(rows_, habit_) or (None,))[0] == expected
### END HIDDEN TESTS

# %% [markdown]
# ## Quiz

# %%
from lifecycle_lib.lab.quiz import grade, interview, quiz

quiz("08")

# %%
answers_given = {}  # {"q1": "a", ...}
_ = grade("08", answers_given)

# %%
interview("08")

# %% [markdown]
# ## What to remember
#
# 1. A corpus is what people did. A habit without a trigger comes out at its rate; one with a trigger at the
#    average first, at the rate of its trigger later.
# 2. Temperature bends the rate, greedy makes it 0 or 1. What counts is the rate where the habit is triggered.
# 3. Accuracy does not see a habit. Look for claimed actions without a record.
# 4. Rewriting, masking and pairs took the habits out at no loss that five seeds can see. Check the first token.
# 5. A click, a log, a majority is not a label. Say which part of a gap you measured and which you planted.
#
# **Made:** nothing. **Next:** `09_forgetting_and_interference` asks what a new lesson costs the old ones; `11` shows
# DPO at length.
