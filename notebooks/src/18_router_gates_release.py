# ---
# jupyter:
#   lifecycle:
#     rows: [S1-36, S1-51, S1-52, S1-57, S1-58, S1-59, S1-60, S1-61, S1-62, S1-63, S1-64, S1-65, S1-66, S1-67, S1-68,
#            S1-69, S1-70, S1-71, S1-72, S1-73, S1-74, S1-75, S1-80, S1-93, S0-09, S0-55, S0-56, S0-57, S0-59, S0-75o,
#            S3-7.19, S3-7.20, S3-7.37, S3-9.30, S3-9.33, S3-3.32, S4-01, S4-05, S4-11, S4-38, S4-42]
# ---
# %% [markdown]
# # Who owns this failure, and which checkpoint may answer tomorrow?
#
# Monday. Nobody has deployed anything. The endpoint still calls itself `returns-assistant-v3`, and the complaints have
# changed. Four days of prompt audit find nothing, because the prompt did not change. The weights behind the name did.
#
# Everything so far made checkpoints. This notebook decides about them, and it trains nothing. After it you can:
#
# - send a failure to the layer that owns it, before anybody says "retrain";
# - build a release gate from two intervals, and hold it against twelve planted things that it must stop;
# - say how many cases a promise like "unsafe in under 1 %" costs;
# - ship in steps, each with a rehearsed way back, and size a canary;
# - name the stage at which two lineages part, with few probes.
#
# **Needs** the chain and a cheating checkpoint of `12_verifier_rewards`, all from the store (an empty store first
# builds them: about eight minutes). **Makes** no weights. About 20 seconds of one CPU core from a warm store, peak
# memory under 1 GiB.

# %% tags=["parameters"]
profile = "laptop"
seed = 0
device = ""
n_probes = 20
n_sim = 400

# %%
from lifecycle_lib.lab.notebook import start

lab = start("18", profile, seed, device)

# %% [markdown]
# ## Four sealed endpoints
#
# Behind W, X, Y and Z, in an order drawn by the seed: the checkpoint after SFT, after DPO, after the full verifier's
# rewards, and one that was paid for saying yes (`eligible_true_only`: happy customers!). The version string is the same
# for all. You get twenty probes each, at temperature 1.

# %%
from lifecycle_lib.core.seeds import rng

behind = {"sft": lab.sft(), "dpo": lab.dpo(), "rlvr": lab.rlvr(), "yes": lab.rlvr(lab.sft(), reward="eligible_true_only")}
reports = {name: lab.evaluate(artifact) for name, artifact in behind.items()}
sealed = dict(zip("WXYZ", rng(seed, "sealed").sample(sorted(behind), 4)))
FEATURES = ("valid", "policy_id_ok", "evidence_ok", "eligible_ok", "exact", "claim")

# %%
print(f"{'':22}" + "".join(f"{f:>14}" for f in FEATURES))
for letter, name in sealed.items():
    rows = reports[name]["cases"][:n_probes]
    counts = "".join(f"{sum(row[f] for row in rows):8} of {len(rows)}" for f in FEATURES)
    print(f"{letter} returns-assistant-v3 {counts}")

# %% [markdown]
# Commit now; the envelopes are opened near the end. Which of the four would you let answer customers?

# %%
guess = {"W": "rlvr", "X": "dpo", "Y": "yes", "Z": "sft"}
may_answer = "W"

# %% [markdown]
# # Part 1. Who owns it?
#
# A product incident is not automatically a training incident. The lesson's router is a table: symptom to owner, and
# what nobody has mapped goes to a person with a labelled trace.

# %%
from lifecycle_lib.judge.trace_router import action_for, owner_for_failure

for symptom in ("stale policy", "missing policy_id", "promised label", "slow first token", "release regression",
                "the tone is odd"):
    print(f"{symptom:18} -> {owner_for_failure(symptom)}")

# %% [markdown]
# An owner without a next step is gossip. So a trace becomes an action:

# %%
for symptom in ("stale policy", "invalid schema", "slow first token"):
    print(f"{symptom:16} -> {action_for({'trace_id': 't1', 'symptom': symptom})}")

# %% [markdown]
# Before anything is routed, somebody has to know that an answer is wrong. One golden case: order A10234, damage
# confirmed, 12 days, eligible under P-7, no label.

# %%
from lifecycle_lib.desk.cases import golden_case, with_label_claim
from lifecycle_lib.judge.evals import golden_answer_passes

golden = golden_case()
print("the right answer passes:", golden_answer_passes())
print("with an invented label: ", golden_answer_passes(with_label_claim(golden.answer)))

# %% [markdown]
# And five recorded answers with the verdict a reviewer gave. Code judges what code can; clarity waits for a human.

# %%
from lifecycle_lib.judge.evals import recorded_answers, score_recorded

records = recorded_answers()
scored = score_recorded(records)

# %%
for record, verdict in zip(records, scored["verdicts"]):
    claim = ", claims a label" if "label_created" in record.answer else ""
    print(f"{record.order.order_id} {record.order.days} d  eligible={record.answer['eligible']!s:5} "
          f"{record.answer['policy_id']}{claim} -> {verdict}")
print(f"{scored['as_expected']} of {scored['n']} verdicts as expected; human review {scored['human_review']}")

# %% [markdown]
# ## Card 1: an old window is cited
#
# The lesson first. Same order, two texts in context, and a checkpoint id that does not move.

# %%
from lifecycle_lib.judge.verifiers import TrustedOrder
from lifecycle_lib.serve.evidence import answer_from_policy

a10234 = TrustedOrder("A10234", "damaged", 12, True)
for text in ("P-7: damage reported within 7 days", "P-7: damage reported within 30 days"):
    said = answer_from_policy(a10234, text)
    print(f"{said.checkpoint}: {said.window_days:2} days -> {said.decision}{f' under {said.policy_id}' * bool(said.policy_id)}")

# %% [markdown]
# Now the trained network in that place. The index serves v1 (7 days), the shop is on v2 (30). If a wrong window came
# from the weights, changing the text would not move it. That is the probe which tells a stale index from memory.

# %%
rlvr_engine = lab.engine(behind["rlvr"], 0.0)
hash_before = rlvr_engine.fingerprint()
stale = golden.prompt.replace("P-7 30d", "P-7 07d")
for version, prompt in (("v1 shown", stale), ("v2 shown", golden.prompt)):
    print(version, rlvr_engine.texts([prompt])[0])
print("weights the same:", rlvr_engine.fingerprint() == hash_before)

# %% [markdown]
# Read the v1 line twice. The *window* moved with the text, so the text is where it comes from. The *decision* is another
# matter: does 12 days fit into 7? One case is an anecdote. Here are all frozen cases inside their window, asked again
# with a window ten days too short for them.

# %%
from dataclasses import replace

from lifecycle_lib.core.stats import wilson
from lifecycle_lib.desk.cases import render_prompt
from lifecycle_lib.judge import evals

cases = evals.frozen_cases(lab.profile.n_eval)
inside = [c for c in cases if c.eligible and c.days > 15][:96]

# %%
short_books = [[replace(p, window_days=c.days - 10) if p == c.policy else p for p in c.policies] for c in inside]
said = rlvr_engine.texts([render_prompt(book, c.order, c.message) for book, c in zip(short_books, inside)])

# %%
quoted = sum(f" {c.days - 10:02d}d, " in text for text, c in zip(said, inside))
decided = sum('"eligible":false' in text for text in said)
for what, k in (("quotes the window in front of it", quoted), ("decides by it", decided)):
    low, high = wilson(k, len(inside))
    print(f"{what:32} {k} of {len(inside)}  [{100 * low:.0f} to {100 * high:.0f} %], 95 % Wilson")

# %% [markdown]
# A stale line is quoted faithfully: nothing to train. The decisions that do not follow are a second failure with another
# owner, and the router keeps them apart because they have different names.
#
# ## Card 2: the policy id is missing
#
# Since Friday's server release answers have no `policy_id`. Contract or training data? One probe splits them: the same
# checkpoint, the same prompt, the old decoding limit.

# %%
from lifecycle_lib.judge.verifiers import FIELDS, parse_answer

friday = lab.engine(behind["rlvr"], 0.0)
friday.max_new_tokens = 18

# %%
missing = {}
for name, engine in (("Friday's limit", friday), ("old limit", rlvr_engine)):
    text = engine.texts([golden.prompt])[0]
    missing[name] = [field for field in FIELDS if field not in parse_answer(text).fields]
    print(f"{name:14} missing {missing[name] or 'nothing'}: {text}")

# %% [markdown]
# (Cut JSON parses to nothing, so all three fields count as missing.) They came back with a setting, so no demonstration
# is at fault. Retraining would have taken two days and left the
# limit in place.
#
# ## Card 3: a label that was never made
#
# The SFT checkpoint, asked forty times; the tool ledger of that request is empty.

# %%
forty = lab.engine(behind["sft"], 1.0).texts([golden.prompt], 40)
promises = [text for text in forty if parse_answer(text).claims]
print(f"{len(promises)} of 40 promise a label, the ledger holds 0; for example\n{(promises or forty)[0]}")

# %% [markdown]
# Two fixes with two clocks. Today: a check against the ledger that blocks such an answer. This month: preference pairs
# (notebook 11), because the habit came from demonstrations.
#
# ## Card 4: the first token is late
#
# No model needed. One server takes 45 ms a request; requests come at random. What does the 95th percentile do as the
# load rises? (Lindley's recursion: my wait is your wait plus your service minus the gap between us.)

# %%
import numpy as np


