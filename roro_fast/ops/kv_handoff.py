"""KV handoff between the models of a pool: plan the exact catch-up of missing tokens, and copy pages."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from roro_fast.ops.registry import Implementation, register, select


class CatchUpBatch(NamedTuple):
    """Ragged batch of T tokens over N sequences: ids, positions, slots [T] int64; cu_seqlens [N + 1] int64.

    `slots` is where each token's K and V go: page * page_size + offset within the model's pool.
    """

    ids: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    cu_seqlens: np.ndarray


def plan(
    tokens: np.ndarray, rows: np.ndarray, start: np.ndarray, count: np.ndarray, page_table: np.ndarray, page_size: int
) -> CatchUpBatch:
    """Tokens [start, start + count) of each row, for every row in one pass.

    tokens [S, L] int64 and page_table [S, P] int64 hold all sequences; rows, start, count [N] int64 choose among them.
    """
    cu = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(count, out=cu[1:])
    row = np.repeat(rows, count)
    positions = np.arange(cu[-1]) + np.repeat(start - cu[:-1], count)
    pages = page_table[row, positions // page_size]
    return CatchUpBatch(tokens[row, positions], positions, pages * page_size + positions % page_size, cu)


def copy_pages(pool: torch.Tensor, source: torch.Tensor, target: torch.Tensor, *, impl: str | None = None) -> None:
    """pool[target] = pool[source], bit-exact, in place; pool [pages, ...], source and target [n] int64, disjoint."""
    select("kv_copy_pages", pool.device, pool.dtype, impl)(pool, source, target)


def copy_pages_reference(pool: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
    pool[target] = pool[source]


register(Implementation("kv_copy_pages", "reference", copy_pages_reference))
