"""Every metric of a set of operating points, with paired bootstrap intervals (definitions: `catalogue`, `frontier`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import mean

import numpy as np

from roro_fast.errors import DataError
from roro_fast.eval import catalogue
from roro_fast.eval.bootstrap import Draws, Estimate, interval
from roro_fast.eval.catalogue import KEEP, TARGET_SHARE, Arm
from roro_fast.eval.frontier import Frontier, _ratio, pareto
from roro_fast.eval.records import ARRAYS, PointResult

AXES = ("generated", "total", "large_share")
GRID = 33


@dataclass(slots=True)
class Band:
    """Frontier of one arm against cost shares `x`, averaged over seeds, with its pointwise interval."""

    x: list[float]
    mean: list[float]
    lo: list[float]
    hi: list[float]


@dataclass(slots=True)
class PointSummary:
    """One operating point, averaged over seeds; keys of `values` are those of `catalogue.POINT_VALUES`."""

    knob: float
    values: dict[str, Estimate]


@dataclass(slots=True)
class ArmSummary:
    """All that is reported of one arm. `metrics` is empty for the two anchors: they are points, not routers."""

    name: str
    label: str
    kind: str
    points: list[PointSummary]
    metrics: dict[str, Estimate] = field(default_factory=dict)
    bands: dict[str, Band] = field(default_factory=dict)


@dataclass(slots=True)
class Difference:
    """Arm `a` minus arm `b` in `metric`, paired by query and seed."""

    a: str
    b: str
    metric: str
    estimate: Estimate


@dataclass(slots=True)
class EvalSummary:
    """The JSON-ready outcome of an evaluation."""

    arms: list[ArmSummary]
    differences: list[Difference]
    n_queries: int
    seeds: list[int]
    small: str
    large: str
    resamples: int
    level: float = 0.95
    task: str = ""
    split: str = ""

    def arm(self, name: str) -> ArmSummary | None:
        """The arm of that name, None when it was not evaluated."""
        return next((a for a in self.arms if a.name == name), None)

    def difference(self, a: str, b: str, metric: str) -> Estimate | None:
        """Stored difference `a` minus `b` (also when it was stored the other way round), None when it was not made."""
        for d in self.differences:
            if (d.a, d.b, d.metric) == (a, b, metric):
                return d.estimate
            if (d.b, d.a, d.metric) == (a, b, metric):
                x = d.estimate
                return Estimate(-x.mean, -x.hi, -x.lo, [-v for v in x.per_seed])
        return None


@dataclass(slots=True)
class _Measured:
    """Replicate means of one arm: quantity -> [B + 1, P, S_arm]."""

    knobs: list[float]
    means: dict[str, np.ndarray]


class Evaluation:
    """Replicates of every metric of every arm; `summary` boils them down.

    `points` holds, for each arm, as many knobs for every seed. Knobs may differ between seeds (the biases of trained
    routers do); they are matched by rank for the table of points, each frontier is drawn from one seed's points alone.
    An arm with one seed is taken as deterministic and stands for every seed. `small` and `large` name the two anchor
    arms, each of one operating point. Raises DataError when the points do not fit together.
    """

    def __init__(
        self,
        points: Sequence[PointResult],
        *,
        small: str = "all_small",
        large: str = "all_large",
        resamples: int = 2000,
        seed: int = 0,
        level: float = 0.95,
        arms: Mapping[str, Arm] | None = None,
    ) -> None:
        grouped = _group(points)
        for name in (small, large):
            if name not in grouped:
                raise DataError(f"anchor arm {name!r} is missing from the operating points; got {', '.join(grouped)}")
            if len({p.knob for p in grouped[name]}) != 1:
                raise DataError(f"anchor arm {name!r} must have exactly one operating point")
        self.small, self.large, self.level = small, large, level
        self.query_ids = grouped[large][0].query_ids
        many = [ps for ps in grouped.values() if len({p.seed for p in ps}) > 1]
        self.seeds = sorted({p.seed for ps in many for p in ps}) or [points[0].seed]
        self.draws = Draws.make(len(self.query_ids), len(self.seeds), resamples, seed)
        self.info = {name: (arms or {}).get(name, catalogue.arm(name)) for name in grouped}
        self._measured = {name: _measure(ps, self.query_ids, self.seeds, self.draws) for name, ps in grouped.items()}
        self._point = {name: self._point_values(m) for name, m in self._measured.items()}
        self._frontier = {
            (name, axis): self._make_frontier(name, axis)
            for name in grouped
            if name not in (small, large)
            for axis in AXES
        }
        self._metric = {name: self._arm_metrics(name) for name, axis in self._frontier if axis == AXES[0]}

    def estimate(self, arm: str, metric: str) -> Estimate:
        """Frontier metric of one arm."""
        values = self._values(arm, metric)
        return interval(self.draws.seed_means(values), self.level, values[0])

    def difference(self, a: str, b: str, metric: str) -> Estimate:
        """`a` minus `b` in a frontier metric: replicate by replicate, seed by seed."""
        values = self._values(a, metric) - self._values(b, metric)
        return interval(self.draws.seed_means(values), self.level, values[0])

    def summary(self, against: Sequence[str] = (), task: str = "", split: str = "") -> EvalSummary:
        """Everything in plain form; differences of every arm against each arm of `against` that was evaluated."""
        pairs = [(a, b) for b in against if b in self._metric for a in self._metric if a != b]
        return EvalSummary(
            arms=[self._arm_summary(name) for name in self._measured],
            differences=[Difference(a, b, m, self.difference(a, b, m)) for a, b in pairs for m in catalogue.METRICS],
            n_queries=len(self.query_ids),
            seeds=list(self.seeds),
            small=self.small,
            large=self.large,
            resamples=len(self.draws.seeds) - 1,
            level=self.level,
            task=task,
            split=split,
        )

    def _values(self, arm: str, metric: str) -> np.ndarray:
        try:
            return self._metric[arm][metric]
        except KeyError as e:
            raise DataError(f"no metric {metric!r} for arm {arm!r}; arms: {', '.join(self._metric)}") from e

    def _share(self, m: _Measured, axis: str) -> np.ndarray:
        """[B + 1, P, S] cost of each point as a share of all-large on the same queries."""
        top = self._measured[self.large].means
        if axis == "large_share":
            return _ratio(m.means["large_tokens"], top["large_tokens"])
        return _ratio(m.means[f"{axis}_flops"], top[f"{axis}_flops"])

    def _anchor(self, name: str, axis: str) -> tuple[np.ndarray, np.ndarray]:
        m = self._measured[name]
        return self._share(m, axis)[:, 0], m.means["correct"][:, 0]

    def _make_frontier(self, name: str, axis: str) -> Frontier:
        m = self._measured[name]
        cost, acc = np.broadcast_arrays(self._share(m, axis), m.means["correct"])
        return pareto(
            cost.swapaxes(1, 2), acc.swapaxes(1, 2), self._anchor(self.small, axis), self._anchor(self.large, axis)
        )

    def _arm_metrics(self, name: str) -> dict[str, np.ndarray]:
        """metric -> [B + 1, S]."""
        out: dict[str, np.ndarray] = {}
        base, top = self._anchor(self.small, "generated")[1], self._anchor(self.large, "generated")[1]
        gap = top - base
        for axis, tail in (("generated", ""), ("total", "_total")):
            f = self._frontier[name, axis]
            out[f"area{tail}"] = _ratio(f.mean() - base, gap)
            out[f"acc_at_60{tail}"] = f.at(TARGET_SHARE)[..., 0]
            out[f"flops_at_98{tail}"] = f.reach(KEEP * top)
        out["a_per_f"] = out["acc_at_60"] / TARGET_SHARE
        out["pgr"] = _ratio(out["acc_at_60"] - base, gap)
        straight = _ratio(
            TARGET_SHARE - self._anchor(self.small, "generated")[0], 1 - self._anchor(self.small, "generated")[0]
        )
        out["dibc"] = _ratio(out["pgr"], straight) - 1
        by_tokens = self._frontier[name, "large_share"]
        for percent in (50, 80, 95):
            out[f"cpt{percent}"] = np.where(gap > 0, by_tokens.reach(base + percent / 100 * gap), np.nan)
        return out

    def _point_values(self, m: _Measured) -> dict[str, np.ndarray]:
        """value -> [B + 1, P, S]."""
        mean = m.means
        low, high = self._measured[self.small], self._measured[self.large]
        share, base_share = self._share(m, "generated"), self._share(low, "generated")
        gap = high.means["correct"] - low.means["correct"]
        pgr = _ratio(mean["correct"] - low.means["correct"], gap)
        return {
            "accuracy": mean["correct"],
            "generated": share,
            "total": self._share(m, "total"),
            "large_share": self._share(m, "large_share"),
            "a_per_f": _ratio(mean["correct"], share),
            "pgr": pgr,
            "dibc": _ratio(pgr, _ratio(share - base_share, 1 - base_share)) - 1,
            "seconds": mean["seconds"],
            "tokens": mean["tokens"] + mean["discarded"],
            "discarded": mean["discarded"],
            "price": 1000 * mean["price"],
            "decision_us": 1e6 * _ratio(mean["routing_seconds"], mean["decisions"]),
        }

    def _arm_summary(self, name: str) -> ArmSummary:
        m, info = self._measured[name], self.info[name]
        points = []
        for i, knob in enumerate(m.knobs):
            rows = {k: v[:, i] for k, v in self._point[name].items()}
            values = {k: interval(self.draws.seed_means(v), self.level, v[0]) for k, v in rows.items()}
            points.append(PointSummary(knob, values))
        out = ArmSummary(name, info.label, info.kind, points)
        if name in self._metric:
            out.metrics = {k: self.estimate(name, k) for k in catalogue.METRICS}
            out.bands = {axis: self._band(name, axis) for axis in ("generated", "total")}
        return out

    def _band(self, name: str, axis: str) -> Band:
        start = float(self._anchor(self.small, axis)[0][0].mean())
        vertices = np.clip(self._share(self._measured[name], axis)[0].mean(-1), start, 1.0)
        grid = np.unique(np.concatenate([np.linspace(start, 1.0, GRID), vertices]))
        f = self._frontier[name, axis]
        # resampled all-small costs differ a little from the plug-in one, where the grid starts
        y = f.at(grid)
        y = np.where(np.isnan(y), f.y[..., :1], y).swapaxes(1, 2)
        curve = self.draws.seed_means(y)
        lo, hi = np.quantile(curve[1:], [(1 - self.level) / 2, (1 + self.level) / 2], axis=0)
        return Band(grid.tolist(), curve[0].tolist(), lo.tolist(), hi.tolist())


def _group(points: Sequence[PointResult]) -> dict[str, list[PointResult]]:
    if not points:
        raise DataError("no operating points to evaluate")
    out: dict[str, list[PointResult]] = {}
    for p in points:
        out.setdefault(p.arm, []).append(p)
    return out


def _measure(points: Sequence[PointResult], query_ids: Sequence[str], seeds: Sequence[int], draws: Draws) -> _Measured:
    arm = points[0].arm
    own = sorted({p.seed for p in points})
    columns = own if len(own) == 1 else list(seeds)
    by_seed = {s: sorted((p.aligned(query_ids) for p in points if p.seed == s), key=lambda p: p.knob) for s in columns}
    sizes = {s: len(ps) for s, ps in by_seed.items()}
    if len(set(sizes.values())) != 1:
        raise DataError(
            f"arm {arm!r}: operating points per seed differ, {sizes}; evaluate every seed at as many settings"
        )
    if any(a.knob == b.knob for ps in by_seed.values() for a, b in pairwise(ps)):
        raise DataError(f"arm {arm!r}: two results for the same knob and seed")
    table = list(zip(*by_seed.values(), strict=True))
    means = {n: draws.query_means(np.stack([[getattr(p, n) for p in row] for row in table])) for n in ARRAYS}
    # statistics.mean, unlike a float sum, gives back a knob that all seeds share
    return _Measured([mean([p.knob for p in row]) for row in table], means)
