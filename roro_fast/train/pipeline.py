"""The stages of a run that end with a trained router; each reads and writes one run directory."""

from __future__ import annotations

import dataclasses
from typing import Any

from roro_fast.errors import DataError
from roro_fast.routing import PolicyNetwork
from roro_fast.routing.collect import FIRST_WAVE, SECOND_WAVE, first_wave, second_wave
from roro_fast.rubric.pair_files import save_pairs
from roro_fast.rubric.pairs import build_pairs
from roro_fast.runs import JsonlStore, RunDirectory
from roro_fast.train.context import Context
from roro_fast.train.rollout import RolloutStats, roll_out, stored

PAIRS = "pairs.jsonl"


def collect(ctx: Context) -> dict[str, Any]:
    """Roll out all collection arms over the first training queries, in two waves; resumes where the store stops."""
    c = ctx.config.collect
    queries = ctx.prompts(c.split, c.n_queries)
    limits = ctx.limits(c.temperature)
    num_models = len(ctx.bench.models)
    device = ctx.bench.models[0].device
    policy = PolicyNetwork.from_pretrained(c.policy).to(device) if "policy" in c.arms else None
    first = list(
        first_wave(
            queries,
            [a for a in c.arms if a in FIRST_WAVE],
            num_models=num_models,
            thresholds=c.thresholds,
            samples=c.samples,
            policy=policy,
            **limits,
        )
    )
    planned = [a for a in c.arms if a in SECOND_WAVE]
    per_query = sum(c.samples if a == "random_budget" else 1 for a in planned)
    total = len(first) + per_query * len(queries)
    store = ctx.run.store("collect")
    stats = RolloutStats()
    roll_out(ctx.bench.engine, ctx.bench.task, first, store, stats=stats, total=total, progress=ctx.progress)
    if planned:
        small = {t.query_id: t for t in stored(store) if t.arm == "all_small"}
        second = list(
            second_wave(
                queries,
                planned,
                small,
                num_models=num_models,
                samples=c.samples,
                **limits,
            )
        )
        roll_out(ctx.bench.engine, ctx.bench.task, second, store, stats=stats, total=total, progress=ctx.progress)
    return {**stats.to_dict(), "skipped_rows": list(getattr(ctx.bench.task, "skipped", ()))}


def pairs(ctx: Context) -> dict[str, Any]:
    """Build preference pairs from what was collected and write them to `pairs.jsonl`."""
    queries = {q.id: q for q in ctx.bench.queries(ctx.config.collect.split, ctx.config.collect.n_queries)}
    rolled = [t for t in stored(collected(ctx.run)) if t.finish_reason != "refused"]
    found, stats = build_pairs(queries, rolled, ctx.pool(), ctx.config.pairs, seed=ctx.config.run.seed)
    save_pairs(found, ctx.run.path / PAIRS)
    ctx.progress(stats.queries, stats.queries)
    if not found:
        raise DataError(
            f"{ctx.run.path / PAIRS}: none of {stats.queries} queries gave a pair ({stats.agreed_correct} all correct, "
            f"{stats.agreed_wrong} all wrong, {stats.ties} ties); raise collect.n_queries or choose a harder task"
        )
    return {"pairs": len(found), **dataclasses.asdict(stats)}


def collected(run: RunDirectory) -> JsonlStore:
    """The store of the collect stage."""
    return run.store("collect")
