"""The published baselines on the nano pair: one engine, one cost accounting, several seeds, one test split.

    python -m bench.studies.baselines_study                # 10 seeds, bench/results/baselines_nano.json; resumable
    python -m bench.studies.baselines_study --arms r2r rsd --seeds 0 --queries 40 --out /tmp/some.json

A seed draws the train queries that a baseline is fitted on, the calibrate queries that set its thresholds, and the
random numbers of its training. The test queries are the same for all; nothing is chosen on them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench.studies import points
from roro_fast.config import BASELINE_ARMS, Config, choose_all
from roro_fast.config_io import load_config
from roro_fast.eval.baselines import BUILDERS, Fitting
from roro_fast.eval.records import PointResult
from roro_fast.eval.study import build_study
from roro_fast.eval.sweep import Runner, baseline_settings
from roro_fast.files import write_json
from roro_fast.routing import ConfidenceThreshold
from roro_fast.runs.meta import provenance
from roro_fast.train.setup import Workbench

ANCHORS = ("all_small", "all_large")
PLAIN = ("random", "confidence", "oracle")
DETERMINISTIC = (*ANCHORS, "oracle", "oracle_next")  # one seed stands for all
REFERENCES = ("random", "confidence", "trim_thr")
TRAIN, CALIBRATE = 200, 60
RESULT = Path(__file__).parents[1] / "results" / "baselines_nano.json"
ROOT = Path("runs/baselines_study")
console = Console(stderr=True)


def runner(bench: Workbench, split: str, n: int, seed: int) -> Runner:
    e = bench.config.engine
    prompts = [(q, bench.encode(q)) for q in bench.task.queries(split, n, seed)]
    return Runner(bench.engine, bench.task, prompts, {"max_new_tokens": e.max_new_tokens, "max_steps": e.max_steps})


def measure(bench: Workbench, arm: str, seed: int, fitting: Fitting, test: Runner) -> list[PointResult]:
    """Operating points of one arm on the test queries."""
    if arm == "confidence":  # brought to the same budgets as the others, instead of a fixed grid
        settings = fitting.at_budgets(ConfidenceThreshold(0.5))
    elif arm in BUILDERS:
        settings = BUILDERS[arm](fitting)
    else:
        settings = baseline_settings(arm, bench.task, len(bench.models), "regenerate")
    return test.run(arm, settings, seed=seed)


def run(config: Config, arms: list[str], seeds: list[int], folder: Path) -> list[PointResult]:
    """All points, those found in `folder` read back."""
    bench = Workbench(config)
    test = runner(bench, "test", config.task.n_test, config.task.seed)
    out: list[PointResult] = []
    for seed in seeds:
        drawn = 1000 + seed
        splits = runner(bench, "train", TRAIN, drawn), runner(bench, "calibrate", CALIBRATE, drawn)
        fitting = Fitting(bench, *splits, config.eval.budgets, seed, config.eval.fit_steps)
        for arm in arms:
            if arm in DETERMINISTIC and seed != seeds[0]:
                continue
            path = folder / f"{arm}-{seed}.safetensors"
            points.once(path, partial(measure, bench, arm, seed, fitting, test), console)
            out += points.gather([path])
    return out


def summary(study: dict[str, Any]) -> dict[str, Any]:
    """The figures of the table, and per reference the arms whose area is not established to differ from its."""
    table = {a: {k: m[k]["mean"] for k in ("area", "area_total", "acc_at_60")} for a, m in study["arms"].items() if m}
    null = {
        reference: sorted(a for a, d in found.items() if d["area"]["lo"] <= 0 <= d["area"]["hi"])
        for reference, found in study["differences"].items()
    }
    return {"arms": table, "not_established": null}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="*", default=list(BASELINE_ARMS))
    parser.add_argument("--seeds", type=int, nargs="*", default=list(range(10)))
    parser.add_argument("--queries", type=int, default=150, help="of the test split")
    parser.add_argument("--resamples", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    choose_all(args.arms, "--arms", BASELINE_ARMS)
    torch.set_num_threads(1)
    overrides = ["task.seed=1", f"task.n_test={args.queries}", "eval.budgets=[0.15,0.2,0.25,0.3,0.35,0.4,0.5,0.6,0.8]"]
    config = load_config("nano", overrides)
    arms = [*ANCHORS, *PLAIN, *args.arms]
    found = run(config, arms, args.seeds, ROOT / f"q{args.queries}")
    meta = {
        "command": "python -m bench.studies.baselines_study",
        "config": dataclasses.asdict(config),
        "fitting": {"train": TRAIN, "calibrate": CALIBRATE, "ppo_steps": config.eval.fit_steps},
        "versions": provenance(),
    }
    study = build_study(found, meta=meta, references=REFERENCES, resamples=args.resamples)
    write_json(args.out, study)
    print(json.dumps(summary(study)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
