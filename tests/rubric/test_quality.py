"""The process-quality formula, term by term, on hand-made confidences."""

from __future__ import annotations

import math

import pytest

from roro_fast.rubric.quality import Formula, all_small_of, confidences, process_quality
from tests.rubric.samples import queries, trajectory

CONFIDENCE = [0.99, 0.98, 0.5, 0.97, 0.99]  # drops most at step 2


@pytest.mark.parametrize(
    ("models", "expected"),
    [
        ([0, 0, 1, 0, 0], 0.4 * 1 + 0.3 * (1 - 2 / 4) + 0.3 * 1),  # only the critical step: no waste
        ([0, 0, 0, 0, 0], 0.4 * 0 + 0.3 * 1 + 0.3 * 1),  # nothing escalated: nothing wasted
        ([1, 1, 1, 1, 1], 0.4 * 1 + 0.3 * 1 + 0.3 * (1 - 4 / 5)),
        ([1, 0, 1, 0, 1], 0.4 * 1 + 0.3 * 0 + 0.3 * (1 - 2 / 3)),
        ([0, 1, 0, 0, 0], 0.4 * 0 + 0.3 * (1 - 2 / 4) + 0.3 * 0),
    ],
)
def test_formula(models, expected):
    assert process_quality(models, CONFIDENCE) == pytest.approx(expected)


def test_weights_threshold_and_window_are_settings():
    models = [0, 1, 0, 0, 0]
    assert process_quality(models, CONFIDENCE, Formula((1.0, 0.0, 0.0))) == 0
    assert process_quality(models, CONFIDENCE, Formula((1.0, 0.0, 0.0), window=1)) == 1
    assert process_quality(models, CONFIDENCE, Formula((0.0, 0.0, 1.0), sure=0.99)) == 1


def test_steps_past_the_small_answer_are_unsure():
    assert process_quality([0, 0, 1], [0.99], Formula((0.0, 0.0, 1.0))) == 1


def test_no_steps_or_no_confidence_is_no_quality():
    assert process_quality([], [0.5]) == 0 and process_quality([1], []) == 0


def test_confidences_come_from_the_all_small_trajectory():
    q = next(q for q in queries(50) if len(q.meta["kinds"]) == 4)
    mixed, small = trajectory(q, [0, 1, 0, 0, 0]), trajectory(q, [0] * 5, confidence=CONFIDENCE)
    assert all_small_of([mixed, small]) is small
    assert all_small_of([mixed]) is None
    assert confidences(small) == pytest.approx(CONFIDENCE)
    assert math.isclose(confidences(small)[2], math.exp(small.steps[2].mean_logprob))
