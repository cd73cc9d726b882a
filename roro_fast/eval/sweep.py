"""Operating points: really roll out every arm at every setting of its knob, and calibrate a learned router's budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from roro_fast.engine import Request, RoutingPolicy, StepEngine, Trajectory
from roro_fast.eval.prices import Prices
from roro_fast.eval.records import PointResult
from roro_fast.routing import ConfidenceThreshold, Constant, Oracle, PolicyNetwork, RandomRouter
from roro_fast.routing.calibrate import fit_biases
from roro_fast.routing.scoring import METER, charge, meter
from roro_fast.tasks.base import Query, Task
from roro_fast.train.rollout import verify

Prompts = Sequence[tuple[Query, list[int]]]
Setting = tuple[float, RoutingPolicy]
RANDOM = tuple(round(0.1 * i, 1) for i in range(1, 10))
THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.99, 0.999)


@dataclass
class Runner:
    """An engine, a task and the queries of one split; counts finished trajectories through `on_finish`."""

    engine: StepEngine
    task: Task
    prompts: Prompts
    limits: dict[str, Any]
    on_finish: Callable[[Trajectory], None] | None = None
    prices: Prices | None = None

    def run(self, arm: str, settings: Sequence[Setting], seed: int = 0, samples: int = 1) -> list[PointResult]:
        """One PointResult per setting; all settings share the engine's batch."""
        groups: list[list[Trajectory]] = [[] for _ in settings]
        queries = {q.id: q for q, _ in self.prompts}
        for t in self.engine.rollout(self._requests(arm, settings, seed, samples)):
            groups[t.meta["setting"]].append(charge(verify(t, queries[t.query_id], self.task)))
            if self.prices is not None:
                t.cost.price = self.prices.of(t.cost)
            if self.on_finish is not None:
                self.on_finish(t)
        ids = [q.id for q, _ in self.prompts]
        return [
            PointResult.from_trajectories(g, arm=arm, knob=knob, seed=seed, query_ids=ids)
            for (knob, _), g in zip(settings, groups, strict=True)
        ]

    def _requests(self, arm: str, settings: Sequence[Setting], seed: int, samples: int) -> Iterable[Request]:
        for i, (_, policy) in enumerate(settings):
            limits = {**self.limits, **step_limits(policy, self.limits)}
            for at, (q, ids) in enumerate(self.prompts):
                for j in range(samples):
                    tag = {"setting": i, METER: meter()}
                    key = (seed << 20) + at
                    yield Request(ids, query=q, arm=arm, policy=policy, sample=j, tag=tag, **{**limits, "seed": key})

    def trajectories(self, policy: RoutingPolicy, arm: str, seed: int = 0) -> list[Trajectory]:
        """Verified answers of one setting, in query order."""
        queries = {q.id: q for q, _ in self.prompts}
        found = {t.query_id: t for t in self.engine.rollout(self._requests(arm, [(0.0, policy)], seed, 1))}
        return [charge(verify(found[q.id], queries[q.id], self.task)) for q, _ in self.prompts]


def step_limits(policy: RoutingPolicy, limits: dict[str, Any]) -> dict[str, Any]:
    """Request fields of a policy that decides about steps of its own size, such as single tokens."""
    size = getattr(policy, "step_tokens", 0)
    return {"max_step_tokens": size, "max_steps": limits["max_new_tokens"]} if size else {}


def baseline_settings(arm: str, task: Task, num_models: int, action_space: str = "next") -> list[Setting]:
    """Operating points of an arm that needs no training."""
    if arm == "all_small":
        return [(0.0, Constant(0, arm))]
    if arm == "all_large":
        return [(0.0, Constant(num_models - 1, arm))]
    if arm == "random":
        return [(p, RandomRouter(p, action_space)) for p in RANDOM]
    if arm == "confidence":
        return [(t, ConfidenceThreshold(t)) for t in THRESHOLDS]
    if arm == "oracle":
        return [(0.0, Oracle(task))]
    raise KeyError(arm)


def learned_settings(policy: PolicyNetwork, biases: Iterable[float]) -> list[Setting]:
    """The router at several biases of model 0, deciding greedily."""
    return [(float(b), at_bias(policy, float(b))) for b in biases]


def at_bias(policy: PolicyNetwork, bias: float, temperature: float = 0.0) -> PolicyNetwork:
    """A view of `policy` that shares its weights and decides with this bias and temperature."""
    view = PolicyNetwork(policy.config, temperature=temperature, bias=bias)
    for name, tensor in (*policy.named_parameters(), *policy.named_buffers()):
        setattr(view, name, tensor)
    return view


def calibrate(
    policy: PolicyNetwork, runner: Runner, all_large: dict[str, float], budgets: Sequence[float]
) -> list[tuple[float, float]]:
    """Fit `policy.config.calibration` on the runner's queries; returns the measured (bias, cost share) sweep."""

    def costs_at(biases: list[float]) -> list[float]:
        large = np.array([all_large[q.id] for q, _ in runner.prompts])
        points = runner.run("calibrate", learned_settings(policy, biases))
        return [float((p.generated_flops / large).mean()) for p in points]

    unbiased = runner.trajectories(at_bias(policy, 0.0), "calibrate")
    probs = np.array([d.probs for t in unbiased for d in t.decisions]).clip(1e-9)
    margins = np.log(probs[:, 1:].sum(1)) - np.log(probs[:, 0])
    policy.config.calibration, sweep = fit_biases(margins, costs_at, budgets)
    return sweep
