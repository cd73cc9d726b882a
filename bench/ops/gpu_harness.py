"""Timing on a GPU: CUDA graphs over rotating inputs, variants interleaved, medians; gate first.

Every variant of a case is captured into a graph that goes once through all input copies, so the last-level cache is
cold and Python costs nothing; one that cannot be captured is timed eagerly and says so.
"""

from __future__ import annotations

import contextlib
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

Variant = Callable[[int], Any]  # takes the number of the input copy to use


@dataclass
class GpuCase:
    """One shape. `bytes` is what one call must move at least; `gates` raise when their variant is wrong."""

    name: str
    variants: dict[str, Variant]
    copies: int
    bytes: int
    gates: dict[str, Callable[[], None]] = field(default_factory=dict)


def copies_for(size: int, device: torch.device, limit: int = 32) -> int:
    """How many copies of an input go through three times the L2 cache."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 1 << 20
    return max(2, min(limit, -(-3 * cache // max(size, 1))))


@contextlib.contextmanager
def span(name: str) -> Iterator[None]:
    """An NVTX range, which ncu selects with --nvtx --nvtx-include."""
    if torch.cuda.is_available():
        torch.cuda.nvtx.range_push(name)
    try:
        yield
    finally:
        if torch.cuda.is_available():
            torch.cuda.nvtx.range_pop()


def capture(f: Variant, copies: int) -> tuple[Callable[[], None], str]:
    """(one pass over all copies, how it runs: "graph" or "eager")."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(copies):
            f(i)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        without_waiting(f)
        with torch.cuda.graph(graph):
            for i in range(copies):
                f(i)
    except (RuntimeError, ValueError) as e:
        torch.cuda.synchronize()
        return lambda: [f(i) for i in range(copies)] and None, f"eager ({str(e).splitlines()[0][:80]})"
    return graph.replay, "graph"


def without_waiting(f: Variant) -> None:
    """Run `f` once; RuntimeError when it waits for the device: in a capture that leaves torch in disorder."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        f(0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def measure(case: GpuCase, seconds: float, bandwidth: float) -> dict[str, Any]:
    out: dict[str, Any] = {"case": case.name, "bytes": case.bytes, "variants": {}}
    passes: dict[str, Callable[[], None]] = {}
    for name, f in case.variants.items():
        record: dict[str, Any] = {}
        out["variants"][name] = record
        try:
            if name in case.gates:
                case.gates[name]()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            passes[name], record["mode"] = capture(f, case.copies)
            record["peak_mb"] = round((torch.cuda.max_memory_allocated() - before) / case.copies / 2**20, 2)
        except Exception as e:  # one broken variant must not cost the others their visit
            record["failed"] = f"{type(e).__name__}: {str(e)[:300]}"
    times: dict[str, list[float]] = {name: [] for name in passes}
    end = time.perf_counter() + seconds
    while passes and (time.perf_counter() < end or len(next(iter(times.values()))) < 5):
        for name, go in passes.items():
            a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            a.record()
            with span(name):
                go()
            b.record()
            b.synchronize()
            times[name].append(1e3 * a.elapsed_time(b) / case.copies)
    for name, t in times.items():
        median = statistics.median(t)
        spread = statistics.quantiles(t, n=10) if len(t) > 1 else t * 9
        rate = case.bytes / median / 1e3
        out["variants"][name] |= {
            "median_us": round(median, 3),
            "p10_us": round(spread[0], 3),
            "p90_us": round(spread[8], 3),
            "gb_per_s": round(rate, 1),
            "share_of_copy_bandwidth": round(rate * 1e9 / bandwidth, 3),
            "rounds": len(t),
        }
    return out


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of torch's copy of 1 GiB: the ceiling of this run."""
    a = torch.ones(1 << 28, dtype=torch.float32, device=device)
    b = torch.empty_like(a)
    times = []
    for _ in range(20):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        b.copy_(a)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return 2 * a.numel() * 4 / statistics.median(times)


def machine() -> dict[str, Any]:
    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "numpy", "flash-attn", "flashinfer-python", "liger-kernel"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        found |= {"gpu": p.name, "sms": p.multi_processor_count, "l2_bytes": p.L2_cache_size}
    for key, command in {
        "driver": ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        "commit": ["git", "rev-parse", "HEAD"],
    }.items():
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
            found[key] = done.stdout.strip()
        except (OSError, subprocess.SubprocessError):
            found[key] = "unknown"
    return found


def table(results: list[dict[str, Any]]) -> str:
    lines = []
    for r in results:
        for name, v in r["variants"].items():
            if "median_us" in v:
                said = (
                    f"{v['median_us']:10.2f} us {v['gb_per_s']:8.0f} GB/s {100 * v['share_of_copy_bandwidth']:4.0f} %"
                )
                lines.append(f"{r['case']:52.52} {name:14.14} {said}{'' if v['mode'] == 'graph' else '  eager'}")
            else:
                lines.append(f"{r['case']:52.52} {name:14.14} {v.get('failed', 'gate passed')[:60]}")
    return "\n".join(lines)


def write(path: Path, document: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
