"""kv_project in C++ around torch's batched product, against plain torch and torch.compile of it.

python -m bench.ops.bench_kv_project [--seconds 1.5] [--threads 1] [--no-compile] [--out FILE]

Next to each case stands the time of the product alone, which no handoff of this kind can beat.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from bench.ops.harness import Case, arguments, copies_for, run
from roro_fast.ops.kv_project import kv_project, reference
from tests.ops.cases import kv_project as cases

# tokens, source (layers, heads, dim, page size), receiver (likewise), source layers per map
SIZES = [
    (16, (2, 1, 16, 16), (4, 3, 32, 16), 2),
    (512, (2, 1, 16, 16), (4, 3, 32, 16), 2),
    (512, (4, 3, 32, 16), (2, 1, 16, 16), 4),
    (512, (10, 3, 64, 16), (30, 3, 64, 16), 1),
    (256, (28, 8, 128, 16), (28, 8, 128, 16), 1),
]


def case(
    tokens: int,
    source: tuple[int, int, int, int],
    target: tuple[int, int, int, int],
    chosen: int,
    dtype: torch.dtype,
    compiled: Callable[..., Any] | None,
) -> Case:
    kv = tokens * (source[0] * source[1] * source[2] + target[0] * target[1] * target[2]) * 2 * dtype.itemsize
    first = cases.make(tokens, source, target, chosen, dtype)
    size = kv + first.maps.weight.numel() * dtype.itemsize
    inputs = [first, *(cases.make(tokens, source, target, chosen, dtype, seed=i) for i in range(1, copies_for(size)))]
    x = torch.randn(2 * target[0], tokens, first.maps.weight.shape[3]).to(dtype)
    at = lambda i: inputs[i % len(inputs)]  # noqa: E731
    variants = {
        "cpu": lambda i: kv_project(*at(i), impl="cpu"),
        "torch": lambda i: reference(*at(i)),
        "product alone": lambda i: torch.bmm(x, at(i).maps.weight.flatten(0, 1).mT),
    }
    if compiled is not None:
        variants["torch.compile"] = lambda i: compiled(*at(i))

    def gate() -> None:
        before = first.target.clone()
        kv_project(*first, impl="cpu")
        cases.check(first, before, first.target)

    shape = "->".join(f"{layers}x{heads}x{dim}" for layers, heads, dim, _ in (source, target))
    return Case(
        name=f"kv_project T={tokens} {shape} n={chosen} {str(dtype).removeprefix('torch.')}",
        variants=variants,
        ours="cpu",
        bytes=size,
        gate=gate,
        note=f"{first.maps.flops_per_token * tokens / 1e9:.3f} GFLOP",
    )


def main() -> None:
    args = arguments(__doc__)
    compiled = None if args.no_compile else torch.compile(reference, dynamic=True)
    build = [functools.partial(case, *s, t, compiled) for s in SIZES for t in (torch.float32, torch.bfloat16)]
    run("kv_project", build, args, {"others": "no library projects KV between models"})


if __name__ == "__main__":
    main()
