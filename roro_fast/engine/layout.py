"""KV memory of a pool and the forwards that go by it, with or without layers that the models share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from roro_fast.engine.batching import Stage, make_batcher
from roro_fast.engine.forward import Forward
from roro_fast.engine.kv import CacheStats, KVCache
from roro_fast.engine.memory import Memory
from roro_fast.engine.slots import Slots
from roro_fast.errors import ConfigError
from roro_fast.models.decoder import Decoder


def may_share(
    share_layers: bool | None, graphs: bool | None, on_gpu: bool, projections: Any, num_tokenizers: int
) -> bool:
    """Whether common first layers are to be looked for; ConfigError where that was asked for with what excludes it."""
    if share_layers and projections:
        raise ConfigError("share_layers: does not go with projections, which fill each model's KV; choose one of them")
    if share_layers and num_tokenizers > 1:
        raise ConfigError("share_layers: the models have several tokenizers, and so other tokens; leave it out")
    if share_layers and graphs:
        raise ConfigError("share_layers: does not go with CUDA graphs; set graphs to False")
    if share_layers is None:
        return num_tokenizers == 1 and not projections and not (on_gpu if graphs is None else graphs)
    return share_layers


def lay_out(
    models: list[Decoder],
    slots: Slots,
    depth: int,
    *,
    kv_bytes: int,
    page_size: int,
    max_len: int,
    vocab_sizes: list[int],
    max_tokens: int,
    graphs: bool,
    delimiters: Sequence[np.ndarray],
    eos: Sequence[np.ndarray],
    stats: CacheStats | None = None,
) -> tuple[KVCache, Memory, Forward]:
    """For models that share their first `depth` layers; graphs: replay padded batches, where depth is 0.
    delimiters, eos: what ends a step and an answer, see `batching`."""
    num_slots = len(slots.phase)
    kv = KVCache(
        models,
        kv_bytes=kv_bytes,
        page_size=page_size,
        num_slots=num_slots,
        max_len=max_len,
        depth=depth,
        stats=stats,
    )
    memory = Memory(kv, slots)
    rows = num_slots if graphs and not depth else 0
    stage = Stage(num_slots, max_tokens, kv.table.shape[2])
    forward = Forward(models, slots, kv, memory, stage, vocab_sizes=vocab_sizes, graph_rows=rows, depth=depth)
    forward.batcher = make_batcher(slots, kv, stage, delimiters, eos)
    return kv, memory, forward
