"""A decoder's whole forward over paged keys and values in one C++ call, on weights packed once per model.

The model is a `roro_fast.models.decoder.Decoder`, the batch a `roro_fast.models.inference.PagedBatch`; that module owns
the public functions and the reference, which runs op by op. In bfloat16 the C++ forward rounds each product (bias and
silu(gate) * up included), each residual sum, each norm, rotated q and k, and attention, once; the reference rounds at
the same places and a few more. Rows do not depend on the batch they are in, see `linear`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from roro_fast.ops import native
from roro_fast.ops.linear import PackedLinear, linear, pack_linear
from roro_fast.ops.registry import Implementation, register, requested

PARTS = ("norm_rope_store", "add_rms_norm", "silu_mul", "paged_attention", "linear")
DTYPES = (torch.float32, torch.bfloat16)

T = TypeVar("T")
_version = attrgetter("_version")
_lock = threading.Lock()


class Packed(Generic[T]):
    """Packed weights of some modules, and whether these have changed since. They take memory of their own."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._owners = [(m._parameters, name) for m in modules for name, p in m._parameters.items() if p is not None]
        self._seen: tuple[list[int], list[int]] | None = None
        self._kept: list[torch.Tensor] = []
        self.weights: T

    def fill(self, pack: Callable[[], T]) -> None:
        seen, kept = self._fingerprint(), self._parameters()
        with torch.no_grad():
            self.weights = pack()
        self._seen, self._kept = seen, kept  # kept alive: no new parameter can come to lie where an old one was

    def stale(self) -> bool:
        return self._seen != self._fingerprint()

    def _parameters(self) -> list[torch.Tensor]:
        return [parameters[name] for parameters, name in self._owners]  # type: ignore[misc]

    def _fingerprint(self) -> tuple[list[int], list[int]]:
        """Changes when a parameter is replaced, moved or written in place; 0.1 us per parameter."""
        now = self._parameters()
        try:
            versions = list(map(_version, now))
        except RuntimeError:  # made in inference mode: writes are not counted
            versions = []
        return list(map(torch.Tensor.data_ptr, now)), versions


_Span = tuple[int, int]  # layers [first, last)
_layers: WeakKeyDictionary[nn.Module, dict[_Span, Packed[torch.Tensor]]] = WeakKeyDictionary()
_heads: WeakKeyDictionary[nn.Module, Packed[PackedLinear]] = WeakKeyDictionary()


def packed_layers(model: Any, span: _Span | None = None) -> torch.Tensor:
    """Some layers (default all) and the final norm in one block; packed again when a parameter has changed since."""
    span = (0, model.config.num_layers) if span is None else span
    mine = _layers.get(model) or {}
    found = mine.get(span)
    if found is None or found.stale():
        with _lock:
            mine = _layers.setdefault(model, {})
            layers = [m for layer in model.layers[slice(*span)] for m in layer.modules()]
            found = mine.get(span) or Packed([model.norm, *layers])
            if found.stale():
                found.fill(lambda: _pack_layers(model, span))
            mine[span] = found
    return found.weights


def _pack_layers(model: Any, span: _Span) -> torch.Tensor:
    c = model.config
    sizes = span[1] - span[0], c.num_heads, c.num_kv_heads, c.head_dim, c.intermediate_size
    flags = c.qkv_bias, c.o_bias, c.mlp_bias, c.qk_norm
    layers: torch.Tensor = native.call("decoder_new", model.norm.weight, *sizes, *flags, c.rms_norm_eps)
    for i, layer in enumerate(model.layers[slice(*span)]):
        products = [t for m in (layer.o, layer.gate_up, layer.down) for t in (m.weight, m.bias)]
        attention = layer.input_norm.weight, layer.qkv.weight, layer.qkv.bias, *layer.qk_weights, *products[:2]
        native.call("decoder_set_layer", layers, i, *attention, layer.post_norm.weight, *products[2:])
    return layers


def packed_head(model: Any) -> PackedLinear:
    found = _heads.get(model)
    if found is None or found.stale():
        with _lock:
            found = _heads.get(model) or Packed([model.head])
            if found.stale():
                found.fill(lambda: pack_linear(model.head.weight, model.head.bias))
            _heads[model] = found
    return found.weights


def forget(model: nn.Module) -> None:
    """Pack again at the next call: for changes that torch does not count, such as writes through `.data`."""
    _layers.pop(model, None)
    _heads.pop(model, None)


def usable(device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """Only where its parts are not ordered from another implementation."""
    for part in PARTS:
        if requested(part) not in (None, "cpu"):
            return False, f"{part} is ordered from {requested(part)!r}"
    return native.usable(*DTYPES)(device, dtype)


@torch.inference_mode()
def cpu(model: Any, batch: Any) -> torch.Tensor:
    """csrc/cpu/decoder.cpp"""
    shared = (None, None, None) if batch.prefix is None else batch.prefix
    cut, span = batch.cut, None
    if cut is not None:
        span = (0, cut.depth) if cut.below else (cut.depth, model.config.num_layers)
    hidden: torch.Tensor = native.call(
        "decoder_forward", packed_layers(model, span), model.embed.weight, model.cos, model.sin, batch.ids,
        batch.positions, batch.slots, batch.pages, batch.page_table, batch.kv_lens, batch.cu_seqlens, *shared,
        batch.wanted, *((None, None, False) if cut is None else cut[1:]),
    )  # fmt: skip
    return hidden


@torch.inference_mode()
def logits_cpu(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    return linear(hidden, packed_head(model), out_dtype=torch.float32, impl="cpu")


register(Implementation("decoder_forward", "cpu", cpu, usable, native.PRIORITY, auto_on=("cpu",)))
register(Implementation("decoder_logits", "cpu", logits_cpu, usable, native.PRIORITY, auto_on=("cpu",)))
