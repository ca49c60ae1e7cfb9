"""A small GPT in the Llama layout, with one optional extra: token shift.

Decoder-only transformer (Vaswani et al. 2017) with pre-norm RMSNorm (Zhang & Sennrich 2019),
rotary positions (Su et al. 2021), SwiGLU (Shazeer 2020) and a head tied to the embedding.
With `token_shift=False` it is exactly transformers' Llama of the same shape.

Token shift (after RWKV, Peng et al. 2023) adds a learned share of the previous token's
features before the attention projections:  x_t <- x_t + s * x_(t-1),  one vector s a layer.
A key then knows its left neighbour at once, so an induction circuit needs one layer, not two.

Left out: dropout, biases, grouped-query attention, weight decay groups.

Shapes: B rows, T tokens, C = n_embd, H = n_head, D = C / H, V = vocab_size.
"""

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class GPTConfig:
    """Shape of the network. `n_hidden` is the width of the SwiGLU layer (default about 8/3 of n_embd)."""

    vocab_size: int
    block_size: int = 128
    n_layer: int = 3
    n_head: int = 4
    n_embd: int = 128
    n_hidden: int = 0
    token_shift: bool = True
    rope_base: float = 10000.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.n_embd % self.n_head or (self.n_embd // self.n_head) % 2:
            raise ValueError(f"n_embd={self.n_embd} must split into n_head={self.n_head} heads of even width; "
                             f"try n_embd={2 * self.n_head * max(1, round(self.n_embd / 2 / self.n_head))}")
        if self.n_hidden < 0:
            raise ValueError(f"n_hidden={self.n_hidden} must be 0 (choose for me) or positive")
        if self.n_hidden == 0:
            object.__setattr__(self, "n_hidden", 32 * max(1, round(8 * self.n_embd / 3 / 32 + 0.4)))

    def as_dict(self) -> dict:
        return asdict(self)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, over the last dimension."""

    def __init__(self, n_embd: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(n_embd)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def rope_tables(cfg: GPTConfig) -> tuple[Tensor, Tensor]:
    """cos and sin of position * base^(-2i/D), each (block_size, D): both halves of D hold the same angles."""
    d = cfg.n_embd // cfg.n_head
    inv_freq = cfg.rope_base ** (-torch.arange(0, d, 2, dtype=torch.float32) / d)
    angle = torch.outer(torch.arange(cfg.block_size, dtype=torch.float32), inv_freq).repeat(1, 2)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: turn the pair (x_i, x_(i+D/2)) by the angle of its position. x (B, H, T, D)."""
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-x2, x1), dim=-1) * sin


class Cache:
    """Keys, values and the last shifted input of every layer, for token-by-token decoding.

    Holds at most `size` tokens; `length` are filled. `select(rows)` keeps or repeats rows."""

    def __init__(self, cfg: GPTConfig, batch: int, size: int, like: Tensor) -> None:
        d = cfg.n_embd // cfg.n_head
        self.k = [like.new_zeros(batch, cfg.n_head, size, d) for _ in range(cfg.n_layer)]
        self.v = [like.new_zeros(batch, cfg.n_head, size, d) for _ in range(cfg.n_layer)]
        self.last = [like.new_zeros(batch, 1, cfg.n_embd) for _ in range(cfg.n_layer)]
        self.mask = torch.zeros(batch, size, dtype=torch.bool, device=like.device)
        self.length = 0

    def select(self, rows: Tensor) -> None:
        self.k, self.v, self.last = ([t.index_select(0, rows) for t in part] for part in (self.k, self.v, self.last))
        self.mask = self.mask[rows]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(t.numel() * t.element_size() for t in self.k + self.v)


class Attention(nn.Module):
    """Causal multi-head self-attention with rotary positions and optional token shift."""

    def __init__(self, cfg: GPTConfig, layer: int) -> None:
        super().__init__()
        self.n_head, self.layer = cfg.n_head, layer
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(cfg.n_embd, cfg.n_embd, bias=False) for _ in range(4))
        self.shift = nn.Parameter(torch.full((cfg.n_embd,), 0.5)) if cfg.token_shift else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor | None, cache: Cache | None) -> Tensor:
        B, T, C = x.shape
        if self.shift is not None:
            before = x.new_zeros(B, 1, C) if cache is None else cache.last[self.layer]
            if cache is not None:
                cache.last[self.layer] = x[:, -1:]
            x = x + self.shift * torch.cat((before, x[:, :-1]), dim=1)  # (B, T, C)
        q, k, v = (w(x).view(B, T, self.n_head, -1).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)  # (B, H, T, D)
        if cache is not None:
            end = cache.length + T
            cache.k[self.layer][:, :, cache.length:end] = k
            cache.v[self.layer][:, :, cache.length:end] = v
            k, v = cache.k[self.layer][:, :, :end], cache.v[self.layer][:, :, :end]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None)
        return self.wo(y.transpose(1, 2).reshape(B, T, C))


