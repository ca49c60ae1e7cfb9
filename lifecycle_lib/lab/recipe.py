"""Recipe freeze: everything a rebuild needs in one folder, and which of four things moved since (curriculum S3-6.31).

    recipe.json     the explicit config of the checkpoint and of every ancestor, seed, device, versions, hardware
    manifest.json   SHA-256 of every file here, of each module's source, of each data file; sealed by its own sum
    evals.json      the frozen evaluation by fingerprint, the sums of the code that scores it
    baseline.json   sums of weights and logits, and the greedy rates to compare with
    code/ store/ data/   the library's source, the checkpoint with its ancestors, the data files

`check` answers one question: config, manifest (data and code), evaluation, baseline: which of them moved? An ablation
that changes one thing can prove that it was one.

`diary` reads the cards of a store back as a story: what each run changed against the run before it of the same name
(S3-6.34).

Left out: the packages themselves (their versions are recorded, a lock file pins them), signatures.
"""

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import lifecycle_lib
from lifecycle_lib.core.fingerprints import code_fingerprint, file_sha256, fingerprint
from lifecycle_lib.core.records import check_fields, read_json, write_json
from lifecycle_lib.core.store import Artifact, Store
from lifecycle_lib.judge import evals, verifiers
from lifecycle_lib.lab import rebuild, runcard
from lifecycle_lib.serve import engine

PARTS = ("config", "manifest", "evals", "baseline")
FILES = {"recipe.json": "config", "evals.json": "evals", "baseline.json": "baseline"}  # any other file: the manifest
SCORING: tuple[ModuleType, ...] = (evals, verifiers, engine)


def sums_of(modules: Sequence[ModuleType]) -> dict[str, str]:
    """Module name to the sum of its source."""
    return {m.__name__: code_fingerprint(m) for m in sorted(modules, key=lambda m: m.__name__)}


