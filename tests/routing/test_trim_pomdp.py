"""TRIM-POMDP: belief, value table and decision against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from roro_fast.routing.trim_pomdp import StepModel, TrimPOMDP, fit_model, states_of
from tests.routing.batches import Written, traced

SMALL = np.array([[0.2, 0.8], [0.7, 0.3], [0.5, 0.5]])
LARGE = np.array([[0.1, 0.9], [0.9, 0.1], [0.5, 0.5]])
MODEL = StepModel(np.array([0.5]), SMALL, LARGE, 0.9, 0.95, np.array([0.0, 1.0]), 1.0, 0.0, 0.1)


def test_beliefs_follow_bayes() -> None:
    policy = TrimPOMDP(Written(), MODEL)
    np.testing.assert_allclose(policy.belief([0.3], []), [0.18 / 0.25, 0.07 / 0.25, 0])
    # a kept low step, then a high draft: (0.72 * 0.9 * 0.8, 0.72 * 0.1 * 0.3, 0.28 * 0.5) = (0.5184, 0.0216, 0.14)
    np.testing.assert_allclose(policy.belief([0.3, 0.6], [0]), np.array([0.5184, 0.0216, 0.14]) / 0.68)
    # the same first step written by the large model: u = 0.95 * 0.1 / (0.95 * 0.1 + 0.05 * 0.9) = 0.095 / 0.14
    u = 0.095 / 0.14
    joint = np.array([u * 0.9 * 0.8, u * 0.1 * 0.3, (1 - u) * 0.5])
    np.testing.assert_allclose(policy.belief([0.3, 0.6], [1]), joint / joint.sum())


def test_values_by_backward_induction() -> None:
    w = TrimPOMDP(Written(), MODEL, lambda_cost=1.0).go_on
    # last step, u = 1: low max(0.18, 0.25 * 0.95 - 0.1 * 0.25), high max(0.72, 0.75 * 0.95 - 0.1 * 0.75)
    assert w[1, -1] == pytest.approx(0.2125 + 0.72)
    # u = 0.72 (grid point 144 of 200): low max(0.1296, 0.18 * 0.95 - 0.1 * 0.32), high max(0.5184, 0.445)
    assert w[1, 144] == pytest.approx(0.139 + 0.5184)
    # first step, u = 1: low (0.25) rewritten for W_1(0.95) - 0.1, high (0.75) kept for W_1(0.96)
    assert w[0, -1] == pytest.approx(0.25 * (w[1, 190] - 0.1) + 0.75 * w[1, 192])


def test_a_rewrite_is_worth_its_price_or_not() -> None:
    low, high = traced("0.3"), traced("0.6")
    cheap, dear = (TrimPOMDP(Written(), MODEL, x) for x in (1.0, 3.0))
    assert cheap.decide(low).actions.tolist() == [1], "W_1(0.95) - 0.1 = 0.783 beats W_1(0.72) = 0.657"
    assert dear.decide(low).actions.tolist() == [0], "0.855 - 0.3 does not beat 0.648"
    assert cheap.decide(high).actions.tolist() == [0]
    assert cheap.decide(traced("0.3|0.3", actions=[[1]])).actions.tolist() == [1]
    lost = StepModel(np.array([0.5]), SMALL, LARGE, 0.1, 0.95, np.array([0.0, 1.0]), 1.0, 0.0, 0.1)
    kept = traced("0.3|0.3", actions=[[0]])
    assert TrimPOMDP(Written(), lost, 1.0).decide(kept).actions.tolist() == [0], "nothing is left to save"


def test_states_name_the_first_wrong_step() -> None:
    assert states_of([True, True]) == [0, 0]
    assert states_of([True, False, True, False]) == [0, 1, 2, 2]


def test_fitting_counts() -> None:
    small = [([0.9, 0.1, 0.2], [True, False, True], False), ([0.8, 0.7], [True, True], True)]
    large = [([0.9, 0.9], [True, True], True), ([0.8, 0.9, 0.7], [True, True, True], True)]
    m = fit_model(small, large, bins=2)
    np.testing.assert_allclose(m.edges, [0.7])
    # state 0 by small: 0.9 | 0.8, 0.7 in the upper bin, one count more in each
    np.testing.assert_allclose(m.small, [[1 / 5, 4 / 5], [2 / 3, 1 / 3], [2 / 3, 1 / 3]])
    np.testing.assert_allclose(m.large[0], [1 / 7, 6 / 7])
    assert m.p == pytest.approx((3 + 1) / (4 + 2)) and m.q == pytest.approx((5 + 1) / (5 + 2))
    np.testing.assert_allclose(m.last, [0, 1 / 2, 1])
    assert m.right == pytest.approx(4 / 5) and m.wrong == pytest.approx(1 / 3) and m.cost == pytest.approx(1 / 2.5)
