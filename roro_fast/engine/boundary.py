"""Turn slots at a boundary into the batch a policy sees, and apply what it decided."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from roro_fast.engine.policy import BoundaryBatch, Decisions, RoutingPolicy
from roro_fast.engine.rng import uniforms
from roro_fast.engine.slots import Slots
from roro_fast.engine.trajectory import Decision, Step
from roro_fast.errors import ConfigError

_EMPTY = Step(0, 0, -1, 0.0, 0.0, 0.0, 0.0)


def build(
    slots: Slots, rows: np.ndarray, num_models: int, hidden: torch.Tensor | None, decode: object
) -> BoundaryBatch:
    """Boundary rows of one policy. `hidden` [N, H0] float32 when scout statistics are in the slots."""
    regenerate = bool(slots.regenerate[rows[0]])
    last = [slots.close_step(s, True) if regenerate else (slots.steps[s] or [_EMPTY])[-1] for s in rows]
    written = slots.written[:, rows]
    total = np.maximum(written.sum(0), 1)

    def column(values: object, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.as_tensor(np.asarray(values), dtype=dtype)

    def prefix(s: int, draft: Step | None) -> list[str]:
        steps = [*slots.steps[s], draft] if draft is not None else slots.steps[s]
        at = slots.prompt_len[s]
        return decode([slots.tokens[s, at + p.start : at + p.end].tolist() for p in steps])  # type: ignore[operator]

    requests = [slots.request[s] for s in rows]
    return BoundaryBatch(
        step_index=column(slots.step_index[rows], torch.int64),
        step_cap=int(slots.max_steps[rows].max()),
        step_tokens=column([p.end - p.start for p in last], torch.int64),
        mean_logprob=column([p.mean_logprob for p in last]),
        min_logprob=column([p.min_logprob for p in last]),
        first_entropy=column([p.first_entropy for p in last]),
        mean_entropy=column([p.mean_entropy for p in last]),
        run_min_conf=column(slots.run_min_conf[rows]),
        run_prod_conf=column(slots.run_prod_conf[rows]),
        large_share=column(written[1:].sum(0) / total),
        last_model=column([p.model for p in last], torch.int64),
        budget=column(slots.budget[rows]),
        uniforms=column(uniforms(slots.route_key[rows], slots.draws[rows])),
        num_models=num_models,
        tags=[
            {"query": r.query, "sample": r.sample, "actions": [d.action for d in slots.decisions[s]], **r.tag}
            for s, r in zip(rows, requests, strict=True)
            if r is not None
        ],
        prefix=[partial(prefix, int(s), p if regenerate else None) for s, p in zip(rows, last, strict=True)],
        scout_entropy=column(slots.scout_entropy[rows]) if hidden is not None else None,
        scout_maxprob=column(slots.scout_maxprob[rows]) if hidden is not None else None,
        hidden=hidden,
    )


def record(slots: Slots, rows: np.ndarray, out: Decisions, policy: RoutingPolicy, num_models: int) -> np.ndarray:
    """Append one Decision per row; returns the actions [N] int64. Raises ConfigError for a malformed answer."""
    n = len(rows)
    if (
        out.actions.shape != (n,)
        or out.actions.is_floating_point()
        or not 0 <= out.actions.min() <= out.actions.max() < num_models
    ):
        raise ConfigError(
            f"policy {policy.name!r}: decide() must return one integer action in [0, {num_models}) per row; "
            f"got {out.actions.tolist()[:8]} for {n} rows"
        )
    if out.logprobs.shape != (n,) or out.probs.shape != (n, num_models) or not bool(out.probs.isfinite().all()):
        raise ConfigError(
            f"policy {policy.name!r}: decide() must return logprobs [{n}] and finite probs [{n}, {num_models}]; "
            f"got {tuple(out.logprobs.shape)} and {tuple(out.probs.shape)}, starting {out.probs.flatten()[:4].tolist()}"
        )
    actions = out.actions.detach().cpu().numpy().astype(np.int64)
    logprobs, probs = out.logprobs.tolist(), out.probs.tolist()
    features = out.features.tolist() if out.features is not None else [None] * len(rows)
    for i, s in enumerate(rows):
        slots.decisions[s].append(
            Decision(int(slots.step_index[s]), int(actions[i]), logprobs[i], probs[i], policy.action_space, features[i])
        )
    slots.draws[rows] += 1
    return actions