class SwiGLU(nn.Module):
    def __init__(self, cfg: GPTConfig) -> None:
        super().__init__()
        self.w_gate = nn.Linear(cfg.n_embd, cfg.n_hidden, bias=False)
        self.w_up = nn.Linear(cfg.n_embd, cfg.n_hidden, bias=False)
        self.w_down = nn.Linear(cfg.n_hidden, cfg.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_down(F.silu(self.w_gate(x)) * self.w_up(x))


class Block(nn.Module):
    def __init__(self, cfg: GPTConfig, layer: int) -> None:
        super().__init__()
        self.norm1, self.attn = RMSNorm(cfg.n_embd, cfg.norm_eps), Attention(cfg, layer)
        self.norm2, self.mlp = RMSNorm(cfg.n_embd, cfg.norm_eps), SwiGLU(cfg)

    def forward(self, x: Tensor, valid: Tensor | None, *args) -> Tensor:
        h = self.norm1(x)
        if valid is not None:
            h = h * valid  # a pad token must not leak into its right neighbour through the shift
        x = x + self.attn(h, *args)
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """The network. `forward` returns logits; losses live in train/."""

    def __init__(self, cfg: GPTConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.wte = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.blocks = nn.ModuleList(Block(cfg, i) for i in range(cfg.n_layer))
        self.norm_f = RMSNorm(cfg.n_embd, cfg.norm_eps)
        for name, table in zip(("cos", "sin"), rope_tables(cfg)):
            self.register_buffer(name, table, persistent=False)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)
        for block in self.blocks:  # residual branches start small (GPT-2): std / sqrt(2 n_layer)
            for w in (block.attn.wo, block.mlp.w_down):
                nn.init.normal_(w.weight, std=0.02 / (2 * cfg.n_layer) ** 0.5)

    @property
    def device(self) -> torch.device:
        return self.cos.device

    def n_params(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def new_cache(self, batch: int, size: int) -> Cache:
        """An empty cache for `batch` rows of at most `size` tokens."""
        return Cache(self.cfg, batch, size, self.wte.weight)

    def hidden(self, idx: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Final features (B, T, C) of token ids (B, T).

        mask (B, T) bool marks real tokens; False is left padding, which nothing attends to. Rotary positions
        are relative, so a left-padded row gives the same logits as the row alone. With a `cache`, idx are the
        next tokens. Raises ValueError past block_size."""
        start = 0 if cache is None else cache.length
        end = start + idx.shape[1]
        if end > self.cfg.block_size:
            raise ValueError(f"{end} tokens do not fit block_size={self.cfg.block_size}; "
                             "shorten the text or make the model with a larger block_size")
        bias = valid = None
        if mask is not None and not bool(mask.all()):
            valid = mask.unsqueeze(-1).to(self.wte.weight.dtype)
        if cache is not None:
            cache.mask[:, start:end] = True if mask is None else mask
        if valid is not None or cache is not None:
            keys = cache.mask[:, :end] if cache is not None else mask
            rows = torch.arange(start, end, device=idx.device).unsqueeze(1)
            cols = torch.arange(end, device=idx.device).unsqueeze(0)
            bias = ((cols <= rows) & keys[:, None, None, :]) | (cols == rows)  # (B, 1, T, end); pads see themselves
        x = self.wte(idx)
        for block in self.blocks:
            x = block(x, valid, self.cos[start:end], self.sin[start:end], bias, cache)
        if cache is not None:
            cache.length = end
        return self.norm_f(x)

    def head(self, h: Tensor) -> Tensor:
        """Logits (..., V) of features (..., C), through the tied embedding."""
        return F.linear(h, self.wte.weight)

    def forward(self, idx: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Logits (B, T, V) of token ids (B, T); see `hidden`."""
        return self.head(self.hidden(idx, mask, cache))
