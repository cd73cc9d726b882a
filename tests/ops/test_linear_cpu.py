"""linear in C++ on every instruction set."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roro_fast.errors import RoroError
from roro_fast.ops import native
from roro_fast.ops.linear import linear, pack_linear
from tests.kernels.guard import guarded
from tests.ops import concurrency
from tests.ops.cases import linear as cases

ROOT = Path(__file__).resolve().parents[2]
DTYPES = [torch.float32, torch.bfloat16]


def run(c: cases.Case, gated: bool = False, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    return linear(c.x, pack_linear(c.weight, c.bias, gated=gated), out_dtype=out_dtype, impl="cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", cases.SIZES, ids=str)
def test_no_worse_than_naive(isa: str, size: tuple[int, int, int], bias: bool, dtype: torch.dtype) -> None:
    c = cases.make(*size, dtype, bias=bias)
    got = run(c)
    assert got.dtype == dtype
    cases.check(got, c, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 64, 96), (7, 96, 2), (40, 33, 50), (9, 2100, 160), (0, 8, 4)], ids=str)
def test_gated(isa: str, size: tuple[int, int, int], dtype: torch.dtype) -> None:
    for bias in (False, True):
        c = cases.make(*size, dtype, bias=bias)
        cases.check(run(c, gated=True), c, dtype, gated=True)


def test_float_results_of_bf16(isa: str) -> None:
    c = cases.make(6, 100, 70, torch.bfloat16)
    got = run(c, out_dtype=torch.float32)
    assert got.dtype == torch.float32 and (got - cases.in_dtype(c, torch.float64)).abs().max() < 1e-5
    assert torch.equal(got.bfloat16(), run(c))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_any_batch(isa: str, dtype: torch.dtype) -> None:
    few = isa in ("scalar", "amx_emulated")
    for rows, depth, columns in [(70, 200, 48), (11, 4400, 33)] + ([] if few else [(900, 576, 80)]):
        c = cases.make(rows, depth, columns, dtype)
        packed = pack_linear(c.weight, c.bias)
        whole = linear(c.x, packed, impl="cpu")
        for n in (1, 2, 3, 5, 6, 7, 8, 16, 31, 32, 33, 64):
            for begin in range(0, rows, max(n, rows // 5)):
                part = linear(c.x[begin : begin + n], packed, impl="cpu")
                assert torch.equal(part, whole[begin : begin + n]), (rows, depth, n, begin)


def at_the_edge() -> None:
    """Runs in a process of its own: reading beyond x or the packed weights ends it."""
    for isa in native.usable_isas():
        native.set_isa(isa)
        print(isa, flush=True)
        for rows, depth, columns in [(1, 64, 64), (5, 33, 20), (17, 64, 40), (20, 64, 16), (40, 96, 33), (64, 32, 1)]:
            for dtype in DTYPES:
                c = cases.make(rows, depth, columns, dtype)
                packed = pack_linear(c.weight, c.bias)
                assert packed.data is not None
                edge = packed._replace(data=guarded(packed.data))
                assert torch.equal(linear(guarded(c.x), edge, impl="cpu"), linear(c.x, packed, impl="cpu"))


@pytest.mark.usefixtures("kernels")
def test_nothing_outside_is_read() -> None:
    code = "from tests.ops.test_linear_cpu import at_the_edge; at_the_edge()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


@settings(max_examples=60)
@given(
    st.integers(0, 40), st.integers(1, 70), st.integers(1, 80), st.sampled_from(DTYPES), st.booleans(), st.booleans(),
    st.integers(0, 10**6),
)  # fmt: skip
def test_any_size(rows: int, depth: int, n: int, dtype: torch.dtype, bias: bool, gated: bool, seed: int) -> None:
    if native.available():
        c = cases.make(rows, depth, 2 * n, dtype, bias=bias, seed=seed)
        cases.check(run(c, gated), c, dtype, gated)


@pytest.mark.usefixtures("kernels")
def test_packed_weights_serve_every_instruction_set() -> None:
    c = cases.make(5, 70, 33, torch.bfloat16)
    packed = pack_linear(c.weight, c.bias)
    try:
        for isa in native.usable_isas():
            native.set_isa(isa)
            cases.check(linear(c.x, packed, impl="cpu"), c, torch.bfloat16)
    finally:
        native.set_isa("auto")


@pytest.mark.usefixtures("kernels")
def test_bad_input_is_named() -> None:
    c = cases.make(3, 8, 6)
    packed = pack_linear(c.weight, c.bias)
    bad = {
        "x: shape [3, 7] but [any, 8]": lambda: linear(c.x[:, 1:], packed),
        "x: bfloat16 but float32": lambda: native.call("linear", c.x.bfloat16(), packed.data, 6, False),
        "packed: these are no packed weights": lambda: native.call("linear", c.x, packed.data[:-1], 6, False),
        "packed: gives 6 columns, not 5": lambda: native.call("linear", c.x, packed.data, 5, False),
        "x: elements of the last dimension are apart": lambda: linear(torch.randn(8, 3).T, packed),
        "weight: float16": lambda: native.call("linear_pack", c.weight.half(), None, False),
        "bias: shape [5] but [6]": lambda: native.call("linear_pack", c.weight, c.bias[1:], False),
        "weight: 5 rows; gate and up": lambda: native.call("linear_pack", c.weight[1:], None, True),
    }
    for message, call in bad.items():
        with pytest.raises(RoroError, match=re.escape(message)):
            call()


@pytest.mark.usefixtures("kernels")
def test_registered_ops_pass_opcheck() -> None:
    c = cases.make(3, 8, 6)
    packed = pack_linear(c.weight, c.bias)
    torch.library.opcheck(native.op("linear_pack"), (c.weight, c.bias, True))
    torch.library.opcheck(native.op("linear"), (c.x, packed.data, 6, False))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_fork_and_repeats(dtype: torch.dtype) -> None:
    c = cases.make(50, 576, 960, dtype)
    packed, gated = pack_linear(c.weight, c.bias), pack_linear(c.weight, c.bias, gated=True)
    concurrency.check(lambda: [linear(c.x, p, impl="cpu")[:, ::37] for p in (packed, gated)])
