"""The model TRL trains: a decoder's `transformers` twin, and the way of its weights back to the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from roro_fast.config_trl import TrlConfig
from roro_fast.errors import ConfigError
from roro_fast.models.decoder import Decoder
from roro_fast.models.loading import assign, save_decoder, views_of


def attention_of(config: TrlConfig, device: torch.device) -> str:
    """The attention of the twin; one asked for by name is refused where it cannot run."""
    from transformers.utils import is_flash_attn_2_available

    half = config.bf16 or config.dtype == "bfloat16"
    flash = device.type == "cuda" and half and is_flash_attn_2_available()
    if config.attention == "flash_attention_2" and not flash:
        raise ConfigError(
            "trl.attention: 'flash_attention_2' needs a GPU, trl.bf16 and the package flash-attn; install it or use "
            "'auto', which takes 'sdpa' without it"
        )
    if config.attention == "auto":
        return "flash_attention_2" if flash else "sdpa"
    return config.attention


def liger_of(config: TrlConfig, device: torch.device) -> bool:
    """Whether Liger's kernels replace the twin's norms, rotary and MLP."""
    from transformers.utils import is_liger_kernel_available

    usable = device.type == "cuda" and is_liger_kernel_available()
    if config.liger == "on" and not usable:
        raise ConfigError("trl.liger: 'on' needs a GPU and the package liger-kernel; install it or use 'auto'")
    return usable and config.liger != "off"


def load_actor(decoder: Decoder, directory: Path, config: TrlConfig) -> Any:
    """A `transformers` causal LM with the decoder's weights, which are left in `directory` for TRL's KL reference.

    Where all weights are trained on the decoder's device in its dtype, the twin's parameters are views of the
    decoder's: an update of one is an update of the other.
    """
    from transformers import AutoModelForCausalLM

    save_decoder(decoder, directory)
    actor: Any = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=getattr(torch, config.dtype),
        attn_implementation=attention_of(config, decoder.device),
    )
    actor.config.architectures = [type(actor).__name__]  # TRL loads its reference by this name
    actor.config.save_pretrained(directory)
    if config.lora_rank == 0 and actor.dtype == decoder.dtype:
        actor.to(decoder.device)
        views = views_of(decoder)
        for name, p in actor.named_parameters():
            if torch.equal(p.data, views[name]):
                p.data = views[name]
    return actor


def sync(actor: Any, decoder: Decoder) -> None:
    """Bring the actor's weights, adapters merged, to the decoder; copies only what is not shared with it."""
    views = views_of(decoder)
    found = merged(actor)
    apart = {n: t for n, t in found.items() if n in views and t.data_ptr() != views[n].data_ptr()}
    if apart:
        # A tied head is listed once on either side; what is shared copies onto itself.
        assign(decoder, {n: found[n] for n in views}, "trl")
    # Packed copies of the weights know by these counters that they are stale; updates of a view do not move them.
    torch.autograd.graph.increment_version(list(decoder.parameters()))


def merged(actor: Any) -> dict[str, torch.Tensor]:
    """Hugging Face names to weights, those under a LoRA adapter with what it adds."""
    base = actor.get_base_model() if hasattr(actor, "get_base_model") else actor
    out: dict[str, torch.Tensor] = {}
    for name, module in base.named_modules():
        if hasattr(module, "get_delta_weight"):
            weight = module.get_base_layer().weight.detach()
            out[f"{name}.weight"] = weight + module.get_delta_weight("default").detach().to(weight)
            if module.get_base_layer().bias is not None:
                out[f"{name}.bias"] = module.get_base_layer().bias.detach()
            continue
        if ".base_layer" in name or ".lora_" in name:
            continue
        out |= {f"{name}.{k}" if name else k: p.detach() for k, p in module.named_parameters(recurse=False)}
    return out


def lora_config(config: TrlConfig) -> Any:
    """PEFT's config of the adapter on every linear layer but the head, None for training all weights."""
    if config.lora_rank == 0:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
