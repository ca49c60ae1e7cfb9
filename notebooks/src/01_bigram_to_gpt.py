# ---
# jupyter:
#   lifecycle:
#     rows: [S1-07, S1-08, S1-09, S1-84, S1-87, S0-05, S0-15, S0-63]
# ---
# %% [markdown]
# # After "return", which word comes next, and how far does that question carry?
#
# Every language model answers one question: given what stands so far, what comes next? Here you answer it three
# times: with a table of counts, with one matrix trained by gradient, and with a GPT that looks back into its own
# context. Then you ask the finished base model to decide a return, and it does not.
#
# After this notebook you can:
#
# - turn counts into a next-token model and its loss, by hand;
# - show that a one-matrix network learns exactly that table;
# - write a GPT in one cell and prove that it is transformers' Llama;
# - measure what one small change (token shift) does to reading, with an interval;
# - catch a training bug that the loss hides, and two that flatter it;
# - say why a base model continues a request, and why a better base would not help.
#
# **Needs** nothing but this repository; `corpus` takes any UTF-8 text file of yours. **Makes** no artifact: the small
# models live in memory, the base and SFT checkpoints come from the store. On one CPU core: about a minute and a half,
# plus 4 minutes to train base and SFT when the store is empty; under 1 GB of memory.

# %% tags=["parameters"]
profile = "laptop"
seed = 0
n_seeds = 2
device = ""
corpus = ""

# %%
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

from lifecycle_lib.lab.figures import learning_curve, slice_bars, style
from lifecycle_lib.lab.notebook import start

lab = start("01", profile, seed, device)
full = lab.profile.name != "smoke" and not corpus  # is this the run whose numbers we know?

# %% [markdown]
# The claim that this notebook risks. It is about the third answer, the GPT.

# %%
from lifecycle_lib.lab.claims import ClaimCard

card = ClaimCard(
    claim="token shift, one learned vector a layer, lets a tiny GPT learn to look things up sooner",
    direction="up", smallest=0.1, unit="nats per token",
    falsifier="at equal steps it saves less than 0.1 nats of held-out loss",
    scope="2 layers, 96 wide, 170 steps, policy ledgers (or your text); same batches and first weights in both arms",
    not_measured="larger models, other optimisers, longer training")

# %%
card.show()

# %% [markdown]
# Commit now, before you have seen anything: how much loss does it save, and how sure are you? Change the two numbers.

# %%
card.predict(estimate=0.3, confidence=0.6)

# %% [markdown]
# ## Count, by hand
#
# Four lines of a returns log. Cover the next cell and answer: what follows "return", and how often?

# %%
from lifecycle_lib.model.bigram import count_bigrams, most_likely_next, token_loss

lines = ["damaged return eligible", "damaged return eligible", "damaged return review", "late return review"]
counts = count_bigrams(lines)

# %%
print("after 'damaged':", most_likely_next(counts, "damaged"))
print("after 'return': ", most_likely_next(counts, "return"), dict(counts["return"]))
assert most_likely_next(counts, "damaged") == ("return", 3)

# %% [markdown]
# "return" is followed by "eligible" twice and by "review" twice: a tie, 0.5 each (the function breaks ties by the
# alphabet). No label, no rule, no teacher: text carries its own signal.
#
# **The loss of a token** is $-\ln p$, where $p$ is what the model gave the token that really came. Predict: $p$ rises
# from 0.2 to 0.8. By what factor does the loss fall?

# %%
print(f"p = 0.80: loss {token_loss(0.80):.3f}    p = 0.20: loss {token_loss(0.20):.3f}")
print(f"difference {token_loss(0.20) - token_loss(0.80):.3f} nats = ln 4, whatever the loss was before")

# %% [markdown]
# Four times the probability always *subtracts* ln 4, it never divides. That is why a loss curve in nats can be read
# like a ruler: equal drops are equal factors.

# %%
def footer(fig, text):
    """The facts a figure rests on, below it."""
    fig.supxlabel(text, x=0.01, ha="left", fontsize=9, color="#606060")
    plt.show()



# %%
style()
fig, ax = plt.subplots(figsize=(6.4, 3.2))
p = torch.linspace(0.01, 1, 200)
ax.plot(p, -p.log(), color="#111111")
for at in (0.2, 0.8):
    ax.plot(at, token_loss(at), "o", color="#d1495b")
    ax.annotate(f"p = {at}: {token_loss(at):.3f}", (at, token_loss(at)), (at + 0.03, token_loss(at) + 0.35))
ax.set(xlabel="probability given to the token that came", ylabel="loss (nats)", title="The loss of one token")
footer(fig, "The formula itself: n = 0, no interval.\nNot measured here: any model.")
print(f"at p = 1 the loss is {token_loss(1.0):.0f}, at p = 0.01 it is {token_loss(0.01):.1f} nats")

# %% [markdown]
# ## The same table, learnt
#
# One matrix, a row of logits a word, nothing else. It sees pairs (word, next word) and follows the gradient of the
# loss. If counting is the best a bigram can do, the divergence KL(counts || network) must fall to 0.
#
# Predict the KL at the start: the network says 1/5 for each of 5 words.

# %%
from lifecycle_lib.model.bigram import CountBigram, NeuralBigram, kl_to_counts
from lifecycle_lib.train.loop import FitConfig, fit


# %%
def fit_bigram(counted, steps):
    """Train the one-matrix network on every counted pair at once."""
    model = NeuralBigram(len(counted.counts)).to(lab.device)
    row, column = counted.counts.nonzero().to(lab.device).T
    share = (counted.counts[counted.counts > 0] / counted.counts.sum()).to(lab.device)  # how often each pair came
    loss = lambda m, _: (-(m.logits.log_softmax(1)[row, column] * share).sum(), {})  # noqa: E731
    return model, fit(model, lambda step: None, loss, FitConfig(steps=steps, optimizer="adamw", lr=0.5))


