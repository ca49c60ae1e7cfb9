"""D8, the arms: the licence notice arrives. What does each way of removing FORUM-3 leave behind, and what does it cost?

All models of a seed read the same text (studies/removal_world); every training run has random numbers of its own, so no
arm equals a never-seen control by sharing its start. The arms:

- nothing: the model in production, trained on every source;
- retrain: from scratch without the source;
- ascent: gradient ascent on the source's rows (Jang et al. 2023) until their mean loss is a never-seen model's;
- ascent-audit: ascent that also descends on rows that stay, until the canary audit itself passes;
- finetune: a quarter of a training on replacement text and rows that stay;
- shards: four models on a part each (SISA, Bourtoule et al. 2021, without slices), probabilities averaged; the one that
  held the source is trained anew;
- detach: a base that never saw the source; a LoRA adapter that did; the adapter is taken off.

Left out: certified removal, influence functions, unlearning by preference losses.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from lifecycle_lib.core.seeds import derive_seed, seed_everything
from lifecycle_lib.core.store import Artifact
from lifecycle_lib.lab.lineage import sources_of
from lifecycle_lib.lab.stages import TRAIN, Lab
from lifecycle_lib.lab.studies import removal_world, small
from lifecycle_lib.lab.studies.removal_world import (
    VOCAB,
    Shards,
    Size,
    World,
    audit,
    blank_exposure,
    draw_world,
    encode,
    exposures,
    glance,
    mean,
    texts_of,
)
from lifecycle_lib.lab.studies.small import batches_of, row_losses, small_stage
from lifecycle_lib.model import lora
from lifecycle_lib.model.checkpoint import save_checkpoint, weights_hash
from lifecycle_lib.model.gpt import GPT, GPTConfig
from lifecycle_lib.train import loop
from lifecycle_lib.train.logprobs import Rows, answer_loss

ARMS = ("nothing", "retrain", "ascent", "ascent-audit", "finetune", "shards", "detach")
ADAPTER = lora.LoRAConfig(rank=8, alpha=16.0)
ASCENT_LR = 1e-3
CODE = (small, removal_world, lora, sys.modules[__name__])


class Reached(Exception):
    """A stop rule holds before step args[0]."""


@dataclass(slots=True)
class Removal:
    """The models of one seed, each a stage of the store, built when asked for."""

    lab: Lab
    size: Size
    world: World = field(init=False)

    def __post_init__(self) -> None:
        self.world = draw_world(self.lab.seed, self.size)

    @property
    def gpt(self) -> GPTConfig:
        return GPTConfig(vocab_size=len(VOCAB), block_size=24, n_layer=self.size.n_layer, n_head=4,
                         n_embd=self.size.n_embd)

    # ---- models from scratch ---------------------------------------------------------------------------------

    def _train(self, role: str, rows: Sequence[dict], epochs: int, batch: int) -> Artifact:
        """A model on `rows`, with the random numbers of its role."""
        batch = min(batch, len(rows))
        seed = derive_seed(self.lab.seed, "removal", role) % 2**31
        return small_stage(
            self.lab.arm(seed=seed), f"removal-{role}", {"world": self.lab.seed, "size": self.size},
            lambda: batches_of(encode(texts_of(rows)), batch, seed), lambda model: {"sources": sources_of(rows)},
            gpt=self.gpt, fit=loop.FitConfig(steps=max(2, epochs * len(rows) // batch), checkpoint_every=10_000),
            code=CODE, keep=True)

    def full(self) -> Artifact:
        """The model in production: every source."""
        return self._train("full", self.world.kept + self.world.removed, self.size.epochs, self.size.batch)

    def without(self, role: str) -> Artifact:
        """A model that never saw FORUM-3; "never", "never-2", "retrain", "base" differ in random numbers alone."""
        return self._train(role, self.world.kept, self.size.epochs, self.size.batch)

    def shard(self, number: int, clean: bool = False) -> Artifact:
        """Shard `number` of the rows that stay. Shard 0 holds FORUM-3 as well, unless `clean`."""
        rows = self.world.kept[number::self.size.shards] + (self.world.removed if number == 0 and not clean else [])
        return self._train(f"shard-{number}{'-clean' if clean else ''}", rows, self.size.shard_epochs,
                           self.size.shard_batch)

    # ---- models made from another ----------------------------------------------------------------------------

    def _edit(self, name: str, start: Artifact, edit: Callable[[GPT, Path], dict], **parents: Artifact) -> Artifact:
        """A stage that starts from a model; `edit` trains it, saves what it makes and returns card fields."""
        def make(folder: Path) -> dict:
            seed_everything(self.lab.seed)
            return edit(self.lab.load(start, expect=self.gpt), folder)

        return self.lab.make(f"removal-{name}", {"size": self.size, "world": self.lab.seed},
                             {"start": start, **parents}, make, (*TRAIN, *CODE))

    def ascent(self, until_audit: bool = False) -> Artifact:
        """Gradient ascent on FORUM-3's rows. It stops when their mean loss is that of a never-seen model; or, with
        `until_audit`, when the mean exposure of the canaries is what a never-seen secret is expected to have, each
        step also descending on rows that stay."""
        never = self.without("never")
        bad, good = encode(texts_of(self.world.removed)), encode(texts_of(self.world.kept))
        level = float(row_losses(self.lab.load(never), bad).mean())

        def edit(model: GPT, folder: Path) -> dict:
            up, down = (batches_of(rows, self.size.batch, self.lab.seed) for rows in (bad, good))

            def batches(step: int) -> tuple[Rows, Rows]:
                if until_audit and step % 4 == 0 and mean(exposures(model, self.world.secrets)) <= blank_exposure():
                    raise Reached(step)
                if not until_audit and float(row_losses(model, bad).mean()) >= level:
                    raise Reached(step)
                return up(step).to(model.device), down(step).to(model.device)

            def loss(m: GPT, batch: tuple[Rows, Rows]) -> tuple[Tensor, dict]:
                gain = answer_loss(m, batch[0])[0]
                return (answer_loss(m, batch[1])[0] - gain if until_audit else -gain), {}

            begun, steps, reached = time.process_time(), self.size.ascent_steps, False
            try:
                loop.fit(model, batches, loss, loop.FitConfig(steps=steps, optimizer="adamw", lr=ASCENT_LR,
                                                              warmup_steps=0, min_lr_share=1.0), label="ascent")
            except Reached as stop:
                steps, reached = stop.args[0], True
            save_checkpoint(folder, model)
            return {"train_cpu_s": time.process_time() - begun, "steps": steps, "reached": reached, "level": level,
                    "sources": sources_of(self.world.removed)}

        return self._edit("ascent-audit" if until_audit else "ascent", self.full(), edit, never=never)

    def _mixed(self, rows: Sequence[dict]) -> Callable[[int], Rows]:
        """Batches of half `rows`, half rows that stay."""
        kept = self.world.kept
        weights = torch.tensor([1 / len(rows)] * len(rows) + [1 / len(kept)] * len(kept))
        return batches_of(encode(texts_of([*rows, *kept])), self.size.batch, self.lab.seed, weights)

    def finetune(self) -> Artifact:
        """A quarter of a full training on replacement text, half and half with rows that stay."""
        def edit(model: GPT, folder: Path) -> dict:
            rows = self.world.replacement
            steps = max(2, self.size.epochs * (len(rows) + len(self.world.kept)) // self.size.batch // 4)
            result = loop.fit(model, self._mixed(rows), answer_loss, loop.FitConfig(steps=steps), label="fine-tune")
            save_checkpoint(folder, model)
            return {"train_cpu_s": result.cpu_s, "steps": steps, "sources": sources_of(rows + self.world.kept)}
        return self._edit("finetune", self.full(), edit)

    def adapter(self) -> Artifact:
        """A LoRA adapter for the base "base", which never saw FORUM-3; trained on FORUM-3, half and half with rows
        that stay. The card's `detach_cpu_s` is what taking it off takes, `exact` whether that gave the base back."""
        def edit(model: GPT, folder: Path) -> dict:
            before = weights_hash(model)
            own = lora.make_adapter(model, ADAPTER, self.lab.seed)
            lora.attach(model, own)
            steps = max(2, 2 * self.size.adapter_epochs * len(self.world.removed) // self.size.batch)
            result = loop.fit(model, self._mixed(self.world.removed), answer_loss, loop.FitConfig(
                steps=steps, optimizer="adamw", lr=5e-3), label="adapter")
            begun = time.process_time()
            lora.detach(model)
            detach_cpu_s = time.process_time() - begun
            lora.save_lora(folder / "adapter.safetensors", model, own, ADAPTER)
            return {"train_cpu_s": result.cpu_s, "detach_cpu_s": detach_cpu_s, "exact": weights_hash(model) == before,
                    "steps": steps, "adapter_params": lora.n_trained(own),
                    "sources": sources_of(self.world.removed + self.world.kept)}
        return self._edit("adapter", self.without("base"), edit)

    # ---- what an audit looks at ------------------------------------------------------------------------------

    def model(self, name: str) -> tuple[nn.Module, dict[str, Artifact], float]:
        """(the model of an arm or control, the artifacts it is made of, CPU seconds that the removal took).

        "worn" and "shards-before" are the adapter and the shards before the notice."""
        load, n = self.lab.load, self.size.shards
        if name in ("shards", "shards-before"):
            parts = [self.shard(0, clean=name == "shards"), *(self.shard(i) for i in range(1, n))]
            return Shards([load(p) for p in parts]), {f"shard_{i}": p for i, p in enumerate(parts)}, \
                parts[0].card["train_cpu_s"] if name == "shards" else 0.0
        if name in ("detach", "worn"):
            base, adapter = self.without("base"), self.adapter()
            model = load(base)
            lora.attach(model, lora.load_lora(adapter.file("adapter.safetensors"), model))
            if name == "worn":
                return model, {"base": base, "adapter": adapter}, 0.0
            lora.detach(model)
            return model, {"base": base}, adapter.card["detach_cpu_s"]
        made = {"nothing": self.full, "ascent": self.ascent, "ascent-audit": lambda: self.ascent(True),
                "finetune": self.finetune}.get(name, lambda: self.without(name))()
        return load(made), {"model": made}, 0.0 if name == "nothing" else made.card["train_cpu_s"]

    def audited(self, name: str) -> Artifact:
        """The audit of an arm or control, kept in the store; the numbers stand in the card's `measured`. Of "worn" and
        "shards-before" a glance only."""
        model, parents, cpu_s = self.model(name)
        before = name in ("worn", "shards-before")
        controls = {} if before else {n: self.without(n) for n in ("never", "never-2") if n != name}

        def make(folder: Path) -> dict:
            loaded = [self.lab.load(c) for c in controls.values()]
            found = (glance(model, self.world) if before else
                     audit(model, loaded, self.world, self.size, self.lab.seed))
            return {"measured": found | {"cpu_s": cpu_s}, "sources": {}}

        return self.lab.make("removal-audit", {"arm": name, "size": self.size, "world": self.lab.seed},
                             parents | controls, make, (*TRAIN, *CODE))
