"""Small host arrays to a device in one copy, and results back in one, without stopping the device in between."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

ALIGN = 16  # bytes; kernels load index lists with vector instructions


def upload(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """The arrays as tensors on `device`. CUDA: one asynchronous copy of them all; CPU: no copy, memory is shared."""
    if device.type != "cuda":
        return [torch.from_numpy(a) for a in arrays]
    return unpack(torch.from_numpy(pack(arrays)).pin_memory().to(device, non_blocking=True), arrays)


def pack(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """All arrays in one uint8 buffer, each at a multiple of ALIGN bytes."""
    out = np.zeros(sum(_room(a) for a in arrays), np.uint8)
    at = 0
    for a in arrays:
        out[at : at + a.nbytes] = np.ascontiguousarray(a).view(np.uint8).reshape(-1)
        at += _room(a)
    return out


def unpack(buffer: torch.Tensor, like: Sequence[np.ndarray]) -> list[torch.Tensor]:
    """Views into `buffer` [bytes] uint8 with the shapes and dtypes of the arrays that `pack` was given."""
    out, at = [], 0
    for a in like:
        dtype = torch.from_numpy(np.empty(0, a.dtype)).dtype
        out.append(buffer[at : at + a.nbytes].view(dtype).view(a.shape))
        at += _room(a)
    return out


def _room(a: np.ndarray) -> int:
    return -(-a.nbytes // ALIGN) * ALIGN


class Download:
    """Tensors of one device on their way to the host; `wait` gives them as arrays, in order."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = list(tensors)
        self._event: torch.cuda.Event | None = None
        if tensors and tensors[0].is_cuda:
            flat = torch.cat([t.contiguous().view(torch.uint8).flatten() for t in tensors])
            self._host = torch.empty(len(flat), dtype=torch.uint8, pin_memory=True)
            self._host.copy_(flat, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> list[np.ndarray]:
        if self._event is None:
            return [t.numpy() for t in self._tensors]
        self._event.synchronize()
        return split(self._host.numpy(), self._tensors)


def split(buffer: np.ndarray, like: Sequence[torch.Tensor]) -> list[np.ndarray]:
    """Arrays with the shapes and dtypes of `like` from their bytes one after the other."""
    out, at = [], 0
    for t in like:
        size = t.numel() * t.element_size()
        dtype = torch.empty(0, dtype=t.dtype).numpy().dtype
        out.append(np.frombuffer(buffer[at : at + size].tobytes(), dtype).reshape(t.shape))
        at += size
    return out