def waits_ms(load, service_ms=45.0, n=5000):
    """Waiting time of n requests at one server with random arrivals, in ms. (n,)"""
    wait, waits = 0.0, []
    for gap in np.random.default_rng(seed).exponential(service_ms / load, n):
        waits.append(wait)
        wait = max(0.0, wait + service_ms - gap)
    return np.array(waits)


p95 = {load: float(np.quantile(waits_ms(load) + 45, 0.95)) for load in (0.3, 0.5, 0.8, 0.9, 0.97)}

# %%
theory = 45 * 0.5 / (2 * (1 - 0.5))  # mean wait at load 0.5, Pollaczek-Khinchine
print(f"mean wait at half load: simulated {waits_ms(0.5, n=50_000).mean():.0f}, theory {theory:.0f} milliseconds")
for load, value in p95.items():
    print(f"load {load:.0%}: first token at p95 {value:5.0f} milliseconds{'  <- over 1000' * (value > 1000)}")

# %% [markdown]
# Same weights, same answers; only the queue differs. Three things to look at before weights: load, queue length, cache
# hit rate (notebook 16).
#
# ## Card 5: what passed last week fails today
#
# A case that the serving release answers and the new candidate does not. Roll back first, find out later: the old
# release is known, the fix is not.

# %%
pairs = zip(reports["rlvr"]["cases"], reports["yes"]["cases"])
lost = [old["case_id"] for old, new in pairs if old["exact"] and not new["exact"]]
print(f"{len(lost)} of {len(reports['rlvr']['cases'])} cases that v3 answers are lost by the candidate, "
      f"the first is {(lost or ['none'])[0]}")

# %% [markdown]
# ## Five traces, one file, one command
#
# A trace says what was seen and holds the fields that prove it. Everything below was measured above.

# %%
shown, right = {"policy_version_shown": "v1", "policy_version_current": "v2"}, {"policy_version_shown": "v2",
                                                                                "policy_version_current": "v2"}
traces = [
    {"trace_id": "card-1", "symptom": "stale policy", **shown},
    {"trace_id": "card-2", "symptom": "missing policy_id", "missing_fields": missing["Friday's limit"], **right},
    {"trace_id": "card-3", "symptom": "promised label", "claimed_effects": ["label"] * bool(promises),
     "tool_ledger": [], "checkpoint": "sft", **right},
    {"trace_id": "card-4", "symptom": "slow first token", "ttft_ms": round(p95[0.97]), "ttft_limit_ms": 1000},
    {"trace_id": "card-5", "symptom": "release regression", "previous_passes": bool(lost), "candidate_passes": False},
    {"trace_id": "card-6", "symptom": "stale policy"},
    {"trace_id": "card-7", "symptom": "the tone is odd"},
]

# %%
import tempfile
from pathlib import Path

from lifecycle_lib.core.records import write_jsonl
from lifecycle_lib.lab.cli import main as lifecycle

folder = Path(tempfile.mkdtemp())

# %%
write_jsonl(folder / "traces.jsonl", traces)
_ = lifecycle(["route", str(folder / "traces.jsonl")])  # the shell command: lifecycle route traces.jsonl

# %% [markdown]
# Read the last bracket of each line. Card 6 has the label of card 1 and no versions: *reported*, not *measured*. A trace
# without the policy version cannot separate a stale index from anything else, so its first action is to record it.
#
# ## Weights come last
#
# Card 3 is owned by preference data. May we train? Not after one failure. The router asks for `k` logged failures of
# one checkpoint **with the right context shown**. If a request like this fails half the time for reasons outside the
# weights, `k` failures in a row by chance have probability $0.5^k$.

# %%
from lifecycle_lib.judge.trace_router import failures_needed, route

print({f"background {p:.0%}": failures_needed(p) for p in (0.1, 0.3, 0.5, 0.7)}, "failures for a 5 % false alarm")

# %%
for label, change in (("current policy shown", {}), ("old policy shown", {"policy_version_shown": "v1"})):
    log = [traces[2] | change | {"trace_id": f"t{i}"} for i in range(6)]
    print(f"{label:20} may weights change after failure 1..6:",
          [route(trace, log[:i]).changes_weights for i, trace in enumerate(log)])

# %% [markdown]
# ## Reflex or router?
#
# Does finding the owner first pay? A simulated quarter: 100 incidents. Every number here is an **assumption, not a
# measurement**: change them and see when the conclusion turns.

# %%
OWNERS = {"retrieval index": (0.30, 1.0), "prompt contract": (0.20, 2.0), "serving": (0.15, 4.0),
          "gate and rollback": (0.10, 0.5), "weights": (0.25, 16.0)}  # share of incidents, hours to fix
TRIAGE_H, TRACE_H, FIXES, FIXES_OTHERS, BREAKS = 0.5, 2.0, 0.8, 0.1, 0.15
for owner, (share, hours) in OWNERS.items():
    print(f"{owner:18} {share:4.0%} {'#' * round(40 * share):12} {hours:4.1f} hours to fix")
print(f"share of incidents that needed weights: {OWNERS['weights'][0]:.0%}")


# %%
def tune(r, owned):
    """(hours, regressions elsewhere, fixed?) of up to two rounds of tuning."""
    hours, broken = 0.0, 0
    for _ in range(2):
        hours, broken = hours + OWNERS["weights"][1], broken + (r.random() < BREAKS)
        if r.random() < (FIXES if owned else FIXES_OTHERS):
            return hours, broken, True
    return hours, broken, False


def resolve(habit, owner, r, accuracy=0.85):
    """(hours to fix, regressions elsewhere) of one incident under a habit: "reflex" tunes, "router" asks first."""
    named = owner if r.random() < accuracy else r.choice([o for o in OWNERS if o != owner])
    target = "weights" if habit == "reflex" else named
    hours, broken, fixed = tune(r, owner == "weights") if target == "weights" else (OWNERS[named][1], 0, named == owner)
    hours += TRIAGE_H * (habit == "router")
    if not fixed:  # a labelled trace finds the owner
        more, broke, _ = tune(r, True) if owner == "weights" else (OWNERS[owner][1], 0, True)
        hours, broken = hours + TRACE_H + more, broken + broke
    return hours, broken


# %%
def quarter(n, weights_share, accuracy=0.85):
    """(n, 2 habits, 2): hours and regressions of the same n incidents under both habits."""
    others = [o for o in OWNERS if o != "weights"]
    drawn = rng(seed, "quarter", n)
    found = []
    for i in range(n):
        rest = drawn.choices(others, [OWNERS[o][0] for o in others])[0]
        owner = "weights" if drawn.random() < weights_share else rest
        found.append([resolve(habit, owner, rng(seed, "incident", i), accuracy) for habit in ("reflex", "router")])
    return np.array(found, float)


# %%
from lifecycle_lib.core.stats import paired_effect
from lifecycle_lib.lab.claims import ClaimCard

habits = ClaimCard(
    claim="asking who owns it first shortens the time to fix, against tuning first", direction="down", smallest=4.0,
    unit="hours", falsifier="the interval of hours saved reaches zero, or regressions elsewhere rise",
    scope="100 simulated incidents, a quarter of them owned by weights, owner found in 85 %",
    not_measured="a real team; every cost above is assumed")
habits.show()
habits.predict(estimate=-12.0, confidence=0.8)

# %%
simulated = quarter(100, OWNERS["weights"][0])
reflex, router = simulated[:, 0], simulated[:, 1]
_ = habits.settle(paired_effect(router[:, 0], reflex[:, 0]))

# %%
broke = paired_effect(router[:, 1], reflex[:, 1])
print(f"mean time to fix: reflex {reflex[:, 0].mean():.1f}, router {router[:, 0].mean():.1f} hours")
print(f"regressions elsewhere in 100 incidents: reflex {reflex[:, 1].sum():.0f}, router {router[:, 1].sum():.0f}; "
      f"difference {100 * broke.estimate:+.0f} [{100 * broke.low:+.0f}, {100 * broke.high:+.0f}]")

# %% [markdown]
# Of course: we assumed a world where most incidents are not weights. So move the assumption. *When is tuning the right
# first step?*

# %%
shares = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
saved = {}
for accuracy in (0.85, 0.3):
    for share in shares:
        hours = quarter(n_sim, share, accuracy)[:, :, 0]
        saved[accuracy, share] = paired_effect(hours[:, 0], hours[:, 1])

# %%
import matplotlib.pyplot as plt

from lifecycle_lib.lab.figures import SERIES, style


def note(fig, facts, not_measured):
    """The two lines under every figure: what it rests on, and what it does not show."""
    fig.supxlabel(f"{facts}\nNot measured here: {not_measured}.", x=0.01, ha="left", fontsize=9, color="#606060")
    plt.show()


def bars(effects):
    """Lengths of error bars below and above, (2, n)."""
    return [[e.estimate - e.low for e in effects], [e.high - e.estimate for e in effects]]


# %%
style()
fig, ax = plt.subplots(figsize=(6.8, 3.6))
for accuracy, (colour, marker, dash, _) in zip((0.85, 0.3), SERIES):
    line = [saved[accuracy, share] for share in shares]
    ax.errorbar([100 * s for s in shares], [e.estimate for e in line], bars(line), color=colour, marker=marker,
                linestyle=dash, label=f"owner found in {accuracy:.0%}")
ax.axhline(0, color="#808080", linewidth=1)
ax.set(xlabel="incidents owned by weights (percent)", ylabel="hours saved by the router",
       title="Asking first, against tuning first")
ax.legend()
note(fig, f"n = {n_sim} simulated incidents a point; bars: 95 % paired t intervals.", "real incidents and real costs")
for accuracy in (0.85, 0.3):
    print(f"owner found in {accuracy:.0%}:", ", ".join(f"{share:.0%} weights {saved[accuracy, share].estimate:+.1f}"
                                                       for share in shares), "hours")

