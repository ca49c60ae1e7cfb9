"""Our GPT as a transformers model: a plain Llama where that is exact, else a registered class of our own.

Without token shift a GPT is a Llama (Touvron et al. 2023) with a tied head, and `to_llama` / `from_llama` only rename
tensors. With token shift it is `LifecycleForCausalLM`, known to AutoConfig and AutoModelForCausalLM once this module
is imported.

Left out: `LifecycleForCausalLM` keeps no key-value cache (its `generate` recomputes; model/sampling is the fast way)
and takes no packed rows.
"""

from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from lifecycle_lib.model.gpt import GPT, GPTConfig, rope_tables

RENAMED = {"attn.wq": "self_attn.q_proj", "attn.wk": "self_attn.k_proj", "attn.wv": "self_attn.v_proj",
           "attn.wo": "self_attn.o_proj", "mlp.w_gate": "mlp.gate_proj", "mlp.w_up": "mlp.up_proj",
           "mlp.w_down": "mlp.down_proj", "norm1": "input_layernorm", "norm2": "post_attention_layernorm"}


# ---- a GPT without token shift is a Llama -----------------------------------------------------------------------

def llama_names(n_layer: int) -> dict[str, str]:
    """{name of a GPT tensor: name of the same tensor in LlamaForCausalLM}."""
    names = {"wte.weight": "model.embed_tokens.weight", "norm_f.weight": "model.norm.weight"}
    for i in range(n_layer):
        names |= {f"blocks.{i}.{a}.weight": f"model.layers.{i}.{b}.weight" for a, b in RENAMED.items()}
    return names


def to_llama(model: GPT) -> LlamaForCausalLM:
    """The same network as a LlamaForCausalLM, weights copied. Raises ValueError for a model with token shift."""
    c = model.cfg
    if c.token_shift:
        raise ValueError("token_shift=True has no Llama equivalent; use to_hf(model), a LifecycleForCausalLM, "
                         "or make the model with token_shift=False")
    cfg = LlamaConfig(vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.n_hidden,
                      num_hidden_layers=c.n_layer, num_attention_heads=c.n_head, rms_norm_eps=c.norm_eps,
                      max_position_embeddings=c.block_size, tie_word_embeddings=True, use_cache=True,
                      rope_parameters={"rope_type": "default", "rope_theta": c.rope_base},
                      pad_token_id=None, bos_token_id=None, eos_token_id=None)
    llama = LlamaForCausalLM(cfg)
    ours, names = model.state_dict(), llama_names(c.n_layer)
    llama.load_state_dict({theirs: ours[name] for name, theirs in names.items()}, strict=False)  # the head is tied
    return llama.to(model.device).eval()


def llama_obstacles(cfg: PreTrainedConfig) -> list[str]:
    """Why a config is not exactly a GPT without token shift; empty when it is."""
    if cfg.model_type != "llama":
        return [f"model_type={cfg.model_type!r}"]
    wanted = {"num_key_value_heads": cfg.num_attention_heads, "head_dim": cfg.hidden_size // cfg.num_attention_heads,
              "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}
    found = [f"{k}={getattr(cfg, k)} (needs {v})" for k, v in wanted.items() if getattr(cfg, k) != v]
    rope = cfg.rope_parameters
    if rope["rope_type"] != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        found.append(f"rope_parameters={rope} (needs rope_type 'default', whole heads)")
    return found


def from_llama(llama: LlamaForCausalLM) -> GPT:
    """The same network as a GPT, weights copied. Raises ValueError naming what a GPT does not have."""
    c = llama.config
    if wrong := llama_obstacles(c):
        raise ValueError(f"not exactly a GPT: {', '.join(wrong)}; use load_public, which wraps such a model")
    model = GPT(GPTConfig(vocab_size=c.vocab_size, block_size=c.max_position_embeddings, n_layer=c.num_hidden_layers,
                          n_head=c.num_attention_heads, n_embd=c.hidden_size, n_hidden=c.intermediate_size,
                          token_shift=False, rope_base=c.rope_parameters["rope_theta"], norm_eps=c.rms_norm_eps))
    theirs = llama.state_dict()
    model.load_state_dict({name: theirs[other] for name, other in llama_names(c.num_hidden_layers).items()})
    return model.to(llama.device).eval()


# ---- our own class inside transformers --------------------------------------------------------------------------

class LifecycleConfig(PreTrainedConfig):
    """GPTConfig in transformers' clothes."""

    model_type = "lifecycle_gpt"
    auto_map = {}  # no code travels with the weights; TRL reads this name
    attribute_map = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
                     "max_position_embeddings": "block_size", "intermediate_size": "n_hidden"}
    vocab_size: int = 640
    block_size: int = 128
    n_layer: int = 3
    n_head: int = 4
    n_embd: int = 128
    n_hidden: int = 0
    token_shift: bool = True
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    use_cache: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    def gpt(self) -> GPTConfig:
        return GPTConfig(**{name: getattr(self, name) for name in GPTConfig.__slots__})


