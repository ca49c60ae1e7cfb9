"""A tokenizer, a tiny network that is also a Llama, and the gradients of both under the same names."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lifecycle_lib.core.seeds import make_generator, seed_everything
from lifecycle_lib.desk.documents import tokenizer_corpus
from lifecycle_lib.desk.world import SPECIAL_TOKENS
from lifecycle_lib.model.gpt import GPT, GPTConfig
from lifecycle_lib.model.tokenizer import Tokenizer

os.environ["LIFECYCLE_QUIET"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))  # TRL's trainers are set up there


@pytest.fixture(scope="session")
def tok() -> Tokenizer:
    return Tokenizer.train(tokenizer_corpus(0), 640, SPECIAL_TOKENS)


@pytest.fixture
def make_model(tok: Tokenizer) -> Callable[..., GPT]:
    """make_model(noise=0.0, seed=0, **config): two layers of width 32; `noise` moves every weight."""

    def make(noise: float = 0.0, seed: int = 0, **config: object) -> GPT:
        seed_everything(seed)
        shape = {"vocab_size": tok.vocab_size, "n_layer": 2, "n_head": 2, "n_embd": 32, "token_shift": False}
        model = GPT(GPTConfig(**(shape | config)))
        gen = make_generator(seed, "noise")
        with torch.no_grad():
            for p in model.parameters():
                p.add_(noise * torch.randn(p.shape, generator=gen))
        return model

    return make


@pytest.fixture
def gradients() -> Callable[..., list[torch.Tensor]]:
    """gradients(loss, model): d loss / d weight in the order of GPT.state_dict(), of a GPT or of its Llama."""
    from lifecycle_lib.model.hf_classes import llama_names

    def of(loss: torch.Tensor, model: torch.nn.Module, n_layer: int = 2) -> list[torch.Tensor]:
        named = dict(model.named_parameters())
        names = llama_names(n_layer)
        keys = list(names) if set(names) <= set(named) else list(names.values())
        return list(torch.autograd.grad(loss, [named[k] for k in keys]))

    return of
