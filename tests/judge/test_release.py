import dataclasses
import itertools
import json
import os
import random
import threading

import pytest

from lifecycle_lib.judge import release as rel
from lifecycle_lib.judge.gates import Check, GateDecision
from lifecycle_lib.judge.release import IllegalMove, Registry, Release


def ship(checkpoint, gate="gate-1", passed=True):
    check = Check("latency", 1, 2, passed, "")
    return GateDecision("SHIP" if passed else "BLOCK", () if passed else ("latency",), (check,), checkpoint, "e", gate)


@pytest.fixture
def desk(tmp_path):
    """A registry, and a maker of releases whose weights are small files."""
    ticks = itertools.count(1000)

    def make(name):
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(name.encode())
        return Release.of(name, f"ckpt-{name}", f"index-{name}", f"prompt-{name}", "gate-1", [path])

    return Registry(tmp_path / "registry", clock=lambda: float(next(ticks))), make


def go_full(registry, release):
    rid = registry.register(release)
    registry.promote(rid, ship(release.checkpoint))
    if registry.current() is not None:
        registry.drill(rid)
    registry.promote(rid)
    registry.promote(rid)
    return rid


def test_the_whole_way_by_hand(desk):
    registry, make = desk
    a, b = make("a"), make("b")
    assert registry.current() is None and registry.states() == {}
    ia = registry.register(a)
    assert registry.state(ia) == "candidate"
    assert registry.promote(ia, ship("ckpt-a")) == "shadow"
    assert registry.promote(ia) == "canary"  # the very first has no way back to test
    assert registry.current() is None  # a canary is not yet what is served
    assert registry.promote(ia) == "full" and registry.current() == a
    ib = registry.register(b)
    registry.promote(ib, ship("ckpt-b"))
    drill = registry.drill(ib, probe=lambda target: target == a)
    assert (drill.release_id, drill.target_id) == (ib, ia) and 0 < drill.seconds < 60
    assert registry.current() == a  # a rehearsal changes nothing
    assert [registry.promote(ib), registry.promote(ib)] == ["canary", "full"]
    assert registry.current() == b
    back = registry.rollback("tone complaints")
    assert (back.checkpoint, back.index, back.prompt, back.gate) == ("ckpt-a", "index-a", "prompt-a", "gate-1")
    assert registry.states() == {ia: "full", ib: "rolled_back"}
    assert [row["event"] for row in registry.history()] == [
        "candidate", "shadow", "canary", "full", "candidate", "shadow", "drill", "canary", "full", "rolled_back"]
    assert [row["at_s"] for row in registry.history()] == sorted(row["at_s"] for row in registry.history())


LEGAL = {("candidate", "shadow"), ("shadow", "canary"), ("canary", "full"),
         ("shadow", "rolled_back"), ("canary", "rolled_back"), ("full", "rolled_back")}


def test_the_moves_are_exactly_the_legal_ones():
    assert {(a, b) for a in rel.STATES for b in rel.MOVES[a]} == LEGAL


def test_every_illegal_history_is_refused(desk):
    """Write each pair of states as a history with valid hashes: only the legal moves are read back."""
    registry, make = desk
    rid = registry.register(make("a"))
    paths = {"candidate": [], "shadow": ["shadow"], "canary": ["shadow", "canary"],
             "full": ["shadow", "canary", "full"], "rolled_back": ["shadow", "rolled_back"]}
    for was, to in itertools.product(rel.STATES, repeat=2):
        rows, before = [], ""
        for seq, event in enumerate(["candidate", *paths[was], to], start=1):
            row = {"seq": seq, "event": event, "release_id": rid, "at_s": 1.0, "detail": {}, "before": before}
            before = rel.fingerprint(row)
            rows.append({**row, "fingerprint": before})
        rel.write_jsonl(registry.root / "history.jsonl", rows)
        rel.write_json(registry.root / "pointer.json", {"release_id": None, "head": before})
        if (was, to) in LEGAL:
            assert registry.state(rid) == to
        else:
            with pytest.raises(ValueError, match="not a legal move"):
                registry.state(rid)


def test_random_walks_keep_the_served_release_among_the_full_ones(desk):
    registry, make = desk
    rng = random.Random(0)
    ids, served_before = [], None
    for step in range(150):
        try:
            match rng.randrange(4):
                case 0 if len(ids) < 6:
                    ids.append(registry.register(make(f"r{step}")))
                case 1 if ids:
                    rid = rng.choice(ids)
                    registry.promote(rid, ship(registry.load(rid).checkpoint))
                case 2 if ids:
                    registry.drill(rng.choice(ids))
                case 3 if ids and rng.random() < 0.3:
                    registry.rollback("walk", rng.choice([None, *ids]))
        except IllegalMove:
            assert registry.current() == served_before  # a refused step changes nothing
        served_before = registry.current()
        states = registry.states()
        assert served_before is None or states[served_before.release_id] == "full"
        assert (served_before is None) == ("full" not in states.values())
    assert {row["event"] for row in registry.history()} == {*rel.STATES, "drill"}  # the walk went everywhere


