"""What Gemma 3 (arXiv 2503.19786) does otherwise: a norm after each block too, norms that multiply by 1 + weight,
tanh-GELU, and layers that see a sliding window of the context under a rotary base of their own."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from roro_fast.models.config import DecoderConfig
from roro_fast.ops.norm_rope_store import rotate

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class OffsetNorm(nn.Module):
    """x / rms(x) * (1 + weight) * gain in float32, rounded once at the end as Gemma does."""

    def __init__(self, size: int, eps: float, gain: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps, self.gain = eps, gain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x.float() if x.dtype.itemsize < 4 else x
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return (h * ((1.0 + self.weight.to(h.dtype)) * self.gain)).to(x.dtype)


class GemmaLayer(nn.Module):
    """Attention and GeGLU, each between two norms; q carries the scale by which scores differ from 1 / sqrt(head_dim).

    `window`: tokens that a query sees, itself included; 0 for all.
    """

    def __init__(self, c: DecoderConfig, index: int) -> None:
        super().__init__()
        self.c, self.index, self.window = c, index, c.windows[index]
        self.sizes = [n * c.head_dim for n in (c.num_heads, c.num_kv_heads, c.num_kv_heads)]
        self.input_norm = OffsetNorm(c.hidden_size, c.rms_norm_eps)
        self.qkv = nn.Linear(c.hidden_size, sum(self.sizes), bias=c.qkv_bias)
        self.o = nn.Linear(self.sizes[0], c.hidden_size, bias=c.o_bias)
        self.q_norm = OffsetNorm(c.head_dim, c.rms_norm_eps, c.q_gain)
        self.k_norm = OffsetNorm(c.head_dim, c.rms_norm_eps)
        self.after_attention = OffsetNorm(c.hidden_size, c.rms_norm_eps)
        self.before_mlp = OffsetNorm(c.hidden_size, c.rms_norm_eps)
        self.gate_up = nn.Linear(c.hidden_size, 2 * c.intermediate_size, bias=c.mlp_bias)
        self.down = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)
        self.after_mlp = OffsetNorm(c.hidden_size, c.rms_norm_eps)

    def heads(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [T, Hq, D], k and v [T, Hkv, D] of the residual stream [T, hidden], normed and not yet rotated."""
        c = self.c
        q, k, v = self.qkv(self.input_norm(x)).split(self.sizes, dim=-1)
        q, k, v = (t.view(-1, n, c.head_dim) for t, n in ((q, c.num_heads), (k, c.num_kv_heads), (v, c.num_kv_heads)))
        return self.q_norm(q), self.k_norm(k), v

    def rest(self, x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """The residual stream after this layer, given what its attention saw [T, Hq, D]."""
        x = x + self.after_attention(self.o(seen.flatten(1)))
        gate, up = self.gate_up(self.before_mlp(x)).chunk(2, dim=-1)
        return x + self.after_mlp(self.down(F.gelu(gate, approximate="tanh") * up))

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attend: Attend) -> torch.Tensor:
        q, k, v = self.heads(x)
        return self.rest(x, attend(self.index, rotate(q, cos, sin), rotate(k, cos, sin), v))
