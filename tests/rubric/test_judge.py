"""The Judge with a real (random-weight) decoder: formula, batching, checkpoints, errors."""

from __future__ import annotations

import pytest
import torch

from roro_fast.engine.packing import pack
from roro_fast.errors import CapacityError, CheckpointError, ConfigError
from roro_fast.ops.judge_score import judge_score
from roro_fast.rubric import judge as judge_module
from roro_fast.rubric.format import parse
from roro_fast.rubric.judge import Judge, JudgeInput
from roro_fast.rubric.render import view_of
from roro_fast.rubric.rubricor import Rubricor
from tests.rubric.samples import POOL, queries, trajectory
from tests.tiny import save_tiny

RUBRICS = [
    parse(
        "- [Hard Rule] (timely escalation) the large model writes line #2\n"
        "- [Principle] (efficient allocation) at most 2 switches\n"
        "- [Principle] (efficient allocation) the large model writes at most 2 lines"
    ),
    parse(
        "- [Principle] (timely escalation) the large model writes line #1\n"
        "- [Principle] (timely escalation) the large model writes line #3\n"
        "- [Hard Rule] (efficient allocation) at most 0 switches\n"
        "- [Hard Rule] (effective recovery) the small model takes over after line #1"
    ),
]


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return Judge.load(save_tiny(tmp_path_factory.mktemp("judge"), hidden=32, layers=2))


@pytest.fixture(scope="module")
def inputs():
    out = []
    for i, q in enumerate(queries(6)):
        n = len(q.meta["kinds"]) + 1
        out.append(JudgeInput(q.prompt, view_of(trajectory(q, [(i + j) % 2 for j in range(n)]), POOL), RUBRICS[i % 2]))
    return out


def test_score_is_the_weighted_valence_of_the_full_vocabulary_softmax(judge, inputs):
    for x, j in zip(inputs, judge.score(inputs), strict=True):
        p = judge.encode([x])[0]
        logits = judge.model.logits(judge.model.dense(torch.tensor([p.ids])))[0, p.rows]
        both = torch.softmax(logits, -1)[:, judge.verdict_ids]
        share = both / both.sum(-1, keepdim=True)
        weights = torch.tensor(x.rubric.weights)
        expected = (weights * (share[:, 0] - share[:, 1])).sum() / weights.sum()
        assert j.score == pytest.approx(expected.item(), abs=1e-5)
        assert j.p_true == pytest.approx(share[:, 0].tolist(), abs=1e-5)
        assert -1 <= j.score <= 1


def test_a_judgement_does_not_depend_on_its_batch(judge, inputs):
    together = judge.score(inputs)
    for size in (1, 300, 700):  # one prompt per forward, two, three
        for a, b in zip(judge.score(inputs, max_tokens=size), together, strict=True):
            assert a.score == pytest.approx(b.score, abs=1e-5)
    assert [j.score for j in judge.score(inputs[::-1])] == pytest.approx([j.score for j in together][::-1], abs=1e-5)


def test_repeated_inputs_get_equal_judgements(judge, inputs):
    out = judge.score([inputs[0], inputs[1], inputs[0]])
    assert out[0] == out[2] and out[0] != out[1] and judge.score([]) == []


def test_rewards_are_the_scores_of_the_differentiable_forward(judge, inputs):
    offsets = torch.tensor([0, 4, 6])
    dense = judge.forward(judge.encode(inputs), offsets)
    for budget in (1, 4096):
        out = judge.rewards(inputs, offsets, max_tokens=budget)
        for a, b in zip(out, dense, strict=True):
            torch.testing.assert_close(a, b.detach(), atol=1e-4, rtol=0)
        assert not out.scores.requires_grad and not out.scores.is_inference()
    assert judge.rewards(inputs).advantages is None


def test_one_op_scores_a_whole_rollout_batch(judge, inputs, monkeypatch):
    calls = []
    monkeypatch.setattr(judge_module, "judge_score", lambda *a: calls.append(len(a[1])) or judge_score(*a))
    judge.rewards(inputs, torch.tensor([0, 4, 6]), max_tokens=1)
    assert calls == [sum(len(x.rubric) for x in inputs)]


def test_advantages_are_normalised_in_groups(judge, inputs):
    out = judge.rewards(inputs, torch.tensor([0, 4, 6]))
    s = out.scores
    for a, b in ((0, 4), (4, 6)):
        want = (s[a:b] - s[a:b].mean()) / (s[a:b].std(correction=0) + 1e-6)
        torch.testing.assert_close(out.advantages[a:b], want, atol=1e-4, rtol=0)
    weight = torch.ones(6, requires_grad=True)
    (weight * out.advantages).sum().backward()  # a constant of somebody's loss
    assert weight.grad.tolist() == out.advantages.tolist()


def test_a_group_pays_for_its_query_once(judge):
    """Eight routes of one query: less computed than eight prompts, equal ones not at all."""
    (q,) = queries(1)
    n = len(q.meta["kinds"]) + 1
    group = [
        JudgeInput(q.prompt, view_of(trajectory(q, [i >> j & 1 for j in range(n)]), POOL), RUBRICS[0])
        for i in (0, 1, 2, 4, 4)
    ]
    prompts = [p.ids for p in judge.encode(group)]
    (batch,) = pack(prompts, 10**6)
    query = len(judge.encoder.query(q.prompt)) // 16 * 16
    assert len(batch.ids) <= sum(map(len, prompts)) - 3 * query - len(prompts[-1])


def test_the_writer_of_a_step_changes_the_score(judge, inputs):
    from dataclasses import replace

    x = inputs[0]
    flipped = replace(x, view=replace(x.view, models=tuple(1 - m for m in x.view.models)))
    assert judge.score([x])[0].score != pytest.approx(judge.score([flipped])[0].score, abs=1e-6)


def test_saves_and_loads(judge, inputs, tmp_path):
    judge.save(tmp_path / "j")
    again = Judge.load(tmp_path / "j")
    assert again.score(inputs) == judge.score(inputs)
    assert again.encoder.labels == judge.encoder.labels and again.verdicts == judge.verdicts
    assert not list((tmp_path / "j").glob("*.part")) and not list((tmp_path / "j").glob("*.bin"))
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(tmp_path / "j").config.model_type == "qwen3"


def test_a_judge_directory_is_no_rubricor(judge, tmp_path):
    judge.save(tmp_path)
    with pytest.raises(CheckpointError, match="role is 'judge'"):
        Rubricor.load(tmp_path)
    (tmp_path / "roro.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        Judge.load(tmp_path)


def test_too_long_a_prompt_is_refused(inputs, tmp_path):
    short = Judge.load(save_tiny(tmp_path, hidden=16, context=64))
    with pytest.raises(CapacityError, match="context of 64"):
        short.score(inputs)


def test_bad_verdict_words_are_refused_at_start_up(judge):
    with pytest.raises(ConfigError, match=r"judge\.verdicts"):
        Judge(judge.model, judge.tokenizer, verdicts=(" true true", " false"))


def test_the_scorer_has_the_weights_of_now_in_bfloat16(judge, inputs):
    half = judge.scorer()
    assert half.model.dtype == torch.bfloat16 and half.scorer() is half and judge.scorer(bf16=False) is judge
    exact, rounded = ([j.score for j in x.score(inputs)] for x in (judge, half))
    assert 0 < max(abs(a - b) for a, b in zip(exact, rounded, strict=True)) < 0.05
    assert judge.model.dtype == torch.float32