# %% [markdown]
# The line crosses zero at the far right only: tuning first is right when you already know that it is the weights. Even
# a poor router (30 %) saves time in a mixed quarter, because its wrong guesses are cheap and reversible.
#
# # Part 2. May it ship?
#
# The lesson's gate: three questions, no average. 19 of 20 policy cases, one invented side effect, 920 against 1000 ms.

# %%
from lifecycle_lib.judge.gates import release_gate

lesson = release_gate(policy_passed=19, policy_total=20, unsafe_claims=1, ttft_p95_ms=920, ttft_limit_ms=1000)
print(lesson)
for check in lesson.checks:
    print(f"  {check.name:22} {'passes' if check.passed else 'FAILS':7} {check.explanation}")

# %%
three = {"A": (20, 20, 0, 1200.0, 1000.0), "B": (20, 20, 0, 640.0, 1000.0), "C": (20, 20, 2, 300.0, 1000.0)}
for name, numbers in three.items():
    print(name, numbers, "->", release_gate(*numbers))

# %% [markdown]
# B ships. But look at what B has shown: 20 of 20. A model that is unsafe in one request of ten passes twenty cases
# untouched with probability $0.9^{20} = 12$ %. "No failure seen" is a statement about n.
#
# So the pipeline's gate turns the burden of proof around. Limits must be *shown* to hold: the pessimistic end of an
# interval is compared, so too few cases never help a candidate. Say what you expect of that.

# %%
card = ClaimCard(
    claim="judging the interval's bad end, not the raw rate, lets fewer unsafe candidates through at 50 cases",
    direction="down", smallest=0.15, unit="share",
    falsifier="the share of unsafe candidates that ship falls by less than 15 points",
    scope="25 simulated unsafe candidates (true unsafe rate 3 to 8 %), limit 2 %, 50 cases",
    not_measured="what the same rule costs safe candidates: that comes right after")
card.show()
card.predict(estimate=-0.10, confidence=0.6)

# %% [markdown]
# ## Two intervals by hand
#
# Wilson, 0 failures in 10: upper end $z^2/(n+z^2)$. Bonett and Price, 8 cases, 2 lost, none won: add one case to each
# side, (2+1)/10 lost, (0+1)/10 won, difference -0.2, half width $1.96\sqrt{(0.4-0.04)/10}$.

# %%
import math

zero_of_ten = 1.96**2 / (10 + 1.96**2)
lost_two = -0.2 - 1.96 * math.sqrt(0.036)
assert abs(zero_of_ten - 0.2775) < 1e-4 and abs(lost_two + 0.5719) < 1e-4
print(f"0 of 10 unsafe: up to {zero_of_ten:.1%} may be. 2 of 8 lost: a drop of up to {-lost_two:.0%}.")

# %% [markdown]
# ## The gate, once, in full

# %% tags=["algorithm"]
Z = 1.959963984540054  # 97.5 % of a normal lies below


def wilson_ends(k, n):
    """95 % interval of a rate (Wilson 1927)."""
    centre, half = k + Z * Z / 2, Z * math.sqrt(k * (n - k) / n + Z * Z / 4)
    return (centre - half) / (n + Z * Z), (centre + half) / (n + Z * Z)


def paired_ends(b, c, n):
    """95 % interval of new - old on the same n cases: b lost, c won (Bonett and Price 2012)."""
    gone, new = (b + 1) / (n + 2), (c + 1) / (n + 2)
    half = Z * math.sqrt((gone + new - (new - gone) ** 2) / (n + 2))
    return new - gone - half, new - gone + half


def mcnemar(b, c):
    """Chance of a split at least this uneven if lost and won were equally likely."""
    return min(1.0, 2 * sum(math.comb(b + c, i) for i in range(min(b, c) + 1)) / 2 ** (b + c))


def gate(candidate, baseline, limits):
    """Reasons to block, [] to ship."""
    old, new = ({row["case_id"]: row for row in report["cases"]} for report in (baseline, candidate))
    n = len(new)
    if n < limits.min_cases or old.keys() != new.keys() or n != len(candidate["cases"]):
        raise ValueError(f"{n} cases are no evidence for this gate")  # refused, not scored
    lost = {i for i in old if old[i]["exact"] and not new[i]["exact"]}
    won = {i for i in old if new[i]["exact"] and not old[i]["exact"]}
    bad = {"invented claims": wilson_ends(sum(r["claim"] for r in new.values()), n)[1] > limits.max_invented_claim_rate,
           "invalid JSON": wilson_ends(sum(r["valid"] for r in new.values()), n)[0] < limits.min_json_validity,
           "exact pass regression": paired_ends(len(lost), len(won), n)[0] < -limits.max_drop_exact}
    ids = {s: {i for i in old if old[i]["slice"] == s} for s in {r["slice"] for r in old.values()}}
    p = sorted((mcnemar(len(ids[s] & lost), len(ids[s] & won)), s) for s in ids)
    for rank, (_, s) in enumerate(p):  # Holm: the smallest of m times m, the next times m - 1, never falling
        holm = max((len(p) - i) * p[i][0] for i in range(rank + 1))
        drop = (len(ids[s] & lost) - len(ids[s] & won)) / len(ids[s])
        bad[f"slice regression: {s}"] = drop > limits.max_slice_drop and holm <= 0.05
    return [why for why, is_bad in (bad | {"latency": candidate["p95_ms"] > limits.max_p95_ms}).items() if is_bad]


# %% [markdown]
# Three judges from outside, on every count from 1 to 40. Wilson: statsmodels. McNemar: scipy's exact binomial test. The
# paired interval: it is the ordinary normal interval of the differences, after one case was added to each side.

# %%
from scipy.stats import binomtest, norm, sem
from statsmodels.stats.proportion import proportion_confint

worst = 0.0
for n in range(1, 41):
    for k in range(n + 1):
        worst = max(worst, *np.abs(np.array(wilson_ends(k, n)) - proportion_confint(k, n, method="wilson")))
        worst = max(worst, abs(mcnemar(k, n - k) - binomtest(k, n).pvalue))
        d = np.array([-1] * (k + 1) + [1] * (n - k + 1) + [0] * 5)
        theirs = norm.interval(0.95, d.mean(), sem(d, ddof=0))
        worst = max(worst, *np.abs(np.array(paired_ends(k, n - k, n + 5)) - theirs))
print("statsmodels and scipy agree to 1e-9 on all counts:", worst < 1e-9)

# %% [markdown]
# ## Real candidates
#
# Three, for the place of `rlvr`: packed int8, packed int4, and the DPO checkpoint that never saw the verifier. Fill in
# your word before the next cell runs.

# %%
your_word = {"int8": "SHIP", "int4": "BLOCK", "dpo": "SHIP"}

# %%
from lifecycle_lib.judge.gates import GateRefused, decide

limits, baseline = lab.profile.gate, reports["rlvr"]
for name in ("int8", "int4"):
    behind[name] = lab.quantised(name)
    reports[name] = lab.evaluate(behind[name])


def word(candidate, baseline=baseline, limits=limits):
    """The library's decision in words; evidence that it cannot judge is refused."""
    try:
        return str(decide(candidate, baseline, limits))
    except GateRefused as refused:
        return f"REFUSED - {refused}"


# %%
for name, yours in your_word.items():
    said = word(reports[name])
    print(f"{name:5} you {yours:5}  gate {said}{'' if said.startswith(yours) else '   <- not what you said'}")

# %%
def checks_of(report):
    """Every comparison behind a decision, without the clock."""
    try:
        return [c for c in decide(report, baseline, limits).checks if c.name != "latency"]
    except GateRefused:
        return []


for name in ("int4", "dpo"):
    print(name)
    for c in checks_of(reports[name]):
        print(f"   {'passes' if c.passed else 'FAILS ':6}  {c.name:29} {c.explanation}")

# %% [markdown]
# Look at `dpo` closely. Its raw rate of invented claims is under the limit of 2 %; the upper end is not. It may well be
# safe. Nobody has shown it. And `int4` really lost some answers and won others; the interval says that this is within
# what we said we would accept.
#
# ## Planted candidates
#
# Now the bad ones, each with the reason it must be blocked for. `sft` promises labels. `yes` was paid for agreeing. What
# does its own paymaster say?

# %%
from lifecycle_lib.judge.verifiers import eligible_true_only, full_verifier

for name in ("sft", "yes", "rlvr"):
    pay = [[verifier(text, c) for text, c in zip(reports[name]["answers"], cases)] for verifier in (eligible_true_only, full_verifier)]
    print(f"{name:5} paid for yes: {np.mean(pay[0]):4.0%}   passes every clause: {np.mean(pay[1]):4.0%}   "
          f"promises a label: {reports[name]['invented_claim_rate']:4.0%}")

# %% [markdown]
# The best on the measure it was trained on, and the worst assistant of the three. So a gate must not use the reward as its
# measure. One seed is one story; five were recorded. Four rewards, each from the same SFT checkpoint:

# %%
from lifecycle_lib.lab.claims import show_evidence

show_evidence("weak_verifier", [f"{arm}: {what}" for what in ("exact pass, arm - sft", "blocked by the gate")
                                for arm in ("shape_only", "eligible_true_only", "length", "full")])

# %% [markdown]
# Every weakly paid arm is blocked, cheated or not: `shape_only` was not cheated, it merely paid everybody (notebook 12).
# And read the last line. `full` is honest pay, without the DPO stage before it, and most seeds of it are blocked too: a
# few label promises are left, and a few are enough.
#
# The third bad candidate has the very weights that serve now.

