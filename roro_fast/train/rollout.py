"""Stream requests through the engine into a store: verified, deduplicated, resumable."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from roro_fast.engine import Request, RoutingPolicy, StepEngine, Trajectory
from roro_fast.runs import JsonlStore
from roro_fast.tasks.base import Query, Task

PER_ANSWER = ("accuracy", "generated_flops", "total_flops", "seconds", "tokens", "discarded")


class Progress(Protocol):
    """Told after each unit of work; `info` are figures worth showing beside the bar."""

    def __call__(self, done: int, total: int, **info: float) -> None: ...


def quiet(done: int, total: int, **info: float) -> None:
    """A Progress that shows nothing."""


@dataclass
class RolloutStats:
    """Counts over the trajectories of one stage, stored ones included."""

    trajectories: int = 0
    correct: int = 0
    tokens: int = 0
    new_tokens: int = 0
    seconds: float = 0.0
    by_arm: dict[str, list[float]] = field(default_factory=dict)  # arm -> [count, sums of `PER_ANSWER`]
    finish: Counter[str] = field(default_factory=Counter)

    def add(self, t: Trajectory, new: bool) -> None:
        self.trajectories += 1
        self.correct += bool(t.correct)
        self.tokens += len(t.token_ids)
        self.new_tokens += len(t.token_ids) * new
        self.finish[t.finish_reason] += 1
        c = t.cost
        row = self.by_arm.setdefault(t.arm, [0.0] * (1 + len(PER_ANSWER)))
        values = (bool(t.correct), c.generated_flops, c.total_flops, c.seconds, len(t.token_ids), c.discarded_tokens)
        for i, value in enumerate((1, *values)):
            row[i] += value

    @property
    def accuracy(self) -> float:
        return self.correct / self.trajectories if self.trajectories else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable summary; counts of the work itself, not of this session's speed."""
        return {
            "trajectories": self.trajectories,
            "accuracy": self.accuracy,
            "tokens": self.tokens,
            "finish": dict(sorted(self.finish.items())),
            "arms": {
                arm: {"trajectories": int(n), **{k: v / n for k, v in zip(PER_ANSWER, sums, strict=True)}}
                for arm, (n, *sums) in sorted(self.by_arm.items())
            },
        }


def reasoning_steps(trajectory: Trajectory) -> tuple[list[str], list[int]]:
    """(texts as the delimiter cuts them, which of them each step belongs to): a step cut short by its cap goes on."""
    texts: list[str] = []
    owner: list[int] = []
    closed = True
    for step, text in zip(trajectory.steps, trajectory.step_texts, strict=True):
        if closed:
            texts.append("")
        texts[-1] += text
        owner.append(len(texts) - 1)
        closed = step.closed
    return texts, owner


def verify(trajectory: Trajectory, query: Query, task: Task) -> Trajectory:
    """Fill `correct`, `step_correct` and `predicted` from the task's verdict."""
    texts, owner = reasoning_steps(trajectory)
    outcome = task.verify(query, texts)
    trajectory.correct = outcome.correct
    trajectory.step_correct = [outcome.steps[i] for i in owner] if outcome.steps is not None else None
    trajectory.predicted = outcome.predicted
    if outcome.error:
        trajectory.meta["verdict_error"] = outcome.error
    return trajectory


def finite(value: Any) -> Any:
    """`value` with every NaN and infinity replaced by None, which JSON can hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return value


def keep(store: JsonlStore, trajectory: Trajectory) -> None:
    """Store a trajectory; a NaN in it (the models' doing) is stored as null."""
    record = trajectory.to_dict()
    try:
        store.append(record)
    except ValueError:
        store.append(finite(record))


def stored(store: JsonlStore) -> Iterator[Trajectory]:
    """The trajectories of a store, in writing order."""
    return (Trajectory.from_dict(r) for r in store)


def roll_out(
    engine: StepEngine,
    task: Task,
    requests: Sequence[Request],
    store: JsonlStore,
    policy: RoutingPolicy | None = None,
    *,
    stats: RolloutStats | None = None,
    total: int | None = None,
    progress: Progress = quiet,
) -> RolloutStats:
    """Run every request that the store does not hold yet, storing each verified trajectory as it finishes.

    A request the engine must refuse (a prompt longer than the context) is stored as finish_reason "refused" and
    counted; the run goes on. Interrupting loses only what is in flight: what finished is flushed on the way out.
    `stats` goes on counting from an earlier call; `total` is what `progress` counts up to (default: these requests).
    """
    stats = RolloutStats() if stats is None else stats
    total = len(requests) if total is None else total
    wanted = {_key(r) for r in requests}
    for t in stored(store):
        if (t.query_id, t.arm, t.sample, t.seed) in wanted:
            stats.add(t, new=False)
    todo = [r for r in requests if _key(r) not in store]
    if todo and stats.trajectories:
        progress(stats.trajectories, total, accuracy=stats.accuracy)
    before, start = stats.seconds, time.perf_counter()
    with store:
        for t in _finished(engine, task, todo, policy):
            keep(store, t)
            stats.add(t, new=True)
            stats.seconds = before + time.perf_counter() - start
            progress(stats.trajectories, total, tok_s=stats.tokens_per_second, accuracy=stats.accuracy)
    return stats


def _finished(
    engine: StepEngine, task: Task, requests: Iterable[Request], policy: RoutingPolicy | None
) -> Iterator[Trajectory]:
    queries: dict[str, Query] = {}

    def noted() -> Iterator[Request]:
        for r in requests:
            assert r.query is not None
            queries[r.query.id] = r.query
            yield r

    for t in engine.rollout(noted(), policy, on_error="skip"):
        if t.finish_reason == "refused":
            t.correct = False
            yield t
        else:
            yield verify(t, queries[t.query_id], task)


def _key(r: Request) -> tuple[str, str, int, int]:
    assert r.query is not None
    return r.query.id, r.arm, r.sample, r.seed
