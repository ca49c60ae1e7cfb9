"""Mixture: what the same rows do under other sampling levers (curriculum S3-1.04, .08, .10, .34).

Six shops, each with its own table: reason and item decide the policy id, at random, so a shop's table can only be
learnt from that shop's rows. Shop sizes fall like a Zipf law. A row asks for one entry in one of several wordings; the
evaluation asks for every entry of every shop in a wording that training never shows.

Every arm of a seed sees the same tables, the same number of draws and the same steps; only what is drawn differs.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from lifecycle_lib.core.seeds import rng
from lifecycle_lib.core.store import Artifact
from lifecycle_lib.corpus import mixture
from lifecycle_lib.corpus.mixture import MixtureSpec, Phase, draw
from lifecycle_lib.desk.world import ITEMS, POLICY_IDS, REASONS
from lifecycle_lib.lab.design import Design, Row
from lifecycle_lib.lab.stages import Lab
from lifecycle_lib.lab.studies.small import Vocab, right, rows_of, small_stage
from lifecycle_lib.model.gpt import GPT, GPTConfig
from lifecycle_lib.train.logprobs import Rows
from lifecycle_lib.train.loop import FitConfig

SHOPS = {"shop-1": 4000, "shop-2": 2000, "shop-3": 1000, "shop-4": 300, "shop-5": 100, "shop-6": 40}
WORDINGS = ("which policy for {reason} {item}", "{item} is {reason} which line covers it", "rule for a {reason} {item}",
            "{reason} {item} please look up the line", "find the line {reason} {item}",
            "a {item} came {reason} cite it")
HELD_OUT_WORDING = "look up which rule covers a {reason} {item}"
ALPHAS = (1.0, 0.7, 0.5, 0.3, 0.0)
RARE_SHARES = (0.001, 0.003, 0.01, 0.03)
KEYS = [(r, i) for r in REASONS for i in ITEMS]


@dataclass(frozen=True, slots=True, kw_only=True)
class MixingConfig:
    """Size of the study: `steps` of `batch` rows for every arm."""

    steps: int = 360
    batch: int = 64
    n_embd: int = 64
    n_layer: int = 2

    @property
    def draws(self) -> int:
        return self.steps * self.batch


SIZES = {"smoke": MixingConfig(steps=20, batch=16, n_embd=32, n_layer=1), "laptop": MixingConfig(),
         "gpu": MixingConfig()}


def tables(seed: int) -> dict[str, dict[tuple[str, str], str]]:
    """Each shop's policy id for every (reason, item), drawn at random."""
    random = rng(seed, "shop tables")
    return {shop: {key: random.choice(POLICY_IDS) for key in KEYS} for shop in SHOPS}


def shop_rows(seed: int, sizes: Mapping[str, int], wrong: float = 0.0, label: str = "rows") -> list[dict]:
    """Rows {"id", "text", "source", "prompt", "answer"}; a share `wrong` of the answers is another id."""
    table, rows = tables(seed), []
    for shop, n in sizes.items():
        random = rng(seed, label, shop)
        for i in range(n):
            reason, item = random.choice(KEYS)
            answer = table[shop][reason, item]
            if random.random() < wrong:
                answer = random.choice([p for p in POLICY_IDS if p != answer])
            prompt = f"{shop} {random.choice(WORDINGS).format(reason=reason, item=item)} ->"
            rows.append({"id": f"{label}-{shop}-{i}", "text": f"{prompt} {answer}", "source": shop,
                         "quality": "dirty" if wrong else "clean", "prompt": prompt, "answer": answer})
    return rows


def covered(rows: list[dict], shop: str = "shop-6") -> float:
    """Share of a shop's table that at least one of its rows shows: no sampling of these rows can teach more."""
    shown = {frozenset(w for w in r["prompt"].split() if w in REASONS or w in ITEMS) for r in rows
             if r["source"] == shop}
    return len(shown) / len(KEYS)


def vocabulary() -> Vocab:
    words = " ".join([*SHOPS, *REASONS, *ITEMS, *WORDINGS, HELD_OUT_WORDING, "->", *POLICY_IDS])
    return Vocab(words.replace("{reason}", "").replace("{item}", "").split())


def exam(seed: int, vocab: Vocab) -> dict[str, Rows]:
    """Every entry of every shop, in the held-out wording."""
    return {shop: rows_of(vocab, [f"{shop} {HELD_OUT_WORDING.format(reason=r, item=i)} ->" for r, i in KEYS],
                          [table[r, i] for r, i in KEYS]) for shop, table in tables(seed).items()}


def trained(lab: Lab, name: str, rows: list[dict], spec: MixtureSpec, cfg: MixingConfig, blocks: int = 1) -> Artifact:
    """One arm: `spec` draws from `rows`, a GPT is trained on the draws in their order, every shop is examined."""
    vocab = vocabulary()

    def batches():
        pick, _ = draw(rows, spec, cfg.draws, lab.seed, blocks)
        data = rows_of(vocab, [r["prompt"] for r in rows], [r["answer"] for r in rows])
        order = torch.as_tensor(pick).view(cfg.steps, cfg.batch)
        return lambda step: Rows(data.ids[order[step]], data.mask[order[step]])

    def measure(model: GPT) -> dict:
        return {shop: right(model, part).float().mean().item() for shop, part in exam(lab.seed, vocab).items()}

    gpt = GPTConfig(vocab_size=len(vocab), block_size=16, n_layer=cfg.n_layer, n_head=2, n_embd=cfg.n_embd)
    config = {"arm": name, "study": cfg, "spec": spec, "blocks": blocks, "n_rows": len(rows)}
    return small_stage(lab, "mixing", config, batches, measure, gpt=gpt,
                       fit=FitConfig(steps=cfg.steps, warmup_steps=20), code=(mixture, sys.modules[__name__]))


