"""Checkpoints on disk: config.json beside model.safetensors, in one folder. Nothing is unpickled.

A quantised checkpoint says so in config.json and loads as a quantised model: its weights stay packed.
"""

import hashlib
from pathlib import Path

import torch

from lifecycle_lib.core.records import read_json, write_json
from lifecycle_lib.core.tensors import load_tensors, save_tensors
from lifecycle_lib.model.gpt import GPT, GPTConfig
from lifecycle_lib.model.quantise import quantise_model

FORMAT = "lifecycle-gpt-1"


def weights_hash(model: torch.nn.Module) -> str:
    """SHA-256 over every tensor of the state dict, in name order. Serving must not change it."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        t = tensor.detach().cpu().contiguous()
        digest.update(f"{name}{t.dtype}{tuple(t.shape)}".encode())
        digest.update(t.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_checkpoint(folder: Path, model: GPT, quantisation: dict | None = None) -> None:
    """Write config.json and model.safetensors into `folder`. `quantisation`: the arguments of quantise_model."""
    folder = Path(folder)
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    save_tensors(folder / "model.safetensors", state, {"format": FORMAT})
    write_json(folder / "config.json", {"format": FORMAT, "model": model.cfg.as_dict(), "quantisation": quantisation})


def load_checkpoint(folder: Path, device: torch.device | str = "cpu", expect: GPTConfig | None = None) -> GPT:
    """The model of a folder, in eval mode. Raises ValueError for a missing or damaged file, an unknown format, or a
    checkpoint whose shape is not `expect`."""
    folder = Path(folder)
    meta = read_json(folder / "config.json")
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise ValueError(f"{folder / 'config.json'}: format is not {FORMAT!r}; "
                         "this folder holds no checkpoint of this library")
    try:
        cfg, quantisation = GPTConfig(**meta["model"]), meta["quantisation"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'}: damaged ({error}); "
                         "delete the folder and run again to rebuild it") from error
    if expect is not None and cfg != expect:
        want = expect.as_dict()
        diff = [f"{k}={v} (expected {want[k]})" for k, v in cfg.as_dict().items() if v != want[k]]
        raise ValueError(f"{folder}: a checkpoint of another shape: {', '.join(diff)}; use the profile that made it")
    model = GPT(cfg)
    if quantisation:
        model = quantise_model(model, **quantisation)
    state = load_tensors(folder / "model.safetensors")
    own = model.state_dict()
    form = {k: (t.shape, t.dtype) for k, t in own.items()}
    wrong = [k for k in own if k not in state or (state[k].shape, state[k].dtype) != form[k]]
    wrong += [k for k in state if k not in own]
    if wrong:
        raise ValueError(f"{folder / 'model.safetensors'}: {len(wrong)} tensors do not fit config.json, "
                         f"first {wrong[0]!r}; delete the folder and run again to rebuild it")
    model.load_state_dict(state)
    return model.to(device).eval()
