"""The Judge's warm-up and GRPO: sampling and rewards by hand, learning on real forwards, malformed rubrics counted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from roro_fast.config import RubricConfig
from roro_fast.rubric.judge import Judge, JudgeInput
from roro_fast.train.judge_training import cycle, sample_verdicts, train_judge, truths, warm_up
from tests.rubric.samples import POOL
from tests.tiny import save_tiny


@pytest.fixture
def judge(tmp_path):
    return Judge.load(save_tiny(tmp_path, hidden=32, layers=2))


def test_cycle_visits_everything_before_repeating():
    batches = cycle(range(5), 2, "x")
    seen = [i for _ in range(5) for i in next(batches)]
    assert sorted(seen[:5]) == sorted(seen[5:]) == list(range(5))
    assert len(next(cycle([1], 3, "x"))) == 3


def test_truths_follow_the_grammar(pairs, seeds):
    p = pairs[0]
    found = truths(JudgeInput(p.prompt, p.chosen.view, seeds[p.query_id]), POOL.labels)
    assert len(found) == len(seeds[p.query_id]) and set(found) <= {True, False}


def test_sampled_verdicts_have_the_asked_for_frequencies_and_rewards():
    config = RubricConfig(group_size=4000)
    probs = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5], [0.5, 0.5]])  # chosen: slots 0, 1; rejected: 2, 3
    owner, weights = torch.tensor([0, 0, 1, 1]), torch.tensor([3.0, 1.0, 3.0, 1.0])
    actions, rewards = sample_verdicts(probs, owner, weights, config, torch.Generator().manual_seed(0))
    assert (actions == 0).float().mean(1).tolist() == pytest.approx([0.9, 0.2, 0.5, 0.5], abs=0.03)
    value = weights[:, None] * (1 - 2 * actions)
    better = value[:2].sum(0) > value[2:].sum(0)
    assert torch.equal(rewards[0], better.float() * 2 - 1)


def test_temperature_sharpens_and_flattens():
    probs, owner, weights = torch.tensor([[0.8, 0.2], [0.8, 0.2]]), torch.tensor([0, 1]), torch.ones(2)
    for temperature, share in ((0.25, 0.996), (4.0, 0.586)):
        config = RubricConfig(group_size=4000, temperature=temperature)
        actions, _ = sample_verdicts(probs, owner, weights, config, torch.Generator().manual_seed(0))
        assert (actions == 0).float().mean().item() == pytest.approx(share, abs=0.02)


def test_warm_up_learns_to_tell_true_from_false(judge, pairs, seeds):
    first = warm_up(judge, pairs, seeds, RubricConfig(sft_steps=1, batch_size=8), seed=0)
    last = warm_up(judge, pairs, seeds, RubricConfig(sft_steps=40, batch_size=8, sft_lr=5e-3), seed=0)
    assert last < first and last < 0.75


def one_writer(pairs, better: int):
    """Pairs that one look at the labels decides: model `better` wrote everything, against the other one."""
    out = []
    for p in pairs:
        n = len(p.chosen.view.models)
        views = [replace(p.chosen.view, models=(m,) * n) for m in (better, 1 - better)]
        out.append(replace(p, chosen=replace(p.chosen, view=views[0]), rejected=replace(p.rejected, view=views[1])))
    return out


def accuracy(judge, pairs, seeds) -> float:
    inputs = [JudgeInput(p.prompt, c.view, seeds[p.query_id]) for p in pairs for c in (p.chosen, p.rejected)]
    s = [j.score for j in judge.score(inputs)]
    return sum(a > b for a, b in zip(s[0::2], s[1::2], strict=True)) / len(pairs)


@pytest.mark.parametrize("loss", ["grpo", "pairwise"])
@pytest.mark.parametrize("better", [0, 1])
def test_training_follows_the_preference(judge, pairs, seeds, loss, better):
    config = RubricConfig(steps=30, batch_size=8, judge_lr=3e-3, group_size=12)
    phase = train_judge(judge, one_writer(pairs, better), seeds, config, seed=0, loss=loss)
    assert accuracy(judge, one_writer(pairs, better), seeds) > 0.9
    assert accuracy(judge, one_writer(pairs, 1 - better), seeds) < 0.1
    assert phase.malformed == 0 and (loss == "pairwise" or phase.informative > 0)


def test_training_repeats_and_kl_is_logged(tmp_path, pairs, seeds):
    config = RubricConfig(steps=3, batch_size=4, judge_lr=1e-3, kl=0.1)
    logs = []
    for _ in range(2):
        judge = Judge.load(save_tiny(tmp_path, hidden=16))
        logs.append(train_judge(judge, pairs, seeds, config, seed=5))
    assert logs[0] == logs[1] and logs[0].kl > 0


def test_pairs_without_a_well_formed_rubric_are_counted_and_move_nothing(judge, pairs, seeds):
    before = [p.clone() for p in judge.model.parameters()]
    phase = train_judge(judge, pairs, {}, RubricConfig(steps=2), seed=0)
    assert phase.malformed == len(pairs)
    assert all(torch.equal(a, b) for a, b in zip(before, judge.model.parameters(), strict=True))
    one = {pairs[0].query_id: seeds[pairs[0].query_id]}
    mine = sum(p.query_id == pairs[0].query_id for p in pairs)
    assert train_judge(judge, pairs, one, RubricConfig(steps=1, batch_size=2), seed=0).malformed == len(pairs) - mine
