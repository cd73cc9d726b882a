"""paged_attention in Triton: the shared cases, shared prefixes, planted faults, memory bounds and bad input."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roro_fast.errors import ConfigError
from roro_fast.kernels import paged_attention as kernel
from roro_fast.ops.paged_attention import PrefixGroups, find_prefix_groups, for_layers, paged_attention
from tests.kernels.faults import plant
from tests.kernels.guard import guarded, run_guarded
from tests.ops.cases import paged_attention as cases

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="guard pages are host memory")
FORKS = [(1, 100), (1, 130), (2, 140), (1, 200), (1, 90), (3, 95), (1, 30)]
if HERE.type == "cpu":
    kernel._PROGRAMS = 24  # the interpreter runs one after another


def run(c: cases.Case, module: ModuleType | None = None) -> torch.Tensor:
    args = [x.to(HERE) for x in c.args]
    prefix = None if c.prefix is None else PrefixGroups(*(x.to(HERE) for x in c.prefix))
    if module is None:
        return paged_attention(*args, prefix=prefix, impl="triton").cpu()
    module._PROGRAMS = kernel._PROGRAMS
    return module.paged_attention(*args, None, prefix).cpu()


@pytest.mark.parametrize("size", cases.SIZES, ids=str)
@pytest.mark.parametrize("shape", cases.SHAPES)
def test_no_worse_than_naive(shape, size):
    cases.check(c := cases.make(cases.SHAPES[shape], *size), run(c), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize(("shape", "size"), [("decode", 1), ("ragged", 0), ("prefill", 3)])
def test_half_precision(shape, size, dtype):
    cases.check(c := cases.make(cases.SHAPES[shape], *cases.SIZES[size], dtype), run(c), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_shared_prefixes(dtype):
    c = cases.make(FORKS, 4, 2, 16, 16, dtype, shared=[(4, 5), (2, 4)])
    cases.check(c, run(c), dtype)
    cases.check(c, run(c._replace(prefix=None)), dtype)


def test_groups_may_be_empty_and_prefixes_too():
    """Fixed-shape groups of a CUDA graph: everyone is in one, and most of them hold nobody."""
    c = cases.make([(1, 90), (1, 85), (1, 70)], 4, 2, 16, 16, shared=[(2, 5)])
    members, offsets, lengths = torch.tensor([0, 1, 2]), torch.tensor([0, 2, 3, 3]), torch.tensor([80, 0, 0])
    cases.check(c, run(c._replace(prefix=PrefixGroups(members, offsets, lengths))), torch.float32)


def test_a_group_of_prefill_and_one_of_idle_sequences():
    shapes = [(40, 72), (33, 65), (0, 70), (0, 64), (1, 64), (5, 50)]
    c = cases.make(shapes, 6, 2, 33, 8, shared=[(2, 4), (3, 7)])
    cases.check(c, run(c), torch.float32)


def test_found_groups_serve_every_layer_of_a_forward():
    c = cases.make(FORKS, 4, 2, 16, 16, shared=[(4, 5), (2, 4)])
    found = find_prefix_groups(c.page_table, c.kv_lens, c.cu_seqlens, 16)
    assert sorted(found.lengths.tolist()) == [64, 80]
    cases.check(c, run(c._replace(prefix=found)), torch.float32)
    args = [x.to(HERE) for x in c.args]
    found = PrefixGroups(*(x.to(HERE) for x in found))
    first = paged_attention(*args, prefix=found, impl="triton")
    assert torch.equal(first, paged_attention(*args, prefix=found, impl="triton"))
    args[4], args[5] = args[4] - 1, torch.zeros_like(args[5])  # other lengths, same groups
    args[5][1:] = torch.arange(1, 8)
    args[0] = args[0][:7].contiguous()
    want = paged_attention(*args, impl="triton")
    torch.testing.assert_close(paged_attention(*args, prefix=found, impl="triton"), want, atol=1e-5, rtol=0)


def test_a_forward_works_its_groups_out_once(monkeypatch):
    """In inference mode too, where tensors do not count their changes."""
    c = cases.make(FORKS, 4, 2, 16, 16, shared=[(4, 5), (2, 4)])
    monkeypatch.setenv("RORO_IMPL", "paged_attention=triton")
    worked_out, places = [], kernel.places
    monkeypatch.setattr(kernel, "places", lambda *args: worked_out.append(1) or places(*args))
    with torch.inference_mode():
        args = [x.to(HERE).clone() for x in c.args]
        prefix = for_layers(PrefixGroups(*(x.to(HERE).clone() for x in c.prefix)), args[5], c.q.dtype)
        for _ in range(3):
            cases.check(c, paged_attention(*args, prefix=prefix, impl="triton").cpu(), torch.float32)
    assert worked_out == [1]
    monkeypatch.setenv("RORO_IMPL", "paged_attention=reference")
    assert for_layers(prefix := PrefixGroups(*prefix), args[5], c.q.dtype) is prefix


@settings(max_examples=12)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 60)), min_size=1, max_size=5), st.integers(1, 3),
    st.integers(1, 8), st.integers(1, 40), st.integers(1, 20), st.sampled_from(DTYPES), st.integers(0, 10**6),
)  # fmt: skip
def test_any_size(shapes, kv_heads, ratio, dim, page_size, dtype, seed):
    c = cases.make([(n, n + more) for n, more in shapes], ratio * kv_heads, kv_heads, dim, page_size, dtype, seed=seed)
    cases.check(c, run(c), dtype)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("(at[None, :] <= last_seen[:, None])", "(at[None, :] < high)"),
        ("mask=at < high, other=-1", "mask=at <= high, other=-1"),
        ("out * shrink[:, None]", "out"),
        ("low + split * span, tl.minimum", "split * span, tl.minimum"),
        ("total += weight", "total += 1.0"),
        ("if tl.load(group_of + seq) < 0:", "if tl.load(group_of + seq) < 1:"),
        ("+ row - tl.load(member_cu + low)", "+ row - start"),
        ("position = context - stop + token", "position = context - stop + token + 1"),
    ],
)
def test_a_planted_fault_is_seen(tmp_path, right, wrong):
    both = [
        cases.make(FORKS, 4, 2, 16, 16, shared=[(4, 5), (2, 4)]),
        cases.make([(3, 100), (2, 17)], 6, 2, 8, 4),
    ]
    for c in both:
        cases.check(c, run(c), torch.float32)
    faulty = plant(kernel, tmp_path, right, wrong)
    with pytest.raises(AssertionError):
        for c in both:
            cases.check(c, run(c, faulty), torch.float32)


def under_guard(side: str) -> None:
    kernel._PROGRAMS = 24
    c = cases.make(FORKS, 4, 2, 16, 16, shared=[(4, 5), (2, 4)])
    args = [guarded(x, side) for x in c.args]
    got = kernel.paged_attention(*args, None, PrefixGroups(*(guarded(x, side) for x in c.prefix)))
    cases.check(c, got, torch.float32)


@interpreted
@pytest.mark.parametrize("side", ["start", "end"])
def test_stays_within_its_tensors(side):
    assert run_guarded(__name__, "under_guard", side) == 0


@pytest.mark.parametrize("page", [-5, 10**9])
def test_a_wrong_page_reads_nothing(page, monkeypatch):
    c = cases.make([(1, 40), (1, 30)], 4, 2, 16, 16)
    table = c.page_table.clone()
    table[0, 1] = page
    got = run(c._replace(page_table=table))
    assert torch.equal(got[1], run(c)[1]) and got.isfinite().all()
    monkeypatch.setattr("roro_fast.kernels.checks.DEBUG", True)
    run(c)
    with pytest.raises(ConfigError, match="page_table: a page is outside"):
        run(c._replace(page_table=table))
    with pytest.raises(ConfigError, match="kv_lens: shorter than"):
        run(c._replace(kv_lens=c.kv_lens + 1000))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: {"q": c.q[:, :3]}, "q: 3 heads of 16 on 2 key heads"),
        (lambda c: {"q": c.q[..., :5]}, "q, k_pages, v_pages: shapes"),
        (lambda c: {"k_pages": c.k_pages.double()}, "k_pages, v_pages: must have q's dtype"),
        (lambda c: {"kv_lens": c.kv_lens.int()}, "kv_lens: dtype torch.int32"),
        (lambda c: {"page_table": c.page_table[:1]}, "page_table: shape"),
        (lambda c: {"cu_seqlens": c.cu_seqlens[:-1]}, "cu_seqlens: shape"),
    ],
)
def test_bad_input_is_one_clear_error(change, says):
    c = cases.make([(1, 40), (1, 30)], 4, 2, 16, 16)
    with pytest.raises(ConfigError, match=says):
        run(c._replace(**change(c)))


def windowed(c: cases.Case, window: int, module: ModuleType = kernel) -> torch.Tensor:
    module._PROGRAMS = kernel._PROGRAMS
    return module.windowed_attention(*[x.to(HERE) for x in c.args], None, window).cpu()


@pytest.mark.parametrize("window", [1, 16, 33, 500])
@pytest.mark.parametrize(("shape", "size"), [("decode", 0), ("ragged", 1), ("prefill", 4)])
def test_windows(shape, size, window):
    for dtype in DTYPES[:: 2 if window == 33 else 3]:
        c = cases.make(cases.SHAPES[shape], *cases.SIZES[size], dtype, window=window)
        cases.check(c, windowed(c, window), dtype)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("last_seen[:, None] - WINDOW, s", "last_seen[:, None] - WINDOW - 1, s"),
        ("start + first - WINDOW + 1", "start + first - WINDOW + 2"),
        ("if WINDOW > 0:\n            s = ", "if WINDOW < 0:\n            s = "),
    ],
)
def test_a_planted_fault_in_the_window_is_seen(tmp_path, right, wrong):
    c = cases.make([(5, 100), (1, 47)], 6, 2, 8, 4, window=20)
    cases.check(c, windowed(c, 20), torch.float32)
    with pytest.raises(AssertionError):
        cases.check(c, windowed(c, 20, plant(kernel, tmp_path, right, wrong)), torch.float32)


def test_the_op_takes_a_window():
    c = cases.make([(2, 40)], 4, 2, 16, 16, window=7)
    got = paged_attention(*[x.to(HERE) for x in c.args], window=7, impl="triton").cpu()
    cases.check(c, got, torch.float32)