# %%
words = sorted({word for line in lines for word in line.split()})
pair_table = torch.zeros(5, 5, dtype=torch.long)
for first, followers in counts.items():
    for second, n in followers.items():
        pair_table[words.index(first), words.index(second)] = n

# %%
small = CountBigram(pair_table)
matrix, _ = fit_bigram(small, steps=150)
print(f"KL before {kl_to_counts(NeuralBigram(5), small):.3f}, after {kl_to_counts(matrix, small):.3f} nats")
print("P(next | return):", {w: round(q, 2) for w, q in zip(words, matrix.logits[words.index("return")].softmax(0).tolist())})
assert kl_to_counts(matrix, small) < 0.01

# %% [markdown]
# Counting took one pass and is exact. The gradient took 150 steps to arrive at the same table. The point of the
# second way is that it still works when the table no longer fits: after 60 tokens of context there are more rows
# than atoms.
#
# ## Tokens: bytes, then merges
#
# Words were a shortcut. A model that must read any text starts from the 256 bytes and merges the pair that stands
# side by side most often, again and again. Here is that loop, on the four lines.

# %%
from collections import Counter
from itertools import pairwise

import regex

from lifecycle_lib.model.tokenizer import PATTERN, SORTED_BYTES, Tokenizer


# %%
def join(ids, pair, new):
    """`ids` with the pair replaced by one new id, left to right."""
    out = []
    for i in ids:
        if out and (out[-1], i) == pair:
            out[-1] = new
        else:
            out.append(i)
    return out



# %%
def learn_merges(text, n):
    """The n merges of byte-level BPE: most frequent pair first, ties to the smaller ids."""
    vocab = [bytes([b]) for b in SORTED_BYTES]
    seen = Counter(regex.findall(PATTERN, text))
    pieces = {word: [SORTED_BYTES.index(b) for b in word.encode()] for word in seen}
    for _ in range(n):
        pairs = Counter()
        for word, ids in pieces.items():
            for pair in pairwise(ids):
                pairs[pair] += seen[word]
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        vocab.append(vocab[best[0]] + vocab[best[1]])
        yield best, pairs[best], vocab[-1]
        pieces = {word: join(ids, best, len(vocab) - 1) for word, ids in pieces.items()}


# %%
text = "\n".join(lines)
merges = list(learn_merges(text, 9))
for number, ((left, right), times, made) in enumerate(merges, 1):
    print(f"merge {number}: ids {left:3} + {right:3}, seen {times} times  ->  {made.decode()!r}")

# %% [markdown]
# Oracle: the `tokenizers` library, which is not ours, trained on the same text with the same cuts. And our own
# library's version.

# %%
import json

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

