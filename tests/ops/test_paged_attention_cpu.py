"""paged_attention in C++ on every instruction set: ragged rows, shared prefixes, strides, bad input, threads, fork."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roro_fast.errors import RoroError
from roro_fast.ops import native
from roro_fast.ops.paged_attention import PrefixGroups, cpu, find_prefix_groups, paged_attention, wants_groups
from tests.kernels.guard import guarded
from tests.ops import concurrency
from tests.ops.cases import paged_attention as cases

ROOT = Path(__file__).parents[2]
DTYPES = [torch.float32, torch.bfloat16]
SHARED = [(3, 70), (1, 100), (2, 64), (5, 64), (1, 90), (40, 200), (1, 70), (2, 9)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shapes", cases.SHAPES.values(), ids=cases.SHAPES)
@pytest.mark.parametrize("size", cases.SIZES, ids=str)
def test_no_worse_than_naive(isa: str, size: tuple[int, ...], shapes: list, dtype: torch.dtype) -> None:
    c = cases.make(shapes, *size, dtype)
    cases.check(c, paged_attention(*c.args, impl="cpu"), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(4, 2, 16, 16), (7, 7, 80, 3), (16, 2, 64, 8)], ids=str)
@pytest.mark.parametrize("shared", [[(4, 3)], [(2, 1), (3, 2), (1, 4)], [(3, 0)]], ids=str)
def test_shared_prefixes_change_nothing(isa: str, shared: list, size: tuple[int, ...], dtype: torch.dtype) -> None:
    shapes = [(q, own + 4 * size[-1] + q) for q, own in SHARED]
    c = cases.make(shapes, *size, dtype, shared=shared)
    cases.check(c, paged_attention(*c.args, prefix=c.prefix, impl="cpu"), dtype)
    cases.check(c, paged_attention(*c.args, impl="cpu"), dtype)


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 150)), max_size=6), st.integers(1, 4), st.integers(1, 9),
    st.integers(1, 40), st.integers(1, 20), st.sampled_from(DTYPES), st.integers(0, 10**6),
)  # fmt: skip
def test_any_size(
    shapes: list, kv_heads: int, ratio: int, dim: int, page_size: int, dtype: torch.dtype, seed: int
) -> None:
    if native.available():
        shapes = [(q, q + before) for q, before in shapes]
        c = cases.make(shapes, kv_heads * ratio, kv_heads, dim, page_size, dtype, seed=seed)
        cases.check(c, paged_attention(*c.args, impl="cpu"), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "size", [(4, 2, 16, 16), (9, 3, 64, 16), (7, 7, 80, 3), (3, 1, 33, 5), (19, 19, 32, 5), (8, 2, 96, 7)], ids=str
)
def test_a_row_alone_equals_the_row_in_any_batch(isa: str, size: tuple[int, ...], dtype: torch.dtype) -> None:
    """Bit for bit: with its sequence cut in chunks, every token as a decode step, and on two threads."""
    c = cases.make(cases.SHAPES["ragged"], *size, dtype)
    together = paged_attention(*c.args, impl="cpu")
    for i in range(len(c.kv_lens)):
        a, b = c.cu_seqlens[i : i + 2].tolist()
        spans = [(a, b), ((a + b) // 2, b), *((t, t + 1) for t in range(a, b, 7))]
        for begin, end in spans:
            lens = c.kv_lens[i : i + 1] - (b - end)
            one = paged_attention(
                c.q[begin:end], c.k_pages, c.v_pages, c.page_table[i : i + 1], lens, torch.tensor([0, end - begin]),
                impl="cpu",
            )  # fmt: skip
            assert torch.equal(one, together[begin:end]), (i, begin, end)
    torch.set_num_threads(2)
    try:
        assert torch.equal(paged_attention(*c.args, impl="cpu"), together)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pages", [4, 5, 9], ids=str)
@pytest.mark.parametrize("dim", [16, 64])
def test_sharing_a_prefix_changes_no_bit(isa: str, dim: int, pages: int, dtype: torch.dtype) -> None:
    shapes = [(q, own + 16 * pages + q) for q, own in SHARED]
    c = cases.make(shapes, 4, 2, dim, 16, dtype, shared=[(5, pages), (3, 1)])
    with_groups = paged_attention(*c.args, prefix=c.prefix, impl="cpu")
    assert torch.equal(with_groups, paged_attention(*c.args, impl="cpu"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_and_pools_may_be_strided(isa: str, dtype: torch.dtype) -> None:
    c = cases.make(cases.SHAPES["ragged"], 4, 2, 32, 16, dtype)
    want = paged_attention(*c.args, impl="cpu")
    wide = torch.full((len(c.q), 9, 36), float("nan"), dtype=dtype)
    wide[:, 2:6, 3:35] = c.q
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (c.k_pages, c.v_pages))  # head-major pages
    table = torch.cat((c.page_table, c.page_table), 1)[:, : c.page_table.shape[1]]
    assert torch.equal(paged_attention(wide[:, 2:6, 3:35], k, v, table, *c[4:6], impl="cpu"), want)


def at_the_edge() -> None:
    """Runs in a process of its own: reading beyond the queries or the pools ends it."""
    for isa in native.usable_isas():
        native.set_isa(isa)
        for size in [(4, 2, 16, 16), (9, 3, 64, 16), (7, 7, 80, 3), (3, 1, 33, 5)]:
            for dtype in DTYPES:
                c = cases.make([(1, 48), (20, 75)], *size, dtype)
                q, k, v = (guarded(x.contiguous()) for x in (c.q, c.k_pages, c.v_pages))
                assert torch.equal(paged_attention(q, k, v, *c.args[3:], impl="cpu"), cpu(*c.args))


@pytest.mark.usefixtures("kernels")
def test_nothing_outside_is_read() -> None:
    code = "from tests.ops.test_paged_attention_cpu import at_the_edge; at_the_edge()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_large_scores_do_not_overflow(isa: str) -> None:
    c = cases.make(cases.SHAPES["ragged"], 4, 2, 16, 16)
    got = paged_attention(100 * c.q, *c.args[1:], impl="cpu")
    q = (100 * c.q).double()
    i = 4  # 33 queries over 150 tokens
    a, b = c.cu_seqlens[i : i + 2].tolist()
    at = torch.arange(int(c.kv_lens[i]))
    pages = c.page_table[i, at // 16]
    want = cases.attend(q[a:b], c.k_pages[pages, at % 16].double(), c.v_pages[pages, at % 16].double())
    torch.testing.assert_close(got[a:b].double(), want, atol=1e-3, rtol=0)
    assert bool(got.isfinite().all())


@given(st.integers(1, 5), st.lists(st.integers(0, 3), min_size=1, max_size=8), st.integers(0, 10**6))
def test_found_groups_share_what_they_say(page_size: int, families: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, width = len(families), 12
    table = rng.permutation(n * width).reshape(n, width)
    for i, family in enumerate(families):
        table[i, : 2 * family + 1] = 1000 * family + np.arange(2 * family + 1) if family else table[i, :1]
    queries = rng.integers(1, 4, n)
    lens = queries + rng.integers(0, (width - 1) * page_size, n)
    cu = torch.tensor([0, *np.cumsum(queries)])
    g = find_prefix_groups(torch.tensor(table), torch.tensor(lens), cu, page_size, min_tokens=1)
    assert len(set(g.members.tolist())) == len(g.members)
    for i, length in enumerate(g.lengths.tolist()):
        rows = g.members[g.offsets[i] : g.offsets[i + 1]].numpy()
        assert len(rows) > 1 and length % page_size == 0 and length > 0
        assert (table[rows, : length // page_size] == table[rows[0], : length // page_size]).all()
        assert (length <= lens[rows] - queries[rows]).all()
        more = length // page_size + 1
        assert (lens[rows] - queries[rows] < more * page_size).any() or len(set(table[rows, more - 1].tolist())) > 1


def changed(c: cases.Case, **fields: object) -> cases.Case:
    return c._replace(**fields)


BAD = {
    "q: float16 but float32 or bfloat16": lambda c: changed(c, q=c.q.half()),
    "q: 3 heads over 2 key heads": lambda c: changed(c, q=c.q[:, :3]),
    "k_pages: shape": lambda c: changed(c, k_pages=c.k_pages[..., :8]),
    "v_pages: shape": lambda c: changed(c, v_pages=c.v_pages[:, :8]),
    "v_pages: elements of the last dimension are apart": lambda c: changed(
        c, v_pages=c.v_pages.transpose(2, 3).contiguous().transpose(2, 3)
    ),
    "page_table: page 99 at [1, 0], but there are": lambda c: changed(
        c, page_table=c.page_table.index_fill(0, torch.tensor(1), 99)
    ),
    "page_table: page -1 at [1, 0]": lambda c: changed(c, page_table=c.page_table.index_fill(0, torch.tensor(1), -1)),
    "page_table: int32 but int64": lambda c: changed(c, page_table=c.page_table.int()),
    "kv_lens: 1 at 0, but the sequence has 2 queries": lambda c: changed(
        c, kv_lens=c.kv_lens.index_fill(0, torch.tensor(0), 1)
    ),
    "kv_lens: 9999 at 1, but page_table maps": lambda c: changed(
        c, kv_lens=c.kv_lens.index_fill(0, torch.tensor(1), 9999)
    ),
    "kv_lens: shape [1] but [2]": lambda c: changed(c, kv_lens=c.kv_lens[:1]),
    "cu_seqlens: must run from 0 to 5": lambda c: changed(c, cu_seqlens=torch.tensor([0, 2, 4])),
    "cu_seqlens: descends at 1": lambda c: changed(c, cu_seqlens=torch.tensor([0, -1, 5])),
    "prefix.members: sequence 2 at 1": lambda c: with_prefix(c, [0, 2], [0, 2], [16]),
    "prefix.members: sequence 0 is there twice": lambda c: with_prefix(c, [0, 0], [0, 2], [16]),
    "prefix.offsets: must run from 0 to 2": lambda c: with_prefix(c, [0, 1], [0, 1], [16]),
    "prefix.offsets: group 1 descends": lambda c: with_prefix(c, [0, 1], [0, 2, 1, 2], [16, 16, 16]),
    "prefix.lengths: 39 at 0, but sequence 0 has 38": lambda c: with_prefix(c, [0, 1], [0, 2], [39]),
    "prefix.lengths: -1 at 0": lambda c: with_prefix(c, [0, 1], [0, 2], [-1]),
    "prefix: sequence 1 does not share the pages of group 0": lambda c: with_prefix(c, [0, 1], [0, 2], [17]),
}


@pytest.mark.usefixtures("kernels")
def test_groups_may_be_empty_and_prefixes_too() -> None:
    """Fixed-shape groups of a CUDA graph: everyone is in one, and most of them hold nobody."""
    c = cases.make([(2, 40), (3, 44), (1, 9)], 4, 2, 16, 16, shared=[(2, 1)])
    padded = with_prefix(c, [0, 1, 2], [0, 2, 3, 3, 3], [16, 0, 0, 0])
    want = cpu(*c.args, None, with_prefix(c, [0, 1], [0, 2], [16]).prefix)
    assert torch.equal(cpu(*c.args, None, padded.prefix), want)


def with_prefix(c: cases.Case, *fields: list[int]) -> cases.Case:
    return c._replace(prefix=PrefixGroups(*map(torch.tensor, fields)))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message: str) -> None:
    c = BAD[message](cases.make([(2, 40), (3, 44)], 4, 2, 16, 16, shared=[(2, 1)]))
    with pytest.raises(RoroError, match=re.escape(message)):
        cpu(*c.args, None, c.prefix)


@pytest.mark.usefixtures("kernels")
def test_only_the_reference_wants_groups() -> None:
    assert wants_groups(torch.device("cpu"), torch.float32, "reference")
    assert not wants_groups(torch.device("cpu"), torch.float32, "cpu")


@pytest.mark.usefixtures("kernels")
def test_registered_op_passes_opcheck() -> None:
    c = cases.make([(2, 40), (3, 44)], 4, 2, 16, 16, shared=[(2, 1)])
    k, v = c.k_pages.nan_to_num(), c.v_pages.nan_to_num()
    torch.library.opcheck(native.op("paged_attention"), (c.q, k, v, *c.args[3:], *c.prefix))
    torch.library.opcheck(native.op("paged_attention"), (c.q, k, v, *c.args[3:], None, None, None))


@pytest.mark.usefixtures("kernels")
def test_threads_fork_and_repeats() -> None:
    c = cases.make(cases.SHAPES["ragged"] + cases.SHAPES["decode"], 4, 2, 16, 16)
    concurrency.check(lambda: [paged_attention(*c.args, impl="cpu")])
