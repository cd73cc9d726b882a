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


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the native ops that are called, as they are."""
    monkeypatch.delenv("RORO_IMPL", raising=False)
    out: list[str] = []
    call = native.call
    monkeypatch.setattr(native, "call", lambda name, *args: (out.append(name), call(name, *args))[1])
    return out


def both(
    p: PolicyNetwork, b: BoundaryBatch, calls: list[str], monkeypatch: pytest.MonkeyPatch, fuses: bool = True
) -> tuple[Decisions, Decisions]:
    """What the policy decides as it is, by the one call if it `fuses`, and with the reference op."""
    p.packed_weights()
    calls.clear()
    found = p.decide(b)
    assert ("route" in calls) == fuses
    with monkeypatch.context() as m:
        m.setenv("RORO_IMPL", "router_score=reference")
        calls.clear()
        apart = p.decide(b)
        assert calls == []
    return found, apart


def same(fused: Decisions, apart: Decisions, atol: float = 2e-5) -> None:
    torch.testing.assert_close(fused.features, apart.features, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(fused.probs, apart.probs, atol=atol, rtol=5 * atol)
    assert torch.equal(fused.actions, apart.actions)
    torch.testing.assert_close(fused.logprobs, apart.logprobs, atol=atol, rtol=5 * atol)


@pytest.mark.parametrize("hidden", [0, 5, 64])
@pytest.mark.parametrize("n", [1, 7, 130])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_the_same_decisions(hidden, n, temperature, calls, monkeypatch) -> None:
    p = policy(hidden, calibration=[(0.2, 1.5), (0.9, -1.0)])
    p.temperature = temperature
    fused, apart = both(p, scouted(n, hidden), calls, monkeypatch)
    same(fused, apart)
    assert fused.features.shape == (n, hidden + len(SIGNALS))


@pytest.mark.parametrize("isa", native.usable_isas() if native.available() else [])
def test_every_instruction_set(isa, calls, monkeypatch) -> None:
    native.set_isa(isa)
    try:
        same(*both(policy(64), scouted(9, 64), calls, monkeypatch))
    finally:
        native.set_isa("auto")


def test_a_row_alone_equals_the_row_in_a_batch() -> None:
    p, b = policy(5), scouted(7, 5)
    whole = p.decide(b)
    for i in range(7):
        part = BoundaryBatch(
            b.ints[:, i : i + 1].contiguous(), b.floats[:, i : i + 1].contiguous(), b.step_cap, 3, [], [],
            b.scout_entropy[i : i + 1], b.scout_maxprob[i : i + 1], b.hidden[i : i + 1],
        )  # fmt: skip
        one = p.decide(part)
        assert torch.equal(one.features[0], whole.features[i]) and one.actions[0] == whole.actions[i]
        assert torch.equal(one.probs[0], whole.probs[i])


def test_without_a_scout_or_rows(calls, monkeypatch) -> None:
    for drop in (("scout_entropy", "scout_maxprob"), ("scout_maxprob",), ("scout_entropy",)):
        b = scouted(4, 0)
        for name in drop:
            setattr(b, name, None)
        fused, apart = both(policy(0), b, calls, monkeypatch)
        same(fused, apart)
        assert fused.features[:, -2:].abs().max() == 0, "one of the two is as good as none"
    none = policy(0).decide(batch(0, 3))
    assert none.probs.shape == (0, 3) and none.features.shape == (0, len(SIGNALS))


def test_other_types_and_layouts_go_the_long_way(calls, monkeypatch) -> None:
    odd = {
        "ints": lambda x: x.repeat_interleave(2, 1)[:, ::2],
        "hidden": lambda x: x.to(torch.bfloat16),
        "scout_entropy": lambda x: x.to(torch.bfloat16),
    }
    for name, changed in odd.items():
        b = scouted(6, 8)
        setattr(b, name, changed(getattr(b, name)))
        found, apart = both(policy(8), b, calls, monkeypatch, fuses=False)
        torch.testing.assert_close(found.probs, apart.probs, atol=2e-5, rtol=1e-4)
    without = PolicyNetwork(PolicyConfig(num_models=3, hidden_size=8, use_signals=False))
    both(without, scouted(6, 8), calls, monkeypatch, fuses=False)


def test_bfloat16_weights(calls, monkeypatch) -> None:
    p = policy(64).bfloat16()
    fused, apart = both(p, scouted(9, 64), calls, monkeypatch)
    torch.testing.assert_close(fused.probs, apart.probs, atol=0.05, rtol=0)


def test_states_of_another_width_are_refused() -> None:
    b = scouted(6, 8)
    with pytest.raises(ConfigError, match=r"router\.hidden: policy wants scout states of width 9, got 8"):
        policy(9).decide(b)


def test_registered_op_passes_opcheck() -> None:
    b, packed = scouted(4, 5), policy(5).packed_weights().packed
    torch.library.opcheck(
        native.op("route"),
        (b.ints, b.floats, 16, b.scout_entropy, b.scout_maxprob, b.hidden, packed, 3, torch.zeros(4, 3), 1.0),
    )


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
