"""STEER (arXiv 2511.06190): a mixture of two Gaussians tells confident steps of the small model from doubtful ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from roro_fast.engine.policy import BoundaryBatch
from roro_fast.errors import DataError
from roro_fast.routing.threshold import ScoreThreshold


@dataclass(frozen=True, slots=True)
class Mixture:
    """Two Gaussians on the line: `weight`, `mean` and `std` as (doubtful, confident), the means rising."""

    weight: tuple[float, float]
    mean: tuple[float, float]
    std: tuple[float, float]

    def confident(self, x: torch.Tensor) -> torch.Tensor:
        """[N] posterior of the confident component at x [N]."""
        x = x.double()
        w, m, s = (torch.tensor(v, dtype=torch.float64) for v in (self.weight, self.mean, self.std))
        log = w.log() - s.log() - 0.5 * ((x[:, None] - m) / s) ** 2
        return torch.softmax(log, -1)[:, 1].float()


def fit_mixture(x: np.ndarray, iterations: int = 200, floor: float = 1e-3) -> Mixture:
    """Maximum likelihood by EM from a split at the median; `floor` keeps a component from closing in on one value."""
    x = np.asarray(x, np.float64)
    if len(x) < 4 or np.ptp(x) == 0:
        raise DataError(f"steer: {len(x)} confidences without spread fit no mixture; give more calibrate queries")
    high = (x > np.median(x)).astype(np.float64)
    r = np.stack((1 - high, high), 1) * 0.98 + 0.01
    for _ in range(iterations):
        n = r.sum(0)
        w, m = n / len(x), r.T @ x / n
        s = np.sqrt((r * (x[:, None] - m) ** 2).sum(0) / n).clip(floor)
        log = np.log(w) - np.log(s) - 0.5 * ((x[:, None] - m) / s) ** 2
        r = np.exp(log - log.max(1, keepdims=True))
        r /= r.sum(1, keepdims=True)
    order = np.argsort(m)
    w, m, s = (tuple(float(v) for v in a[order]) for a in (w, m, s))
    return Mixture(w, m, s)  # type: ignore[arg-type]


def step_confidence(batch: BoundaryBatch, action_space: str) -> torch.Tensor:
    """[N] mean log max-probability of a step's tokens under the small model.

    Ours for the paper's mean max-logit: the engine keeps log-probs, which do not drift with the scale of the logits; in
    greedy decoding the chosen token's is the largest. "next" judges the last step; of a step the large model wrote only
    the scout's next-token probability is known, and before the first step there is nothing to doubt.
    """
    if action_space == "regenerate" or batch.scout_maxprob is None:
        return batch.mean_logprob
    scout = batch.scout_maxprob.float().cpu().clamp_min(1e-12).log()
    return torch.where(batch.last_model > 0, scout, batch.mean_logprob)


class Steer(ScoreThreshold):
    """The small model writes iff P(confident) >= gamma, P the posterior of the confident component.

    "next" is the paper's: the last step decides who writes the next one. "regenerate" is ours: a doubtful draft is
    rewritten. The mixture is fitted on calibrate answers, not online.
    """

    name = "steer"

    def __init__(self, mixture: Mixture, gamma: float = 0.5, action_space: str = "next") -> None:
        super().__init__(gamma, action_space)
        self.mixture, self.needs_scout = mixture, action_space == "next"

    def score(self, batch: BoundaryBatch) -> torch.Tensor:
        return self.mixture.confident(step_confidence(batch, self.action_space))
