"""The router's reward (METHOD.md section 6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from roro_fast.engine import Trajectory
from roro_fast.errors import ConfigError


class ProcessReward(Protocol):
    """Scores trajectories in [-1, 1], float32 [N]; NaN where it has no opinion (an invalid rubric)."""

    name: str

    def score(self, trajectories: Sequence[Trajectory]) -> np.ndarray: ...


@dataclass(frozen=True, slots=True)
class Rewards:
    """Per trajectory, float64 [N]: total = outcome - lambda * cost_share + beta * process; `unscored` counts NaNs."""

    total: np.ndarray
    outcome: np.ndarray
    cost_share: np.ndarray
    process: np.ndarray
    unscored: int


def cost_share(trajectories: Sequence[Trajectory], all_large: dict[str, float]) -> np.ndarray:
    """Generated FLOPs of each trajectory over those of all-large on its query, float64 [N]."""
    return np.array([t.cost.generated_flops / all_large[t.query_id] for t in trajectories])


def combine(
    trajectories: Sequence[Trajectory],
    all_large: dict[str, float],
    lambda_cost: float,
    beta: float,
    process: np.ndarray,
) -> Rewards:
    """R = 1[correct] - lambda * cost + beta * S. A trajectory without a score gets S = 0, the middle of the range."""
    if not 0 <= beta < 0.5:
        raise ConfigError(f"router.beta: {beta} is not in [0, 0.5); a process score could outweigh the outcome")
    missing = np.isnan(process)
    s = np.clip(np.where(missing, 0.0, process), -1, 1).astype(np.float64)
    outcome = np.array([float(bool(t.correct)) for t in trajectories])
    share = cost_share(trajectories, all_large)
    return Rewards(outcome - lambda_cost * share + beta * s, outcome, share, s, int(missing.sum()))
