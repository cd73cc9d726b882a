"""From a slot to a finished Trajectory with its costs and step texts."""

from __future__ import annotations

from typing import Any

import numpy as np

from roro_fast.engine.request import Request
from roro_fast.engine.slots import Slots
from roro_fast.engine.trajectory import Cost, Trajectory
from roro_fast.models.decoder import Decoder


def cost_of(slots: Slots, s: int, models: list[Decoder], seconds: float) -> Cost:
    written, run = slots.written[:, s].tolist(), slots.forward_tokens[:, s].tolist()
    return Cost(
        generated_flops=sum(2.0 * m.config.num_params * n for m, n in zip(models, written, strict=True)),
        total_flops=float(slots.flops[s]),
        seconds=seconds,
        generated_tokens=written,
        forward_tokens=run[:-1],
        shared_tokens=run[-1],
        discarded_tokens=int(slots.discarded[s]),
        cached_tokens=int(slots.cached[s]),
        routing_seconds=float(slots.routing_seconds[s]),
    )


def trajectory(slots: Slots, s: int, reason: str, models: list[Decoder], now: float) -> Trajectory:
    """The record of slot s. A step cut short by the finish (NaN logits) is kept as an unclosed one."""
    r = slots.request[s]
    assert r is not None
    if slots.length[s] > slots.step_start[s]:
        slots.keep_step(s, slots.close_step(s, False))
    policy = slots.policy[s]
    n, end = int(slots.prompt_len[s]), int(slots.length[s])
    return Trajectory(
        query_id=r.query.id if r.query else "",
        prompt_ids=slots.tokens[s, :n].tolist(),
        token_ids=slots.tokens[s, n:end].tolist(),
        steps=slots.steps[s],
        decisions=slots.decisions[s],
        cost=cost_of(slots, s, models, now - float(slots.started[s])),
        finish_reason=reason,
        arm=r.arm or (policy.name if policy else ""),
        sample=r.sample,
        seed=r.seed,
        action_space=policy.action_space if policy else "",
        meta={**r.tag, "request_id": int(slots.request_id[s])},
    )


def refused(r: Request, error: str) -> Trajectory:
    """A request the engine could not take, recorded so that a run can count and report it."""
    query_id = r.query.id if r.query else ""
    meta = {**r.tag, "error": error}
    return Trajectory(query_id, r.prompt_ids, [], [], [], Cost(), "refused", r.arm, r.sample, r.seed, meta=meta)


def with_texts(done: list[Trajectory], tokenizer: Any) -> list[Trajectory]:
    """Fill `step_texts` of the finished trajectories that have none yet, with one tokenizer call."""
    if not done:
        return done
    left = [t for t in done if len(t.step_texts) < len(t.steps)]
    texts = decode(tokenizer, [t.token_ids[p.start : p.end] for t in left for p in t.steps])
    cuts = np.cumsum([0] + [len(t.steps) for t in left])
    for t, a, b in zip(left, cuts[:-1], cuts[1:], strict=True):
        t.step_texts = texts[a:b]
    return done


def decode(tokenizer: Any, steps: list[list[int]]) -> list[str]:
    """Text of each step, special tokens left out."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        texts: list[str] = backend.decode_batch(steps, skip_special_tokens=True)
        return texts
    return [tokenizer.decode(p, skip_special_tokens=True) for p in steps]
