"""The frozen recipe: as frozen until something moves, and then it says which of four."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from lifecycle_lib.core.records import read_json, write_json
from lifecycle_lib.core.store import Store
from lifecycle_lib.lab import recipe
from lifecycle_lib.lab.rebuild import pick
from lifecycle_lib.lab.recipe import PARTS, check, diary, flatten, freeze, open_bundle
from tests.lab.chain import chain


@pytest.fixture(scope="module")
def frozen(tmp_path_factory) -> Path:
    store, folder = chain(), tmp_path_factory.mktemp("freeze") / "bundle"
    freeze(store, pick(store, "dpo"), folder, n_cases=48)
    return folder


@pytest.fixture
def bundle(frozen, tmp_path) -> Path:
    return Path(shutil.copytree(frozen, tmp_path / "bundle"))


def still(moved: dict) -> list[str]:
    return [part for part, lines in moved.items() if lines]


def test_as_frozen(frozen):
    assert check(frozen, chain()) == {part: [] for part in PARTS}
    contents, artifact, store = open_bundle(frozen)
    assert artifact.name == "dpo" and {a.name for a in store.lineage(artifact)} == {"tokenizer", "base", "sft"}
    assert contents["recipe.json"]["seed"] == 0 and contents["evals.json"]["n_cases"] == 48


def test_sums_are_those_of_sha256(frozen):
    files = read_json(frozen / "manifest.json")["files"]
    for name in ("recipe.json", "code/lifecycle_lib/train/dpo.py"):
        assert files[name] == hashlib.sha256((frozen / name).read_bytes()).hexdigest()


@pytest.mark.parametrize(("file", "part"), [("recipe.json", "config"), ("evals.json", "evals"),
                                            ("baseline.json", "baseline"),
                                            ("code/lifecycle_lib/train/dpo.py", "manifest")])
def test_one_changed_file_is_one_moved_part(bundle, file, part):
    path = bundle / file
    path.write_text(path.read_text() + "\n")
    moved = check(bundle)
    assert still(moved) == [part] and file in moved[part][0]


def test_a_lost_and_an_added_file_and_an_edited_manifest(bundle):
    next((bundle / "store").glob("sft-*/model.safetensors")).unlink()
    (bundle / "code" / "extra.py").write_text("x = 1\n")
    moved = check(bundle)["manifest"]
    assert any("is gone" in m for m in moved) and any("was added" in m for m in moved)
    manifest = read_json(bundle / "manifest.json")
    manifest["files"].pop("baseline.json")
    write_json(bundle / "manifest.json", manifest)
    assert any("seal" in m for m in check(bundle)["manifest"])


def test_present_code_that_moved_is_named(bundle, monkeypatch):
    """One module of the stage and one of the scoring, each edited after the freeze."""
    real = recipe.sums_of
    monkeypatch.setattr(recipe, "sums_of", lambda modules: {
        k: "0" * 64 if k == "lifecycle_lib.train.dpo" else v for k, v in real(modules).items()})
    moved = check(bundle)
    assert still(moved) == ["manifest"] and moved["manifest"] == ["module lifecycle_lib.train.dpo was changed"]
    monkeypatch.setattr(recipe, "sums_of", lambda modules: {
        k: "0" * 64 if k == "lifecycle_lib.judge.evals" else v for k, v in real(modules).items()})
    assert still(check(bundle)) == ["evals"]


def test_other_weights_in_the_store_are_a_moved_baseline(bundle, monkeypatch):
    monkeypatch.setattr(recipe.rebuild, "weights_sum", lambda artifact: "f" * 64)
    moved = check(bundle, chain())
    assert still(moved) == ["baseline"]


def test_a_damaged_or_missing_checkpoint_is_a_moved_baseline(bundle, tmp_path):
    """The card alone would say that nothing happened."""
    other = Store(tmp_path / "other")
    assert "is not in other" in check(bundle, other)["baseline"][0]
    made = pick(chain(), "dpo")
    copy = Path(shutil.copytree(made.path, other.root / made.path.name)) / "model.safetensors"
    assert still(check(bundle, other)) == []
    raw = bytearray(copy.read_bytes())
    raw[-1] ^= 1
    copy.write_bytes(raw)
    assert "its bytes changed" in check(bundle, other)["baseline"][0]


def test_freeze_refuses_a_used_folder_and_a_moved_recipe(tmp_path, monkeypatch):
    store = chain()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "x").write_text("x")
    with pytest.raises(ValueError, match="is in use"):
        freeze(store, pick(store, "dpo"), tmp_path / "used")
    monkeypatch.setattr(recipe.runcard, "code_fingerprint", lambda modules: "0" * 64)
    with pytest.raises(ValueError, match="would build something else"):
        freeze(store, pick(store, "dpo"), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_stopped_freeze_leaves_nothing_in_the_way(tmp_path, monkeypatch):
    store = chain()

    def stop(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(recipe, "baseline", stop)
    with pytest.raises(KeyboardInterrupt):
        freeze(store, pick(store, "dpo"), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_no_bundle(tmp_path):
    for function in (check, open_bundle):
        with pytest.raises(ValueError, match="no manifest.json"):
            function(tmp_path)


def test_flatten_by_hand():
    assert flatten({"a": {"b": 1, "c": {}}, "d": [2]}) == {"a.b": 1, "a.c": {}, "d": [2]}


def test_diary_tells_what_each_run_changed(tmp_path):
    store = Store(tmp_path / "store")
    for lr in (0.1, 0.2, 0.2):
        config = {"fit": {"lr": lr, "steps": 3}} | ({"note": 1} if len(store.list()) == 2 else {})
        store.get_or_make("run", config, {}, lambda folder: {"last_loss": 0.5})
    store.get_or_make("other", {"x": 1}, {}, lambda folder: {"steps": 1})
    entries = diary(store)
    assert [e["changed"] for e in entries] == [None, ["config.fit.lr: 0.1 -> 0.2"], ["config.note: None -> 1"], None]
    assert entries[0]["outcome"] == {"last_loss": 0.5}
    assert [e["name"] for e in diary(store, "other")] == ["other"]
    json.dumps(entries)
    with pytest.raises(ValueError, match="no story"):
        diary(store, "nothing")
