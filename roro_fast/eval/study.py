"""The committed study: what `bench/results/nano_study.json` holds and how it is made from operating points.

Schema (NaN is null; an estimate is {"mean", "lo", "hi", "per_seed": [one value per seed]}):

    {"meta":   {"versions": {...}, "git": str, "command": str, "seeds": [int], "n_queries": int, "task": str,
                "split": str, "resamples": int, "level": float, "small": arm, "large": arm, ...},
     "arms":   {arm: {metric: estimate}},                      # metrics of `catalogue.METRICS`; anchors: {}
     "points": {arm: [{"knob": float, value: estimate, ...}]},  # values of `catalogue.POINT_VALUES`
     "differences": {reference arm: {arm: {metric: estimate}}}} # arm minus reference, paired by query and seed
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from roro_fast.eval.catalogue import METRICS
from roro_fast.eval.metrics import EvalSummary, Evaluation
from roro_fast.eval.plain import to_plain
from roro_fast.eval.records import PointResult

REFERENCES = ("outcome_only", "roro")


def build_study(
    points: Sequence[PointResult],
    *,
    meta: Mapping[str, Any],
    task: str = "ledger",
    split: str = "test",
    references: Sequence[str] = REFERENCES,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Evaluate `points` and arrange the result in the study schema; `meta` adds git, command, versions, ...

    The result is JSON-ready; write it with `files.write_json`.
    """
    evaluation = Evaluation(points, resamples=resamples, seed=seed)
    return study_of(evaluation.summary(against=references, task=task, split=split), meta)


def study_of(e: EvalSummary, meta: Mapping[str, Any]) -> dict[str, Any]:
    """The study document of an evaluation that is already made."""
    differences: dict[str, dict[str, dict[str, Any]]] = {}
    for d in e.differences:
        differences.setdefault(d.b, {}).setdefault(d.a, {})[d.metric] = to_plain(d.estimate)
    facts = {k: getattr(e, k) for k in ("seeds", "n_queries", "task", "split", "resamples", "level", "small", "large")}
    return {
        "meta": {**meta, **facts},
        "arms": {a.name: {m: to_plain(a.metrics[m]) for m in METRICS if m in a.metrics} for a in e.arms},
        "points": {a.name: [{"knob": p.knob, **to_plain(p.values)} for p in a.points] for a in e.arms},
        "differences": differences,
    }
