"""Measure the nano pair against its required shape and say PASS or FAIL per requirement.

    python -m roro_fast.eval.check_nano [--queries 1000] [--small DIR] [--large DIR] [--out FILE]

Every answer is decoded greedily by the engine; the oracle's really switch models on the shared prefix.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from roro_fast.engine import RoutingPolicy, StepEngine, Trajectory
from roro_fast.eval.sweep import Runner
from roro_fast.files import write_json
from roro_fast.models import nano
from roro_fast.models.decoder import Decoder
from roro_fast.models.loading import load_decoder
from roro_fast.routing import Constant, Oracle
from roro_fast.tasks.base import Query
from roro_fast.tasks.ledger import KINDS, Ledger

LIMITS = {"max_new_tokens": 128, "max_steps": 16}


def accuracy(trajectories: Sequence[Trajectory]) -> float:
    return sum(bool(t.correct) for t in trajectories) / len(trajectories)


def step_errors(queries: Sequence[Query], trajectories: Sequence[Trajectory]) -> dict[str, tuple[float, int]]:
    """(share of locally wrong steps, steps) per kind; "total" is the last step."""
    wrong: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for q, t in zip(queries, trajectories, strict=True):
        for kind, right in zip([*q.meta["kinds"], "total"], t.step_correct or (), strict=False):
            count[kind] += 1
            wrong[kind] += not right
    return {k: (wrong[k] / count[k], count[k]) for k in [*(k.name for k in KINDS), "total"] if count[k]}


def measure(models: list[Decoder], queries: list[Query]) -> dict[str, Any]:
    """All required figures of a [small, large] pool, and under "checks" name -> (figure as text, passed)."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(nano.path("small"))
    task = Ledger()
    prompts = [(q, tokenizer(q.prompt)["input_ids"]) for q in queries]
    runner = Runner(StepEngine(models, tokenizer), task, prompts, LIMITS)
    policies: dict[str, RoutingPolicy] = {
        "small": Constant(0, "small"),
        "large": Constant(1, "large"),
        "oracle": Oracle(task),
    }
    runs = {name: runner.trajectories(policy, name) for name, policy in policies.items()}
    acc = {name: accuracy(ts) for name, ts in runs.items()}
    cost = {name: sum(t.cost.generated_flops for t in ts) for name, ts in runs.items()}
    errors = {name: step_errors(queries, runs[name]) for name in ("small", "large")}
    rates = [rate for kind, rate in errors["small"].items() if kind != "total"]
    lowest, count = min(rates)
    span = max(rates)[0] / max(lowest, 1 / count)  # no error seen: at most one in `count`
    share = cost["oracle"] / cost["large"]
    drafts = sum(t.cost.discarded_tokens for t in runs["oracle"]) * 2.0 * models[0].config.num_params
    escalated = [m for t in runs["oracle"] for m in t.models]
    relative = acc["oracle"] / acc["large"] if acc["large"] else 0.0
    return {
        "queries": len(queries),
        "parameters": [m.config.num_params for m in models],
        "accuracy": acc,
        "step_errors": {name: {k: round(e, 4) for k, (e, _) in v.items()} for name, v in errors.items()},
        "small_error_span": span,
        "oracle_relative_accuracy": relative,
        "oracle_flops_share": share,
        "oracle_flops_share_with_drafts": share + drafts / cost["large"],
        "oracle_escalated_steps": sum(escalated) / len(escalated),
        "checks": {
            "large accuracy >= 90 %": (f"{acc['large']:.1%}", acc["large"] >= 0.90),
            "small accuracy in 30-65 %": (f"{acc['small']:.1%}", 0.30 <= acc["small"] <= 0.65),
            "small error span over kinds >= 5x": (f"{span:.1f}x", span >= 5),
            "oracle accuracy >= 97 % of large": (f"{relative:.1%}", relative >= 0.97),
            "oracle FLOPs <= 45 % of large": (f"{share:.1%}", share <= 0.45),
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Check the nano pair on the test split of the ledger task.")
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--split", default="test")
    parser.add_argument("--small", type=Path, default=nano.path("small"))
    parser.add_argument("--large", type=Path, default=nano.path("large"))
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)  # two threads on matrices this small only wait for each other
    models = [load_decoder(args.small), load_decoder(args.large)]
    figures = measure(models, Ledger().queries(args.split, args.queries))
    checks = figures["checks"]
    for key, value in figures.items():
        if key != "checks":
            print(f"{key}: {json.dumps(value)}")
    for name, (value, passed) in checks.items():
        print(f"{'PASS' if passed else 'FAIL'}  {name}: {value}")
    if args.out:
        write_json(args.out, figures)
    return 0 if all(passed for _, passed in checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
