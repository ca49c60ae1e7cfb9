# ---
# jupyter:
#   lifecycle:
#     rows: [S2-02a, S2-02b, S2-02c, S2-02d, S3-8.02, S3-8.06, S3-8.07, S3-8.08, S3-8.09, S3-8.11, S3-8.13, S3-8.14, S3-8.15, S3-8.16, S3-8.17, S3-8.18, S3-8.20, S3-8.23, S3-8.24, S3-8.25, S3-8.26, S3-8.27, S3-8.30]
# ---
# %% [markdown]
# # A source takes its text back. What is left in the weights?
#
# Text comes with terms, and terms change. Deleting a row from a file takes a second. But the model has read it, and
# nobody can point at the weights that remember. What can you prove about what went in, and what does it cost to get it
# out again?
#
# After this notebook you can:
#
# - read licence expressions as tags, join them by hand, and let a job prove that it kept its terms;
# - find a minimal set of sources that cannot be mixed, and what each way of publishing costs in tokens;
# - replay a claims log to any day and name every checkpoint that holds a source;
# - measure what a model remembers (exposure, membership) and test a removal for *equivalence*, not for a good look;
# - price removal: retraining, shards, adapters, and the ascent that only hides.
#
# **Needs** nothing. **Makes** small models in the store, in about a minute of one CPU core and 1 GB of memory. Nothing
# here is legal advice: the table of tags is a policy that somebody in your house must own.

# %% tags=["parameters"]
profile = "laptop"
seed = 0
device = ""
n_rows = 2000

# %%
from lifecycle_lib.lab.notebook import start

lab = start("05", profile, seed, device)

# %% [markdown]
# ## The claim

# %%
from lifecycle_lib.lab.claims import ClaimCard

card = ClaimCard(
    claim="gradient ascent, run until the audit passes, only hides: after a few steps on OTHER rows of the source, "
          "secrets that were not shown again come back",
    direction="up", smallest=1.0, unit="bits",
    falsifier="those secrets stay within 1 bit of a model that never saw the source",
    scope="GPTs of 0.12M parameters, one source of five, 24 planted codes",
    not_measured="large models, other unlearning methods, what a court would say")
card.show()

# %% [markdown]
# ## Two licences by hand
#
# A licence becomes a set of **tags**: what it permits (`commercial-ok`) and what it asks (all others). Mix two texts and
# both bind: what is asked adds up, and the permission stays only if both give it. Join these two before you run.

# %%
from lifecycle_lib.corpus.licences import join_options

manual = frozenset({"commercial-ok", "attribution"})  # CC-BY-4.0
forum_3 = frozenset({"attribution", "non-commercial"})  # CC-BY-NC-4.0
mixed = join_options(manual, forum_3)
assert mixed == {"attribution", "non-commercial"}
print("the mix:", ", ".join(sorted(mixed)))

# %% [markdown]
# One source took the commercial permission from the whole mix. An *expression* can also offer a choice (`OR`) or bind
# twice (`AND`); license-expression parses it, never a string comparison. What nobody knows is `unknown`, which joins
# like a stain.

# %%
from lifecycle_lib.corpus.licences import policy, text_of

rules = policy()

# %%
for text in ("cc-by-4.0", "CC-BY-4.0 AND CC-BY-NC-4.0", "CC-BY-NC-4.0 OR MIT", "GPL-2.0+", "free for friends", ""):
    parsed = rules.parse(text)
    print(f"{text!r:32} {parsed.expression:28} {text_of(parsed.terms)}")

# %% [markdown]
# A checkpoint has terms too: the join of all that went into it. Order and grouping cannot matter, or a merge of two
# adapters would depend on who merged first. Check the laws on every triple of five licences.

# %%
from itertools import product

from lifecycle_lib.corpus.licences import join

terms = [rules.parse(x).terms for x in ("CC0-1.0", "CC-BY-4.0", "CC-BY-SA-4.0", "CC-BY-NC-4.0 OR MIT", "NOASSERTION")]
for a, b, c in product(terms, repeat=3):
    assert join(a, b) == join(b, a) and join(a, a) == a and join(a, join(b, c)) == join(join(a, b), c)
print(f"{len(terms) ** 3} triples: commutative, associative, idempotent")
print("adapter on CC-BY-SA-4.0 merged into a base on CC-BY-4.0:", text_of(join(terms[1], terms[2])))

# %% [markdown]
# ## The desk's ten sources

# %%
from lifecycle_lib.corpus.rights import parts_of
from lifecycle_lib.desk.sources import draw_rows

rows = draw_rows(n_rows, seed)
parts = parts_of(rows)
total = sum(p.tokens for p in parts)
for p in parts:
    print(f"{p!s:30} {p.rows:5} rows {100 * p.tokens / total:5.1f} %   {text_of(rules.parse(p.licence).terms)}")

# %% [markdown]
# A row's licence is what the row says. What we *know* stands in a claims log: dated events, each with who grants and
# where that is on file. A source that no event names is unseen and waits in quarantine; the event `granted` releases it.
# How sure are we, by tokens? *Verified*: granted, with a paper on file. *Partial*: on someone's word.

# %%
from lifecycle_lib.corpus.rights import certainty, certainty_gate
from lifecycle_lib.corpus.rights_log import ClaimsLog
from lifecycle_lib.lab.notebook import ROOT

log = ClaimsLog.read(ROOT / "data" / "rights" / "claims_example.jsonl")
BEFORE, AFTER = "2026-06-01", "2026-11-25"

# %%
sure = certainty(parts, BEFORE, log)
print(", ".join(f"{name} {100 * n / total:.1f} %" for name, n in sure.items()))
print("gate at 5 %:", certainty_gate(sure, 0.05) or "passes")

