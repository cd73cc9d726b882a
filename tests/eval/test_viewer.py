from __future__ import annotations

import math

import pytest

from roro_fast.eval.viewer import view_trajectory
from roro_fast.tasks.ledger import Ledger
from tests.eval.samples import RUBRIC, trajectory

QUERY = Ledger().queries("test", 1)[0]


def test_steps_carry_writer_cost_decision_and_verdict():
    t = trajectory(QUERY, "roro", [0, 1], slip=1)
    t.decisions[0].probs = [0.1, 0.9]
    assert t.decisions[0].action == 0
    v = view_trajectory(t, query=QUERY.prompt, flops_per_token=[10.0, 100.0], large_flops=2 * t.cost.generated_flops)
    assert [s.model for s in v.steps] == t.models
    assert [s.text for s in v.steps] == t.step_texts
    for s, step, d in zip(v.steps, t.steps, t.decisions, strict=True):
        assert s.flops == (s.tokens * (10 if s.model == 0 else 100))
        assert s.probability == d.probs[d.action]
        assert s.confidence == math.exp(step.mean_logprob)
    assert [s.correct for s in v.steps][:3] == [True, False, True]
    assert v.flops_share == pytest.approx(0.5)
    assert not v.correct and not any(s.rejected for s in v.steps)


def test_rejected_drafts_and_verdicts_and_absent_facts():
    t = trajectory(QUERY, "roro", [0, 1], regenerate=True)
    t.meta["drafts"] = {"1": "first try"}
    t.step_correct = [True]
    t.decisions = t.decisions[:2]
    v = view_trajectory(t, query="q", flops_per_token=[1.0, 2.0], rubric=RUBRIC, p_true=[0.9])
    assert [s.rejected for s in v.steps][:3] == [False, True, False]
    assert v.steps[1].draft == "first try"
    assert all(s.correct is None for s in v.steps)
    assert math.isnan(v.steps[2].probability) and math.isnan(v.flops_share)
    assert [c.p_true for c in v.rubric][0] == 0.9 and math.isnan(v.rubric[1].p_true)
    assert [c.weight for c in v.rubric] == [3, 1, 1]
