"""The nano study: every baseline, outcome-only GRPO, RoRo and its controls, several seeds, one test split.

    python -m bench.studies.nano_study run        # ten seeds, resumable; --seeds splits them over processes
    python -m bench.studies.nano_study collate    # bench/results/nano_study.json and the README table
    python -m bench.studies.nano_study quickstart # bench/results/nano_quickstart.json from runs/nano

Each seed is a run directory of the `nano_study` preset: its own collection, pairs, alternation and routers. Thresholds
and budgets are fitted on the calibrate split; nothing is chosen on the test split.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from pathlib import Path

import torch
from rich.console import Console

from bench.studies import points
from bench.studies.twins import twin
from roro_fast.cli_stages import run_stages
from roro_fast.config import Config
from roro_fast.config_io import load_config
from roro_fast.eval.catalogue import AFTER
from roro_fast.eval.records import PointResult
from roro_fast.eval.stages import learned, runner
from roro_fast.eval.study import build_study
from roro_fast.eval.sweep import baseline_settings
from roro_fast.files import write_json
from roro_fast.runs import RunDirectory
from roro_fast.runs.meta import provenance
from roro_fast.train.context import Context
from roro_fast.train.router_stage import ROUTERS, process_reward, reference
from roro_fast.train.rubric_stage import load_judge, load_rubrics
from roro_fast.train.setup import Workbench

LEARNED = ("outcome_only", "roro")
CONTROLS = ("formula", "fixed_rubric", "random_rubric", "shuffled")
TRAINED = {"outcome_only": "none", "roro": "judge"} | {kind: kind for kind in CONTROLS}  # arm: process reward
ORDER = "rubricor_first"
EARLY, EARLY_CONTROLS = (2, 5, 10), (5,)  # steps after which trained arms are measured as well
DETERMINISTIC = ("all_small", "all_large", "confidence", "oracle")  # one seed stands for all
RESULT = Path(__file__).parents[1] / "results" / "nano_study.json"
ROOT = Path("runs/nano_study")
console = Console()


def config_of(seed: int, overrides: list[str]) -> Config:
    return load_config("nano_study", [f"run.dir={ROOT}", f"run.name=seed-{seed}", f"run.seed={seed}", *overrides])


def measure(ctx: Context, arm: str) -> None:
    """Operating points of one arm on the test split, unless they are there already."""

    def make() -> list[PointResult]:
        by_router = (ctx.run.path / ROUTERS / arm).is_dir()
        settings = learned(ctx, arm) if by_router else baseline_settings(arm, ctx.bench.task, len(ctx.bench.models))
        return runner(ctx, "test").run(arm, settings, seed=ctx.config.run.seed)

    points.once(ctx.run.path / "points" / f"{arm}.safetensors", make, console)


def train_arms(ctx: Context) -> None:
    """Every trained arm, and as `<arm>@<steps>` what the same seed gives after fewer steps."""
    prompts = ctx.prompts("train")
    ref = reference(ctx, prompts)
    texts = {q.id: q.prompt for q, _ in prompts}
    judge, rubrics = load_judge(ctx.run), load_rubrics(ctx.run)
    for arm, kind in TRAINED.items():
        seed = ctx.config.run.seed
        reward = process_reward(kind, seed=seed, queries=texts, ref=ref, judge=judge, rubrics=rubrics, ctx=ctx)
        for name, steps in (*early(arm), (arm, ctx.config.router.steps)):
            points.trained(ctx, name, dataclasses.replace(ctx.config.router, steps=steps), reward, ref)


def early(arm: str) -> list[tuple[str, int]]:
    """(name, steps) of the measurements of `arm` before its training has ended."""
    return [(f"{arm}{AFTER}{n}", n) for n in (EARLY if arm in LEARNED else EARLY_CONTROLS)]


def other_order(ctx: Context, overrides: list[str]) -> None:
    """RoRo with the Rubricor trained first: the same collection and pairs in a run directory beside."""
    target = ctx.run.path / ROUTERS / ORDER
    if target.is_dir():
        return
    seed = ctx.config.run.seed
    config = config_of(seed, [*overrides, f"run.name=seed-{seed}-{ORDER}", f"rubric.order={ORDER}"])
    beside = twin(ctx.run, config, "rubric")
    run_stages(beside, "router", console)
    shutil.copytree(beside.path / ROUTERS / "roro", target)


def run_seed(seed: int, overrides: list[str]) -> None:
    config = config_of(seed, overrides)
    run = RunDirectory.for_config(config)
    run_stages(run, "reference", console)
    with run:
        ctx = Context(run, Workbench(config))
        train_arms(ctx)
    other_order(ctx, overrides)
    with run:
        arms = [*TRAINED, *(name for arm in TRAINED for name, _ in early(arm)), ORDER, "random"]
        for arm in arms if seed else [*DETERMINISTIC, *arms]:
            measure(ctx, arm)


def collate(resamples: int) -> None:
    found = points.gather(sorted(ROOT.glob("seed-*/points/*.safetensors")), DETERMINISTIC)
    histories = {}
    for folder in sorted(ROOT.glob("seed-*/points")):
        log = folder.parent / "stages" / "rubric.json"
        histories[folder.parent.name] = json.loads(log.read_text())["summary"].get("history", [])
    meta = {
        "command": "python -m bench.studies.nano_study run; ... collate",
        "config": dataclasses.asdict(config_of(0, [])),
        "versions": provenance(),
        "judge": histories,
    }
    references = ["outcome_only", "roro", *(name for name, _ in early("outcome_only"))]
    write_json(RESULT, build_study(found, meta=meta, references=references, resamples=resamples))
    console.print(f"wrote {RESULT}")


def quickstart(run: RunDirectory, resamples: int) -> None:
    """The frontier of one `roro quickstart`, in the study's schema."""
    found = points.gather(sorted((run.path / "eval").glob("*.safetensors")))
    history = json.loads((run.path / "stages" / "rubric.json").read_text())["summary"]["history"]
    meta = {
        "command": "roro quickstart; python -m bench.studies.nano_study quickstart",
        "config": dataclasses.asdict(run.config),
        "versions": provenance(),
        "judge": {run.path.name: history},
    }
    target = RESULT.with_name("nano_quickstart.json")
    write_json(target, build_study(found, meta=meta, resamples=resamples))
    console.print(f"wrote {target}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "collate", "quickstart"))
    parser.add_argument("--seeds", type=int, nargs="*", default=list(range(10)))
    parser.add_argument("--resamples", type=int, default=2000)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", dest="overrides")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.action == "collate":
        collate(args.resamples)
        return
    if args.action == "quickstart":
        quickstart(RunDirectory(Path("runs/nano")), args.resamples)
        return
    for seed in args.seeds:
        run_seed(seed, args.overrides)


if __name__ == "__main__":
    main()
