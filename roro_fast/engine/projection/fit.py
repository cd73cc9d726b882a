"""Fit a projection by ridge regression on the KV that both models compute for the same texts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from roro_fast.config import ProjectionConfig
from roro_fast.engine.projection.artifact import KVProjection, fingerprint
from roro_fast.engine.projection.record import RecordedKV, Tokens, record_kv
from roro_fast.errors import DataError
from roro_fast.models.decoder import Decoder
from roro_fast.ops.kv_project import LinearMaps


@dataclass(frozen=True, slots=True)
class _Solution:
    """weight [out, in], bias [out]; error: squared error over variance of the validation part; ridge: chosen."""

    weight: torch.Tensor
    bias: torch.Tensor
    error: float
    ridge: float


def fit(source: Decoder, target: Decoder, texts: Tokens, config: ProjectionConfig, seed: int = 0) -> KVProjection:
    """Maps from the source's KV to the receiver's, not gated yet.

    Per receiver layer: source layers are added one at a time, `config.sources` in all, each the one that lowers the
    validation error of keys and values together most; the ridge is the best of `config.ridge` (relative to the mean
    variance of an input) for keys and for values. Validation takes whole texts, `config.validation` of them.
    """
    if len(texts) < 2:
        raise DataError(f"texts: {len(texts)} given; fitting and validation need one each at least")
    x, y = record_kv(source, texts), record_kv(target, texts)
    x = x._replace(keys=x.keys.to(y.keys.device), values=x.values.to(y.keys.device))
    held = _held_out(y, max(1, round(config.validation * len(texts))), seed)
    problems = [_Regression(x[kv], y[kv], held, tuple(config.ridge)) for kv in (0, 1)]
    sources = min(config.sources, source.config.num_layers)
    layers, weights, biases, errors, ridges = [], [], [], [], []
    for layer in range(target.config.num_layers):
        chosen: tuple[int, ...] = ()
        while len(chosen) < sources:
            tried = [tuple(sorted({*chosen, s})) for s in range(source.config.num_layers) if s not in chosen]
            totals = [sum(p.solve(t, layer).error for p in problems) for t in tried]
            chosen = tried[int(np.argmin(totals))]
        solved = [p.solve(chosen, layer) for p in problems]
        layers.append(chosen)
        weights.append(torch.stack([s.weight for s in solved]))
        biases.append(torch.stack([s.bias for s in solved]))
        errors.append([round(s.error, 6) for s in solved])
        ridges.append([s.ridge for s in solved])
    maps = LinearMaps(torch.stack(weights).float().cpu(), torch.stack(biases).float().cpu(), torch.tensor(layers))
    about: dict[str, Any] = {
        "texts": len(texts),
        "tokens": int(y.cu_seqlens[-1]),
        "seed": seed,
        "settings": {k: v for k, v in asdict(config).items() if k in ("sources", "ridge", "validation")},
        "error": errors,  # per receiver layer: of keys, of values
        "ridge": ridges,
    }
    return KVProjection(maps, fingerprint(source), fingerprint(target), about)


def _held_out(y: RecordedKV, texts: int, seed: int) -> torch.Tensor:
    """bool [T]: tokens of the texts that validate."""
    n = len(y.cu_seqlens) - 1
    picked = torch.zeros(n, dtype=torch.bool)
    picked[torch.randperm(n, generator=torch.Generator().manual_seed(seed))[: min(texts, n - 1)]] = True
    return picked.repeat_interleave(y.cu_seqlens.diff()).to(y.keys.device)


class _Regression:
    """Ridge regression of keys (or values) of any receiver layer on those of any source layers, in float64."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor, held: torch.Tensor, ridge: tuple[float, ...]) -> None:
        self.x, self.y, self.held, self.ridge = x, y, held, ridge
        self.inputs = lru_cache(maxsize=64)(self._inputs)
        self.solve = lru_cache(maxsize=4096)(self._solve)

    def _inputs(self, chosen: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
        x = self.x[:, list(chosen)].flatten(1).double()
        mean = x[~self.held].mean(0)
        x = x - mean
        train = x[~self.held]
        values, vectors = torch.linalg.eigh(train.T @ train / len(train))
        return mean, train @ vectors, x[self.held] @ vectors, values.clamp_min(0), vectors

    def _solve(self, chosen: tuple[int, ...], layer: int) -> _Solution:
        mean, train, valid, values, vectors = self.inputs(chosen)
        y = self.y[:, layer].double()
        centre = y[~self.held].mean(0)
        cross = train.T @ (y[~self.held] - centre) / len(train)
        wanted = y[self.held] - centre
        spread = wanted.square().sum().clamp_min(torch.finfo(torch.float64).tiny)
        best: tuple[float, float, torch.Tensor] | None = None
        for ridge in self.ridge:
            w = cross / (values + ridge * values.mean().clamp_min(1e-30))[:, None]
            error = float((valid @ w - wanted).square().sum() / spread)
            if best is None or error < best[0]:
                best = error, ridge, w
        assert best is not None
        weight = (vectors @ best[2]).T
        return _Solution(weight, centre - weight @ mean, best[0], best[1])
