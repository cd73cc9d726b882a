"""Load and save Hugging Face safetensors directories."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from roro_fast.errors import CheckpointError
from roro_fast.models import lora
from roro_fast.models.config import FAMILIES, DecoderConfig, unsupported
from roro_fast.models.decoder import Decoder

_LAYER = {
    "input_norm": "input_layernorm",
    "o": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "post_norm": "post_attention_layernorm",
    "down": "mlp.down_proj",
    "after_attention": "post_attention_layernorm",
    "before_mlp": "pre_feedforward_layernorm",
    "after_mlp": "post_feedforward_layernorm",
}
_FUSED = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
}
_TOP = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def hf_names(name: str) -> tuple[str, ...]:
    """The Hugging Face tensor names that make up our parameter `name` (concatenated along dim 0 when several)."""
    head, _, rest = name.partition(".")
    if head != "layers":
        return (f"{_TOP[head]}.{rest}",)
    index, module, kind = rest.split(".")
    parts = _FUSED.get(module) or (_LAYER[module],)
    return tuple(f"model.layers.{index}.{p}.{kind}" for p in parts)


def _shards(index: Path) -> list[str]:
    """Names of the shard files listed by an index, each of them inside the checkpoint directory."""
    try:
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise CheckpointError(f"{index}: not a readable shard index ({e!r}); fetch it again") from e
    for f in files:
        if Path(f).name != f:
            raise CheckpointError(f"{index}: shard {f!r} is not a file name inside the checkpoint directory")
    return files


def read_tensors(
    directory: Path, read: Callable[[Path], dict[str, torch.Tensor]] = load_file
) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors checkpoint, sharded or not; `read` gives those of one file."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        files = _shards(index)
    elif (directory / "model.safetensors").is_file():
        files = ["model.safetensors"]
    else:
        pickled = [p.name for p in (*directory.glob("*.bin"), *directory.glob("*.pt"), *directory.glob("*.pth"))]
        if pickled:
            raise CheckpointError(
                f"{directory}: only pickled weights ({pickled[0]}), which can run code when loaded; convert with "
                "`AutoModelForCausalLM.from_pretrained(...).save_pretrained(dir)` to get safetensors"
            )
        raise CheckpointError(f"{directory}: no model.safetensors; expected a Hugging Face safetensors directory")
    tensors: dict[str, torch.Tensor] = {}
    for f in files:
        try:
            tensors.update(read(directory / f))
        except (SafetensorError, OSError) as e:
            raise CheckpointError(
                f"{directory / f}: corrupt or unreadable safetensors file ({e}); fetch it again"
            ) from e
    return tensors


def read_headers(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file without their values, on the device "meta"."""
    out = {}
    with safe_open(file, "pt") as f:
        for name in f.keys():  # noqa: SIM118 - it is no mapping
            part = f.get_slice(name)
            shape = part.get_shape()
            dtype = (part[:0] if shape else f.get_tensor(name)).dtype
            out[name] = torch.empty(shape, dtype=dtype, device="meta")
    return out


