"""Triton kv_handoff: runs of tokens between pools of pages, whole pages within a pool, and the catch-up plan.

Moves within a dtype travel as integers of the same width, so that every bit arrives, NaN payloads too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from roro_fast.errors import ConfigError
from roro_fast.kernels import checks
from roro_fast.kernels.aot_spec import AotSpec

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PROGRAMS = 2048  # enough to keep any GPU's memory busy
_TILE = 4096  # elements a program moves at a time


@triton.jit(do_not_specialize=["source_slots", "target_slots"])
def copy_spans_kernel(
    source, target, spans, source_slots, target_slots, source_size, target_size, width,
    source_page, source_token, source_outer, source_inner,
    target_page, target_token, target_outer, target_inner, inner,
    CONVERT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Grid (spans, outer * inner runs, shares of a span). A run is `width` adjacent elements of one token."""
    span, run = tl.program_id(0).to(tl.int64) * 3, tl.program_id(1)
    first_read, first_write = tl.load(spans + span), tl.load(spans + span + 1)
    count = tl.load(spans + span + 2)
    outside = (first_read < 0) | (first_read + count > source_slots)
    outside = outside | (first_write < 0) | (first_write + count > target_slots)
    count = tl.where(outside, 0, count)  # a wrong span moves nothing
    o, i = (run // inner).to(tl.int64), (run % inner).to(tl.int64)
    source += o * source_outer + i * source_inner
    target += o * target_outer + i * target_inner
    for start in range(tl.program_id(2) * BLOCK_T, count, tl.num_programs(2) * BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        read, write = first_read + t, first_write + t
        s = source + (read // source_size) * source_page + (read % source_size) * source_token
        d = target + (write // target_size) * target_page + (write % target_size) * target_token
        for at in range(0, width, BLOCK_E):
            e = at + tl.arange(0, BLOCK_E)
            mask = (t < count)[:, None] & (e < width)[None, :]
            x = tl.load(s[:, None] + e[None, :], mask=mask)
            if CONVERT:
                x = x.to(tl.float32).to(target.dtype.element_ty)
            tl.store(d[:, None] + e[None, :], x, mask=mask)


@triton.jit(do_not_specialize=["pages"])
def copy_pages_kernel(pool, source, target, pages, width, page_stride, BLOCK: tl.constexpr):
    read, write = tl.load(source + tl.program_id(0)), tl.load(target + tl.program_id(0))
    e = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = (e < width) & (read >= 0) & (read < pages) & (write >= 0) & (write < pages)
    tl.store(pool + write * page_stride + e, tl.load(pool + read * page_stride + e, mask=mask), mask=mask)


@triton.jit(do_not_specialize=["n", "length", "pages", "total"])
def plan_kernel(
    tokens, rows, start, count, page_table, ids, positions, slots, cu_seqlens,
    n, length, pages, total, page_size, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each program adds up the counts before its sequence, then lists that sequence's tokens."""
    seq = tl.program_id(0)
    before = tl.zeros([1], tl.int64)
    for at in range(0, seq, BLOCK):
        i = at + tl.arange(0, BLOCK)
        before += tl.sum(tl.load(count + i, mask=i < seq, other=0), 0)
    before = tl.sum(before, 0)
    mine = tl.load(count + seq)
    tl.store(cu_seqlens + seq + 1, before + mine)
    if seq == 0:
        tl.store(cu_seqlens, before)
    row, first = tl.load(rows + seq), tl.load(start + seq)
    for at in range(0, mine, BLOCK):
        i = at + tl.arange(0, BLOCK)
        position, out = first + i, before + i
        mask = (i < mine) & (out < total) & (position >= 0) & (position < length)
        tl.store(ids + out, tl.load(tokens + row * length + position, mask=mask), mask=mask)
        tl.store(positions + out, position, mask=mask)
        page = tl.load(page_table + row * pages + position // page_size, mask=mask & (position // page_size < pages))
        tl.store(slots + out, page * page_size + position % page_size, mask=mask)


def copy(source: torch.Tensor, target: torch.Tensor, spans: torch.Tensor) -> None:
    """`roro_fast.ops.kv_handoff.copy` of token-major pools [pages, *inner, page_size, Hkv, D], any strides."""
    if source.dim() != target.dim() or source.dim() < 4 or source.shape[-2:] != target.shape[-2:]:
        raise ConfigError(f"target: shape {list(target.shape)} does not fit source {list(source.shape)}")
    if source.shape[1:-3] != target.shape[1:-3]:
        raise ConfigError(f"target: shape {list(target.shape)} does not fit source {list(source.shape)}")
    if source.dtype != target.dtype and not (source.dtype in checks.FLOATS and target.dtype in checks.FLOATS):
        raise ConfigError(f"target: cannot convert {source.dtype} to {target.dtype}; want float32, float16 or bfloat16")
    if target.device != source.device:
        raise ConfigError(f"target: on {target.device}, source on {source.device}; move one of them first")
    spans = checks.tensor("spans", spans, (None, 3), source.device, torch.int64)
    slots = [p.shape[0] * p.shape[-3] for p in (source, target)]
    if checks.DEBUG and len(spans):
        for name, first, limit in zip(("source", "target"), spans.T, slots, strict=False):
            if int(first.min()) < 0 or int(spans[:, 2].min()) < 0 or int((first + spans[:, 2]).max()) > limit:
                raise ConfigError(f"spans: {name} slots outside the pool, which has {limit}")
    if not len(spans) or not source.numel() or not target.numel():
        return
    convert = source.dtype != target.dtype
    if not convert:
        source, target = source.view(_BITS[source.element_size()]), target.view(_BITS[target.element_size()])
    _copy(source, target, spans, slots, convert)


def _copy(s: torch.Tensor, t: torch.Tensor, spans: torch.Tensor, slots: list[int], convert: bool) -> None:
    sizes = [s.shape[-3], t.shape[-3]]
    dims = [(s.shape[d], s.stride(d), t.stride(d)) for d in (*range(1, s.dim() - 3), -2, -1)]
    runs = _merge(dims)
    if runs[-1][1:] != (1, 1):
        runs.append((1, 1, 1))
    width, outer = runs[-1][0], runs[:-1]
    if len(outer) > 2:  # no pool of the engine: one launch for each index of the outermost dimension
        for i in range(s.shape[1]):
            _copy(s.select(1, i), t.select(1, i), spans, slots, convert)
        return
    (a, sa, ta), (b, sb, tb) = [(1, 0, 0)] * (2 - len(outer)) + outer
    block_e = min(1024, triton.next_power_of_2(width))
    block_t = max(1, min(_TILE // block_e, 32))
    shares = max(1, min(64, _PROGRAMS // (len(spans) * a * b)))
    copy_spans_kernel[len(spans), a * b, shares](
        s, t, spans, *slots, *sizes, width,
        s.stride(0), s.stride(-3), sa, sb, t.stride(0), t.stride(-3), ta, tb, b,
        CONVERT=convert, BLOCK_T=block_t, BLOCK_E=block_e, num_warps=4,
    )  # fmt: skip


def _merge(dims: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """(size, source stride, target stride) of each dimension, with neighbours that are one run in both joined."""
    out: list[tuple[int, int, int]] = []
    for size, a, b in dims:
        if size == 1:
            continue
        if out and out[-1][1:] == (size * a, size * b):
            size *= out.pop()[0]
        out.append((size, a, b))
    return out or [(1, 1, 1)]


def copy_pages(pool: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
    """pool[target] = pool[source]; the pages of `pool` may lie apart but each must be one run of memory."""
    source = checks.index("source", source, len(pool), pool.device)
    target = checks.index("target", target, len(pool), pool.device, len(source))
    if not len(source) or not pool.numel():
        return
    if not pool[0].is_contiguous():
        raise ConfigError(f"pool: the elements of a page are not adjacent, strides {pool.stride()}")
    width, stride = pool[0].numel() * pool.element_size(), pool.stride(0) * pool.element_size()
    start = pool.storage_offset() * pool.element_size()
    unit = next(u for u in (8, 4, 2, 1) if width % u == stride % u == start % u == 0)
    raw = pool.as_strided((len(pool), pool[0].numel()), (pool.stride(0), 1)).view(_BITS[unit])
    block = min(_TILE, triton.next_power_of_2(width // unit))
    copy_pages_kernel[len(source), triton.cdiv(width // unit, block)](
        raw, source, target, len(pool), width // unit, stride // unit, BLOCK=block, num_warps=4
    )


def plan(
    tokens: torch.Tensor,
    rows: torch.Tensor,
    start: torch.Tensor,
    count: torch.Tensor,
    page_table: torch.Tensor,
    page_size: int,
    total: int,
) -> tuple[torch.Tensor, ...]:
    """(ids, positions, slots, cu_seqlens) of `roro_fast.ops.kv_plan.plan_on_device`, in one launch."""
    device, i64 = tokens.device, torch.int64
    rows = checks.index("rows", rows, len(tokens), device)
    n = len(rows)
    tokens = checks.tensor("tokens", tokens, (None, None), device, i64)
    page_table = checks.tensor("page_table", page_table, (len(tokens), None), device, i64)
    start, count = (checks.tensor(name, x, (n,), device, i64) for name, x in (("start", start), ("count", count)))
    if page_size < 1 or total < 0:
        raise ConfigError(f"page_size: {page_size}, total: {total}; want at least 1 and 0")
    ids, positions, slots = torch.empty(3, total, dtype=i64, device=device)
    if n == 0:
        return ids, positions, slots, torch.zeros(1, dtype=i64, device=device)
    cu = torch.empty(n + 1, dtype=i64, device=device)
    plan_kernel[(n,)](
        tokens, rows, start, count, page_table, ids, positions, slots, cu,
        n, tokens.shape[1], page_table.shape[1], total, page_size, BLOCK=256, num_warps=2,
    )  # fmt: skip
    return ids, positions, slots, cu


def _aot_copy(source: str, target: str, block_e: int) -> AotSpec:
    strides = [f"{p}_{d}" for p in ("source", "target") for d in ("page", "token", "outer", "inner")]
    args = {"source": f"*{source}:16", "target": f"*{target}:16", "spans": "*i64:16", "inner": "i32"}
    args |= {"source_slots": "i32", "target_slots": "i32", "source_size": "i32:16", "target_size": "i32:16"}
    args |= {"width": "i32:16", **dict.fromkeys(strides, "i32:16")}
    meta = {"CONVERT": source != target, "BLOCK_T": min(32, _TILE // block_e), "BLOCK_E": block_e}
    return AotSpec(f"{source} to {target} run={block_e}", copy_spans_kernel, args, meta)


_PLAN = dict.fromkeys(
    ("tokens", "rows", "start", "count", "page_table", "ids", "positions", "slots", "cu_seqlens"), "*i64:16"
)
AOT = [_aot_copy("i16", "i16", 1024), _aot_copy("i16", "i16", 128), _aot_copy("i32", "i32", 1024)]
AOT += [_aot_copy("fp32", "bf16", 1024), _aot_copy("bf16", "fp16", 128)]
AOT += [
    AotSpec(
        "8-byte units",
        copy_pages_kernel,
        {"pool": "*i64:16", "source": "*i64:16", "target": "*i64:16", "pages": "i32"}
        | {"width": "i32:16", "page_stride": "i32:16"},
        {"BLOCK": _TILE},
    ),
    AotSpec(
        "page size 16",
        plan_kernel,
        _PLAN | {"n": "i32", "length": "i32", "pages": "i32", "total": "i32", "page_size": "i32:16"},
        {"BLOCK": 256},
        num_warps=2,
    ),
]
