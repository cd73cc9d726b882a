"""The protocol between the engine and whoever decides: one call per iteration for all sequences at a boundary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass(slots=True)
class BoundaryBatch:
    """All sequences that reached a step boundary in this iteration. N rows, K models.

    Row statistics describe the step just written ("next": the last finished step, zeros before the first;
    "regenerate": the draft under judgement). Log-probs in nats. `scout_entropy` / `scout_maxprob` / `hidden` come
    from the smallest model's forward and are None unless the policy sets `needs_scout`: `hidden` at the boundary token
    after which the step in question begins, the other two at the last token written (of a draft: its end).
    """

    step_index: torch.Tensor  # [N] int64, index of the step decided about
    step_cap: int
    step_tokens: torch.Tensor  # [N] int64
    mean_logprob: torch.Tensor  # [N] float32
    min_logprob: torch.Tensor  # [N] float32
    first_entropy: torch.Tensor  # [N] float32
    mean_entropy: torch.Tensor  # [N] float32
    run_min_conf: torch.Tensor  # [N] float32, min over past steps of exp(mean_logprob)
    run_prod_conf: torch.Tensor  # [N] float32, product over past steps of exp(mean_logprob)
    large_share: torch.Tensor  # [N] float32, share of generated tokens not by model 0
    last_model: torch.Tensor  # [N] int64, writer of the last step, -1 before the first
    budget: torch.Tensor  # [N] float32, requested cost share in [0, 1]; 1 when none was requested
    uniforms: torch.Tensor  # [N] float32 in [0, 1), the randomness a sampling policy must use
    num_models: int
    tags: list[dict[str, Any]]  # per row: {"query": Query | None, "sample": int, "actions": list[int], **request tag}
    prefix: list[Any]  # per row: callable returning the step texts so far (for oracles and rule policies)
    scout_entropy: torch.Tensor | None = None  # [N] float32, next-token entropy
    scout_maxprob: torch.Tensor | None = None  # [N] float32
    hidden: torch.Tensor | None = None  # [N, H0] float32

    def __len__(self) -> int:
        return int(self.step_index.numel())


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
