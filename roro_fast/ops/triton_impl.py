"""Registers the Triton kernels of `roro_fast.kernels` without importing triton until one of them serves."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

from roro_fast.ops.registry import FLOATS, Implementation, one_of, register

PRIORITY = 20


def usable(device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """Where `usable_for_any` says so, for the dtypes that kernels compute in."""
    ok, reason = one_of(dtype, FLOATS)
    return usable_for_any(device, dtype) if ok else (ok, reason)


def usable_for_any(device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """On CUDA devices of compute capability 8.0 and later; on the CPU only in Triton's interpreter, to test."""
    if importlib.util.find_spec("triton") is None:
        return False, "triton is not installed (pip install 'roro-fast[gpu]')"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return (True, "") if major >= 8 else (False, f"compute capability {major}.{minor}; 8.0 is needed")
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return True, ""
    return False, "needs a CUDA device (TRITON_INTERPRET=1 interprets the kernels on a CPU, for tests)"


def register_triton(
    op: str, module: str, function: str, wrap: Callable[..., Any] | None = None, *, any_dtype: bool = False
) -> None:
    """Let `roro_fast.kernels.<module>.<function>` serve `op`; `wrap(*result)` builds what the op returns."""
    found: Callable[..., Any] | None = None

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal found
        if found is None:
            found = getattr(importlib.import_module(f"roro_fast.kernels.{module}"), function)
        result = found(*args, **kwargs)
        return wrap(*result) if wrap else result

    check = usable_for_any if any_dtype else usable
    register(Implementation(op, "triton", call, check, PRIORITY, auto_on=("cuda",)))
