"""The clean room: it passes on a whole bundle and refuses one that lacks a piece."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lifecycle_lib.lab.closure import clean_room
from lifecycle_lib.lab.rebuild import pick, verify
from lifecycle_lib.lab.recipe import freeze, open_bundle
from tests.lab.chain import chain


@pytest.fixture(scope="module")
def frozen(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clean") / "bundle"
    freeze(chain(), pick(chain(), "int8"), folder, n_cases=16)
    return folder


def test_a_whole_bundle_passes(frozen):
    result = clean_room(frozen, n_cases=16)
    assert result["ok"] and "exact" in result["held"] and result["why"] == "rebuilt"


def test_a_lost_parent_is_named(frozen, tmp_path):
    bundle = Path(shutil.copytree(frozen, tmp_path / "bundle"))
    shutil.rmtree(next((bundle / "store").glob("rlvr-*")))
    _, artifact, store = open_bundle(bundle)
    with pytest.raises(ValueError, match="parent 'parent': fingerprint .* matches nothing"):
        verify(store, artifact)


def test_lost_code_and_no_time_are_refused(frozen, tmp_path):
    bundle = Path(shutil.copytree(frozen, tmp_path / "bundle"))
    (bundle / "code" / "lifecycle_lib" / "model" / "quantise.py").unlink()
    result = clean_room(bundle, n_cases=16)
    assert not result["ok"] and "quantise" in result["why"]
    assert clean_room(frozen, budget_s=0.05)["why"] == "not rebuilt within 0.05 s"


def test_no_bundle(tmp_path):
    with pytest.raises(ValueError, match="no manifest.json"):
        clean_room(tmp_path)
