"""R2R-style token-level routing (arXiv 2505.21600): a network on the small model's state decides about every token."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from roro_fast.engine.policy import BoundaryBatch
from roro_fast.errors import ConfigError
from roro_fast.routing.neural import NeuralRouter


class R2R(NeuralRouter):
    """Large model writes the next token iff the network calls the small model's choice divergent; logit = log-odds not.

    Requests need `max_step_tokens` 1 (`step_tokens`): the small model scouts every token, and its final-normed hidden
    state, next-token entropy and max-probability are the inputs. All of it is in the engine's total FLOPs: a token
    that the large model writes has cost the scout's forward and the catch-up of what it had not seen. Ours: one hidden
    layer instead of the paper's residual FFN, and neither the 100 top logits nor the embedding of the predicted token.
    """

    name = "r2r"
    needs_scout = True
    step_tokens = 1

    def __init__(self, hidden: int, *, width: int = 64, seed: int = 0) -> None:
        super().__init__(hidden + 2, "next", width=width, seed=seed)

    def features(self, batch: BoundaryBatch) -> torch.Tensor:
        if batch.hidden is None or batch.scout_entropy is None or batch.scout_maxprob is None:
            raise ConfigError(f"{self.name}: needs the scout's hidden state; the engine gave none")
        return token_features(batch.hidden, batch.scout_entropy, batch.scout_maxprob)


def token_features(hidden: torch.Tensor, entropy: torch.Tensor, max_prob: torch.Tensor) -> torch.Tensor:
    """[N, H + 2] inputs on the CPU from states [N, H] and the statistics [N] of the next token."""
    return torch.cat([v.float().cpu() for v in (hidden, entropy[:, None], max_prob[:, None])], -1)


def fit(router: R2R, x: torch.Tensor, divergent: torch.Tensor, epochs: int = 150, lr: float = 0.01) -> float:
    """Train on features [D, H + 2] and labels [D] bool by weighted cross-entropy; returns the last loss.

    Divergent tokens are rare: their weight is the ratio of the classes, as in the paper, at most 20.
    """
    y = divergent.float()
    router.standardize(x)
    weight = ((1 - y).sum() / y.sum().clamp_min(1)).clamp(1, 20)
    trained = [router.w1, router.b1, router.w2, router.b2]
    optimizer = torch.optim.Adam(trained, lr=lr)
    loss = torch.zeros(())
    for _ in range(epochs):
        loss = F.binary_cross_entropy_with_logits(-router.logit(x), y, pos_weight=weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())
