"""What one operating point of one arm did on every query: the raw material of all metrics."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from roro_fast.engine.trajectory import Trajectory
from roro_fast.errors import DataError

ARRAYS = (
    "correct",
    "generated_flops",
    "total_flops",
    "seconds",
    "large_tokens",
    "tokens",
    "discarded",
    "decisions",
    "routing_seconds",
    "price",
)
MAY_LACK = ("routing_seconds", "price")  # NaN where nobody measured it


@dataclass(frozen=True, slots=True, eq=False)
class PointResult:
    """One operating point: an arm at setting `knob` (threshold, budget, probability), trained or sampled with `seed`.

    Every array is float64 [Q], aligned with `query_ids`; several samples of one query are averaged.

    correct: share of samples judged correct, in [0, 1].
    generated_flops, total_flops, seconds: the three costs of `engine.trajectory.Cost`, per answer.
    large_tokens: kept tokens written by any model but the smallest; tokens: all kept tokens.
    discarded: drafted and thrown away tokens; decisions: routing decisions taken.
    routing_seconds: time spent deciding, summed over the answer; NaN where a record lacks it.
    price: by the run's price table; NaN without one.
    """

    arm: str
    knob: float
    seed: int
    query_ids: tuple[str, ...]
    correct: np.ndarray
    generated_flops: np.ndarray
    total_flops: np.ndarray
    seconds: np.ndarray
    large_tokens: np.ndarray
    tokens: np.ndarray
    discarded: np.ndarray
    decisions: np.ndarray
    routing_seconds: np.ndarray
    price: np.ndarray | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "query_ids", tuple(self.query_ids))
        if not self.query_ids:
            raise DataError(f"{self.where}: no queries; evaluate at least one")
        if len(set(self.query_ids)) != len(self.query_ids):
            raise DataError(f"{self.where}: query_ids repeats an id; average the samples of a query first")
        if self.price is None:
            object.__setattr__(self, "price", np.full(len(self.query_ids), np.nan))
        for name in ARRAYS:
            value = np.ascontiguousarray(getattr(self, name), dtype=np.float64)
            if value.shape != (len(self.query_ids),):
                raise DataError(f"{self.where}: {name} has shape {value.shape}, expected ({len(self.query_ids)},)")
            if name not in MAY_LACK and not (np.isfinite(value).all() and (value >= 0).all()):
                raise DataError(f"{self.where}: {name} must be finite and not negative")
            object.__setattr__(self, name, value)
        if (self.correct > 1).any():
            raise DataError(f"{self.where}: correct must lie in [0, 1]")

    @property
    def where(self) -> str:
        """How messages name this point."""
        return f"arm {self.arm!r}, knob {self.knob:g}, seed {self.seed}"

    @classmethod
    def from_trajectories(
        cls,
        trajectories: Iterable[Trajectory],
        *,
        arm: str,
        knob: float = 0.0,
        seed: int = 0,
        query_ids: Sequence[str] | None = None,
    ) -> PointResult:
        """Collect verified trajectories; samples of one query are averaged.

        `query_ids` fixes the order and the set: an answer that is missing, or that nobody asked for, raises DataError.
        """
        rows: dict[str, list[list[float]]] = {}
        for t in trajectories:
            if t.correct is None:
                raise DataError(
                    f"trajectory of query {t.query_id!r} (arm {arm!r}) is not verified; call Task.verify first"
                )
            rows.setdefault(t.query_id, []).append(_row(t))
        ids = list(rows) if query_ids is None else list(query_ids)
        missing, extra = [q for q in ids if q not in rows], sorted(set(rows) - set(ids))
        if missing or extra:
            raise DataError(
                f"arm {arm!r}, knob {knob:g}: missing answers for {missing[:3]}, unexpected ones for {extra[:3]}"
            )
        table = np.array([np.mean(rows[q], axis=0) for q in ids]).reshape(len(ids), len(ARRAYS))
        return cls(arm, float(knob), int(seed), tuple(ids), **dict(zip(ARRAYS, table.T, strict=True)))

    def aligned(self, query_ids: Sequence[str]) -> PointResult:
        """The same point with its queries in the given order; DataError unless the sets are equal."""
        if tuple(query_ids) == self.query_ids:
            return self
        at = {q: i for i, q in enumerate(self.query_ids)}
        if set(at) != set(query_ids):
            odd = sorted(set(at) ^ set(query_ids))[:3]
            raise DataError(f"{self.where}: evaluated on other queries than the rest (differs in {odd})")
        order = [at[q] for q in query_ids]
        return PointResult(
            self.arm, self.knob, self.seed, tuple(query_ids), **{n: getattr(self, n)[order] for n in ARRAYS}
        )


def best_of(small: PointResult, large: PointResult, arm: str) -> PointResult:
    """An oracle that sends whole queries: the small model's answer unless only the large one's is right."""
    large = large.aligned(small.query_ids)
    ask = large.correct > small.correct
    rows = {n: np.where(ask, getattr(large, n), getattr(small, n)) for n in ARRAYS}
    return PointResult(arm, 0.0, small.seed, small.query_ids, **rows)


def _row(t: Trajectory) -> list[float]:
    written = t.cost.generated_tokens or _tokens_by_model(t)
    return [
        float(bool(t.correct)),
        t.cost.generated_flops,
        t.cost.total_flops,
        t.cost.seconds,
        float(sum(written[1:])),
        float(sum(written)),
        float(t.cost.discarded_tokens),
        float(len(t.decisions)),
        t.cost.routing_seconds,
        math.nan if t.cost.price is None else t.cost.price,
    ]


def _tokens_by_model(t: Trajectory) -> list[int]:
    counts = [0] * (max(t.models, default=0) + 1)
    for s in t.steps:
        counts[s.model] += s.end - s.start
    return counts


def save_points(path: str | Path, points: Sequence[PointResult]) -> None:
    """Write points to one safetensors file (arrays) with their names in its header; atomic."""
    path = Path(path)
    header = [{"arm": p.arm, "knob": p.knob, "seed": p.seed, "query_ids": p.query_ids} for p in points]
    tensors = {f"{i}": np.stack([getattr(p, n) for n in ARRAYS]) for i, p in enumerate(points)}
    part = path.with_name(path.name + ".part")
    save_file(tensors, part, metadata={"arrays": json.dumps(ARRAYS), "points": json.dumps(header)})
    part.replace(path)


def load_points(path: str | Path) -> list[PointResult]:
    """Read what `save_points` wrote; DataError names the file when it is absent, damaged or of another layout."""
    try:
        with safe_open(str(path), framework="numpy") as f:
            meta = f.metadata() or {}
            arrays = json.loads(meta.get("arrays", "null"))
            if arrays not in (list(ARRAYS), list(ARRAYS[:-1])):  # files without prices are as good
                raise DataError(f"{path}: not a file of operating points written by this version; evaluate again")
            header = json.loads(meta["points"])
            return [
                PointResult(
                    h["arm"], h["knob"], h["seed"], tuple(h["query_ids"]), **dict(zip(arrays, table, strict=True))
                )
                for h, table in ((h, f.get_tensor(f"{i}")) for i, h in enumerate(header))
            ]
    except (OSError, SafetensorError, json.JSONDecodeError, KeyError) as e:
        raise DataError(f"{path}: cannot read operating points ({e}); evaluate again") from e
