"""The memory-bound steps around a decoder's products: q/k norm + rotary + KV store, residual + RMS-norm, SiLU * up.

They compute what `roro_fast.models.decoder` writes out in plain torch (RMS-norm with the mean square in float32, cast
back before the weight; half-split rotary), each in one pass. The C++ kernels keep float32 inside and round once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from roro_fast.ops import native
from roro_fast.ops.registry import Implementation, register, select
from roro_fast.ops.triton_impl import register_triton


class AddedNorm(NamedTuple):
    """total = x + residual, and its RMS-norm; both [T, H] in the dtype of x."""

    normed: torch.Tensor
    total: torch.Tensor


def norm_rope_store(
    qkv: torch.Tensor,
    heads: int,
    kv_heads: int,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slots: torch.Tensor,
    eps: float = 1e-6,
    *,
    impl: str | None = None,
) -> torch.Tensor:
    """Norm and rotate q and k, write k and v into their pages, return q [T, heads, D].

    qkv [T, (heads + 2 * kv_heads) * D], what the fused projection gives; q_norm, k_norm [D] weights of the per-head
    RMS-norm, or None for none; cos, sin [max_position, D] float32 as `models.rope.rope_tables` makes them; positions
    [T] int64; k_pages, v_pages [pages, page_size, kv_heads, D], any strides; slots [T] int64, page * page_size +
    offset, all different. D is even.
    """
    fn = select("norm_rope_store", qkv.device, qkv.dtype, impl)
    q: torch.Tensor = fn(qkv, heads, kv_heads, q_norm, k_norm, cos, sin, positions, k_pages, v_pages, slots, eps)
    return q


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, *, impl: str | None = None
) -> AddedNorm:
    """Add the residual stream and norm the sum; x, residual [T, H], weight [H]."""
    out: AddedNorm = select("add_rms_norm", x.device, x.dtype, impl)(x, residual, weight, eps)
    return out


def silu_mul(gate_up: torch.Tensor, *, impl: str | None = None) -> torch.Tensor:
    """silu(gate) * up of gate_up [T, 2 * I], gate first; [T, I]."""
    out: torch.Tensor = select("silu_mul", gate_up.device, gate_up.dtype, impl)(gate_up)
    return out


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight over the last dimension, the mean square in float32, cast back before the weight."""
    if x.dtype == torch.float32:
        return F.rms_norm(x, weight.shape, weight, eps)
    h = x.float()
    return weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Half-split rotary; x, cos, sin [..., D]."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def norm_rope_store_reference(
    qkv: torch.Tensor,
    heads: int,
    kv_heads: int,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slots: torch.Tensor,
    eps: float = 1e-6,
) -> torch.Tensor:
    dim = k_pages.shape[-1]
    q, k, v = qkv.view(len(qkv), heads + 2 * kv_heads, dim).split([heads, kv_heads, kv_heads], 1)
    if q_norm is not None:
        q = rms_norm(q, q_norm, eps)
    if k_norm is not None:
        k = rms_norm(k, k_norm, eps)
    c, s = (x[positions].unsqueeze(1).to(qkv.dtype) for x in (cos, sin))
    q, k = rotate(q, c, s), rotate(k, c, s)
    page, offset = slots // k_pages.shape[1], slots % k_pages.shape[1]
    k_pages[page, offset] = k.to(k_pages.dtype)
    v_pages[page, offset] = v.to(v_pages.dtype)
    return q


def add_rms_norm_reference(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6
) -> AddedNorm:
    total = x + residual
    return AddedNorm(rms_norm(total, weight, eps), total)


def silu_mul_reference(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def norm_rope_store_cpu(
    qkv: torch.Tensor,
    heads: int,
    kv_heads: int,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slots: torch.Tensor,
    eps: float = 1e-6,
) -> torch.Tensor:
    """csrc/cpu/norm_rope_store.cpp"""
    q: torch.Tensor = native.call(
        "norm_rope_store", qkv, heads, kv_heads, q_norm, k_norm, cos, sin, positions, k_pages, v_pages, slots, eps
    )
    return q


def add_rms_norm_cpu(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> AddedNorm:
    return AddedNorm(*native.call("add_rms_norm", x, residual, weight, eps))


def silu_mul_cpu(gate_up: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = native.call("silu_mul", gate_up)
    return out


for _op, _reference, _cpu in (
    ("norm_rope_store", norm_rope_store_reference, norm_rope_store_cpu),
    ("add_rms_norm", add_rms_norm_reference, add_rms_norm_cpu),
    ("silu_mul", silu_mul_reference, silu_mul_cpu),
):
    register(Implementation(_op, "reference", _reference))
    native.register_cpu(_op, _cpu, torch.float32, torch.bfloat16)
register_triton("norm_rope_store", "norm_rope_store", "norm_rope_store")
register_triton("add_rms_norm", "norm_rope_store", "add_rms_norm", AddedNorm)
register_triton("silu_mul", "norm_rope_store", "silu_mul")
