"""What a task is: queries, and a verifier for completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

SPLITS = ("train", "calibrate", "test")


@dataclass(frozen=True, slots=True)
class Query:
    """One problem.

    `prompt` is plain text; the chat template, if a model has one, is applied once by the engine's caller.
    `answer` is the gold answer, seen by verifiers only (never by a policy, Rubricor or Judge).
    `meta` is task specific and JSON serialisable.
    """

    id: str
    prompt: str
    answer: str
    task: str
    split: str = "test"
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Verdict on one completion.

    `steps` is one bool per reasoning step where the task can tell, else None.
    `error` names why an answer could not be judged ("no answer", "timeout"); such an outcome is incorrect.
    """

    correct: bool
    predicted: str | None = None
    steps: tuple[bool, ...] | None = None
    error: str = ""


class Task(Protocol):
    """A source of queries with a verifier. `name` is what `task.name` in a config selects."""

    name: str

    def queries(self, split: str, n: int | None = None, seed: int = 0) -> list[Query]:
        """The first `n` queries of a split (all if None), deterministic in (split, seed)."""
        ...

    def verify(self, query: Query, steps: Sequence[str]) -> Outcome:
        """Judge a completion given as the text of each step; `"".join(steps)` is the whole completion."""
        ...
