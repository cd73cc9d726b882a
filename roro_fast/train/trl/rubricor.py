"""GRPO of the Rubricor by TRL's GRPOTrainer: rubrics written by the engine, rewarded by a frozen Judge."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from trl import GRPOTrainer

from roro_fast.config import RubricConfig
from roro_fast.errors import ConfigError
from roro_fast.rubric.format import Rubric
from roro_fast.rubric.judge import Judge
from roro_fast.rubric.pairs import Pair
from roro_fast.rubric.rubricor import Draft, Rubricor
from roro_fast.rubric.seeds import group_by_query
from roro_fast.train.judge_training import PAIRS_PER_QUERY, cycle
from roro_fast.train.rubricor_training import RubricorPhase, rubric_rewards
from roro_fast.train.trl import arguments
from roro_fast.train.trl.actor import lora_config, sync
from roro_fast.train.trl.fit import Job, Silent, fit, mean, quiet


class RubricorTrainer(Silent, GRPOTrainer):
    """GRPOTrainer as it is."""


class Writer:
    """The engine as TRL's rollout function: `group_size` rubrics per query, by the weights as they are at this step."""

    def __init__(self, rubricor: Rubricor, config: RubricConfig, seed: int) -> None:
        self.rubricor, self.config, self.seed = rubricor, config, seed

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        """`prompts`: each query's text `group_size` times in a row."""
        c = self.config
        sync(trainer.model, self.rubricor.model)
        drafts = self.rubricor.write(
            prompts[:: c.group_size],
            n=c.group_size,
            temperature=c.temperature,
            seed=self.seed + 7919 * trainer.state.global_step,
            max_new_tokens=c.max_tokens,
        )
        heads = {p: self.rubricor.encoder.rubricor(p) for p in set(prompts)}
        return {
            "prompt_ids": [heads[p] for p in prompts],
            "completion_ids": [list(d.ids) for group in drafts for d in group],
            "logprobs": None,
        }


class RubricReward:
    """`rubric_rewards` as a reward function of TRL: whole groups come together, in the order of the rollouts."""

    __name__ = "rubric_reward"

    def __init__(self, rubricor: Rubricor, judge: Judge, pairs: Sequence[Pair], group_size: int) -> None:
        self.rubricor, self.judge, self.pairs, self.group_size = rubricor, judge, pairs, group_size

    def __call__(
        self, completion_ids: list[list[int]], chosen: list[list[int]], log_metric: Any = None, **_: Any
    ) -> list[float]:
        """`chosen`: for every completion, the indices of the pairs that its rubric is tried on."""
        g = self.group_size
        batch = [[self.pairs[i] for i in rows] for rows in chosen[::g]]
        drafts: list[list[Draft]] = [
            [self.rubricor.read(batch[q][0].prompt, completion_ids[q * g + i]) for i in range(g)]
            for q in range(len(batch))
        ]
        if log_metric is not None:
            good = [d.rubric for group in drafts for d in group if isinstance(d.rubric, Rubric)]
            log_metric("malformed", 1 - len(good) / len(completion_ids))
            log_metric("criteria", sum(map(len, good)) / max(1, len(good)))
        return [float(r) for r in rubric_rewards(self.judge, batch, drafts).flatten()]


def train(rubricor: Rubricor, judge: Judge, pairs: Sequence[Pair], config: RubricConfig, job: Job) -> RubricorPhase:
    """See `rubricor_training.train_rubricor`: the same queries, pairs and rewards per update."""
    groups = group_by_query(pairs)
    if not groups or config.steps == 0:
        return RubricorPhase(float("nan"), 0.0, 0.0, 0.0, 0.0)
    per_step = max(1, config.batch_size // PAIRS_PER_QUERY)
    by_engine = job.config.rollouts == "engine"
    rows = plan(rubricor, pairs, per_step, config, job.seed, as_text=not by_engine)
    reward: Any = RubricReward(rubricor, judge, pairs, config.group_size)
    with quiet():
        args = arguments.grpo(
            job.out,
            job.config,
            config,
            rubricor.model.device,
            rows=per_step * config.group_size,
            most=job.config.micro_batch,
            lr=config.rubricor_lr,
            seed=job.seed,
            **arguments.vllm(job.config),
        )
        trainer = RubricorTrainer(
            model=job.actor(rubricor.model),
            reward_funcs=reward,
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=copy.deepcopy(rubricor.tokenizer),  # TRL gives it a padding token
            peft_config=lora_config(job.config),
            rollout_func=Writer(rubricor, config, job.seed) if by_engine else None,
        )
    log = fit(trainer, rubricor.model, job)
    return RubricorPhase(
        mean(log, "reward"),
        1 - mean(log, "frac_reward_zero_std"),
        0.0 if config.kl == 0 else mean(log, "kl"),
        mean(log, "malformed"),
        mean(log, "criteria"),
    )


def plan(
    rubricor: Rubricor, pairs: Sequence[Pair], per_step: int, config: RubricConfig, seed: int, as_text: bool
) -> list[dict[str, Any]]:
    """The rows of all updates: a query's text, or the prompt made of it (`as_text`), and its pairs' indices."""
    index = {id(p): i for i, p in enumerate(pairs)}
    groups = group_by_query(pairs)
    batches = cycle(sorted(groups), per_step, f"rubricor/{seed}")
    rng = random.Random(f"rubricor/{seed}/pairs")
    rows = []
    for _ in range(config.steps):
        for q in next(batches):
            tried = rng.sample(groups[q], min(PAIRS_PER_QUERY, len(groups[q])))
            prompt = prompt_text(rubricor, tried[0].prompt) if as_text else tried[0].prompt
            rows.append({"prompt": prompt, "chosen": [index[id(p)] for p in tried]})
    return rows


def prompt_text(rubricor: Rubricor, query: str) -> str:
    """The prompt as text, for generators that tokenise it themselves; refused where they would see other tokens."""
    text = rubricor.encoder.rubricor_text(query)
    if list(rubricor.tokenizer(text)["input_ids"]) != rubricor.encoder.rubricor(query):
        raise ConfigError(
            f"trl.rollouts: this tokenizer reads the prompt of {query[:40]!r} otherwise as one text; use 'engine'"
        )
    return text
