"""From budgets to biases."""

from __future__ import annotations

import numpy as np
import pytest

from roro_fast.routing.calibrate import fit_biases

MARGINS = np.random.default_rng(0).normal(0, 2, 4000)


def costs(biases: list[float]) -> list[float]:
    """Cost of routing each decision whose margin exceeds the bias: 0.1 for the small model, 1 for the large one."""
    return [0.1 + 0.9 * float((b < MARGINS).mean()) for b in biases]


def test_the_fitted_bias_meets_the_budget() -> None:
    budgets = [0.15, 0.3, 0.5, 0.8]
    table, sweep = fit_biases(MARGINS, costs, budgets)
    assert [b for b, _ in table] == budgets
    np.testing.assert_allclose(costs([bias for _, bias in table]), budgets, atol=0.02)
    assert [b for b, _ in sweep] == sorted(b for b, _ in sweep)
    assert max(c for _, c in sweep) == 1.0 and min(c for _, c in sweep) == pytest.approx(0.1)


def test_budgets_out_of_reach_get_the_nearest_end() -> None:
    table, sweep = fit_biases(MARGINS, costs, [0.01, 2.0])
    assert costs([table[0][1]])[0] == pytest.approx(0.1) and costs([table[1][1]])[0] == 1.0
    assert sweep[0][0] <= table[1][1] <= table[0][1] <= sweep[-1][0]


def test_a_noisy_sweep_still_gives_rising_budgets_falling_biases() -> None:
    rng = np.random.default_rng(1)

    def noisy(biases: list[float]) -> list[float]:
        return [c + float(rng.normal(0, 0.03)) for c in costs(biases)]

    table, _ = fit_biases(MARGINS, noisy, [0.2, 0.4, 0.6, 0.8])
    biases = [b for _, b in table]
    assert biases == sorted(biases, reverse=True)