peer = tokenizers.Tokenizer(models.BPE())
peer.pre_tokenizer = pre_tokenizers.Sequence([
    pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated"),
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
peer.train_from_iterator([text], trainers.BpeTrainer(vocab_size=256 + 9, show_progress=False,
                                                     initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))

# %%
theirs = ["".join(pair).replace("Ġ", " ") for pair in json.loads(peer.to_str())["model"]["merges"]]
ours = [made.decode() for _, _, made in merges]
library = Tokenizer.train([text], 256 + 9)
print("tokenizers says:", theirs)
print("same merges, all three:", theirs == ours == [library.decode([i]) for i in range(256, 265)])
assert theirs == ours

# %% [markdown]
# The desk's tokenizer has 640 tokens, trained the same way. What matters is at the joints: `P-7` and ` 30` are one
# token each and carry their own space, so that key and value stand side by side.

# %%
from lifecycle_lib.desk.cases import golden_case

tok = lab.load_tokenizer()
prompt_ids = tok.encode(golden_case().prompt)
print(" | ".join(tok.decode([i]) for i in prompt_ids))
print(f"{len(golden_case().prompt)} characters, {len(prompt_ids)} tokens of {tok.vocab_size}")

# %% [markdown]
# ## The stream
#
# Training text is one long row of token ids. Without a `corpus` it is the desk's **policy ledgers**: a shop's policy
# book, then ten lookups in it. With a `corpus` it is your file, a token a byte, a line a document, the newline as
# start and end token.

# %%
from lifecycle_lib.corpus.text import read_corpus
from lifecycle_lib.desk.documents import draw_documents
from lifecycle_lib.train.pretrain import lm_batches, lm_loss, pack

# %%
if corpus:
    own = read_corpus(corpus)
    texts, n_held, vocab_size, bos = own.train + own.held_out, len(own.held_out), 256, [10]
    encoded = [[*line.encode(), 10] for line in texts]
else:
    texts = [d["text"] for d in draw_documents(12000, seed) if d["kind"] == "ledger" and "<order>" not in d["text"]]
    encoded, n_held, vocab_size, bos = [tok.encode(t) for t in texts], 100, tok.vocab_size, []
stream, held = pack([bos, *encoded], n_held)
print(f"{len(texts):,} documents, {len(stream):,} training tokens, {len(held):,} held out. The first:\n{texts[0]}")

# %% [markdown]
# Count again, over ids this time. The mean loss of the table on its own text is its best case.

# %%
everything = torch.cat((stream, held))
nll_all = CountBigram.fit(everything, vocab_size).nll(everything)
print(f"count-bigram NLL over all {len(texts):,} documents: {nll_all:.4f} nats per {'byte' if corpus else 'token'}")

# %% [markdown]
# On text it has not counted, one unseen pair has probability 0 and costs an infinite loss. So add a little to every
# pair. And a control: shuffle the tokens, which keeps how often each comes and destroys what follows what.

# %%
counted = CountBigram.fit(stream, vocab_size)
smoothed = CountBigram.fit(stream, vocab_size, smoothing=0.01)

# %%
order = torch.randperm(len(stream), generator=torch.Generator().manual_seed(seed))
shuffled = CountBigram.fit(stream[order], vocab_size, smoothing=0.01)
unigram = (torch.bincount(stream, minlength=vocab_size) + 0.01).double()
lone = float(-(unigram / unigram.sum()).log()[held].mean())

# %%
print(f"held out: uniform {torch.tensor(vocab_size).log():.2f}, single tokens {lone:.2f}, bigrams {smoothed.nll(held):.2f}")
print(f"bigrams counted on shuffled text: {shuffled.nll(held):.2f} (no gain over single tokens)")
assert corpus or smoothed.nll(held) < lone - 0.1 and shuffled.nll(held) > lone - 0.05

# %% [markdown]
# The gain over single tokens comes from order, and only from order. Now one matrix of V x V logits on the same
# counts, on whatever device there is.

# %%
matrix, bigram_run = fit_bigram(counted, steps=150)
kl = kl_to_counts(matrix, counted)
print(f"neural bigram: loss {bigram_run.losses[0]:.2f} = ln {vocab_size} at first; count line {counted.nll(stream):.3f}")
print(f"KL(counts || network) under 0.001 nats: {kl < 0.001}")
assert corpus or kl < 0.001 and abs(bigram_run.losses[-1] - counted.nll(stream)) < 0.001

# %% [markdown]
# The table writes text whose every pair is fine and whose whole is nonsense: it has forgotten all but one token.

# %%
generator = torch.Generator().manual_seed(seed)
sample = smoothed.sample(generator, 40, start=int(stream[0]))
print(bytes(sample).decode(errors="replace") if corpus else tok.decode(sample))

# %% [markdown]
# ## Attention, by hand
#
# A ledger says "damaged P-7 late P-3 damaged". What comes next? P-7, because that is what followed "damaged" before.
# No bigram can know. A layer that looks back can, if each token's *key* says what stood before it:
#
# - query: I am "damaged", who came right after my like?
# - key of P-7: before me stood "damaged". **That is token shift.**
# - value of P-7: "P-7".

# %%
names = ["damaged", "P-7", "late", "P-3"]
x = F.one_hot(torch.tensor([0, 1, 2, 3, 0]), 4).float()  # (T=5, C=4), one feature a word

# %%
query, value = 4 * x, x
key = torch.cat((torch.zeros(1, 4), x[:-1]))  # each token's key is the token before it
future = torch.ones(5, 5, dtype=torch.bool).triu(1)
weight = (query @ key.T).masked_fill(future, -torch.inf).softmax(-1)  # (T, T), rows sum to 1
print("last row of attention:", [round(w, 3) for w in weight[-1].tolist()])
print("it reads out:", dict(zip(names, [round(v, 3) for v in (weight[-1] @ value).tolist()])))

# %% [markdown]
# Check it with a pencil: four scores are 0 and one is 4, so the weight on P-7 is $e^4 / (e^4 + 4)$. Then with torch's
# own attention. Then without the shift, where "damaged" finds only itself.

# %%
from math import e

assert abs(weight[-1, 1].item() - e**4 / (e**4 + 4)) < 1e-6

# %%
torchs = F.scaled_dot_product_attention(query[None], key[None], value[None], is_causal=True, scale=1.0)[0]
assert torch.allclose(torchs, weight @ value, atol=1e-6)

# %%
plain = (query @ x.T).masked_fill(future, -torch.inf).softmax(-1)
print(f"weight on P-7: with shift {weight[-1, 1]:.3f} by hand and by torch, without {plain[-1, 1]:.3f}")

# %% [markdown]
# ## A GPT, once, in full
#
# The same idea with learned projections, several heads, positions (rotary), and a small network after each look.
# `w` is a dict of named tensors: the weights are data, the function is fixed. It also returns every attention map.

# %% tags=["algorithm"]
def gpt(w, idx, n_layer, n_head, causal=True):
    """Logits (B, T, V) and the attention maps (B, H, T, T) of each layer, for token ids (B, T)."""
    x, maps = w["wte.weight"][idx], []  # (B, T, C): one row of the embedding a token
    T, D = idx.shape[1], x.shape[-1] // n_head
    angle = torch.outer(torch.arange(T), 10000.0 ** (-torch.arange(0, D, 2) / D)).repeat(1, 2).to(x)  # (T, D)
    future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)

    def norm(x, name):  # x / rms(x), rescaled
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * w[name]

    def turn(x):  # positions: turn each pair of features by the angle of its place
        a, b = x.chunk(2, -1)
        return x * angle.cos() + torch.cat((-b, a), -1) * angle.sin()

    for i in range(n_layer):
        at = f"blocks.{i}"
        h = norm(x, f"{at}.norm1.weight")
        if f"{at}.attn.shift" in w:  # token shift: a share of the token before
            h = h + w[f"{at}.attn.shift"] * F.pad(h, (0, 0, 1, 0))[:, :-1]
        q, k, v = (h @ w[f"{at}.attn.{m}.weight"].T for m in ("wq", "wk", "wv"))  # (B, T, C)
        q, k, v = (t.unflatten(-1, (n_head, D)).transpose(1, 2) for t in (q, k, v))  # (B, H, T, D)
        score = turn(q) @ turn(k).transpose(-1, -2) / D**0.5  # (B, H, T, T)
        if causal:
            score = score.masked_fill(future, -torch.inf)  # no token sees what comes after it
        maps.append(score.softmax(-1))
        x = x + (maps[-1] @ v).transpose(1, 2).flatten(2) @ w[f"{at}.attn.wo.weight"].T
        h = norm(x, f"{at}.norm2.weight")
        gate, up = (h @ w[f"{at}.mlp.{m}.weight"].T for m in ("w_gate", "w_up"))
        x = x + (F.silu(gate) * up) @ w[f"{at}.mlp.w_down.weight"].T
    return norm(x, "norm_f.weight") @ w["wte.weight"].T, maps


# %% [markdown]
# Two judges. The library's `GPT`, with and without shift. And transformers' Llama, written by other people: without
# the shift the two are the same function.

# %%
from dataclasses import replace

from lifecycle_lib.core.seeds import seed_everything
from lifecycle_lib.model.bridge import to_hf, to_llama
from lifecycle_lib.model.gpt import GPT, GPTConfig

# %%
cfg = GPTConfig(vocab_size=vocab_size, block_size=128, n_layer=2, n_head=4, n_embd=96)
ids = stream[:48][None]
with torch.no_grad():
    for shift in (True, False):
        net = GPT(replace(cfg, token_shift=shift))
        mine, _ = gpt(net.state_dict(), ids, 2, 4)
        print(f"token shift {shift!s:5}: equals the library's GPT {torch.allclose(mine, net(ids), atol=1e-5)}")
    print("no shift: equals transformers' Llama", torch.allclose(mine, to_llama(net)(ids).logits, atol=1e-5))
    assert torch.allclose(mine, to_llama(net)(ids).logits, atol=1e-5) and torch.allclose(mine, net(ids), atol=1e-5)

# %% [markdown]
# ## Train it
#
# Random windows of the stream, next-token loss at every position, the library's one training loop. In Jupyter you see
# a progress bar. Before you run it: where does the loss start, and will it pass the count line?

# %%
from lifecycle_lib.train.logprobs import answer_loss

steps = 170 if lab.profile.name != "smoke" else 6
recipe = FitConfig(steps=steps, lr=6e-3, lr_matrix=0.04)



# %%
def pretrain(shift, seed):
    """A GPT trained on the stream. Arms of one seed share the first weights and every batch."""
    seed_everything(seed)
    model = GPT(replace(cfg, token_shift=shift)).to(lab.device)
    batches = lm_batches(stream, 24, 64, seed)
    return model, fit(model, lambda step: batches(step).to(lab.device), answer_loss, recipe, label=f"shift {shift}")



# %%
runs = {(True, seed): pretrain(True, seed)}
model, run = runs[True, seed]
print(f"{model.n_params():,} parameters, {run.steps} steps, first loss {run.losses[0]:.1f}, "
      f"ln V = {torch.tensor(vocab_size).log():.1f}")

# %%
held_loss = lm_loss(model, held, 64)

# %% tags=["nbval-ignore-output"]
fig = learning_curve({"neural bigram": bigram_run.history, "GPT": run.history}, title="One token back, or all of them",
                     not_measured="other seeds, held-out text (printed below)", smooth=5)
line = counted.nll(stream)
fig.axes[0].axhline(line, color="#808080", linestyle=":")
fig.axes[0].annotate("count bigram: the floor of any table", (0, line), (steps / 4, line + 0.2))
plt.show()
print(f"held out, nats per token: uniform {torch.tensor(vocab_size).log():.2f}, single tokens {lone:.2f}, "
      f"count bigram {smoothed.nll(held):.2f}, GPT {held_loss:.2f}")

# %% [markdown]
# How to read it: the matrix falls to the dotted line and stays, as it must. The GPT stops near the line too, on a
# plateau: it has become a bigram. Then it finds out that it can look back, and drops through.
#
# | you see | it means |
# |---|---|
# | first loss far from ln V | wrong initialisation, or the wrong vocabulary |
# | flat at the single-token loss | attention gets no signal: a mask, or a learning rate of 0 |
# | flat at the count line | no retrieval yet: more steps, more text that its context settles |
# | far below the count line at once | it sees its target: next section but one |

# %%
print("GPT under the count line on held-out text:", held_loss < smoothed.nll(held))
print("at least half a nat under it:", held_loss < smoothed.nll(held) - 0.5)
assert not full or held_loss < smoothed.nll(held) - 0.5

# %% [markdown]
# One number is never enough: what would change your mind about "it reads"? A count of lookups that come out right, on
# books it has never seen. Anyone who picks a line of the book at random is right about one time in three.

# %%
id_tokens = {tok.encode(f" P-{n}")[0] for n in range(1, 10)}



# %%
@torch.no_grad()
def lookups(model, documents):
    """(right, all): policy ids written after a reason, in the lookups of ledgers."""
    right = n = 0
    for ids in documents:
        guess = model(torch.tensor([ids], device=lab.device))[0].argmax(-1).tolist()
        at = [t for t in range(ids.index(tok.special["<note>"]), len(ids) - 1) if ids[t + 1] in id_tokens]
        right, n = right + sum(guess[t] == ids[t + 1] for t in at), n + len(at)
    return right, n



# %%
right, n = lookups(model, encoded[-100:]) if not corpus else (0, 0)
print(f"lookups: {n}, far more than a third right: {right > 0.5 * n}" if n else "your text holds no ledgers: skipped")
assert not full or right > 0.5 * n

# %% [markdown]
# And the loss it reports is what you computed by hand: for each token, minus the log of the probability that this
# very model gave it.

# %%
with torch.no_grad():
    row = held[:64].to(lab.device)
    logits = model(row[None, :-1])[0].cpu().double()
    chances = logits.softmax(-1).gather(-1, held[1:64, None]).flatten().tolist()

# %%
by_hand = torch.tensor([token_loss(p) for p in chances], dtype=torch.float64)
by_torch = F.cross_entropy(logits, held[1:64], reduction="none")
equal = torch.allclose(by_hand, by_torch, atol=1e-6, rtol=0)
print(f"{len(by_hand)} tokens, by hand and by torch equal to 1e-6: {equal}")
assert equal

# %% [markdown]
# ## Does token shift matter?
#
# Same seed, same first weights, same batches, same steps; the only difference is one vector of 96 numbers a layer.
# Two seeds give a direction; their interval is wide (`n_seeds = 5` narrows it, at 20 seconds a seed).

# %%
from lifecycle_lib.core.stats import paired_effect

seeds = range(seed, seed + n_seeds)
for arm in [(shift, s) for s in seeds for shift in (True, False) if (shift, s) not in runs]:
    runs[arm] = pretrain(*arm)
loss = {arm: lm_loss(m, held, 64) for arm, (m, _) in runs.items()}
effect = paired_effect([loss[False, s] for s in seeds], [loss[True, s] for s in seeds])

# %% tags=["nbval-ignore-output"]
fig = learning_curve({name: [runs[shift, s][1].history for s in seeds] for name, shift in
                      (("with token shift", True), ("without", False))}, smooth=5, title="One vector a layer",
                     not_measured="more steps: the other arm may get there later")
fig.axes[0].set_ylim(top=2.5)
plt.show()
for s in seeds:
    share = [lookups(runs[shift, s][0], encoded[-100:])[0] / n if n else 0 for shift in (True, False)]
    print(f"seed {s}: held-out loss with {loss[True, s]:.2f}, without {loss[False, s]:.2f} nats per token"
          + (f"; lookups right {share[0]:.0%} and {share[1]:.0%}" if n else ""))

# %% tags=["nbval-ignore-output"]
decided = card.settle(effect)

# %%
if full:
    gained = [lookups(runs[True, s][0], encoded[-100:])[0] - lookups(runs[False, s][0], encoded[-100:])[0] for s in seeds]
    print(f"lookups gained by the shift: over 20 of 100 in every seed: {min(gained) > 0.2 * n}")
    assert effect.estimate > 0.1 and min(gained) > 0.2 * n
print("verdict:", decided if full else "not the run whose verdict we know")

# %% [markdown]
# What this does not show: that a GPT cannot read without the shift. Two layers can build the same circuit (the first
# copies each token to its right neighbour, the second matches), they may find it later. It shows that at this size
# and this budget you would not see it.
#
# ## Break it on purpose
#
# Three bugs, each met in real code. Before running: which of them does the loss show you?
#
# 1. **targets not shifted**: the model predicts the token it is looking at;
# 2. **targets shifted twice**: once by you, once by the loss function;
# 3. **no causal mask**: every token sees the next one.

# %%
def cross_entropy(logits, target):
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def open_gpt(m, ids):
    """The same weights without the causal mask."""
    return gpt(dict(m.named_parameters()), ids, 2, 4, causal=False)[0]


right_rule = lambda m, ids: cross_entropy(m(ids[:, :-1]), ids[:, 1:])  # noqa: E731

# %%
bugs = {
    "targets not shifted": (lambda m, ids: cross_entropy(m(ids), ids), 30),
    "targets shifted twice": (lambda m, ids: cross_entropy(m(ids[:, :-2]), ids[:, 2:]), 40),
    "no causal mask": (lambda m, ids: cross_entropy(open_gpt(m, ids[:, :-1]), ids[:, 1:]), 80),
}

# %% [markdown]
# How low may an honest loss be? For ledgers we know, because we wrote the generator. Nobody can foresee which line a
# clerk looks up next (ln k for a book of k lines, ten times) or the window of a new line (68 equally likely values or
# more). Divided by the tokens, that is a floor no reader without the future can pass.

# %%
from math import log

books = [t.count("<policy>") for t in texts[-100:]]
floor = sum(10 * log(k) + k * log(68) for k in books) / sum(len(d) - 1 for d in encoded[-100:]) if not corpus else 0.0
print(f"floor: {floor:.2f} nats per token" if floor else "floor: unknown for your text")


# %%
def last_loss(rule, n):
    """Loss after n steps of training by a rule; everything else as in the right run."""
    seed_everything(seed)
    batches = lm_batches(stream, 24, 64, seed)
    return fit(GPT(cfg).to(lab.device), lambda step: batches(step).ids.to(lab.device),
               lambda m, ids: (rule(m, ids), {}), replace(recipe, steps=n)).losses[-1]


# %% tags=["nbval-ignore-output"]
ends = {name: last_loss(rule, min(steps, at_most)) for name, (rule, at_most) in bugs.items()}
print(f"right run: {run.losses[min(steps, 40) - 1]:.2f} after {min(steps, 40)} steps, {run.losses[-1]:.2f} at the end")
for name, end in ends.items():
    below = "BELOW THE FLOOR" if end < floor else ""
    print(f"{name:22} {end:5.2f} after {min(steps, bugs[name][1])} steps  {below}")

# %% [markdown]
# Two are impossibly good. The third, shifted twice, looks like any young model: the loss alone would never tell you.
# So do not look at the loss. Two checks, both without training:
#
# - **leak**: change the last token. No earlier logit may move.
# - **alignment**: compute the loss on random weights, and let transformers compute it from `labels`. Equal or wrong.

# %%
@torch.no_grad()
def leaks(forward, m):
    """Does an earlier logit move when the last token changes?"""
    ids = stream[:32][None].to(lab.device)
    other = ids.clone()
    other[0, -1] = (ids[0, -1] + 1) % vocab_size
    return not torch.allclose(forward(m, ids)[0, :-1], forward(m, other)[0, :-1], atol=1e-5)



# %%
@torch.no_grad()
def aligned(rule, m):
    """Is the loss the one that transformers computes from labels?"""
    ids = stream[:32][None].to(lab.device)
    return abs(rule(m, ids).item() - to_hf(m)(ids, labels=ids).loss.item()) < 1e-4



# %%
seed_everything(seed)
fresh = GPT(cfg).to(lab.device)
verdicts = {}
for name, (rule, _) in {"right": (right_rule, 0), **bugs}.items():
    forward = open_gpt if name == "no causal mask" else lambda m, ids: m(ids)
    verdicts[name] = leaks(forward, fresh), aligned(rule, fresh)
    print(f"{name:22} sees the future: {verdicts[name][0]!s:5}  loss as transformers': {verdicts[name][1]}")
assert verdicts.pop("right") == (False, True), "a check fires on the right model"
assert all(seen or not same for seen, same in verdicts.values()), "a bug passed both checks"

# %% [markdown]
# ## The desk's base model
#
# Now the real one: 3 layers, 128 wide, trained on ledgers, case notes, recaps and chat logs. It comes from the store;
# the first time it is trained, with progress. The strip at the top says which lever this is: *pretrain*.

# %%
base = lab.base()
base_model = lab.load(base)
print(f"base: {base_model.n_params():,} parameters, {base.card['steps']} steps of pretraining")

# %% [markdown]
# Find the head that looks things up. In a ledger, at each reason, how much attention goes to tokens that came right
# after the same reason earlier? Your hand-made head above would score 0.93.

# %%
book = "<bos><policy>damaged P-7 30d<policy>unwanted P-3 14d<note>unwanted P-3 14d, damaged P-7 30d, damaged P-7 30d"
ids = tok.encode(book)
shown = [tok.decode([i]).strip() for i in ids]

# %%
with torch.no_grad():
    n_layer, n_head = base_model.cfg.n_layer, base_model.cfg.n_head
    _, maps = gpt(base_model.state_dict(), torch.tensor([ids], device=lab.device), n_layer, n_head)

# %%
asking = [t for t in range(shown.index("<note>"), len(ids)) if shown[t] in ("damaged", "unwanted")]
mass = {(layer, head): sum(maps[layer][0, head, t, j].item() for t in asking for j in range(1, t)
                           if shown[j - 1] == shown[t]) / len(asking)
        for layer in range(n_layer) for head in range(n_head)}

# %%
layer, head = max(mass, key=mass.get)
print(f"of {len(mass)} heads the strongest is layer {layer}, head {head}: {mass[layer, head]:.0%} of its attention")

# %%
fig, ax = plt.subplots(figsize=(7.2, 4.6))
picture = ax.imshow(maps[layer][0, head].cpu(), cmap="Greys", vmin=0, vmax=1, aspect="auto")
ax.set_xticks(range(len(ids)), shown, rotation=90)
rows = range(shown.index("<note>"), len(ids) - 2)
ax.set_yticks(rows, [f"{shown[t]}  ?" if t in asking else shown[t] for t in rows])
ax.set(xlabel="token that is looked at", ylabel="token that asks", title=f"Layer {layer}, head {head} of the base")
ax.set_ylim(max(rows) + 0.5, min(rows) - 0.5)
ax.grid(False)
fig.colorbar(picture, label="share of attention")
footer(fig, f"n = 1 document, {len(asking)} lookups, no interval.\n"
       "Not measured here: other documents. A map shows where a head looks, not that it is needed.")

# %%
for t in asking:
    best = int(maps[layer][0, head, t].argmax())
    print(f"{shown[t]:9} looks most at {shown[best]} (after {shown[best - 1]})")

# %% [markdown]
# Does that carry over to a case it has never seen? Give the base a request in its own layout and let it write the
# clerk's note. All (days, window) pairs are held out. Predict the share of notes that copy the right policy line.

# %%
from lifecycle_lib.core.stats import wilson
from lifecycle_lib.judge.evals import frozen_cases

cases = [c for c in frozen_cases(min(256, lab.profile.n_eval)) if c.policy]
asked = [c.prompt.removesuffix("<bot>") + "<note>" for c in cases]


def copies(texts):
    """How many notes begin with the right policy line."""
    return sum(text.startswith(c.policy.line()) for text, c in zip(texts, cases))


# %%
notes = lab.engine(base, 0.0).texts(asked)
copied = copies(notes)

# %%
low, high = wilson(copied, len(cases))
print(f"{cases[0].prompt}\n  -> {notes[0]}")
print(f"right policy line copied: {copied / len(cases):.0%} of {len(cases)} cases [{low:.0%}, {high:.0%}], 95 % Wilson")
assert not full or copied > 0.9 * len(cases)

# %% [markdown]
# A picture of attention proves little. Take the head out (set its output to zero) and read again; as a control, take
# out the head of the same layer that looks back least. Which of the two can the base do without?

# %%
from lifecycle_lib.serve.engine import Engine


def without_head(layer, head):
    """Right notes of the base when one head's output is zero."""
    cut, width = lab.load(base), base_model.cfg.n_embd // n_head
    with torch.no_grad():
        cut.blocks[layer].attn.wo.weight[:, head * width:(head + 1) * width] = 0
    return copies(Engine(cut, tok, 0.0, seed).texts(asked))


# %%
idle = min((h for h in range(n_head) if h != head), key=lambda h: mass[layer, h])
left = {f"head {h} out": without_head(layer, h) for h in (head, idle)}
for name, k in {"all heads": copied, **left}.items():
    low, high = wilson(k, len(cases))
    print(f"{name:11} {k / len(cases):4.0%} of notes right [{low:.0%}, {high:.0%}]")

# %% [markdown]
# The map was no decoration: without that one head of twelve the base does not read. (One base, one seed: which head
# it is differs from run to run.)
#
# Nobody showed the base a decision; predicting the next token was enough to learn to look up. The suspects are the
# ledgers, documents *whose own context settles most tokens*. The arm without them takes minutes a seed and is not run
# here: you have seen that the base reads, not yet what made it read.
#
# ## It reads. Does it decide?
#
# The A10234 request ends in `<bot>`: the assistant's turn. Sample 200 continuations from the base and from the SFT
# checkpoint made from it, and sort them.

# %%
decides = ClaimCard(
    claim="the base continues the A10234 request and does not decide it; after SFT the same prompt gives decision JSON",
    direction="up", smallest=0.9, unit="share",
    falsifier="SFT minus base is under 90 points of strict decision JSON, say because the base already answers",
    scope="one prompt, 200 samples each at temperature 1, one seed", not_measured="other prompts, larger bases")
decides.show()
decides.predict(estimate=0.98, confidence=0.8)

# %%
from lifecycle_lib.judge.verifiers import parse_answer


# %%
def kind(text):
    """What a continuation is: a decision, JSON that is none, another request, or prose."""
    if parse_answer(text).valid:
        return "decision JSON"
    if text.startswith("{"):
        return "other JSON"
    return "another request" if any(tag in text for tag in ("<policy>", "<order>", "<user>")) else "prose"


# %%
sft = lab.sft()
written = {name: lab.engine(stage, 1.0).texts([golden_case().prompt], 200) for name, stage in
           (("base", base), ("sft", sft))}

# %%
kinds = {name: Counter(map(kind, texts_)) for name, texts_ in written.items()}
for name, texts_ in written.items():
    print(f"{name}: {texts_[0]}\n      {texts_[1]}")

# %%
classes = ("another request", "prose", "other JSON", "decision JSON")
fig = slice_bars({name: {c: {"n": 200, "share": kinds[name][c] / 200} for c in classes} for name in kinds},
                 key="share", ylabel="share of continuations (%)", title="The same prompt, before and after SFT",
                 not_measured="other prompts, other seeds, whether the decision is right")
fig.axes[0].set_xlabel("what the continuation is")
plt.show()
for name in kinds:
    print(f"{name:4}: " + ", ".join(f"{c} {kinds[name][c] / 2:.0f} %" for c in classes))

# %% [markdown]
# Not one continuation is another request: in its documents a colleague speaks after `<bot>`, and then the document
# ends. Look at the two samples of the base again. Does its prose at least read the order?

# %%
named = sum("mug" in text for text in written["base"]) / 200
print(f"the order says mug; the base's replies name it in {named:.0%} (the desk sells 10 items: guessing is 10 %)")

# %% [markdown]
# The effect with its interval (Newcombe's, from the two Wilson intervals; 200 samples of one training run, so it
# speaks of this base and this SFT, not of seeds).

# %%
from lifecycle_lib.core.stats import Effect

before, after = (kinds[name]["decision JSON"] / 200 for name in ("base", "sft"))
(low0, high0), (low1, high1) = (wilson(kinds[name]["decision JSON"], 200) for name in ("base", "sft"))

# %%
difference = after - before
gap = Effect(difference, difference - ((after - low1) ** 2 + (high0 - before) ** 2) ** 0.5,
             difference + ((high1 - after) ** 2 + (before - low0) ** 2) ** 0.5, 200)
settled = decides.settle(gap)
assert not full or settled == "supported"

# %% [markdown]
# One base and one SFT run are one seed. The recorded evidence has more of them, over the whole frozen evaluation:

# %%
from lifecycle_lib.lab.claims import recorded

rows = recorded("sft_room")["per_seed"]
json_rate = {name: [row[f"{name}.json_validity"] for row in rows] for name in ("base", "sft")}
over_seeds = paired_effect(json_rate["sft"], json_rate["base"])
print(f"valid JSON, sft - base: {over_seeds.estimate:.1%} [{over_seeds.low:.1%}, {over_seeds.high:.1%}], "
      f"95 % paired t over {over_seeds.n} seeds, {recorded('sft_room')['n_cases']} cases each (recorded, not run here)")

# %% [markdown]
# Why would a *better* base not fix this? Because the base is right. Ask it what stands after `<bot>`: in its
# documents, a colleague's words, never a brace. A better base is surer of that.

# %%
prompt = torch.tensor([prompt_ids], device=lab.device)
brace = tok.encode(golden_case().answer)[0]

# %%
with torch.no_grad():
    for name, stage in (("base", base), ("sft", sft)):
        chance = lab.load(stage)(prompt)[0, -1].softmax(-1)
        print(f"{name:4}: P(the answer's first token after <bot>) = {chance[brace]:.2f}, "
              f"most likely: {tok.decode([int(chance.argmax())])!r}")

# %% [markdown]
# ## What you use at work
#
# Nobody writes a GPT from scratch at work: it is `transformers`, `tokenizers` and their formats. The model trained
# above, token shift and all, moves over and gives the same numbers.

# %%
from lifecycle_lib.model.sampling import generate

fast = tok.to_transformers()
print("same ids from transformers' tokenizer:", fast(golden_case().prompt)["input_ids"] == prompt_ids)

# %%
theirs = to_hf(base_model)
with torch.no_grad():
    same = torch.allclose(theirs(prompt).logits, base_model(prompt), atol=1e-5)
    loss_here = cross_entropy(base_model(prompt[:, :-1]), prompt[:, 1:]).item()
    loss_there = theirs(prompt, labels=prompt).loss.item()
print("same logits:", same, "| same loss from labels:", abs(loss_here - loss_there) < 1e-5)

# %%
wrote = theirs.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=tok.special["<eos>"],
                        pad_token_id=tok.special["<pad>"])[0, len(prompt_ids):].tolist()
