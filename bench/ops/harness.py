"""Timing of one op against its peers: gate first, inputs beyond the caches, variants interleaved, medians with spread.

A bench gives `run` a list of cases. No time is printed when a result is wrong. The last line of stdout is one JSON
document, also written to bench/results/ops/<op>_<device>.json (<op>_<device>_<threads>.json for more than one thread)
or where --out says.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from roro_fast.files import write_json
from roro_fast.runs.meta import provenance

RESULTS = Path(__file__).parents[1] / "results" / "ops"
Variant = Callable[[int], Any]  # takes the number of the input copy to use


@dataclass
class Case:
    """One shape. `variants[ours]` is judged against every other one; `bytes` is what one call must move at least."""

    name: str
    variants: dict[str, Variant]
    ours: str
    bytes: int
    gate: Callable[[], None]
    targets: dict[str, float] = field(default_factory=dict)  # peer -> wanted ratio
    note: str = ""
    flops: int = 0  # of one call, 0: not what bounds it


def arguments(doc: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=1.5, help="per case, after warm-up")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    return args


def cache_bytes() -> int:
    try:
        return max(os.sysconf("SC_LEVEL3_CACHE_SIZE"), os.sysconf("SC_LEVEL2_CACHE_SIZE"), 1 << 20)
    except (ValueError, OSError):
        return 32 << 20


def copies_for(size: int, limit: int = 24) -> int:
    """How many copies of an input of `size` bytes go through three times the last cache."""
    return max(1, min(limit, -(-3 * cache_bytes() // max(size, 1))))


def reader(size: int) -> Variant:
    """Reads `size` bytes, other ones each time while they fit three times into the last cache: the ceiling of whatever
    reads as much."""
    buffers = [torch.ones(max(1, size // 8), dtype=torch.int64) for _ in range(copies_for(size))]
    return lambda i: buffers[i % len(buffers)].sum()


def multiplier(flops: int, dtype: torch.dtype) -> Variant:
    """A square-ish matrix product of as many FLOPs in torch: the ceiling of whatever computes as much."""
    rows = max(16, flops // (2 * 1024 * 1024))
    a, b = torch.randn(rows, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
    return lambda i: a @ b


def copy_bandwidth() -> float:
    """Bytes moved per second, read and written, by torch's copy between buffers of three times the last cache."""
    n = min(3 * cache_bytes(), 256 << 20)
    a, b = torch.ones(n, dtype=torch.uint8), torch.zeros(n, dtype=torch.uint8)
    times = []
    for _ in range(9):
        begin = time.perf_counter()
        b.copy_(a)
        times.append(time.perf_counter() - begin)
    return 2 * n / statistics.median(times)


def interleave(variants: dict[str, Variant], seconds: float) -> dict[str, list[float]]:
    """Seconds per call of every variant, one call of each per round; short calls are timed in small batches."""
    repeat = {}
    for name, f in variants.items():
        f(0)
        begin, calls = time.perf_counter(), 0
        while calls < 2 or time.perf_counter() - begin < 0.1:
            f(calls)
            calls += 1
        per_call = (time.perf_counter() - begin) / calls
        repeat[name] = max(1, min(50, int(2e-4 / per_call)))
    times: dict[str, list[float]] = {name: [] for name in variants}
    names, i = list(variants), 0
    end = time.perf_counter() + seconds
    gc.disable()
    try:
        while time.perf_counter() < end or i < 5:
            for name in names[i % len(names) :] + names[: i % len(names)]:
                f, n = variants[name], repeat[name]
                begin = time.perf_counter()
                for j in range(n):
                    f(i * n + j)
                times[name].append((time.perf_counter() - begin) / n)
            i += 1
    finally:
        gc.enable()
    return times


def summary(case: Case, times: dict[str, list[float]], bandwidth: float) -> dict[str, Any]:
    out: dict[str, Any] = {"case": case.name, "rounds": len(times[case.ours]), "variants": {}}
    for name, t in times.items():
        deciles = statistics.quantiles(t, n=10) if len(t) > 1 else [t[0]] * 9
        out["variants"][name] = {
            "median_us": round(1e6 * statistics.median(t), 2),
            "best_us": round(1e6 * min(t), 2),
            "p10_us": round(1e6 * deciles[0], 2),
            "p90_us": round(1e6 * deciles[8], 2),
        }
    ours = statistics.median(times[case.ours])
    out["gb_per_s"] = round(case.bytes / ours / 1e9, 3)
    out["share_of_copy_bandwidth"] = round(case.bytes / ours / bandwidth, 3)
    out["speedup"] = {n: round(statistics.median(t) / ours, 2) for n, t in times.items() if n != case.ours}
    out["speedup_of_bests"] = {n: round(min(t) / min(times[case.ours]), 2) for n, t in times.items() if n != case.ours}
    if case.flops:
        out["gflop_per_s"] = round(case.flops / ours / 1e9, 1)
    if case.targets:
        out["targets"] = case.targets
    if case.note:
        out["note"] = case.note
    return out


def run(op: str, cases: list[Callable[[], Case]], args: argparse.Namespace, absent: dict[str, str]) -> None:
    """Cases are built one at a time, so that only one holds its inputs in memory."""
    before = os.getloadavg()
    bandwidth = copy_bandwidth()
    results = []
    with torch.inference_mode():
        for build in cases:
            case = build()
            case.gate()
            results.append(summary(case, interleave(case.variants, args.seconds), bandwidth))
            r = results[-1]
            shown = ", ".join(f"{n} {x:.1f}x" for n, x in r["speedup"].items())
            print(
                f"{r['case']:44} {r['variants'][case.ours]['median_us']:10.1f} us  {r['gb_per_s']:6.2f} GB/s  {shown}"
            )
    document = {
        "op": op,
        "device": args.device,
        "threads": args.threads,
        "copy_gb_per_s": round(bandwidth / 1e9, 2),
        "cache_bytes": cache_bytes(),
        "load_before": before,
        "load_after": os.getloadavg(),
        "peers_absent": absent,
        "cases": results,
        "provenance": provenance(),
    }
    if args.device == "cpu":
        from roro_fast.ops import native

        document["isa"] = native.isa()
    threads = f"_{args.threads}" if args.threads > 1 else ""
    write_json(args.out or RESULTS / f"{op}_{args.device}{threads}.json", document)
    print(json.dumps(document))
