"""The bridge: exact conversion, folders that transformers loads, peft, TRL, and public checkpoints in every stage."""

import copy
import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lifecycle_lib.desk.cases import draw_cases
from lifecycle_lib.desk.world import SPECIAL_TOKENS as DESK_TOKENS
from lifecycle_lib.model import bridge
from lifecycle_lib.model.bridge import (
    SPECIAL_TOKENS,
    LifecycleForCausalLM,
    PublicModel,
    PublicTokenizer,
    export,
    from_llama,
    load_public,
    to_hf,
    to_llama,
)
from lifecycle_lib.model.gpt import GPT, GPTConfig
from lifecycle_lib.model.sampling import generate, left_pad
from lifecycle_lib.model.tokenizer import Tokenizer
from lifecycle_lib.train import dpo, grpo, loop, sft
from lifecycle_lib.train.logprobs import Rows, answer_loss

TOL = 1e-5
CASES = draw_cases(24, 0, "train")
ROWS = [{"prompt": c.prompt, "answer": c.answer} for c in CASES]
TEXTS = [c.prompt + c.answer for c in CASES]
SHIFTS = pytest.mark.parametrize("shift", [False, True], ids=["llama", "shift"])


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return Tokenizer.train(TEXTS, 360, DESK_TOKENS)


def make_model(shift: bool, seed: int = 0, vocab_size: int = 360) -> GPT:
    torch.manual_seed(seed)
    cfg = GPTConfig(vocab_size=vocab_size, block_size=128, n_layer=2, n_head=2, n_embd=32, token_shift=shift)
    model = GPT(cfg).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def ids(rows: int = 3, length: int = 20, high: int = 360) -> torch.Tensor:
    return torch.randint(8, high, (rows, length), generator=torch.Generator().manual_seed(0))


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().abs().max())


# ---------------------------------------------------------------- conversion

def test_the_layout_has_one_list_of_special_tokens():
    assert SPECIAL_TOKENS == DESK_TOKENS


@pytest.mark.parametrize("seed", range(3))
def test_llama_and_back_is_exact(seed):
    model = make_model(False, seed)
    llama = to_llama(model)
    assert gap(llama(ids()).logits, model(ids())) < TOL
    assert llama.lm_head.weight is llama.model.embed_tokens.weight
    again = from_llama(llama)
    assert again.cfg == model.cfg
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values()))


def test_number_of_parameters_by_hand():
    # 360*32 + 2 * (4*32^2 + 3*32*96 + 2*32) + 32; the shift adds 2*32. The head is the embedding.
    assert sum(p.numel() for p in to_llama(make_model(False)).parameters()) == 38_304
    assert sum(p.numel() for p in to_hf(make_model(True)).parameters()) == 38_304 + 64


def test_token_shift_is_no_llama():
    with pytest.raises(ValueError, match="LifecycleForCausalLM"):
        to_llama(make_model(True))


def test_swapped_tensors_are_caught(monkeypatch):
    renamed = bridge.to_llama.__globals__["RENAMED"]
    monkeypatch.setitem(renamed, "attn.wq", "self_attn.k_proj")
    monkeypatch.setitem(renamed, "attn.wk", "self_attn.q_proj")
    model = make_model(False)
    assert gap(to_llama(model)(ids()).logits, model(ids())) > 100 * TOL


