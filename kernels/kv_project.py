"""Triton kv_project: gather, turn back, multiply, turn, scatter in one launch.

A program holds a slice of both halves of one receiver head of one layer, keys or values, for a block of tokens. Turning
back and turning are 2 x 2 matrices of each pair of halves; those of values are the identity, so both take one path.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from roro_fast.errors import ConfigError
from roro_fast.kernels import checks
from roro_fast.kernels.aot_spec import AotSpec

_STRIDES = ("page", "layer", "kv", "token", "head", "dim")


@triton.jit(do_not_specialize=["n", "s_positions", "t_positions", "s_room", "t_room", "n_layers"])
def kv_project_kernel(
    source, source_slots, source_cos, source_sin, target, target_slots, target_cos, target_sin, positions,
    weight, bias, layers, n, s_positions, t_positions, s_room, t_room, n_layers,
    source_size, target_size, s_page, s_layer, s_kv, s_token, s_head, s_dim, t_page, t_layer, t_kv, t_token, t_head,
    t_dim,
    CHOSEN: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, T_HEADS: tl.constexpr, T_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of tokens, receiver heads x blocks of their halves, 2 * receiver layers)."""
    HALF: tl.constexpr = DIM // 2
    T_HALF: tl.constexpr = T_DIM // 2
    PARTS: tl.constexpr = (HALF + BLOCK_S - 1) // BLOCK_S
    T_PARTS: tl.constexpr = (T_HALF + BLOCK_D - 1) // BLOCK_D
    i = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    head, map_index = tl.program_id(1) // T_PARTS, tl.program_id(2).to(tl.int64)
    layer, kv = map_index // 2, map_index % 2
    is_key = kv == 0
    live = i < n
    slot = tl.load(source_slots + i, mask=live, other=0)
    position = tl.load(positions + i, mask=live, other=0)
    known = live & (slot >= 0) & (slot < s_room)  # a wrong index touches nothing
    known = known & (position >= 0) & (position < s_positions) & (position < t_positions)
    token = source + (slot // source_size) * s_page + (slot % source_size) * s_token + kv * s_kv
    d = (tl.program_id(1) % T_PARTS) * BLOCK_D + tl.arange(0, BLOCK_D)
    half = d < T_HALF
    WIDE: tl.constexpr = CHOSEN * HEADS * DIM
    columns = weight + (map_index * T_HEADS + head) * T_DIM * WIDE + d[None, :].to(tl.int64) * WIDE
    left = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    right = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for j in range(CHOSEN * HEADS * PARTS):
        part, source_head = j % PARTS, j // PARTS
        e = part * BLOCK_S + tl.arange(0, BLOCK_S)
        from_layer = tl.load(layers + layer * CHOSEN + source_head // HEADS)
        found = known[:, None] & (e < HALF)[None, :] & (from_layer >= 0) & (from_layer < n_layers)
        turned = found & is_key
        angle = position[:, None] * DIM + e[None, :]
        at = token[:, None] + from_layer * s_layer + (source_head % HEADS) * s_head + e[None, :] * s_dim
        x = tl.load(at, mask=found, other=0.0).to(tl.float32)
        y = tl.load(at + HALF * s_dim, mask=found, other=0.0).to(tl.float32)
        c1 = tl.load(source_cos + angle, mask=turned, other=1.0)
        c2 = tl.load(source_cos + angle + HALF, mask=turned, other=1.0)
        s1 = tl.load(source_sin + angle, mask=turned, other=0.0)
        s2 = tl.load(source_sin + angle + HALF, mask=turned, other=0.0)
        scale = 1.0 / (c1 * c2 + s1 * s2)
        a = ((c2 * x + s1 * y) * scale).to(weight.dtype.element_ty)
        b = ((c1 * y - s2 * x) * scale).to(weight.dtype.element_ty)
        w = columns + source_head * DIM + e[:, None]
        real = half[None, :] & (e < HALF)[:, None]
        left = tl.dot(a, tl.load(w, mask=real, other=0.0), left, input_precision="tf32x3")
        left = tl.dot(b, tl.load(w + HALF, mask=real, other=0.0), left, input_precision="tf32x3")
        w += T_HALF * WIDE
        right = tl.dot(a, tl.load(w, mask=real, other=0.0), right, input_precision="tf32x3")
        right = tl.dot(b, tl.load(w + HALF, mask=real, other=0.0), right, input_precision="tf32x3")

    at_bias = bias + (map_index * T_HEADS + head) * T_DIM + d
    left += tl.load(at_bias, mask=half, other=0.0)[None, :]
    right += tl.load(at_bias + T_HALF, mask=half, other=0.0)[None, :]
    writable = known[:, None] & half[None, :]
    turned = writable & is_key
    angle = position[:, None] * T_DIM + d[None, :]
    c1 = tl.load(target_cos + angle, mask=turned, other=1.0)
    c2 = tl.load(target_cos + angle + T_HALF, mask=turned, other=1.0)
    s1 = tl.load(target_sin + angle, mask=turned, other=0.0)
    s2 = tl.load(target_sin + angle + T_HALF, mask=turned, other=0.0)
    slot = tl.load(target_slots + i, mask=live, other=-1)
    writable = writable & ((slot >= 0) & (slot < t_room))[:, None]
    at = target + (slot // target_size) * t_page + (slot % target_size) * t_token + kv * t_kv + layer * t_layer
    at = at[:, None] + head * t_head + d[None, :] * t_dim
    tl.store(at, (left * c1 - right * s1).to(target.dtype.element_ty), mask=writable)
    tl.store(at + T_HALF * t_dim, (right * c2 + left * s2).to(target.dtype.element_ty), mask=writable)


def kv_project(
    source: torch.Tensor,
    source_slots: torch.Tensor,
    source_rope: tuple[torch.Tensor, torch.Tensor],
    target: torch.Tensor,
    target_slots: torch.Tensor,
    target_rope: tuple[torch.Tensor, torch.Tensor],
    positions: torch.Tensor,
    maps: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """`roro_fast.ops.kv_project`; there the shapes were checked."""
    device = source.device
    for name, pool in (("source", source), ("target", target)):
        if pool.ndim != 6 or pool.dtype not in checks.FLOATS or pool.shape[5] % 2:
            raise ConfigError(f"{name}: {pool.dtype} {list(pool.shape)}; want float [pages, layers, 2, size, heads, D]")
    (heads, dim), (t_heads, t_dim), out = source.shape[4:], target.shape[4:], target.shape[1]
    weight, bias, layers = maps
    layers = checks.tensor("maps.layers", layers, (out, None), device, torch.int64)
    wide = layers.shape[1] * heads * dim
    weight = checks.tensor("maps.weight", weight, (out, 2, t_heads * t_dim, wide), device, checks.FLOATS)
    bias = checks.tensor("maps.bias", bias, (out, 2, t_heads * t_dim), device, torch.float32)
    ropes = []
    for name, rope, width in (("source_rope", source_rope, dim), ("target_rope", target_rope, t_dim)):
        ropes.append([checks.tensor(name, t, (len(rope[0]), width), device, torch.float32) for t in rope])
    n, rooms = len(positions), [p.shape[0] * p.shape[3] for p in (source, target)]
    positions = checks.index("positions", positions, min(len(r[0]) for r in ropes), device)
    source_slots = checks.index("source_slots", source_slots, rooms[0], device, n)
    target_slots = checks.index("target_slots", target_slots, rooms[1], device, n)
    checks.index("maps.layers", layers.flatten(), source.shape[1], device)
    if n and out and t_heads:
        tile = _tile(dim, t_dim, n, weight.dtype == torch.float32)
        parts = triton.cdiv(t_dim // 2, tile["BLOCK_D"])
        kv_project_kernel[triton.cdiv(n, tile["BLOCK_N"]), t_heads * parts, 2 * out](
            source, source_slots, *ropes[0], target, target_slots, *ropes[1], positions, weight, bias, layers,
            n, len(ropes[0][0]), len(ropes[1][0]), *rooms, source.shape[1], source.shape[3], target.shape[3],
            *source.stride(), *target.stride(),
            CHOSEN=layers.shape[1], HEADS=heads, DIM=dim, T_HEADS=t_heads, T_DIM=t_dim, **tile,
        )  # fmt: skip


def _tile(dim: int, t_dim: int, n: int, single: bool) -> dict[str, int]:
    """Blocks of a launch; matrix instructions want 16 of everything, `single` ones three times the registers."""
    halves = [max(16, triton.next_power_of_2(x // 2)) for x in (dim, t_dim)]
    return {
        "BLOCK_N": 16 if n <= 16 else 64,
        "BLOCK_S": min(halves[0], 16 if single else 32),
        "BLOCK_D": min(halves[1], 32 if single else 64),
        "num_warps": 4 if n <= 16 else 8,
        "num_stages": 2,
    }


def _aot(
    dtype: str, heads: int, dim: int, t_heads: int, t_dim: int, chosen: int, weights: str = "", n: int = 4096
) -> AotSpec:
    tile = _tile(dim, t_dim, n, "fp32" in (dtype, weights))
    pools = dict.fromkeys(("source", "target"), f"*{dtype}:16") | {"weight": f"*{weights or dtype}:16"}
    tables = ("source_cos", "source_sin", "target_cos", "target_sin", "bias")
    args: dict[str, str] = pools | dict.fromkeys(tables, "*fp32:16")
    args |= dict.fromkeys(("source_slots", "target_slots", "positions", "layers"), "*i64:16")
    counts = ("n", "s_positions", "t_positions", "s_room", "t_room", "n_layers")
    args |= dict.fromkeys(counts, "i32")
    args |= dict.fromkeys(("source_size", "target_size"), "i32:16")
    args |= {f"{p}_{s}": "i32:16" for p in "st" for s in _STRIDES if s != "dim"}
    meta: dict[str, Any] = {"s_dim": 1, "t_dim": 1, "CHOSEN": chosen, "HEADS": heads, "DIM": dim, "T_HEADS": t_heads}
    meta |= {"T_DIM": t_dim} | {k: tile[k] for k in ("BLOCK_N", "BLOCK_S", "BLOCK_D")}
    name = f"{dtype}{'/' + weights if weights else ''} {chosen}x{heads}x{dim}->{t_heads}x{t_dim}{' few' * (n <= 16)}"
    return AotSpec(name, kv_project_kernel, args, meta, tile["num_warps"], tile["num_stages"], matrix=True)


AOT = [
    _aot("bf16", 8, 128, 8, 128, 1),
    _aot("bf16", 2, 64, 8, 128, 2),
    _aot("fp32", 8, 128, 8, 128, 1),
    _aot("bf16", 8, 128, 8, 128, 1, "fp32"),
    _aot("fp32", 1, 16, 3, 32, 2),
    _aot("bf16", 8, 128, 8, 128, 1, n=16),
]
