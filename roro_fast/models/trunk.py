"""Which first layers the models of a pool have in common, bit for bit: their trunk.

Models that began as one and were trained from some layer on, or that are the first layers of one another, compute the
same residual stream and the same keys and values up to there, whoever of them runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import torch

from roro_fast.models.decoder import TABLES, Decoder

# What may differ between models that begin alike; `hf` is where all other fields come from.
_FREE = {"vocab_size", "num_layers", "max_position", "tie_embeddings", "eos_ids", "hf", "windows"}


def shared_layers(models: Sequence[Decoder]) -> int:
    """Number p of first layers that all models share, with the embeddings and rotary tables before them.

    0 for a single model, and where device, dtype or architecture differ. Embeddings are compared for the ids that all
    models have, rotary tables for the positions. Reads weights on their device: tens of milliseconds for a large pool.
    """
    if len(models) < 2:
        return 0
    first, others = models[0], models[1:]
    if not all(_begin_alike(first, m) for m in others):
        return 0
    depth = min(m.config.num_layers for m in models)
    for i in range(depth):
        ours = dict(first.layers[i].named_parameters())
        for m in others:
            theirs = dict(m.layers[i].named_parameters())
            alike = ours.keys() == theirs.keys() and first.config.windows[i : i + 1] == m.config.windows[i : i + 1]
            if not alike or not all(_equal(p, theirs[name]) for name, p in ours.items()):
                return i
    return depth


def trunk_params(model: Decoder, depth: int) -> int:
    """Parameters of the first `depth` layers."""
    return sum(p.numel() for p in model.layers[:depth].parameters())


def _begin_alike(a: Decoder, b: Decoder) -> bool:
    same = a.device == b.device and a.dtype == b.dtype
    names = [f.name for f in fields(a.config) if f.name not in _FREE]
    if not same or any(getattr(a.config, name) != getattr(b.config, name) for name in names):
        return False
    ids = min(a.config.vocab_size, b.config.vocab_size)
    positions = min(len(a.cos), len(b.cos))
    tables = [(getattr(a, name)[:positions], getattr(b, name)[:positions]) for name in TABLES]
    return all(_equal(t, u) for t, u in tables) and _equal(a.embed.weight[:ids], b.embed.weight[:ids])


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    same_memory = a.data_ptr() == b.data_ptr() and a.stride() == b.stride()
    return a.shape == b.shape and a.dtype == b.dtype and (same_memory or torch.equal(a, b))