@pytest.mark.parametrize("change, message", [
    ({"num_key_value_heads": 2}, "num_key_value_heads=2"), ({"tie_word_embeddings": False}, "tie_word_emb"),
    ({"attention_bias": True}, "attention_bias"), ({"head_dim": 16}, "head_dim"), ({"hidden_act": "gelu"}, "gelu"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_parameters")])
def test_from_llama_names_what_a_gpt_lacks(change, message):
    cfg = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
           "num_attention_heads": 4, "tie_word_embeddings": True}
    with pytest.raises(ValueError, match=message):
        from_llama(LlamaForCausalLM(LlamaConfig(**(cfg | change))))


# ---------------------------------------------------------------- our class inside transformers

@SHIFTS
def test_our_class_equals_the_gpt(shift):
    """Llama where exact, else our class: logits with and without pads, loss, gradients, logits_to_keep."""
    model = make_model(shift)
    hf = to_hf(model)
    assert isinstance(hf, LifecycleForCausalLM) == shift
    mask = torch.ones(3, 20, dtype=torch.long)
    mask[1, :7] = 0
    assert gap(hf(ids()).logits, model(ids())) < TOL
    assert gap(hf(ids(), attention_mask=mask).logits[mask == 1], model(ids(), mask.bool())[mask == 1]) < TOL
    assert gap(hf(ids(), logits_to_keep=4).logits, model(ids())[:, -4:]) < TOL
    labels = ids().clone()
    labels[:, :5] = -100
    loss = hf(ids(), labels=labels).loss
    want = torch.nn.functional.cross_entropy(model(ids())[:, 4:-1].flatten(0, 1), ids()[:, 5:].flatten())
    assert abs(loss.item() - want.item()) < TOL
    loss.backward()
    want.backward()
    assert gap(hf.get_input_embeddings().weight.grad, model.wte.weight.grad) < TOL
    theirs = {p.shape: p.grad for n, p in hf.named_parameters() if n.endswith(("0.attn.shift", "0.mlp.w_down.weight"))}
    ours = {p.shape: p.grad for n, p in model.named_parameters() if n.endswith(("0.attn.shift", "0.mlp.w_down.weight"))}
    assert bool(theirs) == shift and all(gap(theirs[k], ours[k]) < TOL for k in theirs)


def test_our_class_refuses_what_it_would_get_wrong():
    hf = to_hf(make_model(True))
    with pytest.raises(ValueError, match="packed rows"):
        hf(ids(1, 4), position_ids=torch.tensor([[0, 1, 0, 1]]))
    with pytest.raises(ValueError, match="no cache"):
        hf(ids(1, 4), past_key_values=object())


@SHIFTS
def test_left_padded_generate_equals_our_sampling(shift):
    model = make_model(shift)
    prompts = [[9, 10, 11], [12], [13, 14, 15, 16, 17]]
    padded, mask = left_pad(prompts, 0)
    out = to_hf(model).generate(input_ids=padded, attention_mask=mask.long(), max_new_tokens=10, do_sample=False,
                                eos_token_id=2, pad_token_id=0)[:, padded.shape[1]:].tolist()
    ours = generate(model, prompts, eos_id=2, pad_id=0, max_new_tokens=10, temperature=0.0).ids
    assert [row[:len(mine)] for row, mine in zip(out, ours)] == ours


# ---------------------------------------------------------------- export

@SHIFTS
def test_export_loads_in_transformers(tmp_path, tok, shift):
    model = make_model(shift)
    export(model, tok, tmp_path)
    hf, hf_tok = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert type(hf) is (LifecycleForCausalLM if shift else LlamaForCausalLM)
    assert gap(hf(ids()).logits, model(ids())) < TOL
    prompt, answer = CASES[0].prompt, CASES[0].answer
    assert hf_tok(prompt)["input_ids"] == tok.encode(prompt)
    ask = [{"role": "user", "content": prompt}]
    assert hf_tok.apply_chat_template(ask, tokenize=False, add_generation_prompt=True) == prompt
    told = hf_tok.apply_chat_template([*ask, {"role": "assistant", "content": answer}], tokenize=True,
                                      return_dict=True, return_assistant_tokens_mask=True)
    want = tok.encode(prompt), tok.encode(answer) + [tok.special["<eos>"]]
    assert told["input_ids"] == want[0] + want[1]
    assert told["assistant_masks"] == [0] * len(want[0]) + [1] * len(want[1])
    assert (hf_tok.padding_side, hf_tok.model_max_length) == ("left", 128)
    assert hf.generation_config.eos_token_id == tok.special["<eos>"] == hf.config.eos_token_id
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".jinja", *[".json"] * 4, ".safetensors"]
    back, _ = load_public(tmp_path)
    assert isinstance(back, GPT) and back.cfg == model.cfg and torch.equal(back(ids()), model(ids()))


def test_a_plain_export_names_nothing_of_ours(tmp_path, tok):
    """So that it loads where this library is not installed."""
    export(make_model(False), tok, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert "auto_map" not in config
    assert not any("lifecycle" in f.read_text().lower() for f in tmp_path.glob("*.j*"))


def test_export_refuses_a_larger_tokenizer(tmp_path, tok):
    with pytest.raises(ValueError, match="360 tokens, the model 300"):
        export(make_model(False, vocab_size=300), tok, tmp_path)


# ---------------------------------------------------------------- peft

@pytest.mark.parametrize("shift, targets", [(False, ["q_proj", "k_proj", "v_proj", "o_proj"]),
                                            (True, ["wq", "wk", "wv", "wo"])], ids=["llama", "shift"])
def test_peft_merged_equals_unmerged(shift, targets):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    hf = to_hf(make_model(shift))
    before = hf(ids()).logits.detach()
    lora = peft.get_peft_model(hf, peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    assert gap(lora(ids()).logits, before) < TOL  # B starts at 0
    lora.train()
    lora(input_ids=ids(), labels=ids()).loss.backward()
    trained = [p for p in lora.parameters() if p.requires_grad]
    assert len(trained) == 2 * 4 * 2 and all(p.grad is not None for p in trained)
    with torch.no_grad():
        for p in trained:
            p.add_(0.1 * torch.randn_like(p))
    lora.eval()
    adapted = lora(ids()).logits.detach()
    assert gap(adapted, before) > 100 * TOL
    assert gap(lora.merge_and_unload()(ids()).logits, adapted) < TOL


# ---------------------------------------------------------------- TRL: two steps of each trainer

def trl_args(cls, folder, **changes):
    common = {"output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True,
              "bf16": False, "report_to": "none", "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True,
              "learning_rate": 1e-2, "gradient_checkpointing": False}
    return cls(**(common | changes))


def conversation(key: str) -> list[dict]:
    return [{"role": "assistant", "content": key}]


def asked(case) -> list[dict]:
    return [{"role": "user", "content": case.prompt}]


@SHIFTS
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stage", ["sft", "dpo", "grpo"])
def test_trl_runs_two_steps(tmp_path, tok, shift, stage):
    trl = pytest.importorskip("trl", reason="trl is not installed: pip install '.[peers]'")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed: pip install '.[peers]'")
    export(make_model(shift), tok, tmp_path / "model")
    hf, hf_tok = (c.from_pretrained(tmp_path / "model") for c in (AutoModelForCausalLM, AutoTokenizer))
    start = copy.deepcopy(hf.state_dict())
    data = datasets.Dataset.from_list
    if stage == "sft":
        rows = [{"prompt": asked(c), "completion": conversation(c.answer)} for c in CASES]
        trainer = trl.SFTTrainer(hf, trl_args(trl.SFTConfig, tmp_path, max_length=128), train_dataset=data(rows),
                                 processing_class=hf_tok)
    elif stage == "dpo":
        rows = [{"prompt": asked(c), "chosen": conversation(c.answer), "rejected": conversation("no")} for c in CASES]
        trainer = trl.DPOTrainer(hf, args=trl_args(trl.DPOConfig, tmp_path, max_length=128), train_dataset=data(rows),
                                 processing_class=hf_tok)
    else:
        def reward(completions, **_):
            return [float(len(c[0]["content"]) % 7) for c in completions]
        args = trl_args(trl.GRPOConfig, tmp_path, num_generations=4, max_completion_length=8)
        rows = [{"prompt": asked(c)} for c in CASES]
        trainer = trl.GRPOTrainer(hf, reward, args, data(rows), processing_class=hf_tok)
    if stage == "sft":  # TRL's loss is ours: the same rows, the same targets, <eos> among them
        batch = next(iter(trainer.get_train_dataloader()))
        rows = Rows(batch["input_ids"], batch["labels"] != -100)
        assert all(row[m].tolist().count(tok.special["<eos>"]) == 1 for row, m in zip(rows.ids, rows.mask))
        theirs = trainer.compute_loss(trainer.model, batch)
        assert theirs.item() == pytest.approx(answer_loss(make_model(shift), rows)[0].item(), abs=TOL)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert trainer.state.global_step == 2 and len(losses) == 2 and all(map(math.isfinite, losses))
    if stage == "dpo":
        assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert any(not torch.equal(start[k].cpu(), v.cpu()) for k, v in hf.state_dict().items())


# ---------------------------------------------------------------- a public checkpoint as the base

def public_folder(folder, kind: str):
    """A tiny random public model with a tokenizer that has never heard of our special tokens."""
    torch.manual_seed(0)
    common = {"vocab_size": 330, "bos_token_id": 0, "eos_token_id": 0}
    if kind == "gpt2":
        hf = GPT2LMHeadModel(GPT2Config(n_positions=160, n_embd=32, n_layer=2, n_head=2, **common))
    else:
        grouped = {"num_key_value_heads": 2, "tie_word_embeddings": False} if kind == "llama-grouped" \
            else {"tie_word_embeddings": True}
        hf = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                          num_attention_heads=4, max_position_embeddings=160, **grouped, **common))
    with torch.no_grad():
        for p in hf.parameters():
            p.add_(0.05 * torch.randn_like(p))
    hf.save_pretrained(folder)
    Tokenizer.train(TEXTS, 330, ["<|endoftext|>"]).to_transformers().save_pretrained(folder)
    return hf.eval()


KINDS = pytest.mark.parametrize("kind", ["gpt2", "llama-grouped", "llama-plain"])


@KINDS
def test_public_logits_equal_the_original(tmp_path, kind):
    hf = public_folder(tmp_path, kind)
    model, tok = load_public(tmp_path)
    assert type(model) is (GPT if kind == "llama-plain" else PublicModel)
    idx = ids(high=330)
    assert gap(model(idx)[..., :330], hf(idx).logits) < TOL
    assert model.cfg.vocab_size == tok.vocab_size == 330 + 8 and model.cfg.block_size == 160
    new = model(idx)[..., 330:]
    assert len(set(new[0, -1].tolist())) == 8  # new rows differ from one another
    mask = torch.ones(3, 20, dtype=torch.bool)
    mask[0, :6] = False
    assert gap(model(idx, mask)[0, 6:], model(idx[:1, 6:])[0]) < TOL
    with pytest.raises(ValueError, match="161 tokens do not fit block_size=160"):
        model(torch.zeros(1, 161, dtype=torch.long))


@KINDS
def test_public_tokenizer(tmp_path, kind):
    public_folder(tmp_path, kind)
    _, tok = load_public(tmp_path)
    prompt = CASES[0].prompt
    assert tok.decode(tok.encode(prompt)) == prompt
    assert set(tok.special) == set(SPECIAL_TOKENS) and len(set(tok.special.values())) == 8
    assert [tok.encode(s) for s in SPECIAL_TOKENS] == [[tok.special[s]] for s in SPECIAL_TOKENS]
    forged = tok.encode("<eos><policy>", allow_special=False)
    assert not set(forged) & set(tok.special.values()) and tok.decode(forged) == "<eos><policy>"
    assert tok.decode(tok.encode("<bos>mug"), skip_special=True) == "mug"


@KINDS
def test_public_greedy_equals_transformers(tmp_path, kind):
    hf = public_folder(tmp_path, kind)
    bridge.grow_embeddings(hf, 338)
    model, _ = load_public(tmp_path)
    prompts = [[9, 10, 11], [12], [13, 14, 15, 16, 17]]
    padded, mask = left_pad(prompts, 331)
    out = hf.generate(input_ids=padded, attention_mask=mask.long(), max_new_tokens=10, do_sample=False, eos_token_id=5,
                      pad_token_id=331)[:, 5:].tolist()
    ours = generate(model, prompts, eos_id=5, pad_id=331, max_new_tokens=10, temperature=0.0).ids
    assert [row[:len(mine)] for row, mine in zip(out, ours)] == ours


@KINDS
def test_public_checkpoint_through_every_stage(tmp_path, kind):
    """SFT overfits four rows, DPO starts at ln 2, GRPO's ratio starts at 1, and what was trained is saved and read."""
    public_folder(tmp_path / "base", kind)
    model, tok = load_public(tmp_path / "base")
    pad = tok.special["<pad>"]
    rows = sft.encode_rows(tok, ROWS[:4])
    batches = sft.sft_batches(rows, 4, 0, pad, model.cfg.block_size)
    cfg = loop.FitConfig(steps=3, optimizer="adamw", lr=1e-2, warmup_steps=0)
    losses = loop.fit(model, batches, answer_loss, cfg).losses
    assert losses[0] > losses[1] > losses[2] and losses[0] < 2 * math.log(338)

    pairs = dpo.encode_pairs(tok, dpo.make_pairs(CASES[:8]))
    ref = dpo.reference_logps(model, pairs, pad)
    cfg = loop.FitConfig(steps=2, optimizer="adamw", lr=1e-3, warmup_steps=0)
    result = loop.fit(model, dpo.dpo_batches(pairs, ref, 8, 0, pad, model.device),
                      lambda m, b: dpo.pair_loss(m, b, 0.1), cfg)
    assert result.losses[0] == pytest.approx(math.log(2), abs=1e-5) and result.losses[1] < result.losses[0]

    def reward(texts, cases):
        return [float(len(t) % 5) for t in texts]
    rl = grpo.GRPOConfig(n_prompts=2, group_size=4, max_new_tokens=8, loss_type="grpo")
    cfg = loop.FitConfig(steps=1, optimizer="adamw", lr=1e-3)
    result = loop.fit(model, grpo.grpo_batches(model, tok, CASES, reward, rl, 0),
                      lambda m, b: grpo.rollout_loss(m, b, rl), cfg)
    assert abs(result.losses[0]) < TOL and result.history[0]["clip_share"] == 0 < result.history[0]["grad_norm"]

    export(model, tok, tmp_path / "out")
    again, tok2 = load_public(tmp_path / "out")
    assert tok2.special == tok.special and gap(again(ids(high=330)), model(ids(high=330))) < TOL
    args = {"eos_id": tok.special["<eos>"], "pad_id": pad, "max_new_tokens": 8, "temperature": 0.0}
    prompts = [tok.encode(c.prompt) for c in CASES[:3]]
    assert generate(again, prompts, **args).ids == generate(model, prompts, **args).ids


def test_dropout_is_off(tmp_path):
    """With dropout two passes of a training model differ, and a policy-gradient ratio is not 1 at the start."""
    public_folder(tmp_path, "gpt2")
    model, _ = load_public(tmp_path)
    plain = GPT2LMHeadModel.from_pretrained(tmp_path).train()
    assert gap(plain(ids(high=330)).logits, plain(ids(high=330)).logits) > 1e-3
    model.train()
    assert torch.equal(model(ids(high=330)), model(ids(high=330)))


def test_positions_that_count_pads_are_caught(tmp_path):
    public_folder(tmp_path, "gpt2")
    model, _ = load_public(tmp_path)
    model.takes_positions = False
    with pytest.raises(ValueError, match="left-padded logits are off"):
        model.check()


def test_a_head_that_is_not_linear_alone_is_caught(tmp_path, monkeypatch):
    public_folder(tmp_path, "gpt2")
    whole = PublicModel.head
    monkeypatch.setattr(PublicModel, "head", lambda self, h: 0.5 * whole(self, h))  # as if the model scaled its logits
    with pytest.raises(ValueError, match="plain logits are off"):
        load_public(tmp_path)


# ---------------------------------------------------------------- foreign folders

def test_folders_that_are_no_public_checkpoint(tmp_path, tok):
    with pytest.raises(ValueError, match="no config.json.*not a hub name"):
        load_public("openai-community/gpt2")
    export(make_model(False), tok, tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    whole, settings = weights.read_bytes(), json.loads(config.read_text())

    config.write_text(json.dumps({"format": "lifecycle-gpt-1", "model": {}}))
    with pytest.raises(ValueError, match="use load_checkpoint"):
        load_public(tmp_path)
    config.write_text(json.dumps(settings | {"model_type": "no-such-family"}))
    with pytest.raises(ValueError, match="cannot load it"):
        load_public(tmp_path)
    config.write_text(json.dumps(settings | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match="lacks 9 tensors"):
        load_public(tmp_path)
    config.write_text(json.dumps(settings))
    weights.write_bytes(whole[:-50])
    with pytest.raises(ValueError, match="save_pretrained"):
        load_public(tmp_path)
    weights.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickled weights are not read"):
        load_public(tmp_path)


def test_a_folder_without_tokenizer(tmp_path):
    to_llama(make_model(False)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tokenizer"):
        load_public(tmp_path)


def test_public_tokenizer_keeps_what_is_there(tok):
    wrapped = PublicTokenizer(tok.to_transformers())
    assert wrapped.special == tok.special and wrapped.vocab_size == tok.vocab_size