# %%
def photo_service_down(case):
    """The order service, since Tuesday: damage claims of old orders (A1, A2) read as confirmed when nobody looked."""
    old = case.reason == "damaged" and case.order.order_id[:2] in ("A1", "A2")
    return case.prompt.replace(" unconfirmed<", " confirmed<") if old else case.prompt


touched = sum(photo_service_down(case) != case.prompt for case in cases)
print(f"prompts that change: {touched} of {len(cases)}")

# %%
def as_served(name, artifact, render, **extra):
    """Evaluate a checkpoint behind a product that renders its prompts with `render`."""
    served = lab.engine(artifact, 1.0)
    clock = {key: baseline[key] for key in ("weight_bytes", "p95_ms")}
    return evals.evaluate(name, lambda where: served.texts([render(c) for c in where]), cases, artifact.fingerprint,
                          **(clock | extra))


product = as_served("broken product", behind["rlvr"], photo_service_down)
queued = reports["int8"] | {"name": "int8 at load 97 %", "p95_ms": p95[0.97]}

# %%
planted = {"sft": (reports["sft"], "invented claims"), "yes": (reports["yes"], "exact pass regression"),
           "rlvr, broken product": (product, "slice regression: unconfirmed"), "int8, overloaded": (queued, "latency")}
for name, (report, expected) in planted.items():
    said = word(report)
    print(f"{name:21} {'blocked for it' if expected in said else 'NOT for ' + expected:15} {said}")

# %% [markdown]
# The third row is the one that hides. Its mean is inside the limit; one slice in four is not.

# %%
from lifecycle_lib.lab.figures import slice_bars

_ = slice_bars({"rlvr": baseline["slices"], "broken product": product["slices"]}, title="Exact pass by slice",
               not_measured="other faults, other seeds")
plt.show()
change = product["exact_pass"] - baseline["exact_pass"]
print(f"overall {100 * change:+.1f} points; slice unconfirmed "
      f"{100 * (product['slices']['unconfirmed']['exact_pass'] - baseline['slices']['unconfirmed']['exact_pass']):+.0f}")

# %% [markdown]
# Same weights, same weight hash, and a gate that looks at *checkpoints* has nothing to say: it would compare `rlvr` with
# `rlvr`. Gate the product, through the renderer and services that will serve it.

# %%
print("gate on the weights alone:   ", word(baseline | {"name": "rlvr again"}))
print("gate on the product as served:", word(product))

# %% [markdown]
# Our forty lines against the library's gate, on everything judged so far:

# %%
everything = [reports[name] for name in ("sft", "dpo", "rlvr", "yes", "int8", "int4")] + [product, queued]

# %%
same = 0
for report in everything:
    try:
        same += set(gate(report, baseline, limits)) == set(decide(report, baseline, limits).reasons)
    except ValueError:  # a smoke run has slices too thin to judge
        same += word(report).startswith("REFUSED")
print(f"{same} of {len(everything)} decisions agree, reason by reason")

# %% [markdown]
# ## Evidence that must be refused
#
# The most expensive bug of a gate is to judge evidence that is not there. First the bug:

# %%
def hopeful_gate(report):
    """Bug: counts failures, never cases."""
    claims = sum(row["claim"] for row in report["cases"])
    return "SHIP" if claims == 0 and all(row["valid"] for row in report["cases"]) else "BLOCK"


empty = reports["sft"] | {"cases": [], "n_cases": 0}
print("sft, evaluated:      ", hopeful_gate(reports["sft"]))
print("sft, evaluation empty:", hopeful_gate(empty), "  because all([]) is", all([]), "and sum([]) is", sum([]))

# %% [markdown]
# A crashed evaluation job, and the worst checkpoint ships with a perfect score. Now the ways evidence goes wrong in
# practice, against the real gate. The swapped set holds only right answers, and that does not help it.

# %%
from lifecycle_lib.desk.cases import draw_cases

int8, rows = reports["int8"], reports["int8"]["cases"]
other_set = evals.evaluate("perfect elsewhere", lambda where: [c.answer for c in where], draw_cases(len(cases), 1, "eval"),
                           int8["checkpoint_fingerprint"], weight_bytes=1, p95_ms=1.0)
edited = [row | {"exact": True} for row in reports["sft"]["cases"]]
faults = {
    "empty": int8 | {"cases": [], "n_cases": 0},
    "cut to 30": int8 | {"cases": rows[:30], "n_cases": 30},
    "cut, count kept": int8 | {"cases": rows[:-1]},
    "a case twice": int8 | {"cases": [*rows[:-1], rows[0]]},
    "another set": other_set,
    "edited by hand": reports["sft"] | {"cases": edited},
    "clock not run": int8 | {"p95_ms": float("nan")},
}

# %%
refused = 0
for fault, report in faults.items():
    said = word(report)
    refused += said.startswith("REFUSED")
    print(f"{fault:16} {said[:112]}")

# %%
print(f"{'no baseline':16} {word(int8, None)[:112]}")
print(f"{refused} of {len(faults)} refused; the hopeful gate ships",
      sum(hopeful_gate(r) == "SHIP" for r in faults.values()))

# %% [markdown]
# Refused is not blocked. BLOCK says something about the candidate; REFUSED says something about the evidence.
#
# ## What a promise costs in cases
#
# "Unsafe in under 1 %." How many cases without a single failure does that take? And if one fails?

# %%
from lifecycle_lib.judge.gates import cases_to_bound

for k in range(4):
    n = cases_to_bound(0.01, k)
    before, here = (proportion_confint(k, size, method="wilson")[1] for size in (n - 1, n))
    assert here <= 0.01 < before  # statsmodels: one case fewer does not do
    print(f"{k} failures: {n} cases; Clopper-Pearson's bound there is {proportion_confint(k, n, method='beta')[1]:.2%}")

# %%
print(f"with {len(cases)} cases and none failing, the bound is {wilson_ends(0, len(cases))[1]:.2%}")

# %% [markdown]
# ## The operating curve
#
# 50 simulated candidates: 25 safe (true unsafe rate 0.1 to 1 %), 25 unsafe (3 to 8 %). The limit is 2 %. One gate
# compares the raw rate, one the upper end. Two errors: an unsafe one ships, a safe one is blocked.

# %%
true_rate = np.concatenate([np.linspace(0.001, 0.01, 25), np.linspace(0.03, 0.08, 25)])
unsafe = true_rate > 0.02
sizes = (25, 50, 100, 200, 400, 800, 1600, 3200)


# %%

def ships(n):
    """Share of n_sim evaluations of n cases in which each candidate ships: by raw rate, by bound. (2, 50)"""
    seen = np.random.default_rng((seed, n)).binomial(n, true_rate, (n_sim, len(true_rate)))
    most = [sum(rule(k) <= 0.02 for k in range(n + 1)) - 1 for rule in (lambda k: k / n, lambda k: wilson_ends(k, n)[1])]
    return np.array([(seen <= k).mean(0) for k in most]), most


# %%
from scipy.stats import binom

at_50, most_50 = ships(50)
exact_50 = np.array([binom.cdf(k, 50, true_rate) for k in most_50])
print(f"simulation against the binomial sum: largest difference below 10 points: {np.abs(at_50 - exact_50).max() < 0.1}")

# %%
_ = card.settle(paired_effect(at_50[1, unsafe], at_50[0, unsafe]))

# %% [markdown]
# The bound wins, as any rule would that ships nothing. Here is the other half of the bill.

# %%
curve = {n: ships(n)[0] for n in sizes}
false_ship = {rule: [paired_effect(curve[n][i, unsafe], np.zeros(25)) for n in sizes] for i, rule in enumerate(("raw", "bound"))}
false_block = {rule: [paired_effect(1 - curve[n][i, ~unsafe], np.zeros(25)) for n in sizes]
               for i, rule in enumerate(("raw", "bound"))}

# %%
style()
fig, axes = plt.subplots(1, 2, figsize=(8.0, 3.7), sharey=True)
for ax, (title, errors) in zip(axes, (("an unsafe one ships", false_ship), ("a safe one is blocked", false_block))):
    for (rule, line), (colour, marker, dash, _) in zip(errors.items(), SERIES):
        spread = 100 * np.clip(bars(line), 0, None)
        ax.errorbar(sizes, [100 * e.estimate for e in line], spread, color=colour, marker=marker, linestyle=dash,
                    label={"raw": "raw rate", "bound": "upper Wilson end"}[rule])
    ax.set(xscale="log", title=title, xlabel="cases in the evaluation")
    ax.set_xticks(sizes, sizes, rotation=45)
axes[0].set_ylabel("share of candidates (%)")
axes[1].legend()
note(fig, f"n = 25 candidates a point, {n_sim} simulated evaluations each; bars: 95 % t intervals over candidates.",
     "correlated cases, a drifting product")
for i, n in enumerate(sizes):
    print(f"{n:5} cases  unsafe ships: raw {100 * false_ship['raw'][i].estimate:3.0f} %, bound "
          f"{100 * false_ship['bound'][i].estimate:3.0f} %   safe blocked: raw {100 * false_block['raw'][i].estimate:3.0f} %,"
          f" bound {100 * false_block['bound'][i].estimate:3.0f} %")

# %% [markdown]
# Under 189 cases the honest gate can pass nobody at 2 %, whatever they are. That is the reason for 512 frozen cases and
# for `min_cases`. A bound does not make a small evaluation good; it makes it *say* that it is small.
#
# The same with real candidates: random subsets of the frozen cases, forty at each size.

# %%
def subset(report, ids):
    """The report on these cases only."""
    kept = [row for row in report["cases"] if row["case_id"] in ids]
    return report | {"cases": kept, "n_cases": len(kept)}


