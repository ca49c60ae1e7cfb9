"""The bridge to transformers, peft and TRL: our GPT as their model, and their checkpoints as ours.

`to_llama`, `from_llama`, `to_hf` convert in memory (model/hf_classes). `export` writes a folder that transformers
loads; `load_public` reads one as the base of every later stage: what is exactly a GPT becomes one, anything else goes
through `PublicModel`, which has the same interface.

Left out: models without a key-value cache or with more than a linear layer for a head (`load_public` refuses them).
"""

import contextlib
import inspect
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from lifecycle_lib.model.gpt import GPT
from lifecycle_lib.model.hf_classes import (
    LifecycleConfig,
    LifecycleForCausalLM,
    from_llama,
    llama_obstacles,
    to_hf,
    to_llama,
)
from lifecycle_lib.model.tokenizer import Tokenizer

__all__ = ["LifecycleConfig", "LifecycleForCausalLM", "PublicModel", "PublicTokenizer", "export", "from_llama",
           "load_public", "to_hf", "to_llama"]

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<policy>", "<order>", "<user>", "<bot>", "<note>")
ROLES = ("pad", "bos", "eos")
# A prompt is a rendered string already, so the template joins contents, and an answer ends in <eos>.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True, slots=True)
class PublicConfig:
    """What the library asks of a model's config."""

    vocab_size: int
    block_size: int


class PublicCache:
    """transformers' growing cache beside the mask of the tokens in it; the same face as model/gpt.Cache."""

    def __init__(self, config: PreTrainedConfig, batch: int, device: torch.device) -> None:
        self.kv = DynamicCache(config=config)
        self.mask = torch.zeros(batch, 0, dtype=torch.bool, device=device)

    def select(self, rows: Tensor) -> None:
        """Keep or repeat rows."""
        self.kv.batch_select_indices(rows)
        self.mask = self.mask[rows]


