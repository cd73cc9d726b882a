"""The smol study: every baseline, outcome-only GRPO, RoRo and its controls on SmolLM2, in distribution and held out.

    python -m bench.studies.smol_study all                # everything below, one after the other
    python -m bench.studies.smol_study prepare            # reader and process reward heads, which serve all seeds
    python -m bench.studies.smol_study once               # arms that no seed changes
    python -m bench.studies.smol_study run --seeds 0 1 2  # each seed: collection, pairs, alternation, routers, arms
    python -m bench.studies.smol_study collate            # bench/results/smol_study.json, of what is there so far

All of it is resumable, arm by arm; seeds and `once` may run side by side. A seed is a run directory of the `smol_study`
preset. Thresholds and budgets are fitted on calibrate queries of `arithmetic`; the same settings are then measured on
its test split and on the two families of `arithmetic_held_out`, of which nothing is seen before.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from rich.console import Console

from bench.studies import points
from roro_fast.cli_stages import run_stages
from roro_fast.config import Config
from roro_fast.config_io import load_config
from roro_fast.eval.baselines import BUILDERS, Fitting
from roro_fast.eval.records import PointResult
from roro_fast.eval.stages import fitting, learned
from roro_fast.eval.study import build_study
from roro_fast.eval.sweep import Runner, Setting, baseline_settings
from roro_fast.files import write_json
from roro_fast.routing import ConfidenceThreshold, RandomRouter
from roro_fast.rubric.judge import Judge
from roro_fast.runs import RunDirectory
from roro_fast.runs.meta import provenance
from roro_fast.tasks import registry
from roro_fast.tasks.mixture import MIXTURES
from roro_fast.train.context import Context
from roro_fast.train.rewards import ProcessReward
from roro_fast.train.router_stage import Reference, process_reward, reference
from roro_fast.train.rubric_stage import load_judge, load_rubrics
from roro_fast.train.setup import Workbench
from roro_fast.train.smol_reader import SmolReading, SmolRecipe, WorkedSource
from roro_fast.train.train_prm import train as train_head

TRAINED = {"outcome_only": "none", "roro": "judge", "formula": "formula", "fixed_rubric": "fixed_rubric",
           "shuffled": "shuffled"}  # arm: process reward  # fmt: skip
WITHOUT_JUDGE = ("outcome_only", "formula")
SEEDED = ("random", "trim_agg", "policy_guided", "r2r", "policy_guided_regenerate")
ONCE = ("all_small", "all_large", "confidence", "oracle", "trim_thr", "rsd", "steer", "glimp_router", "spec_reason",
        "speculative_thinking", "trim_pomdp", "steer_regenerate", "glimp_router_regenerate", "oracle_next")  # fmt: skip
ORACLES = ("oracle", "oracle_next")  # ask the task about every step, which one held-out family cannot say
SHARES = (0.15, 0.35, 0.5, 0.65, 0.85)  # of large-model steps that the coin gives
HELD_OUT, N_HELD_OUT = "arithmetic_held_out", 80
REFERENCES = ("outcome_only", "roro", "formula", "confidence")
HEAD_QUERIES = 96
RESULT = Path(__file__).parents[1] / "results" / "smol_study.json"
ROOT = Path("runs/smol_study")
READER, HEADS = ROOT / "reader", ROOT / "heads"
console = Console(width=160)


def config_of(name: str, seed: int = 0, overrides: list[str] | None = None) -> Config:
    where = [f"run.dir={ROOT}", f"run.name={name}", f"run.seed={seed}"]
    models = [f"rubric.{who}={READER / 'model'}" for who in ("rubricor", "judge")]
    heads = [f"eval.prm={HEADS / 'small'}", f"eval.rating={HEADS / 'large'}"]
    return load_config("smol_study", [*where, *models, *heads, *(overrides or [])])


def prepare(overrides: list[str]) -> None:
    """Process reward heads first, which `once` waits for, then the reader, which seeds wait for."""
    heads(overrides)
    with FileLock(ROOT / "reader.lock"):
        if not (READER / "model" / "train.json").is_file():
            questions, held_out = WorkedSource("train"), WorkedSource("calibrate", 200)
            SmolReading(SmolRecipe(), READER, questions, held_out).run()


def heads(overrides: list[str]) -> None:
    ROOT.mkdir(parents=True, exist_ok=True)
    with FileLock(ROOT / "heads.lock"):
        bench = Workbench(config_of("heads", overrides=overrides))
        for at, label in enumerate(bench.config.models.labels):
            if not (HEADS / label / "prm.json").is_file():
                record = train_head(bench, at, HEADS / label, HEAD_QUERIES, decay=1e-2)
                console.print(f"head on {label}: {record['calibrate']}")


@dataclasses.dataclass
class Arms:
    """Fits arms on one run's train and calibrate queries and measures them on every test set."""

    ctx: Context

    @cached_property
    def fit(self) -> Fitting:
        return fitting(self.ctx)

    @cached_property
    def tests(self) -> dict[str, Runner]:
        """Of the task and of the held-out one, by task name; one engine serves both."""
        ctx, c = self.ctx, self.ctx.config
        other = registry.load_task(HELD_OUT, timeout=c.task.timeout)
        asked = {c.task.name: ctx.bench.queries("test"), HELD_OUT: other.queries("test", N_HELD_OUT, c.task.seed)}
        tasks = {c.task.name: ctx.bench.task, HELD_OUT: other}
        limits = {k: v for k, v in ctx.limits(c.engine.temperature).items() if k != "seed"}
        return {
            name: Runner(ctx.bench.engine, tasks[name], [(q, ctx.bench.encode(q)) for q in queries], limits)
            for name, queries in asked.items()
        }

    def settings(self, arm: str) -> list[Setting]:
        if arm in TRAINED:
            return learned(self.ctx, arm)
        if arm == "random":
            return [(p, RandomRouter(p)) for p in SHARES]
        if arm == "confidence":
            return self.fit.at_budgets(ConfidenceThreshold(0.5))
        if arm in BUILDERS:
            return BUILDERS[arm](self.fit)
        return baseline_settings(arm, self.ctx.bench.task, len(self.ctx.bench.models))

    def measure(self, arm: str) -> None:
        chosen: list[Setting] = []
        for name, test in self.tests.items():
            if arm in ORACLES and name == HELD_OUT:
                continue

            def make(test: Runner = test) -> list[PointResult]:
                chosen.extend([] if chosen else self.settings(arm))
                return test.run(arm, chosen, seed=self.ctx.config.run.seed)

            points.once(self.ctx.run.path / "points" / name / f"{arm}.safetensors", make, console)


