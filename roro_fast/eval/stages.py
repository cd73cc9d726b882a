"""Evaluation and report as stages of a run: calibrate, really roll out every operating point, measure, show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from roro_fast.config import ORACLE_QUERY
from roro_fast.engine import Trajectory
from roro_fast.errors import CheckpointError, ConfigError
from roro_fast.eval.baselines import BUILDERS, Fitting
from roro_fast.eval.metrics import Evaluation
from roro_fast.eval.plain import to_plain
from roro_fast.eval.prices import price_table
from roro_fast.eval.prm import check_scorers
from roro_fast.eval.records import PointResult, best_of, load_points, save_points
from roro_fast.eval.sweep import Runner, Setting, at_bias, baseline_settings, calibrate
from roro_fast.files import write_json
from roro_fast.routing import Constant, PolicyNetwork
from roro_fast.train.context import Context
from roro_fast.train.rollout import keep
from roro_fast.train.router_stage import OUTCOME_ONLY, RORO, ROUTERS
from roro_fast.train.setup import Workbench

LEARNED = (OUTCOME_ONLY, RORO)
STEPWISE = ("oracle", "oracle_next")  # they ask the task about every step
FOLDER, SUMMARY = "eval", "eval.json"
SPLIT = "test"


def check(bench: Workbench) -> None:
    """Refuse arms that this task or these settings cannot give, before anything is trained for them."""
    c = bench.config
    kinds = {q.task: q for q in bench.drawn(SPLIT)}.values()
    for arm in c.eval.arms:
        if arm in STEPWISE and any(bench.task.verify(q, [""]).steps is None for q in kinds):
            raise ConfigError(
                f"eval.arms: {arm!r} needs a task that verifies steps, {c.task.name!r} does not; use {ORACLE_QUERY!r}"
            )
        if arm in LEARNED or arm in BUILDERS:
            bench.drawn("calibrate")
        check_scorers(c, arm)


def evaluate(ctx: Context) -> dict[str, Any]:
    """Roll out every arm of `eval.arms` on the test split; leaves `eval/<arm>.safetensors` and `eval.json`.

    Arms already there are read back, so an interrupted evaluation goes on with the next arm.
    """
    c = ctx.config
    folder = ctx.run.path / FOLDER
    folder.mkdir(exist_ok=True)
    points: list[PointResult] = []
    done = 0
    arms = [a for a in c.eval.arms if a != ORACLE_QUERY]
    settings = {
        a: baseline_settings(a, ctx.bench.task, len(ctx.bench.models), c.router.action_space)
        for a in arms
        if a not in LEARNED and a not in BUILDERS
    }
    per_arm = {a: len(settings.get(a, c.eval.budgets)) * c.task.n_test for a in arms}
    total = sum(per_arm.values())
    for arm in arms:
        path = folder / f"{arm}.safetensors"
        if not path.is_file():
            counter = _Counter(ctx, done, total)
            make = learned if arm in LEARNED else fitted
            chosen = settings[arm] if arm in settings else make(ctx, arm, counter.calibrating)
            found = runner(ctx, SPLIT, counter).run(arm, chosen, seed=c.run.seed)
            counter.store.flush()
            save_points(path, found)
        points += load_points(path)
        done += per_arm[arm]
        ctx.progress(done, total)
    if ORACLE_QUERY in c.eval.arms:
        small, large = (next(p for p in points if p.arm == a) for a in ("all_small", "all_large"))
        points.append(best_of(small, large, ORACLE_QUERY))
        save_points(folder / f"{ORACLE_QUERY}.safetensors", points[-1:])
    return summarise(ctx, points)


def summarise(ctx: Context, points: list[PointResult]) -> dict[str, Any]:
    """Metrics with bootstrap intervals, written to `eval.json`; returns the mean of each metric by arm."""
    c = ctx.config
    evaluation = Evaluation(points, resamples=c.eval.n_boot, seed=c.run.seed)
    against = [a for a in c.eval.arms if a in LEARNED]
    summary = evaluation.summary(against=against, task=c.task.name, split=SPLIT)
    write_json(ctx.run.path / SUMMARY, to_plain(summary))
    keys = ("area", "acc_at_60", "flops_at_98")
    arms: dict[str, Any] = {a.name: {k: to_plain(a.metrics[k]) for k in keys} for a in summary.arms if a.metrics}
    for anchor in (summary.small, summary.large):
        found = summary.arm(anchor)
        assert found is not None
        arms[anchor] = {"accuracy": to_plain(found.points[0].values["accuracy"])}
    return {"queries": summary.n_queries, "arms": arms}


def runner(ctx: Context, split: str, on_finish: Callable[[Trajectory], None] | None = None) -> Runner:
    limits = {k: v for k, v in ctx.limits(ctx.config.engine.temperature).items() if k != "seed"}
    prices = price_table(ctx.config.models)
    return Runner(ctx.bench.engine, ctx.bench.task, ctx.prompts(split), limits, on_finish, prices)


def fitting(ctx: Context, on_finish: Callable[[Trajectory], None] | None = None) -> Fitting:
    """What published baselines are fitted on: the first `eval.n_fit` train queries and the calibrate split."""
    c = ctx.config
    train = runner(ctx, "train", on_finish)
    train.prompts = train.prompts[: c.eval.n_fit]
    return Fitting(ctx.bench, train, runner(ctx, "calibrate", on_finish), c.eval.budgets, c.run.seed, c.eval.fit_steps)


def fitted(ctx: Context, arm: str, on_finish: Callable[[Trajectory], None] | None = None) -> list[Setting]:
    """The published baseline `arm` at each of `eval.budgets`."""
    return BUILDERS[arm](fitting(ctx, on_finish))


def learned(ctx: Context, arm: str, on_finish: Callable[[Trajectory], None] | None = None) -> list[Setting]:
    """The trained router `arm` at the bias that meets each of `eval.budgets`, fitted on the calibrate split."""
    path = ctx.run.path / ROUTERS / arm
    if not path.is_dir():
        raise CheckpointError(f"{path}: no trained router; run `roro train` first or drop {arm!r} from eval.arms")
    policy = PolicyNetwork.from_pretrained(path).to(ctx.bench.models[0].device)
    run = runner(ctx, "calibrate", on_finish)
    large = run.trajectories(Constant(len(ctx.bench.models) - 1, "all_large"), "all_large")
    flops = {t.query_id: t.cost.generated_flops for t in large}
    calibrate(policy, run, flops, ctx.config.calibrate.budgets)
    policy.save_pretrained(path)
    biases = policy.budget_bias(torch.tensor(ctx.config.eval.budgets)).tolist()
    settings: list[Setting] = []
    for budget, bias in zip(ctx.config.eval.budgets, biases, strict=True):
        settings.append((budget, at_bias(policy, bias)))
    return settings


class _Counter:
    """Counts finished answers for the progress bar; keeps those of the first `eval.n_view` queries for the viewer."""

    def __init__(self, ctx: Context, done: int, total: int) -> None:
        self.ctx, self.done, self.total, self.calibrated = ctx, done, total, 0
        self.viewed = (
            {q.id for q in ctx.bench.queries(SPLIT, ctx.config.eval.n_view)} if ctx.config.eval.n_view else set()
        )
        self.store = view_store(ctx)

    def __call__(self, t: Trajectory) -> None:
        self.done += 1
        self.calibrated = 0
        if t.query_id in self.viewed:
            keep(self.store, t)
        self.ctx.progress(min(self.done, self.total), self.total)

    def calibrating(self, t: Trajectory) -> None:
        """Shows that calibration answers are being rolled out, which the total does not count."""
        self.calibrated += 1
        self.ctx.progress(self.done, self.total, calibrating=self.calibrated)


def view_store(ctx: Context) -> Any:
    """Test answers kept for the viewer; `meta["setting"]` is the index of the operating point."""
    return ctx.run.store(
        "evaluate", key=lambda r: (r["query_id"], r["arm"], r["meta"]["setting"], r["sample"]), chunk=1 << 30
    )
