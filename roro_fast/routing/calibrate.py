"""From a requested budget to a decision threshold: one router serves every point of the frontier."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np


def fit_biases(
    margins: np.ndarray, cost_at: Callable[[float], float], budgets: Sequence[float], points: int = 9
) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """Biases of model 0 that make the mean cost share meet each budget on calibration queries.

    margins [D]: logit of the costlier models minus logit of model 0, over the decisions of an unbiased run; their
    quantiles are the thresholds worth trying. `cost_at(bias)` really rolls out and returns the mean cost share.
    Returns (calibration, sweep): [(budget, bias)] and the measured [(bias, cost share)], cheapest bias last.
    A budget outside what the router can reach gets the nearest end of the sweep.
    """
    spread = float(margins.std()) + 1e-3
    inner = np.quantile(margins, np.linspace(0.02, 0.98, points))
    biases = np.unique(np.concatenate(([inner[0] - spread], inner, [inner[-1] + spread])))
    costs = np.array([cost_at(float(b)) for b in biases])
    falling = np.minimum.accumulate(costs)  # a higher bias never costs more, but for sampling noise
    table = [(float(b), float(np.interp(b, falling[::-1], biases[::-1]))) for b in budgets]
    return table, list(zip(biases.tolist(), costs.tolist(), strict=True))
