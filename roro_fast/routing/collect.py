"""Trajectory collection: diverse really-routed answers per query (METHOD.md section 3).

Two waves. The first has the arms that need nothing; the second plans its escalations from the recorded small-model
confidences of the all-small answer: around its sharpest drop (critical), away from it (anti-critical), or at random.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence

from roro_fast.engine.policy import RoutingPolicy
from roro_fast.engine.request import Request
from roro_fast.engine.trajectory import Trajectory
from roro_fast.routing.baselines import ConfidenceThreshold, Constant, Scripted
from roro_fast.tasks.base import Query

FIRST_WAVE = ("all_small", "all_large", "confidence", "policy")
SECOND_WAVE = ("random_budget", "critical", "anti_critical")


def confidences(all_small: Trajectory) -> list[float]:
    """exp(mean token log-prob) of each step."""
    return [math.exp(s.mean_logprob) for s in all_small.steps]


def critical_step(confidence: Sequence[float]) -> int:
    """Index of the step at which confidence drops most from the step before it (from 1 before the first)."""
    before = [1.0, *confidence]
    drops = [a - b for a, b in zip(before, confidence, strict=False)]
    return max(range(len(drops)), key=drops.__getitem__)


def first_wave(
    queries: Sequence[tuple[Query, list[int]]],
    arms: Sequence[str],
    *,
    num_models: int,
    thresholds: Sequence[float],
    samples: int = 1,
    policy: RoutingPolicy | None = None,
    **limits: float,
) -> Iterator[Request]:
    """Requests of the arms that need no earlier answer; `queries` pairs each query with its prompt ids."""
    policies: list[tuple[str, RoutingPolicy, int]] = []
    for arm in arms:
        if arm == "all_small":
            policies.append((arm, Constant(0, arm), 1))
        elif arm == "all_large":
            policies.append((arm, Constant(num_models - 1, arm), 1))
        elif arm == "confidence":
            policies += [(f"confidence@{t:g}", ConfidenceThreshold(t), 1) for t in thresholds]
        elif arm == "policy" and policy is not None:
            policies.append((arm, policy, samples))
    for query, ids in queries:
        for arm, p, n in policies:
            for j in range(n):
                yield Request(ids, query=query, arm=arm, policy=p, sample=j, **limits)  # type: ignore[arg-type]


def second_wave(
    queries: Sequence[tuple[Query, list[int]]],
    arms: Sequence[str],
    all_small: dict[str, Trajectory],
    *,
    num_models: int,
    samples: int = 1,
    seed: int = 0,
    **limits: float,
) -> Iterator[Request]:
    """Requests whose escalations are planned from each query's all-small answer; queries without one are left out."""
    script = Scripted()
    for query, ids in queries:
        base = all_small.get(query.id)
        if base is None or not base.steps:
            continue
        rng = random.Random(f"{seed}/{query.id}")
        n = len(base.steps)
        at = critical_step(confidences(base))
        window = {i for i in (at - 1, at, at + 1) if 0 <= i < n}
        for arm in arms:
            for j in range(samples if arm == "random_budget" else 1):
                if arm == "random_budget":
                    chosen = set(rng.sample(range(n), rng.randint(1, max(1, n // 2))))
                elif arm == "critical":
                    chosen = window
                elif arm == "anti_critical":
                    rest = [i for i in range(n) if i not in window]
                    chosen = set(rng.sample(rest, min(len(window), len(rest))))
                else:
                    continue
                plan = [num_models - 1 if i in chosen else 0 for i in range(n)]
                yield Request(ids, query=query, arm=arm, policy=script, sample=j, tag={"plan": plan}, **limits)  # type: ignore[arg-type]
