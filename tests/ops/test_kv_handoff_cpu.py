"""kv_handoff in C++: moves bit for bit, conversions as torch rounds, plans, bad input, threads and fork."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from roro_fast.errors import RoroError
from roro_fast.ops import native
from roro_fast.ops.kv_handoff import copy, copy_pages, page_spans, plan
from tests.ops import concurrency
from tests.ops.cases import kv_handoff as cases

IMPLS = ["reference", "cpu"]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def moved(c: cases.Case, impl: str) -> torch.Tensor:
    target = c.target.clone()
    copy(c.source, target, c.spans, source_layout=c.source_layout, target_layout=c.target_layout, impl=impl)
    return target


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layouts", cases.LAYOUTS, ids="-".join)
@pytest.mark.parametrize("size", cases.SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.float64])
def test_moves_are_bit_exact(size: tuple[int, ...], layouts: tuple[str, str], dtype: torch.dtype, impl: str) -> None:
    c = cases.make(*size, layouts, dtype)
    assert torch.equal(cases.bits(moved(c, impl)), cases.bits(cases.expected(c)))


@pytest.mark.parametrize("dim", [64, 40], ids=["whole lines", "parts of lines"])
@pytest.mark.parametrize("layouts", [("NHD", "HND"), ("HND", "NHD")], ids="-".join)
def test_large_moves_past_the_caches_are_bit_exact(isa: str, layouts: tuple[str, str], dim: int) -> None:
    c = cases.make(16, 32, 2, dim, 4500 * 64 // dim, layouts)
    assert torch.equal(cases.bits(moved(c, "cpu")), cases.bits(cases.expected(c)))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("to", FLOATS)
def test_conversions_round_as_torch_does(isa: str, dtype: torch.dtype, to: torch.dtype) -> None:
    c = cases.make(7, 5, 3, 21, 60, ("NHD", "HND"), dtype, to)
    special = torch.tensor(
        [0.0, -0.0, 1e-45, 6e-8, 2.98e-8, 2.9802322e-8, 6.1e-5, 65504, 65519.996, 65520, 1e30, 3.4e38]
    )
    special = torch.cat((special, -special, torch.tensor([float("inf"), float("-inf"), float("nan"), 1.00390625])))
    flat = c.source.view(-1)
    flat.copy_(special.repeat(-(-len(flat) // len(special)))[: len(flat)])
    got, want = moved(c, "cpu"), cases.expected(c)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(cases.bits(got.nan_to_num(7.0, torch.inf, -torch.inf)),
                       cases.bits(want.nan_to_num(7.0, torch.inf, -torch.inf)))  # fmt: skip


@given(
    st.integers(1, 20), st.integers(1, 20), st.integers(1, 3), st.integers(1, 9), st.integers(0, 50),
    st.sampled_from(cases.LAYOUTS), st.sampled_from([(), (2,), (2, 1, 3)]), st.integers(0, 10**6),
)  # fmt: skip
def test_any_span_table(
    source: int, target: int, heads: int, dim: int, tokens: int, layouts: tuple[str, str], inner: tuple, seed: int
) -> None:
    if not native.available():
        return
    c = cases.make(source, target, heads, dim, tokens, layouts, torch.bfloat16, inner=inner, seed=seed)
    assert torch.equal(cases.bits(moved(c, "cpu")), cases.bits(cases.expected(c)))


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 60), st.integers(0, 60), st.integers(0, 999))
def test_page_spans_name_every_token_once(source: int, target: int, start: int, stop: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    pages = [rng.permutation(99)[: -(-60 // n)] for n in (source, target)]
    spans = page_spans(*pages, source, target, start, stop)
    got = [(int(r) + i, int(w) + i) for r, w, n in spans for i in range(int(n))]
    slot = lambda p, n, at: int(p[at // n]) * n + at % n  # noqa: E731
    assert got == [(slot(pages[0], source, a), slot(pages[1], target, a)) for a in range(start, stop)]


@pytest.mark.usefixtures("kernels")
def test_spans_within_one_pool_and_strided_pools() -> None:
    pool = torch.randn(6, 3, 2, 4, 2, 8)
    want = pool.clone()
    want[4, :, :, 1:3], want[0, :, :, 3] = pool[2, :, :, 0:2], pool[1, :, :, 0]
    spans = torch.tensor([[8, 17, 2], [4, 3, 1]])  # the second reads where its own target ends
    copy(pool, pool, spans, impl="cpu")
    assert torch.equal(pool, want)
    layer = pool[:, 1:2]  # one layer of an engine's pool: pages lie apart
    other = torch.zeros(6, 1, 2, 4, 2, 8)
    copy(layer, other, torch.tensor([[0, 0, 24]]), impl="cpu")
    assert torch.equal(other, layer)


BAD = {
    "spans[1]: source slots from 47, but the pool has 48": [[0, 0, 1], [47, 4, 2]],
    "spans[0]: source slots from -1": [[-1, 0, 1]],
    "spans[0]: target slots from 9223372036854775807": [[0, 2**63 - 1, 1]],
    "spans[0]: -1 tokens": [[0, 0, -1]],
    "spans: slot 5 of the target is in two spans": [[0, 4, 2], [9, 5, 1]],
}


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("message", BAD)
def test_bad_spans_are_named(message: str, impl: str) -> None:
    source, target = torch.zeros(3, 16, 2, 8), torch.zeros(3, 16, 2, 8)
    with pytest.raises(RoroError, match=re.escape(message) if impl == "cpu" else "spans"):
        copy(source, target, torch.tensor(BAD[message]), impl=impl)
    assert not target.any()


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("impl", IMPLS)
def test_other_bad_input_is_named(impl: str) -> None:
    a, none = torch.zeros(3, 16, 2, 8), torch.empty(0, 3, dtype=torch.int64)
    with pytest.raises(RoroError, match=r"target: shape \[3, 16, 2, 9\] does not fit source \[3, 16, 2, 8\]"):
        copy(a, torch.zeros(3, 16, 2, 9), none, impl=impl)
    with pytest.raises(RoroError, match="spans"):
        copy(a, a.clone(), none.int(), impl=impl)
    with pytest.raises(RoroError, match="source_layout: 'NDH' is not one of NHD, HND"):
        copy(a, a.clone(), none, source_layout="NDH", impl=impl)
    with pytest.raises(RoroError, match="reads"):
        copy(a, a, torch.tensor([[0, 3, 2], [4, 9, 1]]), impl=impl)
    with pytest.raises(RoroError, match="other pages; copy through a third pool"):
        copy(a, a.view(6, 8, 2, 8), torch.tensor([[0, 40, 2]]), impl=impl)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ([0], [4], "target: page 4 at 0, but the pool has 4"),
        ([-1], [0], "source: page -1 at 0"),
        ([0, 1], [2, 2], "target: page 2 is there twice"),
        ([0, 1], [1, 2], "source: page 1 is a target too"),
        ([0, 1], [2], r"target: shape \[1\] but \[2\] is needed"),
    ],
)
def test_bad_pages_are_named(source: list[int], target: list[int], message: str) -> None:
    with pytest.raises(RoroError, match=message):
        copy_pages(torch.zeros(4, 2, 3), torch.tensor(source), torch.tensor(target), impl="cpu")


@pytest.mark.usefixtures("kernels")
def test_moves_reach_beyond_four_gigabytes() -> None:
    """Offsets are 64-bit: a pool of 5 GiB, never touched but for two pages."""
    pool = torch.empty(5 * 2**10, 2**20, dtype=torch.uint8)
    pool[1].fill_(7)
    copy_pages(pool, torch.tensor([1]), torch.tensor([5 * 2**10 - 1]), impl="cpu")
    assert bool((pool[-1] == 7).all())
    slots = torch.tensor([[5 * 2**10 - 1, 3, 1]])
    view = pool.view(5 * 2**10, 1, 1, 2**20)
    copy(view, view, slots, impl="cpu")
    assert bool((pool[3] == 7).all())


@pytest.mark.usefixtures("kernels")
def test_registered_ops_pass_opcheck() -> None:
    c = cases.make(7, 3, 3, 5, 40)
    torch.library.opcheck(native.op("kv_copy"), (c.source.nan_to_num(), c.target.nan_to_num(), c.spans))
    args = (torch.randn(5, 6), torch.tensor([0, 1]), torch.tensor([2, 4]))
    torch.library.opcheck(native.op("kv_copy_pages"), args)


@pytest.mark.usefixtures("kernels")
def test_threads_fork_and_repeats() -> None:
    c = cases.make(16, 32, 4, 64, 3000, ("NHD", "HND"), torch.float32, torch.bfloat16)
    s, t, spans = c.source, c.target.transpose(-3, -2), c.spans

    def run() -> list[torch.Tensor]:
        """Views only: torch's own copies of this size would hang in a forked child."""
        copy(s, t, spans, impl="cpu")
        return [c.target.view(-1).view(torch.int16)[::997]]

    concurrency.check(run)


def batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    table = rng.permutation(8 * 5).reshape(8, 5)
    return {
        "tokens": rng.integers(0, 99, (8, 40)), "rows": np.array([3, 0, 7]), "start": np.array([0, 39, 8]),
        "count": np.array([40, 1, 0]), "page_table": table,
    }  # fmt: skip


@given(st.integers(1, 9), st.integers(0, 8), st.integers(0, 999))
def test_plans_agree(page_size: int, n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 1000, (8, 50))[:, :40]  # rows lie apart
    table = rng.permutation(8 * 40).reshape(8, 40)
    start = rng.integers(0, 40, n)
    args = (tokens, rng.permutation(8)[:n], start, rng.integers(0, 41 - start) if n else start, table, page_size)
    for a, b in zip(plan(*args, impl="reference"), plan(*args, impl="cpu"), strict=True):
        assert a.dtype == b.dtype == np.int64 and np.array_equal(a, b)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rows", np.array([3, 0, 8]), r"rows\[2\]: 8, but there are 8 sequences"),
        ("rows", np.array([3, 0, 7], np.int32), "rows: expected int64 with 1 dimension"),
        ("start", np.array([0, -1, 8]), r"start\[1\]: -1 is negative"),
        ("start", np.array([0, 1]), "start: 2 entries, but rows has 3"),
        ("count", np.array([40, 2, 0]), r"count\[1\]: 2 tokens from 39, but a row has 40"),
        ("count", np.array([40, -2, 0]), r"count\[1\]: -2 is negative"),
        ("page_table", np.zeros((8, 4), np.int64), r"count\[0\]: 40 tokens from 0, but page_table maps 32"),
        ("page_table", np.zeros((7, 5), np.int64), "page_table: as many rows as tokens"),
        ("tokens", np.zeros((8, 80), np.int64)[:, ::2], "tokens: expected int64 with 2 dimension"),
    ],
)
def test_bad_plans_are_named(field: str, value: np.ndarray, message: str) -> None:
    args = batch() | {field: value}
    with pytest.raises(RoroError, match=message):
        plan(**args, page_size=8, impl="cpu")