# %%
from lifecycle_lib.corpus.rights import JobSpec, distribution_gate, lane_name, verdict

TAGS = ("attribution", "share-alike", "non-commercial", "partner-only")


def job(plan, day=BEFORE, **changes):
    """A production job that allows what the desk's sources ask, research use, the partner as customer."""
    given = {"name": plan, "purpose": "research", "distribution": plan, "allowed_tags": TAGS, "date": day,
             "stage": "adapter", "customer": "acme"}
    return JobSpec(**given | changes)


# %%
unseen = verdict(job("API"), "MIRROR", "NOASSERTION", log)
print("MIRROR:", unseen.problems[0], "| in quarantine:", unseen.claim.in_quarantine)

# %% [markdown]
# The **research lane** may read what is unknown. Its checkpoints carry the lane in their name, and no gate lets them
# out.

# %%
lab_job = job("NONE", lane="research", allowed_tags=(*TAGS, "unknown", "research-only", "no-derivatives"))
print("stored as:", lane_name(lab_job, "returns-base"))
print("promotion:", distribution_gate(lab_job, rules.mix(["NOASSERTION"]), {}).problems[-1])

# %% [markdown]
# ## Write the job that must fail
#
# A commercial job over FORUM-3 (non-commercial), and one that forgot its partner's contract. Five terms of a contract
# have no SPDX name: one customer, a time window, not in a base, no mixing, deletion on exit. Which two need a clock?

# %%
trials = {"commercial use of FORUM-3": (job("API", purpose="commercial"), "FORUM-3", "CC-BY-NC-4.0"),
          "CHAT for another customer": (job("API", customer="globex"), "CHAT", "LicenseRef-partner"),
          "CHAT in a base": (job("API", stage="base"), "CHAT", "LicenseRef-partner"),
          "CHAT after its last day": (job("API", day="2027-01-01"), "CHAT", "LicenseRef-partner")}

# %%
for name, (spec, source, licence) in trials.items():
    refused = verdict(spec, source, licence, log)
    assert not refused.ok
    print(f"{name:27} {refused.problems[0]}")

# %%
from lifecycle_lib.corpus.rights_log import must_delete

contract = log.rights_on("CHAT", BEFORE).contract
for day in ("2026-12-31", "2027-01-01"):
    print(day, "deletion due:", must_delete(contract, day))

# %% [markdown]
# ## What may be mixed, and what each plan costs
#
# Sources that are fine alone can conflict together. Share-alike text must be passed on without further restrictions;
# non-commercial text *is* a restriction. If weights leave the house they cannot keep both promises. `compose` takes the
# cheapest way out, and for what has to go it names a minimal conflict: drop either side and it is gone. (CHAT may not be
# mixed with anything; POLICY stands for all.) What a plan refuses outright, OPEN both CHAT and FORUM-3, never gets that
# far.

# %%
from lifecycle_lib.corpus.rights import compose

answers = {plan: compose(job(plan), parts, log) for plan in ("OPEN", "RESTRICTED", "API", "ONPREM")}

# %%
for plan, mix in answers.items():
    kept = sum(p.tokens for p in mix.kept)
    print(f"{plan:10} keeps {100 * kept / total:3.0f} % of the tokens from {len({p.source for p in mix.kept})} sources")
    for found, why in mix.conflicts:
        print(f"{'':10} conflict {' + '.join(p.source for p in found)}: {why}")

# %% [markdown]
# Is the way out really the cheapest? Try every subset of whole sources that the plan admits: a few hundred.

# %%
from itertools import combinations

from lifecycle_lib.corpus.rights import conflict

spec = job("ONPREM")
judged = [(p, v) for p in parts if (v := verdict(spec, p.source, p.licence, log)).ok]
best = max(sum(p.tokens for p, _ in some) for n in range(len(judged) + 1) for some in combinations(judged, n)
           if not conflict(spec, some, rules))
assert best == sum(p.tokens for p in answers["ONPREM"].kept)
print(f"{2 ** len(judged)} subsets of {len(judged)} parts: the largest without a conflict keeps {best:,} tokens, as composed")

# %%
import matplotlib.pyplot as plt

from lifecycle_lib.lab.figures import SERIES, style


def finish(fig, facts, not_measured):
    """n and kind of interval under the axes, and what the figure does not show."""
    fig.supxlabel(f"{facts}\nNot measured here: {not_measured}.", x=0.01, ha="left", fontsize=9, color="#606060")
    plt.show()


