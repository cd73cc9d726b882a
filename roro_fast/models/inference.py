"""A decoder's forward over paged keys and values, without gradients: what lies between two products is one fused op."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch

from roro_fast.errors import ConfigError
from roro_fast.models.decoder import Decoder, Layer
from roro_fast.models.gemma import GemmaLayer
from roro_fast.ops import decoder_forward  # noqa: F401  registers the C++ forward
from roro_fast.ops.paged_attention import Group, PrefixGroups, for_layers, make_groups, paged_attention, wants_groups
from roro_fast.ops.registry import Implementation, register, requested, select


class Cut(NamedTuple):
    """Where a forward is cut in two: after layer `depth - 1`.

    The residual stream there is kept in states [pages, page_size, H], of the batch's tokens at slots [T] int64.
    `below`: this half runs the layers before `depth` and leaves its residuals there; the other begins with them.
    """

    depth: int
    states: torch.Tensor
    slots: torch.Tensor
    below: bool


class PagedBatch(NamedTuple):
    """T tokens over N sequences, decode and catch-up rows together, and where their keys and values live.

    ids, positions, slots [T] int64, slots = page * page_size + offset, all different; pages [pages, layers, 2,
    page_size, Hkv, D] of the model's dtype, keys then values, only of the layers that run; page_table [N, P], kv_lens
    [N] with the new tokens, cu_seqlens [N + 1], int64; prefix names sequences that share pages, see `paged_attention`.
    wanted [M] int64, ascending: the tokens whose states are asked for, None for all.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    pages: torch.Tensor
    page_table: torch.Tensor
    kv_lens: torch.Tensor
    cu_seqlens: torch.Tensor
    prefix: PrefixGroups | None = None
    wanted: torch.Tensor | None = None
    cut: Cut | None = None


def infer(model: Decoder, batch: PagedBatch) -> torch.Tensor:
    """Final-normed hidden states [M, hidden] of the batch's wanted tokens, [0, hidden] below a cut.

    The keys and values of all its tokens are written to `batch.pages`.
    """
    forward = select("decoder_forward", model.device, model.dtype)
    if model.config.gemma and forward is not gemma:
        if requested("decoder_forward") not in (None, "reference"):
            raise ConfigError(
                f"impl: decoder_forward:{requested('decoder_forward')} does not compute the norms and windows of "
                f"{model.config.family}; use 'reference' or leave it to auto"
            )
        forward = gemma
    hidden: torch.Tensor = forward(model, batch)
    return hidden


def logits(model: Decoder, hidden: torch.Tensor) -> torch.Tensor:
    """Logits [N, vocab] of rows of hidden states, in their dtype or in float32."""
    out: torch.Tensor = select("decoder_logits", model.device, model.dtype)(model, hidden)
    return out


@torch.inference_mode()
def reference(model: Decoder, batch: PagedBatch) -> torch.Tensor:
    """Op by op; each op by whatever serves it."""
    b, c = batch, model.config
    device, dtype = model.device, model.dtype
    rope = select("norm_rope_store", device, dtype)
    add_norm = select("add_rms_norm", device, dtype)
    silu_mul = select("silu_mul", device, dtype)
    grouped = b.pages.shape[1] > 0 and wants_groups(device, dtype)
    groups = make_groups(b.page_table, b.kv_lens, b.cu_seqlens, b.pages[:, 0, 0]) if grouped else None
    at = b.page_table, b.kv_lens, b.cu_seqlens
    prefix = for_layers(b.prefix, b.cu_seqlens, dtype)
    layers, total, normed = _begin(model, b)
    below = b.cut is not None and b.cut.below
    norms = [*(layer.input_norm for layer in layers[1:]), model.norm][: len(layers)]
    for layer, pages, after in zip(layers, b.pages.unbind(1), norms, strict=True):
        k, v = pages.unbind(1)
        heads = (c.num_heads, c.num_kv_heads, *layer.qk_weights)
        q = rope(layer.qkv(normed), *heads, model.cos, model.sin, b.positions, k, v, b.slots, c.rms_norm_eps)
        seen = paged_attention(q, k, v, *at, groups=groups, prefix=prefix).flatten(1)
        if after is model.norm and not below and b.wanted is not None:  # the others are only attended to
            seen, total = seen[b.wanted], total[b.wanted]
        normed, total = add_norm(layer.o(seen), total, layer.post_norm.weight, c.rms_norm_eps)
        normed, total = add_norm(layer.down(silu_mul(layer.gate_up(normed))), total, after.weight, c.rms_norm_eps)
    return _leave(b, total) if below else normed


