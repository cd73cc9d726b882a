"""The CUDA kernels on the CPU: csrc/cuda compiled by g++ against cuda_on_cpu.h, behind the real torch binding.

Objects are kept in build/emulated under a hash of what they are made of, so only what changed is compiled again.
"""

from __future__ import annotations

import ctypes
import faulthandler
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from roro_fast.ops import build_cuda, native_cuda

HERE = Path(__file__).resolve().parent
CUDA = build_cuda.CSRC / "cuda"
BUILD = build_cuda.CSRC.parent / "build" / "emulated"
CXX = os.environ.get("CXX", "g++")
NAMESPACE = "roro_cuda_emulated"
# The kernels view one type's memory as another's, which nvcc allows.
FLAGS = ["-O1", "-std=c++17", "-fPIC", "-fno-strict-aliasing", "-DRORO_EMULATOR", "-Wno-unknown-pragmas"]
ASAN = ("-fsanitize=address",)
ORDERS = range(4)  # of threads and blocks: ascending, descending, two shuffles


def why_not() -> str:
    """Why the emulator cannot run here; empty when it can."""
    if platform.machine() != "x86_64":
        return "the emulator's fibers are written for x86-64"
    return "" if shutil.which(CXX) else f"no C++ compiler ({CXX})"


def _made(command: list[str], suffix: str, inputs: list[Path]) -> Path:
    digest = hashlib.sha256(" ".join(command).encode())
    for path in inputs:
        digest.update(path.read_bytes())
    out = BUILD / f"{digest.hexdigest()[:24]}{suffix}"
    if not out.is_file():
        BUILD.mkdir(parents=True, exist_ok=True)
        part = out.with_name(f"{out.name}.{os.getpid()}.part")
        build_cuda.run([*command, "-o", str(part)])
        part.replace(out)
    return out


def kernels(replaced: dict[str, Path] | None = None, flags: tuple[str, ...] = ()) -> Path:
    """A library of all emulated kernels; `replaced` gives other files for some names of csrc/cuda."""
    replaced = replaced or {}
    headers = [HERE / "cuda_on_cpu.h", *(replaced.get(p.name, p) for p in sorted(CUDA.glob("*.*h")))]
    roots = {f"-I{p.parents[1]}" for name, p in replaced.items() if not name.endswith(".cu")}
    objects = []
    for source in sorted(CUDA.glob("*.cu")):
        path = replaced.get(source.name, source)
        command = [CXX, *FLAGS, *flags, *roots, f"-I{build_cuda.CSRC}", f"-I{HERE}", "-x", "c++", "-c", str(path)]
        objects.append(_made(command, ".o", [path, *headers]))
    return _made([CXX, "-shared", *flags, *map(str, objects)], ".so", objects)


@cache
def binding() -> ctypes.CDLL:
    """csrc/bind_torch_cuda.cpp for CPU tensors, loaded as `torch.ops.roro_cuda_emulated`."""
    headers = [*sorted(CUDA.glob("*.h")), *sorted(build_cuda.CSRC.glob("*.h"))]
    names = [f"-DRORO_OPS={NAMESPACE}", "-DRORO_KEY=CPU"]
    objects = []
    for source in (build_cuda.CSRC / "bind_torch_cuda.cpp", HERE / "shim.cpp"):
        command = [CXX, "-O1", *build_cuda.torch_flags(), *names, f"-DROOT={torch.__version__}", "-c", str(source)]
        objects.append(_made(command, ".o", [source, *headers]))
    libraries = [f.replace("-Xlinker=", "-Wl,") for f in build_cuda.torch_libraries()]
    path = _made([CXX, "-shared", *map(str, objects), *libraries, "-ldl"], ".so", objects)
    torch.ops.load_library(path)
    library = ctypes.CDLL(str(path))
    library.roro_use.restype = ctypes.c_char_p
    return library


def use(library: Path) -> None:
    error = binding().roro_use(str(library).encode())
    if error:
        raise RuntimeError(error.decode())


@contextmanager
def using(library: Path) -> Iterator[None]:
    """Run `library` for a while, then the kernels as they are in csrc."""
    use(library)
    try:
        yield
    finally:
        use(kernels())


@contextmanager
def serving(library: Path) -> Iterator[None]:
    """Let implementation "cuda" run `library` on CPU tensors."""
    use(library)
    native_cuda.serve_from(NAMESPACE)
    try:
        yield
    finally:
        native_cuda.serve_from("roro_cuda")


def set_order(order: int) -> None:
    binding().roro_set_order(order)


def plant(folder: Path, name: str, right: str, wrong: str, flags: tuple[str, ...] = ()) -> Path:
    """The emulated kernels with a fault: in csrc/cuda/`name` the one place that reads `right` reads `wrong`."""
    text = (CUDA / name).read_text(encoding="utf-8")
    if text.count(right) != 1:
        raise AssertionError(f"{text.count(right)} places in {name} read {right!r}; a fault needs one")
    faulty = folder / "cuda" / name
    faulty.parent.mkdir(exist_ok=True)
    faulty.write_text(text.replace(right, wrong), encoding="utf-8")
    return kernels({name: faulty}, flags)


def in_child(body: Callable[[], object]) -> int:
    """Exit status of `body` in a forked process: 0, 1 for an exception, or minus the signal that killed it."""
    pid = os.fork()
    if pid == 0:
        status = 1
        faulthandler.disable()
        try:
            body()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def sanitized_exits(code: str, healthy: Path, faulty: Path) -> tuple[int, int, str]:
    """Exit statuses of Python `code` on two libraries built with ASAN, and what AddressSanitizer wrote."""
    runtime = subprocess.run([CXX, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    env = {
        **os.environ,
        "LD_PRELOAD": runtime.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0:verify_asan_link_order=0:detect_stack_use_after_return=0",
        "PYTHONPATH": str(build_cuda.CSRC.parent),
    }
    body = "".join(f"    {line}\n" for line in code.splitlines())
    script = (
        f"from tests.cuda import emulator\ndef body():\n{body}"
        f"for library in {[str(healthy), str(faulty)]!r}:\n"
        "    with emulator.serving(emulator.Path(library)):\n"
        "        print(emulator.in_child(body), flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=240)
    if done.returncode:
        raise AssertionError(done.stderr[-3000:])
    first, second = map(int, done.stdout.split())
    return first, second, done.stderr
