"""The router's one-call path on CPU against signals, concatenation and scoring one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from roro_fast.engine import BoundaryBatch, Decisions
from roro_fast.errors import ConfigError, RoroError
from roro_fast.ops import native
from roro_fast.routing import PolicyConfig, PolicyNetwork
from roro_fast.routing.state import SIGNALS
from tests.routing.batches import batch

pytestmark = pytest.mark.skipif(not native.available(), reason="needs the C++ kernels")


def scouted(n: int, hidden: int, **columns: Any) -> BoundaryBatch:
    g = torch.Generator().manual_seed(n + hidden)
    made = batch(n, 3, hidden, seed=n, last_model=torch.arange(n) % 3 - 1, budget=torch.rand(n, generator=g), **columns)
    made.scout_entropy, made.scout_maxprob = torch.rand(n, generator=g), torch.rand(n, generator=g)
    return made


def policy(hidden: int, **config: Any) -> PolicyNetwork:
    out = PolicyNetwork(PolicyConfig(num_models=3, hidden_size=hidden, width=16, **config), bias=0.3)
    with torch.no_grad():
        for p in out.parameters():
            p += 0.5 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return out


def both(p: PolicyNetwork, b: BoundaryBatch, monkeypatch: pytest.MonkeyPatch) -> tuple[Decisions, Decisions]:
    fused = p.decide(b)
    with monkeypatch.context() as m:
        m.setenv("RORO_IMPL", "router_score=reference")
        return fused, p.decide(b)


@pytest.mark.parametrize("hidden", [0, 5, 64])
@pytest.mark.parametrize("n", [1, 7, 130])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_the_same_decisions(hidden, n, temperature, monkeypatch) -> None:
    p = policy(hidden, calibration=[(0.2, 1.5), (0.9, -1.0)])
    p.temperature = temperature
    calls: list[str] = []
    call = native.call
    monkeypatch.setattr(native, "call", lambda name, *args: (calls.append(name), call(name, *args))[1])
    fused, apart = both(p, scouted(n, hidden), monkeypatch)
    assert calls[-1] == "route", "one call, and none of the reference"
    torch.testing.assert_close(fused.features, apart.features, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(fused.probs, apart.probs, atol=2e-5, rtol=1e-4)
    assert torch.equal(fused.actions, apart.actions)
    torch.testing.assert_close(fused.logprobs, apart.logprobs, atol=2e-5, rtol=1e-4)
    assert fused.features.shape == (n, hidden + len(SIGNALS))


def test_without_a_scout_or_rows(monkeypatch) -> None:
    b = batch(4, 3)
    fused, apart = both(policy(0), b, monkeypatch)
    torch.testing.assert_close(fused.features, apart.features, atol=1e-6, rtol=1e-6)
    assert fused.features[:, -2:].abs().max() == 0
    none = policy(0).decide(batch(0, 3))
    assert none.probs.shape == (0, 3) and none.features.shape == (0, len(SIGNALS))


def test_states_of_another_type_or_layout(monkeypatch) -> None:
    b = scouted(6, 8)
    b.hidden = b.hidden.t().contiguous().t().to(torch.bfloat16)
    fused, apart = both(policy(8), b, monkeypatch)
    torch.testing.assert_close(fused.probs, apart.probs, atol=2e-5, rtol=1e-4)
    with pytest.raises(ConfigError, match=r"router\.hidden: policy wants scout states of width 9, got 8"):
        policy(9).decide(b)


def test_what_does_not_fit_is_named() -> None:
    b, packed = batch(4, 3), policy(0).packed_weights().packed
    good = [b.ints, b.floats, 16, None, None, None, packed, 3, None, 1.0]
    for at, value, says in (
        (0, b.ints[:2], "ints: shape"),
        (0, b.ints.int(), "ints: int32 but int64"),
        (1, b.floats[:, :3].contiguous(), r"floats: shape \[9, 3\] but \[9, 4\]"),
        (1, b.floats.t().contiguous().t(), "floats: not contiguous"),
        (3, torch.rand(3), "scout_entropy: shape"),
        (5, torch.rand(4, 5), "hidden: given, but weights were packed for 0"),
        (7, 2, "weights: packed for 3 actions, not 2"),
        (8, torch.zeros(4, 2), "bias: shape"),
        (9, -1.0, "temperature: -1 is negative"),
    ):
        with pytest.raises(RoroError, match=says):
            native.call("route", *good[:at], value, *good[at + 1 :])
    other = PolicyNetwork(PolicyConfig(hidden_size=4, use_signals=False)).packed_weights().packed
    with pytest.raises(RoroError, match="packed for 0 signals, not 14"):
        native.call("route", *good[:6], other, 2, *good[8:])
