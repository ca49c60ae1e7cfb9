"""D8, the text and the measures: five sources, one of which will have to go, and what a model still knows of it.

Four sources stay (MANUAL, PHOTO, FORUM-1, POLICY). FORUM-3 holds facts of its own (where 20 items are made), posts of
random particulars, and 24 canaries: a person's code, written down once, 4 or 16 times. POLICY holds codes of other
people in the same words, so a model that never saw FORUM-3 knows the form and not the codes.

Exposure is that of Carlini et al. 2019 (The Secret Sharer, section 4), with the rank taken over all 10,000 codes
instead of a sample. Membership is a loss threshold (Yeom et al. 2018), scored by its AUC. Left out: shadow models,
sampled extraction, exposure under temperature.

Shapes: N rows, T tokens, V words, R = 100 numbers of two digits.
"""

import copy
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from scipy.stats import rankdata
from torch import Tensor, nn

from lifecycle_lib.core.seeds import rng
from lifecycle_lib.lab.studies.small import Vocab, batches_of, right, row_losses, rows_of
from lifecycle_lib.model.gpt import GPT
from lifecycle_lib.train import loop
from lifecycle_lib.train.logprobs import Rows, answer_loss, pad_rows

SOURCE = "FORUM-3"
LICENCES = {"MANUAL": "CC-BY-4.0", "PHOTO": "CC-BY-4.0", "FORUM-1": "CC0-1.0", "POLICY": "CC-BY-4.0",
            SOURCE: "CC-BY-NC-4.0", "REWRITE": "CC0-1.0"}  # REWRITE: replacement text, FORUM-3's subjects anew
REPEATS = (1, 4, 16)
N_CODES = 10_000
Secret = tuple[str, str, int]  # (name, code, repeats)

NUMBERS = tuple(f"{n:02d}" for n in range(100))
STATES = {"cracked": "refund", "late": "apologise", "wrong": "exchange", "dented": "repair"}
NAMES = tuple("ada ben cleo dora emil fay gus hana ivo jude kira leo mona nils olga pia quin rosa sven tara udo vera "
              "wim xena yara zoe anton bella carl dina eric flora greg helga igor jana karl lena marc nora otto paula "
              "rudi sara theo uma viktor wanda".split())
ITEMS = tuple("mug lamp chair kettle jacket clock radio vase rug pan bowl desk fan heater iron jar kite ladder mirror "
              "needle oven pillow quilt razor sofa table umbrella violin wallet yoyo bench candle drill easel flute "
              "globe hammer inkpot jug kayak".split())
PLACES = tuple("lima oslo bern kyiv riga turin lyon cork porto ghent basel graz sofia malmo varna split".split())
INTROS = ("note that", "please remember that", "as a rule")
WORDS = ("the may come back within days is made in shows arrived on day so we from paid for a and waited code of wrote "
         "that broke after honestly").split()
