"""router_score in C++ against eager torch (fp32 and bf16, F.rms_norm and CDF sampling) and torch.compile of the same.

    python -m bench.ops.bench_router_score [--seconds 1.5] [--threads 1] [--no-compile] [--out FILE]

"cpu" runs with weights packed once (`pack_router`), "cpu, unpacked" packs them in every call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from bench.ops.harness import Case, arguments, copies_for, run
from roro_fast.ops.router_score import RouterWeights, pack_router, router_score
from tests.ops.cases import router_score as cases

ENGINE = [(h, 12, 64, n) for h in (0, 20, 576) for n in (1, 16, 64, 256)]
ISSUE = [(h, 12, d, n) for h in (576, 2048, 4096) for d in (64, 256) for n in (64, 1024)]


def eager(
    hidden: torch.Tensor, rows: torch.Tensor, signals: torch.Tensor, w: RouterWeights, uniforms: torch.Tensor,
    bias: torch.Tensor, temperature: float = 1.0, eps: float = 1e-6,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """What one would write: fused norm, two linears, softmax, sampling by cumulative sum, log-prob, entropy."""
    h = hidden[rows]
    h = F.rms_norm(h, (h.shape[-1],), w.norm, eps) if h.shape[-1] else h
    x = torch.cat((h, signals.to(h.dtype)), -1)
    z = F.linear(F.silu(F.linear(x, w.w1, w.b1)), w.w2, w.b2).float() + bias
    logp = torch.log_softmax(z, -1)
    p = logp.exp()
    action = (p.cumsum(-1) <= uniforms[:, None]).sum(-1).clamp_max(p.shape[-1] - 1)
    return action, logp.gather(-1, action[:, None]).squeeze(-1), -(p * logp).sum(-1), p, z


def case(h: int, s: int, d: int, n: int, dtype: torch.dtype, compiled: Callable[..., Any] | None) -> Case:
    size = 4 if dtype == torch.float32 else 2
    k = 2
    inputs = [cases.make(h, s, d, k, n, dtype, seed=i) for i in range(copies_for(n * max(h, 1) * size))]
    weights = inputs[0].weights
    inputs = [c._replace(weights=weights) for c in inputs]
    packed = [c._replace(weights=p) for p in (pack_router(weights),) for c in inputs]
    wide = [c._replace(hidden=c.hidden.float(), weights=RouterWeights(*(w.float() for w in weights))) for c in inputs]
    at = lambda table, i: table[i % len(table)]  # noqa: E731
    variants = {
        "cpu": lambda i: router_score(*at(packed, i), impl="cpu"),
        "cpu, unpacked": lambda i: router_score(*at(inputs, i), impl="cpu"),
        "eager fp32": lambda i: eager(*at(wide, i)),
    }
    if dtype == torch.bfloat16:
        variants["eager bf16"] = lambda i: eager(*at(inputs, i))
    if compiled is not None:
        variants["torch.compile fp32"] = lambda i: compiled(*at(wide, i))
        if dtype == torch.bfloat16:
            variants["torch.compile bf16"] = lambda i: compiled(*at(inputs, i))
    tall = dtype == torch.bfloat16 and n <= 1024 and h >= 576
    return Case(
        name=f"N={n} H={h} S={s} D={d} K={k} {str(dtype).removeprefix('torch.')}",
        variants=variants,
        ours="cpu",
        bytes=n * (h * size + 4 * (s + 3 * k + 4)) + d * (h + s) * size,
        gate=lambda: cases.check(inputs[0], router_score(*packed[0], impl="cpu"), dtype),
        targets={"eager fp32": 4, "eager bf16": 2, "torch.compile fp32": 3} if tall else {},
    )


def main() -> None:
    args = arguments(__doc__)
    compiled = None if args.no_compile else torch.compile(eager, dynamic=True)
    build = [functools.partial(case, *s, torch.float32, compiled if s[3] >= 64 else None) for s in ENGINE]
    build += [functools.partial(case, *s, t, compiled) for s in ISSUE for t in (torch.float32, torch.bfloat16)]
    run("router_score", build, args, {"torch.compile": "--no-compile"} if args.no_compile else {})


if __name__ == "__main__":
    main()
