"""Inputs of judge_score and the fp64 truth they are judged by."""

from __future__ import annotations

from typing import NamedTuple

import torch

from roro_fast.ops.judge_score import EPS, JudgeScores
from tests.ops.cases.common import assert_no_worse

# hidden width, labels, slots of each trajectory, trajectories of each group (None: no groups)
SIZES: list[tuple[int, int, list[int], list[int] | None]] = [
    (64, 2, [6] * 8, [4, 4]),
    (576, 2, [3, 1, 0, 7, 5], None),
    (4096, 2, [9, 10, 11], [3]),
    (33, 3, [1] * 63, [1, 30, 0, 32]),
    (257, 8, [70, 2, 0, 1], [2, 2]),
    (100, 5, [1000], [1]),
    (1, 2, [2, 2], [2]),
    (40, 2, [], []),
    (40, 2, [0, 0, 0], [3]),
    (16, 2, [2] * 300, [300]),
]


class Case(NamedTuple):
    hidden: torch.Tensor
    rows: torch.Tensor
    label_weight: torch.Tensor
    criterion_weight: torch.Tensor
    offsets: torch.Tensor
    valence: torch.Tensor
    group_offsets: torch.Tensor | None


def make(
    width: int,
    labels: int,
    slots: list[int],
    groups: list[int] | None,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
) -> Case:
    g = torch.Generator().manual_seed(seed)
    m = sum(slots)
    hidden = torch.randn(2 * m + 3, width, generator=g)
    return Case(
        hidden.to(dtype),
        torch.randint(0, len(hidden), (m,), generator=g),
        (torch.randn(labels, width, generator=g) / width**0.5).to(dtype),
        torch.randint(0, 4, (m,), generator=g).float(),
        torch.tensor([0, *slots]).cumsum(0),
        torch.linspace(1, -1, labels),
        None if groups is None else torch.tensor([0, *groups]).cumsum(0),
    )


def in_dtype(c: Case, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The formula, trajectory by trajectory and group by group, every step in `dtype`."""
    probs = torch.softmax(c.hidden[c.rows].to(dtype) @ c.label_weight.to(dtype).T, -1)
    weight = c.criterion_weight.to(dtype)
    value = weight * (probs @ c.valence.to(dtype))
    spans = list(zip(c.offsets.tolist(), c.offsets.tolist()[1:], strict=False))
    mass = [weight[a:b].sum() for a, b in spans]
    zero = torch.zeros((), dtype=dtype)
    scores = [value[a:b].sum() / w if w > 0 else zero for (a, b), w in zip(spans, mass, strict=True)]
    out = torch.stack(scores) if scores else torch.zeros(0, dtype=dtype)
    if c.group_offsets is None:
        return probs, out, None
    advantages = torch.zeros_like(out)
    for a, b in zip(c.group_offsets.tolist(), c.group_offsets.tolist()[1:], strict=False):
        if a < b:
            centred = out[a:b] - out[a:b].mean()
            advantages[a:b] = centred / (centred.square().mean().sqrt() + EPS)
    return probs, out, advantages


def check(c: Case, got: JudgeScores, dtype: torch.dtype) -> None:
    """Advantages divide by a spread, which magnifies the error of the scores by as much: they are judged by their own
    definition, applied to the scores that came with them."""
    probs, scores, advantages = in_dtype(c, torch.float64)
    naive_probs, naive_scores, _ = in_dtype(c, dtype)
    assert got.probs.dtype == got.scores.dtype == torch.float32
    assert_no_worse(got.probs, naive_probs, probs, dtype)
    assert_no_worse(got.scores, naive_scores, scores, dtype)
    assert (got.advantages is None) == (advantages is None)
    if got.advantages is None or c.group_offsets is None:
        return
    sizes = c.group_offsets.diff()
    for x, s in zip(got.advantages.split(sizes.tolist()), got.scores.double().split(sizes.tolist()), strict=True):
        if len(s):
            std = s.std(correction=0)
            torch.testing.assert_close(
                x.double(), (s - s.mean()) / (std + EPS), atol=1e-7 / (float(std) + EPS), rtol=1e-5
            )
