"""Triton paged_attention: ragged queries, grouped heads, split keys and shared prefixes.

A program attends BLOCK_Q tokens, times the query heads of one key head, to its share of the context; the last share to
arrive joins all of them by log-sum-exp. A prefix that a group of sequences shares is attended first, by the queries of
the whole group, in a launch of its own; its result is one more share.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch.utils.weak import WeakTensorKeyDictionary

from roro_fast.errors import ConfigError
from roro_fast.kernels import checks
from roro_fast.kernels.aot_spec import AotSpec
from roro_fast.kernels.counters import counters
from roro_fast.kernels.tuning import tuned

_PROGRAMS = 256  # shares are cut until there are about so many; fixed, so that results do not depend on the GPU
_MAX_SPLITS = 16


# Counts of a batch change from call to call: variants compiled for a count of 1, or a multiple of 16, would not pay.
_COUNTS = ["n_tokens", "n_sequences", "n_members", "n_groups", "table_width", "pages"]


@triton.jit
def _segment_of(tile, cu, n, BLOCK_Q: tl.constexpr):
    """The segment of ragged tokens that a tile belongs to: segment i owns tiles cu[i] // BLOCK_Q + i and on."""
    low = tl.full([], 0, tl.int32)
    high = n
    while high - low > 1:
        middle = (low + high) // 2
        here = tl.load(cu + middle) // BLOCK_Q + middle <= tile
        low = tl.where(here, middle, low)
        high = tl.where(here, high, middle)
    return low


