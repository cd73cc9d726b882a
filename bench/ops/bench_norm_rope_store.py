"""norm_rope_store, add_rms_norm and silu_mul in C++ against the plain torch of the decoder and torch.compile of it.

python -m bench.ops.bench_norm_rope_store [--seconds 1.5] [--threads 1] [--no-compile] [--out FILE]
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from bench.ops.harness import Case, arguments, copies_for, run
from roro_fast.ops import norm_rope_store as ops
from tests.ops.cases import norm_rope_store as cases
from tests.ops.cases.common import assert_no_worse

# tokens, query heads, key heads, head dimension
ROPE = [(32, 4, 2, 16), (256, 4, 2, 16), (32, 9, 3, 64), (512, 9, 3, 64), (512, 16, 8, 128)]
WIDTHS = [(32, 64), (256, 64), (32, 576), (512, 576), (512, 2048)]


def rope_case(tokens: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> Case:
    size = tokens * (heads + 2 * kv_heads) * dim * dtype.itemsize
    inputs = [cases.make(tokens, heads, kv_heads, dim, 16, dtype, seed=i) for i in range(copies_for(2 * size))]
    at = lambda i: inputs[i % len(inputs)]  # noqa: E731

    def gate() -> None:
        c = inputs[0]
        before = c.k_pages.clone(), c.v_pages.clone()
        cases.check(c, before, ops.norm_rope_store(*c, impl="cpu"), dtype)

    return Case(
        name=f"norm_rope_store T={tokens} {heads}/{kv_heads} heads x {dim} {str(dtype).removeprefix('torch.')}",
        variants={
            "cpu": lambda i: ops.norm_rope_store(*at(i), impl="cpu"),
            "torch": lambda i: ops.norm_rope_store(*at(i), impl="reference"),
        },
        ours="cpu",
        bytes=2 * size + 2 * tokens * dim * 4,
        gate=gate,
    )


def rows_case(which: str, tokens: int, width: int, dtype: torch.dtype, compiled: Callable[..., Any] | None) -> Case:
    size = tokens * width * dtype.itemsize
    n = copies_for(4 * size)
    seeded = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=seeded).to(dtype)  # noqa: E731
    weight = draw(width)
    if which == "add_rms_norm":
        inputs = [(*draw(2, tokens, width), weight) for _ in range(n)]
        op, reference = ops.add_rms_norm, ops.add_rms_norm_reference
    else:
        inputs = [(draw(tokens, 2 * width),) for _ in range(n)]
        op, reference = ops.silu_mul, ops.silu_mul_reference
    at = lambda i: inputs[i % n]  # noqa: E731
    variants = {"cpu": lambda i: op(*at(i), impl="cpu"), "torch": lambda i: reference(*at(i))}
    if compiled is not None:
        variants["torch.compile"] = lambda i: compiled(*at(i))

    def gate() -> None:
        got, naive = op(*at(0), impl="cpu"), reference(*at(0))
        truth = reference(*(x.double() for x in at(0)))
        first = lambda x: x[0] if isinstance(x, tuple) else x  # noqa: E731
        assert_no_worse(first(got), first(naive), first(truth), dtype)

    return Case(
        name=f"{which} T={tokens} width {width} {str(dtype).removeprefix('torch.')}",
        variants=variants,
        ours="cpu",
        bytes=(4 if which == "add_rms_norm" else 3) * size,
        gate=gate,
    )


def main() -> None:
    args = arguments(__doc__)
    dtypes = (torch.float32, torch.bfloat16)
    build = [functools.partial(rope_case, *s, t) for s in ROPE for t in dtypes]
    for which, f in (("add_rms_norm", ops.add_rms_norm_reference), ("silu_mul", ops.silu_mul_reference)):
        compiled = None if args.no_compile else torch.compile(f, dynamic=True)
        build += [functools.partial(rows_case, which, *s, t, compiled) for s in WIDTHS for t in dtypes]
    run("norm_rope_store", build, args, {"Liger-Kernel": "needs a GPU"})


if __name__ == "__main__":
    main()
