"""Ranges cost nothing that matters when nobody profiles, nest, and show up in a torch trace when asked."""

from __future__ import annotations

import importlib.util
import time

import pytest
import torch

from roro_fast import profiling
from roro_fast.errors import ConfigError
from roro_fast.profiling import mark


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RORO_PROFILE", raising=False)
    mark.cache_clear()
    yield
    mark.cache_clear()


def test_a_range_is_made_once_per_name_and_passes_exceptions() -> None:
    assert mark("sample") is mark("sample") is not mark("route")
    with pytest.raises(ZeroDivisionError), mark("forward/large"), mark("sample"):
        raise ZeroDivisionError
    if importlib.util.find_spec("nvtx"):
        assert isinstance(mark("sample"), profiling._Nvtx)


def test_an_unwatched_range_costs_microseconds_at_most() -> None:
    def seconds() -> float:
        start = time.perf_counter()
        for _ in range(1000):
            with mark("sample"):
                pass
        return time.perf_counter() - start

    assert min(seconds() for _ in range(20)) < 5e-3  # 1000 ranges; an iteration of the engine has about ten


def test_an_unknown_kind_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RORO_PROFILE", "nsight")
    with pytest.raises(ConfigError, match="RORO_PROFILE: 'nsight'; use nvtx, torch, times or off"):
        mark("sample")
    monkeypatch.setenv("RORO_PROFILE", "off")
    assert isinstance(mark("sample"), profiling._Silent)


def test_times_add_up_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RORO_PROFILE", "times")
    before = profiling.seconds()
    for _ in range(2):
        with mark("forward/timed"), mark("sample/timed"):
            time.sleep(0.01)
    spent = {k: v - before.get(k, 0.0) for k, v in profiling.seconds().items()}
    assert 0.02 <= spent["sample/timed"] <= spent["forward/timed"] < 1


def test_ranges_reach_a_torch_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RORO_PROFILE", "torch")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as p:
        for _ in range(2):
            with mark("forward/small"), mark("sample"):
                torch.ones(3).sum()
    counts = {e.key: e.count for e in p.key_averages()}
    assert counts["forward/small"] == counts["sample"] == 2
