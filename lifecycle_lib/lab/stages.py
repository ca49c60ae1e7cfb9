"""The stage graph: each stage is a pure function of a frozen config and its parents, kept in the store.

tokenizer -> base -> sft -> dpo -> rlvr -> int8 / int4, and an evaluation of each. Ask for any stage: what it needs
is built first, what is already there is returned at once.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType

import torch

from lifecycle_lib.core import seeds
from lifecycle_lib.core.records import read_json, write_json
from lifecycle_lib.core.seeds import pick_device, seed_everything
from lifecycle_lib.core.store import Artifact, Store
from lifecycle_lib.corpus import text as corpus_text
from lifecycle_lib.corpus.text import read_corpus
from lifecycle_lib.desk import cases, documents, world
from lifecycle_lib.judge import evals, verifiers
from lifecycle_lib.lab.actuals import watch
from lifecycle_lib.lab.lineage import sources_of
from lifecycle_lib.lab.profiles import Profile, pick_profile
from lifecycle_lib.model import checkpoint, gpt, quantise, sampling, tokenizer
from lifecycle_lib.model.checkpoint import load_checkpoint, save_checkpoint
from lifecycle_lib.model.gpt import GPT
from lifecycle_lib.model.memory import weight_bytes
from lifecycle_lib.model.quantise import quantise_model
from lifecycle_lib.model.tokenizer import Tokenizer
from lifecycle_lib.serve import engine
from lifecycle_lib.serve.engine import Engine
from lifecycle_lib.train import chat, dpo, grpo, logprobs, loop, pretrain, sft
from lifecycle_lib.train.logprobs import Rows, answer_loss

STAGES = ("base", "sft", "dpo", "rlvr", "int8", "int4")
WORLD: tuple[ModuleType, ...] = (world, cases, documents, seeds)
TRAIN: tuple[ModuleType, ...] = (gpt, tokenizer, checkpoint, loop, logprobs)
QUANTISATION = {"int8": {"bits": 8}, "int4": {"bits": 4, "group_size": 32}}
REWARDS: dict[str, Callable] = {"full": verifiers.full_verifier, **verifiers.WEAK_VERIFIERS}


def reward_of(name: str) -> grpo.RewardFn:
    """A reward function over (texts, cases) from the verifier called `name`."""
    if name not in REWARDS:
        raise ValueError(f"verifier {name!r} is unknown; use one of {', '.join(REWARDS)}")
    return lambda texts, where: [REWARDS[name](t, c) for t, c in zip(texts, where)]


def generated(texts: Iterable[str]) -> dict:
    """The card field `sources` of text that the desk's own code made."""
    return sources_of({"text": text, **world.PROVENANCE} for text in texts)


