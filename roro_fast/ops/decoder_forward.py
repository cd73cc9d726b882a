"""A decoder's whole forward over paged keys and values in one C++ call, on weights packed once per model.

The model is a `roro_fast.models.decoder.Decoder`, the batch a `roro_fast.models.inference.PagedBatch`; that module owns
the public functions and the reference, which runs op by op. In bfloat16 the C++ forward rounds each product (bias and
silu(gate) * up included), each residual sum, each norm, rotated q and k, and attention, once; the reference rounds at
the same places and a few more. Rows do not depend on the batch they are in, see `linear`.
"""

from __future__ import annotations

import threading
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from roro_fast.ops import native
from roro_fast.ops.linear import PackedLinear, linear, pack_linear
from roro_fast.ops.registry import Implementation, register, requested

PARTS = ("norm_rope_store", "add_rms_norm", "silu_mul", "paged_attention", "linear")
DTYPES = (torch.float32, torch.bfloat16)

_packed: WeakKeyDictionary[nn.Module, PackedDecoder] = WeakKeyDictionary()
_lock = threading.Lock()


class PackedDecoder:
    """The packed weights of one model and what they were packed from. They take as much memory as the model's own."""

    def __init__(self, model: Any) -> None:
        self._parameters = [(m._parameters, name) for m in model.modules() for name in m._parameters]
        self._seen: list[tuple[int, int, int]] = []
        self.layers: torch.Tensor
        self.head: PackedLinear

    def fill(self, model: Any) -> None:
        seen = self._fingerprint()
        c = model.config
        sizes = c.num_layers, c.num_heads, c.num_kv_heads, c.head_dim, c.intermediate_size
        flags = c.qkv_bias, c.o_bias, c.mlp_bias, c.qk_norm
        with torch.no_grad():
            layers = native.call("decoder_new", model.norm.weight, *sizes, *flags, c.rms_norm_eps)
            for i, layer in enumerate(model.layers):
                norms = layer.qk_weights
                native.call(
                    "decoder_set_layer", layers, i, layer.input_norm.weight, layer.qkv.weight, layer.qkv.bias, *norms,
                    layer.o.weight, layer.o.bias, layer.post_norm.weight, layer.gate_up.weight, layer.gate_up.bias,
                    layer.down.weight, layer.down.bias,
                )  # fmt: skip
            self.head = pack_linear(model.head.weight, model.head.bias)
        self.layers, self._seen = layers, seen

    def stale(self) -> bool:
        return self._seen != self._fingerprint()

    def _fingerprint(self) -> list[tuple[int, int, int]]:
        """Changes when a parameter is replaced, moved or written in place."""
        return [
            (id(p), p.data_ptr(), 0 if p.is_inference() else p._version)
            for p in [parameters[name] for parameters, name in self._parameters]
            if p is not None
        ]


def packed(model: nn.Module) -> PackedDecoder:
    """The model's packed weights, packed again when a parameter has changed since."""
    found = _packed.get(model)
    if found is None or found.stale():
        with _lock:
            found = _packed.get(model) or PackedDecoder(model)
            if found.stale():
                found.fill(model)
            _packed[model] = found
    return found


def forget(model: nn.Module) -> None:
    """Pack again at the next call: for changes that torch does not count, such as writes through `.data`."""
    _packed.pop(model, None)


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
    hidden: torch.Tensor = native.call(
        "decoder_forward", packed(model).layers, model.embed.weight, model.cos, model.sin, batch.ids, batch.positions,
        batch.slots, batch.pages, batch.page_table, batch.kv_lens, batch.cu_seqlens, *shared,
    )  # fmt: skip
    return hidden


@torch.inference_mode()
def logits_cpu(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    return linear(hidden, packed(model).head, out_dtype=torch.float32, impl="cpu")


register(Implementation("decoder_forward", "cpu", cpu, usable, native.PRIORITY, auto_on=("cpu",)))
register(Implementation("decoder_logits", "cpu", logits_cpu, usable, native.PRIORITY, auto_on=("cpu",)))
