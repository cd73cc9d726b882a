"""The rubric format: round trips, every named failure, and no exception for any text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roro_fast.rubric.format import (
    AXES,
    MAX_SENTENCE,
    REASONS,
    WEIGHTS,
    Criterion,
    InvalidRubric,
    Rubric,
    make,
    parse,
)

GOOD = """- [Hard Rule] (timely escalation) the large model writes line #2
- [Principle] (effective recovery) the model that errs hands over at once.
- [Principle] (efficient allocation) at most 2 switches"""

sentences = (
    st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]) | st.just(" "), min_size=1, max_size=60)
    .map(str.strip)
    .filter(lambda s: s and "Verdict:" not in s)
)
criteria = st.builds(Criterion, st.sampled_from(sorted(WEIGHTS)), st.sampled_from(AXES), sentences)


def reason(text: str) -> str:
    found = parse(text)
    assert isinstance(found, InvalidRubric)
    return found.reason


def test_reads_a_rubric():
    rubric = parse(GOOD)
    assert isinstance(rubric, Rubric)
    assert rubric.weights == [3.0, 1.0, 1.0]
    assert [c.axis for c in rubric.criteria] == list(AXES)
    assert rubric.criteria[1].sentence == "the model that errs hands over at once."
    assert str(rubric) == GOOD


@given(st.lists(criteria, min_size=3, max_size=6, unique_by=lambda c: c.sentence))
def test_writing_then_reading_gives_the_same_rubric(items):
    rubric = make(items)
    assert isinstance(rubric, Rubric)
    assert parse(str(rubric)) == rubric
    assert parse(f"\n {rubric} \n\n") == rubric


@given(st.text())
def test_no_text_raises(text):
    found = parse(text)
    assert isinstance(found, Rubric) or found.reason in REASONS


@given(st.lists(st.sampled_from(["- ", "[Hard Rule]", " ", "(timely escalation)", "x", "\n", "Verdict:", "\x00"])))
def test_no_near_miss_raises(parts):
    found = parse("".join(parts))
    if isinstance(found, Rubric):
        assert parse(str(found)) == found
    else:
        assert found.reason in REASONS


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: "", "empty"),
        (lambda t: "  \n ", "empty"),
        (lambda t: "Here is the rubric:\n" + t, "not a criterion line"),
        (lambda t: t.replace("\n", "\n\n"), "not a criterion line"),
        (lambda t: t.replace("- [", "* [", 1), "not a criterion line"),
        (lambda t: t.replace("] (", "](", 1), "not a criterion line"),
        (lambda t: t.replace("Hard Rule", "Soft Rule"), "unknown tag"),
        (lambda t: t.replace("hard rule", "HARD RULE").replace("Hard Rule", "hard rule"), "unknown tag"),
        (lambda t: t.replace("timely escalation", "speed"), "unknown axis"),
        (lambda t: t.replace("the large model writes line #2", ""), "bad sentence"),
        (lambda t: t.replace("the large model", " the large model"), "bad sentence"),
        (lambda t: t.replace("at most", "at\tmost"), "bad sentence"),
        (lambda t: t.replace("at most", "Verdict: true; at most"), "bad sentence"),
        (lambda t: t.replace("at most", "at most " * MAX_SENTENCE), "bad sentence"),
        (lambda t: t + "\n" + t.split("\n")[0], "repeated criterion"),
        (lambda t: "\n".join(t.split("\n")[:2]), "too few criteria"),
        (lambda t: t + "".join(f"\n- [Principle] (timely escalation) s{i}" for i in range(4)), "too many criteria"),
    ],
)
def test_every_fault_has_its_name(change, expected):
    assert reason(change(GOOD)) == expected


def test_the_upper_limit_can_be_lowered():
    four = GOOD + "\n- [Principle] (timely escalation) s"
    assert isinstance(parse(four, most=4), Rubric)
    found = parse(four, most=3)
    assert isinstance(found, InvalidRubric) and found.reason == "too many criteria" and "3 to 3" in found.detail


def test_a_check_refuses_by_name():
    found = parse(GOOD, lambda c: "why not" if "errs" in c.sentence else "")
    assert isinstance(found, InvalidRubric)
    assert found.reason == "not checkable" and "why not" in found.detail
