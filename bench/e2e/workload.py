"""A fixed script of routed generation, the same for every engine: prompts, and the writer and length of every step.

Only the standard library is imported, because peers read it inside their own environments. Lengths are forced (EOS is
an ordinary token), so that engines whose greedy tokens differ by rounding still do the same work.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from typing import Any

MIN_STEP, MAX_STEP = 8, 24  # tokens of a step, uniform over sequences


@dataclass(frozen=True, slots=True)
class Sequence:
    """One answer: `steps` are (model, tokens) in order; those of one `group` share all but the prompt's last token."""

    prompt: list[int]
    steps: list[tuple[int, int]]
    group: int

    @property
    def new_tokens(self) -> int:
        return sum(n for _, n in self.steps)

    @property
    def switches(self) -> int:
        return sum(a[0] != b[0] for a, b in zip(self.steps, self.steps[1:], strict=False))


@dataclass(frozen=True, slots=True)
class Workload:
    """`concurrency` sequences at most are in flight; `num_models` is the size of the pool."""

    name: str
    sequences: list[Sequence]
    concurrency: int
    num_models: int = 2

    @property
    def new_tokens(self) -> int:
        return sum(s.new_tokens for s in self.sequences)

    @property
    def switches(self) -> int:
        return sum(s.switches for s in self.sequences)

    @property
    def longest(self) -> int:
        return max(len(s.prompt) + s.new_tokens for s in self.sequences)

    @property
    def kv_tokens(self) -> int:
        """Tokens that one model may hold at once, nothing shared."""
        sizes = sorted((len(s.prompt) + s.new_tokens for s in self.sequences), reverse=True)
        return sum(sizes[: self.concurrency])

    def first(self, n: int) -> Workload:
        """The first n sequences alone, for peers that take one after another anyway."""
        return Workload(self.name, self.sequences[:n], min(self.concurrency, n), self.num_models)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> Workload:
        rows = [Sequence(s["prompt"], [(m, n) for m, n in s["steps"]], s["group"]) for s in d["sequences"]]
        return cls(d["name"], rows, d["concurrency"], d["num_models"])


def step_lengths(rng: random.Random, new_tokens: int) -> list[int]:
    """Steps of one length drawn for the sequence, so that the boundaries of a batch fall out of step; a last rest."""
    length = min(rng.randint(MIN_STEP, MAX_STEP), new_tokens)
    rest = new_tokens % length
    return [length] * (new_tokens // length) + [rest] * (rest > 0)


def writers(rng: random.Random, steps: int, switch: float, num_models: int) -> list[int]:
    """A first writer drawn evenly; at every later step another one with probability `switch`."""
    out = [rng.randrange(num_models)]
    while len(out) < steps:
        other = (out[-1] + rng.randrange(1, num_models)) % num_models if num_models > 1 else 0
        out.append(other if rng.random() < switch else out[-1])
    return out


def routed(
    name: str,
    prompts: list[list[int]],
    *,
    new_tokens: int,
    switch: float,
    concurrency: int,
    num_models: int = 2,
    group: int = 1,
    seed: int = 0,
) -> Workload:
    """Sequence i answers prompts[i] and is in group i // group; plans depend on `seed` and i alone, not on prompts."""
    rows = []
    for i, prompt in enumerate(prompts):
        rng = random.Random(seed * 1_000_003 + i)
        lengths = step_lengths(rng, new_tokens)
        models = writers(rng, len(lengths), switch, num_models)
        rows.append(Sequence(prompt, list(zip(models, lengths, strict=True)), i // group))
    return Workload(name, rows, concurrency, num_models)


def plain(name: str, prompts: list[list[int]], *, new_tokens: int, model: int, num_models: int = 2) -> Workload:
    """Everything in one step by one model, all prompts at once."""
    rows = [Sequence(p, [(model, new_tokens)], i) for i, p in enumerate(prompts)]
    return Workload(name, rows, len(rows), num_models)


def needed(work: Workload) -> tuple[list[int], list[float]]:
    """(tokens, query-key pairs) that each model must run at least: exact catch-up, prompts of a group once.

    A model that writes the token at position p has seen all before it; one that never writes sees nothing.
    """
    tokens, pairs = [0] * work.num_models, [0.0] * work.num_models
    shared: set[tuple[int, int]] = set()
    for s in work.sequences:
        seen, end = [0] * work.num_models, len(s.prompt)
        for model, n in s.steps:
            end += n
            seen[model] = end - 1
        for m, n in enumerate(seen):
            if not n:
                continue
            start = len(s.prompt) - 1 if (s.group, m) in shared else 0
            shared.add((s.group, m))
            tokens[m] += max(n - start, 0)
            pairs[m] += span_pairs(start, n)
    return tokens, pairs


def as_one(work: Workload) -> Workload:
    """The same with all steps by one model: what layers that all models share have to run."""
    rows = [Sequence(s.prompt, [(0, n) for _, n in s.steps], s.group) for s in work.sequences]
    return Workload(work.name, rows, work.concurrency, 1)


def span_pairs(start: int, end: int) -> float:
    """(query, key) pairs of running positions [start, end) over all before them."""
    return max(0.0, end * (end + 1) / 2 - start * (start + 1) / 2)


def weight_passes(work: Workload) -> list[int]:
    """How often each model's weights must at least be read: a sequence's tokens come one after another."""
    out = []
    for m in range(work.num_models):
        written = [sum(n for model, n in s.steps if model == m) for s in work.sequences]
        out.append(max(max(written, default=0), -(-sum(written) // max(work.concurrency, 1))))
    return out
