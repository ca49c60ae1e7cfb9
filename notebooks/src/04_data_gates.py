# ---
# jupyter:
#   lifecycle:
#     rows: [S2-07a, S2-07b, S2-07c, S2-07d, S2-07e, S3-1.17, S3-1.18, S3-1.19, S3-2.01, S3-2.02, S3-2.08, S3-2.09, S3-2.10, S3-2.11, S3-2.12, S3-2.13, S3-2.14, S3-2.22, S3-2.24, S3-2.25, S3-2.28, S3-2.30, S3-2.33, S3-2.38]
# ---
# %% [markdown]
# # What may enter the training set, and what does the filter take away?
#
# A gate decides, row by row, what a model will be made of. A good gate keeps out spam, leaked test questions and other
# people's phone numbers. The same gate can delete a skill, and leave you with an evaluation that cannot see it.
#
# After this notebook you can:
#
# - write MinHash on one screen, and check it against true Jaccard and against datasketch;
# - read a similarity threshold as what it is: a sampling decision;
# - show how a near-copy filter deletes a rare skill while mean and memorisation improve;
# - run a gate whose counts add up, and score its filters against planted truth;
# - open the removal diff before you train.
#
# **Needs** nothing. **Makes** no artifact but gate folders in a temporary place. About a minute of one CPU
# core from an empty store, and 0.6 GB of memory.

# %% tags=["parameters"]
profile = "laptop"
seed = 0
device = ""
n_rows = 2000

# %%
from lifecycle_lib.lab.notebook import start

lab = start("04", profile, seed, device)

# %% [markdown]
# ## The claim
#
# A team removes near-copies. The corpus shrinks, the metrics stay flat, everyone is content. Among what went were nine
# of the eleven rows that taught the model to reverse a refund.

# %%
from lifecycle_lib.lab.claims import ClaimCard

card = ClaimCard(
    claim="removing near-copies from Jaccard .8 on, shortest kept, lowers accuracy on the rare REVERSAL skill",
    direction="down", smallest=0.05, unit="share",
    falsifier="REVERSAL accuracy unaffected at .8: the interval of the fall excludes 5 points",
    scope="0.1M parameters, one word a token, planted corpus, equal steps for every arm, 8 seeds",
    not_measured="real corpora, larger models, the cost of the filter itself")
card.show()

# %% [markdown]
# ## The corpus, with what is planted in it
#
# Ten sources, each with its terms and a date of capture. Because the corpus is generated, what is wrong with a row is
# known. That stands in `truth`, which no gate reads; here it scores them.

# %%
from lifecycle_lib.desk.sources import SOURCES, draw_rows

rows = draw_rows(n_rows, seed)
for s in SOURCES.values():
    count = sum(r["source"] == s.source_id for r in rows)
    print(f"{s.source_id:8}{count:5} rows  {s.licence:19} captured {s.captured}  {s.note}")

# %%
from collections import Counter

planted = Counter(r["truth"]["defect"] for r in rows if r["truth"]["defect"])
print("planted:", ", ".join(f"{n} {name}" for name, n in planted.most_common()))

# %% [markdown]
# And eleven rows that nothing is wrong with. A customer in a rage, forty words that say little, one word that decides.

# %%
import textwrap

hard = [r for r in rows if r["slice"] == "REVERSAL"]
for r in hard[:3]:
    print(textwrap.fill(r["text"], 116), "\n")
assert len(hard) == 11 == len({r["text"].split("-> ")[1] for r in hard})

# %% [markdown]
# Eleven rows, eleven different actions.
#
# ## How alike are two texts? By hand
#
# A text is the set of its runs of k words, its **shingles**. Likeness is Jaccard: shared shingles over all shingles.
# With k = 2 and one word changed, before you run the cell: what is the Jaccard of these two?

# %%
a = {"refund the", "the gift", "gift card", "card today"}
b = {"refund the", "the joint", "joint card", "card today"}
by_hand = len(a & b) / len(a | b)
assert by_hand == 2 / 6
print("refund the gift card today | refund the joint card today: Jaccard", round(by_hand, 3))

# %% [markdown]
# One changed word spoils k shingles on each side, however long the text. So the longer the text, the better the word
# hides: n words have n - k + 1 shingles, and J = (n - 2k + 1) / (n + 1).

# %%
for n in (8, 16, 29, 41, 80):
    print(f"{n:3} words, one in the middle differs, k = 3: Jaccard {(n - 5) / (n + 1):.2f}")

# %% [markdown]
# From 29 words on, one word no longer counts at a threshold of .8. A REVERSAL row has forty, and its action differs
# besides.
#
# ## Predict
#
# The filter at .8 keeps the shortest row of every cluster. How many of the eleven are left? And what does that do to
# accuracy on unseen REVERSAL messages? The entries are a colleague's, who trusts the mean.

# %%
survivors_predicted = 9
card.predict(estimate=-0.03, confidence=0.3)

# %% [markdown]
# ## MinHash on one screen
#
# Comparing all pairs of a million rows is 500 billion comparisons. MinHash (Broder 1997) makes a text a short list of
# numbers: shuffle all shingles, note the first one the text has, repeat with 128 shuffles. Two texts agree on a shuffle
# with a chance that *is* their Jaccard. Cut the list into bands: who shares a whole band becomes a candidate, and only
# candidates are compared in full.

