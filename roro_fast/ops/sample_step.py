"""Sample one token per row from supplied uniforms, with the statistics routing needs, in one call."""

from __future__ import annotations

from typing import NamedTuple

import torch

from roro_fast.ops import native
from roro_fast.ops.registry import Implementation, register, select
from roro_fast.ops.triton_impl import register_triton


class SampledStep(NamedTuple):
    """token [N] int64; logprob, entropy (nats), max_prob [N] float32, all at temperature 1; finite [N] bool."""

    token: torch.Tensor
    logprob: torch.Tensor
    entropy: torch.Tensor
    max_prob: torch.Tensor
    finite: torch.Tensor


def sample_step(
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
    *,
    impl: str | None = None,
) -> SampledStep:
    """Temperature / top-k / top-p sampling by inverse CDF over token ids in increasing order.

    logits [N, V] any float dtype; uniforms [N] float32 in [0, 1); temperature [N] float32, 0 means greedy (lowest id
    wins a tie); top_k [N] int64, 0 means off; top_p [N] float32, 1 means off. Rows with NaN or without a finite
    maximum have `finite` False and token 0.
    """
    return select("sample_step", logits.device, logits.dtype, impl)(logits, uniforms, temperature, top_k, top_p)


def reference(
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
) -> SampledStep:
    x = logits.float()
    token = x.argmax(-1)  # of a row with NaN: the NaN
    finite = torch.isfinite(x.gather(-1, token[:, None]).squeeze(-1))
    x = x.masked_fill(~finite[:, None], 0.0)
    logp = torch.log_softmax(x, -1)
    p = logp.exp()
    entropy = -(p * logp.nan_to_num(neginf=0.0)).sum(-1)
    max_prob = p.gather(-1, token[:, None]).squeeze(-1)
    hot = temperature > 0
    if bool(hot.any()):
        scaled = x / torch.where(hot, temperature, 1.0).clamp_min(1e-6)[:, None]
        token = torch.where(hot, _inverse_cdf(_truncate(scaled, top_k, top_p), uniforms), token)
    token = token.masked_fill(~finite, 0)
    logprob = logp.gather(-1, token[:, None]).squeeze(-1)
    return SampledStep(token, logprob, entropy, max_prob, finite)


def _truncate(x: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None) -> torch.Tensor:
    """Logits outside the top-k ids, then outside the smallest set of mass >= top_p, set to -inf."""
    use_k = top_k is not None and bool((top_k > 0).any())
    use_p = top_p is not None and bool((top_p < 1).any())
    if not (use_k or use_p):
        return x
    order = x.argsort(dim=-1, descending=True, stable=True)
    s = x.gather(-1, order)
    rank = torch.arange(x.shape[-1], device=x.device)
    if use_k:
        assert top_k is not None
        k = torch.where(top_k > 0, top_k, x.shape[-1])
        s = s.masked_fill(rank >= k[:, None], float("-inf"))
    if use_p:
        assert top_p is not None
        p = torch.softmax(s, -1)
        before = p.cumsum(-1) - p
        mass = torch.where(top_p < 1, top_p, 2.0)[:, None]  # 2: rounding of `before` must not cut a row that is off
        s = s.masked_fill((before >= mass) & (rank > 0), float("-inf"))
    return torch.empty_like(x).scatter_(-1, order, s)


def _inverse_cdf(x: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """First id whose cumulative probability exceeds the uniform; never an id of probability zero."""
    cdf = torch.softmax(x, -1).cumsum(-1, dtype=torch.float64)
    target = uniforms.double()[:, None] * cdf[:, -1:]
    return torch.searchsorted(cdf, target, right=True).squeeze(-1)


def cpu(
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
) -> SampledStep:
    """csrc/cpu/sample_step.cpp: one read of the logits; truncation selects, it never sorts the vocabulary."""
    return SampledStep(*native.call("sample_step", logits, uniforms, temperature, top_k, top_p))


register(Implementation("sample_step", "reference", reference))
native.register_cpu("sample_step", cpu, torch.float32, torch.bfloat16)
register_triton("sample_step", "sample_step", "sample_step", SampledStep)
