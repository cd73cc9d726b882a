"""The CUDA kernels of `roro_fast/_cuda.so`: loaded when an op first asks for them, registered as implementation "cuda".

`python -m roro_fast.ops.build_cuda` builds them; with RORO_BUILD_CUDA=1 that happens at first use. RORO_DEBUG=1 checks
index ranges before a launch, which waits for the device each time; without it a kernel skips what is out of range.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from roro_fast.errors import ConfigError
from roro_fast.ops import build_cuda, native
from roro_fast.ops.registry import FLOATS, Implementation, one_of, register

PRIORITY = 30
checks: Any = import_module("roro_fast.kernels.checks")  # shared with the Triton kernels
_namespace = "roro_cuda"


@cache
def _load() -> str:
    """Empty when the library is loaded, else the reason why not."""
    path = build_cuda.LIBRARY
    current = build_cuda.fingerprint()
    if os.environ.get("RORO_BUILD_CUDA", "") not in ("", "0") and current and _built_from(path) != current:
        try:
            build_cuda.build()
        except RuntimeError as e:
            return f"the CUDA kernels do not build: {e}"
    if not path.is_file():
        return "the CUDA kernels are not built; run `python -m roro_fast.ops.build_cuda` (it needs nvcc)"
    try:
        torch.ops.load_library(path)
    except OSError as e:
        return f"{path.name} does not load: {e}; build it again with this torch ({torch.__version__})"
    if current and _built_from(path) != current:
        return f"{path.name} is older than csrc; run `python -m roro_fast.ops.build_cuda` and start again"
    return ""


def _built_from(path: os.PathLike[str]) -> str:
    """Fingerprint of the sources of a library, read from the file: two loaded ones would both register the ops.

    Empty when there is none.
    """
    try:
        found = re.search(rb"roro_cuda_fingerprint=([0-9a-f]+);", Path(path).read_bytes())
    except OSError:
        return ""
    return found[1].decode() if found else ""


def why_not() -> str:
    """Why the kernels cannot be used; empty when they can."""
    return _load()


def serve_from(namespace: str) -> None:
    """Take the ops from `torch.ops.<namespace>` from now on: how tests run the emulated kernels."""
    global _namespace
    _namespace = namespace
    op.cache_clear()


@cache
def op(name: str) -> Callable[..., Any]:
    """`torch.ops.roro_cuda.<name>`, its one overload. Raises ConfigError when the library is missing."""
    if _namespace == "roro_cuda" and _load():
        raise ConfigError(f"impl: {_load()}")
    overload: Callable[..., Any] = getattr(getattr(torch.ops, _namespace), name).default
    return overload


def call(name: str, *args: Any) -> Any:
    """Run an op; what it finds wrong with its arguments, before any launch, is raised as RoroError."""
    return native.run(op(name), *args)


def usable_any(device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """A registry check: an NVIDIA GPU of compute capability 8.0 or newer, the library built; any dtype."""
    if device.type != "cuda":
        return False, f"serves CUDA tensors, not {device.type}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False, "needs compute capability 8.0 or newer"
    return not _load(), _load()


def usable(device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """`usable_any` for float32, float16 and bfloat16."""
    ok, reason = one_of(dtype, FLOATS)
    return usable_any(device, dtype) if ok else (ok, reason)


def register_cuda(op_name: str, fn: Callable[..., Any], check: Any = usable, priority: int = PRIORITY) -> None:
    """Let `fn` serve `op_name` as "cuda" on GPUs."""
    register(Implementation(op_name, "cuda", fn, check, priority, auto_on=("cuda",)))
