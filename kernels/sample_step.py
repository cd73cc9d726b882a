"""Triton sample_step: one pass over the vocabulary, one launch.

A program reduces one chunk of a row to its maximum, its sums of exponentials and its best id. The last to arrive of a
row merges them, which gives every statistic and the chunk that holds the sampled token; only that chunk is read again.
Top-k and top-p find their threshold by bisection on the bits of the scaled logits, skipping chunks below it; no sort.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from roro_fast.errors import ConfigError
from roro_fast.kernels import checks
from roro_fast.kernels.aot_spec import AotSpec
from roro_fast.kernels.counters import counters
from roro_fast.kernels.tuning import tuned

CHUNKS = (4096, 8192, 2048)  # ids per program; the first unless RORO_TUNE=1


@triton.jit
def _key(y):
    """int32 that orders as the float32 `y` does; both zeros are equal."""
    bits = tl.where(y == 0, 0.0, y).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _scaled(row, c, v, t, CHUNK: tl.constexpr):
    """Chunk c of a row of logits divided by the temperature, rounded as torch rounds."""
    i = c * CHUNK + tl.arange(0, CHUNK)
    return i, tl.div_rn(tl.load(row + i, mask=i < v, other=float("-inf")).to(tl.float32), t)


@triton.jit
def _above(row, maxima, threshold, top, v, t, chunks, CHUNK: tl.constexpr):
    """(how many keys lie above `threshold`, sum of their exponentials relative to `top`)."""
    count = tl.zeros([1], tl.int64)
    mass = tl.zeros([1], tl.float64)
    for c in range(chunks):
        if _key(tl.div_rn(tl.load(maxima + c, cache_modifier=".cg"), t)) > threshold:
            _, y = _scaled(row, c, v, t, CHUNK)
            above = _key(y) > threshold
            count += tl.sum(above.to(tl.int32), 0)
            mass += tl.sum(tl.where(above, tl.exp(y - top), 0.0), 0)
    return tl.sum(count, 0), tl.sum(mass, 0)


@triton.jit
def _threshold(row, maxima, low, top, k, limit, v, t, chunks, BY_COUNT: tl.constexpr, CHUNK: tl.constexpr):
    """The smallest key above which there are fewer than k keys (or less than `limit` mass)."""
    low = low.to(tl.int64)
    high = _key(top).to(tl.int64)
    while low < high:
        middle = (low + high) >> 1
        count, mass = _above(row, maxima, middle.to(tl.int32), top, v, t, chunks, CHUNK)
        enough = count >= k if BY_COUNT else mass >= limit
        low = tl.where(enough, middle + 1, low)
        high = tl.where(enough, high, middle)
    return high.to(tl.int32)


@triton.jit
def _truncated_token(row, maxima, top, u, k, p, v, t, chunks, CHUNK: tl.constexpr):
    """Inverse CDF over what top-k and then top-p leave; equal logits stay in the order of their ids."""
    threshold = _key(tl.full([], float("-inf"), tl.float32))
    ties = tl.cast(v, tl.int64)
    if k < v:
        threshold = _threshold(row, maxima, threshold, top, k, 0.0, v, t, chunks, True, CHUNK)
    count, mass = _above(row, maxima, threshold, top, v, t, chunks, CHUNK)
    if k < v:
        ties = k - count
    up_to, _ = _above(row, maxima, threshold - 1, top, v, t, chunks, CHUNK)
    ties = tl.minimum(ties, up_to - count)
    share = tl.exp(_value(threshold) - top).to(tl.float64)
    if p < 1:
        limit = (mass + ties * share) * p
        higher = _threshold(row, maxima, threshold, top, 0, limit, v, t, chunks, False, CHUNK)
        if higher > threshold:
            threshold = higher
            count, mass = _above(row, maxima, threshold, top, v, t, chunks, CHUNK)
            up_to, _ = _above(row, maxima, threshold - 1, top, v, t, chunks, CHUNK)
            ties = up_to - count
            share = tl.exp(_value(threshold) - top).to(tl.float64)
        wanted = tl.ceil(tl.minimum((limit - mass) / tl.maximum(share, 1e-300), 1e9)).to(tl.int64)
        ties = tl.minimum(ties, tl.maximum(wanted, 1))
    target = u * (mass + ties * share)
    token = tl.full([], -1, tl.int64)
    last = tl.full([], 0, tl.int64)
    below = tl.zeros([], tl.float64)
    seen = tl.zeros([], tl.int64)
    for c in range(chunks):
        if (_key(tl.div_rn(tl.load(maxima + c, cache_modifier=".cg"), t)) >= threshold) & (token < 0):
            i, y = _scaled(row, c, v, t, CHUNK)
            key = _key(y)
            tie = (key == threshold) & (i < v)
            rank = seen + tl.cumsum(tie.to(tl.int32), 0)
            w = tl.where((key > threshold) | (tie & (rank <= ties)), tl.exp(y - top), 0.0)
            rest = (target - below).to(tl.float32)
            hit = tl.min(tl.where((tl.cumsum(w, 0) > rest) & (w > 0), i, v), 0).to(tl.int64)
            token = tl.where(hit < v, hit, token)
            last = tl.maximum(last, tl.max(tl.where(w > 0, i, 0), 0).to(tl.int64))
            below += tl.sum(w, 0)
            seen += tl.sum(tie.to(tl.int32), 0)
    return tl.where(token < 0, last, token)


@triton.jit
def _sampled_token(row, mass, c, u, top, v, t, CHUNK: tl.constexpr):
    """Inverse CDF over the whole row; mass [chunks] in fp64, relative to the scaled maximum `top`."""
    target = u * tl.sum(mass, 0)
    before = tl.cumsum(mass, 0)
    holds = tl.min(tl.where((before > target) & (mass > 0), c, 1 << 30), 0)
    holds = tl.minimum(holds, tl.max(tl.where(mass > 0, c, 0), 0))
    rest = (target - tl.sum(tl.where(c < holds, mass, 0.0), 0)).to(tl.float32)
    i, y = _scaled(row, holds, v, t, CHUNK)
    w = tl.exp(y - top)
    hit = tl.min(tl.where((tl.cumsum(w, 0) > rest) & (w > 0), i, v), 0)
    return tl.where(hit < v, hit, tl.max(tl.where(w > 0, i, 0), 0)).to(tl.int64)


@triton.jit
def _finish_row(
    row, n, hot, t, uniforms, top_k, top_p, token, logprob, entropy, max_prob, finite,
    maxima, sums, weighted, hot_sums, best, v, chunks, CHUNK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """From the chunks of one row to its five outputs."""
    c = tl.arange(0, BLOCK_C)
    at = n * chunks + c
    real = c < chunks
    m = tl.load(maxima + at, mask=real, other=float("-inf"), cache_modifier=".cg")
    sum_e = tl.load(sums + at, mask=real, other=0.0, cache_modifier=".cg")
    wsum = tl.load(weighted + at, mask=real, other=0.0, cache_modifier=".cg")
    hsum = tl.load(hot_sums + at, mask=real, other=0.0, cache_modifier=".cg")
    ids = tl.load(best + at, mask=real, other=0, cache_modifier=".cg")
    top = tl.max(tl.where(m != m, float("-inf"), m), 0)
    good = (tl.max((m != m).to(tl.int32), 0) == 0) & (top > float("-inf")) & (top < float("inf"))
    some = m > float("-inf")
    scale = tl.where(some, tl.exp(m - top), 0.0)
    total = tl.sum(tl.where(some, sum_e * scale, 0.0), 0)
    moment = tl.sum(tl.where(some, scale * (wsum + (m - top) * sum_e), 0.0), 0)
    taken = tl.min(tl.where((m == top) & real, ids, v), 0).to(tl.int64)
    if hot & good:
        u = tl.load(uniforms + n).to(tl.float64)
        hottest = tl.div_rn(top, t)
        mass = tl.where(some, hsum * tl.exp(tl.div_rn(m, t) - hottest), 0.0).to(tl.float64)
        taken = _sampled_token(row, mass, c, u, hottest, v, t, CHUNK)
        if top_k is not None or top_p is not None:
            k = tl.cast(v, tl.int64)
            if top_k is not None:
                asked = tl.load(top_k + n)
                k = tl.where(asked > 0, asked, k)
            p = tl.full([], 1.0, tl.float32)
            if top_p is not None:
                p = tl.load(top_p + n)
            if (k < v) | (p < 1):
                taken = _truncated_token(row, maxima + n * chunks, hottest, u, k, p, v, t, chunks, CHUNK)
    taken = tl.where(good, taken, 0)
    size = tl.cast(v, tl.float32)
    log_total = tl.log(tl.where(good, total, size))
    x = tl.load(row + taken).to(tl.float32)
    tl.store(token + n, taken)
    tl.store(logprob + n, tl.where(good, x - top, 0.0) - log_total)
    tl.store(entropy + n, log_total - tl.where(good, moment / total, 0.0))
    tl.store(max_prob + n, 1.0 / tl.where(good, total, size))
    tl.store(finite + n, good)


@triton.jit
def sample_step_kernel(
    logits, uniforms, temperature, top_k, top_p, token, logprob, entropy, max_prob, finite,
    maxima, sums, weighted, hot_sums, best, arrived, v, row_stride,
    CHUNK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    n, c = tl.program_id(0).to(tl.int64), tl.program_id(1)
    chunks = tl.num_programs(1)
    row = logits + n * row_stride
    i = c * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(row + i, mask=i < v, other=float("-inf")).to(tl.float32)
    hot = tl.load(temperature + n) > 0
    t = tl.where(hot, tl.maximum(tl.load(temperature + n), 1e-6), 1.0)

    broken = tl.max((x != x).to(tl.int32), 0) > 0
    m = tl.max(tl.where(x != x, float("-inf"), x), 0)
    base = tl.where((m > float("-inf")) & (m < float("inf")), m, 0.0)
    e = tl.exp(x - base)
    sum_e = tl.sum(e, 0)
    sum_hot = sum_e
    if hot & (t != 1.0):
        sum_hot = tl.sum(tl.exp(tl.div_rn(x, t) - tl.div_rn(base, t)), 0)
    at = n * chunks + c
    tl.store(maxima + at, tl.where(broken, float("nan"), m))
    tl.store(sums + at, sum_e)
    tl.store(weighted + at, tl.sum(tl.where(e > 0, (x - base) * e, 0.0), 0))
    tl.store(hot_sums + at, sum_hot)
    tl.store(best + at, tl.min(tl.where(x == m, i, v), 0))
    tl.debug_barrier()
    if tl.atomic_add(arrived + n, 1, sem="acq_rel") == chunks - 1:
        tl.store(arrived + n, 0)
        _finish_row(
            row, n, hot, t, uniforms, top_k, top_p, token, logprob, entropy, max_prob, finite,
            maxima, sums, weighted, hot_sums, best, v, chunks, CHUNK, BLOCK_C,
        )  # fmt: skip


def sample_step(
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """(token, logprob, entropy, max_prob, finite) of `roro_fast.ops.sample_step`."""
    device, f32 = logits.device, torch.float32
    if logits.ndim != 2 or logits.dtype not in checks.FLOATS or logits.shape[1] == 0:
        raise ConfigError(f"logits: {logits.dtype} {list(logits.shape)}; want [N, V > 0] float32, float16 or bfloat16")
    n, v = logits.shape
    uniforms = checks.tensor("uniforms", uniforms, (n,), device, f32)
    temperature = checks.tensor("temperature", temperature, (n,), device, f32)
    top_k = None if top_k is None else checks.tensor("top_k", top_k, (n,), device, torch.int64)
    top_p = None if top_p is None else checks.tensor("top_p", top_p, (n,), device, f32)
    if logits.stride(1) != 1 and v > 1:
        logits = logits.contiguous()
    token = torch.empty(n, dtype=torch.int64, device=device)
    logprob, entropy, max_prob = torch.empty(3, n, dtype=f32, device=device)
    finite = torch.empty(n, dtype=torch.bool, device=device)
    if n == 0:
        return token, logprob, entropy, max_prob, finite

    def launch(widest: int) -> None:
        chunk = min(widest, max(16, triton.next_power_of_2(v)))
        chunks = triton.cdiv(v, chunk)
        maxima, sums, weighted, hot_sums = torch.empty(4, n, chunks, dtype=f32, device=device)
        sample_step_kernel[n, chunks](
            logits, uniforms, temperature, top_k, top_p, token, logprob, entropy, max_prob, finite,
            maxima, sums, weighted, hot_sums, torch.empty(n, chunks, dtype=torch.int32, device=device),
            counters(n, device), v, logits.stride(0),
            CHUNK=chunk, BLOCK_C=triton.next_power_of_2(chunks), num_warps=max(4, chunk // 1024),
        )  # fmt: skip

    shape = (triton.next_power_of_2(n), v, logits.dtype, top_k is not None or top_p is not None)
    launch(tuned("sample_step", shape, CHUNKS, launch, device))
    return token, logprob, entropy, max_prob, finite


def _aot(dtype: str, v: int, truncate: bool, chunk: int) -> AotSpec:
    floats = ("uniforms", "temperature", "logprob", "entropy", "max_prob", "maxima", "sums", "weighted", "hot_sums")
    args = {"logits": f"*{dtype}:16", **dict.fromkeys(floats, "*fp32:16"), "token": "*i64:16", "finite": "*i1:16"}
    args |= {"best": "*i32:16", "arrived": "*i32:16", "v": "i32:16", "row_stride": "i32:16"}
    meta: dict[str, int | None] = {"CHUNK": chunk, "BLOCK_C": triton.next_power_of_2(triton.cdiv(v, chunk))}
    if truncate:
        args |= {"top_k": "*i64:16", "top_p": "*fp32:16"}
    else:
        meta |= {"top_k": None, "top_p": None}
    name = f"{dtype} V={v} chunk={chunk}{' top-k/p' if truncate else ''}"
    return AotSpec(name, sample_step_kernel, args, meta, max(4, chunk // 1024))


AOT = [_aot("bf16", 152064, cut, chunk) for chunk in CHUNKS for cut in (False, True)]
AOT += [_aot("fp32", 262144, True, CHUNKS[0])]
