"""Records for the evaluation tests: operating points with a known truth, and ledger answers written step by step."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable

import numpy as np

from roro_fast.engine.trajectory import Cost, Decision, Step, Trajectory
from roro_fast.eval.metrics import Evaluation
from roro_fast.eval.records import PointResult
from roro_fast.eval.report_data import Curve, JudgeRound, PairStats, ReportData
from roro_fast.eval.viewer import ViewTrajectory, view_trajectory
from roro_fast.rubric.format import Criterion, Rubric
from roro_fast.tasks.base import Query
from roro_fast.tasks.ledger import Ledger, parse_query

TOKENS = 20.0
PARAMS = (20_000, 200_000)


def point(
    arm: str,
    correct: Iterable[float],
    share: float | Iterable[float],
    *,
    knob: float = 0.0,
    seed: int = 0,
    total: float | None = None,
    large: float | None = None,
) -> PointResult:
    """A point of generated cost `share` x 100 FLOPs per query; the large-token share is (share - 0.1) / 0.9."""
    right = np.asarray(list(correct), dtype=float)
    one = np.ones(len(right))
    cost = one * np.asarray(share)
    part = np.clip((cost - 0.1) / 0.9, 0, 1) if large is None else one * large
    return PointResult(
        arm=arm,
        knob=knob,
        seed=seed,
        query_ids=tuple(f"q{i}" for i in range(len(right))),
        correct=right,
        generated_flops=100 * cost,
        total_flops=120 * (cost if total is None else one * total),
        seconds=0.01 + 0.05 * cost,
        large_tokens=TOKENS * part,
        tokens=TOKENS * one,
        discarded=2 * one,
        decisions=5 * one,
        routing_seconds=5e-5 * one,
    )


def anchors(n: int, small: float = 0.5, large: float = 0.9) -> list[PointResult]:
    """all_small right on the first `small` share of n queries at cost 0.1, all_large on the first `large` at cost 1."""
    i = np.arange(n) / n
    return [point("all_small", i < small, 0.1, large=0.0), point("all_large", i < large, 1.0, large=1.0)]


def noisy_arm(
    arm: str, power: float, n: int, seeds: int = 5, knobs: Iterable[float] = (0.2, 0.4, 0.6, 0.8)
) -> list[PointResult]:
    """A router that at large-token share k recovers k ** power of the gap; smaller powers are better routers."""
    out = []
    for seed in range(seeds):
        luck = np.random.default_rng([seed, 7]).normal(0, 0.02)
        for k in knobs:
            rng = np.random.default_rng([seed, int(1000 * k), sum(map(ord, arm))])
            right = rng.random(n) < 0.5 + 0.4 * k ** (power + luck)
            out.append(point(arm, right, 0.1 + 0.9 * k, knob=k, seed=seed))
    return out


def study(n: int = 200, seeds: int = 5) -> list[PointResult]:
    """All arms of a study."""
    rng = np.random.default_rng(0)
    out = [
        point("all_small", rng.random(n) < 0.5, 0.1, large=0.0),
        point("all_large", rng.random(n) < 0.95, 1.0, large=1.0),
    ]
    powers = {"random": 1.0, "confidence": 0.6, "oracle": 0.12, "outcome_only": 0.45, "roro": 0.3}
    powers |= {"fixed_rubric": 0.4, "random_rubric": 0.48, "shuffled": 0.46, "formula": 0.42, "rubricor_first": 0.33}
    for arm, power in powers.items():
        out += noisy_arm(arm, power, n, seeds)
    return out


def trajectory(
    query: Query, arm: str, models: list[int], slip: int | None = None, regenerate: bool = False
) -> Trajectory:
    """A ledger answer whose step `slip` is wrong by one, later steps following it; step i is by models[i % len]."""
    value, lines = parse_query(query.prompt)
    texts = []
    for i, line in enumerate(lines):
        after = (line.kind.apply(value, line.operand) + (i == slip)) % 100
        texts.append(f" {line}: {value} gives {after} #{i + 1}\n\n")
        value = after
    texts.append(f" Total {(value + (slip == len(lines))) % 100}")
    rng = random.Random(f"{query.id}{arm}")
    steps, decisions, at = [], [], 0
    for i, text in enumerate(texts):
        n, m = len(text.split()) + 2, models[i % len(models)]
        mean = -rng.uniform(0.001, 0.4)
        steps.append(Step(at, at + n, m, mean, 3 * mean, rng.uniform(0, 1), rng.uniform(0, 0.5)))
        p = rng.uniform(0.5, 0.99)
        probs = [p, 1 - p] if m == 0 else [1 - p, p]
        decisions.append(Decision(i, m, math.log(probs[m]), probs, "regenerate" if regenerate else "next"))
        at += n
    tokens = [sum(s.end - s.start for s in steps if s.model == m) for m in (0, 1)]
    generated = sum(2.0 * n * p for n, p in zip(tokens, PARAMS, strict=True))
    t = Trajectory(
        query_id=query.id,
        prompt_ids=list(range(12)),
        token_ids=list(range(at)),
        steps=steps,
        decisions=decisions,
        cost=Cost(generated, 1.4 * generated, 0.02, tokens, [at + 12, tokens[1] + 12], 9 if regenerate else 0),
        finish_reason="eos",
        arm=arm,
        action_space="regenerate" if regenerate else "next",
        step_texts=texts,
    )
    outcome = Ledger().verify(query, texts)
    t.correct, t.predicted, t.step_correct = outcome.correct, outcome.predicted, list(outcome.steps or ())
    return t


RUBRIC = Rubric(
    (
        Criterion("Hard Rule", "timely escalation", "the large model writes every swaps line"),
        Criterion("Principle", "effective recovery", "the small model takes over after line #3"),
        Criterion("Principle", "efficient allocation", "at most 2 switches"),
    )
)


def views(n: int = 4) -> list[ViewTrajectory]:
    """Answers to n ledger queries by four arms, with rubrics on the routed ones."""
    out = []
    for query in Ledger().queries("test", n):
        large = trajectory(query, "all_large", [1])
        arms = [large, trajectory(query, "all_small", [0], slip=1), trajectory(query, "roro", [0, 1, 0])]
        arms.append(trajectory(query, "confidence", [0, 0, 1], slip=2, regenerate=True))
        for t in arms:
            routed = t.arm == "roro"
            out.append(
                view_trajectory(
                    t,
                    query=query.prompt,
                    answer=query.answer,
                    flops_per_token=[2.0 * p for p in PARAMS],
                    knob=0.4 if routed else math.nan,
                    large_flops=large.cost.generated_flops,
                    rubric=RUBRIC if routed else None,
                    p_true=[0.93, 0.41, 0.77] if routed else (),
                    score=0.49 if routed else math.nan,
                )
            )
    return out


def report_data() -> ReportData:
    """A full report: every section has something to show."""
    e = Evaluation(study(), resamples=300).summary(against=["roro", "outcome_only"], task="ledger", split="test")
    e.differences += Evaluation(study(), resamples=300).summary(against=["confidence"]).differences
    steps = list(range(0, 61, 5))
    rng = np.random.default_rng(1)
    curves = []
    for arm, best in (("roro", 0.93), ("outcome_only", 0.9)):
        for seed in range(3):
            noise = lambda scale: rng.normal(0, scale, len(steps))  # noqa: E731
            rise = 1 - np.exp(-np.array(steps) / 15)
            series = {
                "outcome_reward": 0.6 + (best - 0.6) * rise + noise(0.01),
                "process_reward": -0.1 + 0.5 * rise * (arm == "roro") + noise(0.02),
                "cost": 0.55 - 0.15 * rise + noise(0.01),
                "entropy": 0.69 - 0.4 * rise + noise(0.01),
                "kl": 0.01 * rise + np.abs(noise(0.002)),
            }
            curves += [Curve(arm, seed, m, [float(s) for s in steps], v.tolist()) for m, v in series.items()]
    judge = [JudgeRound(r, 0.62 + 0.07 * r - 0.01 * s, 240, seed=s) for s in range(3) for r in range(4)]
    return ReportData(
        title="nano on ledger",
        created="2026-01-01 12:00 UTC",
        evaluation=e,
        curves=curves,
        judge=judge,
        pairs=PairStats({"outcome": 412, "cost": 655, "process quality": 133}, 200, 1800, 31),
        trajectories=views(),
        provenance={"config": "run:\n  name: nano\n  seed: 0\n", "versions": "torch 2.13.0\nroro_fast 0.1.0"},
    )
