"""The quality gate: how far a projection moves the receiver's next-token distributions, against a stated bound."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from roro_fast.engine.projection.artifact import Gate, KVProjection
from roro_fast.engine.projection.record import Tokens, sheets
from roro_fast.engine.transfer import upload
from roro_fast.errors import ConfigError, DataError
from roro_fast.models.decoder import Decoder
from roro_fast.models.inference import logits
from roro_fast.ops.kv_project import LinearMaps, Rotary, kv_project


def rotary(model: Decoder) -> Rotary:
    if any(model.config.windows):
        raise ConfigError(f"projections: {model.config.family} has two rotary bases, which no map accounts for")
    return Rotary(model.cos, model.sin)


def maps_on(maps: LinearMaps, target: Decoder) -> LinearMaps:
    """The maps on the receiver's device, weights in its dtype (float32 at most)."""
    narrow = target.dtype if target.dtype in (torch.bfloat16, torch.float16) else torch.float32
    return LinearMaps(maps.weight.to(target.device, narrow), maps.bias.to(target.device), maps.layers.to(target.device))


@torch.inference_mode()
def measure(
    projection: KVProjection,
    source: Decoder,
    target: Decoder,
    texts: Tokens,
    starts: Sequence[int] | None = None,
    seed: int = 0,
) -> Gate:
    """Hand every text over once, at a random token, and compare the receiver with itself from there on.

    starts: for each text where its answer begins (default: 0, all of it counts). The cut falls there or later; tokens
    before it are projected, the rest runs through the receiver. KL is taken at every token from the cut on that has a
    successor in the text, so later ones count as much as the first. The bound is left infinite.
    """
    rng = np.random.default_rng(seed)
    maps = maps_on(projection.maps, target)
    firsts = np.maximum(np.asarray(starts if starts is not None else [0] * len(texts), np.int64) - 1, 1)
    usable = [i for i, t in enumerate(texts) if len(t) - 1 > firsts[i]]
    kls, same, done = [], [], 0
    for sheet in sheets(target, [texts[i][:-1] for i in usable]):
        nothing = np.zeros(len(sheet.texts), np.int64)
        cut = rng.integers(firsts[usable[done : done + len(sheet.texts)]], sheet.lengths)
        done += len(sheet.texts)
        slots, positions = upload(sheet.index(nothing, cut), target.device)
        after = np.concatenate([np.arange(n) >= c for n, c in zip(sheet.lengths, cut, strict=True)])
        from_pages, to_pages = sheet.pages(source), sheet.pages(target)
        sheet.run(source, from_pages, nothing)
        exact = sheet.run(target, to_pages, nothing)[torch.from_numpy(after).to(target.device)]
        to_pages.zero_()
        kv_project(from_pages, slots, rotary(source), to_pages, slots, rotary(target), positions, maps)
        moved = sheet.run(target, to_pages, cut)
        for e, m in zip(exact.split(256), moved.split(256), strict=True):
            p, q = (logits(target, h).double().log_softmax(-1) for h in (e, m))
            kls.append((p.exp() * (p - q)).sum(-1).clamp_min(0).cpu())
            same.append((p.argmax(-1) == q.argmax(-1)).cpu())
    if not kls:
        raise DataError("texts: none with two tokens after its start; the gate needs some held-out text")
    kl, top = torch.cat(kls), torch.cat(same).double()
    kl = torch.where(kl.isnan(), torch.inf, kl)  # a map that makes NaN is as bad as can be
    return Gate(float(kl.mean()), float(kl.quantile(0.99)), float(top.mean()), len(kl), float("inf"))


def gate(
    projection: KVProjection,
    source: Decoder,
    target: Decoder,
    texts: Tokens,
    max_kl: float,
    starts: Sequence[int] | None = None,
    seed: int = 0,
) -> KVProjection:
    """`projection` with its error on held-out `texts`; ConfigError if that is above `max_kl` nats per token.

    texts, starts: as `measure` has them.
    """
    projection.check_models(source, target)
    g = measure(projection, source, target, texts, starts, seed)
    return projection.gated(Gate(g.kl_mean, g.kl_p99, g.top1, g.tokens, max_kl)).accept()
