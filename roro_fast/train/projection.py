"""Fit a KV projection on routed answers of a run's own task, and gate it on others."""

from __future__ import annotations

from typing import NamedTuple

from roro_fast.engine import Request
from roro_fast.engine.projection import KVProjection, fit, gate
from roro_fast.errors import ConfigError
from roro_fast.routing import RandomRouter
from roro_fast.train.setup import Workbench


class Texts(NamedTuple):
    """Token ids of prompts with their answers, and where each answer begins."""

    tokens: list[list[int]]
    starts: list[int]


def routed_texts(bench: Workbench, split: str, n: int) -> Texts:
    """Answers to the first `n` queries, every step's writer drawn by a coin: what hand-overs will meet."""
    e = bench.config.engine
    requests = (
        Request(
            bench.encode(q),
            query=q,
            seed=bench.config.run.seed,
            max_new_tokens=e.max_new_tokens,
            max_steps=e.max_steps,
            temperature=e.temperature,
        )
        for q in bench.queries(split, n)
    )
    done = {t.query_id: t for t in bench.engine.rollout(requests, RandomRouter(0.5), on_error="skip")}
    answers = [t for _, t in sorted(done.items()) if t.token_ids]
    return Texts([t.prompt_ids + t.token_ids for t in answers], [len(t.prompt_ids) for t in answers])


def fit_projection(bench: Workbench, source: str, target: str) -> KVProjection:
    """A gated projection between two labelled models of the pool, fitted on the train split, gated on calibrate.

    Raises ConfigError for an unknown label, and for a map above `projection.max_kl` with its figures.
    """
    labels, p = bench.config.models.labels, bench.config.projection
    for role, label in (("--source", source), ("--target", target)):
        if label not in labels:
            raise ConfigError(f"{role}: {label!r} is not one of models.labels: {', '.join(labels)}")
    if source == target:
        raise ConfigError(f"--target: {target!r} is the source too; choose two models")
    pair = bench.models[labels.index(source)], bench.models[labels.index(target)]
    fitted = fit(*pair, routed_texts(bench, "train", p.texts).tokens, p, bench.config.run.seed)
    held_out = routed_texts(bench, "calibrate", p.held_out)
    return gate(fitted, *pair, held_out.tokens, p.max_kl, held_out.starts, bench.config.run.seed)
