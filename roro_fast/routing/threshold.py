"""The shape of most baselines: a score per boundary, and the large model wherever it falls below a threshold."""

from __future__ import annotations

import copy
from typing import Protocol, Self

import torch

from roro_fast.config import ACTION_SPACES, choose
from roro_fast.engine.policy import BoundaryBatch, Decisions, RoutingPolicy
from roro_fast.routing.baselines import decisions


class Scored(RoutingPolicy, Protocol):
    """A policy that compares a score per boundary with a threshold."""

    step_tokens: int

    def score(self, batch: BoundaryBatch) -> torch.Tensor: ...

    def at(self, threshold: float) -> RoutingPolicy: ...


class ScoreThreshold:
    """Large model iff `score` < `threshold`; the published threshold is a subclass's default.

    `score(batch)` [N] float32 is higher where the small model is to be trusted, and stored as the decision's feature.
    `step_tokens` caps a step: 1 makes every token a boundary, 0 leaves steps to the delimiter; whoever builds requests
    for the policy reads it.
    """

    name = ""
    needs_scout = False
    step_tokens = 0

    def __init__(self, threshold: float, action_space: str) -> None:
        choose(action_space, f"{self.name}.action_space", ACTION_SPACES)
        self.threshold, self.action_space = threshold, action_space

    def score(self, batch: BoundaryBatch) -> torch.Tensor:
        raise TypeError(f"{type(self).__name__} has no score of its own")

    def decide(self, batch: BoundaryBatch) -> Decisions:
        score = self.score(batch)
        out = decisions(score < self.threshold, batch)
        out.features = score[:, None]
        return out

    def at(self, threshold: float) -> Self:
        """The same rule with another threshold."""
        other = copy.copy(self)
        other.threshold = threshold
        return other


class Explore:
    """Toss a fair coin and store `policy`'s score: what its scores look like on answers that both models write."""

    def __init__(self, policy: Scored) -> None:
        self.policy, self.name = policy, f"explore_{policy.name}"
        self.action_space, self.needs_scout, self.step_tokens = (
            policy.action_space, policy.needs_scout, policy.step_tokens,
        )  # fmt: skip

    def decide(self, batch: BoundaryBatch) -> Decisions:
        out = decisions(batch.uniforms < 0.5, batch, torch.full((len(batch),), 0.5))
        out.features = self.policy.score(batch)[:, None]
        return out
