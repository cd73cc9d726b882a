"""flash-attn (Dao, arXiv 2307.08691) as an implementation of `paged_attention`, asked for by name.

    RORO_IMPL=paged_attention=flash_attn    with engine.page_size=256

It reads pages of a multiple of 256 tokens and knows no shared prefixes, so auto never takes it. Written to the
interface of flash-attn 2.8; not run by this project's tests, which have no GPU build of it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from roro_fast.errors import RoroError
from roro_fast.ops.registry import Implementation, one_of, register

PAGE = 256
PRIORITY = 5


@cache
def _function() -> Any:
    # find_spec also finds installs without the CUDA half, so only an import can tell.
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func


def usable(device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    if device.type != "cuda":
        return False, f"serves CUDA tensors, not {device.type}"
    ok, reason = one_of(dtype, (torch.float16, torch.bfloat16))
    if not ok:
        return ok, reason
    try:
        _function()
    except ImportError as e:
        return False, f"flash-attn is not installed with its CUDA kernels ({e}); pip install 'roro-fast[gpu]'"
    return True, ""


def check_pages(page_size: int) -> None:
    """Raise RoroError for pages that flash-attn cannot read."""
    if page_size % PAGE:
        raise RoroError(f"engine.page_size: flash-attn reads pages of a multiple of {PAGE} tokens, got {page_size}")


def paged_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    kv_lens: torch.Tensor,
    cu_seqlens: torch.Tensor,
    groups: Any = None,
    prefix: Any = None,
) -> torch.Tensor:
    """`roro_fast.ops.paged_attention`; a shared prefix is read once for each of its sequences."""
    check_pages(k_pages.shape[1])
    keys = torch.zeros(len(kv_lens) + 1, dtype=torch.int32, device=q.device)
    keys[1:] = kv_lens.cumsum(0)
    out: torch.Tensor = _function()(
        q,
        k_pages,
        v_pages,
        cu_seqlens_q=cu_seqlens.int(),
        cu_seqlens_k=keys,
        max_seqlen_q=len(q),  # an upper bound: the longest run of queries is known to the device only
        max_seqlen_k=page_table.shape[1] * k_pages.shape[1],
        causal=True,
        block_table=page_table.int(),
    )
    return out


register(Implementation("paged_attention", "flash_attn", paged_attention, usable, PRIORITY, auto_on=()))
