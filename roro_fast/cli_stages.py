"""The stages in order, and the runner that does what is missing of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console

from roro_fast.cli_ui import duration, stage_view
from roro_fast.config import Config
from roro_fast.errors import ConfigError
from roro_fast.eval import report_stage
from roro_fast.eval import stages as eval_stages
from roro_fast.runs import RunDirectory
from roro_fast.train import pipeline, router_stage, rubric_stage
from roro_fast.train.context import Context
from roro_fast.train.router_stage import needs_judge
from roro_fast.train.setup import Workbench

_ROLLOUT_KEYS = (
    "run.seed",
    "task.name",
    "task.seed",
    "task.split_by",
    "task.strict",
    "task.timeout",
    "task.system",
    "task.instruction",
    "task.chat",
    "models.paths",
    "models.layers",
    "models.labels",
    "models.dtype",
    "engine.delimiter",
    "engine.max_new_tokens",
    "engine.max_steps",
    "engine.top_k",
    "engine.top_p",
    "projection.maps",
)


@dataclass(frozen=True, slots=True)
class Stage:
    """`sections`: config keys its result depends on beyond earlier stages. `outputs`: files it leaves in the run.

    `wanted` says whether a run with this config has the stage at all; `check` refuses, before any work of the run, what
    the stage itself would refuse after it.
    """

    name: str
    run: Callable[[Context], dict[str, Any]]
    sections: tuple[str, ...]
    outputs: tuple[str, ...] = ()
    wanted: Callable[[Config], bool] = lambda config: True
    check: Callable[[Workbench], None] | None = None


def _router_files(arm: str) -> tuple[str, ...]:
    return f"{router_stage.ROUTERS}/{arm}", f"checkpoints/router/{arm}", f"logs/router/{arm}"


STAGES = (
    Stage("collect", pipeline.collect, (*_ROLLOUT_KEYS, "collect")),
    Stage("pairs", pipeline.pairs, ("pairs",), (pipeline.PAIRS,), needs_judge),
    Stage(
        "rubric",
        rubric_stage.rubric,
        ("rubric", "trl", "task.n_train"),
        (rubric_stage.ALTERNATION, rubric_stage.JUDGE, rubric_stage.RUBRICOR, rubric_stage.RUBRICS),
        needs_judge,
        rubric_stage.check,
    ),
    Stage(
        "reference",
        router_stage.reference_answers,
        ("task.n_train", "router.temperature"),
        (f"trajectories/{router_stage.REFERENCE}",),
    ),
    Stage("router", router_stage.router, ("task.n_train", "router"), _router_files(router_stage.RORO)),
    Stage(
        "outcome_only",
        router_stage.outcome_only,
        ("task.n_train", "router"),
        _router_files(router_stage.OUTCOME_ONLY),
        lambda config: router_stage.OUTCOME_ONLY in config.eval.arms,
    ),
    Stage(
        "evaluate",
        eval_stages.evaluate,
        (
            "task.n_calibrate",
            "task.n_test",
            "engine.temperature",
            "models.prices",
            "models.read_prices",
            "calibrate",
            "eval",
        ),
        (eval_stages.FOLDER, eval_stages.SUMMARY),
        check=eval_stages.check,
    ),
    Stage("report", report_stage.report, (), (report_stage.REPORT, report_stage.DATA)),
)
NAMES = tuple(s.name for s in STAGES)


def run_stages(run: RunDirectory, last: str, console: Console, redo: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Run all stages up to `last` that are not done; returns the summary of each. Takes the run's lock.

    A stage named in `redo` is forgotten first, and so is every later one: their results came from it.
    """
    for name in redo:
        if name not in NAMES:
            raise ConfigError(f"--redo: {name!r} is not a stage; choose one of {', '.join(NAMES)}")
    c = run.config
    console.print(f"{c.task.name} with {' and '.join(c.models.paths)} in {run.path}", highlight=False, soft_wrap=True)
    wanted = [s for s in STAGES[: NAMES.index(last) + 1] if s.wanted(run.config)]
    again = min((NAMES.index(n) for n in redo), default=len(NAMES))
    if run.config.run.threads:
        torch.set_num_threads(run.config.run.threads)
    bench = Workbench(run.config)
    # what will be refused is refused before anything of the run is written or replaced
    todo = [s for s in wanted if NAMES.index(s.name) >= again or run.done(s.name, s.sections) is None]
    if todo:
        _ = bench.task, bench.pool
    for stage in todo:
        if stage.check is not None:
            stage.check(bench)
    with run:
        if redo:
            _forget_from(run, again)
        summaries: dict[str, dict[str, Any]] = {}
        begun = time.perf_counter()
        for number, stage in enumerate(wanted, 1):
            mark = run.done(stage.name, stage.sections)
            if mark is not None:
                console.print(f"{stage.name}: done before, in {duration(mark.seconds)}", highlight=False)
                summaries[stage.name] = mark.summary
                continue
            _forget_from(run, NAMES.index(stage.name) + 1)
            start = time.perf_counter()
            with (
                stage_view(console, f"{number}/{len(wanted)} {stage.name}") as view,
                run.stage(stage.name, stage.sections) as summary,
            ):
                summary.update(stage.run(Context(run, bench, view)))
            console.print(f"{stage.name}: done in {duration(time.perf_counter() - start)}", highlight=False)
            summaries[stage.name] = summary
        console.print(f"{len(wanted)} stages in {duration(time.perf_counter() - begun)}", highlight=False)
        return summaries


def _forget_from(run: RunDirectory, index: int) -> None:
    for stage in STAGES[index:]:
        run.forget(stage.name, stage.outputs)