def _files(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / "manifest.json":
            yield path.relative_to(folder).as_posix()


def freeze(store: Store, artifact: Artifact, folder: str | Path, *, corpus: str | Path | None = None,
           n_cases: int = 512) -> dict[str, Any]:
    """Write the bundle of `artifact` into `folder`, which must be empty or new; returns its manifest.

    Raises ValueError for a folder in use, a card without what a rebuild needs, and for code that would already build
    something else than the card says: freeze before you edit, or rebuild first."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: is in use; give an empty or new folder")
    ancestors = store.lineage(artifact)
    planned = runcard.plan(artifact, ancestors, corpus)
    if moved := runcard.recipe_moves(artifact.card, planned):
        raise ValueError(f"{artifact.name}-{artifact.fingerprint}: {moved[0]}; the present code would build something "
                         "else, so a bundle of both would be a lie: make the artifact again, or go back to its code")
    try:
        return _write_bundle(folder, artifact, ancestors, planned, corpus, n_cases)
    except BaseException:  # Ctrl-C too: half a bundle would only be in the way of the next
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _write_bundle(folder: Path, artifact: Artifact, ancestors: Sequence[Artifact], planned: Mapping[str, Any],
                  corpus: str | Path | None, n_cases: int) -> dict[str, Any]:
    _copy(folder, [*ancestors, artifact], corpus)
    card = artifact.card
    write_json(folder / "recipe.json", {
        "artifact": f"{artifact.name}-{artifact.fingerprint}", "config_fingerprint": card["config_fingerprint"],
        "config": card["config"], "seed": card["config"]["seed"], "device": card["config"]["device"],
        "lineage": [{k: a.card[k] for k in ("name", "fingerprint", "config", "parents")} for a in ancestors],
        "versions": card["versions"], "hardware": card.get("hardware")})
    write_json(folder / "evals.json", {
        "eval_fingerprint": evals.eval_fingerprint(evals.frozen_cases(n_cases)), "n_cases": n_cases,
        "code": sums_of(SCORING)})
    write_json(folder / "baseline.json", baseline(artifact, ancestors, corpus, n_cases))
    manifest = {"format": 1, "data": planned["data"], "code": sums_of(planned["modules"]),
                "files": {name: file_sha256(folder / name) for name in _files(folder)}}
    manifest["seal"] = fingerprint(manifest)
    write_json(folder / "manifest.json", manifest)
    return manifest


def _copy(folder: Path, lineage: Sequence[Artifact], corpus: str | Path | None) -> None:
    for a in lineage:
        shutil.copytree(a.path, folder / "store" / a.path.name)
    source = Path(lifecycle_lib.__file__).parent
    shutil.copytree(source, folder / "code" / source.name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    if corpus:
        (folder / "data").mkdir()
        shutil.copy(corpus, folder / "data" / Path(corpus).name)


def baseline(artifact: Artifact, ancestors: Sequence[Artifact], corpus: str | Path | None, n_cases: int) -> dict:
    """Sums of weights and logits, greedy rates, and a sum over all answers."""
    with tempfile.TemporaryDirectory() as scratch:  # evaluations are not written to the user's store
        lab = runcard.lab_of(artifact.card, ancestors, Store(scratch), corpus=corpus)
        lab.profile = replace(lab.profile, n_eval=n_cases)
        report = rebuild.report_of(lab, artifact)
        return {"weights": rebuild.weights_sum(artifact), "logits": rebuild.logits_sum(lab, artifact),
                "rates": {r: report[r] for r in rebuild.RATES}, "answers": fingerprint(report["answers"])}


def read_manifest(folder: Path) -> dict[str, Any]:
    """manifest.json of a bundle. ValueError for a folder that is none."""
    if not (folder / "manifest.json").is_file():
        raise ValueError(f"{folder}: no manifest.json; make a bundle with: lifecycle recipe freeze")
    manifest = read_json(folder / "manifest.json")
    check_fields(manifest, {"files": dict, "code": dict, "data": list, "seal": str}, str(folder / "manifest.json"))
    return manifest


def open_bundle(folder: str | Path) -> tuple[dict[str, Any], Artifact, Store]:
    """(its files' contents by name, the checkpoint, the store of its ancestry). ValueError for what is no bundle."""
    folder = Path(folder)
    contents = {"manifest.json": read_manifest(folder)} | {name: read_json(folder / name) for name in FILES}
    check_fields(contents["recipe.json"], {"artifact": str, "config": dict, "seed": int}, str(folder / "recipe.json"))
    if not (folder / "store").is_dir():
        raise ValueError(f"{folder / 'store'}: missing; the bundle has lost its checkpoints, freeze it again")
    store = Store(folder / "store")
    return contents, store.find(contents["recipe.json"]["artifact"].rpartition("-")[2]), store


def check(folder: str | Path, store: Store | None = None) -> dict[str, list[str]]:
    """What moved, by part (config, manifest, evals, baseline): [] for a part that stands still.

    A file changed in the bundle counts for its part; so does present code or data that differs from what was frozen.
    With `store`, the checkpoint must be there, undamaged, with the frozen weights. Raises ValueError for what is no
    bundle."""
    folder = Path(folder)
    moved: dict[str, list[str]] = {part: [] for part in PARTS}
    manifest = read_manifest(folder)
    if manifest.get("seal") != fingerprint({k: v for k, v in manifest.items() if k != "seal"}):
        moved["manifest"].append("manifest.json was edited: its seal does not fit")
    here, frozen = set(_files(folder)), manifest["files"]
    for name in sorted(here | set(frozen)):
        part = FILES.get(name, "manifest")
        if name.startswith("store/locks/") or name.startswith("store/partial/"):
            continue
        if name not in here or name not in frozen:
            moved[part].append(f"{name} {'is gone' if name in frozen else 'was added'}")
        elif file_sha256(folder / name) != frozen[name]:
            moved[part].append(f"{name} was changed")
    if any(moved.values()):
        return moved  # a broken bundle is compared with nothing
    return _against_present(folder, store, moved)


def _against_present(folder: Path, store: Store | None, moved: dict[str, list[str]]) -> dict[str, list[str]]:
    contents, artifact, own = open_bundle(folder)
    manifest, scored = contents["manifest.json"], contents["evals.json"]
    corpus = next(iter(sorted((folder / "data").glob("*"))), None) if (folder / "data").is_dir() else None
    planned = runcard.plan(artifact, own.lineage(artifact), corpus)
    if planned["config_fingerprint"] != contents["recipe.json"]["config_fingerprint"]:
        moved["config"].append("the present stage takes another config than was frozen")
    moved["manifest"] += _code_moves(manifest["code"], sums_of(planned["modules"]))
    if evals.eval_fingerprint(evals.frozen_cases(scored["n_cases"])) != scored["eval_fingerprint"]:
        moved["evals"].append("the frozen evaluation has other cases")
    moved["evals"] += _code_moves(scored["code"], sums_of(SCORING))
    if store:
        named = [a for a in store.list() if a.fingerprint == artifact.fingerprint]
        if not named or (damage := store.verify(named[0])):
            moved["baseline"].append(damage[0] if named else f"{artifact.name}-{artifact.fingerprint} is not in "
                                     f"{store.root.name}")
        elif rebuild.weights_sum(named[0]) != contents["baseline.json"]["weights"]:
            moved["baseline"].append(f"{artifact.name}-{artifact.fingerprint} has other weights in {store.root.name}")
    return moved


def _code_moves(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    return [f"module {name} {'is new' if name not in then else 'is gone' if name not in now else 'was changed'}"
            for name in sorted(set(then) | set(now)) if then.get(name) != now.get(name)]


def diary(store: Store, name: str | None = None) -> list[dict[str, Any]]:
    """One entry an artifact, oldest first: when, what, cost, outcome, and what changed against the last of its name.

    Raises ValueError for an empty store, or a name that nothing has."""
    last: dict[str, dict[str, Any]] = {}
    entries = []
    for artifact in store.list():
        card = artifact.card
        if name is not None and card["name"] != name:
            continue
        before, flat = last.get(card["name"]), flatten({"config": card["config"], "parents": card["parents"]})
        flat["code"] = card["code"][:12]
        changed = None if before is None else [f"{k}: {before.get(k)} -> {flat.get(k)}"
                                               for k in sorted({*before, *flat}) if before.get(k) != flat.get(k)]
        outcome = {k: card[k] for k in ("steps", "last_loss", "held_out_loss") if k in card}
        entries.append({"created": card["created"][:19], "name": card["name"], "fingerprint": artifact.fingerprint,
                        "cpu_s": card["cpu_s"], "changed": changed, "outcome": outcome})
        last[card["name"]] = flat
    if not entries:
        raise ValueError(f"{store.root}: no artifact{f' is named {name!r}' if name else ''}, so there is no story")
    return entries


def flatten(value: Any, at: str = "") -> dict[str, Any]:
    """Nested dicts as {"a.b": value}."""
    if not isinstance(value, Mapping) or not value:
        return {at: value}
    return {k: v for key, part in value.items() for k, v in flatten(part, f"{at}.{key}" if at else str(key)).items()}
