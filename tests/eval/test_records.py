from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from roro_fast.errors import DataError
from roro_fast.eval.records import ARRAYS, PointResult, best_of, load_points, save_points
from roro_fast.tasks.ledger import Ledger
from tests.eval.samples import anchors, noisy_arm, point, trajectory

QUERIES = Ledger().queries("test", 3)


def test_columns_come_from_the_trajectory():
    ts = [trajectory(q, "roro", [0, 1], slip=1 if i == 2 else None, regenerate=True) for i, q in enumerate(QUERIES)]
    ts[0].cost.routing_seconds = 0.004
    p = PointResult.from_trajectories(ts[::-1], arm="roro", knob=0.5, seed=3, query_ids=[q.id for q in QUERIES])
    assert p.query_ids == tuple(q.id for q in QUERIES) and (p.arm, p.knob, p.seed) == ("roro", 0.5, 3)
    assert p.correct.tolist() == [1, 1, 0]
    assert p.generated_flops.tolist() == [t.cost.generated_flops for t in ts]
    assert p.total_flops.tolist() == [t.cost.total_flops for t in ts]
    assert p.large_tokens.tolist() == [t.cost.generated_tokens[1] for t in ts]
    assert p.tokens.tolist() == [len(t.token_ids) for t in ts]
    assert p.discarded.tolist() == [9, 9, 9]
    assert p.decisions.tolist() == [len(t.decisions) for t in ts]
    assert p.routing_seconds[0] == 0.004 and (p.routing_seconds[1:] == 0).all()


def test_tokens_are_counted_from_the_steps_when_the_cost_has_none():
    t = trajectory(QUERIES[0], "roro", [0, 1])
    p = PointResult.from_trajectories([t], arm="roro")
    t.cost.generated_tokens = []
    assert PointResult.from_trajectories([t], arm="roro").large_tokens == p.large_tokens


def test_samples_of_a_query_are_averaged():
    ts = [trajectory(QUERIES[0], "roro", [1], slip=s) for s in (None, 0, None, 1)]
    p = PointResult.from_trajectories(ts, arm="roro")
    assert p.correct.tolist() == [0.5] and len(p.query_ids) == 1


def test_unverified_missing_and_unexpected_answers_are_named():
    t = trajectory(QUERIES[0], "roro", [1])
    with pytest.raises(DataError, match=f"missing answers for .*{QUERIES[1].id}"):
        PointResult.from_trajectories([t], arm="roro", query_ids=[q.id for q in QUERIES])
    with pytest.raises(DataError, match=f"unexpected ones for .*{QUERIES[0].id}"):
        PointResult.from_trajectories([t], arm="roro", query_ids=[])
    t.correct = None
    with pytest.raises(DataError, match="not verified"):
        PointResult.from_trajectories([t], arm="roro")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"correct": np.array([2.0, 0.0])}, r"correct must lie in \[0, 1\]"),
        ({"total_flops": np.array([1.0, math.nan])}, "total_flops must be finite"),
        ({"seconds": np.array([1.0, -1.0])}, "seconds must be finite and not negative"),
        ({"tokens": np.ones(3)}, r"tokens has shape \(3,\)"),
        ({"query_ids": ("a", "a")}, "repeats an id"),
    ],
)
def test_bad_columns_are_named(change, message):
    with pytest.raises(DataError, match=message):
        replace(point("roro", [1, 0], 0.5), **change)


def test_points_survive_the_disk(tmp_path):
    points = [*anchors(7), *noisy_arm("roro", 0.3, 7, seeds=2)]
    points[0] = replace(points[0], routing_seconds=np.full(7, math.nan))
    save_points(tmp_path / "points.safetensors", points)
    assert [f.name for f in tmp_path.iterdir()] == ["points.safetensors"]
    back = load_points(tmp_path / "points.safetensors")
    assert len(back) == len(points)
    for a, b in zip(points, back, strict=True):
        assert (a.arm, a.knob, a.seed, a.query_ids) == (b.arm, b.knob, b.seed, b.query_ids)
        assert all(np.array_equal(getattr(a, n), getattr(b, n), equal_nan=True) for n in ARRAYS)


def test_points_saved_without_prices_are_still_read(tmp_path):
    from safetensors.numpy import save_file

    p = replace(anchors(5)[0], price=np.arange(5.0))
    save_points(tmp_path / "new.safetensors", [p])
    assert load_points(tmp_path / "new.safetensors")[0].price.tolist() == p.price.tolist()
    header = [{"arm": p.arm, "knob": p.knob, "seed": p.seed, "query_ids": p.query_ids}]
    table = np.stack([getattr(p, n) for n in ARRAYS[:-1]])
    meta = {"arrays": json.dumps(ARRAYS[:-1]), "points": json.dumps(header)}
    save_file({"0": table}, tmp_path / "old.safetensors", metadata=meta)
    (old,) = load_points(tmp_path / "old.safetensors")
    assert np.isnan(old.price).all() and np.array_equal(old.total_flops, p.total_flops)


@pytest.mark.parametrize("fault", ["absent", "torn", "other"])
def test_an_unreadable_file_is_named(tmp_path, fault):
    path = tmp_path / "points.safetensors"
    save_points(path, anchors(5))
    if fault == "absent":
        path.unlink()
    elif fault == "torn":
        path.write_bytes(path.read_bytes()[:-9])
    else:
        from safetensors.numpy import save_file

        save_file({"x": np.ones(2)}, path)
    with pytest.raises(DataError, match="points.safetensors"):
        load_points(path)


def test_the_oracle_over_whole_answers_asks_the_large_model_only_where_that_helps():
    small = point("all_small", [1, 0, 0, 1], 1.0)
    large = point("all_large", [1, 1, 0, 0], 4.0)
    order = [2, 0, 3, 1]
    shuffled = large.aligned([large.query_ids[i] for i in order])
    best = best_of(small, shuffled, "oracle_query")
    assert best.query_ids == small.query_ids and best.arm == "oracle_query"
    assert best.correct.tolist() == [1, 1, 0, 1]
    flops = [small.generated_flops[0], large.generated_flops[1], *small.generated_flops[2:]]
    assert best.generated_flops.tolist() == flops
