"""Reward and advantage of the router, against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from roro_fast.engine import Cost, Trajectory
from roro_fast.errors import ConfigError
from roro_fast.train.rewards import combine, cost_share


def answer(query: str, correct: bool | None, flops: float) -> Trajectory:
    return Trajectory(query, [1], [2], [], [], Cost(generated_flops=flops), "eos", correct=correct)


ANSWERS = [answer("a", True, 5.0), answer("a", False, 1.0), answer("b", None, 8.0)]
LARGE = {"a": 10.0, "b": 8.0}


def test_reward_is_outcome_less_cost_plus_process() -> None:
    r = combine(ANSWERS, LARGE, 0.4, 0.25, np.array([0.5, -1.0, 1.0]))
    np.testing.assert_allclose(r.cost_share, [0.5, 0.1, 1.0])
    np.testing.assert_allclose(r.total, [1 - 0.2 + 0.125, -0.04 - 0.25, -0.4 + 0.25])
    assert r.unscored == 0


def test_a_missing_score_is_the_middle_and_counted() -> None:
    r = combine(ANSWERS, LARGE, 0.0, 0.25, np.array([np.nan, 3.0, -3.0]))
    np.testing.assert_allclose(r.process, [0.0, 1.0, -1.0])
    assert r.unscored == 1


@pytest.mark.parametrize("beta", [-0.1, 0.5, 0.9])
def test_beta_is_bounded_so_that_process_never_outweighs_outcome(beta: float) -> None:
    with pytest.raises(ConfigError, match=r"router\.beta"):
        combine(ANSWERS, LARGE, 0.0, beta, np.zeros(3))


def test_within_the_bound_a_right_answer_always_beats_a_wrong_one_of_equal_cost() -> None:
    pair = [answer("a", True, 5.0), answer("a", False, 5.0)]
    r = combine(pair, LARGE, 0.3, 0.499, np.array([-1.0, 1.0]))
    assert r.total[0] > r.total[1]


def test_cost_share_is_relative_to_the_query() -> None:
    assert cost_share(ANSWERS, LARGE).tolist() == [0.5, 0.1, 1.0]