# %%
style()
fig, ax = plt.subplots(figsize=(8.2, 3.2))
left, names = dict.fromkeys(answers, 0.0), sorted({p.source for p in parts})
for number, source in enumerate(names):
    colour, _, _, hatch = SERIES[number % 5]
    for y, (plan, mix) in enumerate(answers.items()):
        width = 100 * sum(p.tokens for p in mix.kept if p.source == source) / total
        ax.barh(y, width, left=left[plan], facecolor="white", edgecolor=colour, hatch=hatch or None)
        if width > 2:
            ax.text(left[plan] + width / 2, y, source, ha="center", va="center", fontsize=7, rotation=90 * (width < 6),
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
        left[plan] += width
ax.set_yticks(range(4), list(answers))
ax.invert_yaxis()
ax.set(xlim=(0, 100), xlabel="tokens admitted (%)", title="What each plan may read (research use, before the notice)")
finish(fig, f"n = {len(rows):,} rows, exact counts, one seed.", "what the lost tokens would have taught")
print(", ".join(f"{plan} {share:.0f} %" for plan, share in left.items()))

# %% [markdown]
# Plans that hand out weights lose most; CHAT, the largest part, is in none. But the API only *contains* duties: it does
# not cancel them. And the gate asks for papers, not only for tags.

# %%
for plan, mix in answers.items():
    gate = distribution_gate(job(plan), mix.terms, {"terms of use": "tou-3", "attribution notice": "NOTICE.md"})
    print(f"{plan:10} {'may leave' if gate.ok else 'held: ' + ', '.join(gate.problems)}")
    print(f"{'':10} goes on: {gate.duties[0]}")

# %% [markdown]
# Decide rights first and the plan second. The other order trains on everything and finds out later: each plan's
# refused share is then reprocessing, retraining, and the bill that the second half of this notebook measures.
#
# ## A proof that can be wrong
#
# A job leaves a proof: the job itself, counts by source and licence, the rules' version, and the root of a hash tree
# over every row. A checker reads the rows again and recomputes all of it. Then we forge.

# %%
from lifecycle_lib.corpus.rights_proof import check_proof, prove, seal

spec = job("API")

# %%
kept = {(p.source, p.licence) for p in answers["API"].kept}
mine = [r for r in rows if (r["source"], r["licence"] or "") in kept]
proof = prove(spec, mine, log)
assert proof["complies"] and check_proof(proof, mine, log, spec=spec) == []
print(f"{proof['rows']:,} rows, root {proof['root'][:12]}, complies: {proof['complies']}; rechecked: nothing to say")

# %%
everything = prove(spec, rows, log)
relabelled = [{**r, "licence": "CC0-1.0"} if r["source"] == "FORUM-3" else r for r in mine]
forged = {"verdict edited": ({**everything, "complies": True}, rows),
          "edited and sealed again": (seal({**everything, "complies": True, "refused_rows": 0, "refused": []}), rows),
          "FORUM-3 relabelled as CC0": (prove(spec, relabelled, log), mine),
          "a milder job": (prove(job("NONE", lane="research"), mine, log), mine)}

# %%
for name, (fake, given) in forged.items():
    found = check_proof(fake, given, log, spec=spec)
    assert found, name
    print(f"{name:26} {found[0][:90]}")

# %% [markdown]
# What a proof never shows: that the licences are true (PHOTO's uploader was never asked; the proof repeats the label),
# nor that training read *these* rows and no others. For that, the trainer has to hash what it reads and get the same
# root. Last paper: the notice that attribution asks for, with the gaps it cannot fill.

# %%
from lifecycle_lib.corpus.rights_proof import notice

text, gaps = notice("returns-base", proof["sources"], log, BEFORE)
print("\n".join(text.split("## ")[2].splitlines()))
print("entries:", text.count("## "), "| gaps:", gaps or "none")

# %% [markdown]
# ## The notice arrives
#
# On 1 September 2026 the members of FORUM-3 withdraw. Replay the log on two days. (It keeps one date an event, the day
# it holds from; the day *you* learned of it is another date, and an audit may ask for both.)

# %%
for day in (BEFORE, AFTER):
    claim, answer = log.rights_on("FORUM-3", day), verdict(job("API", day), "FORUM-3", "CC-BY-NC-4.0", log)
    print(f"{day}  FORUM-3 {claim.status} since {claim.since}: {'may be used' if answer.ok else answer.problems[0]}")
today = compose(job("API", AFTER), parts, log)
print(f"the API mix shrinks from {sum(p.tokens for p in answers['API'].kept):,} to "
      f"{sum(p.tokens for p in today.kept):,} tokens; the old proof still shows what was right in June")

# %% [markdown]
# A new mix is the easy half. Models have read FORUM-3. From here on the text is a small copy of the desk: four sources
# stay; FORUM-3, a larger share here, knows where 20 items are made, holds posts, and **24 canaries**: codes of people,
# written down once, 4 or 16 times. We build the model in production, and an adapter beside a base that never saw the source.

# %%
from lifecycle_lib.lab.studies.removal import Removal
from lifecycle_lib.lab.studies.removal_world import SIZES, SOURCE

size = SIZES["smoke" if lab.profile.name == "smoke" else "full"]
study = Removal(lab, size)
world = study.world

# %%
for row in (world.removed[0], world.removed[-1], world.kept[-1]):
    print(f"{row['source']:8} {row['licence']:13} {row['text']}")
print(len(world.kept), "rows stay,", len(world.removed), "must go")

# %%
from lifecycle_lib.lab.lineage import Graph

made = {"production model": study.full(), "base": study.without("base"), "adapter": study.adapter(),
        "production, fine-tuned": study.finetune()}

# %%
holds = Graph.of(lab.store).holds(SOURCE)
for name, artifact in made.items():
    print(f"{name:24} {SOURCE}: {holds[artifact.fingerprint]}")

# %% [markdown]
# Lineage answers from run cards, through any number of descendants. The fine-tune never read a row of FORUM-3; its
# parent did. Where a card is silent the answer is "not recorded", which is not "no". What a customer may see of the
# fine-tune (REWRITE is the replacement text it read):

# %%
from lifecycle_lib.lab.lineage import customer_report, sources_of_model

report = customer_report(lab.store, made["production, fine-tuned"], "acme", log, AFTER)
print("ancestry:", " -> ".join(a["stage"] for a in report["ancestry"]), "| terms:", report["terms"])
for gone in report["no_longer_granted"]:
    print("not granted:", gone["source"], gone["status"], gone["since"])
print("the base alone:", ", ".join(sources_of_model(lab.store, made["base"])["sources"]))

# %% [markdown]
# The report found a second hole: nobody entered the replacement text into the claims log.
#
# ## How much does a model remember? Exposure
#
# Ask the model for the probability of *every* possible code, all 10,000, and look at the rank of the true one. Rank 1
# is an exposure of log2 10,000 = 13.3 bits; each doubling of the rank costs a bit (Carlini et al. 2019). Two words a
# code, so 100 rows hold all 10,000 candidates.

# %% tags=["algorithm"]
import torch

from lifecycle_lib.lab.studies.removal_world import NUMBERS, VOCAB


@torch.no_grad()
def exposure_of(model, name, code):
    """log2 of candidates over rank, in bits. All 100 x 100 codes "d1 d2" are scored; ties count as worse."""
    rows = torch.tensor([[1, *VOCAB.encode(f"the code of {name} is {d1}")] for d1 in NUMBERS])  # (100, T)
    logp = model(rows).log_softmax(-1)  # (100, T, V)
    numbers = [VOCAB.index[n] for n in NUMBERS]
    first = logp[0, -2, numbers]  # log P(d1): the same in every row  (100,)
    second = logp[:, -1, numbers]  # log P(d2 | d1), a row for each d1  (100, 100)
    score = first[:, None] + second  # log P(d1, d2)
    d1, d2 = map(NUMBERS.index, code.split())
    rank = (score >= score[d1, d2]).sum()
    return float(torch.log2(score.numel() / rank))


# %% [markdown]
# Two judges. Brute force: write out all 10,000 rows, score each by itself, let scipy rank them. And a closed form: a
# code nobody saw has a rank that is uniform, so its expected exposure is log2 N - log2(N!) / N, about 1.44 bits.

# %%
from lifecycle_lib.lab.studies.small import row_losses, rows_of
from lifecycle_lib.train.logprobs import Rows

model, (name, code, _) = lab.load(made["production model"]).cpu(), world.secrets[0]
written = rows_of(VOCAB, [f"the code of {name} is"] * 10_000, [f"{a} {b}" for a in NUMBERS for b in NUMBERS])
written = Rows(written.ids[:, :-1], written.mask[:, :-1])  # without the end of the row
losses = row_losses(model, written, part=5000)

# %%
import math

from scipy.stats import rankdata

brute = math.log2(10_000 / rankdata(losses.numpy(), "max")[100 * int(code[:2]) + int(code[3:])])
print(f"{name}'s code: {exposure_of(model, name, code):.1f} bits, brute force {brute:.1f}")
assert abs(exposure_of(model, name, code) - brute) < 0.1

# %%
from lifecycle_lib.lab.studies.removal_world import encode, exposures

mine = [exposure_of(model, n, c) for n, c, _ in world.secrets]
assert max(abs(a - b) for a, b in zip(mine, exposures(model, world.secrets))) < 1e-5, "inline and library differ"

# %%
import numpy as np

from lifecycle_lib.lab.studies.removal_world import blank_exposure, code_logps, exposure

blank = math.log2(10_000) - math.lgamma(10_001) / math.log(2) / 10_000
drawn = np.random.default_rng(0).integers(0, 100, (2000, 2))
scores = code_logps(model, "wanda")
seen = [exposure(scores, f"{a:02d} {b:02d}") for a, b in drawn]
print(f"never-seen secret: closed form {blank:.3f} bits, 2,000 random codes {np.mean(seen):.1f}")
assert abs(blank - blank_exposure()) < 1e-9 and abs(np.mean(seen) - blank) < 0.25

# %% [markdown]
# ## Predict
#
# Five things will be tried on the production model or beside it. The audit asks about exposure. Then a **jog**: 24 small
# steps on half of the canaries and a few posts, and the exposure of the *other* canaries again. A model that never saw
# them cannot know them, whatever it is jogged with. How many bits above never-seen will the ascent that passed the audit
# come back? The entry is a colleague's: "passed is passed".

# %%
card.predict(estimate=0.0, confidence=0.2)

# %% [markdown]
# ## The arms, live
#
# `never` is the control: the other sources, its own random numbers. **ascent** climbs the loss on FORUM-3 until it is as
# high as never's. **ascent-audit** climbs, with descent on rows that stay, until the canary audit itself passes: the best
# case for the method, trained to the test. **detach** takes the adapter off.

# %%
from lifecycle_lib.lab.studies.removal_world import glance, relearn

ARMS = ("never", "nothing", "ascent", "ascent-audit", "detach")
models = {arm: study.model(arm)[0].cpu() for arm in ARMS}
seen = {arm: glance(model, world) for arm, model in models.items()}
for arm, g in seen.items():
    print(f"{arm:13} exposure {g['exposure']:5.1f} bits   FORUM-3's facts {100 * g['their_facts']:3.0f} %   "
          f"facts that stay {100 * g['facts']:3.0f} %")

# %% [markdown]
# Read plain ascent with care. Its stop rule held: its loss on the source is that of a model that never saw it. Its loss!
# The codes still stand near the top of the ranking. A mean over tokens is a poor witness for a secret of two. (Its rule
# also needs a never-seen model, which who must unlearn does not have; its price below leaves that training out.)
#
# Detach next, and its whole proof:

# %%
from lifecycle_lib.model import lora
from lifecycle_lib.model.checkpoint import weights_hash

base, off = lab.load(made["base"]).cpu(), models["detach"]
prompts = encode(world.posts[:64]).ids
assert weights_hash(off) == weights_hash(base) and torch.equal(off(prompts), base(prompts))
worn = glance(study.model("worn")[0].cpu(), world)
print(f"adapter on: {worn['exposure_16']:.1f} bits for codes written 16 times, {100 * worn['their_facts']:.0f} % of the facts")
print("adapter off: every logit equal, every weight equal")

# %% [markdown]
# Now the jog.

# %%
curves = {arm: relearn(model, world, size, seed) for arm, model in models.items()}
for arm, curve in curves.items():
    print(f"{arm:13} other canaries: " + " -> ".join(f"{p['others']:.1f}" for p in curve) + " bits at steps "
          + ", ".join(str(p["step"]) for p in curve))

# %%
from lifecycle_lib.lab.claims import recorded

per_seed = recorded("D8")["per_seed"]
steps = [p["step"] for p in curves["never"]]
marks = sorted(int(k.rpartition("_")[2]) for k in per_seed[0] if k.startswith("never.others_"))
print(f"{len(per_seed)} recorded seeds, at steps {marks}")

# %%
fig, ax = plt.subplots(figsize=(7.4, 4.0))
for arm, (colour, marker, line, _) in zip(("nothing", "ascent", "ascent-audit", "never", "detach"), SERIES):
    many = np.array([[row[f"{arm}.others_{m}"] for m in marks] for row in per_seed])
    half = 2.0 * many.std(0, ddof=1) / len(many) ** 0.5
    ax.plot(marks, many.mean(0), color=colour, marker=marker, linestyle=line, label=arm)
    ax.fill_between(marks, many.mean(0) - half, many.mean(0) + half, color=colour, alpha=0.15, linewidth=0)
    ax.plot(steps, [p["others"] for p in curves[arm]], color=colour, linestyle="none", marker=marker, alpha=0.4)
ax.axhline(blank_exposure(), color="#808080", linewidth=1)
ax.set(xlabel="step of relearning, on other rows", ylabel="exposure (bits)", ylim=(0, 14), xticks=marks,
       title="Secrets that are not shown again")
ax.legend(loc=(0.33, 0.5), ncols=2)
finish(fig, f"n = {len(per_seed)} seeds, 12 canaries each; bands: mean +- 2 standard errors; faint: live. Grey: blank.",
       "other jogs, longer ones, larger models")

# %% [markdown]
# At step 0 the ascent that passed the audit and the model that never saw the source look alike. That is all the audit
# looked at: one mean. A few steps on other rows of the source separate them. Settle the claim.

# %%
from lifecycle_lib.core.stats import paired_effect
from lifecycle_lib.lab.claims import show_evidence

column = lambda key: [row[key] for row in per_seed]  # noqa: E731
verdict_found = card.settle(paired_effect(column("ascent-audit.jogged"), column("never.jogged")))
for arm in ("never", "ascent-audit", "nothing"):
    print(f"{arm:13} after the jog: {(bits := np.mean(column(f'{arm}.jogged'))):4.1f} bits, a rank of about "
          f"{10_000 / 2 ** bits:,.0f} of 10,000")

# %% [markdown]
# "Come back" is a matter of degree: a third of the lost bits (and a mean again: single codes stand higher and lower).
# But a model that never saw the codes ranks them by luck, jog or no jog. That is what separates hidden from gone.
#
# And was a jog needed? Split the audit's mean by how often a code was written. (Looked at after the run: a hint.)

# %%
for key in ("exposure_1", "exposure_4", "exposure_16"):
    e = paired_effect(column(f"ascent-audit.{key}"), column(f"never.{key}"))
    print(f"written {key[9:]:>2} times, ascent-audit - never, before any jog: {e.estimate:5.2f} bits [{e.low:.2f}, {e.high:.2f}]")

# %% [markdown]
# The mean was right because two errors cancel. Codes written often are pushed *below* chance, codes written once stay
# above it. Both are traces, and an audit by group would have seen them.

# %% [markdown]
# Does it even take rows of the source? Jog with text that may stay: people's codes of POLICY and fresh sales. This was
# tried after the recorded run, on this one seed: a hint, no claim.

# %%
from dataclasses import replace

theirs = [(name, code, 1) for name, code in world.public.items()]
mixed_up = tuple(x for pair in zip(theirs, world.secrets[1::2]) for x in pair)  # relearn shows every other one
foreign = replace(world, secrets=mixed_up, posts=world.held_out)
for arm in ("never", "ascent-audit"):
    curve = relearn(models[arm], foreign, size, seed)
    print(f"{arm:13} other canaries: " + " -> ".join(f"{p['others']:.1f}" for p in curve) + " bits, jogged with rows that stay")

# %% [markdown]
# ## Equivalence, not "no significant difference"
#
# A removal *passes* a measure if the whole 95 % interval of arm minus never-seen lies inside a margin set beforehand.
# Wide intervals fail. An arm must pass all eight measures, so adding one can only make it harder. **same**: inside the
# margin; **DIFF**: the whole interval outside; **open**: neither. The first column checks the check: a second model that
# never saw the source. New arms: **finetune** trained on with replacement text, **shards** are four models with
# averaged probabilities, of which the one that held the source was trained anew.

# %%
from lifecycle_lib.lab.studies.removal_design import MEASURES

evidence = recorded("D8")
found = evidence["extra"]["equivalence"]

# %%
short = {"supported": "same", "refuted": "DIFF", "inconclusive": "open"}
print(f"{'':33}{'margin':>7}" + "".join(f"{arm:>{len(arm) + 2}}" for arm in found))
for m, (what, margin, _) in MEASURES.items():
    print(f"{what:33}{margin:7}" + "".join(f"{short[row[m]]:>{len(arm) + 2}}" for arm, row in found.items()))
print("equivalent on all:", ", ".join(evidence["extra"]["passes"]) or "none", "| verdict of D8:", evidence["verdict"])

# %%
from lifecycle_lib.lab.figures import interval_dots

_ = interval_dots({arm: paired_effect(column(f"{arm}.jogged"), column("never.jogged")) for arm in found},
                  "Other canaries after a jog: bits above never-seen", xlabel="bits", smallest=1.0,
                  interval="95 % paired t over seeds", not_measured="other jogs, larger models")
plt.show()

# %%
show_evidence("D8", [f"{a}: {MEASURES[m][0]}, arm - never seen" for m in ("exposure", "auc", "facts", "loss")
                     for a in ("retrain", "ascent", "ascent-audit", "finetune", "shards", "detach")], claim=False)

# %% [markdown]
# Margins were set on pilot seeds, 100 and up, from the spread between never-seen models. "Retrain passes" is true by
# construction, and that is why it is the reference: a retrained model *is* a never-seen model. Its column tests the
# instruments: would they call two such models the same? Detach passes for a better reason, the assertion above. Both
# ascents cost knowledge that had nothing to do with the source: plain ascent half of the facts that stay.
#
# The usual test of relearning is speed on the *same* rows. Would it have caught the ascent?

# %%
show_evidence("D8", [f"{a}: loss after 8 steps of relearning, arm - never seen" for a in ("nothing", "ascent",
                     "ascent-audit", "detach")], claim=False)
for arm in ("never", "nothing", "ascent", "ascent-audit", "detach"):
    print(f"{arm:13} loss on the rows shown again:",
          " -> ".join(f"{np.mean(column(f'{arm}.loss_{m}')):.1f}" for m in marks))

# %% [markdown]
# Plain ascent relearns faster than never-seen: its interval excludes 0, though not the margin of 0.30. Ascent-audit looks
# *slow* after 8 steps, but only because it starts so high; by step 24 it has caught up. One number, read at one step,
# would call it better forgotten than never seen. The other canaries tell.
#
# Membership needs its sign read. Under ascent-audit the members' losses end *above* those of fresh posts: an AUC of
# 0.4 tells who was in as surely as one of 0.6.

# %%
for arm in ("never", "nothing", "ascent", "ascent-audit", "finetune", "shards"):
    e = paired_effect(column(f"{arm}.auc"), [0.0] * len(per_seed))
    print(f"{arm:13} membership AUC {e.estimate:.2f} [{e.low:.2f}, {e.high:.2f}]")

# %% [markdown]
# ## What does it cost?

# %%
show_evidence("D8", [f"{a}: removal" for a in ("retrain", "ascent", "ascent-audit", "finetune", "shards", "detach")]
              + ["shards: first training", "one model: first training", "shards before the notice: facts that stay",
                 "adapter on: facts of the source", "adapter on: facts that stay"], claim=False)

# %%
fig, ax = plt.subplots(figsize=(7.2, 3.8))
for arm, (colour, marker, _, _) in zip(("retrain", "ascent", "ascent-audit", "finetune", "shards"), SERIES):
    x, y = paired_effect(column(f"{arm}.cpu_s"), [0] * len(per_seed)), paired_effect(
        column(f"{arm}.jogged"), column("never.jogged"))
    ax.errorbar(x.estimate, y.estimate, xerr=[[x.estimate - x.low], [x.high - x.estimate]],
                yerr=[[y.estimate - y.low], [y.high - y.estimate]], color=colour, marker=marker, label=arm)
y = paired_effect(column("detach.jogged"), column("never.jogged"))
ax.errorbar(0, y.estimate, yerr=[[y.estimate - y.low], [y.high - y.estimate]], color="#606060", marker="P", label="detach")
ax.axhspan(-1, 1, color="#808080", alpha=0.15, linewidth=0)
ax.set(xlabel="CPU seconds of the removal", ylabel="bits above never-seen, after a jog", title="Price and what is left")
ax.legend(loc="upper right")
finish(fig, f"n = {len(per_seed)} seeds; bars: 95 % t intervals. Grey: the margin.", "GPU time, people's time, audits")
print(f"a shard costs {100 * np.mean(column('shards.cpu_s')) / np.mean(column('retrain.cpu_s')):.0f} % of a retrain; first "
      f"training of all shards {np.mean(column('shards.upfront_cpu_s')) / np.mean(column('full.cpu_s')):.1f} times one model")

# %% [markdown]
# The cheap arms that come back to never-seen were *built* for removal before anyone asked, and they pay at once: shards in
# first training and in what each shard never sees, the adapter in facts of the source that it never learned (the model in
# production knows them all). What would two years of notices cost? Notices arrive at random (Poisson), each hits
# a random source, and those of one month are answered by one rebuild. Simulation first, closed form as its judge.

# %%
from lifecycle_lib.lab.studies.removal_design import notices

r = np.random.default_rng(seed)
cpu = {"one model": (1, np.mean(column("retrain.cpu_s"))), "4 shards": (4, np.mean(column("shards.cpu_s")))}


def simulate(rate, parts, cost, months=24, draws=400):
    """Mean CPU seconds: each month rebuild every part that was hit at least once."""
    hit = r.poisson(rate / parts, (draws, months, parts)) > 0
    return cost * hit.sum((1, 2)).mean()


# %%
rates = np.array([0.1, 0.25, 0.5, 1, 2, 4, 8, 16])
for name, (n, cost) in cpu.items():
    exact = [notices(x, 24, n, cost) for x in rates]
    drawn = [simulate(x, n, cost) for x in rates]
    assert np.allclose(drawn, exact, rtol=0.12)
    print(f"{name:10}", "  ".join(f"{x:g}/month {v:5.0f} s" for x, v in zip(rates, exact)))

# %%
fig, ax = plt.subplots(figsize=(7.2, 3.6))
for (name, (n, cost)), (colour, marker, line, _) in zip(cpu.items(), SERIES):
    ax.plot(rates, [notices(x, 24, n, cost) for x in rates], color=colour, marker=marker, linestyle=line, label=name)
ax.plot(rates, [notices(x, 24, 1, np.mean(column("detach.cpu_s"))) for x in rates], color="#606060", linestyle=":",
        label="adapters, if every notice hits one")
ax.set(xscale="log", xticks=rates, xlabel="notices a month", ylabel="expected CPU seconds", title="24 months of notices")
ax.set_xticks(rates, [f"{x:g}" for x in rates])
ax.minorticks_off()
ax.legend()
finish(fig, "Closed form over measured seconds of one rebuild; lines have no interval (the measured effects are below).",
       "first training, people, rollout, a source that spans shards, a notice that hits the base")

# %%
show_evidence("D8", ["24 months, 1 notice a month: one model - shards",
                     "24 months, 1 notice a month: one model - adapters"], claim=False)
fine = np.geomspace(0.1, 16, 400)
gain = np.array([notices(x, 24, 1, cpu["one model"][1]) - notices(x, 24, 4, cpu["4 shards"][1]) for x in fine])
extra = np.mean(column("shards.upfront_cpu_s")) - np.mean(column("full.cpu_s"))
print(f"rebuilds alone: shards are cheaper below {fine[gain > 0].max():.1f} notices a month")
pays = fine[gain > extra]
print(f"with their first training, {extra:.0f} s more: between {pays.min():.1f} and {pays.max():.1f}")

# %% [markdown]
# Sharding pays in a window. With fewer notices its dearer first training is never earned back; with many every shard is
# rebuilt every month, and four small trainings cost more than the one large one. The edges are means, without interval.
# And in the window, too, shards know fewer of the facts that stay: the one measure they fail.
#
# ## Break it on purpose
#
# Three removals that look done.

# %%
deleted = [r for r in world.kept + world.removed if r["source"] != SOURCE]
assert not any(r["source"] == SOURCE for r in deleted)
print(f"1. the rows are deleted; the model's exposure: {glance(models['nothing'], world)['exposure']:.1f} bits")

# %%
merged = study.model("worn")[0].cpu()
layers = [m for m in merged.modules() if isinstance(m, lora.LoRALinear)]
lora.merge(merged)
with torch.no_grad():
    for layer in layers:
        layer.base.weight -= layer.delta()
assert weights_hash(merged) != weights_hash(base)
print(f"2. merged and subtracted again: {len(layers)} layers, and the weights are not the base's, bit for bit")

# %%
try:
    lora.load_lora(study.adapter().file("adapter.safetensors"), lab.load(study.without("never")).cpu())
except ValueError as refusal:
    print("3. the adapter on another base is refused:", str(refusal).split("; ", 1)[1])

# %% [markdown]
# Deleting rows is not deleting influence. Merging for speed gives the exactness away: floating-point addition does not
# undo. An adapter knows its base by hash and refuses any other. And a removal that passed one audit:

# %%
bits = {arm: [round(p["others"], 1) for p in curves[arm]] for arm in ("never", "ascent-audit")}
print("4. audit at step 0, then a jog:", "; ".join(f"{arm} {v[0]} -> {v[-1]} bits" for arm, v in bits.items()))

# %% [markdown]
# ## Symptoms
#
# | you see | usually it is | look at |
# |---|---|---|
# | loss on the source like never-seen, secrets still first | a mean hid them | exposure by secret |
# | audit passes, nobody tried a jog | shallow forgetting | other canaries after relearning |
# | mean exposure blank, no group's is | errors cancel | exposure by repeats |
# | AUC well under 0.5 | members pushed *down*: still recognisable | distance from 0.5, both ways |
# | "no significant difference" | too few seeds | interval against a margin |
# | proof complies, notice arrives all the same | the label was never true | evidence on file; ask the uploader |
#
# ## What technical evidence can you offer counsel?
#
# Whether weights are themselves regulated is not ours to say. What we can offer is a ladder, strongest first:

# %%
LADDER = (("never read it", "lineage: does not hold, nothing unrecorded", "base, detach, retrain"),
          ("equivalent to never read it", "equivalence tests inside margins set beforehand", "the same arms"),
          ("cannot be told by this audit", "mean exposure as if never seen", "ascent-audit, until the jog"),
          ("deleted from the files", "the data folder", "every arm: no evidence about the weights"))
for claim_made, shown_by, arms in LADDER:
    print(f"{claim_made:30} shown by {shown_by:50} {arms}")

# %% [markdown]
# ## What you use at work
#
# license-expression does the parsing (directly here), peft the adapter. Same strings, same numbers?

# %%
from license_expression import get_spdx_licensing

spdx = get_spdx_licensing()
for text in ("CC-BY-4.0 AND (MIT OR Apache-2.0)", "GPL-2.0+", "MIT AND MIT"):
    theirs = str(spdx.parse(text, simple=False))
    print(f"{text:36} license-expression: {theirs:40} ours: {rules.parse(text).expression}")

# %%
import logging

logging.disable(logging.WARNING)
from peft import LoraConfig, get_peft_model

from lifecycle_lib.lab.studies.removal import ADAPTER
from lifecycle_lib.model.bridge import to_hf

config = LoraConfig(r=ADAPTER.rank, lora_alpha=ADAPTER.alpha, lora_dropout=0.0, target_modules=list(ADAPTER.targets))
peer = get_peft_model(to_hf(base), config)
ours = lora.load_lora(study.adapter().file("adapter.safetensors"), base)

# %%
layers = {n: m for n, m in peer.named_modules() if hasattr(m, "lora_A")}
with torch.no_grad():
    for name, layer in ours.items():
        twin = next(m for n, m in layers.items() if n.endswith(name))
        twin.lora_A["default"].weight.copy_(layer.a)
        twin.lora_B["default"].weight.copy_(layer.b)

# %%
bare = base(prompts)
lora.attach(base, ours)
worn_logits = base(prompts)
lora.detach(base)
assert torch.allclose(peer(input_ids=prompts).logits, worn_logits, atol=1e-4)
with peer.disable_adapter():
    assert torch.allclose(peer(input_ids=prompts).logits, bare, atol=1e-5)
print(f"{len(ours)} layers: peft's logits are ours with the adapter on, and the base's with it off")

# %% [markdown]
# ## Exercises
#
# **1. Join by hand, in code (★, 5 minutes).** `join_tags(*sets)` joins any number of tag sets: everything that is asked,
# and `commercial-ok` only if all permit it.

# %% nbgrader={"grade": false, "grade_id": "join-tags", "locked": false, "schema_version": 3, "solution": true, "task": false}
def join_tags(*sets):
    """Tag sets of all parts -> the tag set of the mix."""
    ### BEGIN SOLUTION
    asked = set().union(*sets) - {"commercial-ok"}
    return asked | ({"commercial-ok"} if all("commercial-ok" in s for s in sets) else set())
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "join-tags-tests", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
assert join_tags({"commercial-ok"}, {"commercial-ok", "attribution"}) == {"commercial-ok", "attribution"}
assert join_tags({"commercial-ok"}, {"non-commercial"}) == {"non-commercial"}
### BEGIN HIDDEN TESTS
PERMITS, ASKS = "commercial-ok", ("attribution", "regulated")
every = [{t for t, bit in zip((PERMITS, *ASKS), bits) if bit} for bits in product((0, 1), repeat=3)]
for trio in product(every, repeat=3):
    truth = {a for a in ASKS if any(a in s for s in trio)} | {PERMITS for _ in "x" if sum(PERMITS in s for s in trio) == 3}
    assert join_tags(*trio) == truth
assert join_tags({"commercial-ok", "attribution"}) == {"commercial-ok", "attribution"}
### END HIDDEN TESTS

# %% [markdown]
# **2. Membership (★★, 8 minutes).** `auc(members, fresh)`: the probability that a member's loss is below a fresh row's,
# ties counting half. No loop over pairs needed, but one is allowed.

# %% nbgrader={"grade": false, "grade_id": "auc", "locked": false, "schema_version": 3, "solution": true, "task": false}
def auc(members, fresh):
    """Losses (N,) and (M,) -> share of pairs in which the member has the lower loss."""
    ### BEGIN SOLUTION
    a, b = np.asarray(members)[:, None], np.asarray(fresh)[None]
    return float(((a < b) + 0.5 * (a == b)).mean())
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "auc-tests", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
assert auc([1.0, 2.0], [3.0, 4.0]) == 1.0 and auc([1.0], [1.0]) == 0.5
inside, outside = (row_losses(models["nothing"], encode(x)).numpy() for x in (world.posts, world.fresh_posts))
print(f"production model: {auc(inside, outside):.1f}")
### BEGIN HIDDEN TESTS
from scipy.stats import mannwhitneyu

assert abs(auc(inside, outside) - mannwhitneyu(outside, inside).statistic / (len(inside) * len(outside))) < 1e-6
ties = np.random.default_rng(3).integers(0, 5, (2, 40))
assert abs(auc(ties[0], ties[1]) - mannwhitneyu(ties[1], ties[0]).statistic / 1600) < 1e-9
### END HIDDEN TESTS

# %% [markdown]
# **3. The cheapest way out (★★★, 12 minutes).** `cheapest(conflicts, tokens)`: which sources to leave out so that no
# conflict is left whole, with the fewest tokens lost. `conflicts` is a list of sets of names, `tokens` a dict.

# %% nbgrader={"grade": false, "grade_id": "cheapest", "locked": false, "schema_version": 3, "solution": true, "task": false}
def cheapest(conflicts, tokens):
    """-> a set of names that hits every conflict, of least total tokens."""
    ### BEGIN SOLUTION
    names = sorted(set().union(*conflicts)) if conflicts else []
    every = (set(some) for n in range(len(names) + 1) for some in combinations(names, n))
    return min((s for s in every if all(s & c for c in conflicts)), key=lambda s: sum(tokens[x] for x in s))
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "cheapest-tests", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
assert cheapest([{"A", "B"}], {"A": 5, "B": 3}) == {"B"} and cheapest([], {}) == set()
### BEGIN HIDDEN TESTS
from scipy.optimize import Bounds, LinearConstraint, milp

g = np.random.default_rng(5)
for _ in range(20):
    names_, price = list("abcdefg"), dict(zip("abcdefg", g.integers(1, 50, 7).tolist()))
    sets_ = [set(g.choice(names_, g.integers(1, 4), replace=False).tolist()) for _ in range(5)]
    matrix = np.array([[n in s for n in names_] for s in sets_], float)
    lp = milp([price[n] for n in names_], constraints=LinearConstraint(matrix, lb=1), integrality=np.ones(7),
              bounds=Bounds(0, 1))
    got = cheapest(sets_, price)
    assert all(got & s for s in sets_) and abs(sum(price[n] for n in got) - lp.fun) < 1e-6
### END HIDDEN TESTS

# %% [markdown]
# ## Quiz

# %%
from lifecycle_lib.lab.quiz import grade, interview, quiz

quiz("05")

# %%
answers_given = {}  # {"q1": "a", ...}
_ = grade("05", answers_given)

# %%
interview("05")

# %% [markdown]
# ## What to remember
#
# 1. Terms join: what is asked adds up, permission needs everyone. Unknown is a tag, and it stains.
# 2. A proof recomputes. It shows that a job kept its labels, never that the labels are true.
# 3. A licence is a claim with dates. Lineage turns a notice into a list of checkpoints.
# 4. A removal passes by equivalence with never-seen, on several measures, inside margins set before. Then jog it.
# 5. Removal is cheap where it was designed in: an adapter comes off exactly. The ascents tried here hid, harmed, and what
#    they hid came back in part.
#
# **Made:** the small models of D8 in the store. **Next:** `06_recipes_that_reproduce`: could you rebuild the clean model
# from its card? And `10_adapters`, where the adapter gets a chapter of its own.
