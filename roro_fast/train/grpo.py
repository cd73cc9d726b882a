"""GRPO's two formulas, for whatever acts: verdicts, tokens of a rubric, routing decisions."""

from __future__ import annotations

from typing import NamedTuple

import torch


class PolicyLoss(NamedTuple):
    """`loss` to minimise; `kl` to the reference and `clipped` share of actions, for the log."""

    loss: torch.Tensor
    kl: float
    clipped: float


def group_advantages(rewards: torch.Tensor, scale: str = "group", eps: float = 1e-6) -> torch.Tensor:
    """rewards [B, G], B groups of G -> (reward - mean of its group) / (a deviation + eps); 0 for a lone member.

    scale: "group" divides by each group's own deviation (GRPO, arXiv 2402.03300, eq. 3); "batch" by that of all centred
    rewards, so that a group whose members differ only in cost does not count as much as one with both outcomes;
    "none" leaves reward - mean (Dr. GRPO, arXiv 2503.20783).
    """
    centred = rewards - rewards.mean(-1, keepdim=True)
    if scale == "none":
        return centred
    square = centred.square()
    variance = square.mean() if scale == "batch" else square.mean(-1, keepdim=True)
    return centred / (variance.sqrt() + eps)


def grpo_loss(
    logp: torch.Tensor,
    old: torch.Tensor,
    advantage: torch.Tensor,
    weight: torch.Tensor | None = None,
    *,
    reference: torch.Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    kl: float = 1e-3,
) -> PolicyLoss:
    """Clipped policy objective over actions (arXiv 2402.03300, eqs. 3 and 4), clipped asymmetrically as in DAPO (arXiv
    2503.14476, eq. 10).

    logp (with grad), old, reference, advantage, weight: [A] float32, one entry per sampled action. `weight` sums to 1;
    it is 1 / (sequences * actions of the sequence) for GRPO's per-sequence mean, None for the mean over all actions.
    The KL term is the unbiased estimator exp(d) - d - 1 with d = reference - logp.
    """

    def mean(x: torch.Tensor) -> torch.Tensor:
        return x.mean() if weight is None else (weight * x).sum()

    ratio = (logp - old).exp()
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)
    clipped = float(mean((ratio * advantage > gain).float()).detach())
    loss, divergence = -mean(gain), 0.0
    if reference is not None:
        d = reference - logp
        drift = mean(d.exp() - d - 1)
        loss, divergence = loss + kl * drift, float(drift.detach())
    return PolicyLoss(loss, divergence, clipped)
