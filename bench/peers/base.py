"""What every engine under test offers: load a pool once, then run workloads and say what was done.

Only the standard library is imported here; adapters import their engine inside `load`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from bench.e2e.workload import Workload, span_pairs


@dataclass
class Pool:
    """What to load. `models` are Hugging Face directories, smallest first, `ggufs` the same weights for GGUF readers.

    `random` replaces both by configurations with seeded random weights. `concurrency`, `max_len` and `kv_tokens` (per
    model) are the largest of all workloads that will be run.
    """

    models: list[str] = field(default_factory=list)
    ggufs: list[str] = field(default_factory=list)
    random: list[dict[str, Any]] = field(default_factory=list)
    dtype: str = "bfloat16"
    device: str = "cpu"
    threads: int = 2
    concurrency: int = 32
    max_len: int = 512
    kv_tokens: int = 16384
    shared: int = 0  # first layers that all models have in common

    @property
    def num_models(self) -> int:
        return max(len(self.models), len(self.random))


@dataclass
class Outcome:
    """tokens: per sequence of the workload. step_seconds: from the decision to the step's last token, all steps.

    forward_tokens / forward_pairs: tokens run through each model and (query, key) pairs attended, None where the engine
    does not say. forward_flops: those of all forwards where they do not follow from the former, because layers are run
    for several models at once. `extra`: figures that only one engine has.
    """

    seconds: float
    tokens: list[list[int]]
    step_seconds: list[float]
    forward_tokens: list[int] | None = None
    forward_pairs: list[float] | None = None
    forward_flops: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Peer:
    """An engine. `max_concurrency` below a workload's means that it takes fewer sequences at a time (0: any number)."""

    max_concurrency = 0

    def load(self, pool: Pool) -> dict[str, Any]:
        """Make ready; returns versions and settings worth recording."""
        raise RuntimeError(f"{type(self).__name__} does not say how it loads")

    def run(self, work: Workload) -> Outcome:
        raise RuntimeError(f"{type(self).__name__} does not say how it runs")

    def close(self) -> None:
        """Stop threads, if there are any."""


class Stepwise(Peer):
    """An engine used from outside: whoever finishes a step is routed at once and handed to its next writer.

    Adapters give `submit`, `advance` and, where they keep state, `finish`; `count` takes what they know of the work.
    """

    def submit(self, seq: int, model: int, ids: list[int], new_tokens: int) -> None:
        """Sequence `seq` goes on with `model`, which must write exactly `new_tokens` after `ids`."""
        raise RuntimeError(f"{type(self).__name__} does not submit")

    def advance(self) -> Iterable[tuple[int, list[int]]]:
        """Work until something may have finished; yields (seq, new tokens) of finished steps."""
        raise RuntimeError(f"{type(self).__name__} does not advance")

    def finish(self, seq: int) -> None:
        """The answer of `seq` is complete."""

    def begin(self, work: Workload) -> None:
        self._tokens: list[int] | None = [0] * work.num_models
        self._pairs = [0.0] * work.num_models

    def count(self, model: int, start: int, end: int) -> None:
        """Positions [start, end) of one sequence went through `model`."""
        if self._tokens is not None:
            self._tokens[model] += end - start
            self._pairs[model] += span_pairs(start, end)

    def uncounted(self) -> None:
        """The engine does not say what it ran."""
        self._tokens = None

    def run(self, work: Workload) -> Outcome:
        self.begin(work)
        limit = min(work.concurrency, self.max_concurrency or work.concurrency)
        ids = [list(s.prompt) for s in work.sequences]
        at = [0] * len(ids)
        since = [0.0] * len(ids)
        waiting, active = deque(range(len(ids))), 0
        step_seconds: list[float] = []
        came: list[tuple[int, int, int]] = []  # sequence, step, tokens
        begin = time.perf_counter()

        def hand_over(i: int) -> None:
            since[i] = time.perf_counter()
            self.submit(i, *_next(work, i, at[i], ids[i]))

        while waiting or active:
            while waiting and active < limit:
                hand_over(waiting.popleft())
                active += 1
            for i, new in self.advance():
                came.append((i, at[i], len(new)))
                step_seconds.append(time.perf_counter() - since[i])
                ids[i] += new
                at[i] += 1
                if at[i] < len(work.sequences[i].steps):
                    hand_over(i)
                else:
                    self.finish(i)
                    active -= 1
        seconds = time.perf_counter() - begin
        for i, step, n in came:
            if n != (wanted := work.sequences[i].steps[step][1]):
                raise RuntimeError(f"sequence {i}, step {step}: {n} tokens came, {wanted} were forced")
        tokens = [t[len(s.prompt) :] for t, s in zip(ids, work.sequences, strict=True)]
        known = self._tokens is not None
        return Outcome(seconds, tokens, step_seconds, self._tokens, self._pairs if known else None)


def _next(work: Workload, i: int, step: int, ids: list[int]) -> tuple[int, list[int], int]:
    model, new = work.sequences[i].steps[step]
    return model, ids, new