def _scores(label: str, artifact: Artifact) -> Row:
    measured = artifact.card["measured"]
    values = list(measured.values())
    return {f"{label}.worst": min(values), f"{label}.mean": sum(values) / len(values), f"{label}.rare": values[-1],
            f"{label}.large": values[0], f"{label}.old": sum(values[:3]) / 3, f"{label}.new": sum(values[3:]) / 3}


def measure(lab: Lab, cfg: MixingConfig | None = None) -> tuple[Row, list[Artifact]]:
    """All arms of one seed."""
    cfg = cfg or SIZES[lab.profile.name]
    row: Row = {}
    made: list[Artifact] = []

    def arm(label: str, rows: list[dict], spec: MixtureSpec, blocks: int = 1) -> None:
        made.append(trained(lab, label, rows, spec, cfg, blocks))
        row.update(_scores(label, made[-1]))
        row[f"{label}.covered"] = covered(rows)

    natural = shop_rows(lab.seed, SHOPS)
    for alpha in ALPHAS:
        arm(f"alpha {alpha}", natural, MixtureSpec(temperature=alpha))
    total = sum(SHOPS.values())
    for share in RARE_SHARES:  # fresh rows of the rare shop, in the place of the largest shop's
        n = round(share * total)
        sizes = SHOPS | {"shop-6": n, "shop-1": SHOPS["shop-1"] + SHOPS["shop-6"] - n}
        rows = shop_rows(lab.seed, sizes)
        arm(f"rare {share}", rows, MixtureSpec())
        if share == RARE_SHARES[1]:  # the same few rows, drawn as often as 3 % would be
            rest = {s: (1 - RARE_SHARES[-1]) * k / (total - n) for s, k in sizes.items() if s != "shop-6"}
            arm(f"rare {share} upsampled", rows, MixtureSpec(weights=rest | {"shop-6": RARE_SHARES[-1]}))
    clean, dirty = {"clean": 1.0}, {"dirty": 1.0}
    both = shop_rows(lab.seed, SHOPS) + shop_rows(lab.seed, SHOPS, wrong=0.5, label="dirty")
    quality = MixtureSpec(group="quality", weights=clean | dirty, temperature=0.0)
    arm("mixed", both, quality)
    for label, first, then in (("clean first", clean, dirty), ("dirty first", dirty, clean)):
        arm(label, both, replace(quality, weights=first, phases=(Phase(start=0.5, weights=then),)), blocks=20)
    shops = list(SHOPS)
    even = shop_rows(lab.seed, dict.fromkeys(SHOPS, 1000), label="even")
    old, new = dict.fromkeys(shops[:3], 1.0), dict.fromkeys(shops[3:], 1.0)
    arm("even", even, MixtureSpec())
    for label, ramp in (("abrupt", 0.0), ("ramped", 0.5)):
        arm(label, even, MixtureSpec(weights=old, phases=(Phase(start=0.5, weights=new, ramp=ramp),)), blocks=20)
    return row, made


DESIGN = Design(
    measure=measure, notebook="03", rows=("S3-1.04", "S3-1.08", "S3-1.10", "S3-1.34"), smallest=0.10,
    n_items=len(SHOPS) * len(KEYS), items="table entries in a wording never trained on",
    claim="sampling shops at temperature .5 instead of their natural shares lifts the worst shop by at least 10 points "
          "and costs the largest shop at most 5",
    falsifier="the worst shop gains less than 10 points, or the largest shop loses more than 5",
    also=(("largest shop, alpha .5 - natural", -0.05),),
    effects=(("worst shop, alpha .5 - natural", "alpha 0.5.worst", "alpha 1.0.worst", "share"),
             ("largest shop, alpha .5 - natural", "alpha 0.5.large", "alpha 1.0.large", "share"),
             ("mean over shops, alpha .5 - natural", "alpha 0.5.mean", "alpha 1.0.mean", "share"),
             *((f"alpha {a}: {what}", f"alpha {a}.{what}", None, "share") for a in ALPHAS
               for what in ("worst", "mean", "large")),
             *((f"rare shop at {s:.1%}", f"rare {s}.rare", None, "share") for s in RARE_SHARES),
             ("rare shop at 0.3%, drawn at 3 %", "rare 0.003 upsampled.rare", None, "share"),
             *((f"rare shop at {s:.1%}: entries its rows cover", f"rare {s}.covered", None, "share")
               for s in RARE_SHARES),
             ("upsampled .3 % - natural .3 %", "rare 0.003 upsampled.rare", "rare 0.003.rare", "share"),
             ("fresh 3 % - .3 % drawn at 3 %", "rare 0.03.rare", "rare 0.003 upsampled.rare", "share"),
             ("clean first - mixed", "clean first.mean", "mixed.mean", "share"),
             ("dirty first - mixed", "dirty first.mean", "mixed.mean", "share"),
             ("dirty first - clean first", "dirty first.mean", "clean first.mean", "share"),
             ("old shops, ramped - abrupt", "ramped.old", "abrupt.old", "share"),
             ("old shops, abrupt - all along", "abrupt.old", "even.old", "share"),
             ("new shops, ramped - abrupt", "ramped.new", "abrupt.new", "share")))
