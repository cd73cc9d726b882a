"""Preference pairs: which rule decides, what is dropped, caps, splits, and rows that round-trip."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from roro_fast.config import PairsConfig
from roro_fast.errors import DataError
from roro_fast.rubric.pairs import Candidate, build_pairs, compare, from_row, split_of, to_row
from roro_fast.rubric.render import View
from tests.rubric.samples import POOL, queries, routed, trajectory

CONFIG = PairsConfig()


def candidate(correct: bool, cost: float, quality: float | None = 0.5) -> Candidate:
    return Candidate(View(("x",), (0,), (1,)), "arm", 0, correct, cost, quality)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((True, 100, 0.0), (False, 1, 1.0), (1, "outcome", 1.0)),
        ((False, 1, 1.0), (True, 100, 0.0), (-1, "outcome", 1.0)),
        ((True, 80, 0.0), (True, 100, 1.0), (1, "cost", 0.2)),
        ((False, 100, 1.0), (False, 50, 0.0), (0, "", 0.0)),  # cheaper, but still wrong
        ((False, 100, 1.0), (False, 85, 0.0), (1, "process", 1.0)),
        ((True, 91, 0.5), (True, 100, 0.4), (1, "process", 0.1)),
        ((True, 91, 0.4), (True, 100, 0.5), (-1, "process", 0.1)),
        ((True, 90, 0.4), (True, 100, 0.9), (-1, "process", 0.5)),  # exactly the cost margin does not decide
        ((True, 100, 0.5), (True, 100, 0.49), (0, "", 0.0)),
        ((True, 100, None), (True, 100, 0.1), (0, "", 0.0)),
    ],
)
def test_rules_are_lexicographic(a, b, expected):
    sign, rule, margin = compare(candidate(*a), candidate(*b), CONFIG)
    assert (sign, rule) == expected[:2] and margin == pytest.approx(expected[2])


def test_cost_between_wrong_answers_can_be_asked_for():
    config = PairsConfig(cost_between_wrong=True)
    assert compare(candidate(False, 100, 1.0), candidate(False, 50, 0.0), config) == (-1, "cost", 0.5)


def test_quality_may_not_decide_between_unequal_costs():
    wide = PairsConfig(cost_margin=0.5, equal_cost=0.2)
    assert compare(candidate(True, 70, 0.9), candidate(True, 100, 0.1), wide)[0] == 0
    assert compare(candidate(True, 85, 0.9), candidate(True, 100, 0.1), wide)[:2] == (1, "process")


@pytest.fixture(scope="module")
def rolled():
    qs = queries(40)
    return {q.id: q for q in qs}, [t for q in qs for t in routed(q, 10, {1, 3})]


def test_every_pair_obeys_the_rule_it_names(rolled):
    pairs, stats = build_pairs(*rolled, POOL)
    assert stats.queries == 40 and stats.agreed_correct == stats.agreed_wrong == 0
    assert set(stats.rules) == {"outcome", "cost", "process"} and sum(stats.rules.values()) == len(pairs)
    for p in pairs:
        a, b = p.chosen, p.rejected
        assert p.prompt == rolled[0][p.query_id].prompt and p.split == split_of(p.query_id, CONFIG.holdout)
        assert compare(a, b, CONFIG) == (1, p.rule, p.margin)
        if p.rule == "outcome":
            assert a.correct and not b.correct
        else:
            assert a.correct == b.correct and (p.rule == "process" or a.cost < b.cost)


@pytest.mark.parametrize("left_out", ["outcome", "cost", "process"])
def test_a_rule_left_out_leaves_the_other_rules_pairs(rolled, left_out):
    whole, _ = build_pairs(*rolled, POOL, PairsConfig(max_per_query=1000))
    rules = [r for r in ("outcome", "cost", "process") if r != left_out]
    pairs, stats = build_pairs(*rolled, POOL, PairsConfig(max_per_query=1000, rules=rules))

    def keys(found):
        return {(p.chosen.view, p.rejected.view, p.rule, p.query_id) for p in found}

    assert keys(pairs) == keys(p for p in whole if p.rule != left_out) and set(stats.rules) == set(rules)


def test_cap_takes_from_the_rules_in_turn(rolled):
    pairs, stats = build_pairs(*rolled, POOL, PairsConfig(max_per_query=3))
    per_query = Counter(p.query_id for p in pairs)
    assert max(per_query.values()) == 3 and stats.found > len(pairs)
    for q in per_query:
        assert len({p.rule for p in pairs if p.query_id == q}) >= 2


def test_deterministic_whatever_the_order_of_arrival(rolled):
    by_id, ts = rolled
    shuffled = random.Random(3).sample(ts, len(ts))
    assert build_pairs(by_id, shuffled, POOL)[0] == build_pairs(by_id, ts, POOL)[0]
    assert build_pairs(by_id, ts, POOL, seed=1)[0] != build_pairs(by_id, ts, POOL)[0]


def test_queries_with_one_outcome_are_counted_and_dropped():
    a, b, c = queries(3)
    ts = []
    for q, outcomes in ((a, (True, True)), (b, (False, False)), (c, (True, False))):
        n = len(q.meta["kinds"]) + 1
        ts += [trajectory(q, [m] * n, correct=o, sample=m) for m, o in enumerate(outcomes)]
    pairs, stats = build_pairs({q.id: q for q in (a, b, c)}, ts, POOL)
    assert (stats.queries, stats.agreed_correct, stats.agreed_wrong) == (3, 1, 1)
    assert {p.query_id for p in pairs} == {c.id}


def test_equal_routes_are_one_candidate():
    (q,) = queries(1)
    n = len(q.meta["kinds"]) + 1
    ts = [trajectory(q, [0] * n, correct=False, sample=i) for i in range(5)] + [trajectory(q, [1] * n)]
    assert len(build_pairs({q.id: q}, ts, POOL)[0]) == 1


def test_without_an_all_small_run_quality_decides_nothing():
    (q,) = queries(1)
    ts = [t for t in routed(q, 12, {1}) if t.arm == "random"]
    pairs, stats = build_pairs({q.id: q}, ts, POOL)
    assert stats.no_small == 1 and "process" not in stats.rules and pairs


def test_the_gold_answer_never_matters(rolled):
    by_id, ts = rolled
    from dataclasses import replace

    other = {i: replace(q, answer="nonsense") for i, q in by_id.items()}
    assert build_pairs(other, ts, POOL)[0] == build_pairs(by_id, ts, POOL)[0]


def test_splits_hold_out_about_the_share_asked_for():
    ids = [f"q{i}" for i in range(2000)]
    assert sum(split_of(i, 0.2) == "heldout" for i in ids) == pytest.approx(400, abs=60)


def test_rows_round_trip(rolled):
    pairs, _ = build_pairs(*rolled, POOL)
    assert [from_row(to_row(p)) for p in pairs] == pairs


@pytest.mark.parametrize("fault", ["missing", "rule", "length"])
def test_bad_rows_are_named(rolled, fault):
    row = to_row(build_pairs(*rolled, POOL)[0][0])
    if fault == "missing":
        del row["chosen_models"]
    elif fault == "rule":
        row["rule"] = "taste"
    else:
        row["rejected_costs"] = [1]
    with pytest.raises(DataError, match={"missing": "chosen_models", "rule": "taste", "length": "rejected"}[fault]):
        from_row(row)


def test_unverified_and_unknown_trajectories_are_refused(rolled):
    by_id, ts = rolled
    (q,) = queries(1)
    t = trajectory(q, [0] * (len(q.meta["kinds"]) + 1))
    t.correct = None
    with pytest.raises(DataError, match="correct"):
        build_pairs({q.id: q}, [t], POOL)
    with pytest.raises(DataError, match="no such query"):
        build_pairs({}, ts[:1], POOL)
