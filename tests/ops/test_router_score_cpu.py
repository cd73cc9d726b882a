"""router_score in C++ on every instruction set: the shared cases, bad input, threads, fork and the dispatcher."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roro_fast.errors import ConfigError, RoroError
from roro_fast.ops import native
from roro_fast.ops.router_score import RouterWeights, cpu, pack_router, router_score
from tests.ops import concurrency
from tests.ops.cases import router_score as cases

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", cases.SIZES, ids=str)
def test_no_worse_than_naive_and_same_actions(isa: str, size: tuple[int, ...], dtype: torch.dtype) -> None:
    c = cases.make(*size, dtype)
    cases.check(c, router_score(*c, impl="cpu"), dtype)
    packed = c._replace(weights=pack_router(c.weights))
    assert packed.weights.packed is not None
    for a, b in zip(router_score(*c, impl="cpu"), router_score(*packed, impl="cpu"), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("temperature", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gather", [False, True])
def test_all_arguments(isa: str, temperature: float, bias: bool, gather: bool) -> None:
    c = cases.make(40, 7, 33, 4, 50, temperature=temperature, bias=bias, gather=gather)
    cases.check(c, router_score(*c, impl="cpu"), torch.float32)


@pytest.mark.parametrize("mixed", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("width", [100, 20, 61])
def test_hidden_and_weights_may_differ_in_type(isa: str, width: int, mixed: tuple[torch.dtype, torch.dtype]) -> None:
    c = cases.make(width, 3, 20, 2, 30, torch.bfloat16)
    c = c._replace(hidden=c.hidden.to(mixed[0]), weights=RouterWeights(*(w.to(mixed[1]) for w in c.weights)))
    cases.check(c, router_score(*c, impl="cpu"), torch.bfloat16)


@settings(max_examples=60)
@given(
    st.integers(0, 90), st.integers(0, 9), st.integers(1, 70), st.integers(1, 9), st.integers(0, 70),
    st.sampled_from(DTYPES), st.integers(0, 10**6),
)  # fmt: skip
def test_any_size(h: int, s: int, d: int, k: int, n: int, dtype: torch.dtype, seed: int) -> None:
    if not native.available() or h + s == 0:
        return
    c = cases.make(h, s, d, k, n, dtype, seed=seed)
    cases.check(c, router_score(*c, impl="cpu"), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_alone_equals_the_row_in_a_batch(isa: str, dtype: torch.dtype) -> None:
    c = cases.make(300, 4, 70, 3, 67, dtype)
    whole = router_score(*c, impl="cpu")
    for i in range(0, 67, 5):
        one = c._replace(rows=c.rows[i : i + 1], signals=c.signals[i : i + 1], uniforms=c.uniforms[i : i + 1])
        one = one._replace(bias=c.bias[i : i + 1])
        assert all(torch.equal(a[0], b[i]) for a, b in zip(router_score(*one, impl="cpu"), whole, strict=True))


def test_rows_may_lie_apart(isa: str) -> None:
    c = cases.make(40, 7, 33, 4, 50, gather=False)
    wide = torch.full((100, 64), float("nan"))
    wide[::2, :40] = c.hidden
    signals = torch.full((50, 9), float("nan"))
    signals[:, 1:8] = c.signals
    got = router_score(*c._replace(hidden=wide[::2, :40], signals=signals[:, 1:8]), impl="cpu")
    assert all(torch.equal(a, b) for a, b in zip(got, router_score(*c, impl="cpu"), strict=True))


@pytest.mark.parametrize("u", [0.0, 1 - 2**-24])
def test_never_takes_an_impossible_action(isa: str, u: float) -> None:
    c = cases.make(0, 1, 2, 3, 4)
    bias = torch.tensor([[float("-inf"), 0.0, float("-inf")]]).expand(4, 3)
    got = router_score(*c._replace(bias=bias, uniforms=torch.full((4,), u)), impl="cpu")
    assert got.action.tolist() == [1] * 4 and got.entropy.tolist() == [0.0] * 4


def test_rounding_never_leads_to_an_impossible_action(isa: str) -> None:
    """Where the cumulative sum rounds to less than the largest uniform, the last possible action is taken."""
    c = cases.make(0, 1, 2, 7, 3000, gather=False)
    c.bias[:, 5:] = float("-inf")
    got = router_score(*c._replace(uniforms=torch.full((3000,), 1 - 2**-24)), impl="cpu")
    assert bool((got.probs.cumsum(-1)[:, -1] <= 1 - 2**-24).any()), "the case arises"
    assert got.action.tolist() == [4] * 3000


BAD = {
    "hidden: shape [25, 20] but [any, 21]": lambda c: c._replace(weights=cases.make(21, 3, 8, 2, 1).weights),
    "hidden: float64": lambda c: c._replace(hidden=c.hidden.double()),
    "hidden: elements of the last dimension are apart": lambda c: c._replace(hidden=c.hidden.T.contiguous().T),
    "rows: row 25 at 3": lambda c: c._replace(rows=c.rows.index_fill(0, torch.tensor(3), 25)),
    "rows: row -1 at 0": lambda c: c._replace(rows=c.rows.index_fill(0, torch.tensor(0), -1)),
    "rows: int32 but int64": lambda c: c._replace(rows=c.rows.int()),
    "signals: shape [19, 3] but [20, 3]": lambda c: c._replace(signals=c.signals[1:]),
    "signals: float64 but float32": lambda c: c._replace(signals=c.signals.double()),
    "uniforms: shape [20, 1] but [20]": lambda c: c._replace(uniforms=c.uniforms[:, None]),
    "bias: shape [20, 3] but [20, 2]": lambda c: c._replace(bias=torch.zeros(20, 3)),
    "temperature: -1": lambda c: c._replace(temperature=-1.0),
    "weights.w1: 23 columns, but weights.norm has 24": lambda c: c._replace(
        weights=c.weights._replace(norm=torch.ones(24))
    ),
    "weights.w2: 65 actions; the kernel takes 1 to 64": lambda c: c._replace(
        weights=c.weights._replace(w2=torch.zeros(65, 8), b2=torch.zeros(65))
    ),
    "weights.b1: shape [8, 1]": lambda c: c._replace(weights=c.weights._replace(b1=c.weights.b1[:, None])),
}


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message: str) -> None:
    c = cases.make(20, 3, 8, 2, 20)
    with pytest.raises(RoroError, match=re.escape(message)):
        router_score(*BAD[message](c), impl="cpu")


@pytest.mark.usefixtures("kernels")
def test_weights_packed_for_another_instruction_set_are_refused() -> None:
    c = cases.make(20, 3, 8, 2, 20)
    native.set_isa("scalar")
    packed = pack_router(c.weights)
    assert all(torch.equal(a, b) for a, b in zip(packed, c.weights, strict=True)), "packed weights are weights"
    try:
        for name in native.usable_isas():
            native.set_isa(name)
            if not name.startswith(("scalar", "amx_emulated")):
                with pytest.raises(RoroError, match=f"packed for another instruction set than {name}"):
                    cpu(*c._replace(weights=packed))
    finally:
        native.set_isa("auto")


@pytest.mark.usefixtures("kernels")
def test_registered_op_passes_opcheck_and_compiles() -> None:
    c = cases.make(20, 3, 8, 2, 20)
    packed = native.op("router_pack")(*c.weights)
    args = (c.hidden, c.rows, c.signals, packed, 2, c.uniforms, c.bias, 1.0, 1e-6)
    torch.library.opcheck(native.op("router_score"), args)
    torch.library.opcheck(native.op("router_pack"), tuple(c.weights))


@pytest.mark.usefixtures("kernels")
def test_threads_fork_and_repeats() -> None:
    c = cases.make(300, 4, 70, 3, 257)
    concurrency.check(lambda: router_score(*c, impl="cpu"))


@pytest.mark.usefixtures("kernels")
def test_a_float16_order_is_refused() -> None:
    c = cases.make(20, 3, 8, 2, 4)
    half = RouterWeights(*(w.half() for w in c.weights))
    with pytest.raises(ConfigError, match="router_score:cpu cannot serve cpu/torch.float16"):
        router_score(*c._replace(weights=half), impl="cpu")
