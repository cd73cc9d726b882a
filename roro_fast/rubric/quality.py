"""Process quality of a route, from what the small model's own confidence says about the query (METHOD.md section 4).

    quality = 0.4 * critical-step hit + 0.3 * (1 - switches / (n - 1)) + 0.3 * (1 - waste)

Waste is the share of escalated steps the small model was sure of. Confidence comes from the recorded step statistics of
the query's all-small trajectory. The gold answer plays no part.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from roro_fast.engine.trajectory import Trajectory
from roro_fast.routing.collect import confidences, critical_step

__all__ = ["Formula", "all_small_of", "confidences", "critical_step", "process_quality"]


@dataclass(frozen=True, slots=True)
class Formula:
    """`weights`: critical hit, few switches, no waste. A step is "sure" at `sure` confidence or more. The critical step
    is hit by an escalation at most `window` steps away from it."""

    weights: tuple[float, float, float] = (0.4, 0.3, 0.3)
    sure: float = 0.95
    window: int = 0


def all_small_of(trajectories: Iterable[Trajectory]) -> Trajectory | None:
    """The first trajectory of which model 0 wrote every step."""
    return next((t for t in trajectories if t.steps and not any(t.models)), None)


def process_quality(models: Sequence[int], confidence: Sequence[float], formula: Formula | None = None) -> float:
    """Quality in [0, 1] of a route given as the writer of each step; steps past the all-small trajectory are unsure."""
    f = formula or Formula()
    n = len(models)
    if n == 0 or not confidence:
        return 0.0
    critical = critical_step(confidence)
    escalated = [i for i, m in enumerate(models) if m > 0]
    hit = any(abs(i - critical) <= f.window for i in escalated)
    switches = sum(a != b for a, b in zip(models, models[1:], strict=False))
    sure = sum(i < len(confidence) and confidence[i] >= f.sure for i in escalated)
    waste = sure / len(escalated) if escalated else 0.0
    a, b, c = f.weights
    return a * hit + b * (1 - switches / max(1, n - 1)) + c * (1 - waste)