def _begin(model: Decoder, b: PagedBatch) -> tuple[list[Layer], torch.Tensor, torch.Tensor]:
    """The layers to run, the residual stream before them and its norm."""
    layers = cast("list[Layer]", list(model.layers)[_span(model, b)])
    total = _residuals(model, b)
    if b.cut is None or b.cut.below:
        return layers, total, layers[0].input_norm(total)
    add_norm = select("add_rms_norm", model.device, model.dtype)  # what a whole forward takes this norm from
    norm = layers[0].input_norm if layers else model.norm
    return layers, total, add_norm(total, torch.zeros_like(total), norm.weight, model.config.rms_norm_eps)[0]


def _span(model: Decoder, b: PagedBatch) -> slice:
    """The layers that run."""
    if b.cut is None:
        return slice(0, model.config.num_layers)
    return slice(0, b.cut.depth) if b.cut.below else slice(b.cut.depth, model.config.num_layers)


def _residuals(model: Decoder, b: PagedBatch) -> torch.Tensor:
    """The residual stream before the first layer that runs; where none does, only of the wanted tokens."""
    if b.cut is None or b.cut.below:
        return model.embedded(b.ids)
    size, wanted = b.cut.states.shape[1], None if b.pages.shape[1] else b.wanted
    at = b.cut.slots if wanted is None else b.cut.slots[wanted]
    return b.cut.states[at // size, at % size]


def _leave(b: PagedBatch, total: torch.Tensor) -> torch.Tensor:
    """Keep the residual stream where the forward is cut; nothing is wanted of this half."""
    assert b.cut is not None
    size = b.cut.states.shape[1]
    b.cut.states[b.cut.slots // size, b.cut.slots % size] = total
    return total[:0]


@torch.inference_mode()
def gemma(model: Decoder, batch: PagedBatch) -> torch.Tensor:
    """`reference` for Gemma 3: its norms round once, which the fused ops' weights could not carry in half precision."""
    b, c = batch, model.config
    rope = select("norm_rope_store", model.device, model.dtype)
    at = b.page_table, b.kv_lens, b.cu_seqlens
    longest = b.page_table.shape[1] * b.pages.shape[3]  # a bound that needs no look at the device
    windows = [w if w < longest else 0 for w in c.windows]
    numbers = range(c.num_layers)[_span(model, b)]
    groups: dict[int, list[Group]] = {}
    for window in {windows[i] for i in numbers}:
        if wants_groups(model.device, model.dtype, window=window):
            groups[window] = make_groups(*at, b.pages[:, 0, 0], window=window)
    x, shared = _residuals(model, b), for_layers(b.prefix, b.cu_seqlens, model.dtype)
    layers = cast("list[GemmaLayer]", list(model.layers))
    for i, pages in zip(numbers, b.pages.unbind(1), strict=True):
        k_pages, v_pages = pages.unbind(1)
        heads = torch.cat(layers[i].heads(x), 1).flatten(1)
        shape = (c.num_heads, c.num_kv_heads, None, None)
        q = rope(heads, *shape, *model.rotary(i), b.positions, k_pages, v_pages, b.slots, c.rms_norm_eps)
        own, prefix = groups.get(windows[i]), None if windows[i] else shared
        seen = paged_attention(q, k_pages, v_pages, *at, groups=own, prefix=prefix, window=windows[i])
        if i + 1 == c.num_layers and b.wanted is not None and not (b.cut and b.cut.below):
            x, seen = x[b.wanted], seen[b.wanted]
        x = layers[i].rest(x, seen)
    normed: torch.Tensor = _leave(b, x) if b.cut is not None and b.cut.below else model.norm(x)
    return normed


register(Implementation("decoder_forward", "reference", reference))
register(Implementation("decoder_logits", "reference", Decoder.logits))
