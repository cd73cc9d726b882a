"""The section `rubric` of a configuration: Rubricor, Judge and their alternation."""

from __future__ import annotations

from dataclasses import dataclass

from roro_fast.config_checks import at_least, choose, clip_range, positive, require
from roro_fast.config_trl import TRAINERS

ORDERS = ("judge_first", "rubricor_first")


@dataclass
class RubricConfig:
    """Rubricor and Judge: SFT warm-up, then `rounds` of alternation on disjoint shares of the pairs.

    `rubricor` and `judge` are model directories or packaged names to start from. `trainer` "native" updates this
    package's own decoders, "trl" their `transformers` twins (section `trl`). For the native one: `frozen` of the first
    layers stay as they are; `bf16` computes in bfloat16 under float32 weights, and so does a Judge that only scores.
    """

    rubricor: str = "nano/reader"
    judge: str = "nano/reader"
    trainer: str = "native"
    order: str = "judge_first"
    rounds: int = 3
    group_size: int = 6
    sft_steps: int = 200
    sft_lr: float = 2e-3
    steps: int = 20
    judge_lr: float = 3e-4
    rubricor_lr: float = 3e-4
    batch_size: int = 32
    kl: float = 1e-3
    clip_low: float = 0.2
    clip_high: float = 0.28
    temperature: float = 1.0
    max_criteria: int = 6
    max_tokens: int = 128
    frozen: int = 0
    bf16: bool = False

    def __post_init__(self) -> None:
        at_least(self.frozen, 0, "rubric.frozen")
        for key in ("rubricor", "judge"):
            require(bool(getattr(self, key)), f"rubric.{key}", "is empty; name a model directory or 'nano/reader'")
        choose(self.trainer, "rubric.trainer", TRAINERS)
        choose(self.order, "rubric.order", ORDERS)
        at_least(self.rounds, 1, "rubric.rounds")
        require(
            self.group_size >= 2,
            "rubric.group_size",
            f"{self.group_size} is no group to normalise by; use 2 or more",
        )
        for key in ("sft_steps", "steps"):
            at_least(getattr(self, key), 0, f"rubric.{key}")
        for key in ("sft_lr", "judge_lr", "rubricor_lr", "temperature"):
            positive(getattr(self, key), f"rubric.{key}")
        for key in ("batch_size", "max_tokens"):
            at_least(getattr(self, key), 1, f"rubric.{key}")
        require(3 <= self.max_criteria <= 6, "rubric.max_criteria", f"{self.max_criteria} is not in 3..6")
        at_least(self.kl, 0.0, "rubric.kl")
        clip_range(self.clip_low, self.clip_high, "rubric")
