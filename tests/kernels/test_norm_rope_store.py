"""norm_rope_store, add_rms_norm and silu_mul in Triton: the shared cases, planted faults, bounds and bad input."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from roro_fast.errors import ConfigError
from roro_fast.kernels import norm_rope_store as kernel
from roro_fast.ops.norm_rope_store import add_rms_norm, norm_rope_store, silu_mul
from tests.kernels.faults import plant
from tests.kernels.guard import guarded, run_guarded
from tests.ops.cases import norm_rope_store as cases
from tests.ops.cases.common import assert_no_worse

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="guard pages are host memory")


def run(c: cases.Case, dtype: torch.dtype, module: ModuleType | None = None) -> None:
    before = c.k_pages.clone(), c.v_pages.clone()
    moved = cases.Case(*(x.to(HERE) if isinstance(x, torch.Tensor) else x for x in c))
    q = norm_rope_store(*moved, impl="triton") if module is None else module.norm_rope_store(*moved)
    c.k_pages.copy_(moved.k_pages)
    c.v_pages.copy_(moved.v_pages)
    cases.check(c, before, q.cpu(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("size", cases.SIZES, ids=str)
def test_no_worse_than_naive(size, norm, dtype):
    run(cases.make(*size, dtype, norm=norm), dtype)


@settings(max_examples=20)
@given(
    st.integers(0, 8), st.integers(1, 9), st.integers(1, 4), st.integers(1, 50), st.integers(1, 20),
    st.sampled_from(DTYPES), st.integers(0, 10**6),
)  # fmt: skip
def test_any_size(tokens, heads, kv, half, page, dtype, seed):
    run(cases.make(tokens, heads, kv, 2 * half, page, dtype, seed=seed), dtype)


def test_pages_of_another_dtype_and_layout():
    c = cases.make(30, 6, 2, 16, 4)
    c = cases.Case(*(x.to(HERE) if isinstance(x, torch.Tensor) else x for x in c))
    k, v = (torch.zeros(len(c.k_pages), 2, 4, 16, dtype=torch.bfloat16, device=HERE).transpose(1, 2) for _ in "kv")
    norm_rope_store(*c._replace(k_pages=k, v_pages=v), impl="triton")
    norm_rope_store(*c, impl="triton")
    page, offset = c.slots // 4, c.slots % 4
    assert torch.equal(k[page, offset], c.k_pages[page, offset].bfloat16())
    assert torch.equal(v[page, offset], c.v_pages[page, offset].bfloat16())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (63, 576), (7, 257), (2, 4096), (0, 8), (5, 15)])
def test_add_rms_norm_and_silu_mul(tokens, width, dtype):
    x, r = (torch.randn(tokens, 2 * width + 3).to(dtype)[:, 1 : width + 1] for _ in range(2))  # rows lie apart
    weight = (1 + 0.3 * torch.randn(width)).to(dtype)
    got = add_rms_norm(x.to(HERE), r.to(HERE), weight.to(HERE), 1e-5, impl="triton")
    assert torch.equal(got.total.cpu(), x + r)
    norm = cases.norm
    truth = norm((x + r).double(), weight.double(), 1e-5)
    assert_no_worse(got.normed.cpu(), norm(x + r, weight, 1e-5), truth, dtype)
    pair = (10 * torch.randn(tokens, 2 * width + 5)).to(dtype)[:, 2 : 2 * width + 2]
    if tokens:
        pair[0, 0] = -200.0
    silu = lambda y: F.silu(y[:, :width]) * y[:, width:]  # noqa: E731
    assert_no_worse(silu_mul(pair.to(HERE), impl="triton").cpu(), silu(pair), silu(pair.double()), dtype)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("turned_left = a * c_left - b * s_left", "turned_left = a * c_left + b * s_left"),
        ("tl.load(k_norm + HALF + j", "tl.load(k_norm + j"),
        ("(slot % page_size) * v_token + (h - HEADS - KV_HEADS)", "(slot % page_size) * v_token + (h - HEADS)"),
        ("is_k = (h >= HEADS) & (h < HEADS + KV_HEADS)", "is_k = (h > HEADS) & (h < HEADS + KV_HEADS)"),
        ("left.to(v_pages", "turned_left.to(v_pages"),
        ("squares / D + eps", "squares / HALF + eps"),
    ],
)
def test_a_planted_fault_is_seen(tmp_path, right, wrong):
    run(cases.make(5, 4, 2, 16, 4), torch.float32)
    with pytest.raises(AssertionError):
        run(cases.make(5, 4, 2, 16, 4), torch.float32, plant(kernel, tmp_path, right, wrong))


def under_guard(side: str) -> None:
    c = cases.make(5, 4, 2, 16, 4)
    c = cases.Case(*(guarded(x, side) if isinstance(x, torch.Tensor) else x for x in c))
    run(c, torch.float32)
    x, weight = guarded(torch.randn(3, 77), side), guarded(torch.randn(77), side)
    add_rms_norm(x, guarded(x, side), weight, impl="triton")
    silu_mul(guarded(torch.randn(3, 154), side), impl="triton")


@interpreted
@pytest.mark.parametrize("side", ["start", "end"])
def test_stays_within_its_tensors(side):
    assert run_guarded(__name__, "under_guard", side) == 0


@pytest.mark.parametrize("slot", [-1, 10**9])
def test_a_wrong_slot_or_position_touches_nothing(slot, monkeypatch):
    c = cases.make(4, 4, 2, 16, 4)
    c = cases.Case(*(x.to(HERE) if isinstance(x, torch.Tensor) else x for x in c))
    before = c.k_pages.clone()
    q = norm_rope_store(*c._replace(slots=c.slots * 0 + slot, positions=c.positions * 0 + slot), impl="triton")
    assert torch.equal(c.k_pages, before) and q.isfinite().all()
    monkeypatch.setattr("roro_fast.kernels.checks.DEBUG", True)
    with pytest.raises(ConfigError, match="slots: index"):
        norm_rope_store(*c._replace(slots=c.slots * 0 + slot), impl="triton")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: {"qkv": c.qkv[:, :48]}, r"qkv: .* want float \[T, 64\]"),
        (lambda c: {"k_pages": c.k_pages[..., :7]}, "k_pages, v_pages: shapes"),
        (lambda c: {"v_pages": c.v_pages.bfloat16()}, "k_pages, v_pages: torch.float32 and torch.bfloat16"),
        (lambda c: {"q_norm": c.q_norm[:7]}, "q_norm: shape"),
        (lambda c: {"cos": c.cos.double()}, "cos: dtype torch.float64"),
        (lambda c: {"slots": c.slots[1:]}, "slots: shape"),
    ],
)
def test_bad_input_is_one_clear_error(change, says):
    c = cases.make(9, 4, 2, 8, 4)
    c = cases.Case(*(x.to(HERE) if isinstance(x, torch.Tensor) else x for x in c))
    with pytest.raises(ConfigError, match=says):
        norm_rope_store(*c._replace(**change(c)), impl="triton")


def test_bad_input_of_the_other_two_is_named():
    x = torch.randn(3, 8, device=HERE)
    with pytest.raises(ConfigError, match="residual: "):
        add_rms_norm(x, x[1:], torch.ones(8, device=HERE), impl="triton")
    with pytest.raises(ConfigError, match=r"weight: shape \[9\]"):
        add_rms_norm(x, x, torch.ones(9, device=HERE), impl="triton")
    with pytest.raises(ConfigError, match="gate_up: 7 columns"):
        silu_mul(x[:, :7], impl="triton")
