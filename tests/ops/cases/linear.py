"""Inputs of linear; truth and naive result are the formula in fp64 and in kind."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from tests.ops.cases.common import assert_no_worse

# rows, K, N: whole panels and tails, one row to several blocks of rows, depth beyond one strip
SIZES = [
    (1, 576, 960),
    (1, 1, 1),
    (2, 33, 17),
    (5, 64, 100),
    (7, 96, 288),
    (33, 31, 49),
    (100, 130, 64),
    (8, 4500, 40),
    (400, 520, 20),
    (0, 64, 32),
]


class Case(NamedTuple):
    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None


def make(
    rows: int, depth: int, columns: int, dtype: torch.dtype = torch.float32, *, bias: bool = True, seed: int = 0
) -> Case:
    """Rows of x lie apart."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, depth + 4, generator=g).to(dtype)[:, 2 : depth + 2]
    weight = (torch.randn(columns, depth, generator=g) / max(depth, 1) ** 0.5).to(dtype)
    return Case(x, weight, torch.randn(columns, generator=g).to(dtype) if bias else None)


def in_dtype(c: Case, dtype: torch.dtype, gated: bool = False) -> torch.Tensor:
    y = F.linear(c.x.to(dtype), c.weight.to(dtype), None if c.bias is None else c.bias.to(dtype))
    if gated:
        gate, up = y.chunk(2, dim=-1)
        return F.silu(gate) * up
    return y


def check(got: torch.Tensor, c: Case, dtype: torch.dtype, gated: bool = False) -> None:
    assert_no_worse(got, in_dtype(c, dtype, gated), in_dtype(c, torch.float64, gated), dtype)