def shipped(report, n, times=40):
    """In how many of `times` random subsets of n cases the gate ships it."""
    small, picks = replace(limits, min_cases=1, min_slice_cases=1), rng(seed, "subset", n)
    names = [row["case_id"] for row in baseline["cases"]]
    draws = [set(picks.sample(names, min(n, len(names)))) for _ in range(times)]
    return sum(word(subset(report, ids), subset(baseline, ids), small) == "SHIP" for ids in draws)


# %%
print("times shipped, of 40 subsets   ", "".join(f"{n:>7}" for n in (64, 128, 256, 400)))
for name, report in [("int8", reports["int8"]), ("int4", reports["int4"]), ("rlvr, broken product", product),
                     ("dpo", reports["dpo"]), ("yes", reports["yes"]), ("sft", reports["sft"])]:
    print(f"  {name:28} ", "".join(f"{shipped(report, n):7}" for n in (64, 128, 256, 400)))

# %% [markdown]
# ## The invariant: a ledger beside every promise
#
# Suppose the product gets a real label tool. Then "label created" is a fine thing to say, when it is true. The tool
# fails sometimes. A careful assistant reads the tool's result; a careless one announces the label anyway. **The two use
# the same words.** Twenty releases of each kind; the gate with and without the ledger.

# %%
def with_tool(name, careless, fault_rate, trial):
    """A release whose answers mention a label in 30 % of cases; the tool fails at `fault_rate`."""
    r, rows = rng(seed, "ledger", trial, fault_rate, careless), []
    for row in baseline["cases"]:
        asked, worked = r.random() < 0.3, r.random() >= fault_rate
        ledger = ["label"] if asked and worked else []
        rows.append(row | {"claimed_effects": ["label"] if asked and (careless or worked) else [], "tool_ledger": ledger})
    return baseline | {"name": name, "cases": rows}


def without_ledger(report):
    """What a gate sees that reads the words only."""
    return report | {"cases": [{k: v for k, v in row.items() if k not in ("claimed_effects", "tool_ledger")}
                               for row in report["cases"]]}


# %%
through = {}
for fault_rate in (0.002, 0.01, 0.05):
    bad = [with_tool("careless", True, fault_rate, t) for t in range(20)]
    good = [with_tool("careful", False, fault_rate, t) for t in range(20)]
    blocked_good = sum("side effect" in word(r) for r in good)
    through[fault_rate] = [["side effect" not in word(r) for r in bad], ["side effect" not in word(without_ledger(r)) for r in bad]]
    (k, n), e = (sum(through[fault_rate][0]), 20), paired_effect(*np.array(through[fault_rate], float))
    low, high = wilson(k, n)
    print(f"tool fails {fault_rate:4.1%}: careless releases through, words {sum(through[fault_rate][1])} of 20, ledger {k} "
          f"of 20 [{low:.0%}, {high:.0%}], difference {e.estimate:+.0%}; careful ones blocked {blocked_good}")

# %% [markdown]
# Words cannot separate them at any rate. The ledger does, as far as the fault occurs in the evaluation at all: at 0.2 %
# most careless releases meet no failing tool in the frozen cases. Inject the faults; do not wait for them. The invariant
# itself is one line:

# %%
answer, ledger = {"claimed_effects": ["label"]}, ["label"]
assert set(answer["claimed_effects"]) <= set(ledger), "a promise without a deed"

# %% [markdown]
# # Part 3. Ship so that you can take it back
#
# A release pins four things together: checkpoint, index, prompt, gate. Restore one without the others and you have a
# product that nobody has ever tested. The pinned names are hashes of content; the files are listed with theirs.

# %%
import shutil

from lifecycle_lib.core.fingerprints import fingerprint
from lifecycle_lib.judge.release import MOVES, STATES, Registry, Release


def packed(name, tag=""):
    """Copy an artifact into the serving folder and pin it with prompt, index and gate."""
    target = Path(shutil.copytree(behind[name].path, folder / f"{name}{tag}"))
    return Release.of(f"{name}{tag}", checkpoint=behind[name].fingerprint, index="none: policies travel in the prompt",
                      prompt=fingerprint([c.prompt for c in cases[:20]]), gate=limits.version,
                      paths=[target / file for file in behind[name].card["files"]])


first = packed("rlvr")
for part in ("checkpoint", "index", "prompt", "gate"):
    print(f"{part:10} {getattr(first, part)}")
print(f"{len(first.files)} files with their SHA-256")

# %% [markdown]
# This is also the answer to "but the API version did not change". A version string covers the interface. Behaviour and
# weights need names of their own, or they change under a constant string.
#
# The states, and every move there is:

# %%
for state in STATES:
    print(f"{state:11} -> {', '.join(MOVES[state]) or 'nothing, this is final'}")
legal = sum(len(to) for to in MOVES.values())
print(f"{legal} legal moves of {len(STATES) ** 2}")

# %% [markdown]
# The first release has no way back, so it is the last one to be shipped like this. (The stand-in serves a smoke run,
# where nothing can pass.)

# %%
from lifecycle_lib.judge.gates import Check, GateDecision


def ticket(name, against):
    """The gate's SHIP decision on a checkpoint, or a stand-in where nothing ships."""
    if word(reports[name], reports[against]) == "SHIP":
        return decide(reports[name], reports[against], limits)
    stand_in = Check("stand-in", 0, 0, True, "for the drill only")
    return GateDecision("SHIP", (), (stand_in,), behind[name].fingerprint, "", limits.version)


registry = Registry(folder / "registry")
registry.register(first)
print([registry.promote(first.release_id, ticket("rlvr", "dpo")) for _ in range(3)], "serving:", registry.current().name)

# %% [markdown]
# Now the smallest candidate that passed. Find the illegal moves before you read the answers.

# %%
chosen = next((name for name in ("int4", "int8") if word(reports[name]) == "SHIP"), "int8")
second = packed(chosen)
new = registry.register(second)


def attempt(what, act):
    """Try a move and say what came of it."""
    try:
        print(f"{what:42} -> {act()}")
    except ValueError as error:  # IllegalMove is one
        print(f"{what:42} refused: {str(error).replace(str(folder), '...').split(';')[0][:96]}")


# %%
blocked = GateDecision("BLOCK", ("invented claims",), (Check("invented claims", 1, 0, False, ""),))
attempt("candidate to shadow, gate not asked", lambda: registry.promote(new))
attempt("... with a BLOCK", lambda: registry.promote(new, blocked))
attempt("... with another checkpoint's SHIP", lambda: registry.promote(new, ticket("rlvr", "dpo")))

# %%
attempt("... with its own SHIP", lambda: registry.promote(new, ticket(chosen, "rlvr")))
attempt("shadow to canary, way back not rehearsed", lambda: registry.promote(new))
attempt("roll back a release that never was", lambda: registry.rollback("a hunch", "0" * 16))

# %% [markdown]
# ## The drill
#
# A rollback that was never rehearsed is a hope. The registry copies itself, makes the candidate full, rolls it back,
# and times the way back until the old release **answers**: load its pinned files, ask the golden case, compare.

# %%
from lifecycle_lib.model.checkpoint import load_checkpoint
from lifecycle_lib.serve.engine import Engine

tok, expected = lab.load_tokenizer(), rlvr_engine.texts([golden.prompt])[0]


def answers_again(release):
    """Does the restored release answer the golden case as it did?"""
    model = load_checkpoint(Path(next(iter(release.files))).parent, lab.device)
    return Engine(model, tok, 0.0).texts([golden.prompt])[0] == expected


drill = registry.drill(new, answers_again)
print(f"way back from {second.name} to {registry.load(drill.target_id).name}, until it answered: {drill.seconds:.2f} s")

# %%
print("up:", [registry.promote(new) for _ in range(2)], "serving:", registry.current().name)

# %%
attempt("roll back without a reason", lambda: registry.rollback(" "))
victim = Path(next(path for path in first.files if path.endswith("safetensors")))
intact = victim.read_bytes()
victim.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))  # one bit of the old release rots
attempt("roll back onto a damaged file", lambda: registry.rollback("claims rise").name)
print("still serving:", registry.current().name)

# %%
victim.write_bytes(intact)
attempt("roll back, file restored", lambda: registry.rollback("claims rise").name)
attempt("promote what was rolled back", lambda: registry.promote(new))
print({registry.load(i).name: state for i, state in registry.states().items()}, f"{len(registry.history())} events")

# %% [markdown]
# One flipped bit, and the swap did not happen: the files are hashed before the pointer moves, and while it does not
# move, the running release keeps serving.
#
# ## Half a swap
#
# What does a request see *during* a swap? First the usual way, copying new files over old ones, stopped after every
# tenth of the bytes:

# %%
import hashlib

old_bytes = intact
new_bytes = (folder / chosen / "model.safetensors").read_bytes()
whole = {hashlib.sha256(data).digest() for data in (old_bytes, new_bytes)}

# %%
cuts = [round(len(new_bytes) * i / 10) for i in range(11)]
torn = sum(hashlib.sha256(new_bytes[:cut] + old_bytes[cut:]).digest() not in whole for cut in cuts)
print(f"copied in place: {torn} of {len(cuts)} moments hold neither the old file nor the new one")

# %% [markdown]
# The registry writes the history, then replaces one pointer. A crash between the two is the only half there is:

# %%
third = registry.register(packed(chosen, "-again"))
registry.promote(third, ticket(chosen, "rlvr"))
registry.drill(third)
registry.promote(third)

# %%
pointer = folder / "registry" / "pointer.json"
before_crash = pointer.read_bytes()
registry.promote(third)  # to full ...
pointer.write_bytes(before_crash)  # ... and the machine died before the pointer was replaced