# ---- preconditions

def test_only_a_ship_decision_on_this_checkpoint_and_gate_goes_on(desk):
    registry, make = desk
    rid = registry.register(make("a"))
    for decision in (None, "SHIP", ship("ckpt-a", passed=False), ship("ckpt-z"), ship("ckpt-a", gate="gate-0")):
        with pytest.raises(IllegalMove):
            registry.promote(rid, decision)
    assert registry.state(rid) == "candidate"
    registry.promote(rid, ship("ckpt-a"))
    with pytest.raises(IllegalMove, match="BLOCK"):
        registry.promote(rid, ship("ckpt-a", passed=False))  # a later block stops it as well


def test_promotion_needs_a_way_back_to_what_is_served_now(desk):
    registry, make = desk
    go_full(registry, make("a"))
    ib, ic = registry.register(make("b")), registry.register(make("c"))
    for rid, name in ((ib, "b"), (ic, "c")):
        with pytest.raises(IllegalMove, match="drill needs"):
            registry.drill(rid)  # still a candidate
        registry.promote(rid, ship(f"ckpt-{name}"))
        with pytest.raises(IllegalMove, match="no tested way back"):
            registry.promote(rid)
        registry.drill(rid)
        registry.promote(rid)
    registry.promote(ic)
    with pytest.raises(IllegalMove, match="'c'"):
        registry.promote(ib)  # its drill led back to a, but c is served now
    registry.drill(ib)
    assert registry.promote(ib) == "full"
    with pytest.raises(IllegalMove, match="no step up"):
        registry.promote(ib)


def test_a_failed_drill_is_not_a_drill(desk):
    registry, make = desk
    go_full(registry, make("a"))
    rid = registry.register(make("b"))
    registry.promote(rid, ship("ckpt-b"))
    with pytest.raises(ValueError, match="drill failed"):
        registry.drill(rid, probe=lambda target: False)
    with pytest.raises(IllegalMove, match="no tested way back"):
        registry.promote(rid)


def test_rollback_walks_back_and_stops_at_the_first(desk):
    registry, make = desk
    with pytest.raises(IllegalMove, match="nothing"):
        registry.rollback("x")
    for name in "abc":
        go_full(registry, make(name))
    assert [registry.rollback("x").name, registry.rollback("x").name] == ["b", "a"]
    with pytest.raises(IllegalMove, match="first release"):
        registry.rollback("x")
    with pytest.raises(ValueError, match="reason"):
        registry.rollback(" ")
    with pytest.raises(IllegalMove, match="not registered"):
        registry.rollback("x", "0" * 16)
    with pytest.raises(IllegalMove, match="already there as rolled_back"):
        registry.register(make("c"))


def test_withdrawing_a_canary_leaves_the_served_release(desk):
    registry, make = desk
    go_full(registry, make("a"))
    rid = registry.register(make("b"))
    with pytest.raises(IllegalMove, match="candidate"):
        registry.rollback("x", rid)
    registry.promote(rid, ship("ckpt-b"))
    assert registry.rollback("odd tone", rid).name == "a" and registry.state(rid) == "rolled_back"


# ---- damage

def test_changed_artifacts_are_never_promoted_nor_restored(desk, tmp_path):
    registry, make = desk
    go_full(registry, make("a"))
    go_full(registry, make("b"))
    third = registry.register(make("c"))
    (tmp_path / "c.safetensors").write_bytes(b"C")
    with pytest.raises(ValueError, match="c.safetensors"):
        registry.promote(third, ship("ckpt-c"))
    (tmp_path / "a.safetensors").write_bytes(b"A")
    with pytest.raises(ValueError, match="a.safetensors"):
        registry.rollback("x")
    assert registry.current().name == "b"
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(ValueError, match="a.safetensors"):
        registry.rollback("x")
    changed = make("d")
    (tmp_path / "d.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="d.safetensors"):
        registry.register(changed)


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"release_id": 3, "head": ""}', '{"head": "x"}'])
def test_damaged_pointer_is_named_and_rebuilt_from_the_history(desk, damage):
    registry, make = desk
    a = make("a")
    go_full(registry, a)
    pointer = registry.root / "pointer.json"
    pointer.write_text(damage)
    for call in (registry.current, registry.history):
        with pytest.raises(ValueError, match="pointer.json"):
            call()
    pointer.unlink()
    assert registry.repair() == a == registry.current()


