"""TRIM (arXiv 2601.10245): the small model drafts every step, the large one rewrites those a router picks.

TRIM-Thr here; TRIM-Agg learns its rule from an aggregate of the step scores. TRIM-POMDP is in `trim_pomdp`.
"""

from __future__ import annotations

import math

import torch

from roro_fast.engine.policy import BoundaryBatch
from roro_fast.routing.neural import NeuralRouter
from roro_fast.routing.scoring import StepScorer, rate
from roro_fast.routing.threshold import ScoreThreshold

AGGREGATE = ("score", "min_score", "log_prod_score", "log_tokens", "step")


class TrimThr(ScoreThreshold):
    """Rewrite the draft iff its process reward is below the threshold k.

    `ConfidenceThreshold` is the same rule on the small model's own confidence.
    """

    name = "trim_thr"

    def __init__(self, scorer: StepScorer, threshold: float = 0.5) -> None:
        super().__init__(threshold, "regenerate")
        self.scorer = scorer

    def score(self, batch: BoundaryBatch) -> torch.Tensor:
        return torch.tensor([values[-1] for values in rate(self.scorer, batch)])


def aggregate(scores: list[tuple[float, ...]], tokens: torch.Tensor, step_cap: int) -> torch.Tensor:
    """[N, 5] features: draft score r_t, min r_i and log prod r_i over the steps kept before it (1 and 0 at the first),
    log1p of the draft's tokens, and t / cap. The product is taken in logs, where long answers do not vanish.
    """
    rows = []
    for values, n in zip(scores, tokens.tolist(), strict=True):
        *past, now = values
        logs = [math.log(max(v, 1e-6)) for v in past]
        rows.append((now, min(past, default=1.0), sum(logs), math.log1p(n), len(past) / max(step_cap, 1)))
    return torch.tensor(rows, dtype=torch.float32).view(-1, len(AGGREGATE))


class TrimAgg(NeuralRouter):
    """An MLP on (r_t, min r, prod r, tokens, t), trained with PPO on outcome - lambda * cost.

    Scores of the past are those of the steps that were kept, the large model's among them. Ours: the paper trains one
    policy per lambda; here one policy is trained and a calibrated threshold on its logit sweeps the frontier.
    """

    name = "trim_agg"

    def __init__(self, scorer: StepScorer, *, width: int = 32, seed: int = 0) -> None:
        super().__init__(len(AGGREGATE), "regenerate", width=width, seed=seed)
        self.scorer = scorer

    def features(self, batch: BoundaryBatch) -> torch.Tensor:
        return aggregate(rate(self.scorer, batch), batch.step_tokens, batch.step_cap)
