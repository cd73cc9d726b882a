"""Worked solutions: right, one operation per step, and checked step by step with earlier mistakes taken as they are."""

from __future__ import annotations

import pytest

from roro_fast.tasks.mixture import MIXTURES
from roro_fast.tasks.registry import load_task
from roro_fast.tasks.worked import DELIMITER, PLANS, check_steps, plan_of, results, solution

pytest.importorskip("reasoning_gym")
SUM = "State the final answer to the following arithmetic problem: 23 + 45 - 70 - 0 - 6 ="
LEGS = "Count.\n\nNow, how many legs are there in total if you have 5 spiders, 1 praying mantis, 2 crabs?\n"


@pytest.mark.parametrize(
    ("task", "question", "text"),
    [
        ("chain_sum", SUM, "23 + 40 = 63|63 + 5 = 68|68 - 70 = -2|-2 - 0 = -2|-2 - 6 = -8|#### -8"),
        ("chain_sum", "Calculate 10 - 3 + 11.", "10 - 3 = 7|7 + 10 = 17|17 + 1 = 18|#### 18"),
        (
            "leg_counting", LEGS,
            "5 spiders: 5 * 8 = 40|1 praying mantis: 1 * 6 = 6|2 crabs: 2 * 10 = 20|40 + 6 = 46|46 + 20 = 66|#### 66",
        ),
    ],
)  # fmt: skip
def test_solutions(task, question, text):
    assert solution(task, question) == text.replace("|", DELIMITER)
    assert all(check_steps(task, question, text.split("|")))
    assert results(task, question) == [int(step.split(" = ")[1]) for step in text.split("|")[:-1]]


def test_solutions_reach_the_packages_answers():
    task = load_task("arithmetic")
    assert {p.plan for p in MIXTURES["arithmetic"]} == set(PLANS)
    for q in task.queries("train", 300):
        text = solution(q.task.removeprefix("gym:"), q.prompt)
        outcome = task.verify(q, text.replace(DELIMITER, DELIMITER + "\0").split("\0"))
        assert outcome.correct and outcome.steps and all(outcome.steps), (q, text)


@pytest.mark.parametrize(
    ("steps", "flags"),
    [
        (
            "23 + 40 = 62|62 + 5 = 67|67 - 70 = -3|-3 - 0 = -3|-3 - 6 = -9|#### -9",
            [0, 1, 1, 1, 1, 1],
        ),  # the first
        ("23 + 40 = 63|63 + 4 = 67|67 - 70 = -3|-3 - 0 = -3|-3 - 6 = -9|#### -9", [1, 0, 1, 1, 1, 1]),  # a term misread
        ("23 + 40 = 63|63 + 5|68 - 70 = -2|-2 - 0 = -2", [1, 0, 0, 1]),  # a result left out
        ("23 + 40 = 63|63 + 5 = 68|#### 68", [1, 1, 0]),
        ("23 + 40 = 63|63 + 5 = 68|68 - 70 = -2|-2 - 0 = -2|-2 - 6 = -8|#### 8", [1, 1, 1, 1, 1, 0]),
        ("23 + 40 = 63|63 + 5 = 68|68 - 70 = -2|-2 - 0 = -2|-2 - 6 = -8|#### -8|#### -8", [1, 1, 1, 1, 1, 1, 0]),
        ("", [0]),
    ],
)
def test_steps_are_judged_on_their_own(steps, flags):
    written = [s + DELIMITER for s in steps.split("|")]
    assert check_steps("chain_sum", SUM, written) == tuple(map(bool, flags))


def test_a_mixture_verifies_steps_only_where_it_can():
    held_out = load_task("arithmetic_held_out")
    for q in held_out.queries("test", 8):
        verdict = held_out.verify(q, [f"#### {q.answer}"])
        assert verdict.correct and verdict.steps == ((False,) if q.task.endswith("/sums") else None)


def test_the_plan_of_a_question_is_told_by_its_wording() -> None:
    from roro_fast.rubric.grammar import verbs_of
    from roro_fast.tasks.mixture import Mixture

    for name, known in (("arithmetic", True), ("arithmetic_held_out", False)):
        task = Mixture(name)
        for q in task.queries("train", 40):
            plan = plan_of(q.prompt)
            assert bool(plan) == known
            if known:
                assert plan == PLANS[q.task.removeprefix("gym:")](q.prompt) and len(verbs_of(q.prompt)) == len(plan)
    asked = "State the final answer to the following arithmetic problem: 40 - 3 + 12 ="
    assert verbs_of(asked) == ("subtracts", "adds", "adds")
    for other in ("", "What is 3 + 4?", asked + " Please.", asked.replace("40", "x")):
        assert plan_of(other) == [] and verbs_of(other) == ()
    strange = "Your task is to count how many legs there are in total. How many legs are there if you have 3 qwzs?"
    assert plan_of(strange) == []
