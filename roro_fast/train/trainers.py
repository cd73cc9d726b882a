"""What the alternation calls to update a model: this package's own loops, or others with the same contract."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from roro_fast.config import RubricConfig
from roro_fast.models.lm_trainer import Tick, idle
from roro_fast.rubric.format import Rubric
from roro_fast.rubric.judge import Judge
from roro_fast.rubric.pairs import Pair
from roro_fast.rubric.rubricor import Rubricor
from roro_fast.train import judge_training, rubricor_training
from roro_fast.train.judge_training import JudgePhase
from roro_fast.train.rubricor_training import RubricorPhase


class Trainers(Protocol):
    """The four trainings of an alternation. Each changes the named model's decoder in place; see the native ones."""

    def warm_up_judge(
        self,
        judge: Judge,
        pairs: Sequence[Pair],
        seeds: Mapping[str, Rubric],
        config: RubricConfig,
        *,
        seed: int,
        tick: Tick = idle,
    ) -> float: ...

    def warm_up_rubricor(
        self,
        rubricor: Rubricor,
        prompts: Mapping[str, str],
        seeds: Mapping[str, Rubric],
        config: RubricConfig,
        *,
        seed: int,
        tick: Tick = idle,
    ) -> float: ...

    def train_judge(
        self,
        judge: Judge,
        pairs: Sequence[Pair],
        rubrics: Mapping[str, Rubric],
        config: RubricConfig,
        *,
        seed: int,
        loss: str = "grpo",
        tick: Tick = idle,
    ) -> JudgePhase: ...

    def train_rubricor(
        self,
        rubricor: Rubricor,
        judge: Judge,
        pairs: Sequence[Pair],
        config: RubricConfig,
        *,
        seed: int,
        tick: Tick = idle,
    ) -> RubricorPhase: ...


@dataclass(frozen=True)
class Native:
    """AdamW on the decoders themselves."""

    warm_up_judge = staticmethod(judge_training.warm_up)
    warm_up_rubricor = staticmethod(rubricor_training.warm_up)
    train_judge = staticmethod(judge_training.train_judge)
    train_rubricor = staticmethod(rubricor_training.train_rubricor)


NATIVE = Native()
