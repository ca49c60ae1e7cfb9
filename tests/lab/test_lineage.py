"""Lineage: what a model was made from, whom a revocation hits, what deleting costs."""

from __future__ import annotations

import hashlib
import shutil

import pytest

from lifecycle_lib.core.seeds import rng
from lifecycle_lib.core.store import Store
from lifecycle_lib.corpus.licences import join, text_of
from lifecycle_lib.corpus.rights_log import ClaimsLog
from lifecycle_lib.lab import lineage
from lifecycle_lib.lab.lineage import (
    CLEAN,
    HOLDS,
    NOT_RECORDED,
    delete_plan,
    models_hit,
    sources_of,
    sources_of_model,
    terms_of_model,
)


def row(source: str, text: str, licence: str = "MIT") -> dict:
    return {"id": text, "text": text, "source": source, "licence": licence}


def stage(store: Store, name: str, parents=None, weights: bool = True, **card):
    def make(folder):
        (folder / ("model.safetensors" if weights else "report.json")).write_bytes(name.encode())
        return card or {"steps": 1}
    return store.get_or_make(name, {}, parents or {}, make)


@pytest.fixture
def world(tmp_path):
    """base (A) -> sft (B) -> int8; base -> adapter (C), recorded in `measured`; an old stage that says nothing."""
    store = Store(tmp_path / "store")
    made = {"base": stage(store, "base", sources=sources_of([row("A", "x"), row("A", "y")]))}
    made["sft"] = stage(store, "sft", {"base": made["base"]}, sources=sources_of([row("B", "z", "CC-BY-4.0")]))
    made["int8"] = stage(store, "int8", {"parent": made["sft"]}, sources={})
    made["adapter"] = stage(store, "adapter", {"base": made["base"]}, measured={"sources": sources_of([row("C", "q")])})
    made["eval"] = stage(store, "eval", {"checkpoint": made["sft"]}, weights=False)
    made["old"] = stage(store, "old")
    return store, made


def test_sources_of_by_hand():
    pairs = sorted(hashlib.sha256(t).digest() for t in (b"MIT\nx", b"MIT\ny"))
    wanted = hashlib.sha256(pairs[0] + pairs[1]).hexdigest()
    assert sources_of([row("A", "y"), row("A", "x")]) == {"A": {"rows": 2, "sha256": wanted, "licence": "MIT"}}
    assert sources_of([row("A", "x"), row("A", "y", "CC-BY-4.0")])["A"]["licence"] == "(CC-BY-4.0) AND (MIT)"
    assert sources_of([row("A", "x", "")])["A"]["licence"] == "NOASSERTION"


def test_sources_of_sees_text_and_licence_but_not_order():
    rows = [row("A", f"text {i}") for i in range(20)]
    mixed = rng(0, "order").sample(rows, len(rows))
    assert sources_of(mixed) == sources_of(rows)
    for field in ("text", "licence"):
        assert sources_of([{**rows[0], field: "other"}, *rows[1:]])["A"]["sha256"] != sources_of(rows)["A"]["sha256"]


@pytest.mark.parametrize("bad", [{"text": "x"}, {"source": "A"}, {"text": "x", "source": " "}])
def test_sources_of_names_the_row(bad):
    with pytest.raises(ValueError, match="row 2"):
        sources_of([row("A", "x"), bad])


def test_sources_of_nothing_raises():
    with pytest.raises(ValueError, match="no rows"):
        sources_of([])


def test_sources_pass_to_descendants(world):
    store, made = world
    found = sources_of_model(store, made["int8"])
    assert {s: [u["stage"] for u in uses] for s, uses in found["sources"].items()} == {"A": ["base"], "B": ["sft"]}
    assert found["not_recorded"] == []
    assert sources_of_model(store, made["eval"])["not_recorded"] == [f"eval-{made['eval'].fingerprint}"]


def test_models_hit_by_a_revocation(world):
    store, made = world
    hit = {kind: {a.name for a in found} for kind, found in models_hit(store, "B").items()}
    assert hit == {HOLDS: {"sft", "int8", "eval"}, CLEAN: {"base", "adapter"}, NOT_RECORDED: {"old"}}
    assert [a.name for a in models_hit(store, "C")[HOLDS]] == ["adapter"]
    nobody = {kind: {a.name for a in found} for kind, found in models_hit(store, "Z").items()}
    assert nobody[HOLDS] == set() and nobody[NOT_RECORDED] == {"old", "eval"}


def test_holds_agrees_with_the_walk_through_each_ancestry(world):
    store, _ = world
    graph = lineage.Graph.of(store)
    for source in "ABCZ":
        for fp, state in graph.holds(source).items():
            own = [lineage.recorded(a.card) for a in graph.ancestry(fp).values()]
            there = any(source in (o or {}) for o in own)
            assert state == (HOLDS if there else NOT_RECORDED if None in own else CLEAN)


