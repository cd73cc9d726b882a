"""KV handoff between the models of a pool: plan the exact catch-up of missing tokens, copy tokens or pages, project."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch

from roro_fast.errors import RoroError
from roro_fast.ops import native, native_cuda
from roro_fast.ops.kv_project import kv_project as project  # noqa: F401  the approximate handoff has its own file
from roro_fast.ops.registry import Implementation, register, select
from roro_fast.ops.triton_impl import register_triton

LAYOUTS = ("NHD", "HND")


class CatchUpBatch(NamedTuple):
    """Ragged batch of T tokens over N sequences: ids, positions, slots [T] int64; cu_seqlens [N + 1] int64.

    `slots` is where each token's K and V go: page * page_size + offset within the model's pool.
    """

    ids: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    cu_seqlens: np.ndarray


def plan(
    tokens: np.ndarray,
    rows: np.ndarray,
    start: np.ndarray,
    count: np.ndarray,
    page_table: np.ndarray,
    page_size: int,
    *,
    impl: str | None = None,
) -> CatchUpBatch:
    """Tokens [start, start + count) of each row, for every row in one pass.

    tokens [S, L] int64 and page_table [S, P] int64 hold all sequences; rows, start, count [N] int64 choose among them.
    """
    fn = select("kv_plan", _CPU, torch.int64, impl)
    batch: CatchUpBatch = fn(tokens, rows, start, count, page_table, page_size)
    return batch


_CPU = torch.device("cpu")


def plan_reference(
    tokens: np.ndarray, rows: np.ndarray, start: np.ndarray, count: np.ndarray, page_table: np.ndarray, page_size: int
) -> CatchUpBatch:
    cu = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(count, out=cu[1:])
    row = np.repeat(rows, count)
    positions = np.arange(cu[-1]) + np.repeat(start - cu[:-1], count)
    pages = page_table[row, positions // page_size]
    return CatchUpBatch(tokens[row, positions], positions, pages * page_size + positions % page_size, cu)


def plan_cpu(
    tokens: np.ndarray, rows: np.ndarray, start: np.ndarray, count: np.ndarray, page_table: np.ndarray, page_size: int
) -> CatchUpBatch:
    """csrc/host/catch_up.cpp; checks every index."""
    try:
        return CatchUpBatch(*_host().plan(tokens, rows, start, count, page_table, page_size))
    except ValueError as e:
        raise RoroError(str(e)) from None


@cache
def _host() -> Any:
    return importlib.import_module("roro_fast._host")


def _host_usable(device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    try:
        _host()
    except ImportError as e:
        return False, f"roro_fast._host is missing ({e}); install again with a C++17 compiler"
    return True, ""


register(Implementation("kv_plan", "reference", plan_reference))
register(Implementation("kv_plan", "cpu", plan_cpu, _host_usable, native.PRIORITY))


def copy(
    source: torch.Tensor,
    target: torch.Tensor,
    spans: torch.Tensor,
    *,
    source_layout: str = "NHD",
    target_layout: str = "NHD",
    impl: str | None = None,
) -> None:
    """Move runs of tokens from one pool of pages to another, in place: bit-exact when the dtype is kept.

    source and target [pages, *inner, page_size, Hkv, D] in layout "NHD" or [pages, *inner, Hkv, page_size, D] in "HND";
    number and size of the pages, layout and dtype may differ, inner (layers, k/v: up to 4 dimensions), Hkv and D may
    not. Another float dtype is rounded to nearest even. spans [n, 3] int64: (source slot, target slot, tokens), where
    slot = page * page_size + offset of the respective pool; see `page_spans`. No target slot may be in two spans, and
    within one pool none may be read as well.
    """
    source, target = _token_major("source", source, source_layout), _token_major("target", target, target_layout)
    select("kv_copy", source.device, source.dtype, impl)(source, target, spans)


def page_spans(
    source_pages: np.ndarray, target_pages: np.ndarray, source_size: int, target_size: int, start: int, stop: int
) -> torch.Tensor:
    """Spans for tokens [start, stop) of one sequence, whose pages are listed in order for both pools; [n, 3] int64."""
    cuts = _cuts(start, max(start, stop), source_size, target_size)
    at, count = cuts[:-1], np.diff(cuts)
    return torch.from_numpy(
        np.stack([_slots(source_pages, at, source_size), _slots(target_pages, at, target_size), count], 1)
    )


def copy_reference(source: torch.Tensor, target: torch.Tensor, spans: torch.Tensor) -> None:
    """Token by token through advanced indexing; source and target token-major."""
    check_spans(source, target, spans)
    count = spans[:, 2]
    within = torch.arange(int(count.sum()), device=spans.device) - (count.cumsum(0) - count).repeat_interleave(count)
    read, write = (spans[:, i].repeat_interleave(count) + within for i in (0, 1))
    s, t = source.movedim(-3, 1), target.movedim(-3, 1)  # [pages, page_size, *inner, Hkv, D]
    if len(within):
        moved = s[read // s.shape[1], read % s.shape[1]]
        t[write // t.shape[1], write % t.shape[1]] = moved.to(t.dtype)


def check_spans(source: torch.Tensor, target: torch.Tensor, spans: torch.Tensor) -> None:
    """RoroError for shapes that do not fit and for spans outside a pool or overlapping; reads `spans`."""
    if source.dim() != target.dim() or source.dim() < 4 or source.shape[-2:] != target.shape[-2:]:
        raise RoroError(f"target: shape {list(target.shape)} does not fit source {list(source.shape)}")
    if source.shape[1:-3] != target.shape[1:-3]:
        raise RoroError(f"target: shape {list(target.shape)} does not fit source {list(source.shape)}")
    if spans.dtype != torch.int64 or spans.dim() != 2 or spans.shape[1] != 3:
        raise RoroError(f"spans: {spans.dtype} {list(spans.shape)} but int64 [n, 3] is needed")
    rows = spans[spans[:, 2] != 0]
    if not len(rows):
        return
    for name, pool, first in (("source", source, rows[:, 0]), ("target", target, rows[:, 1])):
        slots = pool.shape[0] * pool.shape[-3]
        if int(rows[:, 2].min()) < 0 or int(first.min()) < 0 or bool((first > slots - rows[:, 2]).any()):
            raise RoroError(f"spans: {name} slots outside the pool, which has {slots}")
    order = rows[:, 1].argsort()
    first, last = rows[order, 1], rows[order, 1] + rows[order, 2]
    if bool((first[1:] < last[:-1]).any()):
        raise RoroError("spans: a slot of the target is in two spans")
    if source.data_ptr() == target.data_ptr():
        if source.stride() != target.stride() or source.shape != target.shape:
            raise RoroError("target: shares the memory of source but has other pages; copy through a third pool")
        at = torch.searchsorted(last, rows[:, 0].contiguous(), right=True)
        hit = at < len(last)
        if bool((first[at.clamp_max(len(last) - 1)] < rows[:, 0] + rows[:, 2])[hit].any()):
            raise RoroError("spans: a span reads a slot of the same pool that a span writes")


def copy_cpu(source: torch.Tensor, target: torch.Tensor, spans: torch.Tensor) -> None:
    """csrc/cpu/kv_copy.cpp: runs as long as page size and layout allow."""
    native.call("kv_copy", source, target, spans)


def copy_cuda(source: torch.Tensor, target: torch.Tensor, spans: torch.Tensor) -> None:
    """csrc/cuda/kv_handoff.cu; checks the values of spans when they are on the CPU or RORO_DEBUG=1."""
    if native_cuda.checks.DEBUG or spans.device != source.device:
        check_spans(source, target, spans)
    native_cuda.call("kv_copy", source, target, spans.to(source.device).contiguous())


register(Implementation("kv_copy", "reference", copy_reference))
native.register_cpu("kv_copy", copy_cpu)
register_triton("kv_copy", "kv_handoff", "copy", any_dtype=True)
native_cuda.register_cuda("kv_copy", copy_cuda, native_cuda.usable_any)


def _token_major(name: str, pool: torch.Tensor, layout: str) -> torch.Tensor:
    if layout not in LAYOUTS:
        raise RoroError(f"{name}_layout: {layout!r} is not one of {', '.join(LAYOUTS)}")
    return pool if layout == "NHD" else pool.transpose(-3, -2)


def _cuts(start: int, stop: int, *sizes: int) -> np.ndarray:
    """start, stop and every page boundary of either pool between them."""
    inner = [np.arange((start // n + 1) * n, stop, n) for n in sizes]
    return np.unique(np.concatenate([np.array([start, stop]), *inner]))


def _slots(pages: np.ndarray, position: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(pages, np.int64)[position // size] * size + position % size


def copy_pages(pool: torch.Tensor, source: torch.Tensor, target: torch.Tensor, *, impl: str | None = None) -> None:
    """pool[target] = pool[source], bit-exact, in place; pool [pages, ...], source and target [n] int64, disjoint."""
    select("kv_copy_pages", pool.device, pool.dtype, impl)(pool, source, target)


def copy_pages_reference(pool: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
    pool[target] = pool[source]


register(Implementation("kv_copy_pages", "reference", copy_pages_reference))


def copy_pages_cpu(pool: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
    native.call("kv_copy_pages", pool, source, target)


native.register_cpu("kv_copy_pages", copy_pages_cpu)


def copy_pages_cuda(pool: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
    """csrc/cuda/kv_handoff.cu."""
    native_cuda.checks.in_range("source", source, len(pool))
    native_cuda.checks.in_range("target", target, len(pool))
    native_cuda.call("kv_copy_pages", pool, source, target)


native_cuda.register_cuda("kv_copy_pages", copy_pages_cuda, native_cuda.usable_any)
register_triton("kv_copy_pages", "kv_handoff", "copy_pages", any_dtype=True)
