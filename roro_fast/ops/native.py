"""The C++ kernels of `roro_fast._C`: loaded when the first op asks for them, registered as implementation "cpu".

The instruction set is the best that the CPU has; the environment variable RORO_ISA (scalar, avx2, avx512, avx512_bf16,
amx; amx_emulated runs the AMX code on software tiles) or `set_isa` asks for another one. RORO_REQUIRE_EXT=1 makes a
missing `_C` an error instead of a fall-back to the references.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from roro_fast.errors import ConfigError, RoroError
from roro_fast.ops.registry import Implementation, one_of, register

PRIORITY = 10


@cache
def _load() -> str:
    """Empty when `_C` is loaded, else the reason why not."""
    package = Path(__file__).resolve().parents[1]
    files = sorted(package.glob("_C*.so"))
    reason = "roro_fast._C is not built; install again with a C++17 compiler"
    if files:
        try:
            torch.ops.load_library(files[0])
            return ""
        except OSError as e:
            reason = f"{files[0].name} does not load: {e}; install again with this torch ({torch.__version__})"
    if os.environ.get("RORO_REQUIRE_EXT", "") not in ("", "0"):
        raise ConfigError(f"RORO_REQUIRE_EXT: {reason}")
    return reason


def available() -> bool:
    return not _load()


def why_not() -> str:
    """Why the kernels cannot be used; empty when they can."""
    return _load()


@cache
def op(name: str) -> Callable[..., Any]:
    """`torch.ops.roro_fast.<name>`, its one overload. Raises ConfigError when `_C` is missing."""
    if _load():
        raise ConfigError(f"impl: the C++ kernels are not available: {_load()}")
    overload: Callable[..., Any] = getattr(torch.ops.roro_fast, name).default
    return overload


def run(overload: Callable[..., Any], *args: Any) -> Any:
    """Call a registered op; what it finds wrong with its arguments is raised as RoroError."""
    try:
        return overload(*args)
    except RuntimeError as e:
        raise RoroError(str(e).splitlines()[0]) from None


def call(name: str, *args: Any) -> Any:
    return run(op(name), *args)


def isa() -> str:
    """Name of the instruction set in use. Raises RoroError when RORO_ISA names one that this CPU lacks."""
    return str(call("isa"))


def usable_isas() -> list[str]:
    return str(call("usable_isas")).split(",")


def set_isa(name: str) -> None:
    """Use instruction set `name` from now on, in this process; "auto" is the best that the CPU has."""
    call("set_isa", name)


def prefer_large_pages(memory: torch.Tensor) -> torch.Tensor:
    """`memory`, a tensor that is about to be filled, on pages of 2 MB where the system has them on request (Linux): one
    TLB miss where there were 512. Other devices' memory, and any when `_C` is missing, stays as it is."""
    if memory.device.type == "cpu" and available():
        call("prefer_large_pages", memory)
    return memory


def usable(*dtypes: torch.dtype) -> Callable[[torch.device, torch.dtype], tuple[bool, str]]:
    """A registry check: CPU tensors of one of `dtypes`, with `_C` loaded."""

    def check(device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
        if device.type != "cpu":
            return False, f"serves CPU tensors, not {device.type}"
        ok, reason = one_of(dtype, dtypes)
        return (not _load(), _load()) if ok else (ok, reason)

    return check


def register_cpu(op_name: str, fn: Callable[..., Any], *dtypes: torch.dtype, priority: int = PRIORITY) -> None:
    """Let `fn` serve `op_name` as "cpu" for CPU tensors of `dtypes` (any when empty)."""
    register(Implementation(op_name, "cpu", fn, usable(*dtypes), priority, auto_on=("cpu",)))
