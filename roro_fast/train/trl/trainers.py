"""TRL behind the alternation's four calls."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from roro_fast.config import RubricConfig
from roro_fast.config_trl import TrlConfig
from roro_fast.errors import ConfigError
from roro_fast.models.lm_trainer import Tick, idle
from roro_fast.rubric.format import Rubric
from roro_fast.rubric.judge import Judge
from roro_fast.rubric.pairs import Pair
from roro_fast.rubric.rubricor import Rubricor
from roro_fast.train.judge_training import JudgePhase
from roro_fast.train.rubricor_training import RubricorPhase
from roro_fast.train.trl.fit import Job


def check_installed(config: TrlConfig) -> None:
    """Refuse settings whose packages are missing."""
    needs = {"trl": "rubric.trainer: 'trl' needs the package trl; pip install 'roro-fast[train]' or use 'native'"}
    if config.lora_rank > 0:
        needs["peft"] = "trl.lora_rank: needs the package peft; pip install 'roro-fast[train]' or set it to 0"
    if config.rollouts == "vllm":
        needs["vllm"] = "trl.rollouts: 'vllm' needs the package vllm; pip install 'roro-fast[vllm]' or use 'engine'"
    for package, problem in needs.items():
        if find_spec(package) is None:
            raise ConfigError(problem)


class TrlTrainers:
    """See `train.trainers.Trainers`. `out` keeps the training state of the current phase, `logs` the events of all;
    without them, both go to a temporary folder."""

    def __init__(self, config: TrlConfig, out: Path | None = None, logs: Path | None = None) -> None:
        check_installed(config)
        self.config = config
        self.scratch = tempfile.TemporaryDirectory(prefix="roro-trl-") if out is None or logs is None else None
        root = Path(self.scratch.name) if self.scratch else Path()
        self.out, self.logs = out or root / "state", logs or root / "logs"

    def warm_up_judge(
        self,
        judge: Judge,
        pairs: Sequence[Pair],
        seeds: Mapping[str, Rubric],
        config: RubricConfig,
        *,
        seed: int,
        tick: Tick = idle,
    ) -> float:
        from roro_fast.train.trl import warm_up

        return warm_up.judge(judge, pairs, seeds, config, self._job("judge-sft", seed, tick))

    def warm_up_rubricor(
        self,
        rubricor: Rubricor,
        prompts: Mapping[str, str],
        seeds: Mapping[str, Rubric],
        config: RubricConfig,
        *,
        seed: int,
        tick: Tick = idle,
    ) -> float:
        from roro_fast.train.trl import warm_up

        return warm_up.rubricor(rubricor, prompts, seeds, config, self._job("rubricor-sft", seed, tick))

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
    ) -> JudgePhase:
        from roro_fast.train.trl import judge as grpo

        if loss != "grpo":
            raise ConfigError(f"judge_loss: {loss!r} is the native trainer's; use rubric.trainer=native")
        return grpo.train(judge, pairs, rubrics, config, self._job("judge", seed, tick))

    def train_rubricor(
        self,
        rubricor: Rubricor,
        judge: Judge,
        pairs: Sequence[Pair],
        config: RubricConfig,
        *,
        seed: int,
        tick: Tick = idle,
    ) -> RubricorPhase:
        from roro_fast.train.trl import rubricor as grpo

        return grpo.train(rubricor, judge, pairs, config, self._job("rubricor", seed, tick))

    def _job(self, name: str, seed: int, tick: Tick) -> Job:
        name = f"{name}-{seed}"
        return Job(self.out / name, self.logs / name, self.config, seed, tick)
