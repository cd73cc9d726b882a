"""Paged pools with ragged queries, some sharing a prefix, and the fp64 softmax over each sequence's own tokens."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch

from roro_fast.ops.paged_attention import PrefixGroups
from tests.ops.cases.common import assert_no_worse

# (query length, context) of each sequence
SHAPES = {
    "decode": [(1, c) for c in (1, 2, 15, 16, 17, 63, 64, 65, 200)],
    "prefill": [(c, c) for c in (1, 7, 64, 65, 130)],
    "ragged": [(2, 9), (7, 40), (1, 17), (5, 5), (33, 150), (0, 3), (1, 1), (64, 130)],
    "none": [],
}
# query heads, key heads, head dimension, page size
SIZES = [
    (4, 2, 16, 16), (8, 1, 64, 32), (7, 7, 80, 3), (6, 2, 128, 128), (9, 3, 64, 16), (5, 1, 8, 1), (16, 8, 33, 7),
]  # fmt: skip


class Case(NamedTuple):
    q: torch.Tensor
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    page_table: torch.Tensor
    kv_lens: torch.Tensor
    cu_seqlens: torch.Tensor
    prefix: PrefixGroups | None
    truth: torch.Tensor
    naive: torch.Tensor

    @property
    def args(self) -> tuple[torch.Tensor, ...]:
        return self[:6]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int = 0) -> torch.Tensor:
    """Causal attention of the last len(q) of len(k) tokens, every step in the dtype of the arguments."""
    n, context, ratio = len(q), len(k), q.shape[1] // max(k.shape[1], 1)
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(ratio, 1)) / q.shape[-1] ** 0.5
    key, at = torch.arange(context), torch.arange(context - n, context)[:, None]
    hidden = (key > at) | (key <= at - window) if window else key > at
    return torch.einsum(
        "hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v.repeat_interleave(ratio, 1)
    )


def make(
    shapes: list[tuple[int, int]],
    heads: int,
    kv_heads: int,
    dim: int,
    page_size: int,
    dtype: torch.dtype = torch.float32,
    *,
    shared: list[tuple[int, int]] | None = None,
    seed: int = 0,
    window: int = 0,
) -> Case:
    """`shared`: (sequences, pages) of groups that share a prefix, counted from the first sequence on. Whatever belongs
    to no sequence is NaN, what follows a context in its last page and unused table entries included."""
    g = torch.Generator().manual_seed(seed)
    contexts = [c for _, c in shapes]
    width = max((-(-c // page_size) for c in contexts), default=1) + 1
    spare = 2 + sum(-(-c // page_size) for c in contexts)
    order = torch.randperm(spare, generator=g)
    arena = torch.full((spare, 3, page_size, kv_heads, dim), float("nan"), dtype=dtype)
    table = torch.full((len(shapes), width), int(order[-1]))
    groups = [(i, p) for i, (n, p) in enumerate(shared or []) for _ in range(n)]
    first: dict[int, int] = {}
    used, outs, naives, qs = 0, [], [], []
    for i, (n, context) in enumerate(shapes):
        pages = order[used : used + -(-context // page_size)]
        used += len(pages)
        table[i, : len(pages)] = pages
        at = torch.arange(context)
        fresh = (torch.randn(2, context, kv_heads, dim, generator=g)).to(dtype)
        skip = 0
        if i < len(groups):
            group, count = groups[i]
            leader = first.setdefault(group, i)
            if leader != i:
                table[i, :count] = table[leader, :count]
                skip = count * page_size
        own = table[i, at // page_size]
        arena[own[skip:], 1, at[skip:] % page_size], arena[own[skip:], 2, at[skip:] % page_size] = fresh[:, skip:]
        k, v = arena[own, 1, at % page_size], arena[own, 2, at % page_size]
        q = torch.randn(n, heads, dim, generator=g).to(dtype)
        qs.append(q)
        outs.append(attend(q.double(), k.double(), v.double(), window))
        naives.append(attend(q, k, v, window))
    empty = torch.empty(0, heads, dim)
    prefix = None
    if shared is not None:
        sizes = [n for n, _ in shared]
        lengths = torch.tensor([p * page_size for _, p in shared])
        prefix = PrefixGroups(torch.arange(sum(sizes)), torch.tensor([0, *itertools.accumulate(sizes)]), lengths)
    return Case(
        torch.cat([empty.to(dtype), *qs]),
        arena[:, 1],
        arena[:, 2],
        table,
        torch.tensor(contexts, dtype=torch.int64),
        torch.tensor([0, *itertools.accumulate(n for n, _ in shapes)]),
        prefix,
        torch.cat([empty.double(), *outs]),
        torch.cat([empty.to(dtype), *naives]),
    )


def check(c: Case, got: torch.Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype
    assert_no_worse(got, c.naive, c.truth, dtype)
