"""A small network over features of a boundary, with a value head for PPO; decides by a threshold on its logit."""

from __future__ import annotations

import copy
import math
from typing import Self

import torch
from torch import nn

from roro_fast.config import ACTION_SPACES, choose
from roro_fast.engine.policy import BoundaryBatch, Decisions
from roro_fast.routing.baselines import decisions


class NeuralRouter(nn.Module):
    """One hidden layer; `logit` is the log-odds of the small model and its score: large model iff it is < `threshold`.

    With `sample` the large model is drawn with probability sigmoid(-logit) instead, from the batch's uniforms.
    Decisions store their features. Subclasses give `features(batch)` [N, inputs].
    """

    name = ""
    needs_scout = False
    step_tokens = 0

    def __init__(
        self, inputs: int, action_space: str, *, width: int = 32, seed: int = 0, threshold: float = 0.0
    ) -> None:
        super().__init__()
        choose(action_space, f"{self.name}.action_space", ACTION_SPACES)
        self.action_space, self.threshold, self.sample = action_space, 0.0, False
        g = torch.Generator().manual_seed(seed)
        # Zero output weights: before training the router is a fair coin and the critic says 0.
        self.w1 = nn.Parameter(torch.randn(width, inputs, generator=g) / math.sqrt(inputs))
        self.b1, self.w2, self.b2 = (nn.Parameter(torch.zeros(s)) for s in (width, (1, width), 1))
        self.v1 = nn.Parameter(torch.randn(width, inputs, generator=g) / math.sqrt(inputs))
        self.c1, self.v2, self.c2 = (nn.Parameter(torch.zeros(s)) for s in (width, (1, width), 1))
        self.register_buffer("shift", torch.zeros(inputs))
        self.register_buffer("scale", torch.ones(inputs))

    def features(self, batch: BoundaryBatch) -> torch.Tensor:
        raise TypeError(f"{type(self).__name__} has no features of its own")

    def standardize(self, x: torch.Tensor) -> None:
        """Set the input standardisation from sample features [D, inputs]; constant inputs are left out."""
        std, self.shift = torch.std_mean(x, 0, correction=0)
        self.scale = torch.where(std > 1e-4, std, torch.full_like(std, 1e6))

    def logit(self, x: torch.Tensor) -> torch.Tensor:
        """[N] log-odds of the small model at features [N, inputs], with autograd."""
        h = torch.tanh((x - self.shift) / self.scale @ self.w1.T + self.b1)
        return (h @ self.w2.T + self.b2).squeeze(-1)

    def value(self, x: torch.Tensor) -> torch.Tensor:
        """[N] expected return at features [N, inputs], with autograd."""
        h = torch.tanh((x - self.shift) / self.scale @ self.v1.T + self.c1)
        return (h @ self.v2.T + self.c2).squeeze(-1)

    @torch.no_grad()
    def score(self, batch: BoundaryBatch) -> torch.Tensor:
        return self.logit(self.features(batch))

    @torch.no_grad()
    def decide(self, batch: BoundaryBatch) -> Decisions:
        x = self.features(batch)
        logit = self.logit(x)
        if self.sample:
            p = torch.sigmoid(-logit)
            out = decisions(batch.uniforms < p, batch, p)
        else:
            out = decisions(logit < self.threshold, batch)
        out.features = x
        return out

    def at(self, threshold: float, *, sample: bool = False) -> Self:
        """A view that shares the weights and decides at another threshold, or samples."""
        other = copy.copy(self)
        other.threshold, other.sample = threshold, sample
        return other
