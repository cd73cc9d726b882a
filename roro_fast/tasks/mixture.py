"""Several tasks drawn in turn as one: the smol tier's arithmetic, and two families that its models never saw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from roro_fast.tasks.base import Outcome, Query
from roro_fast.tasks.benchmarks import ANSWER_SECONDS
from roro_fast.tasks.gym import PREFIX, Gym
from roro_fast.tasks.worked import check_steps, results

RANGE = range(200)


@dataclass(frozen=True, slots=True)
class Part:
    """A reasoning-gym task with its options.

    `plan` names the worked solution of its questions (`tasks.worked`; empty: none). `bounded` passes over questions
    whose worked solution leaves `RANGE`. `label` tells parts of one reasoning-gym task apart.
    """

    task: str
    options: Mapping[str, Any] = field(default_factory=dict)
    plan: str = ""
    bounded: bool = False
    label: str = ""

    @property
    def name(self) -> str:
        return PREFIX + self.task + (f"/{self.label}" if self.label else "")


_BASIC = {"min_digits": 1, "allow_parentheses": False, "allow_negation": False}
MIXTURES: dict[str, tuple[Part, ...]] = {
    "arithmetic": (
        Part("chain_sum", {"min_terms": 3, "max_terms": 4, "min_digits": 1, "max_digits": 2}, "chain_sum", True),
        Part(
            "leg_counting",
            {"min_animals": 2, "max_animals": 3, "min_instances": 1, "max_instances": 9},
            "leg_counting",
        ),
    ),
    # Sums in other words, and products beside sums.
    "arithmetic_held_out": (
        Part(
            "basic_arithmetic",
            {"min_terms": 3, "max_terms": 4, "max_digits": 2, "operators": ["+", "-"], **_BASIC},
            "chain_sum",
            True,
            label="sums",
        ),
        Part(
            "basic_arithmetic",
            {"min_terms": 2, "max_terms": 4, "max_digits": 1, "operators": ["+", "*"], **_BASIC},
            label="mixed",
        ),
    ),
}


class GymPart(Gym):
    """The questions of a part, under its name."""

    def __init__(self, part: Part, timeout: float = ANSWER_SECONDS) -> None:
        super().__init__(part.task, timeout, **part.options)
        self.part, self.name = part, part.name

    def queries(self, split: str, n: int | None = None, seed: int = 0) -> list[Query]:
        if not self.part.bounded:
            return super().queries(split, n, seed)
        want = 1000 if n is None else n
        drawn = 4 * want
        while True:
            found = super().queries(split, drawn, seed)
            kept = [q for q in found if set(results(self.part.plan, q.prompt)) <= set(RANGE)]
            if len(kept) >= want:
                return kept[:want]
            drawn *= 2

    def verify(self, query: Query, steps: Sequence[str]) -> Outcome:
        """The task's own verdict, with one per step where the part has a plan."""
        outcome = super().verify(query, steps)
        return replace(outcome, steps=check_steps(self.part.plan, query.prompt, steps)) if self.part.plan else outcome


class Mixture:
    """Query i comes from part i modulo the number of parts, and keeps that part's name in `Query.task`."""

    def __init__(self, name: str, timeout: float = ANSWER_SECONDS) -> None:
        self.name = name
        self.parts = [GymPart(part, timeout) for part in MIXTURES[name]]

    def queries(self, split: str, n: int | None = None, seed: int = 0) -> list[Query]:
        """The first `n` (1000 if None) queries of a split."""
        want, k = 1000 if n is None else n, len(self.parts)
        drawn = [iter(part.queries(split, (want - i + k - 1) // k, seed)) for i, part in enumerate(self.parts)]
        return [next(drawn[i % k]) for i in range(want)]

    def verify(self, query: Query, steps: Sequence[str]) -> Outcome:
        return next(part for part in self.parts if part.name == query.task).verify(query, steps)
