"""Trajectories for the rubric tests: ledger solutions with chosen writers, built without an engine."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from roro_fast.engine.trajectory import Cost, Decision, Step, Trajectory
from roro_fast.models import nano_tokenizer
from roro_fast.rubric.render import Pool
from roro_fast.tasks.base import Query
from roro_fast.tasks.ledger import Ledger, parse_query, render_steps

POOL = Pool(("small", "large"), (4_500, 243_136))


def tokenizer_at(directory: Path) -> Any:
    nano_tokenizer.save(directory)
    return AutoTokenizer.from_pretrained(directory)


def queries(n: int, split: str = "train") -> list[Query]:
    return Ledger().queries(split, n)


def trajectory(
    query: Query,
    models: list[int],
    *,
    correct: bool = True,
    confidence: list[float] | None = None,
    arm: str = "arm",
    sample: int = 0,
) -> Trajectory:
    """The query's solution with step i written by models[i]; each step has 8 tokens, the total 3."""
    texts = render_steps(*parse_query(query.prompt))
    assert len(models) == len(texts)
    steps, end = [], 0
    for i, m in enumerate(models):
        size = 3 if i == len(texts) - 1 else 8
        p = confidence[i] if confidence else 0.9
        steps.append(Step(end, end + size, m, math.log(p), 8 * math.log(p), 0.1, 0.1))
        end += size
    flops = sum(2.0 * POOL.params[s.model] * (s.end - s.start) for s in steps)
    decisions = [Decision(i, m, -0.1, [0.9, 0.1]) for i, m in enumerate(models)]
    return Trajectory(
        query_id=query.id,
        prompt_ids=[1],
        token_ids=list(range(end)),
        steps=steps,
        decisions=decisions,
        cost=Cost(generated_flops=flops),
        finish_reason="eos",
        arm=arm,
        sample=sample,
        step_texts=texts,
        correct=correct,
    )


def routed(query: Query, n: int, needed: set[int], seed: int = 0) -> list[Trajectory]:
    """All-small, all-large and n random routes; right exactly when the large model writes all `needed` steps."""
    rng = random.Random(f"{seed}/{query.id}")
    steps = len(parse_query(query.prompt)[1]) + 1
    confidence = [0.5 if i in needed else 0.99 for i in range(steps)]
    routes = [[0] * steps, [1] * steps] + [[rng.randrange(2) for _ in range(steps)] for _ in range(n)]
    arms = ["all_small", "all_large"] + ["random"] * n
    return [
        trajectory(query, r, correct=all(r[i] for i in needed), confidence=confidence, arm=arm, sample=i)
        for i, (r, arm) in enumerate(zip(routes, arms, strict=True))
    ]
