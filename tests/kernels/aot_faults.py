"""An AOT table in which every entry is wrong in its own way, and one that is right: what the driver must tell apart."""

from __future__ import annotations

import triton
import triton.language as tl

from roro_fast.kernels.aot_spec import AotSpec


@triton.jit
def softmax_kernel(x, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    v = tl.load(x + tl.program_id(0) * n + i, mask=i < n, other=float("-inf"))
    e = tl.exp(v - tl.max(v, 0))
    tl.store(out + tl.program_id(0) * n + i, e / tl.sum(e, 0), mask=i < n)


@triton.jit
def dot_kernel(x, y, out, BLOCK: tl.constexpr, DEPTH: tl.constexpr):
    i, k = tl.arange(0, BLOCK), tl.arange(0, DEPTH)
    a = tl.load(x + i[:, None] * DEPTH + k[None, :])
    b = tl.load(y + k[:, None] * BLOCK + i[None, :])
    tl.store(out + i[:, None] * BLOCK + i[None, :], tl.dot(a, b))


_ROW = {"x": "*fp32:16", "out": "*fp32:16", "n": "i32:16"}
_DOT = {"x": "*bf16:16", "y": "*bf16:16", "out": "*fp32:16"}
AOT = [
    AotSpec("right", dot_kernel, _DOT, {"BLOCK": 64, "DEPTH": 64}, matrix=True),
    AotSpec("spills", softmax_kernel, _ROW, {"BLOCK": 16384}, num_warps=1),
    AotSpec("too much shared memory", dot_kernel, _DOT, {"BLOCK": 128, "DEPTH": 1024}, num_warps=8, matrix=True),
    AotSpec("no matrix instruction", softmax_kernel, _ROW, {"BLOCK": 1024}, matrix=True),
    AotSpec("argument forgotten", softmax_kernel, {"x": "*fp32", "out": "*fp32"}, {"BLOCK": 1024}),
]