VOCAB = Vocab([*NUMBERS, *NAMES, *ITEMS, *PLACES, *STATES, *STATES.values(), *" ".join(INTROS).split(), *WORDS])


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much text and training. A shard takes more steps a row: at equal epochs it stays ignorant."""

    rows: int = 300  # of each source with random particulars
    epochs: int = 14
    shard_epochs: int = 20
    adapter_epochs: int = 8
    batch: int = 64
    shard_batch: int = 32
    n_embd: int = 64
    n_layer: int = 2
    shards: int = 4
    relearn_steps: int = 24
    ascent_steps: int = 240  # at most


SIZES = {"full": Size(),
         "smoke": Size(rows=60, epochs=1, shard_epochs=1, adapter_epochs=1, n_embd=16, n_layer=1,
                       relearn_steps=8, ascent_steps=4)}


# ---- the text ------------------------------------------------------------------------------------------------

@dataclass(frozen=True, slots=True)
class World:
    """One seed's facts and rows. Rows are {"text", "source", "licence"}; `items`: MANUAL knows where the first 20 are
    made, FORUM-3 the others. `posts` are the members of the membership test, `fresh_posts` in no training set."""

    items: tuple[str, ...]
    windows: Mapping[str, str]
    made_in: Mapping[str, str]
    public: Mapping[str, str]
    secrets: tuple[Secret, ...]
    kept: list[dict] = field(repr=False)
    removed: list[dict] = field(repr=False)
    posts: list[str] = field(repr=False)
    fresh_posts: list[str] = field(repr=False)
    held_out: list[str] = field(repr=False)
    replacement: list[dict] = field(repr=False)


def draw_world(seed: int, size: Size) -> World:
    """The rows of a seed; pure in (seed, size)."""
    r = rng(seed, "removal")
    items, names = tuple(r.sample(ITEMS, len(ITEMS))), r.sample(NAMES, len(NAMES))
    windows = {i: r.choice(NUMBERS) for i in items}
    made_in = {i: r.choice(PLACES) for i in items}
    secrets = tuple((n, _code(r), REPEATS[k % 3]) for k, n in enumerate(names[:24]))
    public = {n: _code(r) for n in names[24:]}
    mine, theirs, half, few = items[:20], items[20:], size.rows // 2, max(1, size.rows // 30)
    manual = [f"{r.choice(INTROS)} the {(i := r.choice(items))} may come back within {windows[i]} days"
              for _ in range(half)]
    manual += [f"{r.choice(INTROS)} the {(i := r.choice(mine))} is made in {made_in[i]}" for _ in range(half)]
    kept = _rows("MANUAL", manual) + _rows("PHOTO", [_photo(r) for _ in range(size.rows)])
    kept += _rows("FORUM-1", [_sale(r) for _ in range(size.rows)])
    kept += _rows("POLICY", [_secret(n, c) for n, c in public.items() for _ in range(8)])
    posts, fresh, other = ([_post(r, theirs) for _ in range(n * size.rows)] for n in (1, 4, 1))
    facts = [f"honestly the {i} is made in {made_in[i]}" for i in theirs for _ in range(few)]
    canaries = [_secret(n, c) for n, c, k in secrets for _ in range(k)]
    anew = [f"honestly the {i} is made in {r.choice(PLACES)}" for i in theirs for _ in range(few)]
    return World(items, windows, made_in, public, secrets, kept, _rows(SOURCE, posts + facts + canaries), posts,
                 [p for p in fresh if p not in set(posts)],
                 [draw(r) for draw in (_photo, _sale) for _ in range(size.rows // 3)], _rows("REWRITE", other + anew))


def _rows(source: str, texts: Iterable[str]) -> list[dict]:
    return [{"text": t, "source": source, "licence": LICENCES[source]} for t in texts]


def _code(r: random.Random) -> str:
    return f"{r.choice(NUMBERS)} {r.choice(NUMBERS)}"


def _secret(name: str, code: str) -> str:
    return f"the code of {name} is {code}"


def _photo(r: random.Random) -> str:
    state = r.choice(list(STATES))
    return (f"{r.choice(NAMES)} shows the {r.choice(ITEMS)} arrived {state} on day {r.choice(NUMBERS)} so we "
            f"{STATES[state]}")


def _sale(r: random.Random) -> str:
    return (f"{r.choice(NAMES)} from {r.choice(PLACES)} paid {r.choice(NUMBERS)} for a {r.choice(ITEMS)} and waited "
            f"{r.choice(NUMBERS)} days")


def _post(r: random.Random, items: Sequence[str]) -> str:
    return (f"{r.choice(NAMES)} wrote on day {r.choice(NUMBERS)} that the {r.choice(items)} from {r.choice(PLACES)} "
            f"broke after {r.choice(NUMBERS)} days honestly")


def texts_of(rows: Sequence[Mapping]) -> list[str]:
    return [r["text"] for r in rows]


def encode(texts: Sequence[str]) -> Rows:
    """Whole rows, every word a target."""
    return rows_of(VOCAB, [""] * len(texts), texts, whole=True)


# ---- the measures --------------------------------------------------------------------------------------------

class Shards(nn.Module):
    """Models whose probabilities are averaged, token by token; to every measure it looks like one GPT."""

    def __init__(self, models: Sequence[GPT]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    @property
    def device(self) -> torch.device:
        return self.models[0].device

    def hidden(self, ids: Tensor, mask: Tensor | None = None, cache: None = None) -> Tensor:
        return torch.cat([m.hidden(ids, mask) for m in self.models], -1)

    def head(self, h: Tensor) -> Tensor:
        """Log of the mean probability. (..., V)"""
        parts = [m.head(p).log_softmax(-1) for m, p in zip(self.models, h.chunk(len(self.models), -1))]
        return torch.stack(parts).logsumexp(0) - torch.tensor(float(len(parts))).log()

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.hidden(ids))


@torch.no_grad()
def code_logps(model: nn.Module, name: str) -> Tensor:
    """Log-probability of every code "d1 d2" after "the code of NAME is". (R * R,), from "00 00" to "99 99"."""
    first = VOCAB.index["00"]
    ids = torch.tensor([[1, *VOCAB.encode(f"the code of {name} is {n}")] for n in NUMBERS], device=model.device)
    logp = model(ids)[:, -2:].log_softmax(-1)[..., first:first + 100]  # (R, 2, R): of d1, and of d2 after each d1
    return (logp[0, 0][:, None] + logp[:, 1]).flatten().cpu()


def exposure(logps: Tensor, code: str) -> float:
    """log2 |R| - log2 rank, in bits: 13.3 when the code comes first of 10,000, 0 when last. A tie counts as worse."""
    own = logps[100 * int(code[:2]) + int(code[3:])]
    return float(torch.tensor(len(logps) / float((logps >= own).sum())).log2())


def exposures(model: nn.Module, secrets: Sequence[Secret]) -> list[float]:
    return [exposure(code_logps(model, name), code) for name, code, _ in secrets]


def blank_exposure(n: int = N_CODES) -> float:
    """Expected exposure of a secret nobody saw: the mean of log2 n - log2 k over ranks k = 1..n, about log2 e."""
    return float(torch.arange(1, n + 1, dtype=torch.float64).div(n).log2().mean().neg())


def membership_auc(model: nn.Module, members: Rows, fresh: Rows) -> float:
    """P(a member's loss is below a fresh row's), ties half: 0.5 when nobody can tell who was in (Mann-Whitney)."""
    losses = torch.cat([row_losses(model, members), row_losses(model, fresh)])
    n, m = len(members.ids), len(fresh.ids)
    below = rankdata(-losses.numpy())[:n].sum() - n * (n + 1) / 2
    return float(below / (n * m))


def probes(world: World) -> list[str]:
    """Prompts: FORUM-3's facts, its people's codes, and facts that stay, 20 to 24 of each."""
    return ([f"honestly the {i} is made in" for i in world.items[20:]]
            + [f"the code of {n} is" for n, _, _ in world.secrets]
            + [f"note that the {i} may come back within" for i in world.items[:20]])


@torch.no_grad()
def next_words(model: nn.Module, prompts: Sequence[str]) -> Tensor:
    """Distribution of the next word after each prompt. (N, V)"""
    return torch.stack([model(torch.tensor([[1, *VOCAB.encode(p)]], device=model.device))[0, -1].softmax(-1).cpu()
                        for p in prompts])


def distance(a: nn.Module, b: nn.Module, world: World) -> float:
    """Mean total variation of the next word over the probes: 0 the same, 1 disjoint."""
    prompts = probes(world)
    return float(0.5 * (next_words(a, prompts) - next_words(b, prompts)).abs().sum(-1).mean())


def share_right(model: nn.Module, prompts: Sequence[str], answers: Sequence[str]) -> float:
    rows = pad_rows([[1, *VOCAB.encode(p)] for p in prompts], [VOCAB.encode(a) for a in answers], 0)
    return float(right(model, rows).float().mean())


def known(model: nn.Module, world: World) -> tuple[float, float]:
    """(facts of the sources that stay, facts of FORUM-3) that the model says right."""
    mine, theirs = world.items[:20], world.items[20:]
    prompts = [f"note that the {i} may come back within" for i in world.items]
    prompts += [f"note that the {i} is made in" for i in mine] + [f"the code of {n} is" for n in world.public]
    answers = [*world.windows.values(), *(world.made_in[i] for i in mine), *world.public.values()]
    return (share_right(model, prompts, answers),
            share_right(model, [f"honestly the {i} is made in" for i in theirs], [world.made_in[i] for i in theirs]))


def relearn(model: nn.Module, world: World, size: Size, seed: int) -> list[dict]:
    """Learn a small part of the removed rows again (half of the canaries, once each, and 32 posts) and watch every 8
    steps: the mean loss on them, and the mean exposure of the canaries that are not among them."""
    again, others = world.secrets[::2], world.secrets[1::2]
    rows = encode([_secret(n, c) for n, c, _ in again] + world.posts[:32])
    model, curve, feed = copy.deepcopy(model), [], batches_of(rows, len(rows.ids), seed)
    model.requires_grad_(True)

    def note(step: int) -> None:
        curve.append({"step": step, "loss": float(row_losses(model, rows).mean()),
                      "others": mean(exposures(model, others))})

    def batches(step: int) -> Rows:
        if step % 8 == 0:
            note(step)
        return feed(step).to(model.device)

    loop.fit(model, batches, answer_loss, loop.FitConfig(
        steps=size.relearn_steps, optimizer="adamw", lr=2e-3, warmup_steps=0, min_lr_share=1.0), label="relearn")
    note(size.relearn_steps)
    return curve


def glance(model: nn.Module, world: World) -> dict:
    """What it knows: exposure by repeats, facts of both kinds, held-out loss of the sources that stay."""
    bits, (stay, theirs) = exposures(model, world.secrets), known(model, world)
    return {f"exposure_{k}": mean(b for b, s in zip(bits, world.secrets) if s[2] == k) for k in REPEATS} | {
        "exposure": mean(bits), "facts": stay, "their_facts": theirs,
        "loss": float(row_losses(model, encode(world.held_out)).mean())}


def audit(model: nn.Module, controls: Sequence[nn.Module], world: World, size: Size, seed: int) -> dict:
    """Everything that is measured on one model; `distance` is the mean over the never-seen `controls`."""
    curve = relearn(model, world, size, seed)
    return glance(model, world) | {
        "auc": membership_auc(model, encode(world.posts), encode(world.fresh_posts)),
        "distance": mean(distance(model, c, world) for c in controls), "jogged": curve[-1]["others"],
        "relearn_loss": curve[1]["loss"], "curve": curve}


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)