def run_once(overrides: list[str]) -> None:
    heads(overrides)
    config = config_of("once", overrides=overrides)
    with RunDirectory.for_config(config) as run:
        arms = Arms(Context(run, Workbench(config)))
        for arm in ONCE:
            arms.measure(arm)


def run_seed(seed: int, overrides: list[str]) -> None:
    """First the arms without a Judge, then the alternation and the arms with one; each measured once it is trained."""
    heads(overrides)
    config = config_of(f"seed-{seed}", seed, overrides)
    run = RunDirectory.for_config(config)
    run_stages(run, "pairs", console)
    with run:
        ctx = Context(run, Workbench(config))
        ref = reference(ctx, ctx.prompts("train"))
        arms = Arms(ctx)
        for arm in (*WITHOUT_JUDGE, *SEEDED):
            if arm in WITHOUT_JUDGE:
                points.trained(ctx, arm, config.router, rewards(ctx, ref)(TRAINED[arm]), ref)
            arms.measure(arm)
    prepare(overrides)
    run_stages(run, "rubric", console)
    with run:
        reward = rewards(ctx, ref, load_judge(run).scorer())
        for arm in [a for a in TRAINED if a not in WITHOUT_JUDGE]:
            points.trained(ctx, arm, config.router, reward(TRAINED[arm]), ref)
            arms.measure(arm)


def rewards(ctx: Context, ref: Reference, judge: Judge | None = None) -> Callable[[str], ProcessReward | None]:
    """The process reward of a kind; with the Judge of the run, or those that need none."""
    return partial(
        process_reward, seed=ctx.config.run.seed, queries={q.id: q.prompt for q in ctx.bench.queries("train")}, ref=ref,
        judge=judge, rubrics=load_rubrics(ctx.run) if judge else None, ctx=ctx,
    )  # fmt: skip


