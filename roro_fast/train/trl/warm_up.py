"""SFT warm-up of Rubricor and Judge by TRL's SFTTrainer, on the sequences and targets of the native one."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset
from trl import SFTTrainer

from roro_fast.config import RubricConfig
from roro_fast.models.decoder import Decoder
from roro_fast.rubric.format import Rubric
from roro_fast.rubric.judge import Judge
from roro_fast.rubric.pairs import Pair
from roro_fast.rubric.rubricor import Rubricor
from roro_fast.train.judge_training import cycle, reading_inputs, truths
from roro_fast.train.lm import IGNORE
from roro_fast.train.trl import arguments
from roro_fast.train.trl.actor import lora_config
from roro_fast.train.trl.fit import Job, Silent, fit, quiet

Row = dict[str, list[int]]  # input_ids, and labels whose entry t is what follows token t - 1


class Warmer(Silent, SFTTrainer):
    """SFTTrainer as it is."""


def rubricor(
    rubricor: Rubricor, prompts: Mapping[str, str], seeds: Mapping[str, Rubric], config: RubricConfig, job: Job
) -> float:
    """Learn to write each query's seed rubric; returns the last loss."""
    ids = sorted(q for q in seeds if q in prompts)
    if not ids or config.sft_steps == 0:
        return float("nan")
    e = rubricor.encoder
    batches = cycle(ids, config.batch_size, f"rubricor-sft/{job.seed}")
    rows: list[Row] = []
    for _ in range(config.sft_steps):
        for q in next(batches):
            head, tail = e.rubricor(prompts[q]), e.completion(seeds[q])
            rows.append({"input_ids": head + tail, "labels": [IGNORE] * len(head) + tail})
    return train(rubricor.model, rubricor.tokenizer, rows, config, job)


def judge(judge: Judge, pairs: Sequence[Pair], seeds: Mapping[str, Rubric], config: RubricConfig, job: Job) -> float:
    """Learn the truth of sentences; returns the last loss.

    The verdict is the target behind each criterion but not in the text, as the Judge is asked: all in one pass. The
    loss is over the whole vocabulary, which also teaches that a verdict belongs there.
    """
    pool = [p for p in pairs if p.query_id in seeds]
    if not pool or config.sft_steps == 0:
        return float("nan")
    rng = random.Random(f"judge-sft/{job.seed}")
    batches = cycle(pool, config.batch_size, f"judge-sft/{job.seed}/order")
    words = judge.verdict_ids.tolist()
    rows: list[Row] = []
    for _ in range(config.sft_steps):
        inputs = reading_inputs(next(batches), seeds, rng)
        for x, prompt in zip(inputs, judge.encode(inputs), strict=True):
            labels = [IGNORE] * (len(prompt.ids) + 1)
            for at, holds in zip(prompt.rows, truths(x, judge.encoder.labels), strict=True):
                if holds is not None:
                    labels[at + 1] = words[0 if holds else 1]
            rows.append({"input_ids": [*prompt.ids, judge.encoder.eos], "labels": labels})
    return train(judge.model, judge.tokenizer, rows, config, job)


def train(model: Decoder, tokenizer: Any, rows: list[Row], config: RubricConfig, job: Job) -> float:
    """`config.sft_steps` updates on as many batches of rows, in their order."""
    with quiet():
        args = arguments.sft(
            job.out, job.config, config, model.device, rows=config.batch_size, seed=job.seed, steps=config.sft_steps
        )
        trainer = Warmer(
            model=job.actor(model),
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=copy.deepcopy(tokenizer),  # TRL gives it a padding token
            peft_config=lora_config(job.config),
        )
    log = fit(trainer, model, job)
    return log[-1]["loss"]
