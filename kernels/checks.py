"""Argument checks of the kernel wrappers: one clear error before any launch."""

from __future__ import annotations

import os

import torch

from roro_fast.errors import ConfigError

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
DEBUG = os.environ.get("RORO_DEBUG", "") not in ("", "0")  # costs a synchronisation per index tensor


def tensor(
    name: str,
    x: torch.Tensor,
    shape: tuple[int | None, ...],
    device: torch.device,
    dtype: torch.dtype | tuple[torch.dtype, ...],
) -> torch.Tensor:
    """`x` made contiguous, if it has this shape (None: any size), device and dtype."""
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
    if x.dtype not in dtypes:
        raise ConfigError(f"{name}: dtype {x.dtype}, expected {' or '.join(str(d) for d in dtypes)}")
    if x.device != device:
        raise ConfigError(f"{name}: on {x.device}, expected {device} like the other arguments")
    if x.ndim != len(shape) or any(want is not None and want != got for want, got in zip(shape, x.shape, strict=True)):
        want = ", ".join("*" if s is None else str(s) for s in shape)
        raise ConfigError(f"{name}: shape {list(x.shape)}, expected [{want}]")
    return x.contiguous()


def in_range(name: str, x: torch.Tensor | None, size: int) -> None:
    """With RORO_DEBUG=1, that every element is in [0, size)."""
    if not DEBUG or x is None or x.numel() == 0:
        return
    low, high = (int(v) for v in x.aminmax())
    if low < 0 or high >= size:
        raise ConfigError(f"{name}: index {low if low < 0 else high} is outside 0..{size - 1}")


def ascending(name: str, x: torch.Tensor | None, end: int) -> None:
    """With RORO_DEBUG=1, that offsets ascend from 0 to `end`."""
    if not DEBUG or x is None:
        return
    if int(x[0]) != 0 or int(x[-1]) != end or bool((x.diff() < 0).any()):
        raise ConfigError(f"{name}: must ascend from 0 to {end}, got {x.tolist()[:8]}")


def index(name: str, x: torch.Tensor, size: int, device: torch.device, count: int | None = None) -> torch.Tensor:
    """int64 [count] indices into `size` rows; their range is looked at only with RORO_DEBUG=1."""
    x = tensor(name, x, (count,), device, torch.int64)
    in_range(name, x, size)
    return x


def offsets(name: str, x: torch.Tensor, end: int, device: torch.device) -> torch.Tensor:
    """int64 offsets, ascending from 0 to `end`; their values are looked at only with RORO_DEBUG=1."""
    x = tensor(name, x, (None,), device, torch.int64)
    if x.numel() == 0:
        raise ConfigError(f"{name}: empty; n segments have n + 1 offsets")
    ascending(name, x, end)
    return x


def at_most(name: str, value: int, limit: int) -> None:
    if value > limit:
        raise ConfigError(f"{name}: {value} is above this kernel's limit of {limit}; use impl='reference'")
