"""Pages, slots, tables and maps of kv_project; truth is the same formula in fp64, naive in the dtype of the pages."""

from __future__ import annotations

from typing import NamedTuple

import torch

from roro_fast.ops.kv_project import LinearMaps, Rotary
from tests.ops.cases.common import assert_no_worse

# tokens, source (layers, heads, dim, page size), receiver (layers, heads, dim, page size), source layers per map
SIZES = [
    (1, (2, 1, 16, 16), (4, 3, 32, 16), 1),
    (63, (2, 1, 16, 16), (4, 3, 32, 32), 2),
    (40, (3, 3, 64, 32), (2, 1, 80, 16), 2),
    (17, (1, 8, 128, 128), (1, 2, 64, 3), 1),
    (9, (2, 2, 6, 1), (3, 1, 2, 7), 3),
    (0, (2, 2, 16, 16), (2, 2, 16, 16), 1),
]
POSITIONS = 300


class Case(NamedTuple):
    source: torch.Tensor
    source_slots: torch.Tensor
    source_rope: Rotary
    target: torch.Tensor
    target_slots: torch.Tensor
    target_rope: Rotary
    positions: torch.Tensor
    maps: LinearMaps


def rope(dim: int, theta: float, scale: float) -> Rotary:
    angle = torch.outer(torch.arange(float(POSITIONS)), 1 / theta ** (torch.arange(0, dim, 2) / dim))
    angle = torch.cat((angle, angle), -1)
    return Rotary(angle.cos() * scale, angle.sin() * scale)


def make(
    tokens: int,
    source: tuple[int, int, int, int],
    target: tuple[int, int, int, int],
    chosen: int,
    dtype: torch.dtype = torch.float32,
    weights: torch.dtype | None = None,
    *,
    seed: int = 0,
) -> Case:
    """Random pages and maps; both rotary tables carry a scale, and their bases differ."""
    g = torch.Generator().manual_seed(seed)
    pools, slots = [], []
    for layers, heads, dim, size in (source, target):
        pages = -(-tokens // size) + 2
        pools.append(torch.randn(pages, layers, 2, size, heads, dim, generator=g).to(dtype))
        slots.append(torch.randperm(pages * size, generator=g)[:tokens])
    width, wide = target[1] * target[2], chosen * source[1] * source[2]
    weight = torch.randn(target[0], 2, width, wide, generator=g) / wide**0.5
    maps = LinearMaps(
        weight.to(weights or dtype),
        torch.randn(target[0], 2, width, generator=g),
        torch.randint(0, source[0], (target[0], chosen), generator=g),
    )
    positions = torch.randint(0, POSITIONS, (tokens,), generator=g)
    ropes = rope(source[2], 10000.0, 1.25), rope(target[2], 500.0, 0.8)
    return Case(pools[0], slots[0], ropes[0], pools[1], slots[1], ropes[1], positions, maps)


def in_dtype(c: Case, dtype: torch.dtype) -> torch.Tensor:
    """What the target's slots must hold [T, L', 2, H', D'], every step in `dtype`."""
    size = c.source.shape[3]
    x = torch.stack([c.source[s // size, :, :, s % size] for s in c.source_slots.tolist()]).to(dtype)
    a, b = x[:, :, 0].chunk(2, -1)
    cos, sin = (t[c.positions][:, None, None, : a.shape[-1]].to(dtype) for t in c.source_rope)
    norm = cos * cos + sin * sin  # tables of real models repeat their halves
    x[:, :, 0] = torch.cat(((a * cos + b * sin) / norm, (b * cos - a * sin) / norm), -1)
    out = []
    for chosen, weight, bias in zip(
        c.maps.layers.tolist(), c.maps.weight.to(dtype), c.maps.bias.to(dtype), strict=True
    ):
        side_by_side = torch.cat([x[:, i].flatten(2) for i in chosen], -1)  # [T, 2, n * H * D]
        out.append(torch.stack([side_by_side[:, kv] @ weight[kv].T + bias[kv] for kv in (0, 1)], 1))
    y = torch.stack(out, 1).unflatten(3, c.target.shape[4:])
    a, b = y[:, :, 0].chunk(2, -1)
    cos, sin = (t[c.positions][:, None, None, : a.shape[-1]].to(dtype) for t in c.target_rope)
    y[:, :, 0] = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    return y


def check(c: Case, before: torch.Tensor, now: torch.Tensor) -> None:
    """Judges what the target's pages hold now; every slot not named must have kept its bits."""
    size = now.shape[3]
    page, offset = c.target_slots // size, c.target_slots % size
    if len(c.positions):
        naive, truth = in_dtype(c, c.source.dtype), in_dtype(c, torch.float64)
        assert_no_worse(now[page, :, :, offset], naive, truth, c.source.dtype)
    rest = torch.ones(now.shape[0], size, dtype=torch.bool)
    rest[page, offset] = False
    page, offset = rest.nonzero().T
    assert torch.equal(now[page, :, :, offset], before[page, :, :, offset])
