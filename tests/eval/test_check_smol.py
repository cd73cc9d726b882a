"""The smol pair's measurement: what is counted from trajectories, and the table made of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from roro_fast.errors import ConfigError
from roro_fast.eval.check_smol import kind, measure, summary
from roro_fast.eval.smol_tables import pair
from roro_fast.tasks.base import Query


@dataclass
class Answer:
    """What `summary` reads of a trajectory."""

    correct: bool
    step_texts: list[str] = field(default_factory=list)
    step_correct: tuple[bool, ...] | None = None
    token_ids: range = range(4)
    finish_reason: str = "eos"


def queries(*families: str) -> list[Query]:
    return [Query(f"q{i}", "?", "1", f"gym:{f}") for i, f in enumerate(families)]


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        ("23 + 40 = 63\n\n", "+"), ("63 - 5 = 58\n\n", "-"), ("-2 - 1 = -3", "-"), ("-2 + 1 = -1", "+"),
        ("5 spiders: 5 * 8 = 40\n\n", "*"), ("#### 12", "answer"), ("Well.", "other"), ("", "other"),
    ],
)  # fmt: skip
def test_kinds_of_steps(step, expected):
    assert kind(step) == expected


def test_a_summary_counts_by_family_and_kind():
    found = summary(
        queries("a", "b", "a"),
        [
            Answer(True, ["1 + 2 = 3\n\n", "#### 3"], (True, True)),
            Answer(False, ["1 + 2 = 4\n\n", "#### 4"], (False, True), range(7), "length"),
            Answer(False),
        ],
    )
    assert found["n"] == 3 and found["accuracy"] == pytest.approx(1 / 3) and found["tokens"] == 5
    assert found["families"] == {"gym:a": {"n": 2, "accuracy": 0.5}, "gym:b": {"n": 1, "accuracy": 0.0}}
    assert found["step_errors"] == {"+": {"n": 2, "rate": 0.5}, "answer": {"n": 2, "rate": 0.0}}
    assert found["finish"] == {"eos": 2, "length": 1}
    assert "step_errors" not in summary(queries("a"), [Answer(True)])


def test_a_table_without_verified_steps_has_none_of_their_lines():
    arm = {"families": {"gym:gsm_symbolic": {"n": 4, "accuracy": 0.25}}}
    found = {
        "mixtures": {"gym:gsm_symbolic": {a: arm for a in ("small", "random", "large")}}, "layers": [1, 2],
        "parameters": [10, 20], "split": "test", "dtype": "bfloat16",
    }  # fmt: skip
    lines = pair(found).split("\n")
    assert lines[2] == "| gsm_symbolic | 4 | 25.0 % | 25.0 % | 25.0 % |" and "wrong steps" not in "".join(lines)


def test_tasks_of_one_name_are_refused():
    with pytest.raises(ConfigError, match=r"--tasks: two of a/x\.jsonl, b/x\.jsonl would have one name"):
        measure([], "test", 1, ["a/x.jsonl", "b/x.jsonl"])


def test_the_table_names_families_kinds_and_sizes():
    def arm(accuracy, rate):
        errors = {"+": {"n": 4, "rate": rate}} | ({"other": {"n": 1, "rate": 1.0}} if rate > 0.1 else {})
        return {"families": {"gym:chain_sum": {"n": 40, "accuracy": accuracy}}, "step_errors": errors}

    rows = {"small": arm(0.4, 0.25), "random": arm(0.7, 0.2), "large": arm(0.9, 0.05)}
    document = {
        "split": "test", "dtype": "bfloat16", "layers": [20, 30], "parameters": [99_100_000, 134_500_000],
        "mixtures": {"arithmetic": rows},
    }  # fmt: skip
    text = pair(document)
    assert "| arithmetic: chain_sum | 40 | 40.0 % | 70.0 % | 90.0 % |" in text
    assert "| wrong steps | sums |" in text and "| small | 25.0 % |" in text and "| large | 5.0 % |" in text
    assert text.endswith("Test split, greedy, bfloat16; 20 of 30 layers, 99 and 134 million parameters.")
