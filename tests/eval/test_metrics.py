from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from roro_fast.errors import DataError
from roro_fast.eval import metrics as module
from roro_fast.eval.catalogue import METRICS, POINT_VALUES
from roro_fast.eval.metrics import EvalSummary, Evaluation
from roro_fast.eval.plain import from_plain, to_plain
from tests.eval.samples import anchors, noisy_arm, point, study

N = 20


def right(share: float, n: int = N) -> np.ndarray:
    return np.arange(n) / n < share


def test_every_metric_by_hand():
    """Anchors (0.1, 50 %) and (1, 90 %); one router point: 80 % right at 0.37 of the FLOPs, 0.3 of the large tokens."""
    e = Evaluation([*anchors(N), point("roro", right(0.8), 0.37, knob=0.3)], resamples=10)
    got = {m: e.estimate("roro", m).mean for m in METRICS}
    area = (0.27 * 0.65 + 0.63 * 0.85) / 0.9
    acc60 = 0.8 + 0.1 * 0.23 / 0.63
    flops98 = 0.37 + 0.63 * (0.882 - 0.8) / 0.1
    pgr = (acc60 - 0.5) / 0.4
    assert got["area"] == pytest.approx((area - 0.5) / 0.4)
    assert got["acc_at_60"] == pytest.approx(acc60)
    assert got["flops_at_98"] == pytest.approx(flops98)
    assert got["a_per_f"] == pytest.approx(acc60 / 0.6)
    assert got["pgr"] == pytest.approx(pgr)
    slope, base = (acc60 - 0.5) / (0.6 - 0.1), (0.9 - 0.5) / (1 - 0.1)
    assert got["dibc"] == pytest.approx((slope - base) / base)
    # large-token axis: (0, 50 %), (0.3, 80 %), (1, 90 %)
    assert got["cpt50"] == pytest.approx(0.3 * (0.7 - 0.5) / 0.3)
    assert got["cpt80"] == pytest.approx(0.3 + 0.7 * (0.82 - 0.8) / 0.1)
    assert got["cpt95"] == pytest.approx(0.3 + 0.7 * (0.88 - 0.8) / 0.1)


def test_point_values_by_hand():
    e = Evaluation([*anchors(N), point("roro", right(0.8), 0.37, total=0.5)], resamples=10).summary()
    v = {k: x.mean for k, x in e.arm("roro").points[0].values.items()}
    assert v["accuracy"] == pytest.approx(0.8) and v["generated"] == pytest.approx(0.37)
    assert v["total"] == pytest.approx(0.5) and v["large_share"] == pytest.approx(0.3)
    assert v["a_per_f"] == pytest.approx(0.8 / 0.37) and v["pgr"] == pytest.approx(0.75)
    assert v["dibc"] == pytest.approx((0.3 / 0.27) / (0.4 / 0.9) - 1)
    assert v["seconds"] == pytest.approx(0.01 + 0.05 * 0.37)
    assert (v["tokens"], v["discarded"]) == pytest.approx((22, 2))
    assert v["decision_us"] == pytest.approx(10)
    assert set(v) == set(POINT_VALUES)


def test_total_flops_have_their_own_frontier():
    e = Evaluation([*anchors(N), point("roro", right(0.8), 0.37, total=0.8)], resamples=10)
    assert e.estimate("roro", "acc_at_60").mean > e.estimate("roro", "acc_at_60_total").mean
    assert e.estimate("roro", "acc_at_60_total").mean == pytest.approx(0.5 + 0.3 * 0.5 / 0.7)


def test_costs_are_ratios_of_means_over_queries_not_means_of_ratios():
    small, large = anchors(2)
    large = replace(large, generated_flops=np.array([100.0, 300.0]))
    small = replace(small, generated_flops=np.array([10.0, 30.0]))
    r = point("roro", [1, 1], [0.2, 2.0])
    v = Evaluation([small, large, r], resamples=5).summary().arm("roro").points[0].values
    assert v["generated"].mean == pytest.approx(220 / 400)


