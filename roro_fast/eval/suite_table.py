"""A measured suite as a JSON document and as a Markdown table, with bootstrap intervals over the queries."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from roro_fast.errors import DataError
from roro_fast.eval.bootstrap import Draws, interval
from roro_fast.eval.catalogue import arm, write
from roro_fast.eval.plain import to_plain
from roro_fast.eval.records import PointResult

MACRO = "macro average"
LEVEL = 0.95
# value -> (column, unit); per answer unless the column says otherwise
COLUMNS = {
    "accuracy": ("accuracy", "share"),
    "generated": ("generated FLOPs of all-large", "share"),
    "total_flops": ("total FLOPs / answer", "flops"),
    "seconds": ("s / answer", "ratio"),
    "wall_seconds": ("wall s", "ratio"),
    "price": ("price / 1000 answers", "ratio"),
    "discarded": ("discarded tokens / answer", "ratio"),
    "tokens": ("tokens / answer", "ratio"),
}


class Measured(NamedTuple):
    """An operating point on one benchmark, and the seconds its answers took together."""

    point: PointResult
    wall_seconds: float


def document(
    suite: str,
    measured: Mapping[str, Sequence[Measured]],
    missing: Mapping[str, str],
    *,
    resamples: int,
    seed: int = 0,
) -> dict[str, Any]:
    """JSON-ready result; an estimate is {"mean", "lo", "hi", "per_seed"}, null where undefined.

        {"suite", "level", "resamples", "missing": {benchmark: reason}, "queries": {benchmark: n},
         "points": [{"arm", "label", "knob", "benchmarks": {benchmark: values}, "macro": values}]}

    Benchmarks are resampled apart; the macro average is the mean of theirs within a replicate, wall seconds their sum.
    """
    replicates = {
        name: _replicates(points, Draws.make(len(points[0].point.query_ids), 1, resamples, seed + i))
        for i, (name, points) in enumerate(measured.items())
    }
    first: Sequence[Measured] = next(iter(measured.values()), ())
    rows = []
    for i, m in enumerate(first):
        own = {name: found[i] for name, found in replicates.items()}
        macro = {
            key: (np.sum if key == "wall_seconds" else np.mean)([v[key] for v in own.values()], axis=0)
            for key in COLUMNS
        }
        rows.append(
            {
                "arm": m.point.arm,
                "label": arm(m.point.arm).label,
                "knob": m.point.knob,
                "benchmarks": {name: _estimates(values) for name, values in own.items()},
                "macro": _estimates(macro),
            }
        )
    return {
        "suite": suite,
        "level": LEVEL,
        "resamples": resamples,
        "missing": dict(missing),
        "queries": {name: len(points[0].point.query_ids) for name, points in measured.items()},
        "points": rows,
    }


def _replicates(points: Sequence[Measured], draws: Draws) -> list[dict[str, np.ndarray]]:
    """Per point: value -> [B + 1], all points under the same draws."""
    large = next((m.point for m in points if m.point.arm == "all_large"), None)
    if large is None:
        raise DataError("suite.arms: all_large was not measured; add it")
    out = []
    for point, wall in points:
        p = point.aligned(large.query_ids)
        out.append(
            {
                "accuracy": draws.query_means(p.correct),
                "generated": draws.query_means(p.generated_flops) / draws.query_means(large.generated_flops),
                "total_flops": draws.query_means(p.total_flops),
                "seconds": draws.query_means(p.seconds),
                "wall_seconds": np.full(len(draws.queries), wall),
                "price": 1000 * draws.query_means(p.price),  # type: ignore[arg-type]
                "discarded": draws.query_means(p.discarded),
                "tokens": draws.query_means(p.tokens + p.discarded),
            }
        )
    return out


def _estimates(values: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return {key: to_plain(interval(v, LEVEL)) for key, v in values.items()}


def markdown(result: Mapping[str, Any]) -> str:
    """The whole result as one table, the macro average first, and what went missing below it."""
    keys = [
        k for k in COLUMNS if k != "price" or any(p["macro"]["price"]["mean"] is not None for p in result["points"])
    ]
    heads = ["benchmark", "arm", "setting", *(COLUMNS[k][0] for k in keys)]
    lines = [f"# Suite {result['suite']}", "", _row(heads), _row(["---"] * 2 + ["--:"] * (len(heads) - 2))]
    for name in (MACRO, *result["queries"]):
        for p in result["points"]:
            values = p["macro"] if name == MACRO else p["benchmarks"][name]
            where = name if name == MACRO else f"{name} ({result['queries'][name]})"
            setting = "" if p["arm"] in ("all_small", "all_large", "oracle_query") else f"{p['knob']:g}"
            lines.append(_row([where, p["label"], setting, *(cell(values[k], COLUMNS[k][1]) for k in keys)]))
    share = f"{100 * result['level']:.0f} %"
    notes = [f"In brackets {share} bootstrap intervals over queries; in round brackets the queries of a benchmark."]
    if result["points"] and result["queries"]:
        notes.append(f"The macro average weighs {', '.join(result['queries'])} equally; wall seconds are summed.")
    notes += [f"Missing: **{name}** ({reason})" for name, reason in result["missing"].items()]
    return "\n".join([*lines, "", *(f"{n}\n" for n in notes)])


def cell(estimate: Mapping[str, Any], unit: str) -> str:
    """An estimate with its interval where it has a width."""
    mean, lo, hi = estimate["mean"], estimate["lo"], estimate["hi"]
    if mean is None:
        return "–"
    text = _number(mean, unit)
    return text if lo is None or hi is None or lo == hi else f"{text} [{_number(lo, unit)}, {_number(hi, unit)}]"


def _number(value: float, unit: str) -> str:
    return f"{value:.3g}" if unit == "flops" else write(value if math.isfinite(value) else math.nan, unit)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
