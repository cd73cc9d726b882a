"""Loading and building the CUDA kernels: what is said when something is missing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from roro_fast.errors import ConfigError
from roro_fast.ops import build_cuda, native_cuda
from roro_fast.ops.registry import implementations, select

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _reload() -> Iterator[None]:
    native_cuda._load.cache_clear()
    yield
    native_cuda._load.cache_clear()


def test_serves_gpus_only() -> None:
    assert native_cuda.usable(CPU, torch.float32) == (False, "serves CUDA tensors, not cpu")
    assert "float64 is not one of" in native_cuda.usable(GPU, torch.float64)[1]
    for op in ("router_score", "judge_score", "kv_copy", "kv_copy_pages"):
        __import__(f"roro_fast.ops.{'kv_handoff' if op.startswith('kv') else op}")
        assert "cuda" in [i.name for i in implementations(op)]
        with pytest.raises(ConfigError, match=f"{op}:cuda cannot serve cpu"):
            select(op, CPU, torch.float32, "cuda")


def test_a_library_that_is_not_built_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build_cuda, "LIBRARY", tmp_path / "_cuda.so")
    assert "python -m roro_fast.ops.build_cuda" in native_cuda.why_not()
    with pytest.raises(ConfigError, match="not built"):
        native_cuda.op.__wrapped__("router_score")


def test_a_library_that_does_not_load_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "_cuda.so"
    path.write_bytes(b"not a library")
    monkeypatch.setattr(build_cuda, "LIBRARY", path)
    assert "_cuda.so does not load" in native_cuda.why_not()


def test_a_library_of_other_sources_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    if not build_cuda.LIBRARY.is_file():
        pytest.skip("roro_fast/_cuda.so is not built")
    monkeypatch.setattr(build_cuda, "fingerprint", lambda: "0123456789abcdef")
    assert "is older than csrc" in native_cuda.why_not()


def test_building_without_nvcc_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build_cuda, "nvcc", lambda: None)
    with pytest.raises(RuntimeError, match="nvcc is missing.*pip install nvidia-cuda-nvcc"):
        build_cuda.build(tmp_path / "_cuda.so")
    monkeypatch.setenv("RORO_BUILD_CUDA", "1")
    monkeypatch.setattr(build_cuda, "LIBRARY", tmp_path / "_cuda.so")
    assert "do not build: nvcc is missing" in native_cuda.why_not()


def test_the_fingerprint_follows_the_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cpu").mkdir()
    for name in ("cuda/a.cu", "cuda/device.cuh", "cuda/api.h", "bind_torch_cuda.cpp", "bind_torch.h", "cpu/types.h"):
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(build_cuda, "CSRC", tmp_path)
    seen = {build_cuda.fingerprint()}
    for name in ("cuda/a.cu", "cuda/device.cuh", "cuda/api.h", "bind_torch_cuda.cpp", "bind_torch.h", "cpu/types.h"):
        (tmp_path / name).write_text("changed")
        seen.add(build_cuda.fingerprint())
    assert len(seen) == 7
    monkeypatch.setattr(build_cuda, "CSRC", tmp_path / "absent")
    assert build_cuda.fingerprint() == ""
