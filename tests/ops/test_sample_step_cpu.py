"""sample_step in C++ on every instruction set: the shared cases, agreement with the reference, sick rows, bad input."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roro_fast.errors import RoroError
from roro_fast.ops import native
from roro_fast.ops.sample_step import cpu, sample_step
from tests.ops import concurrency
from tests.ops.cases import sample_step as cases

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("vocab", [v for v in cases.VOCABULARIES if v <= 1000])
def test_no_worse_than_naive_and_same_tokens(isa: str, vocab: int, mode: str, dtype: torch.dtype) -> None:
    c = cases.make(33, vocab, mode, dtype)
    cases.check(c, sample_step(*c, impl="cpu"), dtype)


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("vocab", [v for v in cases.VOCABULARIES if v > 1000])
def test_large_vocabularies(isa: str, vocab: int, mode: str) -> None:
    if isa == "amx_emulated":
        pytest.skip("runs the same code as scalar")
    c = cases.make(3, vocab, mode)
    cases.check(c, sample_step(*c, impl="cpu"), torch.float32)


@pytest.mark.usefixtures("kernels")
def test_the_reference_agrees_with_the_cases() -> None:
    for mode in cases.MODES:
        c = cases.make(40, 300, mode)
        cases.check(c, sample_step(*c, impl="reference"), torch.float32)


@settings(max_examples=80)
@given(
    st.integers(1, 700), st.integers(0, 5), st.sampled_from(cases.MODES), st.sampled_from(DTYPES), st.integers(0, 10**6)
)
def test_any_size(vocab: int, n: int, mode: str, dtype: torch.dtype, seed: int) -> None:
    if native.available():
        c = cases.make(n, vocab, mode, dtype, seed)
        cases.check(c, sample_step(*c, impl="cpu"), dtype)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("spread", [0.0, 0.5, 3.0])
@pytest.mark.parametrize(
    ("v", "top_k", "top_p"),
    [
        (1500, 0, 1.0), (1500, 40, 1.0), (1500, 700, 1.0), (1500, 0, 0.95), (1500, 0, 0.999), (1500, 300, 0.5),
        (1500, 0, 0.0), (20000, 40, 1.0), (20000, 70, 0.9), (20000, 0, 0.3),
    ],
)  # fmt: skip
def test_takes_what_the_reference_takes_from_flat_rows_too(spread: float, v: int, top_k: int, top_p: float) -> None:
    """Many equal or near-equal logits: the cut falls among them, ties go to the lowest ids."""
    n = 60
    x = (spread * torch.randn(n, v) * 4).round() / 4
    u, t = torch.rand(n), torch.full((n,), 0.8)
    k, p = torch.full((n,), top_k), torch.full((n,), top_p)
    want, got = (sample_step(x, u, t, k, p, impl=i) for i in ("reference", "cpu"))
    same = want.token == got.token
    kept = cases.truth(cases.Case(x, u, t, k, p)).probs
    cdf = kept.cumsum(-1)
    near = ((cdf.gather(-1, torch.minimum(want.token, got.token)[:, None]).squeeze(-1) - u).abs() < 2e-4) | same
    assert same.float().mean() > 0.9 and bool(near.all()), "differs by more than rounding at a boundary"
    torch.testing.assert_close(got.entropy, want.entropy, atol=2e-5, rtol=2e-5)


def test_sick_rows_are_marked_and_do_not_infect(isa: str) -> None:
    x = torch.randn(6, 300)
    x[1, 37] = float("nan")
    x[2] = float("-inf")
    x[4, 299] = float("inf")
    x[5, :290] = float("-inf")
    args = torch.full((6,), 0.3), torch.ones(6), torch.full((6,), 4), torch.full((6,), 0.9)
    want, got = (sample_step(x, *args, impl=i) for i in ("reference", "cpu"))
    assert got.finite.tolist() == [True, False, False, True, False, True]
    assert torch.equal(want.token, got.token)
    for a, b in zip(want[1:4], got[1:4], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("u", [0.0, 1 - 2**-24])
def test_never_takes_an_impossible_id(isa: str, u: float) -> None:
    x = torch.full((2, 600), float("-inf"))
    x[:, [300, 431]] = torch.tensor([1.0, 0.0])
    for k, p in ((0, 1.0), (5, 1.0), (0, 0.9999), (3, 0.9999)):
        got = sample_step(x, torch.full((2,), u), torch.ones(2), torch.full((2,), k), torch.full((2,), p), impl="cpu")
        assert got.token.tolist() == [300 if u == 0 else 431] * 2 and bool(got.entropy.isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_alone_equals_the_row_in_a_batch(isa: str, dtype: torch.dtype) -> None:
    c = cases.make(9, 777, "mixed", dtype)
    wide = torch.full((9, 900), float("nan"), dtype=dtype)
    wide[:, 3:780] = c.logits
    whole = sample_step(wide[:, 3:780], *c[1:], impl="cpu")  # rows lie apart, and are not aligned
    for i in range(9):
        one = sample_step(*(x[i : i + 1] for x in c), impl="cpu")
        assert all(torch.equal(a[0], b[i]) for a, b in zip(one, whole, strict=True))


BAD = {
    "logits: float64 but float32 or bfloat16": lambda c: c._replace(logits=c.logits.double()),
    "logits: elements of the last dimension are apart": lambda c: c._replace(logits=c.logits.T.contiguous().T),
    "logits: shape [40] but": lambda c: c._replace(logits=c.logits[:, 0]),
    "logits: 0 tokens in the vocabulary": lambda c: c._replace(logits=c.logits[:, :0]),
    "uniforms: shape [39] but [40]": lambda c: c._replace(uniforms=c.uniforms[1:]),
    "temperature: -1 at 3": lambda c: c._replace(temperature=c.temperature.index_fill(0, torch.tensor(3), -1.0)),
    "temperature: nan at 0": lambda c: c._replace(temperature=c.temperature * float("nan")),
    "top_k: int32 but int64": lambda c: c._replace(top_k=c.top_k.int()),
    "top_k: -1 at 0": lambda c: c._replace(top_k=c.top_k * 0 - 1),
    "top_p: float64 but float32": lambda c: c._replace(top_p=c.top_p.double()),
    "top_p: -0.5 at 0": lambda c: c._replace(top_p=c.top_p * 0 - 0.5),
}


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message: str) -> None:
    with pytest.raises(RoroError, match=re.escape(message)):
        cpu(*BAD[message](cases.make(40, 50, "both")))


@pytest.mark.usefixtures("kernels")
def test_registered_op_passes_opcheck() -> None:
    torch.library.opcheck(native.op("sample_step"), tuple(cases.make(5, 50, "both")))
    torch.library.opcheck(native.op("sample_step"), tuple(cases.make(5, 50, "plain")))


@pytest.mark.usefixtures("kernels")
def test_threads_fork_and_repeats() -> None:
    c = cases.make(30, 3000, "mixed")
    concurrency.check(lambda: sample_step(*c, impl="cpu"))
