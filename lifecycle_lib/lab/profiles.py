"""Three sizes of the same life: `smoke` (seconds, teaches nothing), `laptop` (minutes on one CPU core), `gpu`.

An ablation arm is `dataclasses.replace(profile, ...)`: its difference is its description.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from lifecycle_lib.judge.gates import GateConfig
from lifecycle_lib.model.gpt import GPTConfig
from lifecycle_lib.train.grpo import GRPOConfig
from lifecycle_lib.train.loop import FitConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Everything a run depends on besides seed, device and code."""

    name: str
    gpt: GPTConfig
    n_documents: int = 12000
    block_tokens: int = 96
    pretrain_batch: int = 48
    pretrain: FitConfig
    corpus_share: float = 0.25  # share of pretraining rows that come from the user's own text
    sft_batch: int = 64
    claim_share: float = 0.3  # demonstrations that invent a label, on purpose
    sft: FitConfig
    n_pairs: int = 640
    dpo_batch: int = 32
    beta: float = 0.5
    dpo: FitConfig
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    n_rl_cases: int = 4096
    rlvr: FitConfig
    n_eval: int = 512
    gate: GateConfig = field(default_factory=GateConfig)

    def __post_init__(self) -> None:
        if self.block_tokens > self.gpt.block_size:
            raise ValueError(f"block_tokens={self.block_tokens} is over block_size={self.gpt.block_size}; lower it")
        if not 0 <= self.claim_share <= 1 or not 0 <= self.corpus_share < 1:
            raise ValueError(f"claim_share={self.claim_share} and corpus_share={self.corpus_share} "
                             "must be shares, 0 to 1")


def laptop() -> Profile:
    """0.69M parameters, about 7 minutes of one CPU core for the whole chain."""
    return Profile(
        name="laptop", gpt=GPTConfig(vocab_size=640, block_size=128, n_layer=3, n_head=4, n_embd=128),
        pretrain=FitConfig(steps=240), sft=FitConfig(steps=360),
        dpo=FitConfig(steps=40, optimizer="sgd", lr=1e-3, warmup_steps=5),
        rlvr=FitConfig(steps=30, optimizer="adamw", lr=3e-4, beta2=0.999, warmup_steps=3, checkpoint_every=10))


def smoke() -> Profile:
    """Every stage in seconds, on a model that has learnt nothing: the gate must block it."""
    return Profile(
        name="smoke", gpt=GPTConfig(vocab_size=640, block_size=128, n_layer=1, n_head=2, n_embd=32),
        n_documents=200, pretrain_batch=8, pretrain=FitConfig(steps=4, warmup_steps=1), sft_batch=8,
        sft=FitConfig(steps=4, warmup_steps=1), n_pairs=16, dpo_batch=8,
        dpo=FitConfig(steps=2, optimizer="sgd", lr=1e-3, warmup_steps=1),
        grpo=GRPOConfig(n_prompts=4, group_size=4), n_rl_cases=16,
        rlvr=FitConfig(steps=2, optimizer="adamw", lr=3e-4, warmup_steps=1, checkpoint_every=1),
        n_eval=48, gate=GateConfig(min_cases=40, min_slice_cases=1))


def gpu() -> Profile:
    """The same life at 11M parameters and longer runs, bf16, for one CUDA card."""
    return Profile(
        name="gpu", gpt=GPTConfig(vocab_size=640, block_size=128, n_layer=6, n_head=6, n_embd=384),
        n_documents=60000, pretrain_batch=256, pretrain=FitConfig(steps=600, bf16=True),
        sft_batch=256, sft=FitConfig(steps=800, bf16=True), n_pairs=2560, dpo_batch=64,
        dpo=FitConfig(steps=40, optimizer="sgd", lr=1e-3, warmup_steps=5),
        grpo=GRPOConfig(n_prompts=128, group_size=8), n_rl_cases=16384,
        rlvr=FitConfig(steps=60, optimizer="adamw", lr=1e-4, beta2=0.999, warmup_steps=5))


PROFILES: dict[str, Callable[[], Profile]] = {"smoke": smoke, "laptop": laptop, "gpu": gpu}


def pick_profile(name: str | None, device: torch.device) -> Profile:
    """The profile called `name`; without one, `gpu` on CUDA and `laptop` elsewhere."""
    name = name or ("gpu" if device.type == "cuda" else "laptop")
    if name not in PROFILES:
        raise ValueError(f"profile {name!r} is unknown; use one of {', '.join(PROFILES)}")
    return PROFILES[name]()
