"""The packaged nano pair: two tiny same-tokenizer decoders trained by `roro_fast.models.train_nano`."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import torch

from roro_fast.errors import CheckpointError
from roro_fast.models.decoder import Decoder
from roro_fast.models.loading import load_decoder

SIZES = ("small", "large")


def path(size: str) -> Path:
    """Directory of a packaged model, loadable by `load_decoder` and by transformers' Auto classes."""
    if size not in SIZES:
        raise CheckpointError(f"nano size: {size!r} is unknown; choose one of {', '.join(SIZES)}")
    return Path(str(files("roro_fast") / "assets" / "nano" / size))


def load_pair(dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> list[Decoder]:
    """[small, large], in pool order."""
    return [load_decoder(path(size), dtype, device) for size in SIZES]
