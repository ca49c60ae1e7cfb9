"""The command line, in the smoke profile: a run, its reports, bad input, interruption, damage, the user's own text."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from lifecycle_lib.core.stats import wilson
from lifecycle_lib.core.store import Store
from lifecycle_lib.corpus import gate
from lifecycle_lib.judge.evals import frozen_cases
from lifecycle_lib.judge.gates import GateConfig
from lifecycle_lib.judge.release import Registry
from lifecycle_lib.lab import cli, profiles, release_run
from lifecycle_lib.lab.profiles import smoke
from lifecycle_lib.lab.stages import STAGES, Lab

RATES = ("json_validity", "policy_id", "evidence", "eligibility", "exact_pass", "invented_claim_rate", "refusal",
         "over_refusal")
ENV = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
COMMAND = [sys.executable, "-m", "lifecycle_lib.lab.cli"]


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("LIFECYCLE_QUIET", "1")
    monkeypatch.delenv("LIFECYCLE_DEBUG", raising=False)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A store in which the smoke profile has run once."""
    os.environ["LIFECYCLE_QUIET"] = "1"
    store = tmp_path_factory.mktemp("run") / "store"
    assert cli.main(["run", "--profile", "smoke", "--store", str(store)]) == 0
    return store


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def fingerprints(store: Path) -> dict[tuple[str, str], str]:
    """Hash of every weight file of a store, by artifact."""
    return {(a.name, a.fingerprint): a.card["files"]["model.safetensors"]["sha256"] for a in Store(store).list()
            if "model.safetensors" in a.card["files"]}


def read(capsys, *argv: str) -> dict:
    capsys.readouterr()
    assert cli.main([*argv]) == 0
    return json.loads(capsys.readouterr().out)


# ---- run and report ----------------------------------------------------------------------------------------

def test_json_report_has_the_agreed_shape(ran, capsys):
    report = read(capsys, "report", "--json", "--store", str(ran))
    assert list(report) == ["stages", "gate", "release", "seconds", "peak_memory_bytes", "profile", "seed", "device",
                            "run"]
    assert [s["name"] for s in report["stages"]] == ["base", "sft", "dpo", "rlvr", "int8", "int4"] == list(STAGES)
    assert (report["profile"], report["seed"]) == ("smoke", 0)
    for stage in report["stages"]:
        assert stage["n_cases"] == smoke().n_eval == stage["greedy"]["n_cases"]
        for key in RATES:
            for part in (stage, stage["greedy"]):
                assert 0 <= part[f"{key}_low"] <= part[key] <= part[f"{key}_high"] <= 1
        assert stage["exact_pass_high"] == wilson(round(stage["exact_pass"] * 48), 48)[1]
        assert sum(part["n"] for part in stage["slices"].values()) == stage["n_cases"]
        for key in ("weight_bytes", "tokens_per_s", "seconds", "cpu_s", "peak_memory_bytes", "p95_ms"):
            assert stage[key] > 0, key
        assert [one["slice"] for one in stage["samples"]] == ["plain", "boundary", "no_policy"]
        assert len(stage["fingerprint"]) == 16
    by_name = {s["name"]: s for s in report["stages"]}
    assert by_name["int4"]["weight_bytes"] < by_name["int8"]["weight_bytes"] < by_name["rlvr"]["weight_bytes"] / 3
    assert report["seconds"] >= sum(s["seconds"] for s in report["stages"])


def test_a_model_that_learnt_nothing_is_blocked(ran, capsys):
    report = read(capsys, "report", "--json", "--store", str(ran))
    assert report["gate"]["decision"] == "BLOCK" and report["gate"]["reasons"]
    assert [one["candidate"] for one in report["gate"]["considered"]] == ["int4", "int8"]  # smallest first
    assert report["gate"]["must_block"]["candidate"] == "sft"
    assert report["release"]["state"] == "none" and report["release"]["lineage"] == []
    assert not (ran / "releases").exists()


def test_samples_are_the_first_frozen_case_of_each_slice(ran, capsys):
    shown = read(capsys, "report", "--json", "--store", str(ran))["stages"][0]["samples"]
    frozen = frozen_cases(48)
    for one in shown:
        first = next(c for c in frozen if c.slice == one["slice"])
        assert (one["case_id"], one["prompt"], one["expected"]) == (first.case_id, first.prompt, first.answer)
        assert one["verdict"].startswith("wrong: ") or one["answer"] == first.answer


