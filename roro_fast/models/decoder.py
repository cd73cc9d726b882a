"""One decoder for the Llama / Qwen2 / Qwen3 / Gemma 3 family, on a flat batch of tokens.

The caller supplies attention; training passes a dense causal one. Rows of the flat batch are independent everywhere
else, which is what lets decode and catch-up tokens ride in one forward. `models.inference` is the engine's way through.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from roro_fast.models.config import DecoderConfig
from roro_fast.models.gemma import GemmaLayer, OffsetNorm
from roro_fast.models.rope import rope_tables
from roro_fast.ops.norm_rope_store import rms_norm, rotate

TABLES = ("cos", "sin", "local_cos", "local_sin")

# attend(layer, q [T, Hq, D], k [T, Hkv, D], v [T, Hkv, D]) -> [T, Hq, D]; q and k come normed and rotated.
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class RMSNorm(nn.Module):
    """x / rms(x) * weight with the mean square in fp32, cast back before the weight as Llama does."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


class Layer(nn.Module):
    """Pre-norm block: attention with fused q/k/v, then SwiGLU with fused gate/up."""

    def __init__(self, c: DecoderConfig, index: int) -> None:
        super().__init__()
        self.c, self.index = c, index
        self.sizes = [n * c.head_dim for n in (c.num_heads, c.num_kv_heads, c.num_kv_heads)]
        self.input_norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.qkv = nn.Linear(c.hidden_size, sum(self.sizes), bias=c.qkv_bias)
        self.o = nn.Linear(self.sizes[0], c.hidden_size, bias=c.o_bias)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else None
        self.post_norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.gate_up = nn.Linear(c.hidden_size, 2 * c.intermediate_size, bias=c.mlp_bias)
        self.down = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    @property
    def qk_weights(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Weights [head_dim] of the norms of q and k, None where there are none."""
        return (self.q_norm.weight, self.k_norm.weight) if self.q_norm and self.k_norm else (None, None)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attend: Attend) -> torch.Tensor:
        c = self.c
        q, k, v = self.qkv(self.input_norm(x)).split(self.sizes, dim=-1)
        q = q.view(-1, c.num_heads, c.head_dim)
        k = k.view(-1, c.num_kv_heads, c.head_dim)
        v = v.view(-1, c.num_kv_heads, c.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        x = x + self.o(attend(self.index, q, k, v).flatten(1))
        gate, up = self.gate_up(self.post_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Decoder(nn.Module):
    """`forward` gives final-normed hidden states [T, hidden]; `logits` maps chosen rows to [.., vocab]."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        c = self.config = config
        self.autocast: torch.dtype | None = None  # what `dense` computes in, where that is not the weights' dtype
        self.embed = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList((GemmaLayer if c.gemma else Layer)(c, i) for i in range(c.num_layers))
        self.norm = (OffsetNorm if c.gemma else RMSNorm)(c.hidden_size, c.rms_norm_eps)
        self.head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        if c.tie_embeddings:
            self.head.weight = self.embed.weight
        self.cos: torch.Tensor
        self.sin: torch.Tensor
        self.local_cos: torch.Tensor  # of layers with a window
        self.local_sin: torch.Tensor
        with torch.device("cpu"):  # also where the weights are made without values, on "meta"
            whole = rope_tables(c, "full_attention" if c.gemma else "")
            local = rope_tables(c, "sliding_attention") if any(c.windows) else whole
        for name, table in zip(TABLES, (*whole, *local), strict=True):
            self.register_buffer(name, table, persistent=False)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Decoder:
        tables = [getattr(self, name) for name in TABLES]
        super()._apply(fn, recurse)
        # Rotary tables stay in float32 when the weights are cast: the fused ops round once, at the end.
        moved = {id(t): t.to(self.cos.device) for t in tables}
        for name, table in zip(TABLES, tables, strict=True):
            setattr(self, name, moved[id(table)])
        return self

    def rotary(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin) [max_position, head_dim] float32 of a layer."""
        local = self.config.windows and self.config.windows[layer]
        return (self.local_cos, self.local_sin) if local else (self.cos, self.sin)

    def embedded(self, ids: torch.Tensor) -> torch.Tensor:
        """The residual stream [T, hidden] that the first layer gets; Gemma's is scaled, in the weights' dtype."""
        x: torch.Tensor = self.embed(ids)
        return x * torch.tensor(self.config.hidden_size**0.5, dtype=x.dtype) if self.config.gemma else x

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        """ids, positions: [T] int64. Returns [T, hidden_size] in the weights' dtype."""
        x = self.embedded(ids)
        kinds = {id(t[0]): t for t in map(self.rotary, range(len(self.layers)))}
        at = {k: [t[positions].unsqueeze(1).to(x.dtype) for t in tables] for k, tables in kinds.items()}  # [T, 1, D]
        for i, layer in enumerate(self.layers):
            x = layer(x, *at[id(self.rotary(i)[0])], attend)
        return self.norm(x)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.head(hidden)

    def dense(self, ids: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, S, hidden] of right-padded ids [B, S]; causal, so padding never reaches a real row."""
        b, s = ids.shape
        positions = torch.arange(s, device=ids.device).repeat(b)
        with torch.autocast(ids.device.type, self.autocast, enabled=self.autocast is not None):
            return self(ids.flatten(), positions, DenseAttention(b, s, self.config.windows)).view(b, s, -1)


class DenseAttention:
    """Causal attention over a rectangular batch, through torch's SDPA; supports autograd. windows: DecoderConfig's."""

    def __init__(self, batch: int, length: int, windows: Sequence[int] = ()) -> None:
        self.batch, self.length, self.windows = batch, length, windows

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.view(self.batch, self.length, t.shape[1], t.shape[2]).transpose(1, 2) for t in (q, k, v))
        window, mask = self.windows[layer] if self.windows else 0, None
        if 0 < window < self.length:
            mask = torch.ones(self.length, self.length, dtype=torch.bool, device=q.device).tril().triu(1 - window)
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=grouped)
        return out.transpose(1, 2).reshape(self.batch * self.length, out.shape[1], out.shape[3])
