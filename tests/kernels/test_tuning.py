"""The tuner: a fixed default, a choice that is kept, a damaged cache that does no harm."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from roro_fast.kernels import tuning


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "deep" / "triton.json"
    monkeypatch.setenv("RORO_TUNE_CACHE", str(path))
    monkeypatch.setattr(tuning, "_chosen", None)
    tuning.cache_file.cache_clear()
    yield path
    tuning.cache_file.cache_clear()


def test_the_first_serves_unless_tuning_is_asked_for(device, monkeypatch, cache):
    monkeypatch.delenv("RORO_TUNE", raising=False)
    ran: list[int] = []
    assert tuning.tuned("op", (1,), [7, 8, 9], ran.append, device) == 7
    monkeypatch.setenv("RORO_TUNE", "1")
    assert tuning.tuned("op", (1,), [7, 8, 9], ran.append, torch.device("cpu")) == 7
    assert not ran and not cache.exists()


def test_a_choice_outlives_the_process(cache, monkeypatch):
    tuning._save({"a": 2})
    assert json.loads(cache.read_text()) == {"a": 2} and tuning._table() == {"a": 2}
    assert [p.name for p in cache.parent.iterdir()] == ["triton.json"]


@pytest.mark.parametrize("text", ["", "[1]", '{"a": "b"}', "{"])
def test_a_damaged_file_is_tuned_anew(cache, text):
    cache.parent.mkdir()
    cache.write_text(text)
    assert tuning._table() == {}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="times kernels, which needs a GPU")
def test_the_fastest_is_taken_and_kept(monkeypatch, cache):
    monkeypatch.setenv("RORO_TUNE", "1")
    x = torch.randn(1 << 24, device="cuda")

    def launch(repeats: int) -> None:
        for _ in range(repeats):
            x.mul_(1.0)

    assert tuning.tuned("op", (1,), [20, 1, 10], launch, x.device) == 1
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert tuning.tuned("op", (1,), [20, 1, 10], launch, x.device) == 1
        assert tuning.tuned("op", (2,), [20, 1, 10], launch, x.device) == 20, "no timing inside a capture"
    assert list(json.loads(cache.read_text()).values()) == [1]
