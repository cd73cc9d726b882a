"""GRPO of the Judge by TRL: the update of the native trainer, learned preferences, exact resumption."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from roro_fast.config import RubricConfig
from roro_fast.config_trl import TrlConfig
from roro_fast.errors import ConfigError
from roro_fast.rubric.judge import Judge
from roro_fast.train import judge_training
from roro_fast.train.trl.trainers import TrlTrainers
from tests.tiny import save_tiny
from tests.train.test_judge_training import accuracy, one_writer

pytest.importorskip("trl")
EXACT = TrlConfig(bf16=False, micro_batch=64)


def fresh(root) -> Judge:
    return Judge.load(save_tiny(root, hidden=32, layers=2))


def flat(judge: Judge) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in judge.model.parameters()])


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


@pytest.mark.parametrize("micro", [64, 4])
def test_one_update_is_the_native_one(pairs, seeds, tmp_path, micro):
    config = RubricConfig(steps=1, batch_size=4, judge_lr=1e-3, group_size=4, kl=0.0)
    start = flat(fresh(tmp_path))
    native, ours = fresh(tmp_path), fresh(tmp_path)
    want = judge_training.train_judge(native, pairs, seeds, config, seed=3)
    got = TrlTrainers(replace(EXACT, micro_batch=micro)).train_judge(ours, pairs, seeds, config, seed=3)
    assert want.informative > 0 and (got.reward, got.informative) == (want.reward, want.informative)
    # Adam's first step does not depend on the gradient's scale, in which alone the two advantages differ.
    assert cosine(flat(native) - start, flat(ours) - start) > 0.99


@pytest.mark.parametrize("better", [0, 1])
def test_training_follows_the_preference(pairs, seeds, tmp_path, better):
    judge = fresh(tmp_path)
    config = RubricConfig(steps=25, batch_size=8, judge_lr=3e-3, group_size=12)
    ticks: list[int] = []
    phase = TrlTrainers(EXACT).train_judge(
        judge, one_writer(pairs, better), seeds, config, seed=0, tick=lambda: ticks.append(1)
    )
    assert accuracy(judge, one_writer(pairs, better), seeds) > 0.9
    assert accuracy(judge, one_writer(pairs, 1 - better), seeds) < 0.1
    assert phase.malformed == 0 and phase.informative > 0 and phase.kl > 0 and len(ticks) == 25


def test_the_warm_up_teaches_the_truth_of_sentences(pairs, seeds, tmp_path):
    judge = fresh(tmp_path)
    first = TrlTrainers(EXACT).warm_up_judge(judge, pairs, seeds, RubricConfig(sft_steps=1, batch_size=8), seed=0)
    config = RubricConfig(sft_steps=40, batch_size=8, sft_lr=5e-3)
    assert TrlTrainers(EXACT).warm_up_judge(judge, pairs, seeds, config, seed=1) < min(0.75, 0.5 * first)


class Cut(Exception):
    """Stands for a crash in the middle of a phase."""


def cut_after(n: int):
    left = [n]

    def tick() -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Cut

    return tick


@pytest.mark.parametrize("lora", [0, 4])
def test_a_cut_phase_goes_on_to_the_same_weights(pairs, seeds, tmp_path, lora):
    config = RubricConfig(steps=4, batch_size=4, judge_lr=1e-3, group_size=3, kl=0.1)
    trl = replace(EXACT, checkpoint_every=2, lora_rank=lora)
    whole, again = fresh(tmp_path / "m"), fresh(tmp_path / "m")
    want = TrlTrainers(trl).train_judge(whole, pairs, seeds, config, seed=1)
    with pytest.raises(Cut):
        TrlTrainers(trl, tmp_path / "s", tmp_path / "l").train_judge(
            fresh(tmp_path / "m"), pairs, seeds, config, seed=1, tick=cut_after(3)
        )
    assert [p.name for p in (tmp_path / "s" / "judge-1").glob("checkpoint-*")] == ["checkpoint-2"]
    ticks: list[int] = []
    trainers = TrlTrainers(trl, tmp_path / "s", tmp_path / "l")
    got = trainers.train_judge(again, pairs, seeds, config, seed=1, tick=lambda: ticks.append(1))
    assert len(ticks) == 2 and got == want and torch.equal(flat(again), flat(whole))


@pytest.mark.parametrize("lora", [0, 4])
def test_every_update_reads_with_the_weights_of_the_one_before(pairs, seeds, tmp_path, monkeypatch, lora):
    judge = fresh(tmp_path)
    seen: list[torch.Tensor] = [flat(judge)]
    read = judge.read

    def spy(prompts):
        seen.append(flat(judge))
        return read(prompts)

    monkeypatch.setattr(judge, "read", spy)
    config = RubricConfig(steps=3, batch_size=4, judge_lr=1e-2, group_size=4)
    TrlTrainers(replace(EXACT, lora_rank=lora)).train_judge(judge, pairs, seeds, config, seed=3)
    assert [torch.equal(a, b) for a, b in zip(seen, [*seen[1:], flat(judge)], strict=True)] == [True] + 3 * [False]


def test_pairs_without_a_well_formed_rubric_move_nothing(pairs, tmp_path):
    judge = fresh(tmp_path)
    before = flat(judge)
    phase = TrlTrainers(EXACT).train_judge(judge, pairs, {}, RubricConfig(steps=2), seed=0)
    assert phase.malformed == len(pairs) and torch.equal(flat(judge), before)


def test_the_pairwise_loss_is_refused(pairs, seeds, tmp_path):
    with pytest.raises(ConfigError, match=r"rubric\.trainer=native"):
        TrlTrainers(EXACT).train_judge(fresh(tmp_path), pairs, seeds, RubricConfig(), seed=0, loss="pairwise")
