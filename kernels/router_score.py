"""Triton router_score: gather rows, RMS-norm, signals, MLP, softmax and sampling in one launch.

The grid is (row blocks, tiles of hidden units, splits of H). A program multiplies its slice of H; the last to arrive of
a tile adds the slices up in order and applies the activation; the last tile of a row block adds up the logits and
decides. Nobody waits for anybody, and every sum has a fixed order.
"""

from __future__ import annotations

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

MAX_ACTIONS = 32
MAX_SIGNALS = 64
_PROGRAMS = 128  # enough to fill the smallest GPU served; fixed, so that results do not depend on the GPU


@triton.jit
def _tile_logits(
    total, squares, i, live, unit, signals, w_signals, b1, w2, n_hidden, n_signals, n_units, eps,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Normalise [BN, BD] products, add signals and bias, SiLU, multiply by this tile's columns of w2: [BN, BK]."""
    real = unit < n_units
    x = total * tl.rsqrt(squares / tl.maximum(n_hidden, 1) + eps)[:, None]
    if BLOCK_S > 0:
        s = tl.arange(0, BLOCK_S)
        known = s < n_signals
        a = tl.load(signals + i[:, None] * n_signals + s[None, :], mask=live[:, None] & known[None, :], other=0.0)
        b = tl.load(w_signals + s[:, None] * n_units + unit[None, :], mask=known[:, None] & real[None, :], other=0.0)
        x = tl.dot(a, b, x, input_precision="tf32x3")
    x += tl.load(b1 + unit, mask=real, other=0.0)[None, :]
    x = x * tl.sigmoid(x)
    k = tl.arange(0, BLOCK_K)
    v = tl.load(w2 + k[None, :] * n_units + unit[:, None], mask=(k[None, :] < K) & real[:, None], other=0.0)
    return tl.dot(x, v, input_precision="tf32x3")


@triton.jit
def _decide(
    z, i, live, uniforms, bias, b2, action, logprob, entropy, probs, logits, temperature,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """From the sums [BN, BK] to the five outputs."""
    k = tl.arange(0, BLOCK_K)
    at = i[:, None] * K + k[None, :]
    real = live[:, None] & (k < K)[None, :]
    z += tl.load(b2 + k, mask=k < K, other=0.0)[None, :]
    if bias is not None:
        z += tl.load(bias + at, mask=real, other=0.0)
    tl.store(logits + at, z, mask=real)
    hot = temperature > 0
    y = tl.where((k < K)[None, :], z / tl.where(hot, temperature, 1.0), float("-inf"))
    y -= tl.max(y, 1)[:, None]
    logp = y - tl.log(tl.sum(tl.exp(y), 1))[:, None]
    p = tl.exp(logp)
    tl.store(probs + at, p, mask=real)
    u = tl.load(uniforms + i, mask=live, other=0.0)
    below = tl.zeros([BLOCK_N], tl.float32)
    sampled = tl.zeros([BLOCK_N], tl.int32)
    for j in tl.static_range(K - 1):  # in index order: the contract that all implementations share
        below += tl.sum(tl.where((k == j)[None, :], p, 0.0), 1)
        sampled += (below <= u).to(tl.int32)
    taken = tl.where(hot, sampled, tl.argmax(y, 1).to(tl.int32))
    tl.store(action + i, taken.to(tl.int64), mask=live)
    tl.store(logprob + i, tl.sum(tl.where(k[None, :] == taken[:, None], logp, 0.0), 1), mask=live)
    tl.store(entropy + i, -tl.sum(tl.where(p > 0, p * logp, 0.0), 1), mask=live)


@triton.jit(do_not_specialize=["n", "n_rows", "temperature", "eps"])
def router_score_kernel(
    hidden, rows, signals, w, w_signals, b1, w2, b2, uniforms, bias,
    action, logprob, entropy, probs, logits, partial, partial_squares, partial_logits, arrived,
    n, n_rows, n_hidden, n_signals, n_units, hidden_stride, temperature, eps,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr, TILES: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    block, tile, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.arange(0, BLOCK_N)
    i = (block * BLOCK_N + row).to(tl.int64)
    live = i < n
    source = i if rows is None else tl.load(rows + i, mask=live, other=0)
    known = live & (source >= 0) & (source < n_rows)  # a wrong index reads nothing
    column = tl.arange(0, BLOCK_D)
    unit = tile * BLOCK_D + column
    span = tl.cdiv(tl.cdiv(n_hidden, SPLITS), BLOCK_H) * BLOCK_H
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    squares = tl.zeros([BLOCK_N], tl.float32)
    for start in range(split * span, tl.minimum((split + 1) * span, n_hidden), BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        inside = h < n_hidden
        x = tl.load(
            hidden + source[:, None] * hidden_stride + h[None, :], mask=known[:, None] & inside[None, :], other=0.0
        )
        v = tl.load(
            w + unit[None, :] * n_hidden + h[:, None], mask=(unit < n_units)[None, :] & inside[:, None], other=0.0
        )
        wide = x.to(tl.float32)
        squares += tl.sum(wide * wide, 1)
        total = tl.dot(x.to(w.dtype.element_ty), v, total, input_precision="tf32x3")

    key = block * TILES + tile
    last_split = True
    if SPLITS > 1:
        mine = (key * SPLITS + split).to(tl.int64)
        tl.store(partial + (mine * BLOCK_N + row[:, None]) * BLOCK_D + column[None, :], total)
        tl.store(partial_squares + mine * BLOCK_N + row, squares)
        tl.debug_barrier()
        last_split = tl.atomic_add(arrived + key, 1, sem="acq_rel") == SPLITS - 1
    if last_split:
        if SPLITS > 1:
            tl.store(arrived + key, 0)
            total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            squares = tl.zeros([BLOCK_N], tl.float32)
            for s in range(SPLITS):
                part = (key * SPLITS + s).to(tl.int64) * BLOCK_N + row
                squares += tl.load(partial_squares + part, cache_modifier=".cg")
                total += tl.load(partial + part[:, None] * BLOCK_D + column[None, :], cache_modifier=".cg")
        z = _tile_logits(
            total, squares, i, live, unit, signals, w_signals, b1, w2, n_hidden, n_signals, n_units, eps,
            K, BLOCK_K, BLOCK_S,
        )  # fmt: skip
        k = tl.arange(0, BLOCK_K)
        last_tile = True
        if TILES > 1:
            own = (key.to(tl.int64) * BLOCK_N + row)[:, None] * BLOCK_K + k[None, :]
            tl.store(partial_logits + own, z)
            tl.debug_barrier()
            done = arrived + tl.num_programs(0) * TILES + block
            last_tile = tl.atomic_add(done, 1, sem="acq_rel") == TILES - 1
        if last_tile:
            if TILES > 1:
                tl.store(arrived + tl.num_programs(0) * TILES + block, 0)
                z = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
                for t in range(TILES):
                    part = (block * TILES + t).to(tl.int64) * BLOCK_N + row
                    z += tl.load(partial_logits + part[:, None] * BLOCK_K + k[None, :], cache_modifier=".cg")
            _decide(
                z, i, live, uniforms, bias, b2, action, logprob, entropy, probs, logits, temperature,
                K, BLOCK_K, BLOCK_N,
            )  # fmt: skip


class Packed(NamedTuple):
    """w [D, H] with the norm folded in, so that rows are multiplied as they are; the rest float32, w_signals [S, D]."""

    w: torch.Tensor
    w_signals: torch.Tensor
    b1: torch.Tensor
    w2: torch.Tensor
    b2: torch.Tensor


class Plan(NamedTuple):
    block_n: int
    block_d: int
    block_h: int
    tiles: int
    splits: int
    warps: int
    stages: int


def plan(n: int, h: int, d: int, dtype: torch.dtype) -> Plan:
    """Few rows: cut units and H into as many slices as there are processors. Many rows: larger tiles, no split."""
    block_n = 16 if n <= 16 else 32 if n <= 32 else 64
    blocks = triton.cdiv(n, block_n)
    widest = 32 if blocks <= 4 else 64 if dtype == torch.float32 else 128
    block_d = min(widest, max(16, triton.next_power_of_2(d)))
    tiles = triton.cdiv(d, block_d)
    splits = 1
    while 2 * splits * tiles * blocks <= _PROGRAMS and h >= 512 * splits:
        splits *= 2
    return Plan(
        block_n, block_d, 32 if dtype == torch.float32 else 64, tiles, splits, 8 if block_n * widest >= 4096 else 4, 3
    )


def plans(n: int, h: int, d: int, dtype: torch.dtype) -> list[Plan]:
    """The default and what RORO_TUNE=1 may take instead: fewer splits, deeper tiles."""
    p = plan(n, h, d, dtype)
    out = [p]
    if dtype != torch.float32:
        out.append(p._replace(block_h=2 * p.block_h, stages=2))
    if p.splits > 1:
        out.append(p._replace(splits=p.splits // 2))
    return out


_packs = WeakTensorKeyDictionary()


def pack(weights: Any, n_hidden: int, dtype: torch.dtype) -> Packed:
    """What the kernel reads, kept as long as w1 lives and none of the five tensors changes."""
    stamp = None
    if not any(t.is_inference() for t in weights):
        stamp = (dtype, n_hidden, *((id(t), t._version) for t in weights))
        found = _packs.get(weights.w1)
        if found is not None and found[0] == stamp:
            packed: Packed = found[1]
            return packed
    with torch.no_grad():
        w = weights.w1[:, :n_hidden].float() * weights.norm.float()
        f32 = {"dtype": torch.float32, "memory_format": torch.contiguous_format}
        packed = Packed(
            w.to(dtype).contiguous(),
            weights.w1[:, n_hidden:].T.to(**f32).contiguous(),
            *(t.detach().to(torch.float32).contiguous() for t in (weights.b1, weights.w2, weights.b2)),
        )
    if stamp is not None:
        others = (weights.norm, weights.b1, weights.w2, weights.b2)  # kept, so that nobody else gets their ids
        _packs[weights.w1] = (stamp, packed, others)
    return packed


def router_score(
    hidden: torch.Tensor,
    rows: torch.Tensor | None,
    signals: torch.Tensor,
    weights: Any,
    uniforms: torch.Tensor,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, ...]:
    """(action, logprob, entropy, probs, logits) of `roro_fast.ops.router_score`. At most 32 actions, 64 signals."""
    device, f32 = signals.device, torch.float32
    n, n_signals = signals.shape
    h, (k, d) = hidden.shape[-1], weights.w2.shape
    checks.at_most("weights.w2 (actions)", k, MAX_ACTIONS)
    checks.at_most("signals (columns)", n_signals, MAX_SIGNALS)
    if hidden.ndim != 2 or hidden.device != device or hidden.dtype not in checks.FLOATS:
        raise ConfigError(f"hidden: {hidden.dtype} {list(hidden.shape)} on {hidden.device}; want [T, H] on {device}")
    if temperature < 0:
        raise ConfigError(f"temperature: {temperature}; 0 is greedy, above 0 samples")
    if hidden.stride(-1) != 1 and h > 1:
        hidden = hidden.contiguous()
    for name, shape in zip(weights._fields, ((h,), (d, h + n_signals), (d,), (k, d), (k,)), strict=True):
        checks.tensor(f"weights.{name}", getattr(weights, name), shape, device, checks.FLOATS)
    signals = checks.tensor("signals", signals, (n, None), device, checks.FLOATS)
    uniforms = checks.tensor("uniforms", uniforms, (n,), device, f32)
    bias = None if bias is None else checks.tensor("bias", bias, (n, k), device, f32)
    if rows is not None:
        rows = checks.index("rows", rows, len(hidden), device, n)
    elif len(hidden) != n:
        raise ConfigError(f"rows: None means all rows, but hidden has {len(hidden)} and signals {n}")

    action = torch.empty(n, dtype=torch.int64, device=device)
    logprob, entropy = torch.empty(2, n, device=device)
    probs, logits = torch.empty(2, n, k, device=device)
    if n == 0:
        return action, logprob, entropy, probs, logits
    packed = pack(weights, h, weights.w1.dtype if weights.w1.dtype == hidden.dtype else f32)
    block_k = max(16, triton.next_power_of_2(k))

    def launch(p: Plan) -> None:
        blocks = triton.cdiv(n, p.block_n)
        keys = blocks * p.tiles
        parts = keys * p.splits if p.splits > 1 else 0
        router_score_kernel[blocks, p.tiles, p.splits](
            hidden, rows, signals, packed.w, packed.w_signals, packed.b1, packed.w2, packed.b2, uniforms, bias,
            action, logprob, entropy, probs, logits,
            torch.empty(parts, p.block_n, p.block_d, device=device), torch.empty(parts, p.block_n, device=device),
            torch.empty(keys if p.tiles > 1 else 0, p.block_n, block_k, device=device),
            counters(keys + blocks, device),
            n, len(hidden), h, n_signals, d, hidden.stride(0), temperature, eps,
            K=k, BLOCK_K=block_k, BLOCK_S=max(16, triton.next_power_of_2(n_signals)) if n_signals else 0,
            BLOCK_N=p.block_n, BLOCK_D=p.block_d, BLOCK_H=p.block_h, TILES=p.tiles, SPLITS=p.splits,
            num_warps=p.warps, num_stages=p.stages,
        )  # fmt: skip

    shape = (triton.next_power_of_2(n), h, d, packed.w.dtype)
    launch(tuned("router_score", shape, plans(n, h, d, packed.w.dtype), launch, device))
    return action, logprob, entropy, probs, logits


def _aot(dtype: str, n: int, h: int, d: int, p: Plan) -> AotSpec:
    floats = ("w_signals", "b1", "w2", "b2", "uniforms", "bias", "logprob", "entropy", "probs", "logits")
    work = ("signals", "partial", "partial_squares", "partial_logits")
    return AotSpec(
        f"{dtype} N={n} H={h} D={d} tile={p.block_n}x{p.block_d}x{p.block_h} splits={p.splits}",
        router_score_kernel,
        {"hidden": f"*{dtype}:16", "w": f"*{dtype}:16", "rows": "*i64:16", "action": "*i64:16", "arrived": "*i32:16"}
        | dict.fromkeys((*floats, *work), "*fp32:16")
        | {
            "n": "i32",
            "n_rows": "i32",
            "n_hidden": "i32:16",
            "n_signals": "i32",
            "n_units": "i32:16",
            "hidden_stride": "i32:16",
        }
        | {"temperature": "fp32", "eps": "fp32"},
        {"K": 2, "BLOCK_K": 16, "BLOCK_S": 16, "BLOCK_N": p.block_n, "BLOCK_D": p.block_d, "BLOCK_H": p.block_h}
        | {"TILES": p.tiles, "SPLITS": p.splits},
        p.warps,
        p.stages,
        matrix=True,
    )


AOT = [
    _aot(name, n, h, d, p)
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
    for n, h, d in ((16, 576, 64), (64, 4096, 256), (4096, 4096, 256))
    for p in plans(n, h, d, dtype)
]
