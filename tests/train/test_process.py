"""Process rewards and their controls."""

from __future__ import annotations

import math

import numpy as np
import pytest

from roro_fast.engine import Cost, Step, Trajectory
from roro_fast.models import nano
from roro_fast.rubric.format import Rubric
from roro_fast.rubric.grammar import claims, read, verbs_of
from roro_fast.rubric.judge import Judge, JudgeInput
from roro_fast.rubric.render import Pool, view_of
from roro_fast.tasks.ledger import Ledger, parse_query, render_steps
from roro_fast.train.process import FormulaReward, JudgeReward, ShuffledReward, fixed_rubric, random_rubrics

LABELS = ("small", "large")
POOL = Pool(LABELS, (10, 100))
QUERIES = Ledger().queries("train", 6)
PROMPTS = {q.id: q.prompt for q in QUERIES}


def answer(query, models: list[int], seed: int = 0) -> Trajectory:
    texts = render_steps(*parse_query(query.prompt))
    picks = [models[i % len(models)] for i in range(len(texts))]
    conf = [math.log(0.99 - 0.05 * i) for i in range(len(texts))]
    steps = [Step(8 * i, 8 * i + 8, m, c, c, 0.0, 0.0) for i, (m, c) in enumerate(zip(picks, conf, strict=True))]
    return Trajectory(query.id, [1], [0] * 8 * len(texts), steps, [], Cost(), "eos", step_texts=texts, seed=seed)


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.load(nano.path("small").parent / "reader", LABELS)


def test_judge_reward_is_the_judges_score_and_nan_without_a_rubric(judge: Judge) -> None:
    rubrics = random_rubrics({q: PROMPTS[q] for q in list(PROMPTS)[:4]}, seed=0)
    answers = [answer(q, m) for q in QUERIES for m in ([0], [1], [0, 1])]
    got = JudgeReward(judge, rubrics, PROMPTS, POOL).score(answers)
    assert got.dtype == np.float32 and np.isnan(got[12:]).all() and (np.abs(got[:12]) <= 1).all()
    for t, s in list(zip(answers, got, strict=True))[:12:5]:
        alone = judge.score([JudgeInput(PROMPTS[t.query_id], view_of(t, POOL), rubrics[t.query_id])])[0].score
        assert s == pytest.approx(alone, abs=1e-5)


def test_shuffled_scores_are_the_same_numbers_elsewhere_and_repeat(judge: Judge) -> None:
    inner = JudgeReward(judge, random_rubrics(PROMPTS, 1), PROMPTS, POOL)
    answers = [answer(q, m, seed=5) for q in QUERIES for m in ([0], [1], [0, 1])]
    straight, dealt = inner.score(answers), ShuffledReward(inner, 0).score(answers)
    assert sorted(straight.tolist()) == sorted(dealt.tolist()) and straight.tolist() != dealt.tolist()
    assert dealt.tolist() == ShuffledReward(inner, 0).score(answers).tolist()
    assert dealt.tolist() != ShuffledReward(inner, 1).score(answers).tolist()


def test_formula_reward_spans_minus_one_to_one() -> None:
    base = {q.id: answer(q, [0]) for q in QUERIES}
    reward = FormulaReward(base)
    waste, none = reward.score([answer(QUERIES[0], [1, 0]), answer(QUERIES[0], [0])])
    assert -1 <= waste <= 1 and -1 <= none <= 1
    assert none > waste, "escalating every other sure step is worse than leaving it alone"


def test_the_fixed_rubric_says_the_same_of_every_query(judge: Judge) -> None:
    rubric = fixed_rubric(LABELS)
    assert isinstance(rubric, Rubric) and 3 <= len(rubric.criteria) <= 6
    assert all(read(c.sentence) is not None for c in rubric.criteria)


def test_random_rubrics_are_about_their_query_and_seeded() -> None:
    found = random_rubrics(PROMPTS, 3)
    assert set(found) == set(PROMPTS)
    for q, rubric in found.items():
        allowed = {str(c) for c in claims(verbs_of(PROMPTS[q]), LABELS)}
        assert {c.sentence for c in rubric.criteria} <= allowed
    assert found == random_rubrics(PROMPTS, 3) and found != random_rubrics(PROMPTS, 4)
