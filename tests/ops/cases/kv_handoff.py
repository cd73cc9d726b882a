"""Pools and spans of kv_handoff.copy, and what must come out, computed one token at a time."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

# source page size, target page size, heads, head dimension, tokens
SIZES = [
    (16, 16, 2, 64, 70),
    (16, 128, 1, 80, 200),
    (32, 16, 8, 128, 33),
    (7, 3, 3, 5, 40),
    (1, 16, 2, 8, 17),
    (16, 32, 2, 8, 0),
]
LAYOUTS = [("NHD", "NHD"), ("HND", "HND"), ("NHD", "HND"), ("HND", "NHD")]


class Case(NamedTuple):
    source: torch.Tensor
    target: torch.Tensor
    spans: torch.Tensor
    source_layout: str
    target_layout: str


def any_bits(shape: tuple[int, ...], dtype: torch.dtype, g: torch.Generator) -> torch.Tensor:
    """Random bit patterns, NaN among them: a move must keep them all."""
    return torch.randint(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), dtype=torch.uint8, generator=g).view(dtype)


def make(
    source_size: int,
    target_size: int,
    heads: int,
    dim: int,
    tokens: int,
    layouts: tuple[str, str] = ("NHD", "NHD"),
    dtype: torch.dtype = torch.float32,
    to: torch.dtype | None = None,
    inner: tuple[int, ...] = (2, 2),
    seed: int = 0,
) -> Case:
    """Random runs of tokens, cut where they please, at random places of both pools; bits are random if kept."""
    g = torch.Generator().manual_seed(seed)
    rng = np.random.default_rng(seed)
    pools = []
    for size, layout, kind in ((source_size, layouts[0], dtype), (target_size, layouts[1], to or dtype)):
        pages = -(-2 * tokens // size) + 2
        shape = (pages, *inner, *((size, heads) if layout == "NHD" else (heads, size)), dim)
        pools.append(any_bits(shape, kind, g) if to is None else (5 * torch.randn(shape, generator=g)).to(kind))
    slots = [p.shape[0] * n for p, n in zip(pools, (source_size, target_size), strict=True)]
    spans, left, at = [], tokens, 0
    while left:
        n = int(rng.integers(1, left + 1))
        gap = int(rng.integers(0, slots[1] - at - left + 1)) if rng.random() < 0.3 else 0
        spans.append((int(rng.integers(0, slots[0] - n + 1)), at + gap, n))
        at, left = at + gap + n, left - n
    order = rng.permutation(len(spans))
    table = torch.tensor([spans[i] for i in order], dtype=torch.int64).reshape(-1, 3)
    return Case(*pools, table, *layouts)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


def expected(c: Case) -> torch.Tensor:
    """The target after the copy; untouched tokens keep their bits."""
    out = c.target.clone()
    s = c.source if c.source_layout == "NHD" else c.source.transpose(-3, -2)
    t = out if c.target_layout == "NHD" else out.transpose(-3, -2)
    for read, write, n in c.spans.tolist():
        for i in range(n):
            (sp, so), (tp, to) = divmod(read + i, s.shape[-3]), divmod(write + i, t.shape[-3])
            t[tp][..., to, :, :] = s[sp][..., so, :, :].to(t.dtype)
    return out
