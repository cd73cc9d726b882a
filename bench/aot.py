"""Compile every GPU kernel without a GPU, and refuse the ones that spill or do not fit.

    python -m bench.aot [--out bench/results/aot.json] [--only router_score]

Triton kernels: every `AOT` configuration of kernels/*.py, in a fresh process and cache. CUDA: every csrc/cuda/*.cu with
nvcc. Both for sm_80 and sm_90. Registers, spills, shared memory and tensor-core instructions go to a JSON table;
spills, more shared memory than the device has, or missing tensor-core instructions end with exit code 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench import aot_cuda

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "bench" / "results" / "aot.json"
ARCHS = (80, 90)
ONES = "integers of 1"  # a configuration that must compile, and is for no real shape
SHARED_LIMIT = {80: 166_912, 90: 232_448}  # bytes one block may use


def triton_files() -> list[str]:
    """Modules of kernels/*.py that list configurations."""
    found = [p for p in sorted((ROOT / "kernels").glob("*.py")) if "\nAOT" in p.read_text(encoding="utf-8")]
    return [f"roro_fast.kernels.{p.stem}" for p in found]


def faults(record: dict[str, Any]) -> list[str]:
    """What is wrong with one compiled kernel, in words."""
    if "error" in record:
        return [record["error"]]
    bad: list[str] = []
    if record["name"].startswith(ONES):
        return bad
    if record["spill_stores"] or record["spill_loads"]:
        bad.append(f"spills {record['spill_stores']} B out and {record['spill_loads']} B in")
    limit = SHARED_LIMIT[record["arch"]]
    if record["shared"] > limit:
        bad.append(f"needs {record['shared']} B of shared memory, sm_{record['arch']} has {limit}")
    if record.get("needs_matrix") and not record["matrix"]:
        bad.append("no tensor-core instruction")
    return bad


def label(record: dict[str, Any]) -> str:
    return f"{record['file']} {record['kernel']} [{record['name']}] sm_{record['arch']}"


def compile_triton(module: str, timeout: float) -> list[dict[str, Any]]:
    """All configurations of one module, in a process of its own."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    broken = {"file": module, "kernel": "-", "name": "-", "arch": 0}
    with tempfile.TemporaryDirectory(prefix="roro-aot-") as folder:
        env |= {"TRITON_CACHE_DIR": folder, "TRITON_DEFAULT_FP_FUSION": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "bench.aot_triton", module, *map(str, ARCHS)]
        try:
            done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            return [broken | {"error": f"did not compile within {timeout:.0f} s"}]
    if done.returncode:
        return [broken | {"error": done.stderr.strip()[-800:] or f"exit code {done.returncode}"}]
    records: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return records


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--only", help="one op: the stem of its files")
    parser.add_argument("--module", help="a Python module with an AOT table, instead of kernels/ and csrc/cuda/")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one file; an absurd tile takes minutes")
    args = parser.parse_args(argv)
    modules = [args.module] if args.module else triton_files()
    sources = [] if args.module else sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    if args.only:
        modules = [m for m in modules if m.rpartition(".")[2] == args.only]
        sources = [s for s in sources if s.stem == args.only]
    nvcc = aot_cuda.find_nvcc() if sources else None
    if sources and nvcc is None:
        print(aot_cuda.HOW_TO_GET_NVCC, file=sys.stderr)
        return 1
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(compile_triton, m, args.timeout) for m in modules]
        jobs += [pool.submit(aot_cuda.compile_cuda, nvcc, s, ARCHS, args.timeout) for s in sources if nvcc]
        records = sorted((r for j in jobs for r in j.result()), key=label)
    bad = [f"{label(r)}: {fault}" for r in records for fault in faults(r)]
    for r in records:
        if "error" not in r:
            print(f"{label(r):90s} {r['registers']:4d} regs {r['shared']:7d} B shared  {r['matrix'] or ''}")
    table = {"versions": aot_cuda.versions(nvcc), "kernels": records, "faults": bad}
    if not args.only and not args.module or args.out != OUT:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        part = args.out.with_name(args.out.name + ".part")
        part.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        part.replace(args.out)
    print(f"aot: {len(records)} kernels for {' and '.join(f'sm_{a}' for a in ARCHS)}, {len(bad)} faults")
    for fault in bad:
        print(f"aot: {fault}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
