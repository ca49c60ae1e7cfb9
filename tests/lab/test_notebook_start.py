"""The strip and the start of a notebook: the same text every time, the store found from any folder."""

from __future__ import annotations

import pytest

from lifecycle_lib.lab import notebook as nb


def test_strip_of_sft_by_hand():
    assert nb.strip("07") == (
        "07_sft_the_interface: demonstrations teach the interface\n"
        "  changes weights  data  pretrain  [SFT]  preferences  rewards  adapters  quantise\n"
        "  frozen weights   retrieval  tools  evaluation  release\n"
        "  sft: weights change")


def test_every_notebook_has_a_strip_with_its_own_levers():
    assert list(nb.NOTEBOOKS) == [f"{i:02d}" for i in range(20)]
    for key, entry in nb.NOTEBOOKS.items():
        on = {word[1:-1].lower() for word in nb.strip(key).split() if word.startswith("[")}
        assert on == set(entry.levers) and on <= set(nb.LEVERS)


def test_a_strip_without_its_lever_would_be_caught():
    broken = nb.strip("13").replace("[RETRIEVAL]", "retrieval")
    assert {w for w in broken.split() if w.startswith("[")} != {"[RETRIEVAL]"}
    assert {w for w in nb.strip("13").split() if w.startswith("[")} == {"[RETRIEVAL]"}


def test_start(capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIFECYCLE_STORE", str(tmp_path / "store"))
    lab = nb.start("07", profile="smoke", seed=3, device="cpu")
    first = capsys.readouterr().out
    assert lab.profile.name == "smoke" and lab.seed == 3 and lab.store.root == tmp_path / "store"
    assert first.endswith("profile smoke, seed 3, device cpu\n")
    nb.start("07", profile="smoke", seed=3, device="cpu")
    assert capsys.readouterr().out == first


@pytest.mark.parametrize("given", [{"notebook": "42"}, {"profile": "huge"}, {"device": "abacus"}])
def test_unknown_names_raise(given):
    with pytest.raises(ValueError, match="unknown"):
        nb.start(**given)
