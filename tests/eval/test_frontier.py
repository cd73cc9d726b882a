from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from roro_fast.eval.frontier import Frontier, pareto

SMALL, LARGE = (0.2, 0.5), (1.0, 0.9)


def make(*points: tuple[float, float], small=SMALL, large=LARGE) -> Frontier:
    cost, acc = (np.array([p[i] for p in points]) for i in (0, 1))
    return pareto(cost, acc, *((np.asarray(c), np.asarray(a)) for c, a in (small, large)))


def test_anchors_alone_are_the_coin_toss():
    f = make()
    assert f.mean() == pytest.approx(0.7)
    assert f.at([0.2, 0.6, 1.0]).tolist() == pytest.approx([0.5, 0.7, 0.9])
    assert f.reach(np.array(0.882)) == pytest.approx(0.2 + 0.8 * 0.382 / 0.4)


def test_one_point_by_hand():
    f = make((0.4, 0.8))
    assert f.mean() == pytest.approx((0.2 * 0.65 + 0.6 * 0.85) / 0.8)
    assert f.at(0.7)[0] == pytest.approx(0.85)
    assert f.reach(np.array(0.65)) == pytest.approx(0.3)


def test_a_point_better_than_all_large_keeps_the_curve_flat():
    f = make((0.6, 0.95))
    assert f.mean() == pytest.approx((0.4 * 0.725 + 0.4 * 0.95) / 0.8)
    assert f.at([0.8, 1.0]).tolist() == pytest.approx([0.95, 0.95])


def test_a_poor_router_falls_below_the_coin_toss():
    assert make((0.9, 0.55)).mean() < make().mean()


@pytest.mark.parametrize("useless", [(0.5, 0.79), (0.5, 0.3), (1.2, 0.99), (np.nan, 0.99), (0.3, np.nan)])
def test_dominated_dear_and_undefined_points_change_nothing(useless):
    a, b = make((0.4, 0.8)), make((0.4, 0.8), useless)
    grid = np.linspace(0.2, 1, 17)
    assert a.at(grid) == pytest.approx(b.at(grid))
    assert a.mean() == pytest.approx(b.mean())


def test_a_point_cheaper_than_all_small_counts_at_its_cost():
    f = make((0.1, 0.6))
    assert f.at(0.2)[0] == pytest.approx(0.6)
    assert f.mean() == pytest.approx(0.75)


def test_ends_and_unreachable_levels():
    f = make((0.4, 0.8))
    assert np.isnan(f.at(0.1)[0])
    assert f.at(1.5)[0] == pytest.approx(0.9)
    assert f.reach(np.array(0.2)) == pytest.approx(0.2)
    assert np.isnan(f.reach(np.array(0.91)))
    assert np.isnan(make(small=(1.0, 0.5)).mean())


points = st.lists(st.tuples(st.floats(0.05, 1.1), st.sampled_from([i / 20 for i in range(21)])), max_size=6)


def slow(ps: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Independent construction: keep what no cheaper-or-equal point equals or beats, then walk to the end."""
    ps = [(max(c, SMALL[0]), a) for c, a in ps if c <= LARGE[0]] + [SMALL, LARGE]
    kept = [p for p in ps if p == SMALL or not any((q[0] <= p[0] and q[1] >= p[1]) and q != p for q in ps)]
    chain = sorted(set(kept))
    return [*chain, (LARGE[0], chain[-1][1])]


@given(points)
def test_matches_an_independent_construction(ps):
    f = make(*ps)
    chain = slow(ps)
    grid = np.linspace(0.21, 1.0, 33)
    want = []
    for g in grid:
        (x0, y0), (x1, y1) = [
            (a, b) for a, b in zip(chain, chain[1:], strict=False) if a[0] <= g <= b[0] and (b[0] > a[0] or g == a[0])
        ][-1]
        want.append(y1 if x1 == x0 else y0 + (g - x0) / (x1 - x0) * (y1 - y0))
    assert f.at(grid) == pytest.approx(np.array(want))
    area = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in zip(chain, chain[1:], strict=False))
    assert f.mean() == pytest.approx(area / 0.8)


@given(points, st.randoms())
def test_order_free_monotone_and_inverse(ps, rng):
    f = make(*ps)
    grid = np.linspace(0.2, 1.0, 25)
    y = f.at(grid)
    assert (np.diff(y) >= -1e-12).all()
    assert y[-1] >= LARGE[1] - 1e-12
    assert (np.array([f.reach(v) for v in y]) <= grid + 1e-9).all()
    rng.shuffle(ps)
    assert make(*ps).at(grid) == pytest.approx(y)


def test_a_batch_equals_its_rows():
    rng = np.random.default_rng(0)
    cost, acc = rng.uniform(0.1, 1.1, (4, 3, 5)), rng.uniform(0.3, 1, (4, 3, 5))
    small, large = (np.full((4, 1), 0.2), rng.uniform(0.2, 0.6, (4, 1))), (np.ones((4, 1)), rng.uniform(0.7, 1, (4, 1)))
    f = pareto(cost, acc, small, large)
    target = 0.98 * large[1]
    for i in range(4):
        for j in range(3):
            one = pareto(cost[i, j], acc[i, j], (small[0][i, 0], small[1][i, 0]), (large[0][i, 0], large[1][i, 0]))
            assert f.mean()[i, j] == one.mean()
            assert (f.at([0.3, 0.6])[i, j] == one.at([0.3, 0.6])).all()
            assert f.reach(np.broadcast_to(target, (4, 3)))[i, j] == one.reach(target[i, 0])