def test_second_run_changes_no_artifact_and_is_quick(ran, capsys):
    before, start = snapshot(ran), time.process_time()
    assert cli.main(["run", "--profile", "smoke", "--store", str(ran)]) == 0
    assert time.process_time() - start < 10
    out = capsys.readouterr().out
    assert out.count("from the store") == 6 and "report.html" in out
    changed = {path for path, stamp in snapshot(ran).items() if before.get(path) != stamp}
    assert {Path(path).name for path in changed} == {"report.json", "report.txt", "report.html"}


def test_report_list_and_lineage(ran, capsys):
    assert cli.main(["report", "--store", str(ran), "--profile", "smoke", "--seed", "0"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("LIFECYCLE smoke") and (ran / "reports/smoke-seed0/report.txt").read_text() in out
    assert cli.main(["list", "--store", str(ran)]) == 0
    listed = capsys.readouterr().out
    assert listed.count("eval ") == 12 and all(name in listed for name in STAGES)
    fp = read(capsys, "report", "--json", "--store", str(ran))["stages"][-1]["fingerprint"]
    assert cli.main(["lineage", fp[:10], "--store", str(ran)]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["tokenizer", "base", "sft", "dpo", "rlvr", "int4"]


def test_report_starts_without_torch(ran):
    code = ("import sys; from lifecycle_lib.lab.cli import main; main(['report', '--store', sys.argv[1]]); "
            "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules")
    subprocess.run([sys.executable, "-c", code, str(ran)], check=True, env=ENV, stdout=subprocess.DEVNULL)


# ---- a release, under a gate that lets everything pass -------------------------------------------------------

def test_shipping_releases_the_smallest_once(ran, tmp_path):
    open_gate = GateConfig(min_cases=40, min_slice_cases=1, min_json_validity=0, max_invented_claim_rate=1,
                           max_drop_exact=1, max_slice_drop=1, max_p95_ms=1e9)
    lab = Lab(replace(smoke(), gate=open_gate), device="cpu", store=Store(ran))
    try:
        said: list[str] = []
        first = release_run.run(lab, say=said.append)
        registry = Registry(ran / "releases")
        history = registry.history()
        assert [row["event"] for row in history] == ["candidate", "shadow", "canary", "full"]
        assert first["gate"]["decision"] == "SHIP" and first["gate"]["candidate"] == "int4"
        assert first["release"]["name"] == "int4-smoke-seed0" == registry.current().name
        assert first["release"]["fingerprint"] == first["stages"][-1]["fingerprint"] == registry.current().checkpoint
        assert [a["name"] for a in first["release"]["lineage"]][-1] == "int4"
        assert first["gate"]["must_block"]["decision"] == "SHIP"  # this gate is broken, and the report says so
        assert "Warning" in (ran / "reports/smoke-seed0/report.txt").read_text()
        assert release_run.run(lab, say=said.append)["release"] == first["release"]
        assert registry.history() == history
    finally:
        assert cli.main(["run", "--profile", "smoke", "--store", str(ran)]) == 0  # the other tests' report again


def test_candidates_are_tried_from_the_smallest():
    """By hand: int4 breaks JSON, int8 does not, so int8 ships; and sft is stopped by its invented claims."""
    def report(name: str, valid: int, claims: int) -> dict:
        rows = [{"case_id": f"c{i}", "slice": "plain", "valid": i < valid, "policy_id_ok": i < valid,
                 "evidence_ok": i < valid, "eligible_ok": i < valid, "exact": claims <= i < valid, "claim": i < claims,
                 "refusal_expected": False, "refused": False} for i in range(400)]
        return {"name": name, "n_cases": 400, "cases": rows, "weight_bytes": 100, "p95_ms": 9.0,
                "eval_fingerprint": "e", "checkpoint_fingerprint": name}

    lab = Lab(smoke(), device="cpu")
    reports = {"rlvr": report("rlvr", 400, 0), "int4": report("int4", 300, 0), "int8": report("int8", 400, 0),
               "sft": report("sft", 400, 100)}
    gate, decision = release_run.judge(lab, reports)
    assert (gate["decision"], gate["candidate"]) == ("SHIP", "int8") and decision.checkpoint_fingerprint == "int8"
    assert [(one["candidate"], one["decision"]) for one in gate["considered"]] == [("int4", "BLOCK"), ("int8", "SHIP")]
    assert "invalid JSON" in gate["considered"][0]["reasons"]
    assert gate["must_block"]["decision"] == "BLOCK" and "invented claims" in gate["must_block"]["reasons"]
    broken, _ = release_run.judge(lab, reports | {"sft": report("sft", 400, 0)})
    assert broken["must_block"]["decision"] == "SHIP"  # without its claims sft would pass: they are what blocks it


@pytest.mark.parametrize(("flags", "words"), [
    ({"exact": True}, "right"), ({"claim": True}, "wrong: invents a side effect"),
    ({"valid": False}, "wrong: not the agreed JSON"), ({"policy_id_ok": False}, "wrong: policy"),
    ({"evidence_ok": False}, "wrong: evidence"), ({"eligible_ok": False}, "wrong: decision"),
    ({}, "wrong: not as agreed to the character")])
def test_verdicts_in_words(flags, words):
    good = dict.fromkeys(("valid", "policy_id_ok", "evidence_ok", "eligible_ok"), True)
    row = good | {"exact": False, "claim": False}
    assert release_run.verdict(row | flags) == words


# ---- bad input -----------------------------------------------------------------------------------------------

def files(folder: Path) -> dict[str, str]:
    (folder / "empty.txt").write_text(" \n")
    (folder / "binary.txt").write_bytes(b"text\n\0\1\2" * 500)
    (folder / "latin.txt").write_bytes("schön\n".encode("latin-1") * 500)
    (folder / "short.txt").write_text("too short\n" * 3)
    (folder / "cut.jsonl").write_text('{"trace_id": "t1", "symptom": "stale policy"}\n{"trace_id": "t2", "sym')
    (folder / "other.jsonl").write_text('{"trace_id": "t1"}\n')
    (folder / "folder").mkdir()
    return {name: str(folder / name) for name in (*(p.name for p in folder.iterdir()), "missing.txt")}


BAD = {
    "profile": (["run", "--profile", "huge"], "smoke, laptop, gpu"),
    "device": (["run", "--device", "tpu"], "cpu, cuda, mps"),
    "seed": (["run", "--seed", "one"], "invalid int value: 'one'"),
    "negative seed": (["run", "--seed", "-1"], "give 0 or more"),
    "option": (["run", "--prof", "smoke"], "--prof"),
    "command": (["runn"], "invalid choice: 'runn'"),
    "no command": ([], "COMMAND"),
    "missing corpus": (["run", "--profile", "smoke", "--corpus", "{missing.txt}"], "no such file"),
    "empty corpus": (["run", "--profile", "smoke", "--corpus", "{empty.txt}"], "is empty"),
    "binary corpus": (["run", "--profile", "smoke", "--corpus", "{binary.txt}"], "binary.txt:2: a zero byte"),
    "latin corpus": (["run", "--profile", "smoke", "--corpus", "{latin.txt}"], "latin.txt:1: byte 0xf6 is not UTF-8"),
    "short corpus": (["run", "--profile", "smoke", "--corpus", "{short.txt}"], "at least 1000 bytes"),
    "folder as corpus": (["run", "--profile", "smoke", "--corpus", "{folder}"], "no such file"),
    "base": (["run", "--profile", "smoke", "--base", "{folder}"], "no config.json"),
    "report": (["report", "--profile", "gpu"], "lifecycle run --profile gpu"),
    "lineage": (["lineage", "0000000000000000"], "matches nothing"),
    "cut traces": (["route", "{cut.jsonl}"], "cut.jsonl:2: not valid JSON"),
    "other traces": (["route", "{other.jsonl}"], "other.jsonl:1: field 'symptom' is missing"),
    "other evaluation": (["verify-eval", "{other.jsonl}"], "other.jsonl:1: field 'case_id' is missing"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_changes_nothing(name, ran, tmp_path, capsys):
    argv, words = BAD[name]
    paths = files(tmp_path)
    argv = [paths[a[1:-1]] if a.startswith("{") else a for a in argv]
    if argv and argv[0] in ("run", "report", "lineage"):
        argv += ["--store", str(ran)]
    before = snapshot(ran)
    capsys.readouterr()
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("lifecycle: ") and err.count("\n") == 1 and words in err, err
    assert snapshot(ran) == before


def test_no_store_is_made_by_looking_or_by_bad_input(tmp_path, capsys):
    store = tmp_path / "none"
    for argv in (["run", "--profile", "huge"], ["report"], ["list"], ["lineage", "ab"]):
        assert cli.main([*argv, "--store", str(store)]) == 2
    assert not store.exists() and capsys.readouterr().err.count("lifecycle run") == 3
    (tmp_path / "file").write_text("x")
    assert cli.main(["run", "--profile", "smoke", "--store", str(tmp_path / "file")]) == 2


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("LIFECYCLE_DEBUG", "1")
    with pytest.raises(ValueError, match="huge"):
        cli.main(["run", "--profile", "huge"])


def test_ctrl_c_says_how_to_go_on(monkeypatch, capsys):
    def stop(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(release_run, "run", stop)
    assert cli.main(["run", "--profile", "smoke"]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    monkeypatch.setattr(gate, "run_gate", stop)  # keeps nothing of a stopped run
    assert cli.main(["data", "gate", "x.jsonl", "--out", "y"]) == 130
    assert "the same command starts over" in capsys.readouterr().err


def test_good_traces_and_evaluation_files(tmp_path, capsys):
    traces, frozen = tmp_path / "traces.jsonl", tmp_path / "eval.jsonl"
    traces.write_text('{"trace_id": "t1", "symptom": "slow first token", "ttft_ms": 900, "ttft_limit_ms": 200}\n')
    assert cli.main(["route", str(traces)]) == 0
    assert capsys.readouterr().out.startswith("1: inference serving -> profile queue and KV-cache pressure (measured;")
    rows = [json.dumps(c.as_row()) for c in frozen_cases()]
    frozen.write_text("\n".join(rows) + "\n")
    assert cli.main(["verify-eval", str(frozen)]) == 0 and "512 rows" in capsys.readouterr().out
    frozen.write_text("\n".join([*rows[:9], rows[9].replace("order>A", "order>B"), *rows[10:]]))
    assert cli.main(["verify-eval", str(frozen)]) == 2 and "eval.jsonl:10" in capsys.readouterr().err


# ---- interruption and damage ---------------------------------------------------------------------------------

def test_killed_runs_end_with_the_same_weights(ran, tmp_path):
    """SIGKILL as soon as each of two stages has begun, then once to the end."""
    store = tmp_path / "store"
    argv = [*COMMAND, "run", "--profile", "smoke", "--store", str(store)]
    for stage in ("base", "rlvr"):
        process = subprocess.Popen(argv, env=ENV | {"LIFECYCLE_QUIET": "1"}, stdout=subprocess.DEVNULL)
        limit = time.monotonic() + 60
        while not list(store.glob(f"partial/{stage}-*/resume*")) and process.poll() is None:
            assert time.monotonic() < limit
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL and not list(store.glob(f"{stage}-*"))
    assert cli.main(["run", "--profile", "smoke", "--store", str(store)]) == 0
    assert fingerprints(store) == fingerprints(ran) and len(fingerprints(store)) == len(STAGES)


def test_truncated_artifact_is_rebuilt_with_a_message(ran, capsys):
    before = fingerprints(ran)
    weights = next(ran.glob("dpo-*/model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    assert cli.main(["run", "--profile", "smoke", "--store", str(ran)]) == 0
    assert "is damaged" in (err := capsys.readouterr().err) and "rebuilding" in err
    assert fingerprints(ran) == before


# ---- the user's own text -------------------------------------------------------------------------------------

@pytest.fixture
def few_cases(monkeypatch):
    """The smoke profile with a sixth of the evaluation: too few cases for the gate, which then refuses to judge."""
    monkeypatch.setitem(profiles.PROFILES, "smoke", lambda: replace(smoke(), n_eval=8))


def check_corpus_run(path: Path, store: Path, capsys) -> dict:
    assert cli.main(["run", "--profile", "smoke", "--store", str(store), "--corpus", str(path)]) == 0
    assert "own text" in capsys.readouterr().out
    own = read(capsys, "report", "--json", "--store", str(store))["stages"][0]["corpus"]
    assert 0 < own["held_out_loss"] < own["held_out_loss_before"] < math.log(640) + 1
    assert own["held_out_bytes"] > 0 and own["nats_per_byte"] > 0
    gate = read(capsys, "report", "--json", "--store", str(store))["gate"]
    assert gate["decision"] == "BLOCK" and gate["reasons"][0].startswith("evidence refused: ") and gate["checks"] == []
    return own


def test_own_text_reports_held_out_loss(few_cases, tmp_path, capsys):
    path = tmp_path / "mine.txt"
    path.write_text("".join(f"line {i}: the ferry to the island leaves at {i % 24} o'clock\n" for i in range(400)))
    own = check_corpus_run(path, tmp_path / "store", capsys)
    assert own["held_out_bytes"] == sum(len(line) for line in path.read_text().splitlines()[9::10])


def test_real_support_messages(few_cases, real_data, tmp_path, capsys):
    path = next((p for p in (real_data / "support/banking77_train.csv", real_data / "banking77_train.csv")
                 if p.is_file()), None)
    if path is None:
        pytest.skip(f"no banking77_train.csv in {real_data}")
    check_corpus_run(path, tmp_path / "store", capsys)


# ---- a public checkpoint -------------------------------------------------------------------------------------

def public_folder(folder: Path, kind: str):
    """A tiny random public model of this kind, with a tokenizer that has never heard of our tags."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    from lifecycle_lib.model.tokenizer import Tokenizer

    torch.manual_seed(0)
    tok = Tokenizer.train([c.prompt + c.answer for c in frozen_cases(40)], 400, ["<|endoftext|>"])
    ids = {"vocab_size": tok.vocab_size, "bos_token_id": 0, "eos_token_id": 0}
    hf = (GPT2LMHeadModel(GPT2Config(n_positions=256, n_embd=32, n_layer=1, n_head=2, **ids)) if kind == "gpt2" else
          LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                                       max_position_embeddings=256, tie_word_embeddings=True, **ids)))
    hf.save_pretrained(folder)
    tok.to_transformers().save_pretrained(folder)
    return hf.eval()


def test_a_public_checkpoint_carries_every_stage(few_cases, tmp_path, capsys):
    folder, store = tmp_path / "tiny-gpt2", tmp_path / "store"
    hf = public_folder(folder, "gpt2")
    argv = ["run", "--profile", "smoke", "--store", str(store), "--base", str(folder)]
    assert cli.main(argv) == 0
    report = read(capsys, "report", "--json", "--store", str(store))
    base = report["stages"][0]
    assert base["public"] == "tiny-gpt2" and [s["name"] for s in report["stages"]] == list(STAGES)
    assert "starting from tiny-gpt2" in next((store / "reports").glob("smoke-seed0-*/report.txt")).read_text()
    assert base["n_params"] == sum(p.numel() for p in hf.parameters()) + 8 * 32  # our eight tags
    assert 5 < base["held_out_loss"] < 8  # a random model over about 400 tokens: log 400 = 6.0
    assert report["stages"][1]["fingerprint"] != base["fingerprint"]
    assert report["stages"][4]["weight_bytes"] < report["stages"][3]["weight_bytes"]
    assert cli.main(argv) == 0 and capsys.readouterr().out.count("from the store") == 6
    assert cli.main([*argv, "--corpus", str(folder / "config.json")]) == 2


def test_a_tied_llama_becomes_a_gpt_and_stays_the_same_function(tmp_path):
    import torch

    from lifecycle_lib.model.gpt import GPT

    hf = public_folder(tmp_path / "tiny-llama", "llama")
    lab = Lab(smoke(), device="cpu", store=Store(tmp_path / "store"), base_folder=tmp_path / "tiny-llama")
    tok, base = lab.load_tokenizer(), lab.load(lab.base())
    ids = torch.tensor([tok.encode(frozen_cases(1)[0].prompt.replace("<", ""))])
    with torch.no_grad():
        ours, theirs = base(ids)[..., :hf.config.vocab_size], hf(ids).logits
    assert isinstance(base, GPT) and torch.allclose(ours, theirs, atol=1e-5)
    assert not torch.allclose(lab.load(lab.sft())(ids)[..., :hf.config.vocab_size], theirs, atol=1e-5)  # it learnt
    with pytest.raises(ValueError, match="one of the two"):
        Lab(smoke(), store=lab.store, base_folder="a", corpus="b")
