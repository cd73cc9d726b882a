"""The formulas of the untrained routers."""

from __future__ import annotations

import math

import pytest
import torch

from roro_fast.errors import ConfigError
from roro_fast.routing import ConfidenceThreshold, Constant, Oracle, RandomRouter, Scripted
from roro_fast.tasks.ledger import Ledger, parse_query, render_steps
from tests.routing.batches import batch


def test_constant_routes() -> None:
    b = batch(3, num_models=3)
    assert Constant(2, "all_large").decide(b).actions.tolist() == [2, 2, 2]
    assert Constant(0, "all_small").decide(b).probs.tolist() == [[1, 0, 0]] * 3


def test_random_follows_the_uniforms() -> None:
    b = batch(4, uniforms=torch.tensor([0.0, 0.29, 0.3, 0.99]))
    out = RandomRouter(0.3).decide(b)
    assert out.actions.tolist() == [1, 1, 0, 0]
    torch.testing.assert_close(out.logprobs, torch.tensor([0.3, 0.3, 0.7, 0.7]).log())
    with pytest.raises(ConfigError, match=r"random\.p"):
        RandomRouter(1.5)


def test_confidence_threshold_rewrites_what_falls_below() -> None:
    b = batch(3, min_logprob=torch.tensor([0.49, 0.51, 0.9]).log(), mean_logprob=torch.tensor([0.9, 0.4, 0.4]).log())
    assert ConfidenceThreshold(0.5).decide(b).actions.tolist() == [1, 0, 0]
    assert ConfidenceThreshold(0.5, "mean").decide(b).actions.tolist() == [0, 1, 1]
    with pytest.raises(ConfigError, match="median"):
        ConfidenceThreshold(0.5, "median")


def test_oracle_rewrites_exactly_the_wrong_drafts() -> None:
    task = Ledger()
    query = task.queries("test", 1)[0]
    steps = render_steps(*parse_query(query.prompt))
    drafts = [steps[:1], [steps[0], steps[1].replace("gives", "gives 1")], steps[:3]]
    tags = [{"query": query, "sample": 0, "actions": []}] * 3
    b = batch(3, tags=tags, prefix=[lambda d=d: d for d in drafts])
    assert Oracle(task).decide(b).actions.tolist() == [0, 1, 0]


def test_scripted_follows_its_plan_and_ends_small() -> None:
    plans = [[1, 0], [0, 1], [], [1, 1]]
    tags = [{"query": None, "sample": 0, "actions": [], "plan": p} for p in plans]
    b = batch(4, tags=tags, step_index=torch.tensor([0, 1, 0, 2]))
    out = Scripted().decide(b)
    assert out.actions.tolist() == [1, 1, 0, 0]
    assert all(math.isclose(v, 0.0) for v in out.logprobs.tolist())
