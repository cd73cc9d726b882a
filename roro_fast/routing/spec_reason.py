"""SpecReason (arXiv 2504.07891): the large model rates each drafted step and rewrites what it does not like."""

from __future__ import annotations

import torch

from roro_fast.engine.policy import BoundaryBatch
from roro_fast.routing.scoring import StepScorer, rate
from roro_fast.routing.threshold import ScoreThreshold

TOP = 9


class SpecReason(ScoreThreshold):
    """Accept the draft iff the large model's rating of 0-9 is at least the threshold (7 in the paper).

    `scorer` must read with the large model: `VerdictScorer.digits`, the expected digit of one prefill, or where that
    model cannot be asked (nano) a trained head on its prefill; ratings are 9 times the score. Left out: writing the
    first n steps with the large model, an option the paper switches on for some data sets.
    """

    name = "spec_reason"

    def __init__(self, scorer: StepScorer, threshold: float = 7.0) -> None:
        super().__init__(threshold, "regenerate")
        self.scorer = scorer

    def score(self, batch: BoundaryBatch) -> torch.Tensor:
        return TOP * torch.tensor([values[-1] for values in rate(self.scorer, batch)])