@triton.jit
def _attend(
    q, k_pages, v_pages, table, low, high, last_seen, kv_head, scale, pages, page_size,
    k_page, k_token, k_head, k_dim, v_page, v_token, v_head, v_dim,
    D: tl.constexpr, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_KV: tl.constexpr,
):  # fmt: skip
    """q [BM, BD] to tokens [low, high) of one page table: (output [BM, BD], log2 of the sum of exponentials [BM])."""
    d = tl.arange(0, BLOCK_D)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(low, high, BLOCK_KV):
        at = start + tl.arange(0, BLOCK_KV)
        page = tl.load(table + at // page_size, mask=at < high, other=-1)
        real = (page >= 0) & (page < pages)  # a wrong page reads nothing
        k_at = page * k_page + (at % page_size) * k_token + kv_head * k_head
        v_at = page * v_page + (at % page_size) * v_token + kv_head * v_head
        k = tl.load(k_pages + k_at[None, :] + d[:, None] * k_dim, mask=real[None, :] & (d < D)[:, None], other=0.0)
        s = tl.dot(q, k, input_precision="tf32x3") * scale
        s = tl.where(real[None, :] & (at[None, :] <= last_seen[:, None]), s, float("-inf"))
        if WINDOW > 0:
            s = tl.where(at[None, :] > last_seen[:, None] - WINDOW, s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(s - base[:, None])
        shrink = tl.exp2(top - base)
        v = tl.load(v_pages + v_at[:, None] + d[None, :] * v_dim, mask=real[:, None] & (d < D)[None, :], other=0.0)
        total = total * shrink + tl.sum(p, 1)
        out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision="tf32x3")
        top = higher
    some = total > 0
    lse = tl.where(some, top + tl.log2(tl.where(some, total, 1.0)), float("-inf"))
    return out / tl.where(some, total, 1.0)[:, None], lse


@triton.jit(do_not_specialize=_COUNTS)
def prefix_attention_kernel(
    q, k_pages, v_pages, page_table, cu_seqlens, members, offsets, lengths, member_cu, group_cu, partial, partial_lse,
    n_tokens, n_members, n_groups, table_width, scale, pages, page_size,
    k_page, k_token, k_head, k_dim, v_page, v_token, v_head, v_dim,
    HEADS: tl.constexpr, RATIO: tl.constexpr, D: tl.constexpr, FIRST: tl.constexpr, STEPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_KV: tl.constexpr,
):  # fmt: skip
    """Shares FIRST.. of `partial`: the queries of a whole group, to the tokens that the group shares."""
    tile, kv_head, split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    group = _segment_of(tile, group_cu, n_groups, BLOCK_Q)
    start, stop = tl.load(group_cu + group), tl.load(group_cu + group + 1)
    m = tl.arange(0, BLOCK_M)
    row = start + (tile - (start // BLOCK_Q + group)) * BLOCK_Q + m // RATIO
    live = (row < stop) & (m < BLOCK_Q * RATIO)
    low = tl.zeros([BLOCK_M], tl.int32)
    high = tl.zeros([BLOCK_M], tl.int32) + n_members
    for _ in range(STEPS):  # the member whose queries hold this row
        middle = tl.minimum((low + high) // 2, n_members)
        here = tl.load(member_cu + middle) <= row
        low = tl.where(here, middle, low)
        high = tl.where(here, high, middle)
    low = tl.minimum(low, n_members - 1)
    token = tl.load(cu_seqlens + tl.load(members + low)) + row - tl.load(member_cu + low)
    live = live & (token < n_tokens)
    head = kv_head * RATIO + m % RATIO
    d = tl.arange(0, BLOCK_D)
    at = (token * HEADS + head)[:, None] * D + d[None, :]
    inside = live[:, None] & (d < D)[None, :]
    length = tl.minimum(tl.load(lengths + group), table_width * page_size)
    span = tl.cdiv(tl.cdiv(length, tl.num_programs(2)), BLOCK_KV) * BLOCK_KV
    table = page_table + tl.load(members + tl.load(offsets + group)) * table_width
    if start < stop:
        out, lse = _attend(
            tl.load(q + at, mask=inside, other=0.0), k_pages, v_pages, table, split * span,
            tl.minimum((split + 1) * span, length), tl.zeros([BLOCK_M], tl.int64) + length, kv_head, scale, pages,
            page_size, k_page, k_token, k_head, k_dim, v_page, v_token, v_head, v_dim,
            D, 0, BLOCK_M, BLOCK_D, BLOCK_KV,
        )  # fmt: skip
        share = (FIRST + split).to(tl.int64) * n_tokens * HEADS
        tl.store(partial + share * D + at, out, mask=inside)
        tl.store(partial_lse + share + token * HEADS + head, lse, mask=live)


@triton.jit(do_not_specialize=_COUNTS)
def paged_attention_kernel(
    q, k_pages, v_pages, page_table, kv_lens, cu_seqlens, group_of, lengths, output, partial, partial_lse, arrived,
    n_tokens, n_sequences, table_width, scale, pages, page_size,
    k_page, k_token, k_head, k_dim, v_page, v_token, v_head, v_dim,
    HEADS: tl.constexpr, RATIO: tl.constexpr, D: tl.constexpr, WINDOW: tl.constexpr, SPLITS: tl.constexpr,
    SHARES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_KV: tl.constexpr,
):  # fmt: skip
    """Shares 0..SPLITS: a sequence's own tokens; the last to arrive joins SHARES, those of its prefix included."""
    tile, kv_head, split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    seq = _segment_of(tile, cu_seqlens, n_sequences, BLOCK_Q)
    start, stop = tl.load(cu_seqlens + seq), tl.minimum(tl.load(cu_seqlens + seq + 1), n_tokens)
    context = tl.load(kv_lens + seq)
    first = (tile - (start // BLOCK_Q + seq)) * BLOCK_Q
    if first < stop - start:
        m = tl.arange(0, BLOCK_M)
        token = start + first + m // RATIO
        live = (token < stop) & (m < BLOCK_Q * RATIO)
        head = kv_head * RATIO + m % RATIO
        d = tl.arange(0, BLOCK_D)
        at = (token * HEADS + head)[:, None] * D + d[None, :]
        inside = live[:, None] & (d < D)[None, :]
        low = tl.full([], 0, tl.int64)
        if group_of is not None:
            group = tl.load(group_of + seq)
            if group >= 0:
                low = tl.load(lengths + group)
        position = context - stop + token
        if WINDOW > 0:  # no query of this tile sees less
            low = tl.maximum(low, context - stop + start + first - WINDOW + 1)
        high = tl.minimum(context - stop + tl.minimum(start + first + BLOCK_Q, stop), table_width * page_size)
        span = tl.cdiv(tl.cdiv(tl.maximum(high - low, 0), SPLITS), BLOCK_KV) * BLOCK_KV
        out, lse = _attend(
            tl.load(q + at, mask=inside, other=0.0), k_pages, v_pages, page_table + seq.to(tl.int64) * table_width,
            low + split * span, tl.minimum(low + (split + 1) * span, high), position, kv_head, scale, pages,
            page_size, k_page, k_token, k_head, k_dim, v_page, v_token, v_head, v_dim,
            D, WINDOW, BLOCK_M, BLOCK_D, BLOCK_KV,
        )  # fmt: skip
        if SHARES == 1:
            tl.store(output + at, out.to(output.dtype.element_ty), mask=inside)
        else:
            share = n_tokens.to(tl.int64) * HEADS
            lse_at = token * HEADS + head
            tl.store(partial + split * share * D + at, out, mask=inside)
            tl.store(partial_lse + split * share + lse_at, lse, mask=live)
            tl.debug_barrier()
            done = arrived + tile * tl.num_programs(1) + tl.program_id(1)
            if tl.atomic_add(done, 1, sem="acq_rel") == SPLITS - 1:
                tl.store(done, 0)
                shares = tl.full([], SHARES, tl.int32)
                if group_of is not None:  # noqa: SIM102 (decided when compiled; the next when run)
                    if tl.load(group_of + seq) < 0:
                        shares = tl.full([], SPLITS, tl.int32)
                top = tl.full([BLOCK_M], float("-inf"), tl.float32)
                for s in range(shares):
                    one = tl.load(
                        partial_lse + s * share + lse_at, mask=live, other=float("-inf"), cache_modifier=".cg"
                    )
                    top = tl.maximum(top, one)
                top = tl.where(top == float("-inf"), 0.0, top)
                total = tl.zeros([BLOCK_M], tl.float32)
                joined = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
                for s in range(shares):
                    one = tl.load(
                        partial_lse + s * share + lse_at, mask=live, other=float("-inf"), cache_modifier=".cg"
                    )
                    weight = tl.exp2(one - top)
                    total += weight
                    part = tl.load(partial + s * share * D + at, mask=inside, other=0.0, cache_modifier=".cg")
                    joined += part * weight[:, None]
                joined = joined / tl.where(total > 0, total, 1.0)[:, None]
                tl.store(output + at, joined.to(output.dtype.element_ty), mask=inside)


class Tiles(NamedTuple):
    block_m: int
    block_q: int
    block_d: int
    block_kv: int
    tiles: int
    splits: int
    warps: int
    stages: int


def tiles(
    tokens: int, segments: int, per_segment: float, kv_heads: int, ratio: int, dim: int, context: int, wide: bool
) -> Tiles:
    """Tiles for `tokens` queries in `segments`; `context` bounds their keys; `wide`: 4-byte elements."""
    block_d = max(16, triton.next_power_of_2(dim))
    most = (16 if block_d >= 128 else 32) if wide else 64  # tf32x3 holds q twice in registers
    block_m = max(most if per_segment * ratio >= 32 else 16, triton.next_power_of_2(ratio))
    block_q = block_m // ratio
    block_kv = 16 if wide and block_d >= 128 else 32 if wide or block_d > 128 else 64
    if block_m == 16 and block_d == 128:
        block_kv = min(block_kv, 32)
    heavy = block_m * block_d >= (4096 if wide or block_d > 128 else 8192)
    count = tokens // block_q + segments
    splits = 1
    while 2 * splits <= _MAX_SPLITS and 2 * splits * count * kv_heads <= _PROGRAMS and 128 * splits < context:
        splits *= 2
    return Tiles(block_m, block_q, block_d, block_kv, count, splits, 8 if heavy else 4, 2)


def variants(t: Tiles) -> list[Tiles]:
    """The default and what RORO_TUNE=1 may take instead: narrower key blocks, kept further ahead."""
    return [t] if t.block_kv <= 16 else [t, t._replace(block_kv=t.block_kv // 2, stages=3)]


_prefixes = WeakTensorKeyDictionary()


def _prepare(prefix: Any, cu_seqlens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `places` gives: brought along, or kept for the layers of a forward where tensors can tell of changes."""
    if (given := getattr(prefix, "places", None)) is not None:
        known: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = given
        return known
    members, offsets, _ = prefix
    stamp = None
    if not any(t.is_inference() for t in (members, offsets, cu_seqlens)):
        stamp = (id(cu_seqlens), *(t._version for t in (members, offsets, cu_seqlens)))
        found = _prefixes.get(members)
        if found is not None and found[0] == stamp:
            kept: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = found[1]
            return kept
    result = places(members, offsets, cu_seqlens)
    if stamp is not None:
        _prefixes[members] = (stamp, result, cu_seqlens)  # holding cu_seqlens keeps its id its own
    return result


def places(
    members: torch.Tensor, offsets: torch.Tensor, cu_seqlens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(group of each sequence or -1, first query of each member, of each group), without looking at the device."""
    counts = cu_seqlens.diff()
    member_cu = torch.zeros(len(members) + 1, dtype=torch.int64, device=members.device)
    member_cu[1:] = counts[members].cumsum(0)
    group_of = torch.full_like(counts, -1)
    groups = torch.arange(len(offsets) - 1, device=members.device)
    group_of[members] = groups.repeat_interleave(offsets.diff(), output_size=len(members))
    return group_of, member_cu, member_cu[offsets]


def paged_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    kv_lens: torch.Tensor,
    cu_seqlens: torch.Tensor,
    groups: Any = None,
    prefix: Any = None,
    window: int = 0,
) -> torch.Tensor:
    """`roro_fast.ops.paged_attention`; `groups` is for the reference only. `prefix` and `window` do not go together."""
    device, i64 = q.device, torch.int64
    if q.ndim != 3 or k_pages.ndim != 4 or k_pages.shape != v_pages.shape or q.shape[2] != k_pages.shape[3]:
        shapes = [list(x.shape) for x in (q, k_pages, v_pages)]
        raise ConfigError(f"q, k_pages, v_pages: shapes {shapes}; want [T, Hq, D] and twice [pages, size, Hkv, D]")
    (n_tokens, heads, dim), (pages, page_size, kv_heads, _) = q.shape, k_pages.shape
    if kv_heads == 0 or heads % kv_heads or heads // kv_heads > 64 or dim > 256:
        raise ConfigError(f"q: {heads} heads of {dim} on {kv_heads} key heads; want whole groups of <= 64, D <= 256")
    if k_pages.dtype != q.dtype or v_pages.dtype != q.dtype or {k_pages.device, v_pages.device} != {device}:
        raise ConfigError(f"k_pages, v_pages: must have q's dtype {q.dtype} and device {device}")
    kv_lens = checks.tensor("kv_lens", kv_lens, (None,), device, i64)
    n = len(kv_lens)
    page_table = checks.tensor("page_table", page_table, (n, None), device, i64)
    cu_seqlens = checks.tensor("cu_seqlens", cu_seqlens, (n + 1,), device, i64)
    if checks.DEBUG:
        _check_values(page_table, kv_lens, checks.offsets("cu_seqlens", cu_seqlens, n_tokens, device), page_size, pages)
    q = q.contiguous()
    out = torch.empty_like(q)
    if n_tokens == 0:
        return out
    ratio, width, wide = heads // kv_heads, page_table.shape[1], q.dtype == torch.float32
    longest = min(width * page_size, window + -(-n_tokens // n)) if window else width * page_size
    own = tiles(n_tokens, n, n_tokens / n, kv_heads, ratio, dim, longest, wide)
    shared, shares, group_of, lengths = None, own.splits, None, None
    if prefix is not None and len(prefix[2]):
        members = checks.index("prefix.members", prefix[0], n, device)
        offsets = checks.offsets("prefix.offsets", prefix[1], len(members), device)
        lengths = checks.tensor("prefix.lengths", prefix[2], (len(offsets) - 1,), device, i64)
        group_of, member_cu, group_cu = _prepare(prefix, cu_seqlens)
        per_group = n_tokens / n * len(members) / len(lengths)
        shared = tiles(n_tokens, len(lengths), per_group, kv_heads, ratio, dim, width * page_size, wide)
        shares += shared.splits
    partial = torch.empty(shares if shares > 1 else 0, n_tokens, heads, dim, device=device)
    partial_lse = torch.empty(shares if shares > 1 else 0, n_tokens, heads, device=device)
    scale = math.log2(math.e) / math.sqrt(dim)
    pool = (pages, page_size, *k_pages.stride(), *v_pages.stride())
    if shared is not None:

        def launch_prefix(t: Tiles) -> None:
            prefix_attention_kernel[t.tiles, kv_heads, t.splits](
                q, k_pages, v_pages, page_table, cu_seqlens, members, offsets, lengths, member_cu, group_cu,
                partial, partial_lse, n_tokens, len(members), len(lengths), width, scale, *pool,
                HEADS=heads, RATIO=ratio, D=dim, FIRST=own.splits, STEPS=len(members).bit_length() + 1,
                BLOCK_M=t.block_m, BLOCK_Q=t.block_q, BLOCK_D=t.block_d, BLOCK_KV=t.block_kv,
                num_warps=t.warps, num_stages=t.stages,
            )  # fmt: skip

        shape = (shared.block_m, shared.splits, dim, heads, kv_heads, page_size, q.dtype)
        launch_prefix(tuned("paged_attention.prefix", shape, variants(shared), launch_prefix, device))

    def launch(t: Tiles) -> None:
        paged_attention_kernel[t.tiles, kv_heads, t.splits](
            q, k_pages, v_pages, page_table, kv_lens, cu_seqlens, group_of, lengths, out, partial, partial_lse,
            counters(t.tiles * kv_heads, device), n_tokens, n, width, scale, *pool,
            HEADS=heads, RATIO=ratio, D=dim, WINDOW=window, SPLITS=t.splits, SHARES=shares,
            BLOCK_M=t.block_m, BLOCK_Q=t.block_q, BLOCK_D=t.block_d, BLOCK_KV=t.block_kv,
            num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip

    shape = (own.block_m, own.splits, shares, dim, heads, kv_heads, page_size, q.dtype)
    launch(tuned("paged_attention", shape, variants(own), launch, device))
    return out


def _check_values(table: torch.Tensor, lens: torch.Tensor, cu: torch.Tensor, page_size: int, pages: int) -> None:
    if bool((lens < cu.diff()).any()) or bool((lens > table.shape[1] * page_size).any()):
        raise ConfigError("kv_lens: shorter than the sequence's queries, or longer than its page table")
    used = torch.arange(table.shape[1], device=table.device) * page_size < lens[:, None]
    if bool(((table < 0) | (table >= pages))[used].any()):
        raise ConfigError(f"page_table: a page is outside 0..{pages - 1}")


def windowed_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    kv_lens: torch.Tensor,
    cu_seqlens: torch.Tensor,
    groups: Any,
    window: int,
) -> torch.Tensor:
    return paged_attention(q, k_pages, v_pages, page_table, kv_lens, cu_seqlens, None, None, window)


def _aot(dtype: str, dim: int, ratio: int, decode: bool, prefix: bool, window: int = 0) -> list[AotSpec]:
    heads, page = 8 * ratio, {"page_size": "i32:16", "pages": "i32", "table_width": "i32", "scale": "fp32"}
    strides = {f"{p}_{d}": "i32:16" for p in "kv" for d in ("page", "token", "head")}
    pools = {"q": f"*{dtype}:16", "k_pages": f"*{dtype}:16", "v_pages": f"*{dtype}:16"}
    tables = dict.fromkeys(("page_table", "cu_seqlens", "lengths"), "*i64:16")
    work = {"partial": "*fp32:16", "partial_lse": "*fp32:16", "n_tokens": "i32"}
    common = pools | tables | work | page | strides
    tokens = 32 if decode else 2048
    t = tiles(tokens, 32, tokens / 32, 8, ratio, dim, 4096, dtype == "fp32")
    meta: dict[str, Any] = {"k_dim": 1, "v_dim": 1, "HEADS": heads, "RATIO": ratio, "D": dim}
    name = f"{dtype} D={dim} ratio={ratio} {'decode' if decode else 'prefill'}" + f" window={window}" * (window > 0)
    main_args = common | {"kv_lens": "*i64:16", "output": f"*{dtype}:16", "arrived": "*i32:16", "n_sequences": "i32"}
    main_meta = meta | {"WINDOW": window, "SPLITS": t.splits, "SHARES": t.splits + 4 * prefix}
    if prefix:
        main_args |= {"group_of": "*i64:16"}
    else:
        main_meta |= {"group_of": None, "lengths": None}
        del main_args["lengths"]
    choices = [(name + " prefix" * prefix, paged_attention_kernel, main_args, main_meta, t)]
    if prefix:
        lists = dict.fromkeys(("members", "offsets", "member_cu", "group_cu"), "*i64:16")
        args = common | lists | {"n_members": "i32", "n_groups": "i32"}
        group = tiles(tokens, 2, tokens / 2, 8, ratio, dim, 4096, dtype == "fp32")
        choices.append((name, prefix_attention_kernel, args, meta | {"FIRST": 2, "STEPS": 6}, group))
    specs = []
    for title, kernel, args, fixed, t in choices:
        for v in variants(t) if dim == 128 else [t]:
            blocks = {"BLOCK_M": v.block_m, "BLOCK_Q": v.block_q, "BLOCK_D": v.block_d, "BLOCK_KV": v.block_kv}
            full = f"{title} keys={v.block_kv}"
            specs.append(AotSpec(full, kernel, args, fixed | blocks, v.warps, v.stages, matrix=True))
    return specs


AOT = [
    spec
    for dtype, dim, ratio, decode, prefix, *window in (
        ("bf16", 128, 4, True, True), ("bf16", 128, 4, False, True), ("bf16", 64, 8, True, False),
        ("bf16", 80, 1, True, False), ("bf16", 64, 1, False, False), ("fp32", 128, 2, True, True),
        ("fp32", 64, 2, False, False), ("fp16", 64, 3, True, False), ("bf16", 256, 4, True, False, 512),
        ("bf16", 256, 4, False, False, 512),
    )
    for spec in _aot(dtype, dim, ratio, decode, prefix, *window)
]  # fmt: skip
