"""Compile the AOT table of one module: `python -m bench.aot_triton MODULE ARCH...`; the last line is JSON."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from bench.aot import ONES

MATRIX = ("HGMMA", "HMMA", "IMMA")


def compile_one(spec: Any, arch: int) -> Any:
    names = spec.kernel.arg_names
    missing = set(names) ^ {*spec.args, *spec.meta}
    if missing:
        raise ValueError(f"AOT table of {spec.kernel.__name__}: {sorted(missing)} not given, or unknown")
    place = {n: (i,) for i, n in enumerate(names)}  # Triton keys arguments by their path
    source = ASTSource(
        fn=spec.kernel,
        signature={n: spec.args[n].removesuffix(":16") if n in spec.args else "constexpr" for n in names},
        constexprs={place[n]: v for n, v in spec.meta.items()},
        attrs={place[n]: [["tt.divisibility", 16]] for n, t in spec.args.items() if t.endswith(":16")},
    )
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    with contextlib.redirect_stdout(io.StringIO()):  # on an error Triton prints the whole PTX
        return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def measure(kernel: Any, arch: int) -> dict[str, Any]:
    """Registers and spills from ptxas, tensor-core instructions from the disassembly, shared memory from Triton."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "k.ptx"), Path(folder, "k.cubin")
        ptx.write_text(kernel.asm["ptx"])
        cubin.write_bytes(kernel.asm["cubin"])
        target = re.search(r"\.target (\w+)", kernel.asm["ptx"])
        assert target
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={target[1]}", ptx, "-o", Path(folder, "again.cubin")]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        sass = subprocess.run([tools / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True).stdout
    spill = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    used = re.search(r"Used (\d+) registers", log)
    assert spill and used, log
    counts = {name: len(re.findall(rf"\b{name}\b", sass)) for name in MATRIX}
    return {
        "registers": int(used[1]),
        "spill_stores": int(spill[1]),
        "spill_loads": int(spill[2]),
        "shared": kernel.metadata.shared,
        "matrix": {name: n for name, n in counts.items() if n},
        "wide_loads": len(re.findall(r"\b(?:LDG|LDGSTS)\.E[\w.]*\.128", sass)),
    }


def all_ones(specs: list[Any]) -> list[Any]:
    """The first configuration of each kernel again, its integers 1: of those the launcher makes constants."""
    out = {}
    for spec in specs:
        fixed = {p.name for p in spec.kernel.params if p.do_not_specialize}
        ones = {n for n, t in spec.args.items() if t.startswith(("i32", "i64")) and n not in fixed}
        absent = tuple(n for n, v in spec.meta.items() if v is None)
        args = {n: t for n, t in spec.args.items() if n not in ones}
        again = replace(spec, name=ONES, args=args, meta={**spec.meta, **dict.fromkeys(ones, 1)})
        if ones:
            out.setdefault((spec.kernel.__name__, absent), again)
    return [replace(s, name=f"{s.name} {i}", matrix=False) for i, s in enumerate(out.values())]


def main(module: str, archs: list[int]) -> None:
    records = []
    specs = importlib.import_module(module).AOT
    for spec in [*specs, *all_ones(specs)]:
        for arch in archs:
            record = {
                "file": f"{module.rpartition('.')[2]}.py",
                "kernel": spec.kernel.__name__,
                "name": spec.name,
                "arch": arch,
                "warps": spec.num_warps,
                "stages": spec.num_stages,
                "needs_matrix": spec.matrix,
            }
            try:
                record |= measure(compile_one(spec, arch), arch)
            except Exception as e:  # every configuration is tried, every fault reported
                text = " ".join(str(e).split())
                record["error"] = (
                    f"{type(e).__name__}: {text if len(text) < 400 else text[:100] + ' ... ' + text[-300:]}"
                )
            records.append(record)
    print(json.dumps(records))


if __name__ == "__main__":
    main(sys.argv[1], [int(a) for a in sys.argv[2:]])
