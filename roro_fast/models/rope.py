"""Rotary tables. Frequencies and scaling (linear, dynamic, yarn, llama3) come from transformers' own initialisers."""

from __future__ import annotations

import torch

from roro_fast.errors import CheckpointError
from roro_fast.models.config import DecoderConfig

SUPPORTED = ("default", "linear", "dynamic", "yarn", "llama3")


def rope_tables(c: DecoderConfig, kind_of_layer: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin), each [max_position, head_dim] fp32, attention scaling folded in; `kind_of_layer` as in layer_types,
    for a config with rotary parameters for each kind.

    "dynamic" equals the unscaled rotary up to the trained context, which is as far as this decoder goes: beyond it the
    frequencies would change with length and cached keys would go stale.
    """
    params = dict(getattr(c.hf, "rope_parameters", None) or {})
    params = params.get(kind_of_layer) or params
    kind = params.get("rope_type", "default")
    if kind not in SUPPORTED:
        raise CheckpointError(f"config.rope_parameters.rope_type: {kind!r} is not supported; use one of {SUPPORTED}")
    if params.get("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError("config.rope_parameters.partial_rotary_factor: only 1.0 is supported")
    if kind in ("default", "dynamic"):
        base = params.get("rope_theta", 10000.0)
        inv_freq = 1.0 / base ** (torch.arange(0, c.head_dim, 2, dtype=torch.int64).float() / c.head_dim)
        scale = 1.0
    else:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        try:
            which = {"layer_type": kind_of_layer} if kind_of_layer else {}
            inv_freq, scale = ROPE_INIT_FUNCTIONS[kind](c.hf, torch.device("cpu"), **which)
        except KeyError as e:
            raise CheckpointError(f"config.rope_parameters: {kind!r} scaling needs {e.args[0]!r}; add it") from e
    angles = torch.outer(torch.arange(c.max_position).float(), inv_freq.float())
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos() * scale, angles.sin() * scale
