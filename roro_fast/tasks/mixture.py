"""Several tasks drawn in turn as one: the smol tier's arithmetic, and two families that its models never saw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from roro_fast.tasks.base import Outcome, Query
from roro_fast.tasks.benchmarks import ANSWER_SECONDS
from roro_fast.tasks.gym import Gym
from roro_fast.tasks.worked import PLANS, check_steps, results

# name -> reasoning-gym tasks with their options
MIXTURES: dict[str, Mapping[str, Mapping[str, Any]]] = {
    "arithmetic": {
        "chain_sum": {"min_terms": 3, "max_terms": 4, "min_digits": 1, "max_digits": 2},
        "leg_counting": {"min_animals": 2, "max_animals": 3, "min_instances": 1, "max_instances": 9},
    },
    "arithmetic_held_out": {
        "basic_arithmetic": {
            "min_terms": 3, "max_terms": 4, "min_digits": 1, "max_digits": 2, "operators": ["+", "-", "*"],
            "allow_parentheses": False, "allow_negation": False,
        },
        "decimal_chain_sum": {
            "min_terms": 2, "max_terms": 4, "min_digits": 1, "max_digits": 1, "min_decimal_places": 1,
            "max_decimal_places": 1,
        },
    },
}  # fmt: skip


RANGE = range(200)  # of the results in a worked solution of chain_sum; other questions are passed over


class Bounded(Gym):
    """A gym task with only those questions whose worked solution stays within `RANGE`."""

    def queries(self, split: str, n: int | None = None, seed: int = 0) -> list[Query]:
        want = 1000 if n is None else n
        drawn = 4 * want
        while True:
            kept = [q for q in super().queries(split, drawn, seed) if set(results(self.task, q.prompt)) <= set(RANGE)]
            if len(kept) >= want:
                return kept[:want]
            drawn *= 2


class Mixture:
    """Query i comes from part i modulo the number of parts, and keeps that part's name in `Query.task`."""

    def __init__(self, name: str, timeout: float = ANSWER_SECONDS) -> None:
        self.name = name
        self.parts = [
            (Bounded if task == "chain_sum" else Gym)(task, timeout, **options)
            for task, options in MIXTURES[name].items()
        ]

    def queries(self, split: str, n: int | None = None, seed: int = 0) -> list[Query]:
        """The first `n` (1000 if None) queries of a split."""
        want, k = 1000 if n is None else n, len(self.parts)
        drawn = [iter(part.queries(split, (want - i + k - 1) // k, seed)) for i, part in enumerate(self.parts)]
        return [next(drawn[i % k]) for i in range(want)]

    def verify(self, query: Query, steps: Sequence[str]) -> Outcome:
        """The part's own verdict, with one per step where the task has a plan (`tasks.worked`)."""
        part = next(part for part in self.parts if part.name == query.task)
        outcome = part.verify(query, steps)
        return replace(outcome, steps=check_steps(part.task, query.prompt, steps)) if part.task in PLANS else outcome
