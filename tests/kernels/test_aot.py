"""Every GPU kernel compiles for sm_80 and sm_90 and fits; the driver tells good from bad; the table is up to date."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import aot, aot_cuda


def run(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.aot", *args]
    return subprocess.run(command, cwd=aot.ROOT, capture_output=True, text=True, timeout=1700)


def test_the_driver_names_every_fault(tmp_path: Path) -> None:
    out = tmp_path / "aot.json"
    done = run("--module", "tests.kernels.aot_faults", "--out", str(out))
    assert done.returncode == 1
    table = json.loads(out.read_text())
    said = {
        name: [f for f in table["faults"] if f"[{name}] sm_90" in f] for name in {r["name"] for r in table["kernels"]}
    }
    assert said.pop("right") == said.pop(f"{aot.ONES} 0") == []
    assert {name: len(found) for name, found in said.items()} == dict.fromkeys(said, 1)
    for name, words in {
        "spills": "spills",
        "too much shared memory": "B of shared memory, sm_90 has 232448",
        "no matrix instruction": "no tensor-core instruction",
        "argument forgotten": "['n'] not given",
    }.items():
        assert words in said[name][0]


def test_ptxas_output_is_read() -> None:
    log = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4sum3PKf' for 'sm_80'
ptxas info    : Function properties for _Z4sum3PKf
    24 bytes stack frame, 16 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 58 registers, used 1 barriers, 24 bytes cumulative stack size, 2048 bytes smem, 912 bytes cmem[0]
"""
    (record,) = aot_cuda.parse(log)
    assert (record["arch"], record["registers"], record["shared"]) == (80, 58, 2048)
    assert aot.faults(record) == ["spills 16 B out and 8 B in"]


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a minute and a half where nothing else runs
def test_every_kernel_compiles_and_fits(tmp_path: Path) -> None:
    if aot_cuda.find_nvcc() is None:
        pytest.skip(aot_cuda.HOW_TO_GET_NVCC)
    out = tmp_path / "aot.json"
    done = run("--out", str(out))
    assert done.returncode == 0, done.stderr
    fresh, committed = (json.loads(p.read_text())["kernels"] for p in (out, aot.OUT))
    assert {aot.label(r) for r in fresh} == {aot.label(r) for r in committed}, "run `make aot` and commit its table"
