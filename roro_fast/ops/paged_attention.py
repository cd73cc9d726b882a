"""Ragged grouped-query attention over paged keys and values: decode and catch-up rows in one call."""

from __future__ import annotations

import math
from importlib import import_module
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from roro_fast.ops import flash_attn_impl, native  # noqa: F401  the former registers itself
from roro_fast.ops.registry import Implementation, register, select
from roro_fast.ops.triton_impl import register_triton


class Group(NamedTuple):
    """n sequences of similar shape, padded to W queries and C keys. Padding repeats a sequence's own last token,
    so that nothing outside its context is ever read: what a free page holds, NaN included, cannot matter.

    queries [n, W] int64 into the T query rows; valid [n, W] bool, None when all are; tokens [n * C] int64, where keys
    and values are, counted in tokens from the start of the pool; seen [n, 1, W, C] bool, the causal mask.
    """

    queries: torch.Tensor
    valid: torch.Tensor | None
    tokens: torch.Tensor
    seen: torch.Tensor


class PrefixGroups(NamedTuple):
    """Sequences whose first tokens lie in the same pages: forks of one prompt, prompts that begin alike.

    Group g: sequences `members[offsets[g]:offsets[g + 1]]` share the pages of their first `lengths[g]` tokens, all of
    which come before their queries. members [M], offsets [G + 1], lengths [G], int64; each sequence is in one group at
    most, a group may be empty and a length 0. An implementation may read a shared prefix once for its whole group and
    join each row's softmax over prefix and own tokens by their log-sum-exp (Ye et al., "Cascade Inference", 2024;
    Juravsky et al., arXiv 2402.05099): the result is that of attention without groups, up to rounding.
    """

    members: torch.Tensor
    offsets: torch.Tensor
    lengths: torch.Tensor


class PlacedGroups(PrefixGroups):
    """Groups with what the Triton kernels work out of them and the query offsets, the same for every layer."""

    places: tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def for_layers(prefix: PrefixGroups | None, cu_seqlens: torch.Tensor, dtype: torch.dtype) -> PrefixGroups | None:
    """`prefix` for all layers of one forward: what would be the same work in each of them is done here."""
    if prefix is None or not len(prefix.lengths):
        return prefix
    serves = select("paged_attention", prefix.members.device, dtype)
    if serves in (reference, cpu, flash_attn_impl.paged_attention):
        return prefix
    placed = PlacedGroups(*prefix)
    kernel = import_module("roro_fast.kernels.paged_attention")
    placed.places = kernel.places(prefix.members, prefix.offsets, cu_seqlens)
    return placed


