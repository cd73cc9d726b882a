"""The Judge's view holds writers, texts and costs, and nothing about outcomes or confidences."""

from __future__ import annotations

import copy

import pytest

from roro_fast.errors import ConfigError, DataError
from roro_fast.rubric.render import Pool, render, view_of
from tests.rubric.samples import POOL, queries, tokenizer_at, trajectory


@pytest.fixture
def routed():
    q = next(q for q in queries(50) if len(q.meta["kinds"]) == 4)
    return q, trajectory(q, [0, 1, 1, 0, 0])


def test_renders_step_by_step(routed):
    _, t = routed
    text = render(view_of(t, POOL), POOL.labels)
    lines = text.splitlines()
    assert len(lines) == 5 and text.endswith("\n")
    for i, line in enumerate(lines):
        label = POOL.labels[t.models[i]]
        assert line.startswith(f"- line #{i + 1} {label} cost ")
        assert line.endswith(t.step_texts[i].strip())


def test_cost_is_percent_of_all_large(routed):
    q, t = routed
    assert sum(view_of(trajectory(q, [1] * 5), POOL).costs) == pytest.approx(100, abs=3)
    costs = view_of(t, POOL).costs
    assert costs[1] == round(100 * 8 / 35) and costs[0] == round(100 * 8 * 4500 / (35 * 243136))


def test_what_the_judge_must_not_see_leaves_no_trace(routed):
    _, t = routed
    before = render(view_of(t, POOL), POOL.labels)
    other = copy.deepcopy(t)
    other.correct, other.step_correct, other.predicted = False, [False] * 5, "99"
    other.arm, other.seed, other.finish_reason = "oracle", 7, "steps"
    other.cost.generated_flops = other.cost.total_flops = other.cost.seconds = 1e9
    for s in other.steps:
        s.mean_logprob, s.min_logprob, s.first_entropy, s.mean_entropy = -5.0, -9.0, 2.0, 2.0
    for d in other.decisions:
        d.logprob, d.probs, d.features = -3.0, [0.1, 0.9], [1.0]
    assert render(view_of(other, POOL), POOL.labels) == before
    other.steps[0].model = 1
    assert render(view_of(other, POOL), POOL.labels) != before


def test_the_view_is_one_token_per_word(routed, tmp_path):
    tok = tokenizer_at(tmp_path)
    _, t = routed
    text = render(view_of(t, POOL), POOL.labels)
    ids = tok(text, add_special_tokens=False)["input_ids"]
    assert tok.unk_token_id not in ids and tok.decode(ids) == text


def test_missing_texts_are_an_error(routed):
    _, t = routed
    t.step_texts = []
    with pytest.raises(DataError, match="step_texts"):
        view_of(t, POOL)


@pytest.mark.parametrize("labels", [("small",), ("a", "a"), ("a", "b", "c")])
def test_bad_pools_are_refused(labels):
    with pytest.raises(ConfigError, match=r"models\.labels"):
        Pool(labels, (1, 2))
