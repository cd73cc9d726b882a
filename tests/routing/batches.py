"""Boundary batches made by hand."""

from __future__ import annotations

from typing import Any

import torch

from roro_fast.engine import BoundaryBatch


def batch(n: int = 4, num_models: int = 2, hidden: int = 0, seed: int = 0, **columns: Any) -> BoundaryBatch:
    """n rows of plausible random statistics; `columns` replace any of them."""
    g = torch.Generator().manual_seed(seed)

    def u(low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        return low + (high - low) * torch.rand(n, generator=g)

    known: dict[str, Any] = {
        "step_index": torch.arange(n),
        "step_cap": 16,
        "step_tokens": torch.full((n,), 8),
        "mean_logprob": u(-0.5),
        "min_logprob": u(-2, -0.5),
        "first_entropy": u(),
        "mean_entropy": u(),
        "run_min_conf": u(),
        "run_prod_conf": u(),
        "large_share": u(),
        "last_model": torch.zeros(n, dtype=torch.int64),
        "budget": torch.ones(n),
        "uniforms": u(),
        "num_models": num_models,
        "tags": [{"query": None, "sample": 0, "actions": []} for _ in range(n)],
        "prefix": [list for _ in range(n)],
        "hidden": torch.randn(n, hidden, generator=g) if hidden else None,
    }
    return BoundaryBatch(**{**known, **columns})
