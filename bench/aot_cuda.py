"""Compile csrc/cuda/*.cu with nvcc for several architectures and read what ptxas says about every kernel."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "aot"
FLAGS = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC", "-lineinfo", "-Xptxas", "-v,-warn-spills", f"-I{ROOT / 'csrc'}"]
HOW_TO_GET_NVCC = """aot: no nvcc on PATH, in CUDA_HOME, or among the installed packages. Without a CUDA toolkit:
  pip install nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 \\
              nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85"""

_ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\d+)a?'")
_SPILL = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(.*)")


def find_nvcc() -> str | None:
    """On PATH, under CUDA_HOME, or in the nvidia packages of this Python."""
    import os

    candidates = [shutil.which("nvcc"), os.path.join(os.environ.get("CUDA_HOME", ""), "bin", "nvcc")]
    spec = importlib.util.find_spec("nvidia")
    for base in (spec.submodule_search_locations or []) if spec else []:
        candidates += map(str, sorted(Path(base).glob("cu*/bin/nvcc"), reverse=True))
    return next((c for c in candidates if c and Path(c).is_file()), None)


def versions(nvcc: str | None) -> dict[str, str]:
    found = {}
    try:
        found["triton"] = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        found["triton"] = "absent"
    if nvcc:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        release = re.search(r"V([\d.]+)", text)
        found["nvcc"] = release[1] if release else "unknown"
    return found


def compile_cuda(nvcc: str, source: Path, archs: tuple[int, ...], timeout: float) -> list[dict[str, Any]]:
    """One record per kernel and architecture of one file; its object goes to build/aot."""
    BUILD.mkdir(parents=True, exist_ok=True)
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    command = [nvcc, *FLAGS, *targets, "-c", str(source), "-o", str(BUILD / f"{source.stem}.o")]
    broken = {"file": source.name, "kernel": "-", "name": "-", "arch": 0}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return [broken | {"error": f"did not compile within {timeout:.0f} s"}]
    if done.returncode:
        return [broken | {"error": done.stderr.strip()[-800:]}]
    return [{"file": source.name, **record} for record in parse(done.stderr)]


def parse(log: str) -> Iterator[dict[str, Any]]:
    """`ptxas -v` names an entry, then its stack and spills, then its registers and static shared memory."""
    entry = spill = None
    for line in log.splitlines():
        if found := _ENTRY.search(line):
            entry = found
        elif entry and (found := _SPILL.search(line)):
            spill = found
        elif entry and spill and (found := _USED.search(line)):
            shared = re.search(r"(\d+) bytes smem", found[2])
            yield {
                "kernel": demangle(entry[1]),
                "name": "",
                "arch": int(entry[2]),
                "registers": int(found[1]),
                "spill_stores": int(spill[2]),
                "spill_loads": int(spill[3]),
                "shared": int(shared[1]) if shared else 0,
                "matrix": {},
            }
            entry = spill = None


def demangle(name: str) -> str:
    tool = shutil.which("c++filt")
    if tool is None:
        return name
    text = subprocess.run([tool, "-p", name], capture_output=True, text=True, check=True).stdout.strip()
    return text.removeprefix("void ").replace("(anonymous namespace)::", "").replace("roro::", "")