def test_large_token_share_is_of_what_all_large_writes():
    r = replace(point("roro", [1, 1], 0.5, large=0.5), tokens=np.array([40.0, 40.0]))
    v = Evaluation([*anchors(2), r], resamples=5).summary().arm("roro").points[0].values
    assert v["large_share"].mean == pytest.approx(0.5)


def test_a_router_equal_to_a_coin_toss_has_area_one_half():
    n = 400
    p = [point("random", right(0.5 + 0.4 * k, n), 0.1 + 0.9 * k, knob=k) for k in (0.25, 0.5, 0.75)]
    assert Evaluation([*anchors(n), *p], resamples=5).estimate("random", "area").mean == pytest.approx(0.5, abs=2e-3)


def test_differences_are_paired_by_query_and_seed():
    """Arm b is right wherever a is, plus one more query: the paired interval is far narrower than the arms' own."""
    n = 300
    rng = np.random.default_rng(0)
    base = rng.random(n) < 0.7
    more = base.copy()
    more[np.flatnonzero(~base)[:3]] = True
    e = Evaluation([*anchors(n), point("a", base, 0.6), point("b", more, 0.6)], resamples=500)
    d, a = e.difference("b", "a", "acc_at_60"), e.estimate("a", "acc_at_60")
    assert d.mean > 0
    assert d.hi - d.lo < 0.4 * (a.hi - a.lo)
    flipped = e.difference("a", "b", "acc_at_60")
    assert (flipped.mean, flipped.lo, flipped.hi) == pytest.approx((-d.mean, -d.hi, -d.lo))
    assert e.difference("a", "a", "area").hi == 0


def test_per_seed_values_and_their_mean():
    ps = [point("roro", right(a), 0.6, seed=s) for s, a in enumerate((0.6, 0.7, 0.8))]
    e = Evaluation([*anchors(N), *ps], resamples=100)
    x = e.estimate("roro", "acc_at_60")
    assert e.seeds == [0, 1, 2]
    assert x.per_seed == pytest.approx([0.6, 0.7, 0.8]) and x.mean == pytest.approx(0.7)
    assert x.lo < 0.7 < x.hi


def test_seeds_vary_the_interval_of_a_trained_arm_but_not_of_a_deterministic_one():
    """All queries alike, so what is left is the spread of the seeds."""
    n = 10
    small, large = point("all_small", np.full(n, 0.5), 0.1, large=0.0), point("all_large", np.full(n, 0.9), 1.0)
    ps = [point("roro", np.full(n, a), 0.6, seed=s) for s, a in enumerate((0.6, 0.7, 0.8))]
    e = Evaluation([small, large, *ps, point("confidence", np.full(n, 0.7), 0.6)], resamples=200)
    trained, fixed = e.estimate("roro", "acc_at_60"), e.estimate("confidence", "acc_at_60")
    assert trained.hi - trained.lo > 0.1
    assert fixed.hi - fixed.lo == pytest.approx(0, abs=1e-9)
    assert len(fixed.per_seed) == 1
    assert e.difference("roro", "confidence", "acc_at_60").per_seed == pytest.approx([-0.1, 0.0, 0.1])


def test_queries_may_come_in_another_order():
    e = noisy_arm("roro", 0.4, N, seeds=2)
    order = np.random.default_rng(0).permutation(N)
    shuffled = [p.aligned([p.query_ids[i] for i in order]) for p in e]
    a = Evaluation([*anchors(N), *e], resamples=50).estimate("roro", "area")
    b = Evaluation([*anchors(N), *shuffled], resamples=50).estimate("roro", "area")
    assert (a.mean, a.lo, a.hi) == pytest.approx((b.mean, b.lo, b.hi))


def test_knobs_that_differ_between_seeds_are_matched_by_rank():
    ps = [point("roro", right(a), c, knob=k, seed=s) for s, k, a, c in [(0, 1, 0.6, 0.3), (0, 2, 0.8, 0.6)]]
    ps += [point("roro", right(a), c, knob=k, seed=1) for k, a, c in [(1.5, 0.7, 0.4), (4, 0.9, 0.7)]]
    arm = Evaluation([*anchors(N), *ps], resamples=10).summary().arm("roro")
    assert [p.knob for p in arm.points] == [1.25, 3.0]
    assert [p.values["accuracy"].mean for p in arm.points] == pytest.approx([0.65, 0.85])


