"""Build the CUDA kernels: csrc/cuda/*.cu and their torch binding into one shared library, `roro_fast/_cuda.so`.

`python -m roro_fast.ops.build_cuda [OUTPUT]` needs nvcc (on PATH, in CUDA_HOME or from PyPI) and torch's headers; no
GPU and no CUDA build of torch: the library loads under either (stable ABI, CUDA runtime linked statically).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
CSRC = PACKAGE.parent / "csrc"
LIBRARY = PACKAGE / "_cuda.so"
TORCH_TARGET = "0x020b000000000000"  # 2.11: the oldest torch that is supported
NVCC_FLAGS = [
    *("-O3", "-std=c++17", "-lineinfo", "-Xcompiler=-fPIC,-fvisibility=hidden"),
    "-Xptxas=-warn-spills,--warning-as-error",
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90,code=sm_90",
    "-gencode=arch=compute_90,code=compute_90",  # PTX, for what comes after
]


def nvcc() -> str | None:
    """The CUDA compiler, or None."""
    found = shutil.which("nvcc")
    places = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")), *(Path(p) / "nvidia" / "cu13" for p in sys.path)]
    return found or next((str(p / "bin" / "nvcc") for p in places if (p / "bin" / "nvcc").is_file()), None)


def sources() -> list[Path]:
    return [*sorted((CSRC / "cuda").glob("*.cu")), CSRC / "bind_torch_cuda.cpp"]


def fingerprint() -> str:
    """Changes with every file that the library is built from; empty where the sources are not at hand."""
    used = [*sources(), *(CSRC / "cuda").glob("*.*h"), *CSRC.glob("*.h"), CSRC / "cpu" / "types.h"]
    if not CSRC.is_dir():
        return ""
    digest = hashlib.sha256()
    for path in sorted(used):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def torch_flags() -> list[str]:
    from torch.utils.cpp_extension import include_paths

    flags = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
    return [*flags, f"-I{CSRC}", *(f"-isystem{path}" for path in include_paths())]


def torch_libraries() -> list[str]:
    """Not only those that a CPU torch needs: libtorch.so brings libtorch_cuda.so where there is one."""
    from torch.utils.cpp_extension import library_paths

    return [*(f"-L{path}" for path in library_paths()), "-Xlinker=--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]


def run(command: list[str]) -> None:
    """Raises RuntimeError with the compiler's output."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def build(output: Path = LIBRARY) -> Path:
    """Compile what is in csrc now. Raises RuntimeError when nvcc is missing or fails; a register spill is a failure."""
    compiler = nvcc()
    if compiler is None:
        raise RuntimeError(
            "nvcc is missing; install the CUDA toolkit, or pip install nvidia-cuda-nvcc==13.0.88 "
            "nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85"
        )
    with tempfile.TemporaryDirectory() as folder:

        def compile_one(source: Path) -> str:
            out = f"{folder}/{source.stem}.o"
            if source.suffix == ".cu":
                run([compiler, *NVCC_FLAGS, f"-I{CSRC}", "-c", str(source), "-o", out])
            else:
                stamp = f'-DRORO_FINGERPRINT="{fingerprint()}"'
                run([os.environ.get("CXX", "g++"), "-O2", *torch_flags(), stamp, "-c", str(source), "-o", out])
            return out

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            objects = list(pool.map(compile_one, sources()))
        part = output.with_name(output.name + ".part")
        own = f"-L{Path(compiler).parents[1] / 'lib'}"  # nvcc from PyPI looks for its own libraries in lib64
        run([compiler, "-shared", "-cudart=static", *objects, "-o", str(part), own, *torch_libraries()])
        part.replace(output)
    return output


if __name__ == "__main__":
    print(build(Path(sys.argv[1]) if len(sys.argv) > 1 else LIBRARY))