class PublicModel(nn.Module):
    """Any decoder-only AutoModelForCausalLM behind the interface of GPT: hidden, head, new_cache, cfg, device."""

    def __init__(self, hf: PreTrainedModel) -> None:
        super().__init__()
        self.hf = hf
        config = hf.config
        self.cfg = PublicConfig(config.vocab_size, getattr(config, "max_position_embeddings", None) or 1 << 20)
        self.takes_positions = "position_ids" in inspect.signature(hf.base_model.forward).parameters

    @property
    def device(self) -> torch.device:
        return self.hf.device

    def n_params(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def new_cache(self, batch: int, size: int) -> PublicCache:
        """An empty cache of `batch` rows; it grows, so `size` is only a promise."""
        return PublicCache(self.hf.config, batch, self.device)

    def hidden(self, idx: Tensor, mask: Tensor | None = None, cache: PublicCache | None = None) -> Tensor:
        """Final features (B, T, C); arguments as in GPT.hidden. Raises ValueError past block_size."""
        seen = 0 if cache is None else cache.mask.shape[1]
        if seen + idx.shape[1] > self.cfg.block_size:
            raise ValueError(f"{seen + idx.shape[1]} tokens do not fit block_size={self.cfg.block_size}; "
                             "shorten the text")
        new = torch.ones_like(idx, dtype=torch.bool) if mask is None else mask
        if cache is not None:
            cache.mask = new = torch.cat((cache.mask, new), dim=1)  # (B, seen + T)
        inputs = {} if mask is None and cache is None else {"attention_mask": new.long()}
        if inputs and self.takes_positions:  # positions count real tokens only: a left-padded row starts at 0
            inputs["position_ids"] = (new.long().cumsum(1) - 1).clamp(min=0)[:, seen:]
        if cache is not None:
            inputs["past_key_values"] = cache.kv
        return self.hf.base_model(input_ids=idx, use_cache=cache is not None, **inputs).last_hidden_state

    def head(self, h: Tensor) -> Tensor:
        """Logits (..., V) of features (..., C)."""
        return self.hf.get_output_embeddings()(h)

    def forward(self, idx: Tensor, mask: Tensor | None = None, cache: PublicCache | None = None) -> Tensor:
        """Logits (B, T, V) of token ids (B, T); see `hidden`."""
        return self.head(self.hidden(idx, mask, cache))

    @torch.no_grad()
    def check(self) -> None:
        """ValueError unless logits equal the model's own, plain, left-padded and through the cache."""
        idx = torch.arange(1, 7, device=self.device).remainder(self.cfg.vocab_size).unsqueeze(0)
        want = self.hf(input_ids=idx, use_cache=False).logits.float()
        pads = torch.cat((idx[:, :1].expand(1, 2), idx), dim=1)
        mask = torch.arange(8, device=self.device).unsqueeze(0) >= 2
        cache = self.new_cache(1, 8)
        cached = torch.cat((self(pads[:, :6], mask[:, :6], cache)[:, 2:], self(pads[:, 6:], None, cache)), dim=1)
        for how, got in (("plain", self(idx)), ("left-padded", self(pads, mask)[:, 2:]), ("cached", cached)):
            error = float((got.float() - want).abs().max())
            if not error <= 1e-3 * float(want.abs().max().clamp(min=1)):
                raise ValueError(f"model_type={self.hf.config.model_type!r}: {how} logits are off by {error:.2g}, so "
                                 "it cannot be wrapped; pick a decoder-only model such as GPT-2, Llama or Qwen")


class PublicTokenizer:
    """A transformers tokenizer behind the interface of model/tokenizer: encode, decode, special, vocab_size."""

    def __init__(self, hf: PreTrainedTokenizerBase, specials: Iterable[str] = SPECIAL_TOKENS) -> None:
        self.hf = hf
        named = {f"{role}_token": f"<{role}>" for role in ROLES}
        others = [s for s in specials if s not in named.values()]
        hf.add_special_tokens({**named, "extra_special_tokens": others}, replace_extra_special_tokens=False)
        self.special = {s: hf.convert_tokens_to_ids(s) for s in specials}

    @property
    def vocab_size(self) -> int:
        return len(self.hf)

    def encode(self, text: str, allow_special: bool = True) -> list[int]:
        """Token ids, none added. allow_special=False reads `<user>` and the like as plain text."""
        return self.hf(text, add_special_tokens=False, split_special_tokens=not allow_special)["input_ids"]

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        return self.hf.decode(list(ids), skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no advice from transformers inside."""
    bars, level = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def grow_embeddings(hf: PreTrainedModel, n_tokens: int) -> None:
    """Room for `n_tokens`: each new row is the mean of the old ones plus a little fixed noise, so that rows differ."""
    old = hf.get_input_embeddings().weight.shape[0]
    if n_tokens <= old:
        return
    with quiet():
        hf.resize_token_embeddings(n_tokens, mean_resizing=False)
    generator = torch.Generator().manual_seed(0)
    tables = {id(e.weight): e.weight for e in (hf.get_input_embeddings(), hf.get_output_embeddings())}
    with torch.no_grad():
        for weight in tables.values():
            noise = torch.randn(n_tokens - old, weight.shape[1], generator=generator).to(weight)
            weight[old:] = weight[:old].mean(0) + 0.1 * weight[:old].std() * noise


def load_public(folder: str | Path, device: torch.device | str = "cpu") -> tuple[GPT | PublicModel, PublicTokenizer]:
    """(model, tokenizer) of a transformers folder on disk, float32, in eval mode, ready for SFT, DPO and GRPO.

    The special tokens of the prompt layout are added where missing. Dropout is set to 0: a policy-gradient ratio
    must compare the same function. A plain tied Llama and an exported GPT become a GPT; others a PublicModel.
    Nothing is downloaded, no code of the folder is run, nothing is unpickled.
    Raises ValueError, with the fix, for a missing or foreign folder or a family that cannot be wrapped."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no config.json; give the folder of a transformers checkpoint "
                         "(git clone it, or save_pretrained), not a hub name")
    if not list(folder.glob("*.safetensors")):
        raise ValueError(f"{folder}: no .safetensors file; convert the weights with save_pretrained, "
                         "pickled weights are not read")
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(folder, **local)
        for name, value in config.to_dict().items():
            if ("drop" in name) and isinstance(value, float):
                setattr(config, name, 0.0)
        with quiet():
            hf_tok = AutoTokenizer.from_pretrained(folder, **local)
            hf, report = AutoModelForCausalLM.from_pretrained(
                folder, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **local)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise ValueError(f"{folder}: transformers cannot load it as a causal language model with a tokenizer "
                         f"({str(error).strip().splitlines()[0]}); for a checkpoint of this library use "
                         "load_checkpoint, else save model and tokenizer there with save_pretrained") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ValueError(f"{folder}: the file lacks {len(missing)} tensors of {type(hf).__name__}, first "
                         f"{missing[0]!r}; the checkpoint is damaged or not a language model")
    tok = PublicTokenizer(hf_tok)
    grow_embeddings(hf, tok.vocab_size)
    hf = hf.to(device).eval()
    if isinstance(hf, LifecycleForCausalLM):
        hf.model.gpt.cfg = hf.config.gpt()  # the vocabulary may have grown
        return hf.model.gpt, tok
    if not llama_obstacles(hf.config):
        return from_llama(hf), tok
    model = PublicModel(hf)
    model.check()
    return model, tok


def export(model: GPT | PublicModel, tok: Tokenizer | PublicTokenizer, folder: str | Path) -> None:
    """Write model (safetensors) and tokenizer into `folder`, for from_pretrained, peft, TRL and `load_public`.

    Without token shift the folder is a plain Llama and loads without this library; with it, import this module.
    Raises ValueError when the tokenizer has more tokens than the model."""
    folder = Path(folder)
    hf = model.hf if isinstance(model, PublicModel) else to_hf(model)
    if hf.config.vocab_size < tok.vocab_size:
        raise ValueError(f"the tokenizer has {tok.vocab_size} tokens, the model {hf.config.vocab_size}; "
                         "export the pair that was trained together")
    hf_tok = tok.hf if isinstance(tok, PublicTokenizer) else tok.to_transformers()
    hf_tok.chat_template = CHAT_TEMPLATE
    for name, value in (("model_max_length", model.cfg.block_size), ("padding_side", "left")):
        setattr(hf_tok, name, value)
        hf_tok.init_kwargs[name] = value  # only names known there are saved
    for role in ROLES:
        for config in (hf.config, hf.generation_config):
            setattr(config, f"{role}_token_id", getattr(hf_tok, f"{role}_token_id"))
    folder.mkdir(parents=True, exist_ok=True)
    half = Path(tempfile.mkdtemp(prefix=".export-", dir=folder))
    try:
        with quiet():
            hf.save_pretrained(half)
        hf_tok.save_pretrained(half)
        for file in sorted(half.iterdir(), key=lambda f: f.name == "config.json"):  # the config last: it makes it whole
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(half, ignore_errors=True)
