"""What every stage function gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from roro_fast.config import Config
from roro_fast.rubric.render import Pool
from roro_fast.runs import RunDirectory
from roro_fast.tasks.base import Query
from roro_fast.train.rollout import Progress, quiet
from roro_fast.train.setup import Workbench


@dataclass
class Context:
    """One run directory, what its config loads, and where to report progress."""

    run: RunDirectory
    bench: Workbench
    progress: Progress = quiet

    @property
    def config(self) -> Config:
        return self.run.config

    def limits(self, temperature: float) -> dict[str, Any]:
        """Request fields that every rollout of this run shares."""
        e = self.config.engine
        return {
            "seed": self.config.run.seed,
            "max_new_tokens": e.max_new_tokens,
            "max_steps": e.max_steps,
            "temperature": temperature,
            "top_k": e.top_k,
            "top_p": e.top_p,
        }

    def prompts(self, split: str, n: int | None = None) -> list[tuple[Query, list[int]]]:
        """The first `n` (default: as configured) queries of a split with their prompt ids."""
        return [(q, self.bench.encode(q)) for q in self.bench.queries(split, n)]

    def pool(self) -> Pool:
        """The models as a Judge knows them."""
        return Pool(tuple(self.config.models.labels), tuple(m.config.num_params for m in self.bench.models))
