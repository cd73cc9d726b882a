"""Ablations of RoRo on the nano pair, and transfer between kinds of step: several seeds, one test split each.

    python -m bench.studies.ablation_study run --seeds 0 1 2       # resumable; split the seeds over processes
    python -m bench.studies.ablation_study transfer --seeds 0 ... 9
    python -m bench.studies.ablation_study collate                 # bench/results/{ablations,transfer}_nano*.json

Each seed is a run of the `nano_study` preset, which begins where that study's run of the same seed has already come to;
a variant keeps what its change does not touch (collection, pairs, Judge). Routers are measured after 5 and after all
steps of training, thresholds are fitted on the calibrate split. Other process rewards and the order of the alternation
are arms of the nano study itself.
Transfer: the whole loop on ledgers of some kinds of line, its routers then measured on ledgers of the others.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from roro_fast.train.router_stage import configured_reward, reference
from roro_fast.train.setup import Workbench

RESULTS = Path(__file__).parents[1] / "results"
ROOT = Path("runs/ablations")
NANO_STUDY = Path("runs/nano_study")
EARLY = 5
BASE, OUTCOME_ONLY = "roro", "outcome_only"
BASELINES = ("all_small", "all_large", "confidence")  # one seed stands for all
POINTS, TRAINED, OTHERS = "points", "points_trained", "points_others"
TRANSFERRED = (OUTCOME_ONLY, "signals_only", "scaled_hidden")  # and RoRo itself
KINDS_TRAINED, KINDS_TESTED = "add1+add2+sub2", "sub1+swap+mul"  # each with one kind that the small model fails at
console = Console()


@dataclass(frozen=True, slots=True)
class Variant:
    """One change to RoRo: the first stage it touches and the settings it changes."""

    first_changed: str
    overrides: tuple[str, ...]


VARIANTS = {
    OUTCOME_ONLY: Variant("router", ("router.process_reward=none",)),
    "beta_0.1": Variant("router", ("router.beta=0.1",)),
    "beta_0.45": Variant("router", ("router.beta=0.45",)),
    "next": Variant("router", ("router.action_space=next",)),
    "next_outcome_only": Variant("router", ("router.action_space=next", "router.process_reward=none")),
    "signals_only": Variant("router", ("router.hidden=false",)),
    "scaled_hidden": Variant("router", ("router.scale_hidden=true",)),
    "hidden_only": Variant("router", ("router.signals=false",)),
    "one_round": Variant("rubric", ("rubric.rounds=1",)),
    "warm_up_only": Variant("rubric", ("rubric.rounds=1", "rubric.steps=0")),
    "three_criteria": Variant("rubric", ("rubric.max_criteria=3",)),
    "no_outcome_rule": Variant("pairs", ("pairs.rules=[cost,process]",)),
    "no_cost_rule": Variant("pairs", ("pairs.rules=[outcome,process]",)),
    "no_process_rule": Variant("pairs", ("pairs.rules=[outcome,cost]",)),
}


@dataclass(frozen=True, slots=True)
class Seed:
    """One seed of the study, and settings that hold for all its runs."""

    number: int
    overrides: tuple[str, ...] = ()

    def config(self, name: str, *overrides: str) -> Config:
        where = [f"run.dir={ROOT}", f"run.name={name}-{self.number}", f"run.seed={self.number}"]
        return load_config("nano_study", [*where, *self.overrides, *overrides])


def routers(ctx: Context) -> None:
    """Train the run's router, and once more for a few steps only, so that it can be measured early."""
    c = ctx.config.router
    ref = reference(ctx, ctx.prompts("train"))
    reward = configured_reward(ctx, ref)
    for arm, steps in ((f"{BASE}{AFTER}{EARLY}", EARLY), (BASE, c.steps)):
        points.trained(ctx, arm, dataclasses.replace(c, steps=steps), reward, ref)


def measure(trained: Context, at: Context, name: str, folder: str = POINTS) -> None:
    """Operating points of a run's routers on the test split of `at`, under the name of the variant."""
    for arm in (f"{BASE}{AFTER}{EARLY}", BASE):
        called = f"{name}{arm.removeprefix(BASE)}"

        def make(arm: str = arm, called: str = called) -> list[PointResult]:
            return runner(at, "test").run(called, learned(trained, arm), seed=trained.config.run.seed)

        points.once(trained.run.path / folder / f"{called}.safetensors", make, console)


def baselines(at: Context, folder: Path) -> None:
    """The arms that no seed changes, to compare with."""
    for arm in BASELINES:

        def make(arm: str = arm) -> list[PointResult]:
            settings = baseline_settings(arm, at.bench.task, len(at.bench.models), at.config.router.action_space)
            return runner(at, "test").run(arm, settings, seed=0)

        points.once(folder / f"{arm}.safetensors", make, console)


