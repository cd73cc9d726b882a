"""Rollouts into a store: verified, counted, deduplicated, and stored as JSON whatever the models do."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from roro_fast.config_io import load_config
from roro_fast.engine import Request, Trajectory
from roro_fast.routing import Constant, Oracle
from roro_fast.runs import JsonlStore
from roro_fast.train.rollout import finite, roll_out, stored
from roro_fast.train.setup import Workbench
from tests.tiny import overrides, save_pair


@pytest.fixture(scope="module")
def nano():
    return Workbench(load_config("nano", ["engine.max_num_seqs=16", "engine.kv_bytes=8MiB"]))


@pytest.fixture
def tiny(tmp_path):
    return Workbench(load_config("nano", overrides(tmp_path, *save_pair(tmp_path))))


def requests(bench, n, arm="all_large", model=1, **more):
    policy = Constant(model, arm)
    return [Request(bench.encode(q), query=q, arm=arm, policy=policy, **more) for q in bench.queries("test", n)]


def test_trajectories_are_verified_against_the_task(nano, tmp_path):
    store = JsonlStore(tmp_path)
    small = requests(nano, 8, "all_small", 0, max_new_tokens=128)
    stats = roll_out(nano.engine, nano.task, [*small, *requests(nano, 8, max_new_tokens=128)], store)
    assert stats.trajectories == 16 and stats.new_tokens == stats.tokens > 0 and stats.tokens_per_second > 0
    by_id = {q.id: q for q in nano.queries("test", 8)}
    for t in stored(store):
        outcome = nano.task.verify(by_id[t.query_id], t.step_texts)
        assert (t.correct, t.predicted, t.step_correct) == (outcome.correct, outcome.predicted, list(outcome.steps))
    arms = stats.to_dict()["arms"]
    assert arms["all_large"]["accuracy"] > arms["all_small"]["accuracy"]
    assert arms["all_large"]["generated_flops"] > 5 * arms["all_small"]["generated_flops"]
    assert stats.accuracy == pytest.approx((arms["all_large"]["accuracy"] + arms["all_small"]["accuracy"]) / 2)


def test_oracle_really_switches_and_mends_the_small_model(nano, tmp_path):
    policy = Oracle(nano.task)
    todo = [
        Request(nano.encode(q), query=q, arm="oracle", policy=policy, max_new_tokens=128)
        for q in nano.queries("test", 12)
    ]
    stats = roll_out(nano.engine, nano.task, todo, JsonlStore(tmp_path))
    assert stats.accuracy >= 11 / 12
    assert any(len(set(t.models)) == 2 for t in stored(JsonlStore(tmp_path)))


def test_stored_requests_are_not_run_again(nano, tmp_path):
    with JsonlStore(tmp_path) as store:
        roll_out(nano.engine, nano.task, requests(nano, 4, max_new_tokens=128), store)
    seen = []
    stats = roll_out(
        nano.engine,
        nano.task,
        requests(nano, 6, max_new_tokens=128),
        JsonlStore(tmp_path),
        progress=lambda done, total, **info: seen.append((done, total)),
    )
    assert stats.trajectories == 6 and len(JsonlStore(tmp_path)) == 6
    assert seen == [(4, 6), (5, 6), (6, 6)]
    quiet = []
    roll_out(nano.engine, nano.task, requests(nano, 6), JsonlStore(tmp_path), progress=lambda *a, **k: quiet.append(a))
    assert quiet == []


def test_nan_logits_are_recorded_and_the_run_goes_on(tiny, tmp_path):
    with torch.no_grad():
        tiny.models[1].norm.weight.fill_(math.nan)
    store = JsonlStore(tmp_path / "s")
    todo = [*requests(tiny, 4, max_new_tokens=16), *requests(tiny, 4, "all_small", 0, max_new_tokens=16)]
    stats = roll_out(tiny.engine, tiny.task, todo, store)
    assert stats.finish["nan"] == 4 and stats.trajectories == 8
    for path in store.shards():
        for line in path.read_text().splitlines():
            json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_prompts_the_engine_refuses_are_stored_once_with_the_reason(tiny, tmp_path):
    todo = requests(tiny, 2, max_new_tokens=8)
    todo[0].prompt_ids = todo[0].prompt_ids * 40
    stats = roll_out(tiny.engine, tiny.task, todo, JsonlStore(tmp_path / "s"))
    assert stats.finish["refused"] == 1 and stats.trajectories == 2
    refused = [t for t in stored(JsonlStore(tmp_path / "s")) if t.finish_reason == "refused"]
    assert "context" in refused[0].meta["error"] and refused[0].correct is False
    again = roll_out(tiny.engine, tiny.task, todo, JsonlStore(tmp_path / "s"))
    assert again.new_tokens == 0 and again.finish["refused"] == 1


def test_finite_replaces_what_json_cannot_hold():
    found = finite({"a": [1.0, math.nan, {"b": -math.inf}], "c": "nan", "d": 3, "e": None})
    assert found == {"a": [1.0, None, {"b": None}], "c": "nan", "d": 3, "e": None}


def test_a_record_comes_back_as_the_same_trajectory(nano, tmp_path):
    kept = []
    store = JsonlStore(tmp_path)
    append = store.append
    store.append = lambda r: kept.append(r) or append(r)
    roll_out(nano.engine, nano.task, requests(nano, 3, max_new_tokens=128), store)
    again = list(stored(JsonlStore(tmp_path)))
    assert [t.to_dict() for t in again] == kept == [dataclasses.asdict(t) for t in again]
    assert all(isinstance(t, Trajectory) and t.steps for t in stored(JsonlStore(tmp_path)))
