"""The oracle of the "next" action space: it tries out what the small model would write before it decides."""

from __future__ import annotations

from collections.abc import Callable

import torch

from roro_fast.engine import Request, StepEngine
from roro_fast.engine.policy import BoundaryBatch, Decisions
from roro_fast.errors import ConfigError
from roro_fast.routing.baselines import decisions
from roro_fast.tasks.base import Query, Task


class OracleNext:
    """Large model exactly where the small one, writing greedily, would go wrong: an upper bound, not a method.

    `engine` holds the small model alone; its trials are not charged, as no router could make them. `encode` gives the
    prompt ids of a query, `max_step_tokens` caps a trial.
    """

    action_space = "next"
    needs_scout = False
    name = "oracle_next"

    def __init__(
        self, task: Task, engine: StepEngine, encode: Callable[[Query], list[int]], max_step_tokens: int = 256
    ) -> None:
        self.task, self.engine, self.encode, self.max_step_tokens = task, engine, encode, max_step_tokens

    def decide(self, batch: BoundaryBatch) -> Decisions:
        steps = [prefix() for prefix in batch.prefix]
        requests = []
        for i, (tag, so_far) in enumerate(zip(batch.tags, steps, strict=True)):
            written = self.engine.tokenizer("".join(so_far), add_special_tokens=False)["input_ids"]
            ids = [*self.encode(tag["query"]), *written]
            room = min(self.max_step_tokens, self.engine.max_len - len(ids))
            requests.append(Request(ids, max_new_tokens=room, max_steps=1, tag={"row": i}))
        wrong = torch.zeros(len(batch), dtype=torch.bool)
        for t in self.engine.rollout(requests):
            i = t.meta["row"]
            flags = self.task.verify(batch.tags[i]["query"], [*steps[i], *t.step_texts]).steps
            if flags is None:
                raise ConfigError(f"eval.arms: {self.name!r} needs a task that verifies steps, not {self.task.name!r}")
            wrong[i] = not flags[-1]
        return decisions(wrong, batch)
