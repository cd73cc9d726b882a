"""Catch-up plans against a loop, and page copies bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from roro_fast.ops.kv_handoff import copy_pages, plan


@given(st.data(), st.integers(1, 9), st.integers(0, 6))
def test_plan_equals_a_loop(data: st.DataObject, page_size: int, n: int) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    slots, length = 8, 40
    tokens = rng.integers(0, 1000, (slots, length))
    table = rng.permutation(slots * length).reshape(slots, length)[:, : -(-length // page_size)]
    rows = rng.permutation(slots)[:n]
    start = rng.integers(0, length, n)
    count = np.array([rng.integers(0, length - s + 1) for s in start], np.int64)
    got = plan(tokens, rows, start, count, table, page_size)
    want = [
        (tokens[r, p], p, table[r, p // page_size] * page_size + p % page_size)
        for r, s, c in zip(rows, start, count, strict=True)
        for p in range(s, s + c)
    ]
    assert list(zip(got.ids, got.positions, got.slots, strict=True)) == want
    assert got.cu_seqlens.tolist() == [0, *np.cumsum(count)]
    assert len(set(got.slots.tolist())) == len(want)
    assert all(a.dtype == np.int64 for a in got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_copies_are_bit_exact(dtype: torch.dtype) -> None:
    pool = torch.randint(0, 255, (10, 3, 2, 4, 2, 16), dtype=torch.uint8).view(dtype)  # any bits, NaN among them
    before = pool.clone()
    source, target = torch.tensor([1, 7, 3]), torch.tensor([9, 0, 4])
    copy_pages(pool, source, target)
    bits = lambda x: x.contiguous().view(torch.uint8)  # noqa: E731
    assert torch.equal(bits(pool[target]), bits(before[source]))
    others = [i for i in range(10) if i not in target.tolist()]
    assert torch.equal(bits(pool[others]), bits(before[others]))
    copy_pages(pool, torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
