"""kv_handoff.plan for sequences whose tokens and page tables live on the device: no copy to the host and back."""

from __future__ import annotations

from typing import NamedTuple

import torch

from roro_fast.ops.registry import Implementation, register, select
from roro_fast.ops.triton_impl import register_triton


class DevicePlan(NamedTuple):
    """The ragged batch of `kv_handoff.plan` as tensors: ids, positions, slots [T], cu_seqlens [N + 1], all int64."""

    ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    cu_seqlens: torch.Tensor


def plan_on_device(
    tokens: torch.Tensor,
    rows: torch.Tensor,
    start: torch.Tensor,
    count: torch.Tensor,
    page_table: torch.Tensor,
    page_size: int,
    total: int,
    *,
    impl: str | None = None,
) -> DevicePlan:
    """Tokens [start, start + count) of each row, for every row in one launch.

    tokens [S, L] and page_table [S, P] hold all sequences; rows, start, count [N] choose among them; all int64 on one
    device. `total` = T is the sum of `count`, which the caller knows: asking the device would wait for it.
    """
    fn = select("kv_plan_on_device", tokens.device, tokens.dtype, impl)
    out: DevicePlan = fn(tokens, rows, start, count, page_table, page_size, total)
    return out


def reference(
    tokens: torch.Tensor,
    rows: torch.Tensor,
    start: torch.Tensor,
    count: torch.Tensor,
    page_table: torch.Tensor,
    page_size: int,
    total: int,
) -> DevicePlan:
    cu = torch.zeros(len(rows) + 1, dtype=torch.int64, device=rows.device)
    cu[1:] = count.cumsum(0)
    row = rows.repeat_interleave(count, output_size=total)
    positions = torch.arange(total, device=rows.device)
    positions = positions + (start - cu[:-1]).repeat_interleave(count, output_size=total)
    slots = page_table[row, positions // page_size] * page_size + positions % page_size
    return DevicePlan(tokens[row, positions], positions, slots, cu)


register(Implementation("kv_plan_on_device", "reference", reference))
register_triton("kv_plan_on_device", "kv_handoff", "plan", DevicePlan, any_dtype=True)
