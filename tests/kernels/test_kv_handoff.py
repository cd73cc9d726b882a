"""kv_handoff in Triton: moves bit for bit, conversions as torch rounds, plans on the device, faults and bounds."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roro_fast.errors import ConfigError, RoroError
from roro_fast.kernels import kv_handoff as kernel
from roro_fast.ops.kv_handoff import copy, copy_pages, plan
from roro_fast.ops.kv_plan import plan_on_device
from tests.kernels.faults import plant
from tests.kernels.guard import guarded, run_guarded
from tests.ops.cases import kv_handoff as cases

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="guard pages are host memory")


if HERE.type == "cpu":
    kernel._PROGRAMS = 16  # the interpreter runs one after another


def token_major(pool: torch.Tensor, layout: str) -> torch.Tensor:
    return pool if layout == "NHD" else pool.transpose(-3, -2)


def moved(c: cases.Case, module: ModuleType | None = None) -> torch.Tensor:
    source, target, spans = c.source.to(HERE), c.target.clone().to(HERE), c.spans.to(HERE)
    if module is None:
        copy(source, target, spans, source_layout=c.source_layout, target_layout=c.target_layout, impl="triton")
    else:
        module._PROGRAMS = kernel._PROGRAMS
        module.copy(token_major(source, c.source_layout), token_major(target, c.target_layout), spans)
    return target.cpu()


def same(c: cases.Case, module: ModuleType | None = None) -> bool:
    return torch.equal(cases.bits(moved(c, module)), cases.bits(cases.expected(c)))


@pytest.mark.parametrize("layouts", cases.LAYOUTS, ids="-".join)
@pytest.mark.parametrize("size", cases.SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.float64])
def test_moves_are_bit_exact(size, layouts, dtype):
    assert same(cases.make(*size, layouts, dtype))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("to", FLOATS)
def test_conversions_round_as_torch_does(dtype, to):
    c = cases.make(7, 5, 3, 21, 60, ("NHD", "HND"), dtype, to)
    special = torch.tensor([0.0, -0.0, 1e-45, 6e-8, 6.1e-5, 65504, 65520, 1e30, 1.00390625, float("inf"), float("nan")])
    c.source.view(-1)[: 7 * len(special)] = special.repeat(7).to(dtype)
    got, want = moved(c), cases.expected(c)
    assert torch.equal(got.isnan(), want.isnan())
    filled = [cases.bits(x.nan_to_num(7.0, torch.inf, -torch.inf)) for x in (got, want)]
    assert torch.equal(*filled)


@settings(max_examples=30)
@given(
    st.integers(1, 20), st.integers(1, 20), st.integers(1, 3), st.integers(1, 9), st.integers(0, 50),
    st.sampled_from(cases.LAYOUTS), st.sampled_from([(), (2,), (2, 1, 3)]), st.integers(0, 10**6),
)  # fmt: skip
def test_any_span_table(source, target, heads, dim, tokens, layouts, inner, seed):
    assert same(cases.make(source, target, heads, dim, tokens, layouts, torch.bfloat16, inner=inner, seed=seed))


def test_strided_pools_of_many_dimensions():
    c = cases.make(4, 3, 2, 5, 20, inner=(2, 3, 2))
    wide = torch.full((len(c.source), 2, 2, 3, 2, 4, 2, 5), torch.nan)
    wide[:, :, 1] = c.source
    target = c.target.clone().to(HERE)
    copy(wide.to(HERE)[:, :, 1], target, c.spans.to(HERE), impl="triton")
    assert torch.equal(cases.bits(target.cpu()), cases.bits(cases.expected(c)))


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("(write % target_size) * target_token", "(write % source_size) * target_token"),
        ("mask = (t < count)[:, None] & (e < width)", "mask = (t <= count)[:, None] & (e < width)"),
        ("+ i * source_inner", "+ i * target_inner"),
        ("for at in range(0, width, BLOCK_E)", "for at in range(0, width - BLOCK_E + 1, BLOCK_E)"),
        ("tl.num_programs(2) * BLOCK_T", "tl.num_programs(2) * 2 * BLOCK_T"),
    ],
)
def test_a_planted_fault_is_seen(tmp_path, right, wrong):
    case = [
        cases.make(32, 16, 8, 128, 33, ("NHD", "HND")),
        cases.make(16, 16, 3, 400, 40),
        cases.make(40, 60, 1, 5, 900, dtype=torch.uint8, inner=()),
    ]
    assert all(same(c) for c in case)
    assert not all(same(c, plant(kernel, tmp_path, right, wrong)) for c in case)


def under_guard(side: str) -> None:
    for layouts in cases.LAYOUTS:
        c = cases.make(7, 16, 3, 5, 40, layouts)
        guard = c._replace(**{k: guarded(getattr(c, k), side) for k in ("source", "target", "spans")})
        copy(*guard[:3], source_layout=layouts[0], target_layout=layouts[1], impl="triton")
        assert torch.equal(cases.bits(guard.target), cases.bits(cases.expected(c)))
    pool = guarded(torch.randn(6, 3, 7), side)
    copy_pages(pool, guarded(torch.tensor([5, 0]), side), guarded(torch.tensor([1, 2]), side), impl="triton")
    assert torch.equal(pool[1], pool[5]) and torch.equal(pool[2], pool[0])


@interpreted
@pytest.mark.parametrize("side", ["start", "end"])
def test_stays_within_its_tensors(side):
    assert run_guarded(__name__, "under_guard", side) == 0


@pytest.mark.parametrize("span", [(-1, 0, 2), (0, 10**9, 2), (0, 0, 10**9), (0, 0, -3)])
def test_a_wrong_span_moves_nothing(span, monkeypatch):
    c = cases.make(4, 3, 2, 5, 20)
    bad = c._replace(spans=torch.cat((c.spans, torch.tensor([span]))))
    assert torch.equal(cases.bits(moved(bad)), cases.bits(cases.expected(c)))
    monkeypatch.setattr("roro_fast.kernels.checks.DEBUG", True)
    with pytest.raises(ConfigError, match="spans: .* slots outside the pool"):
        moved(bad)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c._replace(target=c.target[..., :3]), "target: shape"),
        (lambda c: c._replace(target=c.target[:, :1]), "target: shape"),
        (lambda c: c._replace(target=c.target.long()), "target: cannot convert"),
        (lambda c: c._replace(spans=c.spans.int()), "spans: dtype torch.int32"),
        (lambda c: c._replace(spans=c.spans[:, :2]), "spans: shape"),
        (lambda c: c._replace(source_layout="DHN"), "source_layout"),
    ],
)
def test_bad_input_is_one_clear_error(change, says):
    with pytest.raises(RoroError, match=says):
        moved(change(cases.make(4, 3, 2, 5, 20)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("shape", [(9, 3, 2, 16, 2, 64), (9, 5), (9, 1)])
def test_copy_pages_is_bit_exact_and_touches_nothing_else(shape, dtype):
    pool = cases.any_bits(shape, dtype, torch.Generator().manual_seed(0))
    source, target = torch.tensor([0, 7, 7]), torch.tensor([3, 1, 8])
    want = pool.clone()
    want[target] = pool[source]
    got = pool.to(HERE)
    copy_pages(got, source.to(HERE), target.to(HERE), impl="triton")
    assert torch.equal(cases.bits(got.cpu()), cases.bits(want))


def test_copy_pages_of_a_view():
    arena = torch.arange(200, dtype=torch.int16, device=HERE)
    pool = arena[3:183].view(12, 15)[::2, :10]
    want = pool.clone()
    want[4] = want[0]
    copy_pages(pool, torch.tensor([0], device=HERE), torch.tensor([4], device=HERE), impl="triton")
    assert torch.equal(pool, want)
    with pytest.raises(ConfigError, match="not adjacent"):
        copy_pages(arena.view(10, 20)[:, ::2], *torch.tensor([[0], [1]], device=HERE), impl="triton")


@settings(max_examples=25)
@given(st.integers(1, 9), st.lists(st.integers(0, 300), max_size=300), st.integers(1, 40), st.integers(0, 999))
def test_plan_on_device_equals_the_plan(sequences, counts, page_size, seed):
    rng = np.random.default_rng(seed)
    counts = counts[:20] + [c % 2 for c in counts[20:]]  # many sequences, most with little to catch up on
    n, length = len(counts), 320
    tokens = rng.integers(0, 1000, (sequences, length))
    table = rng.integers(0, 99, (sequences, -(-length // page_size)))
    rows, count = rng.integers(0, sequences, n), np.array(counts, np.int64)
    start = rng.integers(0, 20, n)
    want = plan(tokens, rows, start, count, table, page_size, impl="reference")
    args = [torch.from_numpy(x).to(HERE) for x in (tokens, rows, start, count, table)]
    for impl in ("triton", "reference"):
        got = plan_on_device(*args, page_size, int(count.sum()), impl=impl)
        for x, y in zip(got, want, strict=True):
            assert np.array_equal(x.cpu().numpy(), y)
