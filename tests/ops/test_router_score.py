"""The routing MLP against a spelled-out fp64 computation."""

from __future__ import annotations

import pytest
import torch

from roro_fast.ops.router_score import RouterWeights, logits_of, router_score


def weights(h: int, s: int, d: int, k: int, seed: int = 0) -> RouterWeights:
    g = torch.Generator().manual_seed(seed)
    shapes = [(h,), (d, h + s), (d,), (k, d), (k,)]
    return RouterWeights(*(torch.randn(x, generator=g) for x in shapes))


def truth(
    hidden: torch.Tensor, signals: torch.Tensor, w: RouterWeights, bias: torch.Tensor | float, t: float
) -> torch.Tensor:
    x = hidden.double()
    if x.shape[1]:
        x = x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt() * w.norm.double()
    x = torch.cat((x, signals.double()), 1) @ w.w1.double().T + w.b1.double()
    z = (x * torch.sigmoid(x)) @ w.w2.double().T + w.b2.double()
    return (z + bias).div(t).softmax(-1)


@pytest.mark.parametrize("h", [0, 5, 64])
@pytest.mark.parametrize("k", [2, 5])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_equals_the_formula(h: int, k: int, temperature: float) -> None:
    w, n = weights(h, 7, 16, k), 50
    hidden, signals, u, bias = torch.randn(80, h), torch.randn(n, 7), torch.rand(n), torch.randn(n, k)
    rows = torch.randperm(80)[:n]
    got = router_score(hidden, rows, signals, w, u, bias, temperature)
    p = truth(hidden[rows], signals, w, bias, temperature)
    torch.testing.assert_close(got.probs.double(), p, atol=1e-5, rtol=0)
    torch.testing.assert_close(got.entropy.double(), -(p * p.log()).sum(1), atol=1e-5, rtol=0)
    torch.testing.assert_close(got.logprob.double(), p.gather(1, got.action[:, None])[:, 0].log(), atol=1e-4, rtol=0)
    high = p.cumsum(1).gather(1, got.action[:, None])[:, 0]
    low = high - p.gather(1, got.action[:, None])[:, 0]
    assert ((low - 1e-5 <= u) & (u <= high + 1e-5)).all()
    assert len(set(got.action.tolist())) == k


def test_temperature_zero_is_greedy_and_rows_none_is_all() -> None:
    w = weights(4, 3, 8, 3)
    hidden, signals = torch.randn(20, 4), torch.randn(20, 3)
    got = router_score(hidden, None, signals, w, torch.full((20,), 0.999), None, 0.0)
    assert torch.equal(got.action, got.logits.argmax(1))
    same = router_score(hidden, torch.arange(20), signals, w, torch.zeros(20), None, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(got, same, strict=True))


@pytest.mark.parametrize("u", [0.0, 1 - 2**-24])
def test_never_takes_an_impossible_action(u: float) -> None:
    w = weights(0, 1, 2, 3)
    bias = torch.tensor([[float("-inf"), 0.0, float("-inf")]]).expand(4, 3)
    got = router_score(torch.empty(4, 0), None, torch.zeros(4, 1), w, torch.full((4,), u), bias)
    assert got.action.tolist() == [1] * 4


def test_rows_are_independent_and_empty_is_allowed() -> None:
    w = weights(6, 2, 8, 2)
    hidden, signals, u = torch.randn(9, 6), torch.randn(9, 2), torch.rand(9)
    whole = router_score(hidden, None, signals, w, u)
    for i in range(9):
        one = router_score(hidden, torch.tensor([i]), signals[i : i + 1], w, u[i : i + 1])
        torch.testing.assert_close(one.probs[0], whole.probs[i])
        assert one.action[0] == whole.action[i]
    none = router_score(hidden, torch.empty(0, dtype=torch.int64), signals[:0], w, u[:0])
    assert none.probs.shape == (0, 2) and len(none.action) == 0


def test_training_differentiates_what_is_served() -> None:
    w = weights(6, 2, 8, 2)
    for t in w:
        t.requires_grad_(True)
    hidden, signals = torch.randn(9, 6), torch.randn(9, 2)
    z = logits_of(hidden, signals, w)
    served = router_score(hidden, None, signals, w, torch.rand(9))
    assert torch.equal(z, served.logits) and served.logprob.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(z, router_score(hidden, None, signals, w, torch.rand(9)).logits)
    z.logsumexp(-1).sum().backward()
    assert all(t.grad is not None and t.grad.abs().sum() > 0 for t in w)
