"""The router's view of a boundary: a fixed vector of signals of about unit scale."""

from __future__ import annotations

import torch

from roro_fast.engine.policy import BoundaryBatch

SIGNALS = (
    "step_share",  # step index / step cap
    "step_tokens",  # log1p(tokens of the last step) / 5
    "mean_conf",  # exp(mean token log-prob)
    "min_conf",  # exp(least token log-prob): probabilities, since log-probs of 0.99 and 0.5 are too close to tell apart
    "first_entropy",  # nats
    "mean_entropy",  # nats
    "run_min_conf",
    "run_prod_conf",
    "large_share",
    "last_small",  # 1 when model 0 wrote the last step
    "last_large",  # 1 when another model did
    "budget",
    "scout_entropy",  # nats; 0 without a scout
    "scout_maxprob",  # 0 without a scout
)


def signals(batch: BoundaryBatch) -> torch.Tensor:
    """[N, len(SIGNALS)] float32, columns in the order of SIGNALS (METHOD.md section 2)."""
    columns = (
        batch.step_index / max(batch.step_cap, 1),
        torch.log1p(batch.step_tokens.float()) / 5,
        batch.mean_logprob.exp(),
        batch.min_logprob.exp(),
        batch.first_entropy,
        batch.mean_entropy,
        batch.run_min_conf,
        batch.run_prod_conf,
        batch.large_share,
        (batch.last_model == 0).float(),
        (batch.last_model > 0).float(),
        batch.budget,
    )
    if batch.scout_entropy is None or batch.scout_maxprob is None:
        none = torch.zeros_like(batch.budget)
        return torch.stack((*columns, none, none), -1)
    known = torch.stack(columns, -1)
    scout = torch.stack((batch.scout_entropy.float(), batch.scout_maxprob.float()), -1)
    # On a GPU the scout's two may still be in the making, which `non_blocking` does not wait for.
    return torch.cat((known.to(scout.device, non_blocking=True), scout), -1)