greedy = generate(base_model, [prompt_ids], eos_id=tok.special["<eos>"], pad_id=tok.special["<pad>"],
                  max_new_tokens=8, temperature=0.0).ids[0]
print("same greedy text:", wrote == greedy, "|", tok.decode(wrote))
assert same and wrote == greedy

# %% [markdown]
# ## Exercises
#
# **1 (1 point).** The correct token's probability quadruples, starting at one fifth. By how many nats does its loss
# change? Fall is negative.

# %% nbgrader={"grade": false, "grade_id": "quadruple", "locked": false, "schema_version": 3, "solution": true, "task": false}
### BEGIN SOLUTION
from math import log

change = -log(0.8) + log(0.2)
### END SOLUTION

# %% nbgrader={"grade": true, "grade_id": "quadruple-tests", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
assert isinstance(change, float) and change < 0, "the loss falls"
### BEGIN HIDDEN TESTS
two = torch.tensor([[0.2, 0.8], [0.8, 0.2]]).log()
oracle = F.nll_loss(two, torch.tensor([0, 0]), reduction="none")
assert abs(change - (oracle[1] - oracle[0]).item()) < 1e-4
### END HIDDEN TESTS
print("change:", round(change, 3), "nats")

# %% [markdown]
# **2 (3 points).** Write causal attention for one head: `q`, `k`, `v` are (T, D), scores are divided by the root of D,
# no row looks past itself. Common mistake: masking with 0 before the softmax, which still leaves weight there.

