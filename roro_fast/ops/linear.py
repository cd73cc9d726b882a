"""y = x @ W^T + b with weights packed once, batch-invariant: a row's result has the same bits alone and in any batch.

`torch.nn.functional.linear` picks another blocking, hence another rounding, for another number of rows. The C++ kernels
sum every element over ascending k in float32, whatever the batch and the number of threads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from roro_fast.ops import native
from roro_fast.ops.registry import Implementation, register, select


class PackedLinear(NamedTuple):
    """Weights as `pack_linear` leaves them: `data` is what the C++ kernels read, None where they are not built.

    Later changes of `weight` do not reach `data`; pack again.
    """

    data: torch.Tensor | None
    weight: torch.Tensor
    bias: torch.Tensor | None
    gated: bool

    @property
    def columns(self) -> int:
        return len(self.weight) // 2 if self.gated else len(self.weight)


def pack_linear(weight: torch.Tensor, bias: torch.Tensor | None = None, *, gated: bool = False) -> PackedLinear:
    """Pack weight [N, K] (float32 or bfloat16, as x will be) and bias [N] for `linear`.

    gated: weight is [gate; up], and `linear` gives silu(x gate^T) * (x up^T), [T, N / 2].
    """
    data = None
    if weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16) and native.available():
        data = native.call("linear_pack", weight.detach(), None if bias is None else bias.detach(), gated)
    return PackedLinear(data, weight, bias, gated)


def linear(
    x: torch.Tensor, packed: PackedLinear, *, out_dtype: torch.dtype | None = None, impl: str | None = None
) -> torch.Tensor:
    """x [T, K] times the packed weights: [T, N] in the dtype of x, or in float32 when `out_dtype` says so."""
    out: torch.Tensor = select("linear", x.device, x.dtype, impl)(x, packed, out_dtype)
    return out


def reference(x: torch.Tensor, packed: PackedLinear, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    y = F.linear(x, packed.weight, packed.bias)
    if packed.gated:
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up
    return y if out_dtype is None else y.to(out_dtype)


def cpu(x: torch.Tensor, packed: PackedLinear, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    """csrc/cpu/linear.cpp: one rounding, after bias and gate."""
    y: torch.Tensor = native.call("linear", x, packed.data, packed.columns, out_dtype is torch.float32)
    return y


register(Implementation("linear", "reference", reference))
native.register_cpu("linear", cpu, torch.float32, torch.bfloat16)
