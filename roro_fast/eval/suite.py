"""`roro eval --suite`: the arms of a pool on every benchmark of a suite, measured the same way, in one table.

Under `<run>/suites/<suite>/` every benchmark has a folder with one file per operating point, so that an interrupted
suite goes on where it stopped. A benchmark that cannot be loaded is named in the result; the rest goes on.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from roro_fast.config import ORACLE_QUERY
from roro_fast.engine import RoutingPolicy
from roro_fast.errors import CheckpointError, ConfigError, DataError, RoroError
from roro_fast.eval.prices import price_table
from roro_fast.eval.records import best_of, load_points, save_points
from roro_fast.eval.stages import fitted
from roro_fast.eval.suite_table import Measured, document, markdown
from roro_fast.eval.sweep import Runner, at_bias
from roro_fast.files import read_json, write_json, write_text
from roro_fast.routing import ConfidenceThreshold, Constant, PolicyNetwork, RandomRouter
from roro_fast.tasks.base import Query
from roro_fast.tasks.suites import Entry, load_entry, suite
from roro_fast.train.context import Context

FOLDER = "suites"
_SETTINGS = (
    "run.seed", "task.seed", "task.timeout", "task.system", "task.instruction", "task.chat", "models.paths",
    "models.layers", "models.labels", "models.dtype", "models.prices", "models.read_prices", "engine.delimiter",
    "engine.max_new_tokens", "engine.max_steps", "engine.temperature", "engine.top_k", "engine.top_p",
    "projection.maps", "suite.data_dir", "suite.limit",
)  # fmt: skip


class Point(NamedTuple):
    """One operating point to measure; `stem` is the name of its file, `policy` makes its policy.

    Without a policy it is the best of all-small's and all-large's answers, which come before it.
    """

    arm: str
    knob: float
    stem: str
    policy: Callable[[], RoutingPolicy] | None


def evaluate_suite(ctx: Context, name: str, redo: Sequence[str] = ()) -> dict[str, Any]:
    """Measure what is missing of suite `name`, the benchmarks of `redo` anew; returns what `suite_<name>.json` holds.

    `suite_<name>.md` beside it is the same as a table.

    Raises:
        ConfigError: the suite, a benchmark of `redo` or a router does not exist, or settings changed since it began.
    """
    entries = suite(name)
    redo = [r.removeprefix(f"suite-{name}-") for r in redo]  # as messages about changed settings write them
    _check_names(redo, entries)
    points = list(operating_points(ctx))
    folder = ctx.run.path / FOLDER / name
    for entry in entries:
        if entry.name in redo:
            ctx.run.forget(_mark(name, entry))
            shutil.rmtree(folder / entry.name, ignore_errors=True)
        ctx.run.done(_mark(name, entry), _SETTINGS)  # refuses changed settings before anything is run
    todo = [p for p in points if not all((folder / e.name / f"{p.stem}.safetensors").is_file() for e in entries)]
    policies = {p.stem: p.policy() for p in todo if p.policy}  # an arm that cannot be fitted is no fault of a benchmark
    measured: dict[str, list[Measured]] = {}
    missing: dict[str, str] = {}
    for number, entry in enumerate(entries):
        progress = partial(_progress, ctx, number * len(points), len(entries) * len(points))
        try:
            with ctx.run.stage(_mark(name, entry), _SETTINGS):
                measured[entry.name] = benchmark(ctx, entry, points, policies, folder / entry.name, progress)
        except RoroError as e:
            missing[entry.name] = str(e)
    c = ctx.config
    result = document(name, measured, missing, resamples=c.eval.n_boot, seed=c.run.seed)
    result |= {"models": list(c.models.labels), "prices": list(c.models.prices), "limit": c.suite.limit}
    write_json(ctx.run.path / f"suite_{name}.json", result)
    write_text(ctx.run.path / f"suite_{name}.md", markdown(result))
    return result


def benchmark(
    ctx: Context,
    entry: Entry,
    points: Sequence[Point],
    policies: Mapping[str, RoutingPolicy],
    folder: Path,
    progress: Callable[[int], None],
) -> list[Measured]:
    """Every operating point on one benchmark, read back where it was measured; `policies` are those of the rest."""
    c = ctx.config
    task = load_entry(entry, c.suite.data_dir, c.task.timeout)
    queries = task.queries("test", c.suite.limit or entry.default_queries, c.task.seed)
    if not queries:
        raise DataError(f"{entry.name}: has no test queries; choose another source")
    folder.mkdir(parents=True, exist_ok=True)
    _same_queries(folder, queries, entry.name)
    prompts = [(q, ctx.bench.encode(q)) for q in ctx.bench.asked(queries)]
    limits = {k: v for k, v in ctx.limits(c.engine.temperature).items() if k != "seed"}
    runner = Runner(ctx.bench.engine, task, prompts, limits, prices=price_table(c.models))
    out: list[Measured] = []
    for i, p in enumerate(points):
        if p.policy is None:
            small, large = (next(m.point for m in out if m.point.arm == a) for a in ("all_small", "all_large"))
            out.append(Measured(best_of(small, large, p.arm), math.nan))
            continue
        path = folder / f"{p.stem}.safetensors"
        if not path.is_file():
            start = time.perf_counter()
            found = runner.run(p.arm, [(p.knob, policies[p.stem])], seed=c.run.seed)
            write_json(folder / f"{p.stem}.json", {"wall_seconds": time.perf_counter() - start})
            save_points(path, found)
        wall = folder / f"{p.stem}.json"
        seconds = read_json(wall)["wall_seconds"] if wall.is_file() else math.nan
        out.append(Measured(load_points(path)[0], seconds))
        progress(i + 1)
    return out


def operating_points(ctx: Context) -> Iterator[Point]:
    """What `suite.arms` and `suite.routers` stand for; baselines are fitted when one of their points has to run."""
    c, space = ctx.config, ctx.config.router.action_space
    last = len(c.models.paths) - 1
    for arm in sorted(c.suite.arms, key=lambda a: a == ORACLE_QUERY):
        if arm == ORACLE_QUERY:
            yield Point(arm, 0.0, arm, None)
        elif arm in ("all_small", "all_large"):
            yield Point(arm, 0.0, arm, lambda arm=arm: Constant(0 if arm == "all_small" else last, arm))  # type: ignore[misc]
        elif arm == "random":
            for p in c.suite.shares:
                yield Point(arm, p, f"random-{p:g}", lambda p=p: RandomRouter(p, space))  # type: ignore[misc]
        elif arm == "confidence":
            for t in c.suite.thresholds:
                yield Point(arm, t, f"confidence-{t:g}", lambda t=t: ConfidenceThreshold(t))  # type: ignore[misc]
        else:
            fit = cache(lambda arm=arm: dict(fitted(ctx, arm)))
            for b in c.eval.budgets:
                yield Point(arm, b, f"{arm}-{b:g}", lambda fit=fit, b=b: fit()[b])  # type: ignore[misc]
    names = Counter(Path(p).resolve().name for p in c.suite.routers)
    for router in c.suite.routers:
        name = Path(router).resolve().name
        yield from _router(ctx, Path(router), name if names[name] == 1 else router)


def _router(ctx: Context, path: Path, arm: str) -> Iterator[Point]:
    """A trained router at each budget it is calibrated for, or as it was trained when it is not."""
    policy = PolicyNetwork.from_pretrained(path).to(ctx.bench.models[0].device)
    config, models = policy.config, ctx.bench.models
    if config.num_models != len(models) or config.hidden_size not in (0, models[0].config.hidden_size):
        raise CheckpointError(
            f"suite.routers: {path} was trained for {config.num_models} models and hidden states of "
            f"{config.hidden_size}, this pool has {len(models)} and {models[0].config.hidden_size}; give one of its own"
        )
    weights = hashlib.sha256((path / "model.safetensors").read_bytes() + (path / "config.json").read_bytes())
    stem = f"{path.resolve().name}-{weights.hexdigest()[:8]}"
    budgets = ctx.config.eval.budgets if config.calibration else [1.0]
    biases = policy.budget_bias(torch.tensor(budgets)).tolist()
    for budget, bias in zip(budgets, biases, strict=True):
        yield Point(arm, budget, f"{stem}-{budget:g}", lambda bias=bias: at_bias(policy, bias))  # type: ignore[misc]


def _progress(ctx: Context, before: int, total: int, done: int) -> None:
    ctx.progress(before + done, total)


def _mark(name: str, entry: Entry) -> str:
    return f"suite-{name}-{entry.name}"


def _check_names(redo: Sequence[str], entries: Sequence[Entry]) -> None:
    names = [e.name for e in entries]
    for name in redo:
        if name not in names:
            raise ConfigError(f"--redo: {name!r} is not a benchmark of this suite; choose one of {', '.join(names)}")


def _same_queries(folder: Path, queries: Sequence[Query], name: str) -> None:
    """Refuse to add to results that other queries gave."""
    text = json.dumps([[q.id, q.prompt, q.answer] for q in queries])
    digest = {"queries": len(queries), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    path = folder / "queries.json"
    if path.is_file() and read_json(path) != digest:
        raise DataError(f"{name}: its queries changed since it was begun; measure it anew with --redo {name}")
    write_json(path, digest)
