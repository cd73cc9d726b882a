"""Policy-guided stepwise routing (arXiv 2605.06116): a small network on confidence features, trained under a cost
constraint and calibrated by a threshold, without any process reward model."""

from __future__ import annotations

import torch

from roro_fast.engine.policy import BoundaryBatch
from roro_fast.routing.neural import NeuralRouter
from roro_fast.routing.state import SIGNALS, signals


class PolicyGuided(NeuralRouter):
    """pi(small | confidence features), trained on the Lagrangian of: accuracy, subject to mean cost share <= budget.

    "next" is the paper's: who writes the next step. "regenerate" is ours. The features are this project's signals
    (confidences, entropies, position, share so far), with the scout's in "next", and no hidden state. Ours as well:
    PPO for the policy gradient and dual ascent for the multiplier (`train.ppo`).
    """

    name = "policy_guided"

    def __init__(self, action_space: str = "next", *, width: int = 32, seed: int = 0) -> None:
        super().__init__(len(SIGNALS), action_space, width=width, seed=seed)
        self.needs_scout = action_space == "next"

    def features(self, batch: BoundaryBatch) -> torch.Tensor:
        return signals(batch).cpu()
