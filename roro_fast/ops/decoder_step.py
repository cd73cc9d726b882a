"""One model's turn in an engine's iteration: its forward, the head and the draw, on arrays that the engine keeps.

The same as `decoder_forward`, `decoder_logits` and `sample_step` of the C++ kernels, to the bit, without a tensor made
for each argument: the batch is where `roro_fast.engine.batching.Stage` has it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from roro_fast.ops import decoder_forward, native
from roro_fast.ops.linear import cpu as linear
from roro_fast.ops.registry import select
from roro_fast.ops.sample_step import SampledStep
from roro_fast.ops.sample_step import cpu as sample_step


class StepWeights(NamedTuple):
    """What a step reads of a model: some of its layers, the embeddings, rotary tables and the packed head, if any."""

    packed: torch.Tensor
    embed: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    head: torch.Tensor | None
    columns: int


def usable(model: Any) -> bool:
    """Whether what serves the ops of a step for this model are the C++ kernels."""
    served = _served(model.device, model.dtype, os.environ.get("RORO_IMPL", ""))
    return served and not model.config.gemma


@lru_cache(maxsize=64)
def _served(device: torch.device, dtype: torch.dtype, order: str) -> bool:
    wanted = {
        ("decoder_forward", dtype): decoder_forward.cpu,
        ("decoder_logits", dtype): decoder_forward.logits_cpu,
        ("linear", dtype): linear,
        ("sample_step", torch.float32): sample_step,
    }
    return device.type == "cpu" and all(select(op, device, t) is fn for (op, t), fn in wanted.items())


def step_weights(model: Any, span: tuple[int, int], head: bool) -> StepWeights:
    """Layers [span[0], span[1]) and perhaps the head, as they are now; packed again if they have changed since."""
    packed = decoder_forward.packed_layers(model, span)
    last = decoder_forward.packed_head(model) if head else None
    rest = (None, 0) if last is None else (last.data, last.columns)
    return StepWeights(packed, model.embed.weight, model.cos, model.sin, *rest)


def decoder_step(
    weights: StepWeights,
    pages: torch.Tensor,
    stage: Sequence[torch.Tensor],
    sizes: tuple[int, int, int, int],
    groups: Sequence[torch.Tensor | None],
    states: torch.Tensor | None,
    below: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and float32 logits of the wanted tokens of the batch on a stage; csrc/bind_torch_step.cpp.

    stage: its tokens, rows and page table. sizes: rows, tokens, wanted rows, columns of the page table. groups:
    members, offsets and lengths of `PrefixGroups`, or three None. states, below: see `Cut`.
    """
    out: tuple[torch.Tensor, torch.Tensor] = native.call(
        "decoder_step", *weights, pages, *stage, *sizes, *groups, states, below
    )
    return out


class Drawn:
    """Room for what is drawn of up to n rows: `sampled` are the first rows of its arrays, whatever was drawn last."""

    def __init__(self, n: int) -> None:
        token, statistics, finite = np.zeros((1, n), np.int64), np.zeros((3, n), np.float32), np.zeros((1, n), np.bool_)
        self._arrays = token[0], *statistics, finite[0]
        self._out = tuple(map(torch.from_numpy, (token, statistics, finite)))
        self.sampled = SampledStep(*map(torch.from_numpy, self._arrays))
        self._first: dict[int, tuple[np.ndarray, ...]] = {}
        self._rows = 0

    def draw(
        self, logits: torch.Tensor, n: int, vocab: int, rows: torch.Tensor, numbers: torch.Tensor, truncated: bool
    ) -> None:
        """`sample_step` of the first `vocab` columns of logits [n, V], with the settings on a stage."""
        native.call("sample_stage", logits, vocab, rows, numbers, truncated, *self._out)
        self._rows = n

    def wait(self) -> tuple[np.ndarray, ...]:
        """The fields of `sampled`, of the rows drawn last; they are overwritten by the next draw."""
        n = self._rows
        if n not in self._first:
            self._first[n] = tuple(a[:n] for a in self._arrays)
        return self._first[n]
