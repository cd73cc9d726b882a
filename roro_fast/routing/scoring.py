"""Step scores from outside the pool: the protocol of a process reward model, and what asking one costs.

A scorer reads a whole answer and gives every step of it a score in [0, 1]. Its FLOPs are not the engine's; `rate`
writes them to the request's `METER`, from where `charge` adds them to the total FLOPs of the answer. Counted is what a
scorer must read that keeps its KV from step to step, as the pool's models do: every token once, discarded drafts too.
The scorers here read an answer anew at each step, which wall-clock time shows; published systems need not.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

from roro_fast.engine.policy import BoundaryBatch
from roro_fast.engine.trajectory import Trajectory
from roro_fast.errors import ConfigError

METER = "scoring"  # key of a request's tag under which scoring is metered


@dataclass(frozen=True, slots=True)
class Trace:
    """What a scorer reads: the problem's text and the text of each step, the last one perhaps a draft."""

    prompt: str
    steps: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StepScores:
    """Per step: a score in [0, 1], and the tokens and FLOPs of reading it with the KV of what comes before at hand."""

    values: tuple[float, ...]
    tokens: tuple[int, ...]
    flops: tuple[float, ...]


class StepScorer(Protocol):
    """A process reward model. Scores of a trace must not depend on the other traces of the call."""

    @property
    def name(self) -> str: ...

    def score(self, traces: Sequence[Trace]) -> list[StepScores]: ...


def meter() -> dict[str, float]:
    """A fresh meter to put under `METER` into `Request.tag`."""
    return {"tokens": 0, "flops": 0.0}


def rate(scorer: StepScorer, batch: BoundaryBatch) -> list[tuple[float, ...]]:
    """Scores of all steps so far per row (in "regenerate" the last is the draft's), charged to the row's meter.

    New since the last decision are the draft and, where the draft before it was rewritten, the step written instead.
    """
    traces = []
    for tag, prefix in zip(batch.tags, batch.prefix, strict=True):
        if tag.get("query") is None:
            raise ConfigError(f"scorer {scorer.name!r}: a step cannot be scored without its problem; set Request.query")
        traces.append(Trace(tag["query"].prompt, tuple(prefix())))
    found = scorer.score(traces)
    for tag, s in zip(batch.tags, found, strict=True):
        if METER in tag:
            new = 2 if len(s.values) > 1 and tag["actions"][-1:] != [0] else 1
            tag[METER]["tokens"] += sum(s.tokens[-new:])
            tag[METER]["flops"] += sum(s.flops[-new:])
    return [s.values for s in found]


def charge(trajectory: Trajectory) -> Trajectory:
    """Add what scoring cost to the answer's total FLOPs; generated FLOPs stay the papers' count of written tokens."""
    trajectory.cost.total_flops += trajectory.meta.get(METER, {}).get("flops", 0.0)
    return trajectory


def forward_flops(params: int, layers: int, width: int, tokens: int) -> float:
    """Of one forward over `tokens` tokens: 2N each, and attention over all (query, key) pairs; width = heads * dim."""
    return 2.0 * params * tokens + 4.0 * layers * width * tokens * (tokens + 1) / 2


def one_pass(values: Sequence[float], bounds: Sequence[int], shape: tuple[int, int, int]) -> StepScores:
    """Scores of steps that end at tokens bounds[1:]; the first one also pays for the problem before it."""
    starts, ends = [0, *bounds[1:-1]], bounds[1:]
    tokens = tuple(b - a for a, b in zip(starts, ends, strict=False))
    flops = tuple(forward_flops(*shape, b) - forward_flops(*shape, a) for a, b in zip(starts, ends, strict=False))
    return StepScores(tuple(values), tokens, flops)


class PrefixCache:
    """Remembers the scores of answers' beginnings, for scorers that must read each beginning by itself.

    Per beginning: score, its tokens, and the tokens read with it, such as a question after it. An answer is charged for
    its beginnings whether they were known or not: a cost is the answer's own.
    """

    def __init__(self, shape: tuple[int, int, int], size: int = 65536) -> None:
        self.shape, self.size = shape, size
        self._known: OrderedDict[Trace, tuple[float, int, int]] = OrderedDict()

    def missing(self, traces: Sequence[Trace]) -> list[Trace]:
        """The distinct beginnings (one per step) that are not known yet, in order of appearance."""
        return [h for h in dict.fromkeys(h for t in traces for h in beginnings(t)) if h not in self._known]

    def collect(self, traces: Sequence[Trace], new: dict[Trace, tuple[float, int, int]]) -> list[StepScores]:
        """Scores of `traces`; `new` maps each missing beginning to its (score, tokens, tokens after it)."""
        self._known.update(new)
        out = []
        for t in traces:
            rows = [self._known[h] for h in beginnings(t)]
            before = [0, *(n for _, n, _ in rows)]
            reads = [(a, n + extra) for a, (_, n, extra) in zip(before, rows, strict=False)]
            flops = tuple(forward_flops(*self.shape, b) - forward_flops(*self.shape, a) for a, b in reads)
            out.append(StepScores(tuple(v for v, _, _ in rows), tuple(b - a for a, b in reads), flops))
        while len(self._known) > self.size:
            self._known.popitem(last=False)
        return out


def beginnings(trace: Trace) -> list[Trace]:
    """The answer up to each of its steps."""
    return [Trace(trace.prompt, trace.steps[: i + 1]) for i in range(len(trace.steps))]


class Pieces:
    """Token ids of traces, made piece by piece, which fixes where each step begins; pieces met before are not redone.

    A tokenizer with a chat template gets the problem as the user's turn, after the `system` message if there is one.
    `separator` is written after every step.
    """

    def __init__(self, tokenizer: Any, separator: str = "", system: str = "") -> None:
        self.tokenizer, self.separator, self.system = tokenizer, separator, system
        self._prompt = lru_cache(maxsize=4096)(self._encode_prompt)
        self._step = lru_cache(maxsize=65536)(self._encode_step)

    def __call__(self, trace: Trace) -> tuple[list[int], list[int]]:
        """(ids, bounds): step i is ids[bounds[i] : bounds[i + 1]]."""
        ids = list(self._prompt(trace.prompt))
        bounds = [len(ids)]
        for step in trace.steps:
            ids += self._step(step)
            bounds.append(len(ids))
        return ids, bounds

    def _encode_prompt(self, prompt: str) -> tuple[int, ...]:
        if not getattr(self.tokenizer, "chat_template", None):
            return tuple(self.tokenizer(prompt)["input_ids"])
        turn = [{"role": "user", "content": prompt}]
        if self.system:
            turn.insert(0, {"role": "system", "content": self.system})
        text = self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _encode_step(self, step: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(step + self.separator, add_special_tokens=False)["input_ids"])
