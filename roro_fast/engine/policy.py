"""The protocol between the engine and whoever decides: one call per iteration for all sequences at a boundary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch


class _Row:
    """Row i of one of a batch's matrices, under a name of its own."""

    def __init__(self, matrix: str, i: int, what: str) -> None:
        self.matrix, self.i, self.__doc__ = matrix, i, what

    def __get__(self, batch: Any, owner: type) -> torch.Tensor:
        row: torch.Tensor = getattr(batch, self.matrix)[self.i]
        return row


@dataclass(slots=True)
class BoundaryBatch:
    """All sequences that reached a step boundary in this iteration. N rows, K models.

    Row statistics describe the step just written ("next": the last finished step, zeros before the first;
    "regenerate": the draft under judgement). Log-probs in nats. All of this is in the rows of two matrices on the
    host, which have names. `scout_entropy` / `scout_maxprob` / `hidden` come from the smallest model's forward and are
    None unless the policy sets `needs_scout`: `hidden` at the boundary token after which the step in question begins,
    the other two at the last token written (of a draft: its end).
    """

    ints: torch.Tensor  # [3, N] int64: step_index, step_tokens, last_model
    floats: torch.Tensor  # [9, N] float32: mean_logprob and all that follow it below
    step_cap: int
    num_models: int
    tags: list[dict[str, Any]]  # per row: {"query": Query | None, "sample": int, "actions": list[int], **request tag}
    prefix: list[Any]  # per row: callable returning the step texts so far (for oracles and rule policies)
    scout_entropy: torch.Tensor | None = None  # [N] float32, next-token entropy
    scout_maxprob: torch.Tensor | None = None  # [N] float32
    hidden: torch.Tensor | None = None  # [N, H0] float32

    step_index = _Row("ints", 0, "[N] index of the step decided about")
    step_tokens = _Row("ints", 1, "[N] tokens of the step described")
    last_model = _Row("ints", 2, "[N] writer of the last step, -1 before the first")
    mean_logprob = _Row("floats", 0, "[N]")
    min_logprob = _Row("floats", 1, "[N]")
    first_entropy = _Row("floats", 2, "[N]")
    mean_entropy = _Row("floats", 3, "[N]")
    run_min_conf = _Row("floats", 4, "[N] min over past steps of exp(mean_logprob)")
    run_prod_conf = _Row("floats", 5, "[N] product over past steps of exp(mean_logprob)")
    large_share = _Row("floats", 6, "[N] share of generated tokens not by model 0")
    budget = _Row("floats", 7, "[N] requested cost share in [0, 1]; 1 when none was requested")
    uniforms = _Row("floats", 8, "[N] in [0, 1), the randomness a sampling policy must use")

    def __len__(self) -> int:
        return self.ints.shape[1]


@dataclass(slots=True)
class Decisions:
    """actions [N] int64, logprobs [N] float32, probs [N, K] float32, features [N, F] float32 or None."""

    actions: torch.Tensor
    logprobs: torch.Tensor
    probs: torch.Tensor
    features: torch.Tensor | None = None


class RoutingPolicy(Protocol):
    """Decides the model of the next step (or whether a draft is kept) for a batch of boundaries.

    `action_space` is "next" or "regenerate". `needs_scout` asks for scout statistics and hidden states. A policy may
    have an attribute `on_device`, true when `decide` never reads a value back to the host: an engine that overlaps its
    forwards then asks it while the scout's is still running.
    """

    @property
    def name(self) -> str: ...

    @property
    def action_space(self) -> str: ...

    @property
    def needs_scout(self) -> bool: ...

    def decide(self, batch: BoundaryBatch) -> Decisions: ...
