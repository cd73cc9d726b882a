"""Measure a smol pair: accuracy of both models by family of questions, and of their steps by kind.

    python -m roro_fast.eval.check_smol [--queries 200] [--split test] [--out FILE] [KEY=VALUE ...]
    python -m roro_fast.eval.check_smol --preset smol_gsm --tasks gym:gsm_symbolic,arithmetic,svamp.jsonl

Every answer is decoded greedily by the engine as the preset sets it up; "random" lets a coin choose the writer of every
step. Benchmark files are asked with `INSTRUCTION`, the last words of gsm_symbolic's questions, unless the configuration
has one.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from roro_fast.config_io import load_config
from roro_fast.engine import RoutingPolicy, Trajectory
from roro_fast.errors import ConfigError
from roro_fast.eval.sweep import Runner
from roro_fast.files import write_json
from roro_fast.routing import Constant, RandomRouter
from roro_fast.tasks.base import Query
from roro_fast.tasks.mixture import MIXTURES
from roro_fast.train.setup import Workbench

POLICIES: dict[str, RoutingPolicy] = {
    "small": Constant(0, "small"),
    "large": Constant(1, "large"),
    "random": RandomRouter(0.5),
}


INSTRUCTION = "Give the result as your final answer. Do not include units."


def measure(
    config: Sequence[str], split: str, queries: int, names: Sequence[str] = tuple(MIXTURES), preset: str = "smol"
) -> dict[str, Any]:
    """Figures of a preset under overrides, on `queries` questions per family of the mixtures or other tasks `names`."""
    labels = [Path(name).stem if is_file(name) else name for name in names]
    if len(set(labels)) < len(labels):
        raise ConfigError(f"--tasks: two of {', '.join(names)} would have one name; measure them apart")
    bench = Workbench(load_config(preset, config))
    e = bench.config.engine
    limits = {"max_new_tokens": e.max_new_tokens, "max_steps": e.max_steps}
    out: dict[str, Any] = {
        "preset": preset,
        "overrides": [*config],
        "split": split,
        "queries_per_family": queries,
        "layers": [m.config.num_layers for m in bench.models],
        "parameters": [m.config.num_params for m in bench.models],
        "dtype": bench.config.models.dtype,
        "torch": torch.__version__,
        "mixtures": {},
    }
    for name, label in zip(names, labels, strict=True):
        task = Workbench(load_config(bench.config, [f"task.name={name}"])).task
        asked = bench.asked(task.queries(split, queries * len(MIXTURES.get(name, [name])), bench.config.task.seed))
        prompts = [(q, bench.encode(q, INSTRUCTION if is_file(name) else "")) for q in asked]
        runner = Runner(bench.engine, task, prompts, limits)
        rows: dict[str, Any] = {}
        found: dict[str, list[Trajectory]] = {}
        for arm, policy in POLICIES.items():
            start = time.perf_counter()
            found[arm] = runner.trajectories(policy, arm)
            rows[arm] = summary(asked, found[arm]) | {"seconds": round(time.perf_counter() - start, 1)}
        both = Counter((bool(s.correct), bool(t.correct)) for s, t in zip(found["small"], found["large"], strict=True))
        rows["only_large_right"], rows["only_small_right"] = both[False, True], both[True, False]
        out["mixtures"][label] = rows
    return out


def is_file(task: str) -> bool:
    return task.endswith(".jsonl")


def summary(queries: Sequence[Query], answers: Sequence[Trajectory]) -> dict[str, Any]:
    """Accuracy in all and by family, mean tokens, and the error rate by kind of step where steps are verified."""
    families: dict[str, list[bool]] = defaultdict(list)
    wrong: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    for q, t in zip(queries, answers, strict=True):
        families[q.task].append(bool(t.correct))
        for text, right in zip(t.step_texts, t.step_correct or (), strict=False):
            seen[kind(text)] += 1
            wrong[kind(text)] += not right
    out: dict[str, Any] = {
        "n": len(answers),
        "accuracy": sum(bool(t.correct) for t in answers) / len(answers),
        "families": {f: {"n": len(v), "accuracy": sum(v) / len(v)} for f, v in sorted(families.items())},
        "tokens": sum(len(t.token_ids) for t in answers) / len(answers),
        "finish": dict(sorted(Counter(t.finish_reason for t in answers).items())),
    }
    if seen:
        out["step_errors"] = {k: {"n": n, "rate": round(wrong[k] / n, 4)} for k, n in sorted(seen.items())}
    return out


def kind(step: str) -> str:
    """What a written step does: "+", "-" or "*" by its first operator, "answer", or "other"."""
    body = step.partition(":")[2] or step
    if step.startswith("####"):
        return "answer"
    return next((sign for sign in "*+-" if f" {sign} " in body), "other")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a smol pair.")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes to the preset")
    parser.add_argument("--preset", default="smol")
    parser.add_argument("--tasks", default=",".join(MIXTURES), help="mixtures, gym tasks or benchmark files")
    parser.add_argument("--queries", type=int, default=200, help="per family")
    parser.add_argument("--split", default="test")
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    args = parser.parse_args()
    figures = measure(args.overrides, args.split, args.queries, args.tasks.split(","), args.preset)
    print(json.dumps(figures, indent=1))
    if args.out:
        write_json(args.out, figures)


if __name__ == "__main__":
    main()
