"""linear with packed weights against torch's (oneDNN, MKL), and, for few rows, against reading as many bytes.

Products of SmolLM2-135M and Qwen3-0.6B: qkv, o, gate_up, down and head. "read" sums as many bytes of a cold buffer; its
ratio is the share of the read bandwidth that the product reaches. torch's result for a row depends on the batch, ours
does not.

python -m bench.ops.bench_linear [--seconds 1.5] [--threads 1] [--out FILE]
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from bench.ops.harness import Case, arguments, copies_for, run
from roro_fast.ops.linear import linear, pack_linear
from tests.ops.cases import linear as cases

SMOL = {"qkv": (960, 576), "o": (576, 576), "gate_up": (3072, 576), "down": (576, 1536), "head": (49152, 576)}
QWEN = {"qkv": (4096, 1024), "o": (1024, 2048), "gate_up": (6144, 1024), "down": (1024, 3072), "head": (151936, 1024)}
READ_BYTES = 256 << 20


def case(model: str, name: str, rows: int, columns: int, depth: int, dtype: torch.dtype) -> Case:
    size = columns * depth * dtype.itemsize
    n = copies_for(size, 160)
    inputs = [cases.make(rows, depth, columns, dtype, bias=False, seed=i) for i in range(min(n, 2))]
    weights = [inputs[i % len(inputs)].weight.clone() for i in range(n)]
    packed = [pack_linear(w) for w in weights]
    x = inputs[0].x.contiguous()
    variants = {"cpu": lambda i: linear(x, packed[i % n], impl="cpu"), "torch": lambda i: F.linear(x, weights[i % n])}
    targets = {"torch": 1.0}
    if rows == 1:
        memory = torch.ones(max(READ_BYTES, size) // 4)
        parts = memory.split(size // 4)[: memory.numel() * 4 // size]
        variants["read"] = lambda i: parts[i % len(parts)].sum()
        targets["read"] = 0.85

    def gate() -> None:
        cases.check(linear(inputs[0].x, packed[0], impl="cpu"), inputs[0], dtype)

    return Case(
        name=f"{model} {name} M={rows} {columns}x{depth} {str(dtype).removeprefix('torch.')}",
        variants=variants,
        ours="cpu",
        bytes=size + rows * (depth + columns) * dtype.itemsize,
        gate=gate,
        targets=targets,
        note=f"{2 * rows * columns * depth / 1e9:.4f} GFLOP",
    )


def main() -> None:
    args = arguments(__doc__)
    build = [
        functools.partial(case, model, name, rows, *shape, dtype)
        for dtype in (torch.bfloat16, torch.float32)
        for model, shapes in (("smol", SMOL), ("qwen", QWEN))
        for name, shape in shapes.items()
        for rows in (1, 8, 32, 800)
        if not (name == "head" and rows == 800) and not (model == "qwen" and dtype == torch.float32)
    ]
    run("linear", build, args, {})


if __name__ == "__main__":
    main()
