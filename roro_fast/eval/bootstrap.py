"""Bootstrap intervals over queries and seeds, with one set of draws shared by all arms.

Queries and seeds are crossed (every seed answers the same queries), so a replicate draws seeds with replacement, then
queries with replacement, and uses every drawn seed on every drawn query (Owen, "The pigeonhole bootstrap", 2007).
Because all arms see the same draws, the difference of two arms within a replicate is a paired difference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

MAX_UNDEFINED = 0.025  # share of replicates that may lack a value before an interval is withheld


@dataclass(frozen=True, slots=True)
class Estimate:
    """Plug-in value on all queries and seeds, percentile interval, and the value of each seed alone. NaN: undefined."""

    mean: float
    lo: float = math.nan
    hi: float = math.nan
    per_seed: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Draws:
    """Weights of every replicate: `queries` [B + 1, Q] and `seeds` [B + 1, S], rows sum to 1, row 0 is the plug-in."""

    queries: np.ndarray
    seeds: np.ndarray

    @classmethod
    def make(cls, n_queries: int, n_seeds: int, resamples: int, seed: int) -> Draws:
        """Multinomial weights of `resamples` replicates, deterministic in `seed`."""
        rng = np.random.default_rng(seed)
        return cls(_weights(rng, n_queries, resamples), _weights(rng, n_seeds, resamples))

    def query_means(self, values: np.ndarray) -> np.ndarray:
        """[..., Q] -> [B + 1, ...] weighted means over queries."""
        flat = values.reshape(-1, values.shape[-1]) @ self.queries.T
        return flat.T.reshape(len(self.queries), *values.shape[:-1])

    def seed_means(self, values: np.ndarray) -> np.ndarray:
        """[B + 1, ..., S or 1] -> [B + 1, ...]; a seed with zero weight does not count even when its value is NaN."""
        if values.shape[-1] == 1:
            return values[..., 0]
        w = self.seeds.reshape(len(self.seeds), *([1] * (values.ndim - 2)), -1)
        return np.where(w > 0, values * w, 0.0).sum(-1)


def _weights(rng: np.random.Generator, n: int, resamples: int) -> np.ndarray:
    drawn = rng.multinomial(n, np.full(n, 1.0 / n), size=resamples) / n
    return np.concatenate([np.full((1, n), 1.0 / n), drawn])


def interval(samples: np.ndarray, level: float = 0.95, per_seed: np.ndarray | None = None) -> Estimate:
    """Percentile interval of one quantity; `samples` [B + 1] with the plug-in value first.

    When more than `MAX_UNDEFINED` of the replicates have no value, none is claimed: lo and hi are NaN.
    """
    seeds = [] if per_seed is None else [float(v) for v in per_seed]
    value, draws = float(samples[0]), samples[1:]
    known = draws[np.isfinite(draws)]
    if math.isnan(value) or not len(draws) or len(known) < (1 - MAX_UNDEFINED) * len(draws):
        return Estimate(value, per_seed=seeds)
    lo, hi = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value, float(lo), float(hi), seeds)
