"""How the router of the smol pair should see the scout's hidden state: outcome-only GRPO, several seeds.

    python -m bench.studies.hidden_study run --seeds 0 1 2   # resumable; split the seeds over processes to go faster
    python -m bench.studies.hidden_study collate             # bench/results/hidden_smol.json

The preset `smol_study` on other questions than the study's (`task.seed=0`), so that its presets may be chosen here.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch
from rich.console import Console

from bench.studies import points
from bench.studies.twins import twin
from roro_fast.cli_stages import run_stages
from roro_fast.config import Config
from roro_fast.config_io import load_config
from roro_fast.eval.records import PointResult
from roro_fast.eval.stages import learned, runner
from roro_fast.eval.study import build_study
from roro_fast.eval.sweep import baseline_settings
from roro_fast.files import write_json
from roro_fast.runs import RunDirectory
from roro_fast.runs.meta import provenance
from roro_fast.train.context import Context
from roro_fast.train.router_stage import reference
from roro_fast.train.setup import Workbench

RESULT = Path(__file__).parents[1] / "results" / "hidden_smol.json"
ROOT = Path("runs/hidden_study")
VARIANTS = {  # the first is what the others are compared with, and collects for all
    "signals_only": ("router.hidden=false", "router.scale_hidden=false"),
    "scaled_hidden": ("router.hidden=true", "router.scale_hidden=true"),
    "plain_hidden": ("router.hidden=true", "router.scale_hidden=false"),
}
BASELINES = ("all_small", "all_large", "confidence")  # one seed stands for all
BASE = "signals_only"
console = Console()


def config_of(name: str, seed: int, overrides: list[str]) -> Config:
    where = [f"run.dir={ROOT}", f"run.name={name}-{seed}", f"run.seed={seed}", "task.seed=0"]
    return load_config("smol_study", [*where, *overrides, *VARIANTS[name], "router.process_reward=none"])


def run_seed(seed: int, overrides: list[str]) -> None:
    base = RunDirectory.for_config(config_of(BASE, seed, overrides))
    for name in VARIANTS:
        config = config_of(name, seed, overrides)
        run = base if name == BASE else twin(base, config, "router")
        run_stages(run, "reference", console)
        with run:
            ctx = Context(run, Workbench(config))
            points.trained(ctx, name, config.router, None, reference(ctx, ctx.prompts("train")))
            for arm in (name, *(BASELINES if name == BASE else ())):

                def make(arm: str = arm, name: str = name, ctx: Context = ctx) -> list[PointResult]:
                    trained = arm == name
                    settings = learned(ctx, arm) if trained else baseline_settings(arm, ctx.bench.task, 2)
                    return runner(ctx, "test").run(arm, settings, seed=seed)

                points.once(run.path / "points" / f"{arm}.safetensors", make, console)


def collate(resamples: int) -> None:
    seeds = [s for s in range(100) if all((ROOT / f"{n}-{s}/points/{n}.safetensors").is_file() for n in VARIANTS)]
    paths = [p for s in seeds for p in sorted(ROOT.glob(f"*-{s}/points/*.safetensors"))]
    config = config_of(BASE, 0, [])
    meta = {
        "command": "python -m bench.studies.hidden_study run; ... collate",
        "config": dataclasses.asdict(config),
        "variants": {k: list(v) for k, v in VARIANTS.items()},
        "versions": provenance(),
    }
    found = points.gather(paths, BASELINES)
    study = build_study(found, meta=meta, task=config.task.name, references=[BASE], resamples=resamples)
    write_json(RESULT, study)
    console.print(f"wrote {RESULT.name}: seeds {seeds}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "collate"))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--resamples", type=int, default=2000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.action == "collate":
        collate(args.resamples)
        return
    for seed in args.seeds:
        run_seed(seed, args.overrides)


if __name__ == "__main__":
    main()
