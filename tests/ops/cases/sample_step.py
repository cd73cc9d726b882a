"""Inputs of sample_step and the fp64 truth they are judged by."""

from __future__ import annotations

from typing import NamedTuple

import torch

from roro_fast.ops.sample_step import SampledStep
from tests.ops.cases.common import assert_no_worse

VOCABULARIES = [1, 2, 17, 100, 255, 257, 1000, 49152, 152064, 262144]
MODES = ["greedy", "plain", "top_k", "top_p", "both", "mixed"]
PEAKS = 12


class Case(NamedTuple):
    logits: torch.Tensor
    uniforms: torch.Tensor
    temperature: torch.Tensor
    top_k: torch.Tensor | None
    top_p: torch.Tensor | None


class Truth(NamedTuple):
    probs: torch.Tensor  # [N, V] of what is drawn from, fp64
    logp: torch.Tensor  # [N, V] at temperature 1, fp64


def make(n: int, vocab: int, mode: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Case:
    """A few likely ids per row carry most of the mass, so uniforms and top-p cuts can keep away from boundaries."""
    g = torch.Generator().manual_seed(seed)
    logits = 1.5 * torch.randn(n, vocab, generator=g)
    if vocab > 2 * PEAKS:
        at = torch.rand(n, vocab, generator=g).topk(PEAKS).indices
        logits.scatter_add_(1, at, torch.full(at.shape, 12.0))
    logits = logits.to(dtype)
    some = lambda *values: torch.tensor(values)[torch.randint(0, len(values), (n,), generator=g)]  # noqa: E731
    temperature = torch.zeros(n) if mode == "greedy" else some(0.3, 1.0, 0.7, 1.6)
    top_k = some(0, 1, 2, 5, 50, vocab, 3 * vocab) if mode in ("top_k", "both", "mixed") else None
    top_p = torch.ones(n) if mode in ("top_p", "both", "mixed") else None
    if mode == "mixed":
        temperature = temperature.where(torch.rand(n, generator=g) > 0.3, 0.0)
    case = Case(logits, torch.zeros(n), temperature, top_k, top_p)
    if top_p is not None and n:
        p, order = truth(case).probs.sort(dim=-1, descending=True, stable=True)
        rank = (torch.rand(n, generator=g) * (p > 1e-3).sum(-1)).long()
        middle = (p.cumsum(-1) - p / 2).gather(-1, rank[:, None]).squeeze(-1).float()
        case = case._replace(top_p=middle.where(torch.rand(n, generator=g) > 0.2, 1.0))
    if not n:
        return case
    p = truth(case).probs
    wanted = torch.multinomial(p.where(p >= p.amax(-1, keepdim=True).clamp_max(1e-3), 0.0), 1, generator=g)
    share = 0.2 + 0.6 * torch.rand(n, 1, generator=g)
    inside = p.cumsum(-1).gather(-1, wanted) - share * p.gather(-1, wanted)
    return case._replace(uniforms=inside.float().squeeze(-1).clamp(0, 1 - 2**-24))


def truth(c: Case) -> Truth:
    x = c.logits.double()
    hot = c.temperature > 0
    scaled = (c.logits.float() / c.temperature.where(hot, 1.0)[:, None]).double()  # ties are those of the fp32 quotient
    s, order = scaled.sort(dim=-1, descending=True, stable=True)
    if c.top_k is not None:
        k = c.top_k.where(c.top_k > 0, x.shape[-1])
        s = s.masked_fill(torch.arange(x.shape[-1]) >= k[:, None], float("-inf"))
    if c.top_p is not None:
        p = s.softmax(-1)
        off = (p.cumsum(-1) - p >= c.top_p.double()[:, None]) & (c.top_p < 1)[:, None]
        off[:, 0] = False
        s = s.masked_fill(off, float("-inf"))
    p = torch.zeros_like(s).scatter_(-1, order, s.softmax(-1))
    best = torch.zeros_like(p).scatter_(-1, order[:, :1], 1.0)
    return Truth(p.where(hot[:, None], best), x.log_softmax(-1))


def tokens(c: Case, t: Truth) -> torch.Tensor:
    """The ids that every implementation must draw: the first whose cumulative probability exceeds the uniform."""
    return (t.probs.cumsum(-1) <= c.uniforms[:, None].double()).sum(-1)


def check(c: Case, got: SampledStep, dtype: torch.dtype) -> None:
    t = truth(c)
    assert got.token.dtype == torch.int64 and torch.equal(got.token, tokens(c, t))
    naive = c.logits.log_softmax(-1)
    pick = lambda logp: logp.gather(-1, got.token[:, None]).squeeze(-1)  # noqa: E731
    entropy = lambda logp: -(logp.exp() * logp).sum(-1)  # noqa: E731
    assert_no_worse(got.logprob, pick(naive), pick(t.logp), dtype)
    assert_no_worse(got.entropy, entropy(naive), entropy(t.logp), dtype)
    assert_no_worse(got.max_prob, naive.exp().amax(-1), t.logp.exp().amax(-1), dtype)
    assert got.finite.dtype == torch.bool and got.finite.shape == got.token.shape and bool(got.finite.all())
