"""Score the boundary rows of all sequences with the routing MLP and sample an action each."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from roro_fast.ops import native, native_cuda
from roro_fast.ops.registry import Implementation, needs_grad, register, select
from roro_fast.ops.triton_impl import register_triton


class RouterWeights(NamedTuple):
    """One hidden layer over [rms_norm(hidden) * norm, signals]. D units, K actions; H may be 0 (signals only).

    norm [H]; w1 [D, H + S]; b1 [D]; w2 [K, D]; b2 [K].
    """

    norm: torch.Tensor
    w1: torch.Tensor
    b1: torch.Tensor
    w2: torch.Tensor
    b2: torch.Tensor


class PackedRouterWeights(RouterWeights):
    """RouterWeights with a copy laid out for the CPU kernel, which saves packing them in every call.

    A snapshot: weights changed later do not reach `packed` (uint8 [bytes], None where the kernel cannot serve).
    """

    packed: torch.Tensor | None


def pack_router(weights: RouterWeights) -> PackedRouterWeights:
    """Lay `weights` out once for many calls of `router_score`. Any implementation takes the result."""
    out = PackedRouterWeights(*weights)
    usable = native.usable(torch.float32, torch.bfloat16)(weights.w1.device, weights.w1.dtype)[0]
    out.packed = _pack(weights) if usable else None
    return out


class RouterScore(NamedTuple):
    """action [N] int64; logprob, entropy [N] float32; probs, logits [N, K] float32."""

    action: torch.Tensor
    logprob: torch.Tensor
    entropy: torch.Tensor
    probs: torch.Tensor
    logits: torch.Tensor


def router_score(
    hidden: torch.Tensor,
    rows: torch.Tensor | None,
    signals: torch.Tensor,
    weights: RouterWeights,
    uniforms: torch.Tensor,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    eps: float = 1e-6,
    *,
    impl: str | None = None,
) -> RouterScore:
    """Gather rows of `hidden`, RMS-norm, concatenate signals, MLP (SiLU), budget bias, softmax, sample.

    hidden [T, H] (H may be 0), rows [N] int64 into T or None for all; signals [N, S] float32; uniforms [N] float32;
    bias [N, K] float32 added to the logits before the temperature (the per-request budget). temperature 0 means greedy.
    `weights` may be what `pack_router` gave: worth it when the same weights serve many calls.
    """
    fn = select("router_score", signals.device, weights.w1.dtype, impl, needs_grad(hidden, signals, *weights))
    out: RouterScore = fn(hidden, rows, signals, weights, uniforms, bias, temperature, eps)
    return out


def served_on_cpu(dtype: torch.dtype) -> bool:
    """Whether the C++ kernel is what serves CPU tensors with weights of this dtype, outside of autograd."""
    return select("router_score", torch.device("cpu"), dtype) is cpu


def rms_norm(h: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps) if h.shape[-1] else h


def logits_of(hidden: torch.Tensor, signals: torch.Tensor, w: RouterWeights, eps: float = 1e-6) -> torch.Tensor:
    """Action logits [N, K] with autograd: the differentiable part that training shares with the reference."""
    x = torch.cat((rms_norm(hidden.float(), eps) * w.norm.float(), signals.float()), -1)
    return F.linear(F.silu(F.linear(x, w.w1.float(), w.b1.float())), w.w2.float(), w.b2.float())


def reference(
    hidden: torch.Tensor,
    rows: torch.Tensor | None,
    signals: torch.Tensor,
    weights: RouterWeights,
    uniforms: torch.Tensor,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    eps: float = 1e-6,
) -> RouterScore:
    logits = logits_of(hidden if rows is None else hidden[rows], signals, weights, eps)
    if bias is not None:
        logits = logits + bias
    logp = torch.log_softmax(logits / temperature if temperature > 0 else logits, -1)
    probs = logp.exp()
    if temperature > 0:
        action = (probs.cumsum(-1) <= uniforms[:, None]).sum(-1).clamp_max(probs.shape[-1] - 1)
    else:
        action = probs.argmax(-1)
    entropy = -(probs * logp.nan_to_num(neginf=0.0)).sum(-1)
    return RouterScore(action, logp.gather(-1, action[:, None]).squeeze(-1), entropy, probs, logits)


def _pack(weights: RouterWeights) -> torch.Tensor:
    packed: torch.Tensor = native.call("router_pack", *(w.detach() for w in weights))
    return packed


def cpu(
    hidden: torch.Tensor,
    rows: torch.Tensor | None,
    signals: torch.Tensor,
    weights: RouterWeights,
    uniforms: torch.Tensor,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    eps: float = 1e-6,
) -> RouterScore:
    """csrc/cpu/router_score.cpp; weights in bf16 are multiplied in bf16 where the CPU has an instruction for it."""
    packed = getattr(weights, "packed", None)
    if packed is None:
        packed = _pack(weights)
    actions = weights.w2.shape[0]
    out = native.call("router_score", hidden, rows, signals, packed, actions, uniforms, bias, temperature, eps)
    return RouterScore(*out)


def cuda(
    hidden: torch.Tensor,
    rows: torch.Tensor | None,
    signals: torch.Tensor,
    weights: RouterWeights,
    uniforms: torch.Tensor,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    eps: float = 1e-6,
) -> RouterScore:
    """csrc/cuda/router_score.cu: one launch for N <= 256, else two around torch's product."""
    if weights.w1.dtype not in (hidden.dtype, torch.float32):
        weights = RouterWeights(*(w.float() for w in weights))
    native_cuda.checks.in_range("rows", rows, len(hidden))
    out = native_cuda.call("router_score", hidden, rows, signals, *weights, uniforms, bias, temperature, eps)
    return RouterScore(*out)


register(Implementation("router_score", "reference", reference, differentiable=True))
native.register_cpu("router_score", cpu, torch.float32, torch.bfloat16)
native_cuda.register_cuda("router_score", cuda)
register_triton("router_score", "router_score", "router_score", RouterScore)
