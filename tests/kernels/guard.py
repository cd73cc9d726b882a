"""Trap out-of-bounds access: tensors that end exactly at an unreadable page, used in a process that may die of it."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

_ROOT = Path(__file__).resolve().parents[2]
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
_LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def guarded(x: torch.Tensor, side: str = "end") -> torch.Tensor:
    """A contiguous copy of `x` whose last byte (or first, with side "start") touches an unreadable page."""
    x = x.contiguous()
    size, page = x.numel() * x.element_size(), mmap.PAGESIZE
    pages = max(1, -(-size // page))
    base = _LIBC.mmap(None, (pages + 2) * page, mmap.PROT_READ | mmap.PROT_WRITE, 0x22, -1, 0)
    for wall in (base, base + (pages + 1) * page):
        if _LIBC.mprotect(wall, page, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    if size == 0:
        return x
    start = base + page + (pages * page - size if side == "end" else 0)
    memory = (ctypes.c_char * size).from_address(start)
    return torch.frombuffer(memory, dtype=x.dtype).view(x.shape).copy_(x)


def run_guarded(module: str, function: str, *args: str) -> int:
    """Exit code of `module.function(*args)` in a fresh interpreted process: 0, or -SIGSEGV for a wild access."""
    code = (
        "import sys, importlib; from tests.kernels.interpreter import mend; mend();"
        "getattr(importlib.import_module(sys.argv[1]), sys.argv[2])(*sys.argv[3:])"
    )
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(_ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code, module, function, *args], env=env, cwd=_ROOT, capture_output=True, timeout=280
    )
    if done.returncode not in (0, -signal.SIGSEGV):
        raise AssertionError(done.stderr.decode()[-2000:])
    return done.returncode
