"""Ragged grouped-query attention over paged keys and values: decode and catch-up rows in one call."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from roro_fast.ops.registry import Implementation, register, select


def paged_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    kv_lens: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    impl: str | None = None,
) -> torch.Tensor:
    """Causal attention of the last tokens of N sequences against their whole cached context.

    q [T, Hq, D]; k_pages, v_pages [pages, page_size, Hkv, D] (any strides); page_table [N, P] int64; kv_lens [N] int64,
    context length of each sequence including its query tokens; cu_seqlens [N + 1] int64, query offsets. The queries of a
    sequence are its last `cu[i + 1] - cu[i]` positions, whose K and V are already in the pages. Returns [T, Hq, D].
    """
    fn = select("paged_attention", q.device, q.dtype, impl)
    out: torch.Tensor = fn(q, k_pages, v_pages, page_table, kv_lens, cu_seqlens)
    return out


def reference(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    kv_lens: torch.Tensor,
    cu_seqlens: torch.Tensor,
) -> torch.Tensor:
    """Sequences are taken in groups of equal power-of-two query length, so that a long prompt never pads a decode row."""
    q_lens = cu_seqlens.diff()
    out = torch.empty_like(q)
    bucket = torch.where(q_lens > 1, 2 ** torch.ceil(torch.log2(q_lens.clamp_min(1).double())), q_lens.double())
    for b in bucket.unique().tolist():
        if b == 0:
            continue
        rows = (bucket == b).nonzero().squeeze(-1)
        n, width = len(rows), int(q_lens[rows].max())
        lens = kv_lens[rows]
        context = int(lens.max())
        k = _gather(k_pages, page_table[rows], context)  # [n, Hkv, context, D]
        v = _gather(v_pages, page_table[rows], context)
        step = torch.arange(width, device=q.device)
        valid = step < q_lens[rows, None]  # [n, width]
        index = (cu_seqlens[rows, None] + step).clamp_max(len(q) - 1)
        last = lens[:, None] - q_lens[rows, None] + step  # absolute position of each query, [n, width]
        seen = torch.arange(context, device=q.device) <= last[..., None]
        o = F.scaled_dot_product_attention(
            q[index].transpose(1, 2), k, v, attn_mask=seen[:, None], enable_gqa=q.shape[1] != k.shape[1]
        ).transpose(1, 2)
        out[index[valid]] = o[valid] if width > 1 else o.reshape(n, *q.shape[1:])
    return out


def _gather(pages: torch.Tensor, table: torch.Tensor, context: int) -> torch.Tensor:
    size = pages.shape[1]
    used = table[:, : (context + size - 1) // size]
    return pages[used].flatten(1, 2)[:, :context].transpose(1, 2)


register(Implementation("paged_attention", "reference", reference))
