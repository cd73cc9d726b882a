"""What the machine can do at best, measured in the same run: bytes read per second and multiply-adds of one dtype."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def read_bandwidth(device: str) -> float:
    """Bytes per second of summing a buffer far beyond the caches; best of the repeats, it is a ceiling."""
    megabytes = 512 if device == "cpu" else 4096
    x = torch.ones(megabytes << 18, dtype=torch.float32, device=device)
    return x.numel() * 4 / _best(lambda: x.sum(), device, 8)


class Reader:
    """Bytes per second that `threads` CPU threads read now: the median of a few sums of the same large buffer."""

    def __init__(self, threads: int, megabytes: int = 512, sums: int = 8) -> None:
        self.x, self.threads, self.sums = torch.ones(megabytes << 18, dtype=torch.float32), threads, sums

    def __call__(self) -> float:
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            return self.x.numel() * 4 / statistics.median(_times(self.x.sum, "cpu", self.sums))
        finally:
            torch.set_num_threads(before)


def matmul_flops(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a square product of `dtype`, the library's best of the repeats."""
    size = 2048 if device == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2.0 * size**3 / _best(lambda: a @ b, device, 8)


def measure(device: str, dtype: torch.dtype, threads: int) -> dict[str, float]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return {"bytes_per_second": read_bandwidth(device), "flops": matmul_flops(device, dtype)}
    finally:
        torch.set_num_threads(before)


def _best(call: Callable[[], object], device: str, repeats: int) -> float:
    return min(_times(call, device, repeats))


def _times(call: Callable[[], object], device: str, repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return times