def test_without_a_gap_nothing_relative_to_it_is_defined():
    ps = [point("all_small", right(0.9), 0.1, large=0.0), point("all_large", right(0.9), 1.0)]
    e = Evaluation([*ps, point("roro", right(0.9), 0.5)], resamples=20)
    for m in ("area", "pgr", "dibc", "cpt50", "cpt95"):
        assert math.isnan(e.estimate("roro", m).mean), m
    assert e.estimate("roro", "acc_at_60").mean == pytest.approx(0.9)


def test_deterministic_in_the_seed():
    a, b, c = (Evaluation(study(60, 2), resamples=50, seed=s).estimate("roro", "area") for s in (3, 3, 4))
    assert a == b and a != c


def test_bands_hold_the_plug_in_curve_and_start_at_the_small_model():
    e = Evaluation(study(80, 3), resamples=200).summary()
    arm, small = e.arm("roro"), e.arm("all_small").points[0].values
    for axis, band in arm.bands.items():
        assert band.x[0] == pytest.approx(small[axis].mean) and band.x[-1] == 1
        assert all(lo - 1e-9 <= hi for lo, hi in zip(band.lo, band.hi, strict=True))
        assert band.lo[0] <= small["accuracy"].mean <= band.hi[0]
    assert set(arm.bands) == {"generated", "total"}
    assert not e.arm("all_large").metrics


def test_summary_survives_json_and_answers_both_ways_round():
    e = Evaluation(study(60, 2), resamples=40).summary(against=["outcome_only", "absent"], task="ledger")
    assert {d.b for d in e.differences} == {"outcome_only"}
    back = from_plain(EvalSummary, to_plain(e))
    assert to_plain(back) == to_plain(e)
    d, r = back.difference("roro", "outcome_only", "area"), back.difference("outcome_only", "roro", "area")
    assert (r.mean, r.lo, r.hi) == (-d.mean, -d.hi, -d.lo)
    assert back.difference("roro", "random", "area") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ps: [p for p in ps if p.arm != "all_large"], "anchor arm 'all_large' is missing"),
        (lambda ps: [*ps, point("all_small", right(0.5), 0.1, knob=1.0)], "exactly one operating point"),
        (lambda ps: [p for p in ps if (p.arm, p.seed, p.knob) != ("roro", 1, 0.4)], "operating points per seed differ"),
        (lambda ps: [*ps, *(p for p in ps if p.arm == "roro")], "two results for the same knob and seed"),
        (lambda ps: [*ps, point("x", right(0.5, 19), 0.1)], "other queries"),
        (lambda ps: [], "no operating points"),
    ],
)
def test_points_that_do_not_fit_together_are_refused_by_name(change, message):
    ps = [*anchors(N), *noisy_arm("roro", 0.4, N, seeds=2)]
    with pytest.raises(DataError, match=message):
        Evaluation(change(ps), resamples=5)


def test_unknown_arm_and_metric_are_named():
    e = Evaluation([*anchors(N), point("roro", right(0.8), 0.37)], resamples=5)
    with pytest.raises(DataError, match="no metric 'speed' for arm 'roro'"):
        e.estimate("roro", "speed")
    with pytest.raises(DataError, match="arm 'nobody'"):
        e.difference("roro", "nobody", "area")


def test_planted_fault_unpaired_draws_would_be_seen(monkeypatch):
    """If each arm drew its own queries, the interval of a constant difference would be wide."""
    n = 200
    base = np.random.default_rng(0).random(n) < 0.7
    ps = [*anchors(n), point("a", base, 0.6), point("b", base, 0.6)]
    assert Evaluation(ps, resamples=200).difference("a", "b", "acc_at_60").hi == 0
    measure, count = module._measure, iter(range(100))

    def unpaired(points, ids, seeds, draws):
        return measure(points, ids, seeds, module.Draws.make(len(ids), len(seeds), 200, next(count)))

    monkeypatch.setattr(module, "_measure", unpaired)
    assert Evaluation(ps, resamples=200).difference("a", "b", "acc_at_60").hi > 0.03