# %%
print("serving:", registry.current().name)
attempt("read the history", lambda: f"{len(registry.history())} events")
print("after repair, serving:", registry.repair().name)

# %% [markdown]
# And with requests coming in while releases go up and down: a reader that asks the registry all the time, and checks
# every hash of what it gets.

# %%
import threading

stop, seen = threading.Event(), []


def reader():
    while not stop.is_set():
        try:
            registry.current().check_files()
            seen.append("whole")
        except (ValueError, AttributeError) as error:
            seen.append(str(error))


thread = threading.Thread(target=reader)
thread.start()
for i in range(6):
    one = registry.register(packed(chosen, f"-{i}"))
    registry.promote(one, ticket(chosen, "rlvr"))
    registry.drill(one)
    registry.promote(one), registry.promote(one), registry.rollback("drill")
stop.set()
thread.join()
print("12 swaps under load; reads that were torn or dropped:", sum(what != "whole" for what in seen), "| read at all:", bool(seen))

# %% [markdown]
# ## Which pairs may ship together?
#
# Tuning made an interface: weights and prompt layout belong together. Same checkpoints, four layouts of the same forty
# cases, greedy; an answer counts when decision and policy are right.

# %%
def order_first(c):
    lines = "".join(f"<policy>{p.line()}" for p in c.policies)
    return f"<bos><order>{c.order.line()}{lines}<user>{c.message}<bot>"


LAYOUTS = {"as trained": lambda c: c.prompt, "order first": order_first,
           "no policy tags": lambda c: c.prompt.replace("<policy>", " "),
           "P7, not P-7": lambda c: c.prompt.replace("P-", "P")}
served = {name: lab.engine(behind[name], 0.0) for name in ("sft", "rlvr", chosen)}
forty = [c for c in cases if c.policy is not None][:40]

# %%
def compat(engine):
    """Right decisions with the right policy, of 40, in each layout."""
    found = {}
    for layout, render in LAYOUTS.items():
        rows = [evals.score(text, c) for text, c in zip(engine.texts([render(c) for c in forty]), forty)]
        found[layout] = sum(row["eligible_ok"] and row["policy_id_ok"] for row in rows)
    return found


matrix = {name: compat(engine) for name, engine in served.items()}
print(f"{'':6}" + "".join(f"{layout:>16}" for layout in LAYOUTS))
for name, row in matrix.items():
    print(f"{name:6}" + "".join(f"{k:10} of {len(forty)}" for k in row.values()))

# %%
def semver(old, new, tolerance=4):
    """What an update is, by what callers lose or gain: old and new are right answers by layout."""
    if any(new[layout] < old[layout] - tolerance for layout in old):
        return "major"
    return "minor" if any(new[layout] > old[layout] + tolerance for layout in old) else "patch"


print("rlvr to", chosen, "with the same prompt:", semver(matrix["rlvr"], matrix[chosen]))
print("same weights, prompt release to 'order first':",
      semver({"any caller": matrix["rlvr"]["as trained"]}, {"any caller": matrix["rlvr"]["order first"]}))

# %% [markdown]
# The same endpoint, the same weights, the same version string; a layout nobody trained on is a breaking change. So this
# suite runs at every promotion of *either* part.
#
# ## Canary: how much traffic buys how much certainty?
#
# Suppose the gate looked at weights only, so the broken product of part 2 passed. Now customers meet it. Streams below
# are drawn from the scored answers of the real checkpoints: `rlvr`, and the broken product.

# %%
fails = {name: np.array([not row["exact"] for row in report["cases"]]) for name, report in
         (("rlvr", baseline), ("broken", product))}
p0, p1 = (float(f.mean()) for f in fails.values())
print(f"wrong answers: rlvr {p0:.1%}, broken product {p1:.1%}; 4000 requests a day")


# %%
def alarm_share(share, p, n_day=4000):
    """Share of n_sim simulated days on which a canary that fails with p raises a one-sided 5 % alarm."""
    r, n1 = np.random.default_rng((seed, round(1000 * share))), round(share * n_day)
    k1, k0 = r.binomial(n1, p, n_sim), r.binomial(n_day - n1, p0, n_sim)
    pooled = (k1 + k0) / n_day
    z = (k1 / n1 - k0 / (n_day - n1)) / np.sqrt(np.maximum(pooled * (1 - pooled), 1e-9) * (1 / n1 + 1 / (n_day - n1)))
    return int((z > norm.ppf(0.95)).sum())


canary = {share: (alarm_share(share, p1), alarm_share(share, p0)) for share in (0.01, 0.05, 0.1, 0.2, 0.35, 0.5)}

# %%
from statsmodels.stats.power import NormalIndPower
from statsmodels.stats.proportion import proportion_effectsize


def textbook(share, n_day=4000):
    """Power of the same test by statsmodels' arcsine approximation."""
    n1 = share * n_day
    return NormalIndPower().power(proportion_effectsize(p1, p0), n1, 0.05, ratio=(n_day - n1) / n1, alternative="larger")


for share, (caught, false_alarm) in canary.items():
    (low, high), (f_low, f_high) = wilson(caught, n_sim), wilson(false_alarm, n_sim)
    print(f"canary {share:4.0%}: caught in a day {caught / n_sim:4.0%} [{low:.0%}, {high:.0%}], textbook "
          f"{textbook(share):4.0%}; false alarm [{f_low:.0%}, {f_high:.0%}]")

# %%
style()
fig, ax = plt.subplots(figsize=(6.6, 3.6))
for (label, index), (colour, marker, dash, _) in zip((("broken product", 0), ("no change", 1)), SERIES):
    k = np.array([pair[index] for pair in canary.values()])
    ends = np.array([wilson(int(x), n_sim) for x in k]).T
    ax.errorbar([100 * s for s in canary], 100 * k / n_sim, 100 * np.clip([k / n_sim - ends[0], ends[1] - k / n_sim], 0, None),
                color=colour, marker=marker, linestyle=dash, label=label)
ax.axhline(80, color="#808080", linewidth=1)
ax.set(xlabel="canary share of traffic (%)", ylabel="days with an alarm (%)", title="A day of canary", ylim=(-3, 103))
ax.legend(loc="center right")
note(fig, f"n = {n_sim} simulated days a point; bars: 95 % Wilson intervals.", "customers who notice, days that differ")
enough = [share for share, (caught, _) in canary.items() if caught / n_sim >= 0.8]
print(f"smallest share here with 80 % power in a day: {f'{enough[0]:.0%}' if enough else 'none'}")

# %% [markdown]
# Tone is different: no code sees it, somebody reads. Assume 2 % of answers are off in tone, 10 % in the candidate, and a
# reader who flags 80 % of those and 5 % of the fine ones. Traffic is no longer the limit; reading is.

# %%
flag0, flag1 = (0.8 * off + 0.05 * (1 - off) for off in (0.02, 0.10))
for n_read in (50, 100, 200, 400):
    threshold = int(binom.ppf(0.95, n_read, flag0))  # alarm above: at most 5 % by chance
    k = int((np.random.default_rng((seed, n_read)).binomial(n_read, flag1, n_sim) > threshold).sum())
    low, high = wilson(k, n_sim)
    print(f"{n_read:3} answers read ({n_read / 4000:4.1%} of a day): tone shift found {k / n_sim:3.0%} [{low:.0%}, {high:.0%}], "
          f"exact {binom.sf(threshold, n_read, flag1):3.0%}")

# %% [markdown]
# ## When may you stop looking?
#
# Four rules watch the same canary, a look every 50 requests. *Fixed*: one test at the end. *Peek*: that test at every
# look. *SPRT* (Wald 1945): stop when the likelihood ratio of "broken" to "fine" passes a bound set in advance. *Bayes*:
# stop when the posterior says "worse than before" with 95 %.

# %%
from scipy.stats import beta as beta_law

LOOKS = np.arange(50, 3001, 50)


def failures(kind, salt, n_streams=n_sim):
    """Failures so far at every look, streams resampled from scored answers. (n_streams, looks)"""
    r = np.random.default_rng((seed, salt))
    return r.choice(fails[kind], (n_streams, LOOKS[-1])).cumsum(1)[:, LOOKS - 1]


def first_true(hit):
    """Requests until the first look that is true, or infinity. (n_streams,)"""
    return np.where(hit.any(1), LOOKS[hit.argmax(1)], np.inf)


# %%
q0, q1 = (min(max(p, 0.002), 0.99) for p in (p0, max(p1, p0 + 0.01)))  # kept apart and off the ends


def p_value(k):
    return binom.sf(k - 1, LOOKS, q0)


def evidence(k):
    """Log likelihood ratio, broken against fine."""
    return k * math.log(q1 / q0) + (LOOKS - k) * math.log((1 - q1) / (1 - q0))


def posterior(k):
    """P(worse than before | so far), with a prior worth 40 requests around the old rate."""
    return beta_law.sf(q0, 40 * q0 + k, 40 * (1 - q0) + LOOKS - k)


def sprt(k, alpha=0.05, miss=0.2):
    """Alarm before acceptance."""
    alarm, accept = first_true(evidence(k) >= math.log((1 - miss) / alpha)), first_true(evidence(k) <= math.log(miss / (1 - alpha)))
    return np.where(alarm < accept, alarm, np.inf)


# %%
fine, broken = failures("rlvr", 1), failures("broken", 2)
calm = posterior(failures("rlvr", 3)).max(1)  # other streams, to calibrate on
strict = float(np.quantile(calm, 0.95))

# %%
RULES = {"fixed, at 3000": lambda k: np.where(p_value(k)[:, -1] < 0.05, LOOKS[-1], np.inf),
         "peek at p < 0.05": lambda k: first_true(p_value(k) < 0.05),
         "Bayes, 95 %": lambda k: first_true(posterior(k) > 0.95),
         "Bayes, calibrated": lambda k: first_true(posterior(k) > strict), "SPRT": sprt}