class LifecycleModel(PreTrainedModel):
    """The GPT without its head, under the names that transformers and TRL call."""

    config_class = LifecycleConfig
    base_model_prefix = "model"
    _no_split_modules = ["Block"]

    def __init__(self, config: LifecycleConfig) -> None:
        super().__init__(config)
        self.gpt = GPT(config.gpt())
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, GPT):  # from_pretrained makes modules without memory; the tables are in no file
            for buffer, table in zip((module.cos, module.sin), rope_tables(module.cfg)):
                buffer.copy_(table)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.gpt.wte

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.gpt.wte = value

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
                past_key_values=None, **kwargs) -> BaseModelOutput:
        """Features (B, T, C). Raises ValueError for a cache and for packed rows (positions that start again)."""
        if past_key_values is not None:
            raise ValueError("LifecycleForCausalLM keeps no cache; pass use_cache=False, or decode with model/sampling")
        if position_ids is not None and position_ids.shape[-1] > 1 and bool((position_ids.diff(dim=-1) < 0).any()):
            raise ValueError("packed rows (position_ids that start again) are not supported; pad the rows instead")
        mask = None if attention_mask is None else attention_mask.bool()
        return BaseModelOutput(last_hidden_state=self.gpt.hidden(input_ids, mask))


class LifecycleForCausalLM(PreTrainedModel, GenerationMixin):
    """A GPT, token shift included, that transformers, peft and TRL can drive."""

    config_class = LifecycleConfig
    base_model_prefix = "model"
    _tied_weights_keys = {"lm_head.weight": "model.gpt.wte.weight"}
    _no_split_modules = ["Block"]

    def __init__(self, config: LifecycleConfig) -> None:
        super().__init__(config)
        self.model = LifecycleModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: GPT has drawn its weights when it was made, and the head is tied."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def prepare_inputs_for_generation(self, input_ids: Tensor, attention_mask: Tensor | None = None,
                                      **kwargs) -> dict:
        return {"input_ids": input_ids, "attention_mask": attention_mask}  # the whole row: there is no cache

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None,
                logits_to_keep: int | Tensor = 0, position_ids: Tensor | None = None, past_key_values=None,
                **kwargs) -> CausalLMOutput:
        """Logits (B, T, V), or of the last / the given positions, and the mean loss when there are labels."""
        h = self.model(input_ids, attention_mask, position_ids, past_key_values).last_hidden_state
        if isinstance(logits_to_keep, Tensor):
            h = h[:, logits_to_keep]
        elif logits_to_keep:
            h = h[:, -logits_to_keep:]
        logits = self.lm_head(h)
        loss = None
        if labels is not None:
            count = {k: v for k, v in kwargs.items() if k == "num_items_in_batch"}
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **count)
        return CausalLMOutput(loss=loss, logits=logits)


AutoConfig.register(LifecycleConfig.model_type, LifecycleConfig, exist_ok=True)
AutoModelForCausalLM.register(LifecycleConfig, LifecycleForCausalLM, exist_ok=True)


def to_hf(model: GPT) -> LlamaForCausalLM | LifecycleForCausalLM:
    """The model for transformers, weights copied: a plain Llama where that is exact, else our own class."""
    if not model.cfg.token_shift:
        return to_llama(model)
    hf = LifecycleForCausalLM(LifecycleConfig(**model.cfg.as_dict()))
    hf.model.gpt.load_state_dict(model.state_dict())
    return hf.to(model.device).eval()
