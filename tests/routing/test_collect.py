"""Collection arms: who is asked for what, and where the escalations of the second wave go."""

from __future__ import annotations

import math

from roro_fast.engine import Cost, Step, Trajectory
from roro_fast.routing.collect import confidences, critical_step, first_wave, second_wave
from roro_fast.tasks.ledger import Ledger

QUERIES = [(q, [1, 2, 3]) for q in Ledger().queries("train", 5)]


def all_small(query_id: str, conf: list[float]) -> Trajectory:
    steps = [Step(i, i + 1, 0, math.log(c), math.log(c), 0.0, 0.0) for i, c in enumerate(conf)]
    return Trajectory(query_id, [1], [0] * len(conf), steps, [], Cost(), "eos", "all_small")


def test_critical_step_is_the_sharpest_drop() -> None:
    assert critical_step([0.9, 0.85, 0.3, 0.2]) == 2
    assert critical_step([0.4, 0.9, 0.6]) == 0, "a first step of 0.4 drops from certainty"
    assert critical_step([0.9, 0.4, 0.9, 0.4]) == 1, "the first of equal drops"
    t = all_small("x", [0.5, 0.25])
    assert [round(c, 6) for c in confidences(t)] == [0.5, 0.25]


def test_first_wave_asks_every_arm_of_every_query() -> None:
    requests = list(first_wave(QUERIES, ["all_small", "all_large", "confidence"], num_models=2, thresholds=[0.5, 0.9]))
    assert len(requests) == 5 * 4
    assert {r.arm for r in requests} == {"all_small", "all_large", "confidence@0.5", "confidence@0.9"}
    assert all(r.policy is not None and r.query is not None for r in requests)


def test_second_wave_escalates_at_around_and_away_from_the_critical_step() -> None:
    base = {q.id: all_small(q.id, [0.9, 0.95, 0.9, 0.2, 0.9, 0.9, 0.9]) for q, _ in QUERIES[:4]}
    arms = ["random_budget", "critical", "anti_critical"]
    requests = list(second_wave(QUERIES, arms, base, num_models=3, samples=4, seed=1))
    assert {r.query.id for r in requests if r.query} == set(base), "a query without an all-small answer is left out"
    assert len(requests) == 4 * (4 + 1 + 1)
    for r in requests:
        plan = r.tag["plan"]
        assert len(plan) == 7 and set(plan) <= {0, 2}
        at = {i for i, a in enumerate(plan) if a}
        if r.arm == "critical":
            assert at == {2, 3, 4}
        elif r.arm == "anti_critical":
            assert len(at) == 3 and not at & {2, 3, 4}
        else:
            assert 1 <= len(at) <= 3
    plans = {(r.query.id, r.sample, tuple(r.tag["plan"])) for r in requests if r.query and r.arm == "random_budget"}
    again = second_wave(QUERIES, arms, base, num_models=3, samples=4, seed=1)
    assert plans == {
        (r.query.id, r.sample, tuple(r.tag["plan"])) for r in again if r.query and r.arm == "random_budget"
    }
    other = second_wave(QUERIES, arms, base, num_models=3, samples=4, seed=2)
    assert plans != {
        (r.query.id, r.sample, tuple(r.tag["plan"])) for r in other if r.query and r.arm == "random_budget"
    }
