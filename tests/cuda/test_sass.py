"""The machine code of the kernels for sm_90: wide loads, all in flight at once; tensor cores; no spills."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from roro_fast.ops import build_cuda
from tests.cuda import emulator

pytestmark = pytest.mark.slow


def cuobjdump() -> str | None:
    """On PATH, or what Triton brings."""
    spec = importlib.util.find_spec("triton")
    inside = (
        [Path(p) / "backends/nvidia/bin/cuobjdump" for p in (spec.submodule_search_locations or [])] if spec else []
    )
    return shutil.which("cuobjdump") or next((str(p) for p in inside if p.is_file()), None)


@pytest.fixture(scope="module")
def sass() -> dict[str, list[str]]:
    """Instructions of every kernel, by its readable name."""
    compiler, reader, names = build_cuda.nvcc(), cuobjdump(), shutil.which("c++filt")
    for tool, found in (("nvcc", compiler), ("cuobjdump", reader), ("c++filt", names)):
        if not found:
            pytest.skip(f"needs {tool}")
    assert compiler and reader and names
    flags = [f for f in build_cuda.NVCC_FLAGS if not f.startswith("-gencode") and f != "-lineinfo"]
    found: dict[str, list[str]] = {}
    for source in sorted(emulator.CUDA.glob("*.cu")):
        command = [compiler, *flags, "-arch=sm_90", "-cubin", f"-I{build_cuda.CSRC}", str(source)]
        cubin = emulator._made(command, ".cubin", [source, *sorted(emulator.CUDA.glob("*.*h"))])
        text = subprocess.run([reader, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
        text = subprocess.run([names], input=text, capture_output=True, text=True, check=True).stdout
        for part in text.split("Function : ")[1:]:
            name = part.splitlines()[0].replace("(anonymous namespace)::", "").removeprefix("void roro::")
            code = re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?\w+\s+)?([A-Z][^;]*);", part)
            found[name.partition("(")[0]] = code
    return found


def before(code: list[str], first: str) -> list[str]:
    """What is issued before the first instruction that begins with `first`."""
    return code[: next(i for i, line in enumerate(code) if line.startswith(first))]


def loads(code: list[str], kind: str) -> list[str]:
    """Target registers of loads: those of loads that wait for nothing differ."""
    return [line.split()[1] for line in code if line.split()[0] == kind]


def count(code: list[str], name: str) -> int:
    return sum(line.startswith(name) for line in code)


def test_nothing_spills(sass: dict[str, list[str]]) -> None:
    assert len(sass) > 40
    for name, code in sass.items():
        assert not [c for c in code if c.startswith(("LDL", "STL"))], name


@pytest.mark.parametrize("dtype", ["__half", "__nv_bfloat16"])
def test_router_score_issues_every_row_before_the_first_product(dtype: str, sass: dict[str, list[str]]) -> None:
    code = sass[f"router_score_kernel<{dtype}, {dtype}, true>"]
    rows = loads(before(code, "HMMA"), "LDG.E.128")[:16]  # 64 rows of 64 inputs per warp
    assert len(rows) == len(set(rows)) == 16
    assert count(code, "HMMA.16816.F32") == 32


@pytest.mark.parametrize("dtype", ["float", "__half", "__nv_bfloat16"])
def test_router_score_in_float32_multiplies_on_tensor_cores(dtype: str, sass: dict[str, list[str]]) -> None:
    code = sass[f"router_score_kernel<{dtype}, float, true>"]
    # rows x inputs x (3 or 2 products of split factors)
    assert count(code, "HMMA.1688.F32.TF32") == (96 if dtype == "float" else 128)
    rows = loads(before(code, "HMMA"), "LDG.E.128")[:16]
    assert len(rows) == len(set(rows)) == 16


@pytest.mark.parametrize("types", ["__half, __half", "__nv_bfloat16, __nv_bfloat16", "float, float"])
def test_judge_score_has_four_wide_loads_in_flight(types: str, sass: dict[str, list[str]]) -> None:
    code = sass[f"judge_verdicts_kernel<{types}, 2, true>"]
    row = loads(before(code, "LDS"), "LDG.E.128")[-4:]
    assert len(row) == len(set(row)) == 4
    assert count(code, "LDS.128") >= 8 and count(before(code, "LDS"), "FFMA") == 0


def test_kv_copy_moves_16_bytes_four_in_flight(sass: dict[str, list[str]]) -> None:
    code = sass["kv_copy_kernel<uint4, uint4, 1>"]
    span = loads(before(code, "STG"), "LDG.E.128.CONSTANT")
    assert len(span) == len(set(span)) == 4
    assert count(code, "STG") == count(code, "STG.E.128") == 4
