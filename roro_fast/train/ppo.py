"""PPO for the baselines that learn: one decision per boundary, one reward at the end (arXiv 1707.06347, eqs. 7 and 9).

Reward 1[correct] - m * cost share. With a budget, m is the multiplier of "mean cost share <= budget" and follows it by
dual ascent; without one it stays what it was.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from roro_fast.engine import Request, StepEngine, Trajectory
from roro_fast.engine.rng import stream_key
from roro_fast.routing.neural import NeuralRouter
from roro_fast.tasks.base import Query, Task
from roro_fast.train.rewards import cost_share
from roro_fast.train.rollout import verify


@dataclass(slots=True)
class PPOConfig:
    """`multiplier`: cost weight m, or its first value when `budget` (below 1) asks for dual ascent with `dual_lr`."""

    steps: int = 40
    queries_per_step: int = 64
    epochs: int = 4
    lr: float = 0.01
    clip: float = 0.2
    entropy: float = 0.01
    value: float = 0.5
    multiplier: float = 0.3
    budget: float = 1.0
    dual_lr: float = 0.5


def ppo_loss(
    logit: torch.Tensor,
    value: torch.Tensor,
    large: torch.Tensor,
    old_logprob: torch.Tensor,
    returns: torch.Tensor,
    advantages: torch.Tensor,
    config: PPOConfig,
) -> torch.Tensor:
    """Clipped surrogate plus value error minus entropy bonus; all arguments [D], `large` bool, logit that of small."""
    logprob = F.logsigmoid(torch.where(large, -logit, logit))
    ratio = (logprob - old_logprob).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - config.clip, 1 + config.clip) * advantages)
    p = torch.sigmoid(logit)
    entropy = F.binary_cross_entropy(p, p)
    return -gain.mean() + config.value * F.mse_loss(value, returns) - config.entropy * entropy


@dataclass
class PPOTrainer:
    """Trains `policy` in place; the step number and the seed are all that a round draws from.

    `queries` pairs each query with its prompt ids, `all_large` has FLOPs by query id, `limits` the request's caps.
    """

    policy: NeuralRouter
    engine: StepEngine
    task: Task
    queries: Sequence[tuple[Query, list[int]]]
    all_large: dict[str, float]
    config: PPOConfig
    limits: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    history: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.policy.parameters(), lr=self.config.lr)
        self.multiplier = self.config.multiplier

    def train(self) -> NeuralRouter:
        """Run all steps; the curve is in `history`."""
        while len(self.history) < self.config.steps:
            self.history.append(self.train_step())
        return self.policy

    def train_step(self) -> dict[str, float]:
        trajectories = self._roll_out()
        x = torch.tensor([d.features for t in trajectories for d in t.decisions], dtype=torch.float32)
        if not self.history:
            self.policy.standardize(x)
        share = cost_share(trajectories, self.all_large)
        outcome = np.array([float(bool(t.correct)) for t in trajectories])
        counts = torch.tensor([len(t.decisions) for t in trajectories])
        reward = torch.tensor(outcome - self.multiplier * share, dtype=torch.float32).repeat_interleave(counts)
        large = torch.tensor([d.action > 0 for t in trajectories for d in t.decisions])
        old = torch.tensor([d.logprob for t in trajectories for d in t.decisions])
        with torch.no_grad():
            advantage = reward - self.policy.value(x)
            advantage = (advantage - advantage.mean()) / (advantage.std(correction=0) + 1e-6)
        for _ in range(self.config.epochs):
            loss = ppo_loss(self.policy.logit(x), self.policy.value(x), large, old, reward, advantage, self.config)
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
            self.optimizer.step()
        row = {"outcome": float(outcome.mean()), "cost_share": float(share.mean()), "multiplier": self.multiplier}
        if self.config.budget < 1:
            self.multiplier = max(0.0, self.multiplier + self.config.dual_lr * (row["cost_share"] - self.config.budget))
        return row

    def _roll_out(self) -> list[Trajectory]:
        step, n = len(self.history), len(self.queries)
        order = random.Random(f"{self.seed}/{step}").sample(range(n), min(n, self.config.queries_per_step))
        seed = stream_key(self.seed, step) & 0x7FFFFFFF
        by_id = {self.queries[i][0].id: self.queries[i] for i in order}
        requests = [Request(ids, query=q, seed=seed, arm="ppo", **self.limits) for q, ids in by_id.values()]
        found = {t.query_id: t for t in self.engine.rollout(requests, self.policy.at(0.0, sample=True))}
        return [verify(found[q], by_id[q][0], self.task) for q in by_id]
