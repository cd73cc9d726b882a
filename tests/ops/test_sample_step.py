"""Sampling against an independent fp64 construction of the truncated distribution."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from roro_fast.ops.sample_step import sample_step


def truncated(x: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """Probabilities [V] in fp64, one row, by sorting ids as (logit descending, id ascending)."""
    order = np.lexsort((np.arange(len(x)), -x))
    z = x.astype(np.float64) / temperature
    p = np.exp(z - z.max())
    kept = order[: top_k or len(x)]
    p = np.where(np.isin(np.arange(len(x)), kept), p, 0) / p[kept].sum()
    if top_p < 1:
        before = np.cumsum(p[order]) - p[order]
        kept = order[(before < top_p) & (p[order] > 0)]
        p = np.where(np.isin(np.arange(len(x)), kept), p, 0) / p[kept].sum()
    return p


def test_takes_the_id_whose_interval_holds_the_uniform() -> None:
    g = torch.Generator().manual_seed(0)
    n, v = 400, 37
    logits = torch.randn(n, v, generator=g) * 2
    u = torch.rand(n, generator=g)
    temperature = torch.tensor([0.5, 1.0, 1.0, 2.0, 0.0] * 80)
    top_k = torch.tensor([0, 0, 3, 10] * 100)
    top_p = torch.tensor([1.0, 0.7, 0.95, 1.0, 0.3, 1.0, 0.9, 0.01] * 50)
    got = sample_step(logits, u, temperature, top_k, top_p)
    for i in range(n):
        x = logits[i].numpy()
        if temperature[i] == 0:
            assert got.token[i] == x.argmax()
            continue
        p = truncated(x, float(temperature[i]), int(top_k[i]), float(top_p[i]))
        cdf = np.cumsum(p)
        token = int(got.token[i])
        assert p[token] > 0
        assert cdf[token] - p[token] - 1e-5 <= float(u[i]) <= cdf[token] + 1e-5
    logp = logits.double().log_softmax(-1)
    torch.testing.assert_close(got.logprob.double(), logp.gather(1, got.token[:, None])[:, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(got.entropy.double(), -(logp.exp() * logp).sum(1), atol=1e-5, rtol=0)
    torch.testing.assert_close(got.max_prob.double(), logp.exp().amax(1), atol=1e-5, rtol=0)
    assert got.finite.all() and got.token.dtype == torch.int64


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-24])
def test_never_takes_an_impossible_id(u: float) -> None:
    x = torch.tensor([[float("-inf"), 0.0, float("-inf"), 1.0, float("-inf")], [-200.0, 3.0, -200.0, 3.0, -200.0]])
    got = sample_step(x, torch.full((2,), u), torch.ones(2))
    assert set(got.token.tolist()) <= {1, 3} and got.finite.all() and got.entropy.isfinite().all()
    if u == 0.5:
        assert got.token[1] == 3, "an interval holds its lower end"
    assert got.entropy[1] == pytest.approx(math.log(2))


def test_lowest_id_wins_a_tie() -> None:
    x = torch.zeros(3, 6)
    x[1, 2:] = 5
    x[2, [4, 5]] = 1
    assert sample_step(x, torch.full((3,), 0.9), torch.zeros(3)).token.tolist() == [0, 2, 4]
    top = sample_step(x, torch.full((3,), 0.99), torch.ones(3), torch.ones(3, dtype=torch.int64))
    assert top.token.tolist() == [0, 2, 4]


def test_sick_rows_are_marked_and_do_not_infect() -> None:
    x = torch.randn(5, 9)
    want = sample_step(x, torch.full((5,), 0.3), torch.ones(5))
    x[1, 3] = float("nan")
    x[2] = float("-inf")
    x[4, 0] = float("inf")
    got = sample_step(x, torch.full((5,), 0.3), torch.ones(5), torch.full((5,), 4), torch.full((5,), 1.0))
    assert got.finite.tolist() == [True, False, False, True, False]
    assert got.token[[1, 2, 4]].tolist() == [0, 0, 0]
    torch.testing.assert_close(got.logprob[[0, 3]].isfinite(), torch.tensor([True, True]))
    assert torch.equal(want.entropy[[0, 3]], got.entropy[[0, 3]])


def test_a_row_does_not_depend_on_the_settings_of_its_neighbours() -> None:
    """top-p of one row must not cut the far tail of another by rounding."""
    x = torch.zeros(2, 4000)
    x[:, :3990] = -14.0
    u = torch.full((2,), 1 - 2**-24)
    alone = sample_step(x[:1], u[:1], torch.ones(1), None, torch.ones(1))
    together = sample_step(x, u, torch.ones(2), torch.tensor([0, 7]), torch.tensor([1.0, 0.5]))
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a[0], b[0])
    x[:, :3990] = 0.0
    x[:, 0] = 18.0
    u = torch.full((2,), 0.99999)
    alone = sample_step(x[:1], u[:1], torch.ones(1), None, torch.ones(1))
    together = sample_step(x, u, torch.ones(2), None, torch.tensor([1.0, 0.5]))
    assert alone.token[0] == together.token[0] != 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_read_as_fp32(dtype: torch.dtype) -> None:
    x = torch.randn(4, 11).to(dtype)
    a, b = (sample_step(y, torch.full((4,), 0.6), torch.ones(4), impl="reference") for y in (x, x.float()))
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_empty_batch() -> None:
    got = sample_step(
        torch.empty(0, 7), torch.empty(0), torch.empty(0), torch.empty(0, dtype=torch.int64), torch.empty(0)
    )
    assert all(len(t) == 0 for t in got)
