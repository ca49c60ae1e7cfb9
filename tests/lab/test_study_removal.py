"""D8: its measures against brute force and scipy, its arms on a tiny world, and faults that the audit catches."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu

from lifecycle_lib.core.store import Store
from lifecycle_lib.desk.sources import SOURCES
from lifecycle_lib.lab.lineage import CLEAN, HOLDS, Graph
from lifecycle_lib.lab.stages import Lab
from lifecycle_lib.lab.studies import removal_design as design
from lifecycle_lib.lab.studies import removal_world as W
from lifecycle_lib.lab.studies.removal import ARMS, Removal
from lifecycle_lib.lab.studies.small import row_losses, rows_of
from lifecycle_lib.model.checkpoint import weights_hash
from lifecycle_lib.model.gpt import GPT, GPTConfig

SMOKE = W.SIZES["smoke"]


def gpt(seed=0):
    torch.manual_seed(seed)
    return GPT(GPTConfig(vocab_size=len(W.VOCAB), block_size=24, n_layer=1, n_head=2, n_embd=16)).eval()


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    import os
    os.environ["LIFECYCLE_QUIET"] = "1"
    return Removal(Lab("smoke", seed=100, store=Store(tmp_path_factory.mktemp("d8") / "store")), SMOKE)


# ---- the text ------------------------------------------------------------------------------------------------

def test_the_world_is_pure_and_plants_what_it_says():
    world = W.draw_world(3, SMOKE)
    assert world == W.draw_world(3, SMOKE) != W.draw_world(4, SMOKE)
    texts = W.texts_of(world.removed)
    for name, code, repeats in world.secrets:
        assert texts.count(f"the code of {name} is {code}") == repeats
    assert sorted({k for _, _, k in world.secrets}) == [1, 4, 16] and len(world.secrets) == 24
    stays = " | ".join(W.texts_of(world.kept) + W.texts_of(world.replacement))
    assert not any(f"the code of {name} is" in stays for name, _, _ in world.secrets)
    assert not set(world.posts) & set(world.fresh_posts)
    assert {r["source"] for r in world.removed} == {W.SOURCE}


def test_licences_are_those_of_the_desk():
    assert all(SOURCES[s].licence == licence for s, licence in W.LICENCES.items() if s in SOURCES)
    assert set(W.LICENCES) - set(SOURCES) == {"REWRITE"}


# ---- the measures --------------------------------------------------------------------------------------------

def test_exposure_by_hand():
    logps = torch.full((10_000,), -20.0)
    logps[[1234, 7, 8, 9]] = torch.tensor([-2.0, -1.0, -1.5, -1.9])
    assert W.exposure(logps, "12 34") == pytest.approx(math.log2(10_000 / 4))  # fourth of 10,000
    assert W.exposure(logps, "00 07") == pytest.approx(math.log2(10_000))
    assert W.exposure(logps, "50 50") == 0.0  # all that are left tie: the worst rank counts


def test_exposure_equals_ranking_every_code_as_a_row_of_its_own():
    model, name, code = gpt(), "ada", "31 07"
    rows = rows_of(W.VOCAB, [f"the code of {name} is"] * 10_000, [f"{a} {b}" for a in W.NUMBERS for b in W.NUMBERS])
    ids, mask = rows.ids[:, :-1], rows.mask[:, :-1]  # without <eos>
    losses = row_losses(model, type(rows)(ids, mask), part=5000)
    assert torch.allclose(-2 * losses, W.code_logps(model, name), atol=1e-4)
    rank = int((losses <= losses[3107]).sum())
    assert W.exposures(model, [(name, code, 1)])[0] == pytest.approx(math.log2(10_000 / rank), abs=0.01)


def test_a_secret_nobody_saw_has_the_closed_form():
    n = W.N_CODES
    assert W.blank_exposure() == pytest.approx(math.log2(n) - math.lgamma(n + 1) / math.log(2) / n, abs=1e-9)
    assert W.blank_exposure() == pytest.approx(math.log2(math.e), abs=1e-3)
    logps = W.code_logps(gpt(), "ada")  # any fixed model, codes drawn at random
    drawn = [W.exposure(logps, f"{a:02d} {b:02d}") for a, b in np.random.default_rng(0).integers(0, 100, (4000, 2))]
    assert np.mean(drawn) == pytest.approx(W.blank_exposure(), abs=4 * np.std(drawn) / 4000**0.5)


def test_membership_auc_is_mann_whitney_and_sees_a_leak():
    model, world = gpt(), W.draw_world(0, SMOKE)
    a, b = W.encode(world.posts), W.encode(world.fresh_posts)
    la, lb = row_losses(model, a).numpy(), row_losses(model, b).numpy()
    want = mannwhitneyu(-la, -lb).statistic / (len(la) * len(lb))
    assert W.membership_auc(model, a, b) == pytest.approx(want)
    assert W.membership_auc(model, a, a) == pytest.approx(0.5)


def test_shards_average_probabilities_not_logits():
    models, ids = [gpt(0), gpt(1)], torch.arange(8).view(1, 8)
    ours = W.Shards(models)(ids)
    want = torch.stack([m(ids).softmax(-1) for m in models]).mean(0)
    assert torch.allclose(ours.exp(), want, atol=1e-6)
    wrong = torch.stack([m(ids) for m in models]).mean(0).softmax(-1)
    assert not torch.allclose(wrong, want, atol=1e-6)
    rows = W.encode(["ada from lima paid 03 for a mug"])
    assert row_losses(W.Shards([models[0]] * 2), rows) == pytest.approx(row_losses(models[0], rows).item(), abs=1e-5)


def test_distance_is_zero_to_itself_and_below_one():
    world = W.draw_world(0, SMOKE)
    assert W.distance(gpt(), gpt(), world) == 0.0
    assert 0 < W.distance(gpt(0), gpt(1), world) < 1


def test_relearning_leaves_the_model_alone():
    model, world = gpt(), W.draw_world(0, SMOKE)
    before = weights_hash(model)
    curve = W.relearn(model, world, SMOKE, 0)
    assert weights_hash(model) == before and [p["step"] for p in curve] == [0, 8]
    assert curve[-1]["loss"] < curve[0]["loss"]


# ---- the arms ------------------------------------------------------------------------------------------------

def test_lineage_names_who_holds_the_source(study):
    for name in (*ARMS, "never", "worn", "shards-before"):
        study.audited(name)
    state = Graph.of(study.lab.store).holds(W.SOURCE)
    def of(artifact):
        return state[artifact.fingerprint]
    assert of(study.without("base")) == of(study.without("retrain")) == of(study.shard(1)) == CLEAN
    assert {of(a) for a in (study.full(), study.ascent(), study.ascent(True), study.finetune(), study.adapter(),
                            study.shard(0), study.audited("worn"), study.audited("nothing"))} == {HOLDS}
    assert of(study.audited("detach")) == of(study.audited("shards")) == CLEAN


def test_detach_gives_the_base_back_exactly(study):
    off, _, cost = study.model("detach")
    assert weights_hash(off) == weights_hash(study.lab.load(study.without("base")))
    assert study.adapter().card["exact"] and cost < 1.0


def test_every_never_seen_model_has_random_numbers_of_its_own(study):
    hashes = {weights_hash(study.lab.load(study.without(r))) for r in ("never", "never-2", "retrain", "base")}
    assert len(hashes) == 4


def test_the_audit_catches_a_removal_that_removed_nothing(study):
    """A model that was told the codes: exposure at the ceiling, whatever a removal claims."""
    model, world = gpt(), study.world
    rows = W.encode([f"the code of {n} is {c}" for n, c, _ in world.secrets])
    from lifecycle_lib.train.logprobs import answer_loss
    from lifecycle_lib.train.loop import FitConfig, fit
    fit(model, lambda _: rows, answer_loss, FitConfig(steps=150, lr=1e-2))
    assert W.glance(model, world)["exposure"] > 11
    assert W.glance(gpt(), world)["exposure"] < 4


# ---- the design ----------------------------------------------------------------------------------------------

def test_one_seed_measures_every_key_of_the_design(study):
    row, made = design.measure(study.lab)
    for _, treatment, control, _ in design.D8.effects:
        assert treatment in row and (control is None or control in row)
    assert len({a.fingerprint for a in made}) == len(made)


def test_the_cost_of_notices_is_what_simulation_gives():
    r, months, parts, cost = np.random.default_rng(1), 24, 4, 3.0
    draws = []
    for _ in range(3000):
        hits = r.integers(0, parts, r.poisson(1.5 * months))
        when = r.integers(0, months, len(hits))
        draws.append(cost * len({*zip(when.tolist(), hits.tolist())}))
    want = design.notices(1.5, months, parts, cost)
    assert np.mean(draws) == pytest.approx(want, abs=4 * np.std(draws) / 3000**0.5)
    assert 1.5 * months * cost > want  # the variant that forgets to answer a month at once
    assert design.notices(0, months, parts, cost) == 0
    with pytest.raises(ValueError, match="rate=-1"):
        design.notices(-1, 24, 1, 1.0)


def test_equivalence_needs_every_measure():
    base = {f"{a}.{m}": 1.0 for a in ("never", "never-2", *ARMS) for m in design.MEASURES}
    rows = [base | {"ascent.exposure": 9.0 + s, "shards.facts": 0.9} for s in (0.0, 0.1, 0.2)]
    found = design.table(rows)
    assert found["equivalence"]["ascent"]["exposure"] == "refuted"
    assert "ascent" not in found["passes"] and "shards" not in found["passes"] and "retrain" in found["passes"]
