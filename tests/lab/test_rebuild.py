"""Rebuilding from a card: exact for every stage, and each way in which it must not be."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from scipy.stats import ttest_rel
from statsmodels.stats.inter_rater import cohens_kappa

from lifecycle_lib.core.seeds import rng
from lifecycle_lib.core.store import Artifact, Store
from lifecycle_lib.lab import rebuild, runcard
from lifecycle_lib.lab.rebuild import VerifyConfig, compare, held, kappa, pick, preflight, verify
from lifecycle_lib.lab.stages import STAGES, Lab
from tests.lab.chain import chain

SMALL = VerifyConfig(n_cases=16)


@pytest.fixture(scope="module")
def store() -> Store:
    return chain()


def with_card(artifact: Artifact, change) -> Artifact:
    """The artifact with a changed copy of its card."""
    card = json.loads(json.dumps(artifact.card))
    change(card)
    return replace(artifact, card=card)


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_comes_back_bit_for_bit(store, name, tmp_path):
    artifact = pick(store, name)
    before = preflight(store, artifact)
    assert before["moved"] == [] and before["expected"] == "exact" and before["actuals_off"] == []
    again = rebuild.rebuild(store, artifact, Store(tmp_path / "again"))
    assert again.fingerprint == artifact.fingerprint
    assert again.card["files"]["model.safetensors"] == artifact.card["files"]["model.safetensors"]
    assert not again.path.is_relative_to(store.root)


def test_deep_rebuilds_the_parents_too(store, tmp_path):
    into = Store(tmp_path / "deep")
    again = rebuild.rebuild(store, pick(store, "dpo"), into, deep=True)
    assert {a.name for a in into.list()} == {"tokenizer", "base", "sft", "dpo"}
    assert rebuild.weights_sum(again) == rebuild.weights_sum(pick(store, "dpo"))


def test_verify_finds_it_exact_and_leaves_the_store_alone(store):
    names = {p.name for p in store.root.iterdir()}
    result = verify(store, pick(store, "dpo"), cfg=SMALL)
    assert result["ok"] and "exact" in result["held"] and result["exact"] == {"weights": True, "logits": True}
    assert result["agreement"]["same_answers"] == 16 and result["rebuilt"] == result["artifact"]
    assert {p.name for p in store.root.iterdir()} == names
    json.dumps(result)
    assert "holds: exact" in rebuild.after_text(result)


def test_another_seed_is_not_exact_and_not_expected_to_be(store):
    result = verify(store, pick(store, "sft"), seed=5, cfg=SMALL)
    assert not any(result["exact"].values()) and result["expected"] == "statistical"


def test_a_changed_config_is_found_before_anything_is_built(store, tmp_path):
    broken = with_card(pick(store, "dpo"), lambda c: c["config"].update(beta=0.1))
    before = preflight(store, broken)
    assert [m.what for m in before["moved"]] == ["config"] and before["expected"] == "none"
    again = rebuild.rebuild(store, broken, Store(tmp_path / "x"))
    assert again.fingerprint != broken.fingerprint
    assert rebuild.weights_sum(again) != rebuild.weights_sum(broken)


def test_a_moved_recipe_is_never_ok(store):
    broken = with_card(pick(store, "dpo"), lambda c: c["config"].update(beta=0.4))
    result = verify(store, broken, cfg=SMALL)
    assert result["expected"] == "none" and not result["ok"]


def test_changed_code_is_found(store, monkeypatch):
    monkeypatch.setattr(runcard, "code_fingerprint", lambda modules: "0" * 64)
    before = preflight(store, pick(store, "int8"))
    assert [m.what for m in before["moved"]] == ["code"] and before["expected"] == "none"


@pytest.mark.parametrize(("field", "value", "kind"), [
    (("versions", "torch"), "1.0", "versions"), (("hardware", "threads"), 7, "machine"),
    (("hardware", "cpu"), "another", "machine")])
def test_versions_and_machine_lower_what_is_expected(store, field, value, kind):
    broken = with_card(pick(store, "dpo"), lambda c: c[field[0]].update({field[1]: value}))
    before = preflight(store, broken)
    assert [(m.kind, m.what) for m in before["moved"]] == [(kind, field[1])]
    assert before["expected"] == "statistical"
    text = rebuild.before_text(broken, before, before["expected"])
    assert f"{field[1]}: {value} in the card" in text


@pytest.mark.parametrize(("path", "group"), [
    ("hardware.threads", "hardware"), ("versions.torch", "dependencies"), ("actual", "cadence"),
    ("parents.tokenizer", "tokenizer"), ("code", "code"), ("data", "data snapshot"), ("config.seed", "seeds")])
def test_a_missing_field_is_named(store, path, group):
    card = json.loads(json.dumps(pick(store, "dpo").card))
    assert not any(runcard.missing_fields(card, evaluated=True).values())
    *folders, last = path.split(".")
    part = card
    for key in folders:
        part = part[key]
    del part[last]
    missing = {g: f for g, f in runcard.missing_fields(card, evaluated=True).items() if f}
    assert missing == {group: [path]}


def test_all_nine_groups_are_asked_for(store):
    found = runcard.missing_fields(pick(store, "dpo").card)
    assert set(found) == {"data snapshot", "tokenizer", "code", "dependencies", "hardware", "config", "seeds",
                          "cadence", "evaluation and prompts"}
    assert found["evaluation and prompts"]  # nobody evaluated it, as far as this call knows


def test_a_public_checkpoint_is_not_asked_for_as_a_corpus(store):
    """Its files stand under `data` in the card, as a corpus would."""
    broken = with_card(pick(store, "dpo"), lambda c: c.update(data=[["model.safetensors", "0"]],
                                                             config=c["config"] | {"public": "some"}))
    with pytest.raises(ValueError, match="lifecycle run --base FOLDER"):
        preflight(store, broken)


@pytest.mark.parametrize("field", ["seed", "beta"])
def test_a_card_that_cannot_be_rebuilt_says_which_field(store, field):
    broken = with_card(pick(store, "dpo"), lambda c: c["config"].pop(field))
    with pytest.raises(ValueError, match=f"field 'config.{field}' is missing"):
        preflight(store, broken)


def test_verify_is_not_ok_when_the_card_is_incomplete(store):
    result = verify(store, pick(store, "sft"), cfg=SMALL)  # never evaluated
    assert "exact" in result["held"] and not result["ok"]
    assert result["missing"] == {"evaluation and prompts": ["a report of its evaluation"]}


def test_pick(store):
    artifact = pick(store, "dpo")
    assert pick(store, artifact.fingerprint[:9]) == artifact
    with pytest.raises(ValueError, match="matches nothing"):
        pick(store, "nosuch")


def test_pick_takes_the_newest_of_a_name_and_says_so(tmp_path, capsys):
    shared = Store(tmp_path / "two")
    for seed in (0, 1):
        last = shared.get_or_make("dpo", {"seed": seed}, {}, lambda folder: {"x": 1})
    assert pick(shared, "dpo") == last and "the newest of 2" in capsys.readouterr().err
    with pytest.raises(ValueError, match="matches nothing"):
        pick(shared, "ffff")


def test_no_stage_no_rebuild(store):
    with pytest.raises(ValueError, match="no stage of the graph"):
        preflight(store, next(a for a in store.list() if a.name == "tokenizer"))


# ---- agreement ----------------------------------------------------------------------------------------------

def report(ok: list[bool], answers: list[str] | None = None, fp: str = "e") -> dict:
    fields = dict.fromkeys(rebuild.RATES.values())
    return {"eval_fingerprint": fp, "answers": answers or [str(x) for x in ok],
            "cases": [{k: x for k in fields} | {"exact": x} for x in ok]}


def test_kappa_by_hand():
    # 20 both right, 5 and 10 split, 15 both wrong: .70 seen, .50 by chance, kappa .40
    a = [True] * 25 + [False] * 25
    b = [True] * 20 + [False] * 5 + [True] * 10 + [False] * 15
    assert kappa(a, b) == pytest.approx(0.4)
    assert kappa([True, True], [True, True]) is None
    with pytest.raises(ValueError, match="0 and 0 labels"):
        kappa([], [])


def test_kappa_against_statsmodels():
    r = rng(1, "kappa")
    for _ in range(20):
        a, b = [r.random() < 0.7 for _ in range(40)], [r.random() < 0.6 for _ in range(40)]
        table = [[sum(x == i and y == j for x, y in zip(a, b)) for j in (False, True)] for i in (False, True)]
        assert kappa(a, b) == pytest.approx(cohens_kappa(table).kappa)
        assert kappa(a, b) == pytest.approx(kappa(b, a))


def test_compare_interval_against_scipy_and_sign():
    r = rng(2, "compare")
    a, b = [r.random() < 0.7 for _ in range(400)], [r.random() < 0.6 for _ in range(400)]
    found = compare(report(a), report(b), VerifyConfig())["rates"]["exact_pass"]
    ci = ttest_rel([float(x) for x in b], [float(x) for x in a]).confidence_interval()
    assert (found["low"], found["high"]) == pytest.approx((ci.low, ci.high))
    back = compare(report(b), report(a), VerifyConfig())["rates"]["exact_pass"]
    assert back["difference"] == pytest.approx(-found["difference"])


def test_no_disagreement_in_few_cases_proves_no_equivalence():
    few, many = [True] * 48, [True] * 512
    assert not compare(report(few), report(few), VerifyConfig())["statistical"]
    assert compare(report(many), report(many), VerifyConfig())["statistical"]


def test_equal_rates_with_other_answers_are_statistical_not_behavioural():
    """The planted case: both are right in 90 %, on other items."""
    n = 500
    a, b = [i >= 5 for i in range(n)], [i < n - 5 for i in range(n)]
    agreement = compare(report(a, [f"a{i}" for i in range(n)]), report(b, [f"b{i}" for i in range(n)]), VerifyConfig())
    assert agreement["statistical"] and not agreement["behavioural"] and agreement["kappa"] < 0.1
    assert held(False, agreement) == ["statistical"] and held(True, agreement) == list(rebuild.LEVELS)


def test_identical_texts_with_other_errors_do_not_behave_alike():
    """Nearly all texts are the same; the few errors are on other items, so kappa is about 0."""
    n = 500
    a, b = [i >= 4 for i in range(n)], [i < n - 4 for i in range(n)]
    texts = ["same"] * n
    assert not compare(report(a, texts), report(b, texts), VerifyConfig())["behavioural"]
    assert compare(report(a, texts), report(a, texts), VerifyConfig())["behavioural"]


def test_compare_refuses_other_cases():
    with pytest.raises(ValueError, match="different evaluations"):
        compare(report([True]), report([True], fp="f"), VerifyConfig())


def test_config_is_checked():
    with pytest.raises(ValueError, match="margin=0"):
        VerifyConfig(margin=0)
    with pytest.raises(ValueError, match="n_cases=1"):
        VerifyConfig(n_cases=1)


# ---- the user's own text ------------------------------------------------------------------------------------

def test_a_base_with_own_text_needs_the_same_text(tmp_path):
    text = tmp_path / "own.txt"
    text.write_text("\n\n".join(f"line {i}: a mug broke on day {i % 30}" for i in range(200)))
    own = Store(tmp_path / "store")
    base = Lab("smoke", seed=0, device="cpu", store=own, corpus=text).base()
    with pytest.raises(ValueError, match="own.txt; give that file with --corpus"):
        preflight(own, base)
    assert preflight(own, base, text)["expected"] == "exact"
    again = rebuild.rebuild(own, base, Store(tmp_path / "again"), corpus=text)
    assert rebuild.weights_sum(again) == rebuild.weights_sum(base)
    text.write_text(text.read_text() + "\n\none line more")
    assert [m.what for m in preflight(own, base, text)["moved"]] == ["data"]
