"""Training checkpoints without pickle: safetensors + JSON, random states included, renamed into place as a folder."""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from roro_fast.errors import CheckpointError, DataError
from roro_fast.files import fsync_dir, read_json, write_json

if TYPE_CHECKING:
    import torch

_STEP = re.compile(r"^step-(\d+)$")


def rng_state() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors, JSON) of the process-wide torch, numpy and python generators."""
    import torch

    kind, keys, pos, has_gauss, gauss = np.random.get_state()
    version, words, spare = random.getstate()
    tensors = {"rng.torch": torch.get_rng_state(), "rng.numpy": torch.from_numpy(np.array(keys).astype(np.int64))}
    if torch.cuda.is_available():
        tensors |= {f"rng.cuda.{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    numpy_state = {"kind": str(kind), "pos": int(pos), "has_gauss": int(has_gauss), "gauss": float(gauss)}
    return tensors, {"numpy": numpy_state, "python": [version, list(words), spare]}


def set_rng_state(tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
    """Inverse of `rng_state`."""
    import torch

    torch.set_rng_state(tensors["rng.torch"])
    n = state["numpy"]
    keys = tensors["rng.numpy"].numpy().astype(np.uint32)
    np.random.set_state((n["kind"], keys, n["pos"], n["has_gauss"], n["gauss"]))
    version, words, spare = state["python"]
    random.setstate((version, tuple(words), spare))
    cuda = [tensors[k] for k in sorted(tensors) if k.startswith("rng.cuda.")]
    if cuda and torch.cuda.device_count() == len(cuda):
        torch.cuda.set_rng_state_all(cuda)


def save_checkpoint(
    directory: str | Path, step: int, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any], keep: int = 2
) -> Path:
    """Write `directory/step-<n>/` with `tensors`, the JSON `state` and all random states; keep the newest `keep`."""
    from safetensors.torch import save_file

    root = Path(directory)
    final, part = root / f"step-{step:06d}", root / f"step-{step:06d}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    rng_tensors, rng = rng_state()
    flat = {k: v.detach().cpu().contiguous().clone() for k, v in {**tensors, **rng_tensors}.items()}
    save_file(flat, part / "tensors.safetensors")
    with open(part / "tensors.safetensors", "rb") as f:
        os.fsync(f.fileno())
    write_json(part / "state.json", {"step": step, "rng": rng, "state": state})
    if final.exists():
        shutil.rmtree(final)
    os.replace(part, final)
    fsync_dir(root)
    for old in checkpoints(root)[:-keep]:
        shutil.rmtree(old)
    return final


def checkpoints(directory: str | Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    root = Path(directory)
    if not root.is_dir():
        return []
    named = [(int(m[1]), p) for p in root.iterdir() if (m := _STEP.match(p.name))]
    return [p for _, p in sorted(named)]


def load_checkpoint(path: str | Path, restore_rng: bool = True) -> tuple[int, dict[str, torch.Tensor], dict[str, Any]]:
    """(step, tensors, state) of one checkpoint folder; also restores the random states unless told not to."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    try:
        record = read_json(path / "state.json")
        tensors = load_file(path / "tensors.safetensors")
        step, rng, state = int(record["step"]), record["rng"], record["state"]
    except (DataError, SafetensorError, OSError, KeyError, TypeError) as e:
        raise CheckpointError(f"{path}: unreadable checkpoint ({e}); delete it to resume from an older one") from e
    if restore_rng:
        set_rng_state(tensors, rng)
    return step, {k: v for k, v in tensors.items() if not k.startswith("rng.")}, state
