"""Turn slots at a boundary into the batch a policy sees, ask it, and record what it decided."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from roro_fast.engine.policy import BoundaryBatch, Decisions, RoutingPolicy
from roro_fast.engine.slots import Slots
from roro_fast.engine.trajectory import Decision, Step
from roro_fast.engine.transfer import Download, upload
from roro_fast.errors import ConfigError
from roro_fast.profiling import mark


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


def build(
    slots: Slots, batcher: Any, rows: np.ndarray, num_models: int, scout: Scout | None, texts: Texts
) -> BoundaryBatch:
    """Boundary rows of one policy and one step cap."""
    regenerate = bool(slots.regenerate[rows[0]])
    ints, floats = batcher.boundary(rows, regenerate)
    slot = rows.tolist()
    return BoundaryBatch(
        torch.from_numpy(ints),
        torch.from_numpy(floats),
        step_cap=int(slots.max_steps[rows[0]]),
        num_models=num_models,
        tags=[
            {"query": r.query, "sample": r.sample, "actions": [d.action for d in slots.decisions[s]], **r.tag}
            for s in slot
            if (r := slots.request[s]) is not None
        ],
        prefix=[partial(texts, s, slots.close_step(s, True) if regenerate else None) for s in slot],
        scout_entropy=scout and scout.entropy,
        scout_maxprob=scout and scout.max_prob,
        hidden=scout and scout.hidden,
    )


def ask(
    slots: Slots, batcher: Any, rows: np.ndarray, num_models: int, scout: Scout | None, texts: Texts
) -> list[Asked]:
    """Ask each policy once about all its rows; raises ConfigError for an answer of the wrong form.

    Rows of different step caps go apart, so that what a policy sees of a row never depends on its neighbours.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for i, (s, cap) in enumerate(zip(rows.tolist(), slots.max_steps[rows].tolist(), strict=True)):
        groups.setdefault((id(slots.policy[s]), cap), []).append(i)
    out = []
    for mine in groups.values():
        whole = len(mine) == len(rows)
        group = rows if whole else rows[mine]
        policy = slots.policy[group[0]]
        assert policy is not None
        seen = scout if scout is None or whole else scout.of(np.array(mine))
        batch = build(slots, batcher, group, num_models, seen, texts)
        start = time.perf_counter()
        with mark("route"):
            d = policy.decide(batch)
        slots.routing_seconds[group] += (time.perf_counter() - start) / len(group)
        _check_form(d, policy, len(group), num_models)
        parts = (d.actions, d.logprobs, d.probs) if d.features is None else (d.actions, d.logprobs, d.probs, d.features)
        out.append(Asked(group, policy, Download([p.detach() if p.requires_grad else p for p in parts])))
    return out


def answer(slots: Slots, asked: Asked, num_models: int, keep: np.ndarray | None = None) -> list[tuple[int, int]]:
    """Append one Decision to each row that `keep` [N] bool does not leave out; returns (row, action) of each.

    Raises ConfigError for an answer that is no decision.
    """
    rows, policy, parts = asked.rows, asked.policy, asked.fetched.wait()
    if keep is not None:
        rows, parts = rows[keep], [p[keep] for p in parts]
    actions, logprobs, probs = (p.tolist() for p in parts[:3])
    if not all(0 <= a < num_models for a in actions):
        raise ConfigError(
            f"policy {policy.name!r}: decide() must return actions in [0, {num_models}); got {actions[:8]}"
        )
    if not np.isfinite(parts[2]).all():
        raise ConfigError(f"policy {policy.name!r}: decide() must return finite probs; got {probs[:2]}")
    features = parts[3].tolist() if len(parts) > 3 else [None] * len(rows)
    at = list(zip(rows.tolist(), actions, strict=True))
    for (s, action), logprob, prob, feature in zip(at, logprobs, probs, features, strict=True):
        step = int(slots.step_index[s])
        slots.decisions[s].append(Decision(step, action, logprob, prob, policy.action_space, feature))
        slots.draws[s] += 1
    return at


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
