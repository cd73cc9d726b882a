"""Scores of a Judge in one call: verdict rows against the verdict words only, then a weighted sum per trajectory.

For verdict slot m: p_m = softmax over the K verdict words of h_m . w_k; value_m = sum_k valence_k p_mk; the score of
trajectory s is sum_m c_m value_m / sum_m c_m over its slots. The rest of the vocabulary is never touched.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from roro_fast.ops import native, native_cuda
from roro_fast.ops.registry import Implementation, needs_grad, register, select
from roro_fast.ops.triton_impl import register_triton

EPS = 1e-6  # added to a group's standard deviation


class JudgeScores(NamedTuple):
    """probs [M, K] and scores [S], float32; advantages [S] float32, or None when no groups were given."""

    probs: torch.Tensor
    scores: torch.Tensor
    advantages: torch.Tensor | None


def judge_score(
    hidden: torch.Tensor,
    rows: torch.Tensor,
    label_weight: torch.Tensor,
    criterion_weight: torch.Tensor,
    offsets: torch.Tensor,
    valence: torch.Tensor,
    group_offsets: torch.Tensor | None = None,
    *,
    impl: str | None = None,
) -> JudgeScores:
    """Verdict probabilities, scores in [-1, 1] and optional group-normalised advantages.

    hidden [T, H] final-normed hidden states, any float dtype; rows [M] int64 into hidden; label_weight [K, H] the
    verdict words' rows of lm_head; criterion_weight [M] float32 >= 0; offsets [S + 1] int64, slots of trajectory s are
    `offsets[s]:offsets[s + 1]` (0 first, M last, ascending); valence [K] float32, (+1, -1) for true/false;
    group_offsets [G + 1] int64 over the S trajectories: advantage = (score - group mean) / (group std + EPS).
    A trajectory without slots, or whose weights sum to 0, scores 0. Accumulates in float32; deterministic; every
    size may be 0. The reference is differentiable in hidden and label_weight.
    """
    fn = select("judge_score", hidden.device, hidden.dtype, impl, needs_grad(hidden, label_weight))
    scores: JudgeScores = fn(hidden, rows, label_weight, criterion_weight, offsets, valence, group_offsets)
    return scores


def reference(
    hidden: torch.Tensor,
    rows: torch.Tensor,
    label_weight: torch.Tensor,
    criterion_weight: torch.Tensor,
    offsets: torch.Tensor,
    valence: torch.Tensor,
    group_offsets: torch.Tensor | None = None,
) -> JudgeScores:
    probs = torch.softmax(hidden[rows].float() @ label_weight.float().T, dim=-1)  # [M, K]
    weight = criterion_weight.float()
    total = _segment_sum(weight * (probs @ valence.float()), offsets)  # [S]
    mass = _segment_sum(weight, offsets)
    scores = torch.where(mass > 0, total / mass.clamp_min(torch.finfo(torch.float32).tiny), 0.0)
    return JudgeScores(probs, scores, None if group_offsets is None else _normalise(scores, group_offsets))


def _segment_sum(x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    if offsets.numel() < 2 or x.numel() == 0:
        return x.new_zeros(max(0, offsets.numel() - 1))
    return torch.segment_reduce(x, "sum", offsets=offsets, initial=0.0)


def _normalise(scores: torch.Tensor, group_offsets: torch.Tensor) -> torch.Tensor:
    sizes = group_offsets.diff()
    count = sizes.clamp_min(1).float()
    centred = scores - (_segment_sum(scores, group_offsets) / count).repeat_interleave(sizes)
    std = (_segment_sum(centred.square(), group_offsets) / count).sqrt()
    return centred / (std.repeat_interleave(sizes) + EPS)


def cpu(
    hidden: torch.Tensor,
    rows: torch.Tensor,
    label_weight: torch.Tensor,
    criterion_weight: torch.Tensor,
    offsets: torch.Tensor,
    valence: torch.Tensor,
    group_offsets: torch.Tensor | None = None,
) -> JudgeScores:
    """csrc/cpu/judge_score.cpp; up to 64 verdict words."""
    args = (hidden, rows, label_weight, criterion_weight.float(), offsets, valence, group_offsets, EPS)
    probs, scores, advantages = native.call("judge_score", *args)
    return JudgeScores(probs, scores, None if group_offsets is None else advantages)


def cuda(
    hidden: torch.Tensor,
    rows: torch.Tensor,
    label_weight: torch.Tensor,
    criterion_weight: torch.Tensor,
    offsets: torch.Tensor,
    valence: torch.Tensor,
    group_offsets: torch.Tensor | None = None,
) -> JudgeScores:
    """csrc/cuda/judge_score.cu: two launches."""
    if label_weight.dtype != hidden.dtype:
        label_weight = label_weight.float()
    native_cuda.checks.in_range("rows", rows, len(hidden))
    native_cuda.checks.ascending("offsets", offsets, len(rows))
    native_cuda.checks.ascending("group_offsets", group_offsets, len(offsets) - 1)
    args = (hidden, rows, label_weight, criterion_weight.float(), offsets, valence, group_offsets, EPS)
    probs, scores, advantages = native_cuda.call("judge_score", *args)
    return JudgeScores(probs, scores, None if group_offsets is None else advantages)


register(Implementation("judge_score", "reference", reference, differentiable=True))
native.register_cpu("judge_score", cpu, torch.float32, torch.bfloat16)
native_cuda.register_cuda("judge_score", cuda)
register_triton("judge_score", "judge_score", "judge_score", JudgeScores)
