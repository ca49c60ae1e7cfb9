"""A public checkpoint on disk in place of our own pretraining: every later stage then works on that model.

What is exactly a GPT is kept as one (model/checkpoint); any other decoder-only model as transformers' config beside
safetensors, and public.json, which says how it was quantised. Its own tokenizer is kept, with our tags added. It is
fine-tuned gently (AdamW 3e-4): Muon at 0.02 would erase what it knows.

Imported only when a run starts from a public checkpoint, because transformers takes seconds to load.
"""

from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lifecycle_lib.core.records import read_json, write_json
from lifecycle_lib.core.store import Artifact
from lifecycle_lib.core.tensors import load_tensors, save_tensors
from lifecycle_lib.desk import cases, documents
from lifecycle_lib.model import bridge, hf_classes
from lifecycle_lib.model.bridge import PublicModel, PublicTokenizer, load_public
from lifecycle_lib.model.checkpoint import load_checkpoint, save_checkpoint
from lifecycle_lib.model.gpt import GPT
from lifecycle_lib.model.quantise import quantise_model
from lifecycle_lib.train import pretrain
from lifecycle_lib.train.loop import FitConfig

CODE = (bridge, hf_classes)
MARK = "public.json"


def save_model(folder: Path, model: GPT | PublicModel, quantisation: dict | None = None) -> None:
    """`save_checkpoint` for a GPT; config, weights and public.json for any other model."""
    if isinstance(model, GPT):
        save_checkpoint(folder, model, quantisation)
        return
    model.hf.config.save_pretrained(folder)
    save_tensors(folder / "model.safetensors", model.state_dict())
    write_json(folder / MARK, {"quantisation": quantisation})


def load_model(folder: Path, device: torch.device | str = "cpu") -> GPT | PublicModel:
    """What `save_model` wrote, in eval mode. Raises ValueError for damaged files."""
    if not (folder / MARK).exists():
        return load_checkpoint(folder, device)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    model = PublicModel(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    if settings := read_json(folder / MARK)["quantisation"]:
        model = quantise_model(model, **settings)
    model.load_state_dict(load_tensors(folder / "model.safetensors"))
    return model.to(device).eval()


def tokenizer(lab) -> Artifact:
    """The checkpoint's own tokenizer with our tags added."""
    folder = Path(lab.base_folder)

    def make(workdir: Path) -> dict:
        _, tok = load_public(folder)
        tok.hf.save_pretrained(workdir)
        return {"vocab_size": tok.vocab_size}

    files = [f for f in sorted(folder.iterdir()) if f.suffix in (".json", ".txt", ".model")]
    return lab.store.get_or_make("tokenizer", {"public": folder.name}, {}, make, code=CODE, data=files)


def load_tokenizer(artifact: Artifact) -> PublicTokenizer:
    return PublicTokenizer(AutoTokenizer.from_pretrained(artifact.path, local_files_only=True))


def base(lab) -> Artifact:
    """The base stage: the checkpoint as it is, with its loss on held-out desk documents."""
    folder, p = Path(lab.base_folder), lab.profile

    def make(workdir: Path) -> dict:
        model, tok = load_public(folder, lab.device)
        save_model(workdir, model)
        texts = [d["text"] for d in documents.draw_documents(max(40, p.n_documents // 40), lab.seed)]
        stream, _ = pretrain.pack([tok.encode(t) for t in texts])
        return {"device": str(lab.device), "steps": 0, "n_params": model.n_params(), "public": folder.name,
                "held_out_loss": pretrain.lm_loss(model, stream, p.block_tokens)}

    files = [f for f in sorted(folder.iterdir()) if f.suffix in (".json", ".safetensors")]
    config = {"public": folder.name, "seed": lab.seed, "n_documents": p.n_documents, "block_tokens": p.block_tokens}
    return lab.store.get_or_make("base", config, {"tokenizer": lab.tokenizer()}, make, code=CODE, data=files)


def gentle(cfg: FitConfig) -> FitConfig:
    """`cfg` with AdamW at 3e-4 where it says Muon."""
    return replace(cfg, optimizer="adamw", lr=3e-4) if cfg.optimizer == "muon" else cfg


def answer_room(tok: PublicTokenizer) -> int:
    """Tokens that the longest of many flawed answers takes in this tokenizer, end token included, and a few more."""
    drawn = cases.draw_cases(200, 0, "train")
    return max(len(tok.encode(cases.with_label_claim(c.answer), allow_special=False)) for c in drawn) + 8
