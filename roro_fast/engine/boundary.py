"""Turn slots at a boundary into the batch a policy sees, ask it, and record what it decided."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from roro_fast.engine.policy import BoundaryBatch, Decisions, RoutingPolicy
from roro_fast.engine.rng import uniforms
from roro_fast.engine.slots import Slots
from roro_fast.engine.trajectory import Decision, Step
from roro_fast.engine.transfer import Download, upload
from roro_fast.errors import ConfigError
from roro_fast.profiling import mark

_EMPTY = Step(0, 0, -1, 0.0, 0.0, 0.0, 0.0)


class Scout(NamedTuple):
    """What model 0 saw at N boundaries: hidden [N, H0], entropy and max_prob [N], float32, on its device."""

    hidden: torch.Tensor
    entropy: torch.Tensor
    max_prob: torch.Tensor

    def of(self, rows: np.ndarray) -> Scout:
        (at,) = upload((rows,), self.hidden.device)
        return Scout(*(x[at] for x in self))


@dataclass(slots=True)
class Asked:
    """A policy's answer about `rows` [N] (actions, log-probs, probs and perhaps features) on its way to the host."""

    rows: np.ndarray
    policy: RoutingPolicy
    fetched: Download


Texts = Callable[[int, Step | None], list[str]]  # of a slot's steps so far, and of a draft


def build(slots: Slots, rows: np.ndarray, num_models: int, scout: Scout | None, texts: Texts) -> BoundaryBatch:
    """Boundary rows of one policy."""
    regenerate = bool(slots.regenerate[rows[0]])
    last = [slots.close_step(s, True) if regenerate else (slots.steps[s] or [_EMPTY])[-1] for s in rows]
    written = slots.written[:, rows]
    total = np.maximum(written.sum(0), 1)

    def column(values: object, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.as_tensor(np.asarray(values), dtype=dtype)

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
        prefix=[partial(texts, int(s), p if regenerate else None) for s, p in zip(rows, last, strict=True)],
        scout_entropy=scout and scout.entropy,
        scout_maxprob=scout and scout.max_prob,
        hidden=scout and scout.hidden,
    )


def ask(slots: Slots, rows: np.ndarray, num_models: int, scout: Scout | None, texts: Texts) -> list[Asked]:
    """Ask each policy once about all its rows; raises ConfigError for an answer of the wrong form.

    Rows of different step caps go apart, so that what a policy sees of a row never depends on its neighbours.
    """
    numbers: dict[tuple[int, int], int] = {}
    owners = np.array([numbers.setdefault((id(slots.policy[s]), slots.max_steps[s]), len(numbers)) for s in rows])
    out = []
    for owner in range(len(numbers)):
        mine = np.flatnonzero(owners == owner)
        group = rows[mine]
        policy = slots.policy[group[0]]
        assert policy is not None
        batch = build(slots, group, num_models, scout and scout.of(mine), texts)
        start = time.perf_counter()
        with mark("route"):
            d = policy.decide(batch)
        slots.routing_seconds[group] += (time.perf_counter() - start) / len(group)
        _check_form(d, policy, len(group), num_models)
        parts = (d.actions, d.logprobs, d.probs) if d.features is None else (d.actions, d.logprobs, d.probs, d.features)
        out.append(Asked(group, policy, Download([p.detach() for p in parts])))
    return out


def answer(
    slots: Slots, asked: Asked, num_models: int, keep: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Append one Decision to each row that `keep` [N] bool does not leave out; returns (rows, actions [N] int64).

    Raises ConfigError for an answer that is no decision.
    """
    rows, policy, parts = asked.rows, asked.policy, asked.fetched.wait()
    if keep is not None:
        rows, parts = rows[keep], [p[keep] for p in parts]
    actions, logprobs, probs = parts[0].astype(np.int64), parts[1].tolist(), parts[2].tolist()
    if len(rows) and not 0 <= actions.min() <= actions.max() < num_models:
        raise ConfigError(
            f"policy {policy.name!r}: decide() must return actions in [0, {num_models}); got {actions.tolist()[:8]}"
        )
    if not np.isfinite(parts[2]).all():
        raise ConfigError(f"policy {policy.name!r}: decide() must return finite probs; got {probs[:2]}")
    features = parts[3].tolist() if len(parts) > 3 else [None] * len(rows)
    for i, s in enumerate(rows):
        step, action = int(slots.step_index[s]), int(actions[i])
        slots.decisions[s].append(Decision(step, action, logprobs[i], probs[i], policy.action_space, features[i]))
    slots.draws[rows] += 1
    return rows, actions


def _check_form(out: Decisions, policy: RoutingPolicy, n: int, num_models: int) -> None:
    if out.actions.shape != (n,) or out.actions.is_floating_point():
        raise ConfigError(
            f"policy {policy.name!r}: decide() must return one integer action in [0, {num_models}) per row; "
            f"got {out.actions.dtype} {tuple(out.actions.shape)} for {n} rows"
        )
    if out.logprobs.shape != (n,) or out.probs.shape != (n, num_models):
        raise ConfigError(
            f"policy {policy.name!r}: decide() must return logprobs [{n}] and finite probs [{n}, {num_models}]; "
            f"got {tuple(out.logprobs.shape)} and {tuple(out.probs.shape)}"
        )
