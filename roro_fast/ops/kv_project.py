"""kv_handoff.project: keys and values of one model out of those of another by linear maps. Approximate.

No exact conversion exists between models of different width or depth. Rotary turns are undone with the source's tables
and made with the receiver's, so that a map is the same at every position; values have none.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from roro_fast.errors import RoroError
from roro_fast.ops import native
from roro_fast.ops.norm_rope_store import rotate
from roro_fast.ops.registry import FLOATS, Implementation, register, select
from roro_fast.ops.triton_impl import register_triton

SCRATCH = 64 << 20  # bytes of gathered inputs and products at a time; every round reads all weights again


class LinearMaps(NamedTuple):
    """One map per receiver layer and for keys and values apart: y = weight @ x + bias.

    weight [L', 2, H' * D', n * H * D], floating; bias [L', 2, H' * D'] float32; layers [L', n] int64: the n layers of
    the source whose heads, side by side, are the x of a receiver layer.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    layers: torch.Tensor

    @property
    def flops_per_token(self) -> float:
        return 2.0 * self.weight.numel()


class Rotary(NamedTuple):
    """cos and sin [positions, D] float32 of half-split rotary, an attention scale folded in (`models.rope`)."""

    cos: torch.Tensor
    sin: torch.Tensor


def kv_project(
    source: torch.Tensor,
    source_slots: torch.Tensor,
    source_rope: Rotary,
    target: torch.Tensor,
    target_slots: torch.Tensor,
    target_rope: Rotary,
    positions: torch.Tensor,
    maps: LinearMaps,
    *,
    impl: str | None = None,
) -> None:
    """Write the receiver's K and V of T tokens, made from the source's, into its pages.

    source [pages, L, 2, page_size, H, D] and target [pages', L', 2, page_size', H', D'] are pages as the engine keeps
    them (k, v in dimension 2), any strides but that elements of a head lie side by side, of any float dtype each; they
    may share memory if the slots do not. source_slots, target_slots [T] int64 are page * page_size + offset, no target
    slot twice; positions [T] int64. Products are taken in the dtype of the weights, sums in float32.
    """
    check(source, source_slots, source_rope, target, target_slots, target_rope, positions, maps)
    fn = select("kv_project", source.device, source.dtype, impl)
    fn(source, source_slots, source_rope, target, target_slots, target_rope, positions, maps)


def unrotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Inverse of `rotate`, of whatever scale is folded into the tables too."""
    (a, b), (c, d), (s, t) = x.chunk(2, -1), cos.chunk(2, -1), sin.chunk(2, -1)
    det = c * d + s * t
    return torch.cat(((d * a + s * b) / det, (c * b - t * a) / det), -1)


def reference(
    source: torch.Tensor,
    source_slots: torch.Tensor,
    source_rope: Rotary,
    target: torch.Tensor,
    target_slots: torch.Tensor,
    target_rope: Rotary,
    positions: torch.Tensor,
    maps: LinearMaps,
) -> None:
    kind = torch.promote_types(maps.weight.dtype, torch.promote_types(source.dtype, torch.float32))
    size, page_size = source.shape[3], target.shape[3]
    x = source[source_slots // size, :, :, source_slots % size].to(kind)  # [T, L, 2, H, D]
    keys = unrotate(x[:, :, 0], *(table[positions][:, None, None].to(kind) for table in source_rope))
    x = torch.stack((keys, x[:, :, 1]), 2).flatten(3)[:, maps.layers]  # [T, L', n, 2, H * D]
    x = x.permute(1, 3, 0, 2, 4).flatten(3)  # [L', 2, T, n * H * D]
    y = x @ maps.weight.to(kind).mT + maps.bias[:, :, None].to(kind)
    y = y.permute(2, 0, 1, 3).unflatten(3, target.shape[4:])  # [T, L', 2, H', D']
    keys = rotate(y[:, :, 0], *(table[positions][:, None, None].to(kind) for table in target_rope))
    out = torch.stack((keys, y[:, :, 1]), 2).to(target.dtype)
    target[target_slots // page_size, :, :, target_slots % page_size] = out


def kv_project_cpu(
    source: torch.Tensor,
    source_slots: torch.Tensor,
    source_rope: Rotary,
    target: torch.Tensor,
    target_slots: torch.Tensor,
    target_rope: Rotary,
    positions: torch.Tensor,
    maps: LinearMaps,
) -> None:
    """csrc/cpu/kv_project.cpp at both ends of torch's batched product, which takes most of the time."""
    weight, bias, layers = maps
    transposed = weight.flatten(0, 1).mT
    half = weight.dtype == torch.bfloat16
    step = max(16, SCRATCH // max(1, 2 * len(layers) * sum(weight.shape[2:]) * weight.element_size()))
    for at in range(0, len(positions), step):
        here = slice(at, at + step)
        x = native.call("kv_unrotate", source, source_slots[here], positions[here], *source_rope, layers, half)
        y = torch.bmm(x.flatten(0, 1), transposed).unflatten(0, (-1, 2))
        native.call("kv_rotate_store", y, bias, target, target_slots[here], positions[here], *target_rope)


def check(
    source: torch.Tensor,
    source_slots: torch.Tensor,
    source_rope: Rotary,
    target: torch.Tensor,
    target_slots: torch.Tensor,
    target_rope: Rotary,
    positions: torch.Tensor,
    maps: LinearMaps,
) -> None:
    """RoroError for shapes, dtypes and devices that do not fit; slots, positions and layers are not read."""
    device = source.device
    for name, pool, rope in (("source", source, source_rope), ("target", target, target_rope)):
        if pool.dim() != 6 or pool.shape[2] != 2 or pool.shape[5] % 2 or not pool.shape[3]:
            shape = f"shape {list(pool.shape)} but [pages, layers, 2, page_size, heads, even dim] is needed"
            raise RoroError(f"{name}: {shape}")
        want = (rope.cos.shape[0], pool.shape[5])
        if rope.cos.shape != want or rope.sin.shape != want or {t.dtype for t in rope} != {torch.float32}:
            shapes = f"{list(rope.cos.shape)}, {list(rope.sin.shape)}"
            raise RoroError(f"{name}_rope: {shapes} but float32 [positions, {pool.shape[5]}] twice is needed")
    for name, index in (("source_slots", source_slots), ("target_slots", target_slots), ("positions", positions)):
        if index.dtype != torch.int64 or index.shape != positions.shape or index.dim() != 1:
            raise RoroError(f"{name}: {index.dtype} {list(index.shape)} but int64 [{len(positions)}] is needed")
    weight, bias, layers = maps
    if layers.dtype != torch.int64 or layers.dim() != 2 or len(layers) != target.shape[1]:
        raise RoroError(f"maps.layers: {layers.dtype} {list(layers.shape)} but int64 [{target.shape[1]}, n] is needed")
    widths = target.shape[4] * target.shape[5], layers.shape[1] * source.shape[4] * source.shape[5]
    if weight.shape != (len(layers), 2, *widths) or weight.dtype not in (*FLOATS, torch.float64):
        needed = f"float [{len(layers)}, 2, {widths[0]}, {widths[1]}]"
        raise RoroError(f"maps.weight: {weight.dtype} {list(weight.shape)} but {needed} is needed")
    if bias.shape != weight.shape[:3] or bias.dtype != torch.float32:
        raise RoroError(f"maps.bias: {bias.dtype} {list(bias.shape)} but float32 {list(weight.shape[:3])} is needed")
    others = (*source_rope, target, *target_rope, source_slots, target_slots, positions, *maps)
    if any(t.device != device for t in others):
        raise RoroError(f"kv_project: source is on {device}, another argument is not; move all to one device")


register(Implementation("kv_project", "reference", reference))
native.register_cpu("kv_project", kv_project_cpu, torch.float32, torch.bfloat16)
register_triton("kv_project", "kv_project", "kv_project")
