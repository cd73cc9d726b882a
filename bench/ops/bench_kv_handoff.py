"""kv_handoff in C++: copies against memcpy (torch's contiguous copy) and index arithmetic, plans against numpy.

python -m bench.ops.bench_kv_handoff [--seconds 1.5] [--threads 1] [--out FILE]
"""

from __future__ import annotations

import functools

import numpy as np
import torch

from bench.ops.harness import Case, arguments, run
from roro_fast.ops.kv_handoff import copy, copy_pages, page_spans, plan

LAYERS, HEADS, DIM, SIZE = 4, 4, 64, 16


def pools(pages: int, size: int, layout: str, dtype: torch.dtype) -> torch.Tensor:
    inner = (size, HEADS) if layout == "NHD" else (HEADS, size)
    return torch.randn(pages * SIZE // size, LAYERS, 2, *inner, DIM).to(dtype)


def copy_case(mib: int, size: int, layout: str, dtype: torch.dtype) -> Case:
    """`mib` MiB of scattered pages of 16 tokens go to scattered pages of another pool."""
    page = LAYERS * 2 * SIZE * HEADS * DIM * 4
    n = (mib << 20) // page
    rng = np.random.default_rng(0)
    source, target = pools(2 * n, SIZE, "NHD", torch.float32), pools(2 * n, size, layout, dtype)
    spans = page_spans(rng.permutation(2 * n)[:n], rng.permutation(len(target)), SIZE, size, 0, n * SIZE)
    flat, other = torch.randn(n * page // 4), torch.empty(n * page // 4)
    go = lambda impl: copy(source, target, spans, target_layout=layout, impl=impl)  # noqa: E731

    def gate() -> None:
        go("cpu")
        got = target.clone()
        target.zero_()
        go("reference")
        written = target != 0  # the rest held other values before
        assert torch.equal(got[written], target[written]) and int(written.sum()) > 0.99 * n * page // 4

    return Case(
        name=f"copy {mib} MiB, pages 16->{size} NHD->{layout} fp32->{str(dtype).removeprefix('torch.')}",
        variants={
            "cpu": lambda i: go("cpu"),
            "memcpy": lambda i: other.copy_(flat),
            "reference": lambda i: go("reference"),
        },
        ours="cpu",
        bytes=2 * n * page if dtype == torch.float32 else n * page * 3 // 2,
        gate=gate,
        targets={"memcpy": 0.8} if size == SIZE and layout == "NHD" and dtype == torch.float32 else {},
    )


def pages_case(n: int) -> Case:
    pool = pools(2 * n + 2, SIZE, "NHD", torch.float32)
    order = torch.randperm(len(pool))
    source, target = order[:n], order[n : 2 * n]
    page = pool[0].numel() * 4
    flat, other = torch.randn(n * page // 4), torch.empty(n * page // 4)

    def gate() -> None:
        want = pool[source].clone()
        copy_pages(pool, source, target, impl="cpu")
        assert torch.equal(pool[target], want)

    return Case(
        name=f"copy_pages n={n} of {page >> 10} KiB",
        variants={
            "cpu": lambda i: copy_pages(pool, source, target, impl="cpu"),
            "memcpy": lambda i: other.copy_(flat),
            "reference": lambda i: copy_pages(pool, source, target, impl="reference"),
        },
        ours="cpu",
        bytes=2 * n * page,
        gate=gate,
        targets={"memcpy": 0.8} if n > 100 else {},
    )


def plan_case(sequences: int, most: int) -> Case:
    rng = np.random.default_rng(0)
    tokens, table = rng.integers(0, 1000, (sequences, 2048)), rng.permutation(sequences * 128).reshape(sequences, 128)
    start = rng.integers(0, 1900, sequences)
    args = (tokens, rng.permutation(sequences), start, rng.integers(1, most + 1, sequences), table, SIZE)

    def gate() -> None:
        pairs = zip(plan(*args, impl="cpu"), plan(*args, impl="reference"), strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs)

    return Case(
        name=f"plan {sequences} sequences, up to {most} tokens each",
        variants={"cpu": lambda i: plan(*args, impl="cpu"), "numpy": lambda i: plan(*args, impl="reference")},
        ours="cpu",
        bytes=int(args[3].sum()) * 32,
        gate=gate,
        note="wanted: at most 50 us for 256 sequences",
    )


def main() -> None:
    args = arguments(__doc__)
    build = [functools.partial(pages_case, n) for n in (1, 16, 512)]
    f32, half = torch.float32, torch.bfloat16
    shapes = [
        (64, 16, "NHD", f32),
        (64, 32, "NHD", f32),
        (64, 128, "NHD", f32),
        (64, 16, "HND", f32),
        (64, 16, "NHD", half),
    ]
    build += [functools.partial(copy_case, *s) for s in shapes]
    build += [functools.partial(plan_case, 256, most) for most in (1, 100)]
    run("kv_handoff", build, args, {})


if __name__ == "__main__":
    main()
