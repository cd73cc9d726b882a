"""From a requested budget to a decision threshold: one router serves every point of the frontier."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

SHARES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def fit_biases(
    margins: np.ndarray, costs_at: Callable[[list[float]], list[float]], budgets: Sequence[float]
) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """Biases of model 0 that make the mean cost share meet each budget on calibration queries.

    margins [D]: logit of the costlier models minus logit of model 0, over the decisions of an unbiased run; their
    quantiles at SHARES of large decisions are the thresholds worth trying. `costs_at(biases)` really rolls out and
    returns the mean cost share at each.
    Returns (calibration, sweep): [(budget, bias)] and the measured [(bias, cost share)], cheapest bias last.
    A budget outside what the router can reach gets the nearest end of the sweep.
    """
    spread = float(margins.std()) + 1e-3
    inner = np.quantile(margins, [1 - s for s in reversed(SHARES)])
    biases = np.unique(np.concatenate(([margins.min() - spread], inner, [margins.max() + spread])))
    costs = np.array(costs_at(biases.tolist()))
    falling = np.minimum.accumulate(costs)  # a higher bias never costs more, but for sampling noise
    table = [(float(b), float(np.interp(b, falling[::-1], biases[::-1]))) for b in budgets]
    return table, list(zip(biases.tolist(), costs.tolist(), strict=True))