def _part_sizes(c: DecoderConfig, name: str, param: torch.Tensor) -> list[int]:
    """Rows of each of the Hugging Face tensors that make up `param`."""
    parts = len(hf_names(name))
    if parts == 3:
        return [n * c.head_dim for n in (c.num_heads, c.num_kv_heads, c.num_kv_heads)]
    return [param.shape[0] // parts] * parts


def assign(model: Decoder, tensors: dict[str, torch.Tensor], source: str = "checkpoint") -> None:
    """Copy HF-named tensors into `model` in place; refuses missing, extra and misshapen ones by name."""
    left = dict(tensors)
    params = dict(model.named_parameters())
    with torch.no_grad():
        for name, param in params.items():
            try:
                parts = [left.pop(n) for n in hf_names(name)]
            except KeyError as e:
                raise CheckpointError(
                    f"{source}: tensor {e.args[0]} is missing; the file does not fit its config"
                ) from None
            for n, part, rows in zip(hf_names(name), parts, _part_sizes(model.config, name, param), strict=True):
                want = (rows, *param.shape[1:])
                if part.shape != want:
                    raise CheckpointError(f"{source}: {n} has shape {tuple(part.shape)}, config asks for {want}")
                if part.dtype not in DTYPES:
                    raise CheckpointError(
                        f"{source}: {n} is {_name(part.dtype)}; only {', '.join(map(_name, DTYPES))} weights are read, "
                        "use the checkpoint that was not quantised"
                    )
            param.copy_(parts[0] if len(parts) == 1 else torch.cat(parts))
    if model.config.tie_embeddings:
        left.pop("lm_head.weight", None)
    left = {k: v for k, v in left.items() if not k.endswith("rotary_emb.inv_freq")}
    if left:
        raise CheckpointError(
            f"{source}: unexpected tensor {min(left)} ({len(left)} in all); wrong config for these weights?"
        )


def views_of(model: Decoder) -> dict[str, torch.Tensor]:
    """HF-named views of the weights of `model`: what is written to them is written to it."""
    out: dict[str, torch.Tensor] = {}
    for name, p in model.named_parameters():
        out.update(zip(hf_names(name), p.detach().split(_part_sizes(model.config, name, p)), strict=True))
    return out


def tensors_of(model: Decoder) -> dict[str, torch.Tensor]:
    """HF-named tensors of `model`; inverse of `assign`."""
    return {name: t.contiguous().clone() for name, t in views_of(model).items()}


def load_config(directory: str | Path) -> DecoderConfig:
    from transformers import AutoConfig

    path = Path(directory)
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{directory}: no config.json; expected a Hugging Face model directory")
    source = path / "config.json"
    try:
        raw = json.loads(source.read_text())
    except ValueError as e:
        raise CheckpointError(f"{source}: not readable as JSON ({e}); fetch it again") from e
    family = raw.get("model_type") if isinstance(raw, dict) else None
    if family not in FAMILIES:
        raise CheckpointError(f"{source}: model_type {unsupported(family)}")
    if quantised := raw.get("quantization_config"):
        kind = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise CheckpointError(
            f"{source}: quantization_config: weights quantised with {kind!r} are not supported; "
            "use the checkpoint that was not quantised"
        )
    try:
        hf = AutoConfig.from_pretrained(path)
    except Exception as e:  # transformers and huggingface_hub raise many unrelated types on bad fields
        raise CheckpointError(f"{source}: not a valid {family} config ({e})") from e
    return DecoderConfig.from_hf(hf)


def load_decoder(
    directory: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    layers: int | Sequence[int] | None = None,
    base: str | Path | None = None,
) -> Decoder:
    """Frozen decoder from a HF safetensors directory; `layers` keeps the first ones, or those listed, and the head.

    A directory with a LoRA adapter (PEFT) is merged into its base model: the one the adapter names, or `base`.
    """
    config, tensors = _parts(Path(directory), layers, base)
    model = Decoder(config).to(dtype)
    assign(model, tensors, str(directory))
    return model.to(device).eval().requires_grad_(False)


def check_decoder(
    directory: str | Path, layers: int | Sequence[int] | None = None, base: str | Path | None = None
) -> DecoderConfig:
    """Raise what `load_decoder` would, from the headers of the weights alone; returns the model's config."""
    config, tensors = _parts(Path(directory), layers, base, read_headers)
    with torch.device("meta"):
        model = Decoder(config)
    assign(model, tensors, str(directory))
    return config


def _parts(
    path: Path,
    layers: int | Sequence[int] | None,
    base: str | Path | None,
    read: Callable[[Path], dict[str, torch.Tensor]] = load_file,
) -> tuple[DecoderConfig, dict[str, torch.Tensor]]:
    adapted = lora.is_adapter(path)
    weights = Path(base or lora.base_of(path)) if adapted else path
    config = load_config(weights)
    tensors = read_tensors(weights, read)
    if adapted:
        lora.merge(tensors, path)
    return (config, tensors) if layers is None else keep_layers(config, tensors, layers)


def first_layers(
    config: DecoderConfig, tensors: dict[str, torch.Tensor], layers: int
) -> tuple[DecoderConfig, dict[str, torch.Tensor]]:
    """The sub-model made of the first `layers` layers, with the same embedding, final norm and head."""
    if not 0 < layers <= config.num_layers:
        raise CheckpointError(f"layers: {layers} is not in 1..{config.num_layers}")
    return keep_layers(config, tensors, range(layers))


def keep_layers(
    config: DecoderConfig, tensors: dict[str, torch.Tensor], layers: int | Sequence[int]
) -> tuple[DecoderConfig, dict[str, torch.Tensor]]:
    """The sub-model made of the layers listed in ascending order (a number: the first ones), numbered anew."""
    import copy

    if isinstance(layers, int):
        return first_layers(config, tensors, layers)
    kept = list(layers)
    if not kept or kept != sorted(set(kept)) or not 0 <= kept[0] <= kept[-1] < config.num_layers:
        raise CheckpointError(f"layers: {kept} is not an ascending choice of 0..{config.num_layers - 1}")
    hf: Any = copy.deepcopy(config.hf)
    hf.num_hidden_layers = len(kept)
    if getattr(hf, "layer_types", None):
        hf.layer_types = [hf.layer_types[i] for i in kept]
    number = {f"model.layers.{old}.": f"model.layers.{new}." for new, old in enumerate(kept)}
    renamed: dict[str, torch.Tensor] = {}
    for name, t in tensors.items():
        head = ".".join(name.split(".")[:3]) + "."
        if not name.startswith("model.layers."):
            renamed[name] = t
        elif head in number:
            renamed[number[head] + name.removeprefix(head)] = t
    return DecoderConfig.from_hf(hf), renamed


def save_decoder(model: Decoder, directory: str | Path) -> None:
    """Write config.json and model.safetensors, readable by `transformers`; the weights file is renamed into place."""
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    model.config.hf.save_pretrained(path)
    part = path / "model.safetensors.part"
    save_file(tensors_of(model), part, metadata={"format": "pt"})
    part.replace(path / "model.safetensors")
