"""paged_attention in C++ against torch SDPA over gathered keys and values, and shared prefixes against unshared ones.

    python -m bench.ops.bench_paged_attention [--seconds 1.5] [--threads 1] [--out FILE]

"SDPA, gathered" is the reference with its groups made outside the timing. The ceilings are timed beside it: "read"
reads as many bytes as the keys and values have, "matmul" is a torch product of as many FLOPs in the same dtype.
"""

from __future__ import annotations

import functools

import torch

from bench.ops.harness import Case, arguments, multiplier, reader, run
from roro_fast.ops.paged_attention import make_groups, paged_attention
from tests.ops.cases import paged_attention as cases

# name, (query length, context) of each sequence, query heads, key heads, head dimension
SHAPES = [
    ("nano decode", [(1, 200)] * 64, 4, 2, 16),
    ("nano decode", [(1, 150)] * 256, 4, 2, 16),
    ("nano prefill", [(100, 100)] * 16, 4, 2, 16),
    ("decode", [(1, 1024)] * 32, 9, 3, 64),
    ("decode", [(1, 1024)] * 32, 16, 8, 128),
    ("decode and catch-up", [(1, 512)] * 24 + [(40, 512)] * 8, 9, 3, 64),
    ("prefill", [(512, 512)] * 2, 9, 3, 64),
    ("prefill", [(800, 800)], 9, 3, 64),
    ("catch-up", [(20, 820)], 9, 3, 64),
]
SHARED = [(8, 2048, 9, 3, 64), (8, 2048, 16, 8, 128), (16, 4096, 9, 3, 64)]  # group, prefix, heads, key heads, dim


def case(name: str, shapes: list[tuple[int, int]], hq: int, hkv: int, dim: int, dtype: torch.dtype) -> Case:
    c = cases.make(shapes, hq, hkv, dim, 16, dtype)
    groups = make_groups(c.page_table, c.kv_lens, c.cu_seqlens, c.k_pages)
    tokens = sum(n for _, n in shapes)
    size = 2 * tokens * hkv * dim * dtype.itemsize
    flops = sum(4 * dim * hq * (n * (context - n) + n * (n + 1) // 2) for n, context in shapes)
    decode = all(n == 1 for n, _ in shapes)
    kind = str(dtype).removeprefix("torch.")
    return Case(
        name=f"{name}: {len(shapes)} sequences, {tokens} tokens, {hq}/{hkv} heads x {dim} {kind}",
        variants={
            "cpu": lambda i: paged_attention(*c.args, impl="cpu"),
            "SDPA, gathered": lambda i: paged_attention(*c.args, groups=groups, impl="reference"),
            **({"read": reader(size)} if decode else {"matmul": multiplier(flops, dtype)}),
        },
        ours="cpu",
        bytes=size,
        flops=0 if decode else flops,
        gate=lambda: cases.check(c, paged_attention(*c.args, impl="cpu"), dtype),
        targets={"SDPA, gathered": 2.0},
    )


def shared_case(group: int, prefix: int, hq: int, hkv: int, dim: int, dtype: torch.dtype) -> Case:
    c = cases.make([(1, prefix + 64)] * group, hq, hkv, dim, 16, dtype, shared=[(group, prefix // 16)])
    return Case(
        name=f"shared prefix {prefix} x {group}, {hq}/{hkv} heads x {dim} {str(dtype).removeprefix('torch.')}",
        variants={
            "cpu": lambda i: paged_attention(*c.args, prefix=c.prefix, impl="cpu"),
            "cpu, unshared": lambda i: paged_attention(*c.args, impl="cpu"),
        },
        ours="cpu",
        bytes=2 * (prefix + 64 * group) * hkv * dim * dtype.itemsize,
        gate=lambda: cases.check(c, paged_attention(*c.args, prefix=c.prefix, impl="cpu"), dtype),
        targets={"cpu, unshared": 2.0},
    )


def main() -> None:
    args = arguments(__doc__)
    dtypes = (torch.float32, torch.bfloat16)
    build = [functools.partial(case, *s, t) for s in SHAPES for t in dtypes]
    build += [functools.partial(shared_case, *s, t) for s in SHARED for t in dtypes]
    run("paged_attention", build, args, {"flash-attn": "needs a GPU", "FlashInfer": "needs a GPU"})


if __name__ == "__main__":
    main()
