"""Boundary batches made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from roro_fast.engine import BoundaryBatch
from roro_fast.routing.scoring import METER, StepScores, Trace, meter
from roro_fast.tasks.base import Query

FLOATS = (
    "mean_logprob", "min_logprob", "first_entropy", "mean_entropy", "run_min_conf", "run_prod_conf", "large_share",
    "budget", "uniforms",
)  # fmt: skip


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
    known |= columns
    ints = torch.stack([known.pop(name) for name in ("step_index", "step_tokens", "last_model")])
    floats = torch.stack([known.pop(name) for name in FLOATS])
    return BoundaryBatch(ints, floats, **known)


class Written:
    """A process reward model whose scores are written in the steps: "0.3 ..." scores 0.3, at 10 FLOPs a step."""

    name = "written"

    def score(self, traces: Sequence[Trace]) -> list[StepScores]:
        values = [tuple(float(s.split()[0]) for s in t.steps) for t in traces]
        return [StepScores(v, (1,) * len(v), (10.0,) * len(v)) for v in values]


def traced(*answers: str, actions: Sequence[list[int]] | None = None, **columns: Any) -> BoundaryBatch:
    """A "regenerate" batch of answers given as steps joined by "|", the last one a draft; `actions` so far per row."""
    steps = [a.split("|") for a in answers]
    done = actions or [[0] * (len(s) - 1) for s in steps]
    query = Query("q", "problem", "1", "ledger")
    tags = [{"query": query, "sample": 0, "actions": a, METER: meter()} for a in done]
    index = torch.tensor([len(s) - 1 for s in steps])
    return batch(len(steps), tags=tags, prefix=[lambda s=s: s for s in steps], **{"step_index": index, **columns})
