"""Loading `_C` and choosing its instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from roro_fast.errors import RoroError
from roro_fast.ops import native

ROOT = Path(__file__).resolve().parents[2]


def run(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def test_the_kernels_are_there_where_they_are_required() -> None:
    if os.environ.get("RORO_REQUIRE_EXT", "") in ("", "0"):
        pytest.skip("RORO_REQUIRE_EXT is not set")
    assert native.available(), native.why_not()


@pytest.mark.usefixtures("kernels")
def test_the_environment_chooses_the_instruction_set() -> None:
    show = "from roro_fast.ops import native; print(native.isa())"
    assert run(show, RORO_ISA="scalar").stdout.strip() == "scalar"
    assert run(show, RORO_ISA="auto").stdout.strip() == native.usable_isas()[-2]
    refused = run(show, RORO_ISA="mmx")
    assert refused.returncode and "RORO_ISA: 'mmx' is no instruction set; use auto or one of scalar" in refused.stderr
    lacking = {"avx2", "avx512", "avx512_bf16", "amx"} - set(native.usable_isas())
    for name in lacking:
        assert f"RORO_ISA: this CPU has no {name}" in run(show, RORO_ISA=name).stderr


@pytest.mark.usefixtures("kernels")
def test_an_unknown_instruction_set_changes_nothing() -> None:
    before = native.isa()
    with pytest.raises(RoroError, match="isa: 'neon' is no instruction set"):
        native.set_isa("neon")
    assert native.isa() == before


def test_without_the_extension_the_reference_serves_and_says_why(tmp_path: Path) -> None:
    code = f"""
import pathlib, sys, torch
import roro_fast.ops.native as native
native.__file__ = {str(tmp_path / "roro_fast" / "ops" / "native.py")!r}
from roro_fast.ops import registry
import roro_fast.ops.router_score
device = torch.device("cpu")
assert registry.select("router_score", device, torch.float32).__name__ == "reference"
registry.select("router_score", device, torch.float32, "cpu")
"""
    p = run(code, RORO_REQUIRE_EXT="0")
    assert "router_score:cpu cannot serve cpu/torch.float32: roro_fast._C is not built" in p.stderr
    p = run(code, RORO_REQUIRE_EXT="1")
    assert "RORO_REQUIRE_EXT: roro_fast._C is not built" in p.stderr


@pytest.mark.usefixtures("kernels")
def test_only_cpu_tensors_are_served() -> None:
    check = native.usable(torch.float32)
    assert check(torch.device("cpu"), torch.float32) == (True, "")
    assert check(torch.device("meta"), torch.float32) == (False, "serves CPU tensors, not meta")
    assert check(torch.device("cpu"), torch.float16) == (False, "torch.float16 is not one of float32")
