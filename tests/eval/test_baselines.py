"""Every published baseline, fitted, calibrated and run end to end on the packaged pair."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from roro_fast.config import BASELINE_ARMS, EVAL_ARMS
from roro_fast.config_io import load_config
from roro_fast.engine import Request
from roro_fast.errors import ConfigError
from roro_fast.eval.baselines import BUILDERS, Fitting, distinct, nearest
from roro_fast.eval.records import load_points
from roro_fast.eval.stages import evaluate
from roro_fast.eval.sweep import Runner, baseline_settings, step_limits
from roro_fast.routing.scoring import METER
from roro_fast.runs import RunDirectory
from roro_fast.train.context import Context
from roro_fast.train.setup import Workbench

BUDGETS = (0.2, 0.35, 0.7)
SCORED = {"trim_thr", "trim_agg", "trim_pomdp", "spec_reason", "rsd"}


@cache
def fitting() -> Fitting:
    bench = Workbench(load_config("nano", []))

    def runner(split: str, n: int) -> Runner:
        prompts = [(q, bench.encode(q)) for q in bench.queries(split, n)]
        return Runner(bench.engine, bench.task, prompts, {"max_new_tokens": 128, "max_steps": 16})

    return Fitting(bench, runner("train", 24), runner("calibrate", 8), BUDGETS, seed=0, steps=2)


@pytest.mark.parametrize("arm", [a for a in BASELINE_ARMS if a != "oracle_next"])
def test_each_baseline_end_to_end(arm: str) -> None:
    f = fitting()
    settings = BUILDERS[arm](f)
    assert [knob for knob, _ in settings] == list(BUDGETS)
    points = f.calibrate.run(arm, settings)
    large = np.array([f.calibrate_flops[q] for q in points[0].query_ids])
    shares = [float((p.generated_flops / large).mean()) for p in points]
    assert shares == sorted(shares) and shares[0] < 0.35
    if arm not in ("trim_pomdp", "speculative_thinking"):  # these pick among a few plans
        assert shares == pytest.approx(BUDGETS, abs=0.15)
    else:
        assert all(s <= b + 1e-9 for s, b in zip(shares, BUDGETS, strict=True))
    small = f.calibrate.run("all_small", baseline_settings("all_small", f.calibrate.task, 2))[0]
    assert points[-1].correct.mean() > small.correct.mean()
    asked = next(iter(f.calibrate.trajectories(settings[1][1], arm)))
    flops = asked.meta[METER]["flops"]
    query, ids = f.calibrate.prompts[0]
    limits = {**f.calibrate.limits, **step_limits(settings[1][1], f.calibrate.limits)}
    (unmetered,) = f.bench.engine.rollout([Request(ids, query=query, policy=settings[1][1], **limits)])
    assert (flops > 0) == (arm in SCORED) and asked.token_ids == unmetered.token_ids
    assert asked.cost.total_flops == pytest.approx(unmetered.cost.total_flops + flops)
    if arm == "r2r":
        assert len(asked.decisions) == len(asked.token_ids)


def test_the_oracle_that_looks_ahead_wastes_nothing() -> None:
    f = fitting()
    ((_, policy),) = BUILDERS["oracle_next"](f)
    before = f.calibrate.run("oracle", baseline_settings("oracle", f.calibrate.task, 2))[0]
    ahead = f.calibrate.run("oracle_next", [(0.0, policy)])[0]
    assert ahead.correct.mean() == 1.0 and np.array_equal(ahead.generated_flops, before.generated_flops)
    assert ahead.discarded.sum() == 0 < before.discarded.sum() and (ahead.total_flops <= before.total_flops).all()


def test_names_match_the_config_and_unknown_ones_are_refused() -> None:
    assert tuple(BUILDERS) == BASELINE_ARMS and set(BASELINE_ARMS) <= set(EVAL_ARMS)
    with pytest.raises(ConfigError, match=r"eval\.arms: 'trim_max' is not one of .*trim_thr"):
        load_config("nano", ["eval.arms=[all_small, all_large, trim_max]"])


def test_picking_within_budgets() -> None:
    assert nearest([0.1, 0.3, 0.6], [0.9, 0.5, 0.2, 0.3]) == [2, 3, 1]
    assert distinct([0.5, 0.5, 0.2])[0] > 0.2 and len(distinct([0.5, 0.5, 0.2])) == 2
    assert len(distinct([i / 100 for i in range(100)], most=10)) == 10


def test_the_evaluate_stage_runs_them_by_name_and_resumes(tmp_path: Path) -> None:
    arms = "eval.arms=[all_small, all_large, trim_thr, r2r, speculative_thinking]"
    small = ["task.n_train=16", "collect.n_queries=4", "task.n_calibrate=6", "task.n_test=5", "eval.n_boot=20"]
    config = load_config(
        "nano", [f"run.dir={tmp_path}", arms, *small, "eval.n_fit=12", "eval.budgets=[0.3, 0.6]", "eval.n_view=2"]
    )
    run = RunDirectory.for_config(config)
    seen: list[tuple[int, int]] = []
    with run:
        ctx = Context(run, Workbench(config), lambda done, total, **info: seen.append((done, total)))
        summary = evaluate(ctx)
        assert {"trim_thr", "r2r", "speculative_thinking"} <= set(summary["arms"])
        assert seen[-1] == (40, 40), "two anchors and three arms at two budgets, five queries each"
        points = load_points(run.path / "eval" / "r2r.safetensors")
        assert [p.knob for p in points] == [0.3, 0.6] and (points[0].decisions == points[0].tokens).all()
        before = (run.path / "eval" / "trim_thr.safetensors").stat().st_mtime_ns
        assert evaluate(ctx)["arms"] == summary["arms"]
        assert (run.path / "eval" / "trim_thr.safetensors").stat().st_mtime_ns == before
