"""Tiny random-weight pools on disk: the real code paths in milliseconds."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Qwen3Config

from roro_fast.models import nano_tokenizer
from roro_fast.models.config import DecoderConfig
from roro_fast.models.decoder import Decoder
from roro_fast.models.loading import load_decoder, save_decoder


def save_tiny(directory: Path, *, hidden: int, layers: int = 1, seed: int = 0, context: int = 512) -> Path:
    """A Qwen3 directory over the nano vocabulary, with its tokenizer."""
    nano_tokenizer.save(directory)
    eos = nano_tokenizer.SPECIAL.index("<eos>")
    sizes = {"hidden": hidden, "layers": layers, "context": context}
    return save_random(directory, len(nano_tokenizer.vocabulary()), eos, seed=seed, **sizes)


def save_random(
    directory: Path, vocab_size: int, eos: int, *, hidden: int, layers: int, seed: int, context: int
) -> Path:
    """Config and weights of a random Qwen3 decoder whose logits are well apart."""
    c = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=2 * hidden,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        eos_token_id=eos,
        bos_token_id=None,
    )
    torch.manual_seed(seed)
    model = Decoder(DecoderConfig.from_hf(c))
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.3)
    save_decoder(model, directory)
    return directory


def save_pair(root: Path, **changes: int) -> tuple[Path, Path]:
    """(small, large) directories."""
    small = save_tiny(root / "small", hidden=16, seed=1, **changes)
    return small, save_tiny(root / "large", hidden=32, layers=2, seed=2, **changes)


def save_adapter(directory: Path, base: Path) -> Path:
    """A LoRA adapter that adds 1 to every weight of the first layer's down projection; no tokenizer."""
    directory.mkdir(parents=True)
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "base_model_name_or_path": str(base)}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    rows, columns = load_decoder(base).layers[0].down.weight.shape
    name = "base_model.model.model.layers.0.mlp.down_proj.lora_{}.weight"
    parts = {name.format("A"): torch.ones(1, columns), name.format("B"): torch.ones(rows, 1)}
    save_file(parts, directory / "adapter_model.safetensors")
    return directory


def overrides(root: Path, small: Path, large: Path) -> list[str]:
    """Config overrides that make a run tiny and put it under `root`."""
    return [
        f"run.dir={root}",
        "run.name=tiny",
        f"models.paths=[{small}, {large}]",
        "engine.max_num_seqs=16",
        "engine.kv_bytes=4MiB",
        "engine.max_new_tokens=24",
        "engine.max_steps=6",
        "task.n_train=24",
        "task.n_calibrate=6",
        "task.n_test=6",
        "collect.n_queries=6",
        "router.queries_per_step=4",
    ]
