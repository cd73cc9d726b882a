"""Triton judge_score: the whole reward path from hidden rows to group-normalised advantages in two launches.

The first reads each verdict row once and multiplies it with the K verdict words. The second gives each group to one
program, which adds up the slots of its trajectories and normalises their scores. Every sum has a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from roro_fast.errors import ConfigError
from roro_fast.kernels import checks
from roro_fast.kernels.aot_spec import AotSpec

MAX_LABELS = 32
EPS = 1e-6  # as in roro_fast.ops.judge_score


@triton.jit(do_not_specialize=["m", "n_rows"])
def label_probs_kernel(
    hidden, rows, label_weight, criterion_weight, valence, probs, value, m, n_rows, width, hidden_stride,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """probs [M, K], and value [M] = criterion weight times the expected valence."""
    i = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    row = tl.load(rows + i, mask=i < m, other=-1)
    known = (row >= 0) & (row < n_rows)  # a wrong index reads nothing
    products = tl.zeros([BLOCK_M, BLOCK_K, BLOCK_H], tl.float32)
    for start in range(0, width, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        x = tl.load(
            hidden + row[:, None] * hidden_stride + h[None, :],
            mask=known[:, None] & (h < width)[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        w = tl.load(
            label_weight + k[:, None] * width + h[None, :], mask=(k < K)[:, None] & (h < width)[None, :], other=0.0
        ).to(tl.float32)
        products += x[:, None, :] * w[None, :, :]
    z = tl.where((k < K)[None, :], tl.sum(products, 2), float("-inf"))
    e = tl.exp(z - tl.max(z, 1)[:, None])
    p = e / tl.sum(e, 1)[:, None]
    tl.store(probs + i[:, None] * K + k[None, :], p, mask=(i < m)[:, None] & (k < K)[None, :])
    v = tl.load(valence + k, mask=k < K, other=0.0)
    c = tl.load(criterion_weight + i, mask=i < m, other=0.0)
    tl.store(value + i, c * tl.sum(p * v[None, :], 1), mask=i < m)


@triton.jit(do_not_specialize=["m", "n"])
def group_scores_kernel(
    value, criterion_weight, offsets, group_offsets, scores, advantages, m, n, eps,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program per group of trajectories; without groups, one per BLOCK_S trajectories."""
    g = tl.program_id(0).to(tl.int64)
    if group_offsets is None:
        first = g * BLOCK_S
        last = tl.minimum(first + BLOCK_S, n)
    else:
        first = tl.maximum(tl.load(group_offsets + g), 0)
        last = tl.minimum(tl.load(group_offsets + g + 1), n)
    sum_of_scores = tl.zeros([1], tl.float32)
    for start in range(first, last, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        low = tl.maximum(tl.load(offsets + s, mask=s < last, other=0), 0)
        high = tl.minimum(tl.load(offsets + s + 1, mask=s < last, other=0), m)
        total = tl.zeros([BLOCK_S], tl.float32)
        mass = tl.zeros([BLOCK_S], tl.float32)
        for skip in range(0, tl.max(high - low, 0), BLOCK_C):
            slot = (low + skip)[:, None] + tl.arange(0, BLOCK_C)[None, :]
            inside = slot < high[:, None]
            total += tl.sum(tl.load(value + slot, mask=inside, other=0.0), 1)
            mass += tl.sum(tl.load(criterion_weight + slot, mask=inside, other=0.0), 1)
        score = tl.where(mass > 0, total / tl.where(mass > 0, mass, 1.0), 0.0)
        tl.store(scores + s, score, mask=s < last)
        sum_of_scores += tl.sum(score, 0)
    if group_offsets is not None:
        count = tl.maximum(last - first, 1).to(tl.float32)
        mean = sum_of_scores / count
        squares = tl.zeros([1], tl.float32)
        tl.debug_barrier()  # the scores this program stored are read back by other threads of it
        for start in range(first, last, BLOCK_S):
            s = start + tl.arange(0, BLOCK_S)
            d = tl.where(s < last, tl.load(scores + s, mask=s < last, other=0.0) - mean, 0.0)
            squares += tl.sum(d * d, 0)
        scale = tl.sqrt(squares / count) + eps
        for start in range(first, last, BLOCK_S):
            s = start + tl.arange(0, BLOCK_S)
            d = tl.load(scores + s, mask=s < last, other=0.0) - mean
            tl.store(advantages + s, d / scale, mask=s < last)


def blocks(m: int, k: int, h: int) -> tuple[int, int, int]:
    """(BLOCK_M, BLOCK_K, BLOCK_H): up to 8192 products in flight; one row per program while rows are few."""
    block_k = triton.next_power_of_2(k)
    block_h = min(1024, 4096 // block_k, max(16, triton.next_power_of_2(h)))
    return (1 if m <= 256 else min(8, 8192 // (block_k * block_h))), block_k, block_h


def judge_score(
    hidden: torch.Tensor,
    rows: torch.Tensor,
    label_weight: torch.Tensor,
    criterion_weight: torch.Tensor,
    offsets: torch.Tensor,
    valence: torch.Tensor,
    group_offsets: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(probs, scores, advantages or None) of `roro_fast.ops.judge_score`. At most 32 labels."""
    device, f32 = hidden.device, torch.float32
    if hidden.ndim != 2 or hidden.dtype not in checks.FLOATS:
        raise ConfigError(f"hidden: {hidden.dtype} {list(hidden.shape)}; want [T, H] in float32, float16 or bfloat16")
    rows = checks.index("rows", rows, len(hidden), device)
    m, k, h = len(rows), len(label_weight), hidden.shape[1]
    checks.at_most("label_weight (labels)", k, MAX_LABELS)
    label_weight = checks.tensor("label_weight", label_weight, (k, h), device, checks.FLOATS)
    criterion_weight = checks.tensor("criterion_weight", criterion_weight, (m,), device, checks.FLOATS).float()
    valence = checks.tensor("valence", valence, (k,), device, checks.FLOATS).float()
    offsets = checks.offsets("offsets", offsets, m, device)
    n = len(offsets) - 1
    if group_offsets is not None:
        group_offsets = checks.offsets("group_offsets", group_offsets, n, device)
    if hidden.stride(1) != 1 and h > 1:
        hidden = hidden.contiguous()

    probs = torch.empty(m, k, dtype=f32, device=device)
    value = torch.empty(m, dtype=f32, device=device)
    scores = torch.empty(n, dtype=f32, device=device)
    advantages = None if group_offsets is None else torch.empty(n, dtype=f32, device=device)
    if m and k:
        block_m, block_k, block_h = blocks(m, k, h)
        label_probs_kernel[(triton.cdiv(m, block_m),)](
            hidden, rows, label_weight, criterion_weight, valence, probs, value, m, len(hidden), h, hidden.stride(0),
            K=k, BLOCK_K=block_k, BLOCK_M=block_m, BLOCK_H=block_h, num_warps=4,
        )  # fmt: skip
    if n:
        programs = triton.cdiv(n, 16) if group_offsets is None else len(group_offsets) - 1
        group_scores_kernel[(programs,)](
            value, criterion_weight, offsets, group_offsets, scores, advantages, m, n, EPS,
            BLOCK_S=16, BLOCK_C=32, num_warps=4,
        )  # fmt: skip
    return probs, scores, advantages


def _aot_probs(dtype: str, m: int, k: int) -> AotSpec:
    block_m, block_k, block_h = blocks(m, k, 4096)
    args = {"hidden": f"*{dtype}:16", "label_weight": f"*{dtype}:16", "rows": "*i64:16"}
    args |= dict.fromkeys(("criterion_weight", "valence", "probs", "value"), "*fp32:16")
    args |= {"m": "i32", "n_rows": "i32", "width": "i32:16", "hidden_stride": "i32:16"}
    meta = {"K": k, "BLOCK_K": block_k, "BLOCK_M": block_m, "BLOCK_H": block_h}
    return AotSpec(f"{dtype} M={m} K={k}", label_probs_kernel, args, meta)


def _aot_groups(grouped: bool) -> AotSpec:
    args = dict.fromkeys(("value", "criterion_weight", "scores"), "*fp32:16")
    args |= {"offsets": "*i64:16", "m": "i32", "n": "i32", "eps": "fp32"}
    meta = {"BLOCK_S": 16, "BLOCK_C": 32}
    if grouped:
        args |= {"group_offsets": "*i64:16", "advantages": "*fp32:16"}
    else:
        meta |= {"group_offsets": None, "advantages": None}
    return AotSpec("groups" if grouped else "no groups", group_scores_kernel, args, meta)


AOT = [_aot_probs(dtype, m, k) for dtype in ("bf16", "fp32") for m, k in ((256, 2), (1024, 2), (1024, 8), (1024, 32))]
AOT += [_aot_groups(True), _aot_groups(False)]
