"""Is a run card complete, and does the present code still ask for the same artifact? (curriculum S3-6.23, S3-6.33)

Eight groups must be answered before anyone can rebuild a checkpoint: data snapshot, tokenizer, code, dependencies,
hardware, config, seeds, cadence; and a ninth before anyone can compare: evaluation and prompts. A group may be answered
by an ancestor's card (an int8 checkpoint has its tokenizer from the model it packs).

`plan` asks the stage graph what it would make today, without making it, so that what moved since the card was written
is known before an hour is spent on a rebuild.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from lifecycle_lib.core.fingerprints import code_fingerprint, data_hashes, fingerprint
from lifecycle_lib.core.hardware import hardware, versions
from lifecycle_lib.core.store import Artifact, Store
from lifecycle_lib.lab.profiles import Profile, laptop
from lifecycle_lib.lab.stages import QUANTISATION, STAGES, Lab
from lifecycle_lib.model.gpt import GPTConfig
from lifecycle_lib.train.grpo import GRPOConfig
from lifecycle_lib.train.loop import FitConfig

GROUPS: dict[str, tuple[str, ...]] = {  # group: card fields that must be there, dots for fields of fields
    "data snapshot": ("data",), "code": ("code",), "dependencies": ("versions.python", "versions.torch"),
    "hardware": ("device", "hardware.cpu", "hardware.threads"), "config": ("config", "config_fingerprint"),
    "seeds": ("config.seed",)}
FIELDS = {"base": ("n_documents", "block_tokens", "pretrain_batch", "pretrain"),
          "sft": ("sft_batch", "claim_share", "sft"), "dpo": ("n_pairs", "dpo_batch", "beta", "dpo"),
          "rlvr": ("n_rl_cases", "rlvr", "grpo")}
PARENT = {"base": "tokenizer", "sft": "base"}  # the role of the parent a stage continues; "parent" for the others


def has(card: Mapping[str, Any], dotted: str) -> bool:
    """Is this field in the card, with a value?"""
    value: Any = card
    for key in dotted.split("."):
        if not isinstance(value, Mapping) or value.get(key) is None:
            return False
        value = value[key]
    return True


def missing_fields(card: Mapping[str, Any], ancestors: Sequence[Mapping[str, Any]] = (),
                   evaluated: bool = False) -> dict[str, list[str]]:
    """Every group with the fields the card lacks; [] where it is answered. `evaluated`: is there a report of it?"""
    found = {group: [field for field in fields if not has(card, field)] for group, fields in GROUPS.items()}
    cards = [card, *ancestors]
    has_tokenizer = any(has(c, "parents.tokenizer") or c.get("name") == "tokenizer" for c in cards)
    found["tokenizer"] = [] if has_tokenizer else ["parents.tokenizer"]
    trains = card.get("name") in FIELDS
    fit = f"config.{'pretrain' if card.get('name') == 'base' else card.get('name')}.checkpoint_every"
    found["cadence"] = [f for f in (fit, "steps", "actual") if not has(card, f)] if trains else []
    found["evaluation and prompts"] = [] if evaluated else ["a report of its evaluation"]
    return found


@dataclass(frozen=True, slots=True)
class Moved:
    """One thing that is not as the card has it. `kind`: recipe (config, code, data), versions or machine."""

    kind: str
    what: str
    card: str
    here: str

    def __str__(self) -> str:
        return f"{self.what}: {self.card} in the card, {self.here} here"


def environment_moves(card: Mapping[str, Any], threads: int | None = None) -> list[Moved]:
    """Versions, hardware and threads that differ from the card. A field the card lacks is no difference; it is missing,
    which `missing_fields` says."""
    now, then = versions(), card.get("versions") or {}
    moved = [Moved("versions", k, str(v), str(now.get(k))) for k, v in then.items() if now.get(k) != v]
    here = hardware() | ({"threads": threads} if threads else {})
    moved += [Moved("machine", k, str(v), str(here.get(k))) for k, v in (card.get("hardware") or {}).items()
              if k != "cores" and here.get(k) != v]
    return moved


def lab_of(card: Mapping[str, Any], ancestors: Sequence[Artifact], store: Store, seed: int | None = None,
           corpus: str | Path | None = None, start: Profile | None = None) -> Lab:
    """The Lab whose stage `card["name"]` is this card, over `store`; `seed` in place of the card's.

    Raises ValueError for a stage that is none of the graph's, a field the card lacks, and for what was made from a
    public checkpoint."""
    name, config = card.get("name"), card.get("config") or {}
    where = f"card of {name}-{card.get('fingerprint')}"
    if name not in STAGES:
        raise ValueError(f"{where}: no stage of the graph; give one of {', '.join(STAGES)}")
    cards = [a.card for a in ancestors] + [card]
    if any("public" in c["config"] for c in cards):
        raise ValueError(f"{where}: descends from a public checkpoint, whose files are not in the store; rebuild it "
                         "with: lifecycle run --base FOLDER")
    files = [name for c in cards for name, _ in c.get("data") or []]
    if files and corpus is None:
        raise ValueError(f"{where}: was made from the data file {files[0]}; give that file with --corpus")
    if corpus is not None and not files:
        raise ValueError(f"{where}: was made from no data file, so {corpus} has no part in it; leave --corpus out")
    profile = start or laptop()
    for c in cards:  # the card last: its own fields win
        fields = FIELDS.get(c["name"], ())
        if absent := [f for f in fields if f not in c["config"]]:
            raise ValueError(f"card of {c['name']}-{c['fingerprint']}: field 'config.{absent[0]}' is missing; "
                             "without it nobody can rebuild this")
        profile = replace(profile, **{f: _typed(f, c["config"][f]) for f in fields})
        if c["name"] == "base":
            shape = _typed("gpt", c["config"]["gpt"])
            profile = replace(profile, gpt=shape, block_tokens=c["config"]["block_tokens"],
                              corpus_share=c["config"].get("corpus_share", profile.corpus_share))
    for field in ("seed", "device"):
        if field not in config:
            raise ValueError(f"{where}: field 'config.{field}' is missing; without it nobody can rebuild this")
    return Lab(profile, seed=config["seed"] if seed is None else seed, device=config["device"], store=store,
               corpus=corpus)


def _typed(field: str, value: Any) -> Any:
    kinds = {"gpt": GPTConfig, "grpo": GRPOConfig, "pretrain": FitConfig, "sft": FitConfig, "dpo": FitConfig,
             "rlvr": FitConfig}
    return kinds[field](**value) if field in kinds else value


def make_stage(lab: Lab, card: Mapping[str, Any], parent: Artifact | None) -> Artifact:
    """Ask `lab` for the stage of this card, from this parent (None for a base)."""
    name, config = card["name"], card["config"]
    if name == "base":
        return lab.base()
    if name == "rlvr":
        return lab.rlvr(parent, reward=config["reward"], shuffle=config["shuffle"])
    if name in QUANTISATION:
        return lab.quantised(name, parent, **{k: v for k, v in config.items() if k not in ("seed", "device")})
    return getattr(lab, name)(parent)


def parent_of(artifact: Artifact, ancestors: Sequence[Artifact]) -> Artifact | None:
    """The checkpoint this one continues, among its ancestors; None for a base."""
    if artifact.name == "base":
        return None
    role = PARENT.get(artifact.name, "parent")
    wanted = artifact.card["parents"].get(role)
    found = next((a for a in ancestors if a.fingerprint == wanted), None)
    if found is None:
        raise ValueError(f"{artifact.name}-{artifact.fingerprint}: parent {role!r} ({wanted}) is not in the store; "
                         "build it first, or give the store that has it")
    return found


class PlanStore(Store):
    """A store that makes nothing: it writes down what each stage would be named, and hands out what it was given."""

    def __init__(self, given: Sequence[Artifact]) -> None:
        self.root, self.given = given[0].path.parent, {a.name: a for a in given}
        self.asked: dict[str, dict[str, Any]] = {}

    def get_or_make(self, name: str, config: Any, parents: Mapping[str, Artifact] | None, make: Any,
                    code: Sequence[ModuleType] = (), data: Sequence[str | Path] = ()) -> Artifact:
        self.asked[name] = {"config_fingerprint": fingerprint(config), "code": code_fingerprint(code),
                            "data": data_hashes(data), "modules": list(code)}
        return self.given[name]


def plan(artifact: Artifact, ancestors: Sequence[Artifact], corpus: str | Path | None = None) -> dict[str, Any]:
    """What the present code would make for this card: config_fingerprint, code, data, modules. Nothing is made."""
    store = PlanStore([*ancestors, artifact])
    make_stage(lab_of(artifact.card, ancestors, store, corpus=corpus), artifact.card, parent_of(artifact, ancestors))
    return store.asked[artifact.name]


def recipe_moves(card: Mapping[str, Any], planned: Mapping[str, Any]) -> list[Moved]:
    """Config, code and data that the present code would not take as the card has them."""
    names = {"config_fingerprint": "config", "code": "code", "data": "data"}
    return [Moved("recipe", label, _short(card.get(key)), _short(planned[key])) for key, label in names.items()
            if card.get(key) != planned[key]]


def expected_level(moved: Sequence[Moved]) -> str:
    """What agreement to expect: exact when nothing moved; statistical when only versions or the machine did; none when
    the recipe itself did, for then another thing is built."""
    kinds = {m.kind for m in moved}
    return "none" if "recipe" in kinds else "statistical" if kinds else "exact"


def _short(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(f"{name} {digest[:8]}" for name, digest in value) or "no files"
    return str(value)[:16]
