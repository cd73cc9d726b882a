from __future__ import annotations

import math

import numpy as np
import pytest

from roro_fast.eval.bootstrap import Draws, interval


def test_weights_are_resamples_and_the_first_row_is_the_plug_in():
    d = Draws.make(7, 3, 50, seed=1)
    assert d.queries.shape == (51, 7) and d.seeds.shape == (51, 3)
    assert d.queries.sum(1) == pytest.approx(1) and d.seeds.sum(1) == pytest.approx(1)
    assert d.queries[0] == pytest.approx(1 / 7)
    counts = d.queries * 7
    assert counts == pytest.approx(np.round(counts))
    assert len({tuple(r) for r in d.queries.tolist()}) > 40
    again, other = Draws.make(7, 3, 50, seed=1), Draws.make(7, 3, 50, seed=2)
    assert (again.queries == d.queries).all() and (other.queries != d.queries).any()


def test_means_follow_the_weights():
    d = Draws.make(6, 4, 20, seed=0)
    x = np.random.default_rng(0).normal(size=(2, 4, 6))
    means = d.query_means(x)
    assert means.shape == (21, 2, 4)
    assert means[5, 1, 2] == pytest.approx(np.average(x[1, 2], weights=d.queries[5]))
    over = d.seed_means(means)
    assert over[7, 0] == pytest.approx(np.average(means[7, 0], weights=d.seeds[7]))
    assert d.seed_means(means[..., :1]).shape == (21, 2)


def test_a_seed_that_was_not_drawn_does_not_spread_its_nan():
    d = Draws.make(2, 2, 200, seed=0)
    x = np.tile([1.0, math.nan], (201, 1))
    out = d.seed_means(x)
    assert np.isnan(out[0])
    only_first = d.seeds[:, 1] == 0
    assert only_first.any() and (out[only_first] == 1).all() and np.isnan(out[~only_first]).all()


def test_interval_of_known_samples():
    e = interval(np.array([5.0, *np.linspace(0, 100, 1001)]), 0.9, np.array([4.0, 6.0]))
    assert (e.mean, e.per_seed) == (5.0, [4.0, 6.0])
    assert (e.lo, e.hi) == pytest.approx((5.0, 95.0))


def test_no_interval_is_claimed_without_enough_defined_replicates():
    few = np.ones(101)
    few[1:4] = math.nan
    assert math.isnan(interval(few).lo) and interval(few).mean == 1
    few[3] = 1
    assert interval(few).lo == 1
    assert math.isnan(interval(np.array([math.nan, 1, 2])).hi)
    assert math.isnan(interval(np.array([0.5])).lo)


def test_intervals_cover_the_truth_when_queries_and_seeds_both_vary():
    """Crossed effects: an interval over queries alone would cover far less than it claims."""
    rng = np.random.default_rng(0)
    covered = too_narrow = 0
    for trial in range(150):
        luck, hard = rng.normal(0, 0.06, (8, 1)), rng.normal(0, 0.3, (1, 60))
        x = luck + hard + rng.normal(0, 0.1, (8, 60))
        d = Draws.make(60, 8, 300, seed=trial)
        e = interval(d.seed_means(d.query_means(x)))
        covered += e.lo <= 0 <= e.hi
        one = interval(d.query_means(x.mean(0)))
        too_narrow += not one.lo <= 0 <= one.hi
    assert 0.89 <= covered / 150 <= 0.99
    assert too_narrow / 150 > 1 - covered / 150
