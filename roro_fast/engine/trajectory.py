"""The record of one routed answer: tokens, who wrote each step, every decision, three costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Step:
    """Tokens `[start, end)` of `Trajectory.token_ids` (completion offsets), written by pool model `model`.

    Log-probabilities are natural logs under the writing model at temperature 1; entropies are in nats.
    `closed` is False when the step ended by a cap instead of the delimiter or EOS.
    """

    start: int
    end: int
    model: int
    mean_logprob: float
    min_logprob: float
    first_entropy: float
    mean_entropy: float
    closed: bool = True


@dataclass(slots=True)
class Decision:
    """One routing decision. `action` is a pool index; `kind` is "next" or "regenerate".

    `step` is the index of the step decided about: the one to be written ("next") or the drafted one ("regenerate",
    where action 0 keeps the draft). `features` is the policy's own input row, stored for training.
    """

    step: int
    action: int
    logprob: float
    probs: list[float]
    kind: str = "next"
    features: list[float] | None = None


@dataclass(slots=True)
class Cost:
    """Three honest counts of one trajectory (METHOD.md section 2).

    generated_flops: 2N per token kept in the final answer (the papers' count).
    total_flops: every forward: prompt prefill, catch-up, scout, discarded drafts, attention included. Prompt tokens
        that came from the prefix cache (`cached_tokens`) count as if run alone, so that a cost is the answer's own.
        Tokens whose KV was projected instead count with what the map costs; layers that all models share count once.
    seconds: wall clock from admission to finish.
    price: what the answer costs by a price table, filled by whoever has one; None without.
    """

    generated_flops: float = 0.0
    total_flops: float = 0.0
    seconds: float = 0.0
    generated_tokens: list[int] = field(default_factory=list)  # kept tokens per model
    forward_tokens: list[int] = field(default_factory=list)  # tokens run through each model, shared layers or not
    discarded_tokens: int = 0
    cached_tokens: int = 0
    routing_seconds: float = 0.0  # share of the policy's wall clock in this answer's decisions
    price: float | None = None
    shared_tokens: int = 0  # tokens run through layers that all models share, once for all of them


@dataclass(slots=True)
class Trajectory:
    """One finished (or refused) routed answer.

    `finish_reason`: "eos", "length" (token cap), "steps" (step cap), "context" (context full), "nan", "refused".
    `arm` names the collection strategy or policy, `sample` the index within the query's group.
    A pool of several tokenizers has tokens and steps in those of the first, and adds `tracks` to `meta`: for each other
    tokenizer its models, prompt_ids, token_ids and the end of each step in these; statistics and costs count the tokens
    that were written.
    An engine with projections adds `approximate`, `projected_tokens` (per model) and `projection_flops` to `meta`.
    """

    query_id: str
    prompt_ids: list[int]
    token_ids: list[int]
    steps: list[Step]
    decisions: list[Decision]
    cost: Cost
    finish_reason: str
    arm: str = ""
    sample: int = 0
    seed: int = 0
    action_space: str = "next"
    step_texts: list[str] = field(default_factory=list)
    correct: bool | None = None
    step_correct: list[bool] | None = None
    predicted: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def models(self) -> list[int]:
        """The model that wrote each step."""
        return [s.model for s in self.steps]

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable form, sharing lists with this object; `from_dict` inverts it."""
        # dataclasses.asdict copies every leaf, ten times the work, and rollouts store thousands of these.
        d = _shallow(self)
        d["steps"] = [_shallow(s) for s in self.steps]
        d["decisions"] = [_shallow(s) for s in self.decisions]
        d["cost"] = _shallow(self.cost)
        return d

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> Trajectory:
        d = dict(d)
        d["steps"] = [Step(**s) for s in d["steps"]]
        d["decisions"] = [Decision(**s) for s in d["decisions"]]
        d["cost"] = Cost(**d["cost"])
        return cls(**d)


def _shallow(record: Any) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__slots__}