def run_variant(name: str, seed: Seed, base: RunDirectory) -> None:
    v = VARIANTS[name]
    config = seed.config(name, *v.overrides)
    run = twin(base, config, v.first_changed)
    run_stages(run, "reference", console)
    with run:
        ctx = Context(run, Workbench(config))
        routers(ctx)
        measure(ctx, ctx, name)


def run_base(seed: Seed) -> RunDirectory:
    config, known = seed.config(BASE), NANO_STUDY / f"seed-{seed.number}"
    begun = known.is_dir() and not seed.overrides
    run = twin(RunDirectory(known), config, "router") if begun else RunDirectory.for_config(config)
    run_stages(run, "reference", console)
    with run:
        ctx = Context(run, Workbench(config))
        routers(ctx)
        measure(ctx, ctx, BASE)
        baselines(ctx, run.path / POINTS)
    return run


def run_transfer(seed: Seed) -> None:
    """RoRo, outcome-only GRPO and two other views of the state, trained on some kinds of line, measured on all.

    The thresholds are fitted on calibrate queries of the kinds trained on: nothing of the others is seen before.
    """
    here = (f"task.name=ledger:{KINDS_TRAINED}",)
    source: RunDirectory | None = None
    for name in (BASE, *TRANSFERRED):
        config = seed.config(f"transfer-{name}", *here, *(VARIANTS[name].overrides if name != BASE else ()))
        run = RunDirectory.for_config(config) if source is None else twin(source, config, "router")
        source = source or run
        run_stages(run, "reference", console)
        other = dataclasses.replace(config, task=dataclasses.replace(config.task, name=f"ledger:{KINDS_TESTED}"))
        with run:
            ctx = Context(run, Workbench(config))
            routers(ctx)
            for folder, c in ((TRAINED, config), (OTHERS, other)):
                at = Context(run, Workbench(c))
                measure(ctx, at, name, folder)
                baselines(at, run.path / folder)


def whole_seeds() -> list[int]:
    """Seeds of which every variant is measured."""
    names = (BASE, *VARIANTS)
    return [s for s in range(100) if all((ROOT / f"{n}-{s}" / POINTS / f"{n}.safetensors").is_file() for n in names)]


def transferred_seeds() -> list[int]:
    """Seeds of which every router of the transfer is measured at home and abroad."""
    files = [f"transfer-{n}-{{}}/{at}/{n}.safetensors" for n in (BASE, *TRANSFERRED) for at in (TRAINED, OTHERS)]
    return [s for s in range(100) if all((ROOT / f.format(s)).is_file() for f in files)]


def histories(seeds: Sequence[int]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """By variant and seed, the phases of the alternation; of variants that have one of their own."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for log in sorted(ROOT.glob("*/stages/rubric.json")):
        name, _, number = log.parents[1].name.rpartition("-")
        if int(number) not in seeds:
            continue
        if name == BASE or name in VARIANTS and VARIANTS[name].first_changed != "router":
            found.setdefault(name, {})[number] = json.loads(log.read_text())["summary"]["history"]
    return found


def collate(resamples: int) -> None:
    studies = {
        "ablations_nano": (POINTS, [BASE, f"{BASE}{AFTER}{EARLY}"], "ledger"),
        "transfer_nano_trained": (TRAINED, [OUTCOME_ONLY], f"ledger:{KINDS_TRAINED}"),
        "transfer_nano_others": (OTHERS, [OUTCOME_ONLY], f"ledger:{KINDS_TESTED}"),
    }
    for name, (folder, references, task) in studies.items():
        seeds = whole_seeds() if folder == POINTS else transferred_seeds()
        paths = [p for s in seeds for p in sorted(ROOT.glob(f"*-{s}/{folder}/*.safetensors"))]
        found = points.gather(paths, BASELINES)
        meta = {
            "command": "python -m bench.studies.ablation_study run; ... transfer --seeds 0 ... 9; ... collate",
            "config": dataclasses.asdict(Seed(0).config(BASE)),
            "variants": {k: list(v.overrides) for k, v in VARIANTS.items()},
            "versions": provenance(),
            "judge": histories(seeds) if folder == POINTS else {},
            "trained_on": KINDS_TRAINED if folder != POINTS else "all",
        }
        study = build_study(found, meta=meta, task=task, references=references, resamples=resamples)
        write_json(RESULTS / f"{name}.json", study)
        console.print(f"wrote {name}.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "transfer", "collate"))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--resamples", type=int, default=2000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.action == "collate":
        collate(args.resamples)
        return
    for number in args.seeds:
        seed = Seed(number, tuple(args.overrides))
        if args.action == "transfer":
            run_transfer(seed)
            continue
        base = run_base(seed)
        for name in args.variants:
            run_variant(name, seed, base)


if __name__ == "__main__":
    main()