def families() -> dict[str, Callable[[str], bool]]:
    """Test sets of the study by name: which query ids are in each."""
    task = registry.load_task(HELD_OUT)
    ids = {q.id: q.task for q in task.queries("test", N_HELD_OUT, config_of("once").task.seed)}
    names = [part.name for part in MIXTURES[HELD_OUT]]
    return {name.removeprefix("gym:"): partial(lambda n, q: ids.get(q) == n, name) for name in names}


def restricted(p: PointResult, keep: Callable[[str], bool]) -> PointResult:
    """The point on some of its queries."""
    rows = [i for i, q in enumerate(p.query_ids) if keep(q)]
    arrays = {f.name: getattr(p, f.name)[rows] for f in dataclasses.fields(p)[4:]}
    return PointResult(p.arm, p.knob, p.seed, tuple(p.query_ids[i] for i in rows), **arrays)


def complete(found: list[PointResult], seeds: list[int]) -> list[PointResult]:
    """The arms measured with all these seeds, and those that no seed changes."""
    have: dict[str, set[int]] = {}
    for p in found:
        have.setdefault(p.arm, set()).add(p.seed)
    whole = {a for a, s in have.items() if a in ONCE or set(seeds) <= s}
    return [p for p in found if p.arm in whole and (p.arm in ONCE or p.seed in seeds)]


def measured_seeds(task: str) -> list[int]:
    """Seeds whose trained arms are all measured; while there is none, those of which the arms without a Judge are."""
    for arms in (TRAINED, WITHOUT_JUDGE):
        files = [f"points/{t}/{a}.safetensors" for a in arms for t in (task, HELD_OUT)]
        if found := [s for s in range(100) if all((ROOT / f"seed-{s}" / f).is_file() for f in files)]:
            return found
    return []


def collate(resamples: int) -> None:
    """The study of what is measured so far, which it names."""
    task = config_of("once").task.name
    seeds = measured_seeds(task)
    found = {t: points.gather(sorted(ROOT.glob(f"*/points/{t}/*.safetensors")), ONCE) for t in (task, HELD_OUT)}
    found = {t: complete(ps, seeds) for t, ps in found.items()}
    sets = {task: found[task]} | {
        name: [restricted(p, keep) for p in found[HELD_OUT]] for name, keep in families().items()
    }
    measured = {p.arm for p in found[task]}
    references = [r for r in REFERENCES if r in measured]
    document: dict[str, Any] = {
        "meta": {
            "command": "python -m bench.studies.smol_study all",
            "seeds": seeds,
            "missing": sorted({*TRAINED, *SEEDED, *ONCE} - measured),
            "config": dataclasses.asdict(config_of("once")),
            "versions": provenance(),
            "reader": reader_log(),
            "heads": {p.parent.name: json.loads(p.read_text())["calibrate"] for p in sorted(HEADS.glob("*/prm.json"))},
            "judge": {p.parts[-3]: json.loads(p.read_text())["summary"] for p in alternations(seeds)},
        },
        "sets": {
            name: build_study(ps, meta={}, task=name, references=references, resamples=resamples)
            for name, ps in sets.items()
        },
    }
    write_json(RESULT, document)
    console.print(f"wrote {RESULT}: seeds {seeds}, missing arms {document['meta']['missing']}")


def alternations(seeds: list[int]) -> list[Path]:
    found = [ROOT / f"seed-{s}" / "stages" / "rubric.json" for s in seeds]
    return [p for p in found if p.is_file()]


def reader_log() -> list[dict[str, Any]]:
    """What the reader reads right as it learns; empty before there is one."""
    path = READER / "train_log.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [r for r in rows if "verdict_accuracy" in r]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("all", "prepare", "once", "run", "collate"))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--resamples", type=int, default=2000)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", dest="overrides")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.action in ("all", "prepare"):
        prepare(args.overrides)
    if args.action in ("all", "once"):
        run_once(args.overrides)
    for seed in args.seeds if args.action in ("all", "run") else ():
        run_seed(seed, args.overrides)
    if args.action in ("all", "collate"):
        collate(args.resamples)


if __name__ == "__main__":
    main()
