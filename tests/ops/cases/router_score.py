"""Inputs of router_score and the fp64 truth they are judged by."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from roro_fast.ops.router_score import RouterScore, RouterWeights
from tests.ops.cases.common import assert_no_worse

EPS = 1e-6
# hidden, signals, width, actions, decisions: the engine's, and sizes that no tile or vector divides
SIZES = [
    (0, 12, 64, 2, 1),
    (20, 12, 64, 2, 63),
    (576, 12, 64, 3, 64),
    (576, 0, 256, 2, 7),
    (33, 5, 17, 8, 1000),
    (1, 1, 1, 1, 3),
    (257, 3, 65, 5, 70),
    (4096, 12, 256, 2, 33),
    (70, 2, 40, 2, 17),
    (20, 12, 64, 2, 0),
]


class Case(NamedTuple):
    hidden: torch.Tensor
    rows: torch.Tensor | None
    signals: torch.Tensor
    weights: RouterWeights
    uniforms: torch.Tensor
    bias: torch.Tensor | None
    temperature: float
    eps: float


def make(
    hidden: int,
    signals: int,
    width: int,
    actions: int,
    n: int,
    dtype: torch.dtype = torch.float32,
    *,
    temperature: float = 1.0,
    bias: bool = True,
    gather: bool = True,
    seed: int = 0,
) -> Case:
    """Uniforms lie well inside the interval of a likely action, so every implementation must take the same one."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(hidden,), (width, hidden + signals), (width,), (actions, width), (actions,)]
    w = RouterWeights(*((torch.randn(x, generator=g) / (x[-1] ** 0.5 if len(x) == 2 else 1)).to(dtype) for x in shapes))
    total = n + 5 if gather else n
    rows = torch.randint(0, total, (n,), generator=g) if gather else None
    case = Case(
        (3 * torch.randn(total, hidden, generator=g)).to(dtype),
        rows,
        torch.randn(n, signals, generator=g),
        w,
        torch.zeros(n),
        torch.randn(n, actions, generator=g) if bias else None,
        temperature,
        EPS,
    )
    p = truth(case)[0]
    wanted = torch.multinomial(p.where(p > min(0.1, 1 / actions - 1e-9), 0.0), 1, generator=g) if n else rows_of(0)
    high = p.cumsum(-1).gather(-1, wanted)
    share = 0.3 + 0.4 * torch.rand(n, 1, generator=g)
    return case._replace(uniforms=(high - share * p.gather(-1, wanted)).float().squeeze(-1))


def rows_of(n: int) -> torch.Tensor:
    return torch.zeros(n, 1, dtype=torch.int64)


def truth(c: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """(probs, logits) [N, K] in fp64."""
    return in_dtype(c, torch.float64)


def in_dtype(c: Case, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    w = RouterWeights(*(x.to(dtype) for x in c.weights))
    h = (c.hidden if c.rows is None else c.hidden[c.rows]).to(dtype)
    if h.shape[-1]:
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + c.eps) * w.norm
    x = torch.cat((h, c.signals.to(dtype)), -1)
    z = F.linear(F.silu(F.linear(x, w.w1, w.b1)), w.w2, w.b2)
    if c.bias is not None:
        z = z + c.bias.to(dtype)
    return torch.softmax(z / (c.temperature or 1.0), -1), z


def check(c: Case, got: RouterScore, dtype: torch.dtype) -> None:
    p, z = truth(c)
    naive_p, naive_z = in_dtype(c, dtype)
    assert_no_worse(got.probs, naive_p, p, dtype)
    assert_no_worse(got.logits, naive_z, z, dtype)
    entropy = lambda q: -(q * q.clamp_min(1e-30).log()).sum(-1)  # noqa: E731
    assert_no_worse(got.entropy, entropy(naive_p), entropy(p), dtype)
    assert got.action.dtype == torch.int64 and got.action.shape == p.shape[:1]
    if c.temperature > 0:
        want = (p.cumsum(-1) <= c.uniforms[:, None].double()).sum(-1)
        assert torch.equal(got.action, want)
    else:
        best = z.gather(-1, got.action[:, None]).squeeze(-1)
        assert_no_worse(best, naive_z.amax(-1), z.amax(-1) if len(z) else best, dtype)
    chosen = lambda q: q.gather(-1, got.action[:, None]).squeeze(-1).log()  # noqa: E731
    assert_no_worse(got.logprob, chosen(naive_p), chosen(p), dtype)