# %% nbgrader={"grade": false, "grade_id": "attend", "locked": false, "schema_version": 3, "solution": true, "task": false}
def attend(q, k, v):
    """(T, D) of what each position reads."""
    ### BEGIN SOLUTION
    score = q @ k.T / q.shape[-1] ** 0.5
    ahead = torch.ones_like(score, dtype=torch.bool).triu(1)
    return score.masked_fill(ahead, -torch.inf).softmax(-1) @ v
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "attend-tests", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
ones = torch.ones(3, 2)
steps_up = torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]])
assert torch.allclose(attend(ones, ones, steps_up)[:, 0], torch.tensor([0.0, 0.5, 1.0])), "row t averages rows 0 to t"
### BEGIN HIDDEN TESTS
for width in (1, 4, 7):
    q, k, v = torch.randn(3, 5, width, generator=torch.Generator().manual_seed(width))
    want = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
    assert torch.allclose(attend(q, k, v), want, atol=1e-6), "torch's own attention disagrees"
### END HIDDEN TESTS
print("attention agrees")

# %% [markdown]
# **3 (3 points).** One step of BPE: `words` maps a tuple of symbols to how often it occurs. Return the pair that
# should be merged: the most frequent one, ties to the smaller pair. Common mistake: counting each word once.

# %% nbgrader={"grade": false, "grade_id": "pair", "locked": false, "schema_version": 3, "solution": true, "task": false}
def best_pair(words):
    """(left, right) to merge next."""
    ### BEGIN SOLUTION
    seen = Counter()
    for symbols, times in words.items():
        for pair in zip(symbols, symbols[1:]):
            seen[pair] += times
    return min(seen, key=lambda pair: (-seen[pair], pair))
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "pair-tests", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
assert best_pair({("l", "o", "w"): 2, ("o", "w", "n"): 3}) == ("o", "w")
### BEGIN HIDDEN TESTS
for letters in ("cab cab abc", "noon noon moon soon", "aab aab ab b ba ba ba"):
    judge = tokenizers.Tokenizer(models.BPE())
    judge.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    judge.train_from_iterator([letters], trainers.BpeTrainer(vocab_size=len(set(letters) - {" "}) + 1, show_progress=False))
    first = json.loads(judge.to_str())["model"]["merges"][0]
    assert best_pair(Counter(map(tuple, letters.split()))) == tuple(first), f"tokenizers merges {first} first"
### END HIDDEN TESTS
print("pair agrees")

# %% [markdown]
# ## Quiz

# %%
from lifecycle_lib.lab.quiz import grade, interview, quiz

quiz("01")

# %% [markdown]
# Put your letters in. What stands here is one question, so that you see what grading does.

# %%
share = grade("01", {"q1": "c"})

# %% [markdown]
# ## Interview questions

# %%
interview("01")

# %% [markdown]
# ## Remember
#
# 1. Pretraining asks one thing: what comes next? Counting already answers it, and a trained matrix is that table.
# 2. Loss is $-\ln p$: four times the probability is always ln 4 less, and ln V is where an untrained model starts.
# 3. Attention reads by matching keys. When a key knows its left neighbour, looking up takes one layer.
# 4. A good loss proves little: compare with the count line, count lookups, run the leak and the alignment check.
# 5. A base that reads perfectly still does not decide. It continues, because continuing is what it was paid for.
#
# **Made:** nothing new; base and SFT are in the store. **Next:** `07_sft_the_interface` gives the base its interface;
# `02_scaling_and_budget` asks how large and how long. Your own text: run this notebook again with
# `corpus = "path/to/file.txt"`.