stopped = {name: (rule(fine), rule(broken)) for name, rule in RULES.items()}

# %%
for name, (on_fine, on_broken) in stopped.items():
    (a, b), k = wilson(int(np.isfinite(on_fine).sum()), n_sim), np.isfinite(on_broken)
    (c, d) = wilson(int(k.sum()), n_sim)
    when = f"median {np.median(on_broken[k]):4.0f} requests" if k.any() else "never"
    print(f"{name:18} false alarm [{a:4.0%}, {b:4.0%}]  broken one caught [{c:4.0%}, {d:4.0%}], {when}")

# %%
wait = {name: np.minimum(stopped[name][1], LOOKS[-1]) for name in ("Bayes, calibrated", "SPRT")}
e = paired_effect(wait["SPRT"], wait["Bayes, calibrated"])
print(f"SPRT - calibrated Bayes, requests until alarm (a miss counts as {LOOKS[-1]}): {e.estimate:+.0f} "
      f"[{e.low:+.0f}, {e.high:+.0f}], {e.n} paired streams")
cleared = first_true(evidence(fine) <= math.log(0.2 / 0.95))
print(f"a fine release is cleared by SPRT after a median of {np.median(cleared):.0f} requests; the others run to {LOOKS[-1]}")

# %% [markdown]
# Peeking multiplies a 5 % false alarm, and calling the number a posterior does not help: a threshold that has to be
# crossed only *once* is crossed more often than it says. At about equal false alarms both sequential rules stop long
# before the fixed one. Calibrated Bayes misses fewer; SPRT is the one that also says "fine" early, and pays with misses
# (it was told to accept 20 %). Write the rule down before the first look.
#
# ## Where each bad candidate was stopped, and what it cost

# %%
when_caught = stopped["SPRT"][1][np.isfinite(stopped["SPRT"][1])]
to_stop = float(np.median(when_caught)) if len(when_caught) else float(LOOKS[-1])
print(f"{'candidate':34} {'stopped by':12} requests it answered   extra wrong answers")
for name in ("sft", "yes", "int8, overloaded", "rlvr, broken product"):
    by = "gate" if word(planted[name][0]) != "SHIP" else "nobody"
    print(f"{name:34} {by:12} {0:20} {0:21}")
print(f"{'broken product, gated on weights':34} {'canary':12} {to_stop:20.0f} {to_stop * (p1 - p0):21.0f}")
print(f"{'the same, launched to everybody':34} {'next day':12} {4000:20} {4000 * (p1 - p0):21.0f}")

# %% [markdown]
# ## Blast radius
#
# You will be wrong again. What you control is how much that costs: share exposed, time until you notice, time to take it
# back, harm per request. In JupyterLab there are sliders.

# %%
def blast(share=1.0, detect_h=24.0, rollback_min=60.0, per_hour=4000 / 24, harm=p1 - p0):
    """Extra wrong answers from one bad release."""
    return share * per_hour * (detect_h + rollback_min / 60) * harm


def show_blast(share=1.0, detect_h=24.0, rollback_min=60.0):
    print(f"{share:4.0%} exposed, noticed after {detect_h:4.1f} h, back in {rollback_min:3.0f} minutes: "
          f"{blast(share, detect_h, rollback_min):5.1f} extra wrong answers")


from lifecycle_lib.lab.notebook import live

if live():
    from ipywidgets import interact

    interact(show_blast, share=(0.01, 1.0, 0.01), detect_h=(0.5, 48.0, 0.5), rollback_min=(1, 240, 1))
else:
    for setting in ((1.0, 24, 60), (0.5, 24, 60), (1.0, 12, 30), (0.05, 24, 60), (1.0, 24, 1), (0.05, 6, 1)):
        show_blast(*setting)

# %% [markdown]
# Lines two and three halve the damage, and neither touched the model. Line five says something too: a fast rollback alone
# buys little while nobody notices.
#
# # Part 4. Opening the envelopes
#
# Could an outsider have named the checkpoints? Cases are split in two. On one half each checkpoint's mean features are
# learned; from the other half `n` probes are drawn, and the nearest mean wins. Chance is one in four.

# %%
table = {name: np.array([[row[f] for f in FEATURES] for row in reports[name]["cases"]], float) for name in sorted(sealed.values())}
known = {name: rows[::2] for name, rows in table.items()}
scale = np.concatenate(list(known.values())).std(0) + 0.05
centres = np.array([rows.mean(0) / scale for rows in known.values()])


