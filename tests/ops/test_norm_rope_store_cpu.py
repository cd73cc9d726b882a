"""norm_rope_store, add_rms_norm and silu_mul in C++ on every instruction set."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from roro_fast.errors import RoroError
from roro_fast.ops import native
from roro_fast.ops.norm_rope_store import add_rms_norm, norm_rope_store, silu_mul
from tests.ops import concurrency
from tests.ops.cases import norm_rope_store as cases
from tests.ops.cases.common import assert_no_worse

DTYPES = [torch.float32, torch.bfloat16]


def run(c: cases.Case, dtype: torch.dtype) -> None:
    before = c.k_pages.clone(), c.v_pages.clone()
    cases.check(c, before, norm_rope_store(*c, impl="cpu"), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("size", cases.SIZES, ids=str)
def test_no_worse_than_naive(isa: str, size: tuple[int, ...], norm: bool, dtype: torch.dtype) -> None:
    run(cases.make(*size, dtype, norm=norm), dtype)


@settings(max_examples=50)
@given(
    st.integers(0, 20), st.integers(1, 9), st.integers(1, 4), st.integers(1, 50), st.integers(1, 20),
    st.sampled_from(DTYPES), st.integers(0, 10**6),
)  # fmt: skip
def test_any_size(tokens: int, heads: int, kv: int, half: int, page: int, dtype: torch.dtype, seed: int) -> None:
    if native.available():
        run(cases.make(tokens, heads, kv, 2 * half, page, dtype, seed=seed), dtype)


def test_pages_of_another_dtype_and_layout(isa: str) -> None:
    c = cases.make(30, 6, 2, 16, 4)
    k, v = (torch.zeros(len(c.k_pages), 2, 4, 16, dtype=torch.bfloat16).transpose(1, 2) for _ in range(2))
    norm_rope_store(*c._replace(k_pages=k, v_pages=v), impl="cpu")
    norm_rope_store(*c, impl="cpu")
    page, offset = c.slots // 4, c.slots % 4
    assert torch.equal(k[page, offset], c.k_pages[page, offset].bfloat16())
    assert torch.equal(v[page, offset], c.v_pages[page, offset].bfloat16())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (63, 576), (7, 257), (2, 4096), (0, 8), (5, 15)])
def test_add_rms_norm_and_silu_mul(isa: str, tokens: int, width: int, dtype: torch.dtype) -> None:
    x, r = (torch.randn(tokens, 2 * width + 3).to(dtype)[:, 1 : width + 1] for _ in range(2))  # rows lie apart
    weight = (1 + 0.3 * torch.randn(width)).to(dtype)
    got = add_rms_norm(x, r, weight, 1e-5, impl="cpu")
    assert torch.equal(got.total, x + r)
    norm = cases.norm
    assert_no_worse(got.normed, norm(x + r, weight, 1e-5), norm((x + r).double(), weight.double(), 1e-5), dtype)
    pair = (10 * torch.randn(tokens, 2 * width + 5)).to(dtype)[:, 2 : 2 * width + 2]
    if tokens:
        pair[0, 0] = -200.0
    silu = lambda y: F.silu(y[:, :width]) * y[:, width:]  # noqa: E731
    assert_no_worse(silu_mul(pair, impl="cpu"), silu(pair), silu(pair.double()), dtype)


BAD = {
    "qkv: shape [9, 48] but [any, 64]": lambda c: c._replace(qkv=c.qkv[:, :48]),
    "qkv: float16": lambda c: c._replace(qkv=c.qkv.half()),
    "k_pages: head dimension 7 is not even": lambda c: c._replace(k_pages=c.k_pages[..., :7]),
    "v_pages: shape": lambda c: c._replace(v_pages=c.v_pages[:, :2]),
    "v_pages: another dtype": lambda c: c._replace(v_pages=c.v_pages.bfloat16()),
    "q_norm: shape [7] but [8]": lambda c: c._replace(q_norm=c.q_norm[:7]),
    "k_norm: another dtype than q_norm": lambda c: c._replace(k_norm=c.k_norm.bfloat16()),
    "cos: float64 but float32": lambda c: c._replace(cos=c.cos.double()),
    "positions: 200 at 0, but cos and sin have 200": lambda c: c._replace(positions=torch.full((9,), 200)),
    "positions: -1 at 0": lambda c: c._replace(positions=torch.full((9,), -1)),
    "slots: -1 at 0": lambda c: c._replace(slots=c.slots * 0 - 1),
    "slots: 99 at 0, but the pages hold 24": lambda c: c._replace(slots=c.slots * 0 + 99),
    "slots: shape [8] but [9]": lambda c: c._replace(slots=c.slots[1:]),
}


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message: str) -> None:
    c = cases.make(9, 4, 2, 8, 4)
    before = c.k_pages.clone()
    with pytest.raises(RoroError, match=re.escape(message)):
        native.call("norm_rope_store", *BAD[message](c))
    assert torch.equal(c.k_pages, before)


@pytest.mark.usefixtures("kernels")
def test_bad_input_of_the_other_two_is_named() -> None:
    x = torch.randn(3, 8)
    with pytest.raises(RoroError, match=r"residual: shape \[2, 8\] but \[3, 8\]"):
        add_rms_norm(x, x[1:], torch.ones(8), impl="cpu")
    with pytest.raises(RoroError, match="residual: bfloat16 but float32"):
        add_rms_norm(x, x.bfloat16(), torch.ones(8), impl="cpu")
    with pytest.raises(RoroError, match=r"weight: shape \[9\] but \[8\]"):
        add_rms_norm(x, x, torch.ones(9), impl="cpu")
    with pytest.raises(RoroError, match="gate_up: 7 columns"):
        silu_mul(x[:, :7], impl="cpu")


@pytest.mark.usefixtures("kernels")
def test_registered_ops_pass_opcheck() -> None:
    c = cases.make(9, 4, 2, 8, 4)
    own = c._replace(k_pages=c.k_pages.contiguous(), v_pages=c.v_pages.contiguous())
    torch.library.opcheck(native.op("norm_rope_store"), tuple(own))
    torch.library.opcheck(native.op("add_rms_norm"), (torch.randn(3, 8), torch.randn(3, 8), torch.ones(8), 1e-6))
    torch.library.opcheck(native.op("silu_mul"), (torch.randn(3, 8),))


@pytest.mark.usefixtures("kernels")
def test_threads_fork_and_repeats() -> None:
    c = cases.make(200, 9, 3, 64, 16)
    x = torch.randn(200, 576)
    weight = torch.ones(576)

    def run() -> list[torch.Tensor]:
        """Samples of the results: torch's own comparison of all of them would hang in a forked child."""
        q, (normed, total) = norm_rope_store(*c, impl="cpu"), add_rms_norm(x, x, weight, impl="cpu")
        return [y.flatten(1)[:, ::37] for y in (q, normed, total, silu_mul(x, impl="cpu"))]

    concurrency.check(run)
