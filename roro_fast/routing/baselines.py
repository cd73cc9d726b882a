"""Routing rules without learning, in the action space where their papers define them."""

from __future__ import annotations

import torch

from roro_fast.engine.policy import BoundaryBatch, Decisions
from roro_fast.errors import ConfigError
from roro_fast.tasks.base import Query, Task


def decisions(large: torch.Tensor, batch: BoundaryBatch, p_large: torch.Tensor | None = None) -> Decisions:
    """Actions 0 / K-1 from a bool [N]; `p_large` [N] is the probability of the large model (default: certain)."""
    p = large.float() if p_large is None else p_large
    probs = torch.zeros(len(batch), batch.num_models)
    probs[:, 0], probs[:, -1] = 1 - p, p
    actions = torch.where(large, batch.num_models - 1, 0)
    return Decisions(actions, probs.gather(1, actions[:, None]).squeeze(1).clamp_min(1e-12).log(), probs)


class Constant:
    """Every step by one model: all-small (0) or all-large (K - 1)."""

    action_space = "next"
    needs_scout = False

    def __init__(self, model: int, name: str) -> None:
        self.model, self.name = model, name

    def decide(self, batch: BoundaryBatch) -> Decisions:
        actions = torch.full((len(batch),), self.model)
        probs = torch.nn.functional.one_hot(actions, batch.num_models).float()
        return Decisions(actions, torch.zeros(len(batch)), probs)


class RandomRouter:
    """The large model with probability p, independently at every step."""

    needs_scout = False

    def __init__(self, p: float, action_space: str = "next") -> None:
        if not 0 <= p <= 1:
            raise ConfigError(f"random.p: {p} is not in [0, 1]")
        self.p, self.action_space, self.name = p, action_space, "random"

    def decide(self, batch: BoundaryBatch) -> Decisions:
        return decisions(batch.uniforms < self.p, batch, torch.full((len(batch),), self.p))


class ConfidenceThreshold:
    """TRIM-Thr (arXiv 2601.10245) with confidence in place of a process reward model.

    Regenerate the small model's draft iff its step score is below the threshold; the score is exp of the mean ("mean")
    or least ("min") token log-probability of the draft.
    """

    action_space = "regenerate"
    needs_scout = False
    step_tokens = 0
    name = "confidence"

    def __init__(self, threshold: float, score: str = "min") -> None:
        if score not in ("mean", "min"):
            raise ConfigError(f"confidence.score: {score!r}; use 'mean' or 'min'")
        self.threshold, self.of = threshold, score

    def score(self, batch: BoundaryBatch) -> torch.Tensor:
        return (batch.mean_logprob if self.of == "mean" else batch.min_logprob).exp()

    def decide(self, batch: BoundaryBatch) -> Decisions:
        return decisions(self.score(batch) < self.threshold, batch)

    def at(self, threshold: float) -> ConfidenceThreshold:
        """The same rule with another threshold."""
        return ConfidenceThreshold(threshold, self.of)


class Oracle:
    """Rewrite exactly the drafts that the task's verifier marks wrong: an upper bound, not a method."""

    action_space = "regenerate"
    needs_scout = False
    name = "oracle"

    def __init__(self, task: Task) -> None:
        self.task = task

    def decide(self, batch: BoundaryBatch) -> Decisions:
        wrong = [self._wrong(tag["query"], prefix()) for tag, prefix in zip(batch.tags, batch.prefix, strict=True)]
        return decisions(torch.tensor(wrong), batch)

    def _wrong(self, query: Query, steps: list[str]) -> bool:
        flags = self.task.verify(query, steps).steps
        if flags is None:
            raise ConfigError(f"eval.arms: 'oracle' needs a task that verifies steps; {self.task.name!r} does not")
        return not flags[-1]


class Scripted:
    """Follow a list of actions given with each request, tag["plan"]; model 0 beyond its end."""

    action_space = "next"
    needs_scout = False
    name = "scripted"

    def decide(self, batch: BoundaryBatch) -> Decisions:
        index = batch.step_index.tolist()
        plans = [tag["plan"] for tag in batch.tags]
        actions = torch.tensor([p[i] if i < len(p) else 0 for p, i in zip(plans, index, strict=True)])
        probs = torch.nn.functional.one_hot(actions, batch.num_models).float()
        return Decisions(actions, torch.zeros(len(batch)), probs)