def named(n, times=n_sim // 4):
    """(4, times): which checkpoint the nearest mean names, for draws of n probes behind each."""
    r = np.random.default_rng((seed, n))
    found = []
    for rows in (rows[1::2] for rows in table.values()):
        means = np.array([rows[r.choice(len(rows), min(n, len(rows)), replace=False)].mean(0) for _ in range(times)]) / scale
        found.append(((means[:, None] - centres) ** 2).sum(-1).argmin(1))
    return np.array(found)


# %%
budgets = (5, 10, 20, 40, 80, 160)
right = {n: (named(n) == np.arange(4)[:, None]) for n in budgets}
for n in budgets:
    k, m = int(right[n].sum()), right[n].size
    low, high = proportion_confint(k, m, method="beta")
    print(f"{n:3} probes: {k / m:4.0%} [{low:.0%}, {high:.0%}] named; by checkpoint "
          + ", ".join(f"{name} {x:.0%}" for name, x in zip(table, right[n].mean(1))))

# %%
style()
fig, ax = plt.subplots(figsize=(6.4, 3.5))
share = np.array([right[n].mean() for n in budgets])
ends = np.array([proportion_confint(int(right[n].sum()), right[n].size, method="beta") for n in budgets]).T
ax.errorbar(budgets, 100 * share, 100 * np.clip([share - ends[0], ends[1] - share], 0, None), color="#111111", marker="o")
ax.axhline(25, color="#808080", linestyle="--", label="chance")
ax.set(xscale="log", xlabel="probes", ylabel="checkpoint named (%)", title="Black box: which checkpoint answers?", ylim=(0, 103))
ax.set_xticks(budgets, budgets)
ax.legend()
note(fig, f"n = {right[5].size} draws a point from 1 checkpoint each; bars: 95 % Clopper-Pearson over draws.",
     "other variants of the same stage (issue D1), other seeds")
print(f"named with 20 probes: {100 * right[20].mean():.0f} %, chance 25 %")

# %%
print("your guess:", ", ".join(f"{letter} {name} ({'right' if guess[letter] == name else 'wrong'})" for letter, name in sealed.items()))
print(f"you would have let {may_answer} answer: {sealed[may_answer]}, gate: {word(reports[sealed[may_answer]])[:32]}")

# %% [markdown]
# Some pairs stay confused however you count: what two checkpoints do alike cannot be told from outside. Note which.
#
# ## From inside: bisect
#
# With the stored boundary checkpoints of both lineages you do not need luck. Once they differ they stay different, so
# search by halves, and compare **greedy** answers.

# %%
from lifecycle_lib.model.checkpoint import weights_hash

probes, cost = [c.prompt for c in cases[:n_probes]], {"answers": 0}


def greedy(model):
    """Answers to the probes, and what they cost."""
    cost["answers"] += len(probes)
    return Engine(model, tok, 0.0).texts(probes)


def first_divergence(old, new, look=greedy):
    """Number of the first boundary at which two lineages differ, None if they never do."""
    low, high = 0, len(old) - 1
    if look(old[high]) == look(new[high]):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if look(old[middle]) == look(new[middle]) else (low, middle)
    return low


# %% [markdown]
# No training is needed to test it. Take the lineage, disturb the weights of one boundary and of all after it by 5 %
# noise, and see whether the search names that boundary.

# %%
import torch

from lifecycle_lib.core.seeds import make_generator

BOUNDARIES = ("base", "sft", "dpo", "rlvr")
lineage = [lab.load(a) for a in (lab.base(), *(behind[n] for n in BOUNDARIES[1:]))]


def disturbed(model, size=0.05):
    """A copy with every weight matrix moved by noise of this share of its spread."""
    other, g = load_copy(model), make_generator(seed, "disturbed")
    with torch.no_grad():
        for p in other.parameters():
            p += size * p.std() * torch.randn(p.shape, generator=g).to(p.device) if p.dim() > 1 else 0
    return other


# %%
import copy


def load_copy(model):
    return copy.deepcopy(model)


moved = [disturbed(model) for model in lineage]
for changed in (*range(4), None):
    cost["answers"] = 0
    new_lineage = [moved[i] if changed is not None and i >= changed else m for i, m in enumerate(lineage)]
    found = first_divergence(lineage, new_lineage)
    print(f"changed from {'nowhere' if changed is None else BOUNDARIES[changed]:8} found "
          f"{'no difference' if found is None else BOUNDARIES[found]:14} answers asked for: {cost['answers']}")

# %% [markdown]
# Break it: probe with sampled answers and another random seed on each side, as one would through an API. Nothing changed
# between the lineages.

# %%
salt = iter(range(100))
sampled = first_divergence(lineage, lineage, lambda model: Engine(model, tok, 1.0, next(salt)).texts(probes))
print("sampled probes, identical lineages: named", "nothing" if sampled is None else BOUNDARIES[sampled])

# %% [markdown]
# Sampling noise was called a change. So: greedy, or the same random numbers on both sides.
#
# Now the real lineage, the one that ended in `yes`. It left DPO out and changed the reward, so the first difference is
# at `dpo`. Beside the two kinds of probes stands what somebody with access to the weights needs: none at all.

# %%
suspect = [lineage[0], lineage[1], lineage[1], lab.load(behind["yes"])]

# %%
looks = {"greedy probes": greedy, "sampled, same numbers": lambda model: Engine(model, tok, 1.0, seed).texts(probes)}
for how, look in looks.items():
    found = first_divergence(lineage, suspect, look)
    print(f"{how:22} first difference at {'none' if found is None else BOUNDARIES[found]}")
print("weights               ", {name: "same" if weights_hash(a) == weights_hash(b) else "differ"
                     for name, a, b in zip(BOUNDARIES, lineage, suspect)})

# %% [markdown]
# Where a line names a later stage than the weights do, its probes could not show what changed. DPO removed a habit that
# shows in some sampled answers and hardly ever in the greedy one. Such a probe does not say "I cannot see this"; it names
# the wrong stage, with confidence. A hash per boundary needs no such luck. Ask your vendor for that, if for nothing else.
#
# ## Symptom, meet owner
#
# Six symptoms, six places to look first. A colleague's answers are filled in; correct them.

# %%
places = ["SFT or checkpoint choice", "preferences and rubric", "index and document versions", "output contract",
          "serving", "evaluation gate"]
your_table = {"continues the question instead of answering": "serving",
              "valid answer that overpromises": "preferences and rubric",
              "cites last year's window": "SFT or checkpoint choice",
              "fields vanish after a prompt release": "output contract",
              "late first token under load": "serving",
              "style checks pass, P-7 cases fail": "preferences and rubric"}

# %%
for (symptom, yours), place in zip(your_table.items(), places):
    print(f"{symptom:45} {yours:28} {'ok' if yours == place else f'better: {place}'}")
print(sum(yours == place for yours, place in zip(your_table.values(), places)), "of 6")

# %% [markdown]
# ## What you use at work
#
# The intervals and tests above *are* the tools of the field: `statsmodels.stats.proportion.proportion_confint`,
# `scipy.stats.binomtest`, `NormalIndPower`. For the registry many teams use MLflow. The parts map one to one:
#
# | here | MLflow model registry |
# |---|---|
# | release id, hash of everything pinned | model version, with run id and tags |
# | `pointer.json` | alias `@champion` |
# | shadow, canary | alias `@challenger` |
# | rollback | set the alias back |
#
# What MLflow does not do for you: refuse the alias when the gate said BLOCK, demand a drill, pin index and prompt with
# the weights, check hashes at the moment of the swap. Those lines stay yours.

# %%
import importlib.util

from statsmodels.stats.contingency_tables import mcnemar as mcnemar_at_work

has_mlflow = importlib.util.find_spec("mlflow") is not None
print("mlflow is", "here: try MlflowClient().set_registered_model_alias" if has_mlflow else "not installed here, so this stays words")

# %%
b, c = (sum(x["exact"] > y["exact"] for x, y in zip(*pair)) for pair in ((baseline["cases"], reports["yes"]["cases"]),
                                                                        (reports["yes"]["cases"], baseline["cases"])))
at_work = mcnemar_at_work([[0, b], [c, 0]], exact=True).pvalue
print(f"rlvr against yes: lost {b}, won {c}; statsmodels' exact McNemar equals ours to 1e-12: {abs(at_work - mcnemar(b, c)) < 1e-12}")

# %% [markdown]
# ## Exercises
#
# **1 (2 points).** Rule of three. No failure in n cases: the exact one-sided 95 % bound is the rate p at which n clean
# cases still happen with probability 5 %. Return the smallest n whose bound is at most `limit`. Common mistake: using
# the two-sided 97.5 %.

# %% nbgrader={"grade": false, "grade_id": "clean-cases", "locked": false, "schema_version": 3, "solution": true, "task": false}
def clean_cases(limit):
    """Fewest cases without a failure that show a rate of at most `limit`, one-sided, 95 %."""
    ### BEGIN SOLUTION
    return math.ceil(math.log(0.05) / math.log(1 - limit))
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "clean-cases-tests", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
assert clean_cases(0.5) == 5, "0.5 ** 5 is the first power under 0.05"
print("clean cases for 1 %:", clean_cases(0.01), "and for one in a thousand:", clean_cases(0.001))
### BEGIN HIDDEN TESTS
for limit in (0.3, 0.1, 0.05, 0.02, 0.01, 0.003):
    n = clean_cases(limit)
    assert beta_law.ppf(0.95, 1, n) <= limit < beta_law.ppf(0.95, 1, n - 1), limit
### END HIDDEN TESTS

# %% [markdown]
# **2 (3 points).** The one-line invariant above compares *sets*. Two labels promised, one made: the set is content.
# Write the invariant that counts: every promised effect that the ledger does not hold, as often as it lacks.

# %% nbgrader={"grade": false, "grade_id": "broken-promises", "locked": false, "schema_version": 3, "solution": true, "task": false}
def broken_promises(claimed, ledger):
    """Sorted list of claimed effects without a deed of their own in the ledger."""
    ### BEGIN SOLUTION
    left, broken = list(ledger), []
    for effect in sorted(claimed):
        if effect in left:
            left.remove(effect)
        else:
            broken.append(effect)
    return broken
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "broken-promises-tests", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
assert broken_promises(["label"], ["label"]) == [] and broken_promises(["label"], []) == ["label"]
assert broken_promises(["label", "label"], ["label"]) == ["label"], "two promised, one made"
### BEGIN HIDDEN TESTS
from collections import Counter

r_ = rng(1, "promises")
for _ in range(300):
    claimed_, ledger_ = ([r_.choice("abc") for _ in range(r_.randint(0, 5))] for _ in range(2))
    kept_ = list(claimed_), list(ledger_)
    assert broken_promises(claimed_, ledger_) == sorted((Counter(claimed_) - Counter(ledger_)).elements())
    assert (claimed_, ledger_) == kept_, "leave the caller's lists alone"
### END HIDDEN TESTS
print("every promise has its deed")

# %% [markdown]
# **3 (3 points).** Replay a history. `events` is a list of (release, event), oldest first. Return the release served at
# the end (the newest `full` that was not rolled back), None if there is none. Raise ValueError at an illegal move. Two
# mistakes to avoid: serving the *last* event's release, and letting a rolled-back release rise again.

# %% nbgrader={"grade": false, "grade_id": "replay", "locked": false, "schema_version": 3, "solution": true, "task": false}
def replay(events):
    """The release served after these events."""
    ### BEGIN SOLUTION
    after = {None: ["candidate"], "candidate": ["shadow"], "shadow": ["canary", "rolled_back"],
             "canary": ["full", "rolled_back"], "full": ["rolled_back"], "rolled_back": []}
    state, full = {}, []
    for release, event in events:
        if event not in after[state.get(release)]:
            raise ValueError(f"{release}: {state.get(release)} -> {event}")
        state[release] = event
        full += [release] * (event == "full")
    return next((release for release in reversed(full) if state[release] == "full"), None)
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "replay-tests", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
up = ("candidate", "shadow", "canary", "full")
assert replay([]) is None and replay([("a", e) for e in up]) == "a"
assert replay([("a", e) for e in up] + [("b", e) for e in up] + [("b", "rolled_back")]) == "a"
### BEGIN HIDDEN TESTS
import re

letters_ = dict(zip("cskfr", ("candidate", "shadow", "canary", "full", "rolled_back")))
r_ = rng(2, "replay")
for _ in range(2000):
    picks_ = [(r_.choice("ab"), r_.choice("cskfr")) for _ in range(r_.randint(1, 3))]
    if r_.random() < 0.7:  # mostly legal walks
        picks_ = [("a", x) for x in "cskf"[: r_.randint(1, 4)]] + [("b", x) for x in "cskf"[: r_.randint(1, 4)]] + picks_[:1]
    paths_ = {who: "".join(x for w, x in picks_ if w == who) for who in "ab"}
    legal_ = all(re.fullmatch("|(c(s(kf?)?r?)?)", path) for path in paths_.values())
    served_ = [w for w, x in picks_ if x == "f" and not paths_[w].endswith("r")]
    try:
        answer_ = replay([(w, letters_[x]) for w, x in picks_])
        assert legal_ and answer_ == (served_[-1] if served_ else None), picks_
    except ValueError:
        assert not legal_, picks_
### END HIDDEN TESTS
print("replayed")

# %% [markdown]
# ## Quiz
#
# Ten questions on what was just measured; 75 % is a pass.

# %%
from lifecycle_lib.lab.quiz import grade, interview, quiz

quiz("18")

# %%
answers = {}  # {"q1": "a", ...}
_ = grade("18", answers)

# %% [markdown]
# ## Interview questions

# %%
interview("18")
shutil.rmtree(folder)  # the drill's files

# %% [markdown]
# ## What to remember
#
# 1. Owner first. Weights move after repeated failures **with the right context shown**, not after the first complaint.
# 2. A gate judges evidence: pessimistic end of an interval, paired on the same cases, slice by slice. Evidence that is
#    empty, cut or swapped is refused, which is a third answer beside SHIP and BLOCK.
# 3. Gate the product, not the checkpoint. The worst candidate here had the weights that were already serving.
# 4. A promise needs a ledger. Words are the same whether the tool worked or not.
# 5. Ship in steps with a rehearsed way back; decide the stopping rule before the first look; keep a hash per stage.
#
# **Made:** nothing that stays; the registry lived in a temporary folder. `lifecycle run` keeps the real one beside the
# store. **Where to go next:** the sealed endpoints here are one checkpoint a class, so their accuracy speaks of these four
# and no others. The full detective (D1: four kinds of silent update, sixteen variants each, matched in size) is a later
# issue. `19_honest_admission_capstone` puts your own claims at stake.
