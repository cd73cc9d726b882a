"""The router's view of a boundary: a fixed vector of signals of about unit scale."""

from __future__ import annotations

import numpy as np
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
    """[N, len(SIGNALS)] float32, columns in the order of SIGNALS (METHOD.md section 2), on the scout's device."""
    x = np.zeros((len(batch), len(SIGNALS)), np.float32)
    (index, tokens, last), floats = batch.ints.numpy(force=True), batch.floats.numpy(force=True)
    x[:, 0] = index / max(batch.step_cap, 1)
    x[:, 1] = np.log1p(tokens, dtype=np.float32) / 5
    np.exp(floats[:2].T, out=x[:, 2:4])
    x[:, 4:9] = floats[2:7].T
    x[:, 9], x[:, 10] = last == 0, last > 0
    x[:, 11] = floats[7]
    out = torch.from_numpy(x)
    if batch.scout_entropy is not None and batch.scout_maxprob is not None:
        # On a GPU these two may still be in the making, which `non_blocking` does not wait for.
        out = out.to(batch.scout_entropy.device, non_blocking=True)
        out[:, 12], out[:, 13] = batch.scout_entropy, batch.scout_maxprob
    return out
