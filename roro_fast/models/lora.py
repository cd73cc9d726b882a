"""LoRA adapters (Hu et al., arXiv 2106.09685) in PEFT's format, merged into the base weights when they are loaded.

A merged model costs what its base costs, and everything downstream (packing, catch-up, CUDA graphs) stays as it is.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from roro_fast.errors import CheckpointError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Settings that change what an adapter means; another value than these is refused by name.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": ([], None),
    "alora_invocation_tokens": (None,),
    "trainable_token_indices": (None, [], {}),
    "lora_bias": (False, None),
}


def is_adapter(directory: str | Path) -> bool:
    return (Path(directory) / CONFIG).is_file()


def read_config(directory: Path) -> dict[str, Any]:
    """adapter_config.json of a plain LoRA adapter; CheckpointError names what is not plain about another."""
    source = directory / CONFIG
    try:
        config = json.loads(source.read_text())
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{source}: not readable as JSON ({e}); fetch it again") from e
    if not isinstance(config, dict):
        raise CheckpointError(f"{source}: holds a {type(config).__name__}; expected what PEFT's save_pretrained writes")
    for key, allowed in _PLAIN.items():
        if config.get(key, allowed[0]) not in allowed:
            raise CheckpointError(
                f"{source}: {key} {config[key]!r} is not supported; merge the adapter with PEFT's merge_and_unload "
                "and save the result"
            )
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), int | float) or config[key] <= 0:
            raise CheckpointError(f"{source}: {key} is {config.get(key)!r}; expected a positive number")
    return config


def base_of(directory: str | Path) -> str:
    """The base model that the adapter names: a path, also relative to the adapter, or a model's name."""
    path = Path(directory)
    named = read_config(path).get("base_model_name_or_path")
    if not named:
        raise CheckpointError(f"{path / CONFIG}: base_model_name_or_path is missing; write the base model's directory")
    beside = path / str(named)
    return str(beside) if beside.is_dir() else str(named)


def merge(tensors: dict[str, torch.Tensor], directory: str | Path) -> None:
    """Add scale * B A of every adapted weight to `tensors` (Hugging Face names, any float dtype), in float32."""
    path = Path(directory)
    config = read_config(path)
    if not (path / WEIGHTS).is_file():
        raise CheckpointError(f"{path}: no {WEIGHTS}; save the adapter with safe_serialization=True")
    try:
        parts = load_file(path / WEIGHTS)
    except (SafetensorError, OSError) as e:
        raise CheckpointError(f"{path / WEIGHTS}: corrupt or unreadable safetensors file ({e}); fetch it again") from e
    while parts:
        name = min(parts)
        module, kind, tail = name.removeprefix(_PREFIX).rpartition(".lora_")
        if not kind or tail not in ("A.weight", "B.weight"):
            raise CheckpointError(f"{path / WEIGHTS}: unexpected tensor {name}; only LoRA on linear layers is merged")
        try:
            a, b = (parts.pop(f"{_PREFIX}{module}.lora_{side}.weight") for side in "AB")
        except KeyError as e:
            raise CheckpointError(f"{path / WEIGHTS}: tensor {e.args[0]} is missing beside {name}") from None
        if not (a.is_floating_point() and b.is_floating_point()):
            raise CheckpointError(f"{path / WEIGHTS}: {module}: is {a.dtype} and {b.dtype}; expected float weights")
        weight = tensors.get(f"{module}.weight")
        if weight is None:
            raise CheckpointError(f"{path / WEIGHTS}: adapts {module}, which the base model does not have; wrong base?")
        if b.shape[1] != a.shape[0] or weight.shape != (b.shape[0], a.shape[1]):
            raise CheckpointError(
                f"{path / WEIGHTS}: {module}: A {tuple(a.shape)} and B {tuple(b.shape)} do not fit the base weight "
                f"{tuple(weight.shape)}; wrong base?"
            )
        change = _scale(config, module, a.shape[0]) * (b.float() @ a.float())
        tensors[f"{module}.weight"] = (weight.float() + change.to(weight.device)).to(weight.dtype)


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA (Kalajdzievski, arXiv 2312.03732)."""
    alpha = float(config["lora_alpha"])
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):  # as PEFT matches its patterns
            alpha = float(value)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
