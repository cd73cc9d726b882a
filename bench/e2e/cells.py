"""Which workloads are run: the routed ones of the rollout bench and the plain figures next to them."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from bench.e2e import workload
from bench.e2e.pairs import Pair
from bench.e2e.workload import Workload

PLAIN_PROMPT, PREFILL, WARM_TOKENS, BATCH = 80, 800, 20, 32
OWN = 4  # random ids that a prompt begins with: the text is short enough that two prompts may start at one place in it


@dataclass(frozen=True)
class Cell:
    """One workload. Its prompts are fresh every round, and those of cells of other names are others, so that no prefix
    cache knows them. `kind`: "routed" or "plain".

    `reads`: it does little but read weights, so the read bandwidth is measured right before and after each run.
    """

    name: str
    kind: str
    make: Callable[[int], Workload]  # takes the round
    reads: bool = False


class Prompts:
    """Prompts of an exact length: problem texts joined and cut, or random ids where there is no tokenizer."""

    def __init__(self, pair: Pair) -> None:
        self.vocab = pair.vocab_size
        self.stream: list[int] = []
        if pair.tokenizer is not None:
            from transformers import AutoTokenizer

            from roro_fast.tasks.ledger import Ledger

            tokenizer: Any = AutoTokenizer.from_pretrained(pair.tokenizer)
            texts = [q.prompt for q in Ledger().queries("train", 400)]
            self.stream = tokenizer(" ".join(texts), add_special_tokens=False)["input_ids"]

    def draw(self, seed: int, length: int) -> list[int]:
        rng = random.Random(seed)
        if not self.stream:
            return [rng.randrange(1, self.vocab) for _ in range(length)]
        start = rng.randrange(len(self.stream))
        ring = cycle(self.stream[start:] + self.stream[:start])
        own = [rng.randrange(1, self.vocab) for _ in range(min(OWN, length))]
        return [*own, *(next(ring) for _ in range(length - len(own)))]

    def groups(self, seed: int, n: int, group: int, length: int) -> list[list[int]]:
        """n prompts; those of a group share all but the last token, which keeps their answers apart."""
        heads = [self.draw(seed * 100_003 + g, length - 1) for g in range(-(-n // group))]
        rng = random.Random(seed)
        low, high = self.vocab // 4, self.vocab - 1
        return [[*heads[i // group], rng.randrange(low, high)] for i in range(n)]


def routed_cell(
    prompts: Prompts,
    *,
    concurrency: int,
    switch: float,
    prompt: int,
    new: int,
    group: int = 1,
    num_models: int = 2,
    queries: int = 0,
) -> Cell:
    """`queries` 0: as many as are in flight, but at least four one after another."""
    n = queries or max(concurrency, 4)
    name = f"c{concurrency}_s{switch:g}_p{prompt}_n{new}_g{group}" + (f"_k{num_models}" if num_models != 2 else "")
    salt = zlib.crc32(name.encode()) << 10  # rounds of two cells never meet

    def make(round_: int) -> Workload:
        return workload.routed(
            name,
            prompts.groups(salt + round_, n, group, prompt),
            new_tokens=new,
            switch=switch,
            concurrency=concurrency,
            num_models=num_models,
            group=group,
        )

    return Cell(name, "routed", make)


def plain_cells(prompts: Prompts, num_models: int, new: int) -> list[Cell]:
    """The large model alone. "start" is what decode figures leave out; "warm" repeats the prompts of "prefill"."""

    def cell(name: str, n: int, prompt: int, tokens: int, salt: int) -> Cell:
        def make(round_: int) -> Workload:
            ids = [prompts.draw((round_ * 31 + salt) * 7919 + i, prompt) for i in range(n)]
            return workload.plain(name, ids, new_tokens=tokens, model=num_models - 1, num_models=num_models)

        return Cell(name, "plain", make, reads=name == "decode_1")

    return [
        cell("start_1", 1, PLAIN_PROMPT, 1, 1),
        cell("decode_1", 1, PLAIN_PROMPT, new, 2),
        cell(f"start_{BATCH}", BATCH, PLAIN_PROMPT, 1, 3),
        cell(f"decode_{BATCH}", BATCH, PLAIN_PROMPT, new, 4),
        cell("prefill", 1, PREFILL, 1, 5),
        cell("warm", 1, PREFILL, WARM_TOKENS, 5),
    ]


def sweep_cells(prompts: Prompts, new: int) -> list[Cell]:
    """Every workload that the issue names, around 32 concurrent at switch rate 0.2 and 100-token prompts."""
    base = {"concurrency": 32, "switch": 0.2, "prompt": 100, "new": new}
    changes: list[dict[str, Any]] = [
        {"concurrency": 1},
        {"concurrency": 128},
        {"switch": 0.0},
        {"switch": 0.5},
        {"group": 8},
        {"concurrency": 128, "group": 8},
        {"prompt": 1000},
        {"concurrency": 1, "prompt": 1000},
    ]
    return [routed_cell(prompts, **(base | change)) for change in changes]
