"""What a caller asks of the engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from roro_fast.engine.policy import RoutingPolicy
from roro_fast.tasks.base import Query


@dataclass(slots=True)
class Request:
    """One answer to generate. `prompt_ids` come ready: chat template applied once, never re-tokenised afterwards.

    `prompt_ids`, `seed` and `sample` key every random number of the request. `max_new_tokens` and `max_steps` cap the
    answer, `max_step_tokens` one step (0: off). With `ignore_eos` only these caps end anything: EOS and the delimiter
    are ordinary tokens, and all lengths are known beforehand. `temperature` 0 is greedy. `budget` is the requested cost
    as a share of all-large. `policy` overrides the rollout's; `tag` is handed to policies as it is.
    """

    prompt_ids: list[int]
    query: Query | None = None
    sample: int = 0
    seed: int = 0
    max_new_tokens: int = 256
    max_steps: int = 64
    max_step_tokens: int = 0
    ignore_eos: bool = False
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    budget: float = 1.0
    arm: str = ""
    tag: dict[str, Any] = field(default_factory=dict)
    policy: RoutingPolicy | None = None
    model: int = 0  # who writes when there is no policy
