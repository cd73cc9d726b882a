"""Ragged paged attention against a plain softmax over each sequence's own tokens."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch

from roro_fast.ops.paged_attention import make_groups, paged_attention


class Case(NamedTuple):
    q: torch.Tensor
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    page_table: torch.Tensor
    kv_lens: torch.Tensor
    cu_seqlens: torch.Tensor
    truth: torch.Tensor


def case(
    shapes: list[tuple[int, int]],
    page_size: int = 4,
    heads: tuple[int, int] = (4, 2),
    dim: int = 8,
    dtype: torch.dtype = torch.float32,
    layers: int = 1,
) -> Case:
    """Sequences of (query length, context); whatever belongs to no sequence is NaN, unused table entries included."""
    g = torch.Generator().manual_seed(1)
    (hq, hkv), width = heads, max((-(-c // page_size) for _, c in shapes), default=1) + 1
    n_pages = 2 + sum(-(-c // page_size) for _, c in shapes)
    order = torch.randperm(n_pages, generator=g)
    arena = torch.full((n_pages, layers, 2, page_size, hkv, dim), float("nan"), dtype=torch.float64)
    table = torch.full((len(shapes), width), int(order[-1]))
    qs, outs, used = [torch.empty(0, hq, dim).double()], [torch.empty(0, hq, dim).double()], 0
    for i, (n, context) in enumerate(shapes):
        k, v = torch.randn(2, context, hkv, dim, generator=g).double()
        q = torch.randn(n, hq, dim, generator=g).double()
        pages = order[used : used + -(-context // page_size)]
        used += len(pages)
        table[i, : len(pages)] = pages
        at = torch.arange(context)
        arena[pages[at // page_size], layers - 1, 0, at % page_size] = k
        arena[pages[at // page_size], layers - 1, 1, at % page_size] = v
        scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(hq // hkv, 1)) / dim**0.5
        scores.masked_fill_(at > torch.arange(context - n, context)[:, None], float("-inf"))
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v.repeat_interleave(hq // hkv, 1)))
        qs.append(q)
    cu = torch.tensor([0, *itertools.accumulate(n for n, _ in shapes)])
    lens = torch.tensor([c for _, c in shapes], dtype=torch.int64)
    pool = arena.to(dtype)
    q = torch.cat(qs).to(dtype)
    return Case(q, pool[:, layers - 1, 0], pool[:, layers - 1, 1], table, lens, cu, torch.cat(outs))


SHAPES = {
    "decode": [(1, c) for c in (1, 2, 3, 4, 5, 9, 33, 64)],
    "prefill": [(c, c) for c in (1, 7, 4, 16, 30)],
    "catch-up": [(2, 9), (7, 40), (1, 17), (5, 5), (1, 1), (8, 33), (3, 4), (31, 64)],
    "one": [(1, 1)],
    "empty rows": [(0, 3), (2, 5), (0, 1), (1, 8)],
    "none": [],
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
def test_equals_a_plain_softmax(shapes: list[tuple[int, int]], page_size: int, heads: tuple[int, int]) -> None:
    c = case(shapes, page_size, heads)
    torch.testing.assert_close(paged_attention(*c[:6]).double(), c.truth, atol=2e-6, rtol=0)


@pytest.mark.parametrize("layers", [1, 3])
def test_groups_may_be_shared_among_layers_and_pools_strided(layers: int) -> None:
    c = case(SHAPES["catch-up"], 4, layers=layers)
    groups = make_groups(c.page_table, c.kv_lens, c.cu_seqlens, c.k_pages)
    torch.testing.assert_close(paged_attention(*c[:6], groups=groups).double(), c.truth, atol=2e-6, rtol=0)
    odd = [p.transpose(1, 2).contiguous().transpose(1, 2) for p in (c.k_pages, c.v_pages)]  # head-major pages
    out = paged_attention(c.q, *odd, c.page_table, c.kv_lens, c.cu_seqlens)
    torch.testing.assert_close(out.double(), c.truth, atol=2e-6, rtol=0)


def test_padding_is_bounded() -> None:
    """One long prompt among decode rows must not blow the rectangles up."""
    c = case([(1, n) for n in range(1, 40)] + [(300, 300)], 4)
    groups = make_groups(c.page_table, c.kv_lens, c.cu_seqlens, c.k_pages)
    padded = sum(g.seen.numel() for g in groups)
    assert padded <= 2 * 1.5 * sum(n * k for n, k in [*((1, n) for n in range(1, 40)), (300, 300)])
    assert len(groups) < 14


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_naive(dtype: torch.dtype) -> None:
    c = case(SHAPES["catch-up"], 4, dtype=dtype)
    error = (paged_attention(*c[:6]).double() - c.truth).abs().max()
    assert error <= {torch.bfloat16: 3e-2, torch.float16: 3e-3}[dtype]


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    c = case(SHAPES["catch-up"], 4)
    together = paged_attention(*c[:6])
    for i in range(len(c.kv_lens)):
        a, b = c.cu_seqlens[i : i + 2].tolist()
        alone = paged_attention(
            c.q[a:b], c.k_pages, c.v_pages, c.page_table[i : i + 1], c.kv_lens[i : i + 1], torch.tensor([0, b - a])
        )
        torch.testing.assert_close(alone, together[a:b], atol=1e-6, rtol=0)