def shared_prefixes(
    page_table: np.ndarray, own: np.ndarray, page_size: int, min_tokens: int = 64
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """What `find_prefix_groups` finds, in numpy, for a scheduler that has its tables there; None when it finds nothing.

    own [N]: tokens of each sequence before its queries.
    """
    order = np.argsort(page_table[:, 0], kind="stable") if page_table.size else np.empty(0, np.int64)
    begins = np.flatnonzero(np.diff(page_table[order, 0] if len(order) else order, prepend=-1))
    if len(begins) == len(order):
        return None
    sizes = np.diff(begins, append=len(order))
    same = page_table[order] == page_table[order[np.repeat(begins, sizes)]]
    run = np.where(same.all(1), page_table.shape[1], same.argmin(1))
    lengths = np.minimum.reduceat(np.minimum(run, own[order] // page_size), begins) * page_size
    keep = (sizes > 1) & (lengths >= min_tokens)
    if not keep.any():
        return None
    return order[np.repeat(keep, sizes)], np.concatenate(([0], sizes[keep].cumsum())), lengths[keep]


def find_prefix_groups(
    page_table: torch.Tensor, kv_lens: torch.Tensor, cu_seqlens: torch.Tensor, page_size: int, min_tokens: int = 64
) -> PrefixGroups:
    """Groups of sequences with the same first page, each with the longest run of whole pages that all members share
    before their queries; runs shorter than `min_tokens` are not worth a group. Reads the tables on the CPU."""
    table, own = page_table.cpu().numpy(), (kv_lens - cu_seqlens.diff()).cpu().numpy()
    found = shared_prefixes(table, own, page_size, min_tokens) or (np.empty(0, int), np.zeros(1, int), np.empty(0, int))
    return PrefixGroups(*(torch.from_numpy(x).to(page_table.device) for x in found))


def paged_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    kv_lens: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    groups: list[Group] | None = None,
    prefix: PrefixGroups | None = None,
    window: int = 0,
    impl: str | None = None,
) -> torch.Tensor:
    """Causal attention of the last tokens of N sequences against their whole cached context.

    q [T, Hq, D]; k_pages, v_pages [pages, page_size, Hkv, D] (any strides); page_table [N, P] int64; kv_lens [N] int64,
    context length of each sequence with its query tokens; cu_seqlens [N + 1] int64, query offsets. The queries of a
    sequence are its last `cu[i + 1] - cu[i]` positions, whose K and V are already in the pages. `groups` is what
    `make_groups` gives for the same lengths and tables, to share among the layers of one forward; only the reference
    uses it (`wants_groups`). `prefix` names sequences that share pages; it changes the speed, not the result.
    `window`: a query sees that many of the latest tokens, itself included; 0 for all. It is served by fewer
    implementations, under an op name of its own, "windowed_attention". Returns [T, Hq, D].
    """
    at = q, k_pages, v_pages, page_table, kv_lens, cu_seqlens, groups
    if window:
        windowed: torch.Tensor = select("windowed_attention", q.device, q.dtype, impl)(*at, window)
        return windowed
    out: torch.Tensor = select("paged_attention", q.device, q.dtype, impl)(*at, prefix)
    return out


def wants_groups(device: torch.device, dtype: torch.dtype, impl: str | None = None, window: int = 0) -> bool:
    """Whether what serves such queries uses `groups`; the others would only pay for making them."""
    op = "windowed_attention" if window else "paged_attention"
    return select(op, device, dtype, impl) in (reference, windowed_reference)


def make_groups(
    page_table: torch.Tensor,
    kv_lens: torch.Tensor,
    cu_seqlens: torch.Tensor,
    pages: torch.Tensor,
    window: int = 0,
) -> list[Group]:
    """Sequences whose query lengths agree within 2x and contexts within 1.5x go together, which bounds the padding.

    `pages` is `k_pages` of any layer: it tells how far apart pages are. `window` as in `paged_attention`.
    """
    size, stride = pages.shape[1], _page_stride(pages)
    offsets = torch.arange(size, device=kv_lens.device)
    q_lens = cu_seqlens.diff()
    bucket = 1000 * torch.ceil(torch.log2(q_lens.double())) + torch.ceil(torch.log(kv_lens.double()) / math.log(1.5))
    bucket = bucket.where(q_lens > 0, -1.0)
    groups = []
    for b in bucket.unique().tolist():
        if b < 0:
            continue
        rows = (bucket == b).nonzero().squeeze(-1)
        lens, counts = kv_lens[rows, None], q_lens[rows, None]
        step = torch.arange(int(counts.max()), device=kv_lens.device)
        key = torch.arange(int(lens.max()), device=kv_lens.device)
        used = page_table[rows, : -(-len(key) // size)] * stride
        tokens = (used[..., None] + offsets).flatten(1)[:, : len(key)]
        tokens = torch.where(key < lens, tokens, tokens.gather(1, lens - 1))
        at = (lens - counts + step)[..., None]  # positions of the queries
        groups.append(
            Group(
                queries=cu_seqlens[rows, None] + torch.minimum(step, counts - 1),
                valid=None if bool((counts == len(step)).all()) else step < counts,
                tokens=tokens.flatten(),
                seen=((key <= at) & (key > at - window) if window else key <= at)[:, None],
            )
        )
    return groups


def reference(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    kv_lens: torch.Tensor,
    cu_seqlens: torch.Tensor,
    groups: list[Group] | None = None,
    prefix: PrefixGroups | None = None,
) -> torch.Tensor:
    """Gather each group's keys and values into a rectangle and let torch's SDPA do the arithmetic; a shared prefix is
    gathered for each of its sequences."""
    if groups is None:
        groups = make_groups(page_table, kv_lens, cu_seqlens, k_pages)
    out = torch.empty_like(q)
    k_tokens, v_tokens = _token_rows(k_pages), _token_rows(v_pages)
    for g in groups:
        shape = (len(g.queries), -1, *k_pages.shape[2:])
        k, v = (x.index_select(0, g.tokens).view(shape).transpose(1, 2) for x in (k_tokens, v_tokens))
        o = F.scaled_dot_product_attention(
            q[g.queries].transpose(1, 2), k, v, attn_mask=g.seen, enable_gqa=q.shape[1] != k.shape[1]
        ).transpose(1, 2)
        if g.valid is None:
            out[g.queries] = o
        else:
            out[g.queries[g.valid]] = o[g.valid]
    return out


def windowed_reference(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    kv_lens: torch.Tensor,
    cu_seqlens: torch.Tensor,
    groups: list[Group] | None,
    window: int,
) -> torch.Tensor:
    """`reference` under the mask of a window; `groups` must have been made for it."""
    if groups is None:
        groups = make_groups(page_table, kv_lens, cu_seqlens, k_pages, window)
    return reference(q, k_pages, v_pages, page_table, kv_lens, cu_seqlens, groups)


def _page_stride(pages: torch.Tensor) -> int:
    """Tokens between the starts of two pages; the page size when tokens are not evenly spaced rows."""
    _, size, heads, dim = pages.shape
    across, along, *inner = pages.stride()
    even = along == heads * dim and across % along == 0 and inner == [dim, 1]
    return across // along if even else size


def _token_rows(pages: torch.Tensor) -> torch.Tensor:
    """[tokens, Hkv * D] in units of `_page_stride`: a view (3x faster to gather from), or a copy of an odd layout."""
    count, size, heads, dim = pages.shape
    stride, width = _page_stride(pages), heads * dim
    if pages.stride()[1:] != (width, dim, 1) or pages.stride(0) != stride * width:
        return pages.reshape(count * size, width)
    return pages.as_strided((max(count - 1, 0) * stride + size, width), (width, 1))


def cpu(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    kv_lens: torch.Tensor,
    cu_seqlens: torch.Tensor,
    groups: list[Group] | None = None,
    prefix: PrefixGroups | None = None,
) -> torch.Tensor:
    """csrc/cpu/paged_attention.cpp: keys and values are read where they lie; online softmax, sums in float32.

    The result of a row depends on its query and context alone, bit for bit: not on the rest of the batch, on how its
    sequence was cut into calls, on `prefix` or on the number of threads.
    """
    shared = (None, None, None) if prefix is None else prefix
    out: torch.Tensor = native.call("paged_attention", q, k_pages, v_pages, page_table, kv_lens, cu_seqlens, *shared)
    return out


register(Implementation("paged_attention", "reference", reference))
register(Implementation("windowed_attention", "reference", windowed_reference))
native.register_cpu("paged_attention", cpu, torch.float32, torch.bfloat16)
register_triton("paged_attention", "paged_attention", "paged_attention")
register_triton("windowed_attention", "paged_attention", "windowed_attention")
