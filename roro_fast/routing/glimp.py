"""GlimpRouter (arXiv 2601.05110): the entropy of a step's first token says who writes the step."""

from __future__ import annotations

import torch

from roro_fast.engine.policy import BoundaryBatch
from roro_fast.errors import ConfigError
from roro_fast.routing.threshold import ScoreThreshold


class GlimpRouter(ScoreThreshold):
    """Large model iff the small model's entropy of a step's first token exceeds tau (default 1 nat); score = -entropy.

    "next" is the paper's: the small model only glimpses the first token, which the scout's forward gives. "regenerate"
    is ours: the same entropy, judged after the draft. Entropies are over the whole vocabulary (the authors' code takes
    the 20 likeliest tokens). Left out: the paper has the large model write the final answer whatever the entropy,
    which needs a mark of where the thinking ends.
    """

    name = "glimp_router"

    def __init__(self, tau: float = 1.0, action_space: str = "next") -> None:
        super().__init__(-tau, action_space)
        self.needs_scout = action_space == "next"

    def score(self, batch: BoundaryBatch) -> torch.Tensor:
        if self.action_space == "regenerate":
            return -batch.first_entropy
        if batch.scout_entropy is None:
            raise ConfigError(f"{self.name}: 'next' needs the scout's entropy; set needs_scout")
        return -batch.scout_entropy.float().cpu()
