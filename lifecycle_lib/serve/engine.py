"""Serving: frozen weights answer cases in batches, with clocks. Nothing here may change a weight.

`Engine.answer` is what the evaluation calls; `latency` times requests one by one, as a user would meet them. Both read
a customer's words as plain text (train/chat.py): who types a tag gets no role. `sample` and `texts` take whole prompts:
text in which tags are tags (ours alone, never a customer's), or ids.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lifecycle_lib.core.seeds import make_generator
from lifecycle_lib.desk.cases import Case
from lifecycle_lib.model.checkpoint import weights_hash
from lifecycle_lib.model.gpt import GPT
from lifecycle_lib.model.sampling import Samples, generate
from lifecycle_lib.model.tokenizer import Tokenizer
from lifecycle_lib.train.chat import prompt_ids


@dataclass(slots=True)
class Engine:
    """A frozen model and its tokenizer. `temperature` 0 is greedy; `seed` makes sampling repeatable."""

    model: GPT
    tok: Tokenizer
    temperature: float = 0.0
    seed: int = 0
    max_new_tokens: int = 48
    tokens: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        for p in self.model.parameters():
            p.requires_grad_(False)
        self.model.eval()

    def sample(self, prompts: Sequence[str | list[int]], n_samples: int = 1) -> Samples:
        """`n_samples` continuations of every prompt; counts tokens and seconds."""
        start = time.perf_counter()
        coded = [self.tok.encode(p) if isinstance(p, str) else p for p in prompts]
        out = generate(self.model, coded, eos_id=self.tok.special["<eos>"],
                       pad_id=self.tok.special["<pad>"], max_new_tokens=self.max_new_tokens,
                       temperature=self.temperature, n_samples=n_samples,
                       generator=make_generator(self.seed, "serve", self.temperature, n_samples))
        self.tokens += out.tokens
        self.seconds += time.perf_counter() - start
        return out

    def texts(self, prompts: Sequence[str | list[int]], n_samples: int = 1) -> list[str]:
        """Answers as text, without the end token; row p * n_samples + s."""
        out = self.sample(prompts, n_samples)
        return out.texts(self.tok)

    def answer(self, cases: Sequence[Case]) -> list[str]:
        """One answer a case; no word of a customer's can forge a tag."""
        return self.texts([prompt_ids(self.tok, c) for c in cases])

    @property
    def tokens_per_s(self) -> float:
        """Decoded tokens a second over every request so far. Raises ValueError before the first one."""
        if not self.seconds:
            raise ValueError("tokens_per_s of an engine that has answered nothing is not a number; answer a case first")
        return self.tokens / self.seconds

    def latency(self, cases: Sequence[Case]) -> dict[str, float]:
        """Time to first token and whole-answer time of single requests, in ms: median and 95th percentile."""
        if not cases:
            raise ValueError("latency of no requests is not a number; give at least one case")
        first, whole = [], []
        for case in cases:
            for clock, tokens in ((first, 1), (whole, self.max_new_tokens)):
                start = time.perf_counter()
                generate(self.model, [prompt_ids(self.tok, case)], eos_id=self.tok.special["<eos>"],
                         pad_id=self.tok.special["<pad>"], max_new_tokens=tokens, temperature=0.0)
                clock.append(1000 * (time.perf_counter() - start))
        t = torch.tensor([first, whole]).quantile(torch.tensor([0.5, 0.95]), dim=1)
        return {"ttft_p50_ms": float(t[0, 0]), "ttft_p95_ms": float(t[1, 0]),
                "answer_p50_ms": float(t[0, 1]), "answer_p95_ms": float(t[1, 1])}

    def fingerprint(self) -> str:
        """Hash of the weights: the same before and after any number of requests."""
        return weights_hash(self.model)
