"""What the engine refuses, before anything is queued: one clear error that names the field."""

from __future__ import annotations

from collections.abc import Sequence

from roro_fast.engine.kv import KVCache
from roro_fast.engine.policy import RoutingPolicy
from roro_fast.engine.request import Request
from roro_fast.engine.tracks import Tracks
from roro_fast.errors import CapacityError, ConfigError


def check_request(
    r: Request,
    policy: RoutingPolicy | None,
    kv: KVCache,
    tracks: Tracks | None,
    vocab_sizes: Sequence[int],
    max_len: int,
) -> None:
    """Raise CapacityError or ConfigError for what cannot be served; vocab_sizes [K] is per model."""
    if not 0 <= r.model < kv.num_models:
        raise ConfigError(f"request.model: {r.model} is not in the pool of {kv.num_models}")
    if tracks is None:
        _check_prompt(r.prompt_ids, vocab_sizes[0], max_len)
    else:
        for g, ids in tracks.prompts(r, policy is not None):
            _check_prompt(ids, tracks.vocabularies[g].size, tracks.limits[g])
    if r.max_new_tokens < 1 or r.max_steps < 1 or r.max_step_tokens < 0:
        raise ConfigError(
            "request.max_new_tokens and request.max_steps must be at least 1, request.max_step_tokens at least 0"
        )
    if not (r.temperature >= 0 and r.top_k >= 0 and 0 < r.top_p <= 1):
        raise ConfigError(
            f"request.temperature, top_k, top_p: {r.temperature}, {r.top_k}, {r.top_p}; temperature and top_k must "
            "not be negative, top_p must be in (0, 1]"
        )
    if policy is not None and kv.num_models < 2:
        raise ConfigError("models: routing needs a pool of at least two models; add a larger one")
    if policy is not None and policy.action_space not in ("next", "regenerate"):
        raise ConfigError(f"policy.action_space: {policy.action_space!r}; use 'next' or 'regenerate'")
    if tracks is None:  # a track of several tokenizers ends where memory does
        kv.check_fits(min(len(r.prompt_ids) + r.max_new_tokens, max_len), "request.max_new_tokens")


def _check_prompt(ids: Sequence[int], vocab_size: int, max_len: int) -> None:
    if not len(ids):
        raise ConfigError("request.prompt_ids: empty; a prompt needs at least one token")
    if len(ids) >= max_len:
        raise CapacityError(
            f"request.prompt_ids: {len(ids)} tokens do not fit the context of {max_len}; shorten the prompt"
        )
    if max(ids) >= vocab_size or min(ids) < 0:
        raise ConfigError(f"request.prompt_ids: an id is outside the shared vocabulary of {vocab_size}")
