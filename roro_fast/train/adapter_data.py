"""The batches that adapters are trained on: worked solutions of reasoning-gym's questions.

Solutions are ours (`tasks.worked`) for the arithmetic mixture, the package's own for gsm_symbolic. The questions of the
latter are some 80 templates, made of questions of GSM8K's test set (Mirzadeh et al., arXiv 2410.05229), with other
names and numbers: its splits share the templates, and GSM8K is no held-out test of who was trained on it. Questions
come from the tasks' own train split (`tasks.gym`), under seeds that no run uses for its queries.
"""

from __future__ import annotations

import random
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from roro_fast.config import choose
from roro_fast.tasks.base import Query
from roro_fast.tasks.gym import PREFIX, Gym
from roro_fast.tasks.mixture import Mixture
from roro_fast.tasks.prompting import encode_prompt
from roro_fast.tasks.worked import DELIMITER, PLANS, solution
from roro_fast.train.lm import completion_batch

SYSTEM = "Work step by step."
SAME = 24  # prompt tokens by which families are told apart
FIRST_SEED = 1000  # of a data set's draws; runs number theirs from 0
BLOCK = 256  # questions of one family drawn at a time
WEIGHTS = {  # how often each family of questions is drawn, by the name of the data
    "arithmetic": {"chain_sum": 0.6, "leg_counting": 0.4},
    "gsm": {"gsm_symbolic": 0.8, "chain_sum": 0.12, "leg_counting": 0.08},
}


class Batch(NamedTuple):
    """ids, targets [B, S] int64, right-padded; `targets` is IGNORE but where a solution's token comes next.

    `tokens` counts the ids without the padding.
    """

    ids: torch.Tensor
    targets: torch.Tensor
    tokens: int


class Corpus:
    """Batches as a function of (seed, step), of the `data` that `WEIGHTS` names.

    `pool` of them are drawn together, sorted by family and length, cut and shuffled.
    """

    def __init__(
        self,
        tokenizer: Any,
        batch: int,
        seed: int,
        pool: int = 16,
        split: str = "train",
        data: str = "arithmetic",
    ) -> None:
        choose(data, "data", tuple(WEIGHTS))
        self.weights = WEIGHTS[data]
        self.tokenizer, self.batch, self.seed, self.pool, self.split = tokenizer, batch, seed, pool, split
        parts: list[Gym] = [*Mixture("arithmetic").parts, Gym("gsm_symbolic")]
        self.tasks = {part.task: part for part in parts if part.task in self.weights}
        self._block = lru_cache(maxsize=2 * len(self.tasks))(self._draw)
        self._pooled = lru_cache(maxsize=1)(self._fill)

    def __call__(self, step: int) -> Batch:
        number, index = divmod(step, self.pool)
        return self._pooled(number)[index]

    def queries(self, start: int, n: int) -> list[Query]:
        """Questions `start` to `start + n` of the endless mixed stream."""
        out = []
        for i in range(start, start + n):
            rng = random.Random(f"{self.seed}/{i}")
            family = rng.choices(list(self.weights), list(self.weights.values()))[0]
            out.append(self._block(family, i // BLOCK)[i % BLOCK])
        return out

    def _draw(self, family: str, block: int) -> list[Query]:
        return self.tasks[family].queries(self.split, BLOCK, FIRST_SEED + 1000 * self.seed + block)

    def _fill(self, number: int) -> list[Batch]:
        size = self.batch * self.pool
        rows = [self.encode(q) for q in self.queries(number * size, size)]
        rows.sort(key=lambda r: (r[2], len(r[0]) + len(r[1])))
        batches = [rows[i : i + self.batch] for i in range(0, size, self.batch)]
        random.Random(f"{self.seed}/order/{number}").shuffle(batches)
        return [
            Batch(
                *completion_batch([p for p, _, _ in b], [c for _, c, _ in b], self.tokenizer.eos_token_id),
                sum(len(p) + len(c) - 1 for p, c, _ in b),
            )
            for b in batches
        ]

    def encode(self, query: Query) -> tuple[list[int], list[int], list[int]]:
        """(prompt, completion, family) ids; the completion ends with the token that ends a turn.

        Prompts of a family of ours begin alike, with the ids in `family`; of word problems it is empty.
        """
        prompt = encode_prompt(self.tokenizer, query, system=SYSTEM, instruction="")
        text = self.tokenizer(worked(query), add_special_tokens=False)["input_ids"]
        family = prompt[:SAME] if query.task.removeprefix(PREFIX) in PLANS else []
        return prompt, [*text, self.tokenizer.eos_token_id], family


def worked(query: Query) -> str:
    """The solution in steps, each after a blank line, with `#### N` as the last."""
    task = query.task.removeprefix(PREFIX)
    if task in PLANS:
        return solution(task, query.prompt)
    steps = [line.strip() for line in query.meta["solution"].splitlines() if line.strip()]
    return DELIMITER.join([*steps[:-1], f"#### {query.answer}"])
