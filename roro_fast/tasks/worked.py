"""Worked solutions of a few reasoning-gym tasks, one operation per step, and the check of a solution's steps.

The package gives answers only. A plan says which operation each step does, on numbers of the question or on results of
earlier steps; a solution ends with `#### N`, as in GSM8K.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

DELIMITER = "\n\n"
_RESULT = re.compile(r"= (-?\d{1,18})$")


class Ref(NamedTuple):
    """The result of an earlier step."""

    step: int


class Operation(NamedTuple):
    """`label` left sign right, each operand a number or the result of an earlier step."""

    left: int | Ref
    sign: str
    right: int | Ref
    label: str = ""

    def render(self, results: Sequence[int | None]) -> str | None:
        """The step's text given the results so far; None when one that it needs is missing."""
        a, b = (results[x.step] if isinstance(x, Ref) else x for x in (self.left, self.right))
        if a is None or b is None:
            return None
        value = a + b if self.sign == "+" else a - b if self.sign == "-" else a * b
        return f"{self.label}{a} {self.sign} {b} = {value}"


Plan = list[Operation]


def _chain(results: Sequence[int], start: int) -> Plan:
    """Sums of the results of steps `results`, written as steps number `start` and on."""
    plan, total = [], results[0]
    for i, term in enumerate(results[1:]):
        plan.append(Operation(Ref(total), "+", Ref(term)))
        total = start + i
    return plan


def chain_sum(question: str) -> Plan:
    """The tens of a term, then its ones: "23 + 40 = 63", "63 + 5 = 68", "68 - 7 = 61"."""
    (_, start), *terms = re.findall(r"([+-]?)\s*(\d+)", question.partition(":")[2] or question)
    plan: Plan = []
    for sign, term in terms:
        ones = int(term) % 10
        for part in [p for p in (int(term) - ones, ones) if p] or [0]:
            plan.append(Operation(Ref(len(plan) - 1) if plan else int(start), sign, part))
    return plan


def leg_counting(question: str) -> Plan:
    """One step per animal, "5 spiders: 5 * 8 = 40", then the sums."""
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    plan: Plan = []
    for count, name in (entry.split(" ", 1) for entry in question.rpartition("have ")[2].strip(" ?\n").split(", ")):
        legs = ANIMALS[name if name in ANIMALS else name.removesuffix("s")]
        plan.append(Operation(int(count), "*", legs, f"{count} {name}: "))
    return plan + _chain(range(len(plan)), len(plan))


PLANS: dict[str, Callable[[str], Plan]] = {
    "chain_sum": chain_sum,
    "leg_counting": leg_counting,
}


_WORDING = {
    "chain_sum": re.compile(r"State the final answer to the following arithmetic problem: \d+( [+-] \d+)+ =\s*"),
    "leg_counting": re.compile(r"Your task is to count how many legs there are .*have \d+ [^?]*\?\s*", re.S),
}


def plan_of(question: str) -> Plan:
    """The plan of a question of one of the `PLANS`, told by its wording; empty for any other text."""
    for task, wording in _WORDING.items():
        if wording.fullmatch(question):
            try:
                return PLANS[task](question)
            except (KeyError, ValueError):  # an animal nobody knows, a count that is none
                return []
    return []


def results(task: str, question: str) -> list[int]:
    """The result of every step of the worked solution."""
    found: list[int | None] = []
    for operation in PLANS[task](question):
        found.append(_result(operation.render(found) or ""))
    return [n for n in found if n is not None]


def solution(task: str, question: str) -> str:
    """The worked solution of a question of one of the `PLANS`."""
    steps: list[str] = []
    results: list[int | None] = []
    for operation in PLANS[task](question):
        steps.append(operation.render(results) or "")
        results.append(_result(steps[-1]))
    return DELIMITER.join([*steps, f"#### {results[-1]}"])


def check_steps(task: str, question: str, steps: Sequence[str]) -> tuple[bool, ...]:
    """Whether each written step is the one that is due: an earlier step's wrong result is taken as it stands."""
    plan, flags = PLANS[task](question), []
    results: list[int | None] = []
    for i, step in enumerate(s.strip() for s in steps):
        if i < len(plan):
            flags.append(step == plan[i].render(results))
            results.append(_result(step))
        else:
            flags.append(i == len(plan) and results[-1] is not None and step == f"#### {results[-1]}")
    return tuple(flags)


def _result(step: str) -> int | None:
    found = _RESULT.search(step)
    return int(found[1]) if found else None
