"""RSD, reward-guided speculative decoding (arXiv 2501.19324): keep a draft by its process reward, else rewrite it."""

from __future__ import annotations

import torch

from roro_fast.config import choose
from roro_fast.engine.policy import BoundaryBatch, Decisions
from roro_fast.routing.baselines import decisions
from roro_fast.routing.scoring import StepScorer
from roro_fast.routing.trim import TrimThr

WEIGHTS = ("threshold", "clip", "sigmoid")


class RSD(TrimThr):
    """Keep the draft with probability w(r) of its reward r: 1[r >= d], clip(r, 0, 1) or sigmoid(r).

    The paper's experiments use the first with d = 0.7, which is TRIM-Thr's rule at another threshold; only the random
    weightings differ from it. They have no threshold, so each is a single operating point.
    """

    name = "rsd"

    def __init__(self, scorer: StepScorer, threshold: float = 0.7, weight: str = "threshold") -> None:
        super().__init__(scorer, threshold)
        choose(weight, "rsd.weight", WEIGHTS)
        self.weight = weight

    def decide(self, batch: BoundaryBatch) -> Decisions:
        if self.weight == "threshold":
            return super().decide(batch)
        r = self.score(batch)
        keep = r.clamp(0, 1) if self.weight == "clip" else torch.sigmoid(r)
        out = decisions(batch.uniforms < 1 - keep, batch, 1 - keep)
        out.features = r[:, None]
        return out