# %% tags=["algorithm"]
import hashlib
from collections import defaultdict
from itertools import combinations

PRIME = 2**61 - 1


def shingle_set(text, k=3):
    """The runs of k words of a text."""
    words = text.split()
    return {" ".join(words[i:i + k]) for i in range(max(1, len(words) - k + 1))}


def true_jaccard(a, b):
    return len(a & b) / len(a | b)


def signature(shingles, orders):
    """For each shuffle x -> (a x + b) mod PRIME, the smallest number that any shingle gets."""
    numbers = [int.from_bytes(hashlib.blake2b(s.encode(), digest_size=7).digest(), "big") for s in shingles]
    return [min((a * x + b) % PRIME for x in numbers) for a, b in orders]


def near_copies(texts, threshold, orders, band_rows):
    """All pairs (i, j) whose Jaccard reaches the threshold, among those that share a band of `band_rows` minima."""
    sets = [shingle_set(t) for t in texts]
    bucket = defaultdict(list)
    for i, shingles in enumerate(sets):
        sign = signature(shingles, orders)
        for start_ in range(0, len(orders), band_rows):
            bucket[start_, tuple(sign[start_:start_ + band_rows])].append(i)
    candidates = {pair for members in bucket.values() for pair in combinations(members, 2)}
    return {(i, j) for i, j in candidates if true_jaccard(sets[i], sets[j]) >= threshold}


# %% [markdown]
# First oracle: every pair of 300 rows, by the definition. Second: the library, which does the same in numpy.

# %%
from lifecycle_lib.core.seeds import rng
from lifecycle_lib.corpus.dedupe import near_pairs, normalise

random = rng(seed, "orders")
orders = [(random.randrange(1, PRIME), random.randrange(PRIME)) for _ in range(128)]
few = [normalise(r["text"]) for r in (hard + [r for r in rows if r["truth"]["cluster"]])[:300]]
found = near_copies(few, .8, orders, band_rows=8)

# %%
sets = [shingle_set(t) for t in few]
likeness = {(i, j): true_jaccard(sets[i], sets[j]) for i, j in combinations(range(len(few)), 2)}
all_pairs = {pair for pair, j in likeness.items() if j >= .8}
library = {(i, j) for i, j, _ in near_pairs(few, .8, k=3)}
assert found <= all_pairs and library <= all_pairs
print(f"{len(few)} rows, {len(likeness):,} pairs; at .8 or more: {len(all_pairs)} by brute force, "
      f"{len(found)} by bands, {len(library)} by the library")

# %% [markdown]
# No false pair: candidates are compared in full. A pair can be missed, with a chance you choose: r rows a band and b
# bands let a pair of Jaccard J through with 1 - (1 - J^r)^b.

# %%
for rows_, bands in ((4, 32), (8, 16), (16, 8)):
    chances = {j: 1 - (1 - j**rows_) ** bands for j in (.4, .6, .8, .9)}
    print(f"{bands:2} bands of {rows_:2}: " + ", ".join(f"J {j}: {100 * c:5.1f} %" for j, c in chances.items()))

# %% [markdown]
# Third oracle: is the share of equal minima an estimate of Jaccard with the error the theory gives,
# sqrt(J (1 - J) / 128)? Ours against the truth, and datasketch's, on the same pairs.

# %%
import numpy as np
from datasketch import MinHash as Datasketch

pairs = [p for b in range(10) for p in [p for p, j in likeness.items() if b <= 10 * j < b + 1][:40]]
truth = np.array([likeness[p] for p in pairs])
signs = np.array([signature(s, orders) for s in sets], dtype=np.int64)
ours = np.array([(signs[i] == signs[j]).mean() for i, j in pairs])

# %%
theirs_of = []
for s in sets:
    m = Datasketch(num_perm=128, seed=seed + 1)
    m.update_batch([x.encode() for x in sorted(s)])
    theirs_of.append(m)
theirs = np.array([theirs_of[i].jaccard(theirs_of[j]) for i, j in pairs])

# %%
bound = 2 * np.sqrt(truth * (1 - truth) / 128) + 1e-9
inside = {name: (abs(e - truth) <= bound).mean() for name, e in (("ours", ours), ("datasketch", theirs))}
for name, share in inside.items():
    print(f"{name:10} within two standard errors of the true Jaccard: {100 * share:.0f} % of {len(pairs)} pairs")
assert min(inside.values()) > .8

# %%
import matplotlib.pyplot as plt

from lifecycle_lib.lab.figures import SERIES, style

style()
fig, ax = plt.subplots(figsize=(6.4, 3.6))
line = np.linspace(0, 1, 101)
ax.fill_between(line, line - 2 * np.sqrt(line * (1 - line) / 128), line + 2 * np.sqrt(line * (1 - line) / 128),
                color="#8f8f8f", alpha=.25, linewidth=0, label="two standard errors")
for (colour, marker, _, _), values, name in zip(SERIES, (ours, theirs), ("ours", "datasketch")):
    ax.plot(truth, values, marker, color=colour, markersize=4, fillstyle="none", label=name)
