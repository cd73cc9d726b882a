"""Hugging Face directories for Rubricor and Judge: config.json, model.safetensors, tokenizer files and roro.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from roro_fast.errors import CheckpointError
from roro_fast.models.decoder import Decoder
from roro_fast.models.loading import load_decoder, save_decoder

SETTINGS = "roro.json"


def save(directory: str | Path, model: Decoder, tokenizer: Any, settings: dict[str, Any]) -> None:
    """`settings` (role, labels, ...) go to roro.json, written last, so that its presence means a whole checkpoint."""
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    (path / SETTINGS).unlink(missing_ok=True)
    save_decoder(model, path)
    tokenizer.save_pretrained(path)
    part = path / f"{SETTINGS}.part"
    part.write_text(json.dumps(settings, indent=2) + "\n")
    part.replace(path / SETTINGS)


def read_settings(directory: str | Path, role: str) -> dict[str, Any]:
    """What roro.json says; a directory without one is a plain language model and has no settings."""
    path = Path(directory) / SETTINGS
    if not path.is_file():
        return {}
    try:
        settings: dict[str, Any] = json.loads(path.read_text())
    except json.JSONDecodeError as e:
        raise CheckpointError(f"{path}: not valid JSON ({e}); save the {role} again") from None
    found = settings.pop("role", None)
    if found not in (role, "reader"):
        raise CheckpointError(f"{path}: role is {found!r}, not {role!r}; name the {role}'s directory")
    return settings


def arguments(settings: dict[str, Any], fields: Sequence[str], labels: Sequence[str] | None) -> dict[str, Any]:
    """The settings named in `fields`; `labels`, where given, instead of the saved ones."""
    settings = settings if labels is None else settings | {"labels": labels}
    return {k: settings[k] for k in fields if k in settings}


def load(
    directory: str | Path,
    role: str,
    device: str | torch.device = "cpu",
    base: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Decoder, Any, dict[str, Any]]:
    """(decoder, tokenizer, settings). `base`: the model that a LoRA adapter in `directory` adapts."""
    from transformers import AutoTokenizer

    path, settings = Path(directory), read_settings(directory, role)
    model = load_decoder(path, dtype, device, base=base)
    own = base is None or (path / "tokenizer.json").is_file()
    return model, AutoTokenizer.from_pretrained(path if own else base), settings