@dataclass(slots=True)
class Lab:
    """One run: a store, a profile, a seed, a device; optionally the user's own text, or a public checkpoint."""

    profile: Profile | None = None
    seed: int = 0
    device: str | torch.device | None = None
    store: Store = field(default_factory=Store)
    corpus: str | Path | None = None
    base_folder: str | Path | None = None  # a public checkpoint in place of our own pretraining

    def __post_init__(self) -> None:
        self.device = pick_device(str(self.device) if self.device else None)
        if self.profile is None or isinstance(self.profile, str):
            self.profile = pick_profile(self.profile, self.device)
        if self.corpus and self.base_folder:
            raise ValueError(f"corpus {self.corpus} and base_folder {self.base_folder}: own text goes into our own "
                             "pretraining, which a public checkpoint replaces; give one of the two")

    def arm(self, **changes: object) -> "Lab":
        """The same lab with profile fields (or seed) replaced: one arm of an ablation."""
        own = {k: changes.pop(k) for k in ("seed",) if k in changes}
        return replace(self, profile=replace(self.profile, **changes), **own)

    def make(self, name: str, config: dict, parents: dict[str, Artifact], make: Callable[[Path], dict],
              code: Sequence[ModuleType], data: Sequence[Path] = ()) -> Artifact:
        config = {"seed": self.seed, "device": self.device.type, **config}
        return self.store.get_or_make(name, config, parents,
                                      lambda folder: {"device": str(self.device), **make(folder)},
                                      code=(*WORLD, *code), data=data)

    # ---- stages that make weights --------------------------------------------------------------------------

    def tokenizer(self) -> Artifact:
        """Byte BPE over the desk's text; the same for every seed, so checkpoints stay comparable."""
        if self.base_folder:
            return self._public.tokenizer(self)

        def make(folder: Path) -> dict:
            texts = documents.tokenizer_corpus(0)
            tok = Tokenizer.train(texts, self.profile.gpt.vocab_size, world.SPECIAL_TOKENS)
            tok.save(folder / "tokenizer.json")
            return {"vocab_size": tok.vocab_size, "sources": generated(texts)}
        return self.store.get_or_make("tokenizer", {"vocab_size": self.profile.gpt.vocab_size}, {}, make,
                                      code=(world, cases, documents, seeds, tokenizer))

    @property
    def _public(self) -> ModuleType:
        from lifecycle_lib.lab import public  # transformers: seconds to import
        return public

    def load_tokenizer(self) -> Tokenizer:
        if self.base_folder:
            return self._public.load_tokenizer(self.tokenizer())
        return Tokenizer.load(self.tokenizer().file("tokenizer.json"))

    def load(self, artifact: Artifact, expect: gpt.GPTConfig | None = None) -> GPT:
        """An artifact's model. Raises ValueError when its shape is not `expect` (of our own checkpoints)."""
        if self.base_folder:
            return self._public.load_model(artifact.path, self.device)
        return load_checkpoint(artifact.path, self.device, expect)

    def _save(self, folder: Path, model: GPT, settings: dict | None = None) -> None:
        (self._public.save_model if self.base_folder else save_checkpoint)(folder, model, settings)

    def _train(self, folder: Path, model: GPT, batches: Callable, loss_fn: Callable, cfg: loop.FitConfig,
               label: str) -> dict:
        with watch() as seen:
            result = loop.fit(model, seen.counted(batches), loss_fn, cfg, folder, label)
        self._save(folder, model)
        write_json(folder / "history.json", result.history)
        return {"steps": result.steps, "first_loss": result.losses[0], "last_loss": result.losses[-1],
                "n_params": model.n_params(), "actual": seen.as_card()}

    def _corpus_rows(self, tok: Tokenizer) -> tuple[torch.Tensor, torch.Tensor, int]:
        """(train stream, held-out stream, held-out bytes) of the user's text."""
        own = read_corpus(self.corpus)
        ends = [tok.special["<bos>"]], [tok.special["<eos>"]]
        ids = [ends[0] + tok.encode(d, allow_special=False) + ends[1] for d in own.train + own.held_out]
        train, held = pretrain.pack(ids, len(own.held_out))
        if len(train) <= self.profile.block_tokens:
            raise ValueError(f"{self.corpus}: {len(train)} tokens of text, "
                             f"fewer than a block of {self.profile.block_tokens}; give more text")
        return train, held, sum(len(d.encode()) for d in own.held_out)

    def base(self) -> Artifact:
        """Pretraining on desk documents, with a share of the user's own text when there is a corpus."""
        if self.base_folder:
            return self._public.base(self)
        p, tok = self.profile, self.load_tokenizer()

        def make(folder: Path) -> dict:
            seed_everything(self.seed)
            model = GPT(p.gpt).to(self.device)
            docs = documents.draw_documents(p.n_documents, self.seed)
            stream, held = pretrain.pack([tok.encode(d["text"]) for d in docs], max(1, p.n_documents // 40))
            desk = pretrain.lm_batches(stream, p.pretrain_batch, p.block_tokens, self.seed)
            batches, card = desk, {"sources": sources_of(docs)}
            if self.corpus:
                own, own_held, n_bytes = self._corpus_rows(tok)
                n_own = max(1, round(p.corpus_share * p.pretrain_batch))
                mine = pretrain.lm_batches(own, n_own, p.block_tokens, self.seed + 1)
                desk = pretrain.lm_batches(stream, p.pretrain_batch - n_own, p.block_tokens, self.seed)
                batches = lambda step: Rows(torch.cat([desk(step).ids, mine(step).ids]),  # noqa: E731
                                            torch.cat([desk(step).mask, mine(step).mask]))
                before = pretrain.lm_loss(model, own_held, p.block_tokens)
                whose = {"source": f"user:{Path(self.corpus).name}", "licence": "NOASSERTION"}
                card["sources"] |= sources_of({"text": d, **whose} for d in read_corpus(self.corpus).train)
            card |= self._train(folder, model, lambda s: batches(s).to(self.device), answer_loss, p.pretrain, "base")
            card["held_out_loss"] = pretrain.lm_loss(model, held, p.block_tokens)
            if self.corpus:
                after = pretrain.lm_loss(model, own_held, p.block_tokens)
                card["corpus"] = {"held_out_loss_before": before, "held_out_loss": after, "held_out_bytes": n_bytes,
                                  "nats_per_byte": after * len(own_held) / n_bytes}
            return card

        config = {k: getattr(p, k) for k in ("gpt", "n_documents", "block_tokens", "pretrain_batch", "pretrain")}
        if self.corpus:
            read_corpus(self.corpus)  # a bad file is refused before the store is touched
            config |= {"corpus_share": p.corpus_share}
        return self.make("base", config, {"tokenizer": self.tokenizer()}, make, (*TRAIN, pretrain, corpus_text),
                          data=[Path(self.corpus)] if self.corpus else [])

    def sft(self, parent: Artifact | None = None) -> Artifact:
        """Answer-only fine-tuning on demonstrations, a share of which invent a label."""
        p, tok, parent = self.profile, self.load_tokenizer(), parent or self.base()
        cfg = self._public.gentle(p.sft) if self.base_folder else p.sft

        def make(folder: Path) -> dict:
            model = self.load(parent, expect=p.gpt)
            train = cases.draw_cases(p.sft.steps * p.sft_batch, self.seed, "sft")
            rows = sft.make_demonstrations(train, p.claim_share, self.seed)
            batches = sft.sft_batches(sft.encode_rows(tok, rows), p.sft_batch, self.seed, tok.special["<pad>"],
                                      model.cfg.block_size)
            card = self._train(folder, model, lambda s: batches(s).to(self.device), answer_loss, cfg, "sft")
            return card | {"sources": generated(r["prompt"] + r["answer"] for r in rows)}

        config = {"sft_batch": p.sft_batch, "claim_share": p.claim_share, "sft": cfg}
        return self.make("sft", config, {"tokenizer": self.tokenizer(), "base": parent}, make, (*TRAIN, sft))

    def dpo(self, parent: Artifact | None = None) -> Artifact:
        """Preference pairs: the plain answer over the one that invents a label."""
        p, tok, parent = self.profile, self.load_tokenizer(), parent or self.sft()

        def make(folder: Path) -> dict:
            model = self.load(parent, expect=p.gpt)
            preferences = dpo.make_pairs(cases.draw_cases(p.n_pairs, self.seed, "dpo"))
            pairs = dpo.encode_pairs(tok, preferences)
            ref = dpo.reference_logps(self.load(parent), pairs, tok.special["<pad>"])
            batches = dpo.dpo_batches(pairs, ref, p.dpo_batch, self.seed, tok.special["<pad>"], self.device)
            card = self._train(folder, model, batches, lambda m, b: dpo.pair_loss(m, b, p.beta), p.dpo, "dpo")
            return card | {"sources": generated(r["prompt"] + r["chosen"] + r["rejected"] for r in preferences)}

        config = {k: getattr(p, k) for k in ("n_pairs", "dpo_batch", "beta", "dpo")}
        return self.make("dpo", config, {"tokenizer": self.tokenizer(), "parent": parent}, make, (*TRAIN, dpo))

    def rlvr(self, parent: Artifact | None = None, reward: str = "full", shuffle: bool = False) -> Artifact:
        """Verifier rewards by GRPO. `shuffle` deals rewards out at random within each group: the control."""
        p, tok, parent = self.profile, self.load_tokenizer(), parent or self.dpo()
        reward_fn, cfg = reward_of(reward), p.grpo
        if self.base_folder:
            cfg = replace(cfg, max_new_tokens=max(cfg.max_new_tokens, self._public.answer_room(tok)))

        def make(folder: Path) -> dict:
            model = self.load(parent, expect=p.gpt)
            train = cases.draw_cases(p.n_rl_cases, self.seed, "rlvr")
            batches = grpo.grpo_batches(model, tok, train, reward_fn, cfg, self.seed, shuffle)
            card = self._train(folder, model, batches, lambda m, b: grpo.rollout_loss(m, b, cfg), p.rlvr, "rlvr")
            return card | {"sources": generated(c.prompt for c in train)}

        config = {"reward": reward, "shuffle": shuffle, "grpo": cfg, "n_rl_cases": p.n_rl_cases, "rlvr": p.rlvr}
        return self.make("rlvr", config, {"tokenizer": self.tokenizer(), "parent": parent}, make,
                          (*TRAIN, grpo, sampling, verifiers))

    def quantised(self, name: str, parent: Artifact | None = None, **settings: object) -> Artifact:
        """Packed int8 or int4 weights of `parent` (default: the last trained checkpoint)."""
        parent = parent or self.rlvr()
        settings = QUANTISATION[name] | settings

        def make(folder: Path) -> dict:
            self._save(folder, quantise_model(self.load(parent).cpu(), **settings), settings)
            return {"steps": 0, "sources": {}}

        return self.make(name, settings, {"parent": parent}, make, (gpt, checkpoint, quantise))

    def stage(self, name: str) -> Artifact:
        """The artifact of a stage by name, built if needed."""
        if name not in STAGES:
            raise ValueError(f"stage {name!r} is unknown; use one of {', '.join(STAGES)}")
        return self.quantised(name) if name in QUANTISATION else getattr(self, name)()

    # ---- evaluation ----------------------------------------------------------------------------------------

    def engine(self, artifact: Artifact, temperature: float = 1.0) -> Engine:
        """A frozen model, ready to answer."""
        served = Engine(self.load(artifact), self.load_tokenizer(), temperature, self.seed)
        if self.base_folder:
            served.max_new_tokens = max(served.max_new_tokens, self._public.answer_room(served.tok))
        return served

    def evaluation(self, artifact: Artifact, temperature: float = 1.0) -> Artifact:
        """One checkpoint's report on the frozen evaluation, kept in the store like any artifact (report.json)."""
        def make(folder: Path) -> dict:
            served = self.engine(artifact, temperature)
            where = evals.frozen_cases(self.profile.n_eval)
            report = evals.evaluate(artifact.name, served.answer, where, artifact.fingerprint, temperature=temperature)
            some = where[:max(1, min(20, len(where) // 8))]
            report |= {"weight_bytes": weight_bytes(served.model), "tokens_per_s": served.tokens_per_s,
                       **(clock := served.latency(some)), "p95_ms": clock["ttft_p95_ms"]}
            write_json(folder / "report.json", report)
            return {"n_cases": report["n_cases"], "sources": {}}

        return self.make("eval", {"temperature": temperature, "n_eval": self.profile.n_eval},
                          {"checkpoint": artifact, "tokenizer": self.tokenizer()}, make,
                          (gpt, tokenizer, checkpoint, quantise, sampling, engine, chat, evals, verifiers))

    def evaluate(self, artifact: Artifact, temperature: float = 1.0) -> dict:
        """The content of `evaluation`: rates with intervals, slices, every scored row, every answer, the clocks."""
        return read_json(self.evaluation(artifact, temperature).file("report.json"))