def test_any_edit_of_the_history_is_caught(desk):
    registry, make = desk
    go_full(registry, make("a"))
    path = registry.root / "history.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    first = json.loads(lines[0])
    edits = {"cut tail": lines[:-1], "cut head": lines[1:], "cut middle": [lines[0], *lines[2:]],
             "swapped": [lines[1], lines[0], *lines[2:]], "torn": [*lines[:-1], lines[-1][:40]], "empty": [],
             "time": [json.dumps({**first, "at_s": 5.0}) + "\n", *lines[1:]]}
    for name, edited in edits.items():
        path.write_text("".join(edited))
        with pytest.raises(ValueError, match="history.jsonl"):
            registry.history()
        with pytest.raises(ValueError, match="history.jsonl"):
            registry.repair()  # damage is not an interruption: nothing is papered over
        assert registry.current().name == "a", name  # serving goes on
    path.unlink()
    with pytest.raises(ValueError, match="history.jsonl"):
        registry.states()


def test_changed_release_record_is_caught(desk):
    registry, make = desk
    rid = go_full(registry, make("a"))
    path = registry.root / "releases" / f"{rid}.json"
    record = json.loads(path.read_text())
    for bad in ({**record, "index": "other"}, {"name": "a"}):
        path.write_text(json.dumps(bad))
        with pytest.raises(ValueError, match=rid):
            registry.current()


def test_a_crash_between_history_and_pointer_serves_the_old_one_until_repaired(desk, monkeypatch):
    registry, make = desk
    a, b = make("a"), make("b")
    go_full(registry, a)
    rid = registry.register(b)
    registry.promote(rid, ship("ckpt-b"))
    registry.drill(rid)
    registry.promote(rid)

    def crash(rows):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(registry, "_point", crash)
        with pytest.raises(KeyboardInterrupt):
            registry.promote(rid)
    assert registry.current() == a
    with pytest.raises(ValueError, match="repair"):
        registry.promote(rid)
    assert registry.repair() == b == registry.current()


def read_while_swapping(registry, swaps):
    """Names seen by a reader in a loop while `swaps` runs; an exception of the reader is returned too."""
    seen, stop = [], threading.Event()

    def reader():
        while not stop.is_set():
            try:
                seen.append(registry.current().name)
            except (ValueError, OSError) as error:
                seen.append(error)
                return

    thread = threading.Thread(target=reader)
    thread.start()
    swaps()
    stop.set()
    thread.join()
    return seen


def test_a_reader_never_sees_half_a_swap(desk, monkeypatch):
    registry, make = desk
    rows = [go_full(registry, make(name)) and registry.history() for name in "ab"]
    registry._point(rows[1])
    original = (registry.root / "pointer.json").read_bytes()

    def swaps():
        for i in range(150):
            registry._point(rows[i % 2])

    seen = read_while_swapping(registry, swaps)
    assert set(seen) <= {"a", "b"} and seen

    def in_place(path, obj):  # broken: truncate, then write
        data = json.dumps(obj)
        with open(path, "w") as file:
            for letter in data:
                file.write(letter)
                file.flush()

    monkeypatch.setattr(rel, "write_json", in_place)
    half = read_while_swapping(registry, swaps)
    assert any(isinstance(item, ValueError) for item in half)
    (registry.root / "pointer.json").write_bytes(original)


def test_nothing_is_left_behind(desk):
    registry, make = desk
    go_full(registry, make("a"))
    go_full(registry, make("b"))
    names = sorted(os.listdir(registry.root))
    assert names == ["history.jsonl", "pointer.json", "releases"]


def test_a_release_pins_everything(tmp_path):
    path = tmp_path / "w"
    path.write_bytes(b"abc")
    release = Release.of("n", "c", "i", "p", "g", [path])
    # SHA-256 of "abc", FIPS 180-2 appendix B.1
    assert list(release.files.values()) == ["ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"]
    others = [dataclasses.replace(release, **{f: "other"}) for f in ("name", "checkpoint", "index", "prompt", "gate")]
    assert len({r.release_id for r in [release, *others]}) == 6
    for field in ("name", "checkpoint", "index", "prompt", "gate"):
        with pytest.raises(ValueError, match=field):
            dataclasses.replace(release, **{field: ""})
    for files in ({}, {"w": "abc"}, {"w": None}):
        with pytest.raises(ValueError, match="files"):
            dataclasses.replace(release, files=files)
    with pytest.raises(ValueError, match="gone"):
        Release.of("n", "c", "i", "p", "g", [tmp_path / "gone"])