def test_a_plan_that_looks_at_own_cards_only_would_miss_the_children(world):
    store, made = world
    plan = delete_plan(store, "A")
    careless = {a.name for a in store.list() if "A" in (lineage.recorded(a.card) or {})}
    assert careless == {"base"}  # what a lookup without ancestry finds
    assert [s["name"] for s in plan["steps"]][0] == "base"
    assert {s["name"]: s["action"] for s in plan["steps"]} == {
        "base": "retrain without it", "sft": "rebuild", "int8": "rebuild", "adapter": "rebuild", "eval": "rebuild"}
    assert plan["cpu_s"] == pytest.approx(sum(a.card["cpu_s"] for name, a in made.items() if name != "old"))
    assert plan["unsettled"] == [f"old-{made['old'].fingerprint}"]
    assert {s["name"] for s in plan["steps"] if not s["weights"]} == {"eval"}


def test_detaching_an_adapter_leaves_its_base(world):
    store, _ = world
    assert [s["name"] for s in delete_plan(store, "C")["steps"]] == ["adapter"]


def test_a_store_that_records_nothing_raises(tmp_path):
    store = Store(tmp_path / "s")
    stage(store, "base")
    with pytest.raises(ValueError, match="no artifact records"):
        models_hit(store, "A")


# ---- terms, promotion, and the customer's report


LOG = ClaimsLog([
    {"source": "A", "date": "2020-01-01", "event": "granted", "licence": "MIT", "evidence": "on file"},
    {"source": "B", "date": "2020-01-01", "event": "granted", "licence": "CC-BY-4.0",
     "contract": {"customer": "acme", "starts": "2020-01-01", "ends": "2099-12-31", "delete_on_exit": True}},
    {"source": "A", "date": "2100-01-01", "event": "revoked"},
])


def test_terms_of_a_model_join_its_whole_ancestry(world):
    store, made = world
    assert text_of(terms_of_model(store, made["int8"])) == "attribution, commercial-ok"
    assert "unknown" in text_of(terms_of_model(store, made["eval"]))  # not recorded is not fine
    nc = stage(store, "adapter2", {"base": made["base"]}, sources=sources_of([row("N", "t", "CC-BY-NC-4.0")]))
    assert text_of(terms_of_model(store, nc)) == "attribution, non-commercial"
    merged = stage(store, "merge", {"a": made["int8"], "b": nc}, sources={})
    assert terms_of_model(store, merged) == join(terms_of_model(store, made["int8"]), terms_of_model(store, nc))


def test_terms_are_those_of_the_day_of_training(world):
    store, made = world
    entries = lineage.terms_at_training(store, made["int8"], LOG)
    assert [(e["source"], e["stage"], e["licence"], e["claim"]) for e in entries] == [
        ("A", "base", "MIT", "granted"), ("B", "sft", "CC-BY-4.0", "granted")]


def test_a_customer_report_says_what_changed_and_whose_it_is(world):
    store, made = world
    report = lineage.customer_report(store, made["int8"], "acme", LOG, "2099-12-31")
    assert (report["not_recorded"], report["no_longer_granted"], report["of_other_customers"]) == ([], [], [])
    assert [a["stage"] for a in report["ancestry"]] == ["base", "sft", "int8"]
    later = lineage.customer_report(store, made["int8"], "other", LOG, "2100-01-01")
    assert [s["source"] for s in later["no_longer_granted"]] == ["A", "B"]
    assert later["delete_due"] == ["B"] == later["of_other_customers"]
    assert [e["claim"] for e in later["sources"]] == ["granted", "granted"]  # the past is not rewritten


def test_a_research_ancestor_blocks_promotion(world):
    store, made = world
    assert lineage.promotion_problems(store, made["int8"]) == []
    base = stage(store, "research-base", sources=sources_of([row("A", "x")]))
    child = stage(store, "tuned", {"base": base}, sources={})
    assert lineage.promotion_problems(store, child) == [f"research-base-{base.fingerprint} is of the research lane"]
    assert len(lineage.promotion_problems(store, made["old"])) == 2


@pytest.mark.parametrize("card", [{"sources": "A"}, {"sources": {"A": 0.9}}, {}, {"measured": {"sources": {"A": {}}}}])
def test_a_field_of_another_shape_says_nothing(card):
    assert lineage.recorded(card) is None


def test_a_lost_parent_is_not_recorded(world):
    store, made = world
    shutil.rmtree(made["base"].path)
    hit = {kind: {a.name for a in found} for kind, found in models_hit(store, "A").items()}
    assert hit[HOLDS] == set() and {"sft", "int8", "adapter"} <= hit[NOT_RECORDED]
    assert sources_of_model(store, made["sft"])["not_recorded"] == [f"(missing)-{made['base'].fingerprint}"]
