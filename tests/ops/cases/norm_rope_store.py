"""Inputs of norm_rope_store, add_rms_norm and silu_mul; truth and naive result are the formulas in fp64 and in kind."""

from __future__ import annotations

from typing import NamedTuple

import torch

from tests.ops.cases.common import assert_no_worse

# tokens, query heads, key heads, head dimension, page size
SIZES = [
    (1, 4, 2, 16, 16),
    (63, 9, 3, 64, 32),
    (7, 7, 7, 80, 3),
    (40, 8, 1, 128, 128),
    (5, 2, 1, 2, 1),
    (0, 4, 2, 16, 16),
]
EPS = 1e-6


class Case(NamedTuple):
    qkv: torch.Tensor
    heads: int
    kv_heads: int
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    cos: torch.Tensor
    sin: torch.Tensor
    positions: torch.Tensor
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    slots: torch.Tensor
    eps: float


def make(
    tokens: int,
    heads: int,
    kv_heads: int,
    dim: int,
    page_size: int,
    dtype: torch.dtype = torch.float32,
    *,
    norm: bool = True,
    seed: int = 0,
) -> Case:
    g = torch.Generator().manual_seed(seed)
    pages = -(-tokens // page_size) + 3
    pool = torch.randn(pages, 2, 2, page_size, kv_heads, dim, generator=g).to(dtype)  # two layers, keys and values
    angle = torch.outer(torch.arange(200.0), 1 / 10000 ** (torch.arange(0, dim, 2) / dim))
    angle = torch.cat((angle, angle), -1)
    weights = [(1 + 0.3 * torch.randn(dim, generator=g)).to(dtype) if norm else None for _ in range(2)]
    qkv = (2 * torch.randn(tokens, (heads + 2 * kv_heads) * dim, generator=g)).to(dtype)
    positions = torch.randint(0, 200, (tokens,), generator=g)
    slots = torch.randperm(pages * page_size, generator=g)[:tokens]
    return Case(
        qkv, heads, kv_heads, *weights, angle.cos(), angle.sin(), positions, pool[:, 1, 0], pool[:, 1, 1], slots, EPS
    )


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def in_dtype(c: Case, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [T, heads, D], k and v [T, kv_heads, D], every step in `dtype`."""
    d = c.k_pages.shape[-1]
    q, k, v = c.qkv.to(dtype).view(len(c.qkv), c.heads + 2 * c.kv_heads, d).split([c.heads, c.kv_heads, c.kv_heads], 1)
    if c.q_norm is not None and c.k_norm is not None:
        q, k = norm(q, c.q_norm.to(dtype), c.eps), norm(k, c.k_norm.to(dtype), c.eps)
    cos, sin = (t[c.positions][:, None].to(dtype) for t in (c.cos, c.sin))
    turn = lambda x: x * cos + torch.cat((-x[..., d // 2 :], x[..., : d // 2]), -1) * sin  # noqa: E731
    return turn(q), turn(k), v


def check(c: Case, pool_before: tuple[torch.Tensor, torch.Tensor], q: torch.Tensor, dtype: torch.dtype) -> None:
    """Judges q and what the pages hold now; every slot not named must have kept its bits."""
    page, offset = c.slots // c.k_pages.shape[1], c.slots % c.k_pages.shape[1]
    written = [p[page, offset] for p in (c.k_pages, c.v_pages)]
    for got, naive, truth in zip((q, *written), in_dtype(c, dtype), in_dtype(c, torch.float64), strict=True):
        assert got.dtype == dtype
        assert_no_worse(got, naive, truth, dtype)
    assert torch.equal(written[1], in_dtype(c, dtype)[2]), "values are moved, bit for bit"
    for now, before in zip((c.k_pages, c.v_pages), pool_before, strict=True):
        rest = torch.ones(now.shape[:2], dtype=torch.bool)
        rest[page, offset] = False
        assert torch.equal(now[rest], before[rest])