ax.set(xlabel="true Jaccard (3-word shingles)", ylabel="share of equal minima", title="128 shuffles estimate Jaccard")
ax.legend()
fig.supxlabel(f"n = {len(pairs)} pairs of rows.\nNot measured here: other shingle sizes, longer texts.", x=0.01,
              ha="left", fontsize=9, color="#606060")
plt.show()

# %% [markdown]
# **Break it.** Somebody "simplifies" the shuffle to x + b. Then all 128 shuffles are nearly one, and the estimate is
# close to a single yes or no. The check above catches it:

# %%
lazy = np.array([signature(s, [(1, b // 64) for _, b in orders]) for s in sets], dtype=np.int64)
broken = np.array([(lazy[i] == lazy[j]).mean() for i, j in pairs])
partial = (truth > .05) & (truth < .95)
share = (abs(broken - truth) <= bound)[partial].mean()
print(f"x + b instead of a x + b: {100 * share:.0f} % of {partial.sum()} unequal pairs within two standard errors")
assert share < .5 and (abs(ours - truth) <= bound)[partial].mean() > .8

# %% [markdown]
# ## Layers, and what each one sees
#
# Exact first: hash the normalised text. Which normalisation is right is a decision: case and spacing may go, a number
# may not, or two policies become one.

# %%
from lifecycle_lib.corpus.dedupe import bare_words, exact_clusters

for x, y in (("Refund  in 14 DAYS.", "refund in 14 days"), ("refund in 14 days", "refund in 30 days"),
             ("a fee of $1.5", "a fee of 1 5")):
    print(f"{x!r:22} = {y!r:22} normalise: {normalise(x) == normalise(y)!s:5}  bare words: "
          f"{bare_words(x) == bare_words(y)}")
texts = [normalise(r["text"]) for r in rows]
print("exact clusters in the corpus:", len(exact_clusters(r["text"] for r in rows)))

# %% [markdown]
# Then near copies. Four families are planted: exact mirrors, mirrors under another header, a farm that swaps synonyms
# and sentences, and different policies under one legal footer, which are *not* copies. Share found, by threshold:

# %%
from lifecycle_lib.corpus.dedupe import clusters_of

families = {f: [i for i, r in enumerate(rows) if r["truth"]["defect"] == f] for f in ("mirror", "header", "farm")}
footers = [i for i, r in enumerate(rows) if r["truth"]["defect"] == "boilerplate" and not r["truth"]["cluster"]]
original = {r["truth"]["cluster"]: i for i, r in enumerate(rows) if r["truth"]["cluster"] and r["source"] != "MIRROR"}

# %%
clusters = {t: clusters_of(len(rows), near_pairs(texts, t, k=3)) for t in (.95, .9, .8, .7, .6)}
for t, found_ in clusters.items():
    home = {i: n for n, members in enumerate(found_) for i in members}
    recall = {f: np.mean([home.get(i, -1) == home.get(original[rows[i]["truth"]["cluster"]], -2) for i in members])
              for f, members in families.items()}
    print(f"Jaccard {t:4}: " + ", ".join(f"{f} {100 * v:3.0f} %" for f, v in recall.items())
          + f";  not copies, but clustered: {100 * np.mean([i in home for i in footers]):.0f} % of the footers")

# %% [markdown]
# Read down: a lower threshold finds headers, never most of the farm, and at .6 starts to eat different policies that
# share a footer. Boilerplate is better *stripped* than removed with its row: find the sentence that repeats.

# %%
from lifecycle_lib.corpus.dedupe import boilerplate, strip_boilerplate

repeated = {s for s in boilerplate((r["text"] for r in rows), 40, "sentence") if "warranty" in s}
one = rows[footers[0]]["text"]
print(len(one.split()), "words ->", len(strip_boilerplate(one, repeated, "sentence").split()), "without the footer")
print("the footer:", *(textwrap.shorten(s, 80) for s in repeated))

# %% [markdown]
# ## A threshold is a sampling decision
#
# "Remove near-copies" sounds like hygiene. Rewritten as what it does: *draw one row of every cluster, the shortest, and
# all rows of no cluster*. Share of each slice that this sampler keeps, mirrors left out:

# %%
from lifecycle_lib.corpus.dedupe import choose

own = [i for i, r in enumerate(rows) if r["source"] != "MIRROR" and r["truth"]["defect"] is None]
sizes = Counter(rows[i]["slice"] for i in own)
print("Jaccard   " + "".join(f"{s:>10}" for s in sizes))
kept = {}
for t, found_ in clusters.items():
    alive = set(choose(found_, texts, "shortest", k=3).kept)
    kept[t] = Counter(rows[i]["slice"] for i in own if i in alive)
    print(f"{t:<10}" + "".join(f"{100 * kept[t][s] / n:9.0f}%" for s, n in sizes.items()))

# %%
left = kept[.8]["REVERSAL"]
print(f"REVERSAL rows left at .8: {left} of {len(hard)}; predicted: {survivors_predicted}")
assert kept[.9]["REVERSAL"] == 11 and left == 2

# %% [markdown]
# At .9 all eleven stay, at .8 two are left, one for each way of ranting. The table of any other slice would not have
# told you. Manuals pay next, at .7: they repeat because machines are returned alike.
#
# ## The experiment: D5
#
# Does it matter? A smaller corpus of the same kind, `message -> action` and web pages that a mirror farm copied up to
# 64 times. Slices: **REVERSAL** (11 rows), **messy** (16, a clean row again with the word drawn out), **EN-B** (40, a
# thin dialect), the rest plain. What each filter leaves:

# %%
from lifecycle_lib.lab.studies import dedup

size = dedup.SIZES[lab.profile.name]
corpus = dedup.draw_corpus(seed, size)
for name in ("off", "0.95", "0.9", "0.8", "0.7", "0.6", "0.8 random", "0.8 keep 2", "0.8 protected"):
    ids = dedup.kept_by(dedup.ARMS[name], corpus.rows, seed).kept
    by = Counter(corpus.rows[i]["slice"] for i in ids)
    print(f"{name:14}" + ", ".join(f"{s} {by[s]:3}" for s in (*dedup.SLICES, "page")))

# %% [markdown]
# Every arm trains a fresh model on what is left, for the *same number of steps*: a filter saves no steps here, it
# changes what they are spent on. `protected` leaves slices of under 50 rows alone. Four arms live, one seed:

# %% tags=["nbval-ignore-output"]
row, made = dedup.measure(lab, size, dedup.QUICK)
for arm in dedup.QUICK:
    scores = {what: row[f"{arm}.{what}"] for what in ("mean", "plain", "messy", "EN-B", "REVERSAL", "verbatim")}
    print(f"{arm:14}" + ", ".join(f"{k} {100 * v:3.0f} %" for k, v in scores.items())
          + f"; tokens an epoch {100 * row[f'{arm}.tokens']:.0f} %")

# %%
learnt = lab.profile.name != "smoke"  # the smoke profile trains for four steps and learns nothing
fell = row["off.REVERSAL"] - row["0.8.REVERSAL"]
print("REVERSAL fell by over 5 points at .8:", fell > .05 if learnt else "not asked in smoke")
print("pages said by heart, fewer than without a filter:",
      row["0.8.verbatim"] < row["off.verbatim"] if learnt else "not asked in smoke")

# %% [markdown]
# One seed shows a direction. The recorded run decides: thirteen arms, every seed with its own corpus, its own items.

# %%
from lifecycle_lib.core.stats import paired_effect
from lifecycle_lib.lab.claims import recorded, show_evidence

evidence = recorded("D5")
column = lambda key: [r[key] for r in evidence["per_seed"]]  # noqa: E731
verdict = card.settle(paired_effect(column("0.8.REVERSAL"), column("off.REVERSAL")))

# %%
show_evidence("D5", ["REVERSAL, no filter - .8", "mean, .8 - no filter", "verbatim, no filter - .8",
                     "REVERSAL, .8 protected - .8", "mean, .8 protected - no filter", "REVERSAL, .9 - .8",
                     "REVERSAL, .9 - no filter"])

# %%
from lifecycle_lib.lab.studies.dedup_figures import threshold_figure, trade_figure

_ = threshold_figure(evidence)
plt.show()

# %%
by_name = {e["name"]: e for e in evidence["effects"]}

tell = lambda *names: show_evidence("D5", names, claim=False)  # noqa: E731
for what in ("mean", "REVERSAL", "messy", "EN-B", "verbatim"):
    print(f"{what:9}" + ", ".join(f"{t} {100 * by_name[f'{t}: {what}']['estimate']:3.0f} %"
                                  for t in ("off", "0.95", "0.9", "0.8", "0.7", "0.6")))

# %% [markdown]
# Both sayings about deduplication stand in one picture. *It helps*: pages are no longer said by heart and the mean rises;
# at equal steps the messages come up about 1.7 times as often, and whether anything beyond that helps, this design does
# not say. *It harms*: each slice has its own edge. Messy falls at .9, REVERSAL at .8, the dialect from .7 on. That nine
# cues without a row cannot be answered is arithmetic; what is tested is whether the mean and the evaluation show it.
#
# ## How often must a page be copied to be learnt by heart?

# %%
for times in (1, 4, 16, 64):
    off, dd = by_name[f"off: verbatim x{times}"], by_name[f"0.8: verbatim x{times}"]
    print(f"a page that stands {times:2} times: completed word for word {100 * off['estimate']:3.0f} % "
          f"[{100 * off['low']:.0f}, {min(100, 100 * off['high']):.0f}] with no filter, {100 * dd['estimate']:3.0f} % at .8")

# %% [markdown]
# The pages are random words; a phone number on one would be said with it, which was not tested here. The filter at .95
# finds exact mirrors only and leaves pockets of rewritten ones. The one at .6 more than halves the dialect's score and
# leaves plain messages as they were:

# %%
tell("verbatim, .95 - .8", "EN-B, .8 - .6", "plain, .8 - .6")

# %% [markdown]
# ## Which copy stays?
#
# The shortest is the cleanest. Everyone whose message was not clean is gone. Keep-rules at .8, on the messy slice:

# %%
tell("messy, keep random - keep shortest", "messy, keep hardest - keep shortest", "messy, keep medoid - keep shortest")

# %% [markdown]
# `hardest` keeps the copy with the highest loss under a model trained without a filter. No keep-rule saves REVERSAL:
# one of six is one of six. What does save it: not removing it, or not all of it.

# %%
tell("REVERSAL, .8 keep 2 - .8", "REVERSAL, .8 keep 4 - .8", "verbatim, .8 keep 4 - .8", "REVERSAL, .8 protected - .8",
     "REVERSAL, .8 pages only - .8")

# %%
_ = trade_figure(evidence)
plt.show()

# %%
for arm in ("off", "0.9", "0.8", "0.8 keep 2", "0.8 keep 4", "0.8 protected", "0.8 pages only"):
    print(f"{arm:15} REVERSAL {100 * by_name[f'{arm}: REVERSAL']['estimate']:3.0f} %, pages by heart "
          f"{100 * by_name[f'{arm}: verbatim']['estimate']:3.0f} %, mean {100 * by_name[f'{arm}: mean']['estimate']:.1f} %")

# %% [markdown]
# Two ways lead to the top left: leave small slices alone (somebody must have *named* the slice), or set the threshold
# by domain: .8 for pages, none for messages. A cap of 4 a cluster trades one harm for the other.
#
# ## Would the evaluation have told you?
#
# Four ways to build one with 400 items. An item is an unseen wording of a row that was drawn, from the corpus *before*
# or *after* the filter, in natural shares or *by slice*. Alarm: exact McNemar on the REVERSAL items, p < .05 / 4.

# %%
for how in dedup.BUILDS:
    items = np.mean(column(f"{how}: REVERSAL items"))
    print(f"{how:17} REVERSAL items {items:5.1f} of {np.mean(column(f'{how}: items')):.0f}, alarm on "
          f"{sum(column(f'{how}: alarm')):.0f} of {len(evidence['seeds'])} seeds; on the whole set "
          f"{sum(column(f'{how}: alarm on the whole')):.0f}")

# %%
tell("drawn after the filter: silent", "drawn before, by slice: alarm", "drawn before the filter: alarm",
     "drawn after, by slice: alarm")

# %% [markdown]
# p < .0125 needs 8 losses and no win: a natural draw holds too few REVERSAL items to ring, and on the whole set the filter
# looks like a gain. After the filter, an evaluation can only ask about the two cues that survived, however it is drawn:
# what was deleted cannot be stratified. **Draw the evaluation first, then filter.**
#
# ## The gate
#
# Now the whole gate: rights, filters, exact copies, personal data, near copies. Four verdicts, every line with a reason,
# a manifest that must add up. It judges rows; whether they may be *mixed* is asked in notebook 05. `tests/corpus` does
# the same on public files (403 copies in an SMS set).

# %%
import tempfile
from pathlib import Path

from lifecycle_lib.core.records import write_jsonl
from lifecycle_lib.corpus.gate import GateConfig, run_gate

folder = Path(tempfile.mkdtemp())
write_jsonl(folder / "raw.jsonl", rows)
config = GateConfig(near_threshold=.8, near_k=3, near_rule="shortest", pii="mask")
manifest = run_gate(folder / "raw.jsonl", folder / "gated", config)

# %%
counts = manifest["counts"]
print(", ".join(f"{n} {verdict_}" for verdict_, n in counts["verdict"].items()), f"of {counts['lines']} lines")
print(", ".join(f"{n} {reason}" for reason, n in counts["reason"].items()))
assert sum(counts["verdict"].values()) == sum(counts["reason"].values()) == n_rows

# %% [markdown]
# Mirrors ended under `no_licence`: the farm states no terms, so provenance stopped it before any hash was made. Same
# input, same configuration: same hash. And a gate that forgets a row is caught, in its counts or in its files:

# %%
import copy

from lifecycle_lib.corpus.manifest import check_accounting, read_manifest

again = run_gate(folder / "raw.jsonl", folder / "again", config)
print("same manifest hash twice:", manifest["hash"] == again["hash"])
forgot = copy.deepcopy(manifest)
forgot["counts"]["verdict"]["reject"] -= 1
try:
    check_accounting(forgot)
except ValueError as refusal:
    print("caught:", refusal)

# %%
lines = (folder / "again" / "kept.jsonl").read_bytes().splitlines(keepends=True)
(folder / "again" / "kept.jsonl").write_bytes(b"".join(lines[:-1]))
try:
    read_manifest(folder / "again", files=True)
except ValueError as refusal:
    print("caught:", str(refusal).replace(str(folder), "..."))

# %% [markdown]
# Rules have a version. A verdict of last month, replayed under the rules of last month, comes out byte for byte; under
# new rules the differences are listed:

# %%
from lifecycle_lib.corpus.decisions import replay
from lifecycle_lib.corpus.filters import Ruleset

same = replay(folder / "gated", folder / "raw.jsonl")
stricter = replay(folder / "gated", folder / "raw.jsonl", Ruleset(version="1.1.0", max_misplaced=.2))
print("replayed under 1.0.0, identical:", same.identical)
for (then, now), n in list(stricter.changes.items())[:3]:
    print(f"under 1.1.0: {n} rows from {then} to {now}")

# %% [markdown]
# ## Explain this row
#
# Nobody should have to guess. One row that was put aside and one that was thrown out, stage by stage:

# %%
from lifecycle_lib.corpus.decisions import chain, explain, stream

decisions = {d["id"]: d for d in stream(folder / "gated" / "decisions.jsonl")}
lost_row = next(r["id"] for r in hard if decisions[r["id"]]["verdict"] == "reject")
spoilt = next(r["id"] for r in rows if r["truth"]["defect"] == "mojibake")
for row_id in (spoilt, lost_row):
    told = explain(folder / "gated", row_id)[0]
    print(row_id, "->", told["verdict"])
    print(*(f"   {stage:8} {what}" for stage, what in chain(told, manifest["config"])), sep="\n")

# %% [markdown]
# ## Filters against the truth
#
# Which planted rows did the filter meant for them stop, and which clean rows did any filter hit?

# %%
from lifecycle_lib.core.stats import wilson

meant = {"spam": {"spam", "maybe_spam"}, "mojibake": {"mojibake"}, "abuse": {"abuse"}, "noise": {"shuffled"},
         "no-licence": {"no_licence"}}
for defect, codes in meant.items():
    ids = [r["id"] for r in rows if r["truth"]["defect"] == defect]
    hits = sum(bool(codes & {h["reason"] for h in decisions[i]["details"]}) for i in ids)
    print(f"{defect:11} caught {hits:3} of {len(ids):3}  ({', '.join(f'{100 * x:.0f}' for x in wilson(hits, len(ids)))} %)")

# %%
clean = [r for r in rows if r["truth"]["defect"] is None and r["source"] != "MIRROR"]
for register in ("clean", "phone", "shorthand", "hostile", "log"):
    ids = [r["id"] for r in clean if r["register"] == register]
    hits = sum(any(h["stage"] == "filters" for h in decisions[i]["details"]) for i in ids)
    print(f"clean rows, register {register:10} hit by a filter: {hits} of {len(ids)}")

# %% [markdown]
# No filter hits a clean row here, in no register. That is luck of a mild ruleset. Take one that somebody would call
# reasonable: text is good if half of its words occur in the manuals and policies.

# %%
good = {w for r in clean if r["source"] in ("MANUAL", "POLICY") for w in r["text"].split()}
refused = lambda r: sum(w in good for w in r["text"].split()) < len(r["text"].split()) / 2  # noqa: E731
for name, group in (("EN-A, clean", ("EN-A", "clean")), ("EN-A, shorthand", ("EN-A", "shorthand")),
                    ("EN-B, clean", ("EN-B", "clean"))):
    of = [r for r in clean if r["domain"] == "support" and (r["dialect"], r["register"]) == group]
    print(f"refused by the naive quality filter: {name:16}{sum(map(refused, of)):4} of {len(of)}")

# %% [markdown]
# It refuses every row of the dialect. The share kept per dialect is the monitor that would have said so.
#
# Stand-ins are easy: spam with three cues in a line, broken decoding that leaves marks. Shuffled words are found only
# where articles land before words that cannot follow; a short shuffle passes. Abuse goes to a person, not to the bin.
#
# ## Personal data, by kind
#
# Chats carry invented emails, phones, cards and names; one in four rows is written to slip past a pattern.

# %%
from lifecycle_lib.corpus.privacy import privacy_report

report = privacy_report([{"text": r["text"], "spans": r["truth"]["spans"]} for r in rows if r["truth"]["spans"]])
for t in report["table"]:
    ends = [", ".join(f"{100 * x:.0f}" for x in t[f"{k}_interval"]) for k in ("recall", "precision")]
    print(f"{t['kind']:7} n {t['gold']:3}  recall {100 * t['recall']:3.0f} % [{ends[0]}]  precision "
          f"{100 * t['precision']:3.0f} % [{ends[1]}]  untouched: {'; '.join(t['missed'][:2]) or '-'}")

# %% [markdown]
# What is missed: digits as words, "at ... dot ...", lower-case names. A card in pieces is found, but as a phone. So
# read a sample of what was admitted, and bound the rest. `truth` plays the reader here:

# %%
from lifecycle_lib.corpus.privacy_eval import n_to_bound, residual_leak

admitted = list(stream(folder / "gated" / "kept.jsonl"))
leaks = lambda r: bool(r["truth"]["spans"]) and r["truth"]["hidden"]  # noqa: E731
seen = residual_leak(admitted, 300, leaks, seed)
real = sum(map(leaks, admitted)) / len(admitted)
print(f"read 300 of {len(admitted)}: {seen['k']} leak; at most {100 * seen['upper']:.1f} % (95 %); planted: {100 * real:.1f} %")
print("rows to read, none leaking, to say 'under 0.5 %':", n_to_bound(.005))

# %% [markdown]
# ## Leaked evaluation items, by type
#
# Sixty items leaked into FORUM-2: verbatim, reworded, or the answer alone. Four screens, each at the threshold that
# stops at most 1 % of clean rows. What if only the questions were registered?

# %%
from lifecycle_lib.corpus.contamination import detection
from lifecycle_lib.desk.sources import eval_items

asked = [{"id": i["id"], "prompt": i["question"], "answer": i["answer"]} for i in eval_items(60, seed)]
planted_leaks = {k: [r["text"] for r in rows if r["truth"].get("leak") == k] for k in
                 ("verbatim", "paraphrase", "answer-only")}
quiet, other = ([r["text"] for r in draw_rows(1000, seed + s, defects=False)] for s in (1, 2))

# %%
questions = [{k: v for k, v in item.items() if k != "answer"} for item in asked]
for registered, what in ((questions, "questions only"), (asked, "questions and answers")):
    caught = detection(registered, planted_leaks, quiet, background=other)
    for kind, screens in caught.items():
        print(f"{what:22} {kind:12} " + ", ".join(f"{s} {100 * x['rate']:3.0f} %" for s, x in screens.items()))

# %% [markdown]
# Exact matching finds verbatim leaks and, *if answers are registered too*, the answer alone. It finds no rewording; the
# bag of rare words does, and misses the bare answer. One screen per type of leak, and a person for the overlap.
#
# ## Out of quarantine
#
# A row leaves by one door, once: released by a reviewer, repaired and gated again, or used as red-team test material,
# which no training set may ever hold again.

# %%
from lifecycle_lib.corpus.quarantine import leaving, send

waiting = [d["id"] for d in decisions.values() if d["verdict"] == "quarantine" and d["reason"] == "abuse"]
send(folder / "gated", waiting[:3], "red_team", reviewer="ana", why="robustness test", on="2025-06-01")
send(folder / "gated", waiting[3:5], "release", reviewer="ana", why="quotes a customer", on="2025-06-01")
write_jsonl(folder / "tests.jsonl", list(leaving(folder / "gated", "red_team")))
back = run_gate(folder / "tests.jsonl", folder / "tests", GateConfig())
print("red-team rows offered as training data:", back["counts"]["reason"])
assert back["counts"]["kept"] == 0

# %%
try:
    send(folder / "gated", waiting[:1], "release", reviewer="bo", why="looks fine", on="2025-06-02")
except ValueError as refusal:
    print("refused:", str(refusal).replace(str(folder), "..."))

# %% [markdown]
# ## Open the removal diff
#
# The story's mistake took two queries to find, and nobody made them. First: what did near-copy removal cost, smallest
# slices first?

# %%
from lifecycle_lib.corpus.decisions import diff, too_much_lost

run_gate(folder / "raw.jsonl", folder / "before", GateConfig(pii="mask"))
losses = diff(folder / "before", folder / "gated", by="slice", examples=1)
for part in losses:
    print(f"{part.name:10} {part.before:4} -> {part.kept:4}   {100 * part.lost_share:3.0f} % lost")
print("a release that allows 20 % would be stopped by:", [p.name for p in too_much_lost(losses, .2)])

# %% [markdown]
# Second: the row that went beside the row that stands for it. One word differs, and the action.

# %%
example = losses[0].examples[0]
print(textwrap.fill(example["text"], 116), "\n\nstands for it, Jaccard", example["jaccard"], "\n")
print(textwrap.fill(example["representative"]["text"], 116))

# %%
from dataclasses import replace

safe = run_gate(folder / "raw.jsonl", folder / "safe", replace(config, protect_under=30))
by_slice = {name: run["by"]["slice"]["REVERSAL"]["admit"] for name, run in (("gated", manifest), ("safe", safe))}
print("REVERSAL rows admitted:", by_slice, "| rows kept:", counts["kept"], "->", safe["counts"]["kept"])
assert by_slice == {"gated": 2, "safe": 11}

# %% [markdown]
# ## What went in
#
# The board that a team looks at every week, drawn from the decision log alone:

# %%
from lifecycle_lib.lab.data_board import data_board

_ = data_board(folder / "safe")
plt.show()

# %%
for name, ends in safe["by"]["source"].items():
    total = sum(ends.values())
    kept_ = ends["admit"] + ends["accept_with_risk"]
    print(f"{name:8} kept {100 * kept_ / total:3.0f} %, quarantined {100 * ends['quarantine'] / total:3.0f} %, "
          f"rejected {100 * ends['reject'] / total:3.0f} % of {total}")

# %% [markdown]
# ## Symptoms
#
# | you see | usually it is | look at |
# |---|---|---|
# | corpus shrinks, metrics flat | rare slices paid | removal diff, smallest first |
# | evaluation likes every filter | it was drawn after the filter | build order |
# | text said by heart | clusters under the threshold, or farms | verbatim probe, rewrites |
# | copies jump one week | a mirror, or the index was rebuilt | share of copies by week |
# | a filter hits one register | it was tuned on clean text | false hits by register |
# | counts do not add up | a row was dropped without a verdict | manifest |
#
# ## What you use at work
#
# rensa (Rust) or datasketch: same shingles, same pairs, an error no larger.

# %%
from datasketch import MinHashLSH
from rensa import RMinHash

fast = [RMinHash(num_perm=128, seed=seed + 1) for _ in sets]
for m, s in zip(fast, sets):
    m.update(sorted(s))
rensa_ = np.array([fast[i].jaccard(fast[j]) for i, j in pairs])
for name, e in (("ours", ours), ("datasketch", theirs), ("rensa", rensa_)):
    error = np.sqrt(((e - truth) ** 2).mean())
    print(f"{name:10} root mean square error {error:.3f}, theory {np.sqrt((truth * (1 - truth) / 128).mean()):.3f}")
    assert error < .08

# %%
index = MinHashLSH(threshold=.8, num_perm=128)
for i, m in enumerate(theirs_of):
    index.insert(str(i), m)
alike = {j for i, j in all_pairs if i == 0 and j < 11}
hit = {int(x) for x in index.query(theirs_of[0])} & alike
print(f"copies of the first reversal at .8 or more: {len(alike)}; datasketch's index returns {len(hit)}")

# %% [markdown]
# Its default bands balance misses against false candidates; ours are cut for a recall of .999. Ask any index which.
#
# `lifecycle data gate`, `data diff` and `data explain` run this on your own JSONL. For personal data the tool of the
# field is presidio; it is not in this environment, so nothing is compared here. It brings names by a language model and
# needs the same test as ours: recall by kind, on your own forms.
#
# ## Exercises
#
# **1. The S-curve (★, 5 minutes).** Write `meets(j, bands, rows)`: the chance that two texts of Jaccard j share at
# least one of `bands` bands of `rows` minima.

# %% nbgrader={"grade": false, "grade_id": "meets", "locked": false, "schema_version": 3, "solution": true, "task": false}
def meets(j, bands, rows):
    """Chance of at least one equal band."""
    ### BEGIN SOLUTION
    return 1 - (1 - j**rows) ** bands
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "meets-tests", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
assert meets(1.0, 16, 8) == 1.0 and abs(meets(.5, 1, 2) - .25) < 1e-12
### BEGIN HIDDEN TESTS
from scipy.stats import binom

for j_, b_, r_ in ((.8, 16, 8), (.6, 32, 4), (.3, 20, 5)):
    assert abs(meets(j_, b_, r_) - binom.sf(0, b_, j_**r_)) < 1e-12
### END HIDDEN TESTS

# %% [markdown]
# **2. How large must a blind evaluation be? (★★, 10 minutes).** A slice has a share of the corpus. Write
# `items_needed(share, least, confidence)`: the smallest n so that n items drawn in natural shares hold at least `least`
# of the slice with that probability.

# %% nbgrader={"grade": false, "grade_id": "items", "locked": false, "schema_version": 3, "solution": true, "task": false}
from math import comb


def items_needed(share, least, confidence=.95):
    """Smallest n with P(at least `least` of n are of the slice) >= confidence."""
    ### BEGIN SOLUTION
    n = least
    while sum(comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(least)) > 1 - confidence:
        n += 1
    return n
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "items-tests", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
assert items_needed(.5, 1) == 5
print("for 8 REVERSAL items, drawn before the filter:", items_needed(11 / 717, 8))
### BEGIN HIDDEN TESTS
from scipy.stats import nbinom

for share_, least_ in ((.1, 3), (.02, 5), (.25, 10)):
    assert items_needed(share_, least_) == least_ + nbinom.ppf(.95, least_, share_)
### END HIDDEN TESTS

# %% [markdown]
# **3. A floor under every slice (★★★, 15 minutes).** `keep(clusters, slices, floor)`: rows to keep. One row of each
# cluster, the first, but of no slice fewer than `floor` rows, or all it has: then keep further rows of its clusters, in
# row order, until the floor is reached.

# %% nbgrader={"grade": false, "grade_id": "floor", "locked": false, "schema_version": 3, "solution": true, "task": false}
def keep(clusters, slices, floor):
    """Sorted rows kept out of 0 .. len(slices) - 1."""
    ### BEGIN SOLUTION
    gone = {i for members in clusters for i in sorted(members)[1:]}
    alive = Counter(s for i, s in enumerate(slices) if i not in gone)
    for i in sorted(gone):
        if alive[slices[i]] < floor:
            gone.discard(i)
            alive[slices[i]] += 1
    return [i for i in range(len(slices)) if i not in gone]
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "floor-tests", "locked": true, "points": 4, "schema_version": 3, "solution": false, "task": false}
assert keep([[0, 1, 2], [3, 4]], ["a", "a", "a", "b", "b"], 2) == [0, 1, 3, 4]
assert keep([[0, 1, 2]], ["a", "a", "a"], 1) == [0]
### BEGIN HIDDEN TESTS
names = [r["slice"] for r in rows]
survive = keep(clusters[.8], names, 11)
left_ = Counter(names[i] for i in survive)
assert left_["REVERSAL"] == 11 and all(left_[s] >= min(11, n) for s, n in Counter(names).items())
assert survive == sorted(set(survive))
never = {i for members in clusters[.8] for i in sorted(members)[1:]}
assert len(survive) == len(names) - len(never) + sum(names[i] == "REVERSAL" for i in never)
### END HIDDEN TESTS

# %% [markdown]
# ## Quiz

# %%
from lifecycle_lib.lab.quiz import grade, interview, quiz

quiz("04")

# %%
answers_given = {}  # {"q1": "a", ...}
_ = grade("04", answers_given)

# %%
interview("04")

# %% [markdown]
# ## What to remember
#
# 1. A similarity threshold with a keep-rule is a sampling specification. Write it down as one.
# 2. A long text hides the word that decides. The rare slice pays first, and the mean applauds.
# 3. Draw the evaluation before the filter, by slice. What was deleted cannot be asked about afterwards.
# 4. Every row gets one verdict with a reason, and the counts add up, or nothing is written.
# 5. Open the removal diff, smallest slices first.
#
# **Made:** nothing that stays. **Next:** `05_data_rights` asks whose text it is; `03_data_mixture` how much of each.
