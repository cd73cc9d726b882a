"""Triton kernels of the memory-bound steps around a decoder's products; float32 inside, rounded once.

norm_rope_store: per-head RMS-norm, half-split rotary, and K and V straight into their pages. add_rms_norm: residual
stream and norm. silu_mul: the gate of the MLP.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from roro_fast.errors import ConfigError
from roro_fast.kernels import checks
from roro_fast.kernels.aot_spec import AotSpec

MAX_WIDTH = 32768  # of a row that add_rms_norm keeps in registers
_HEAD_TILE = 1024  # elements of half heads per program
_BLOCK = 1024


@triton.jit(do_not_specialize=["n_positions", "n_slots"])
def norm_rope_store_kernel(
    qkv, q_norm, k_norm, cos, sin, positions, k_pages, v_pages, slots, out, n_positions, n_slots, qkv_stride,
    page_size, k_page, k_token, k_head, k_dim, v_page, v_token, v_head, v_dim, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (tokens, blocks of heads); heads count q, then k, then v. A head is held as its two halves."""
    HALF: tl.constexpr = D // 2
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    j = tl.arange(0, BLOCK_D)
    real = (h < HEADS + 2 * KV_HEADS)[:, None] & (j < HALF)[None, :]
    at = qkv + t * qkv_stride + h[:, None] * D + j[None, :]
    left = tl.load(at, mask=real, other=0.0).to(tl.float32)
    right = tl.load(at + HALF, mask=real, other=0.0).to(tl.float32)
    is_q = h < HEADS
    is_k = (h >= HEADS) & (h < HEADS + KV_HEADS)
    is_v = h >= HEADS + KV_HEADS
    squares = tl.sum(left * left, 1) + tl.sum(right * right, 1)
    scale = tl.rsqrt(squares / D + eps)[:, None]
    half = j < HALF
    a, b = left, right
    if q_norm is not None:
        w_left = tl.load(q_norm + j, mask=half, other=0.0).to(tl.float32)
        w_right = tl.load(q_norm + HALF + j, mask=half, other=0.0).to(tl.float32)
        a = tl.where(is_q[:, None], left * scale * w_left[None, :], a)
        b = tl.where(is_q[:, None], right * scale * w_right[None, :], b)
    if k_norm is not None:
        w_left = tl.load(k_norm + j, mask=half, other=0.0).to(tl.float32)
        w_right = tl.load(k_norm + HALF + j, mask=half, other=0.0).to(tl.float32)
        a = tl.where(is_k[:, None], left * scale * w_left[None, :], a)
        b = tl.where(is_k[:, None], right * scale * w_right[None, :], b)
    position = tl.load(positions + t)
    known = half & (position >= 0) & (position < n_positions)  # a wrong position or slot touches nothing
    angle = position * D + j
    c_left = tl.load(cos + angle, mask=known, other=1.0)[None, :]
    c_right = tl.load(cos + angle + HALF, mask=known, other=1.0)[None, :]
    s_left = tl.load(sin + angle, mask=known, other=0.0)[None, :]
    s_right = tl.load(sin + angle + HALF, mask=known, other=0.0)[None, :]
    turned_left = a * c_left - b * s_left
    turned_right = b * c_right + a * s_right

    q_at = out + (t * HEADS + h)[:, None] * D + j[None, :]
    mask = real & is_q[:, None]
    tl.store(q_at, turned_left.to(out.dtype.element_ty), mask=mask)
    tl.store(q_at + HALF, turned_right.to(out.dtype.element_ty), mask=mask)
    slot = tl.load(slots + t)
    writable = real & (slot >= 0) & (slot < n_slots)
    k_at = (slot // page_size) * k_page + (slot % page_size) * k_token + (h - HEADS)[:, None] * k_head
    k_at += j[None, :] * k_dim
    mask = writable & is_k[:, None]
    tl.store(k_pages + k_at, turned_left.to(k_pages.dtype.element_ty), mask=mask)
    tl.store(k_pages + k_at + HALF * k_dim, turned_right.to(k_pages.dtype.element_ty), mask=mask)
    v_at = (slot // page_size) * v_page + (slot % page_size) * v_token + (h - HEADS - KV_HEADS)[:, None] * v_head
    v_at += j[None, :] * v_dim
    mask = writable & is_v[:, None]
    tl.store(v_pages + v_at, left.to(v_pages.dtype.element_ty), mask=mask)
    tl.store(v_pages + v_at + HALF * v_dim, right.to(v_pages.dtype.element_ty), mask=mask)


@triton.jit
def add_rms_norm_kernel(x, residual, weight, normed, total, width, x_stride, residual_stride, eps, BLOCK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    mask = i < width
    a = tl.load(x + t * x_stride + i, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(residual + t * residual_stride + i, mask=mask, other=0.0).to(tl.float32)
    rounded = (a + b).to(total.dtype.element_ty)
    tl.store(total + t * width + i, rounded, mask=mask)
    s = rounded.to(tl.float32)
    s = s * tl.rsqrt(tl.sum(s * s, 0) / width + eps) * tl.load(weight + i, mask=mask, other=0.0).to(tl.float32)
    tl.store(normed + t * width + i, s.to(normed.dtype.element_ty), mask=mask)


@triton.jit
def silu_mul_kernel(gate_up, out, width, stride, BLOCK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = i < width
    gate = tl.load(gate_up + t * stride + i, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + t * stride + width + i, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + t * width + i, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=mask)


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
) -> torch.Tensor:
    device = qkv.device
    if k_pages.ndim != 4 or k_pages.shape != v_pages.shape or k_pages.shape[2] != kv_heads or k_pages.shape[3] % 2:
        shapes = f"{list(k_pages.shape)}, {list(v_pages.shape)}"
        raise ConfigError(f"k_pages, v_pages: shapes {shapes}; want [pages, page_size, {kv_heads}, D], D even")
    if k_pages.dtype not in checks.FLOATS or v_pages.dtype != k_pages.dtype:
        raise ConfigError(f"k_pages, v_pages: {k_pages.dtype} and {v_pages.dtype}; want one float dtype")
    if k_pages.device != device or v_pages.device != device:
        raise ConfigError(f"k_pages, v_pages: on {k_pages.device} and {v_pages.device}, qkv on {device}")
    dim, n_slots = k_pages.shape[3], k_pages.shape[0] * k_pages.shape[1]
    qkv = _rows("qkv", qkv, (heads + 2 * kv_heads) * dim)
    for name, w in (("q_norm", q_norm), ("k_norm", k_norm)):
        if w is not None:
            checks.tensor(name, w, (dim,), device, checks.FLOATS)
    cos = checks.tensor("cos", cos, (None, dim), device, torch.float32)
    sin = checks.tensor("sin", sin, (len(cos), dim), device, torch.float32)
    positions = checks.index("positions", positions, len(cos), device, len(qkv))
    slots = checks.index("slots", slots, n_slots, device, len(qkv))
    out = torch.empty(len(qkv), heads, dim, dtype=qkv.dtype, device=device)
    if len(qkv):
        block_d = triton.next_power_of_2(dim // 2)
        block_h = min(triton.next_power_of_2(heads + 2 * kv_heads), max(1, _HEAD_TILE // block_d))
        norms = (None if w is None else w.contiguous() for w in (q_norm, k_norm))
        norm_rope_store_kernel[len(qkv), triton.cdiv(heads + 2 * kv_heads, block_h)](
            qkv, *norms, cos, sin, positions, k_pages, v_pages, slots, out, len(cos), n_slots, qkv.stride(0),
            k_pages.shape[1], *k_pages.stride(), *v_pages.stride(), eps,
            HEADS=heads, KV_HEADS=kv_heads, D=dim, BLOCK_H=block_h, BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """(normed, total) of `roro_fast.ops.norm_rope_store.add_rms_norm`."""
    x = _rows("x", x, None)
    width = x.shape[1]
    checks.at_most("x (columns)", width, MAX_WIDTH)
    residual = _rows("residual", residual, width)
    if residual.shape != x.shape or residual.dtype != x.dtype or residual.device != x.device:
        raise ConfigError(f"residual: {residual.dtype} {list(residual.shape)}; want {x.dtype} {list(x.shape)} like x")
    weight = checks.tensor("weight", weight, (width,), x.device, x.dtype)
    normed, total = torch.empty(2, *x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        block = triton.next_power_of_2(width)
        add_rms_norm_kernel[(len(x),)](
            x, residual, weight, normed, total, width, x.stride(0), residual.stride(0), eps,
            BLOCK=block, num_warps=min(16, max(4, block // 1024)),
        )  # fmt: skip
    return normed, total


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate_up = _rows("gate_up", gate_up, None)
    width, odd = divmod(gate_up.shape[1], 2)
    if odd:
        raise ConfigError(f"gate_up: {gate_up.shape[1]} columns cannot be halved into gate and up")
    out = torch.empty(len(gate_up), width, dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        block = min(_BLOCK, triton.next_power_of_2(width))
        silu_mul_kernel[len(out), triton.cdiv(width, block)](
            gate_up, out, width, gate_up.stride(0), BLOCK=block, num_warps=4
        )
    return out


def _rows(name: str, x: torch.Tensor, width: int | None) -> torch.Tensor:
    """[T, width] of a float dtype whose rows may lie apart."""
    if x.ndim != 2 or x.dtype not in checks.FLOATS or width not in (None, x.shape[1]):
        raise ConfigError(f"{name}: {x.dtype} {list(x.shape)}; want float [T, {'H' if width is None else width}]")
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


def _aot_store(dtype: str, heads: int, kv_heads: int, dim: int, norm: bool) -> AotSpec:
    block_d = triton.next_power_of_2(dim // 2)
    args = dict.fromkeys(("qkv", "k_pages", "v_pages", "out"), f"*{dtype}:16")
    args |= {"cos": "*fp32:16", "sin": "*fp32:16", "positions": "*i64:16", "slots": "*i64:16", "eps": "fp32"}
    args |= dict.fromkeys(("n_positions", "n_slots"), "i32")
    strides = [f"{p}_{d}" for p in "kv" for d in ("page", "token", "head")]
    args |= dict.fromkeys(("qkv_stride", "page_size", *strides), "i32:16")
    meta = {"k_dim": 1, "v_dim": 1, "HEADS": heads, "KV_HEADS": kv_heads, "D": dim, "BLOCK_D": block_d}
    meta["BLOCK_H"] = min(triton.next_power_of_2(heads + 2 * kv_heads), max(1, _HEAD_TILE // block_d))
    names = ("q_norm", "k_norm")
    if norm:
        args |= dict.fromkeys(names, f"*{dtype}:16")
    else:
        meta |= dict.fromkeys(names)
    return AotSpec(f"{dtype} {heads}/{kv_heads}x{dim}{' norm' * norm}", norm_rope_store_kernel, args, meta)


def _aot_rows(dtype: str, width: int) -> list[AotSpec]:
    block = triton.next_power_of_2(width)
    rows = dict.fromkeys(("x", "residual", "weight", "normed", "total"), f"*{dtype}:16")
    rows |= {"width": "i32:16", "x_stride": "i32:16", "residual_stride": "i32:16", "eps": "fp32"}
    pair = {"gate_up": f"*{dtype}:16", "out": f"*{dtype}:16", "width": "i32:16", "stride": "i32:16"}
    name = f"{dtype} H={width}"
    return [
        AotSpec(name, add_rms_norm_kernel, rows, {"BLOCK": block}, min(16, max(4, block // 1024))),
        AotSpec(name, silu_mul_kernel, pair, {"BLOCK": min(_BLOCK, block)}),
    ]


AOT = [_aot_store("bf16", 32, 8, 128, True), _aot_store("bf16", 9, 3, 64, False), _aot_store("fp32", 16, 8, 128, True)]
AOT += [spec for dtype in ("bf16", "fp32") for width in (576, 4096, 32768) for spec in _aot_rows(dtype, width)]
