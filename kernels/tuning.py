"""Which of a kernel's few configurations runs.

The first one, always the same, unless RORO_TUNE=1: then the first call of a shape outside a CUDA-graph capture times
all of them, and the choice is kept in memory and in a JSON file for later processes (RORO_TUNE_CACHE, by default
~/.cache/roro_fast/triton.json). Delete the file to tune anew.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch
import triton

Config = TypeVar("Config")
_chosen: dict[str, int] | None = None


def tuned(
    op: str,
    shape: tuple[object, ...],
    configs: Sequence[Config],
    launch: Callable[[Config], object],
    device: torch.device,
) -> Config:
    """The configuration for this shape; `launch(config)` must be repeatable."""
    if len(configs) == 1 or os.environ.get("RORO_TUNE", "") in ("", "0") or device.type != "cuda":
        return configs[0]
    key = f"{torch.cuda.get_device_name(device)}|triton {triton.__version__}|{op}|{shape}|{len(configs)}"
    table = _table()
    if key not in table:
        if torch.cuda.is_current_stream_capturing():
            return configs[0]
        times = [triton.testing.do_bench(lambda c=c: launch(c), warmup=5, rep=20) for c in configs]
        table[key] = times.index(min(times))
        _save(table)
    return configs[table[key]]


@cache
def cache_file() -> Path:
    named = os.environ.get("RORO_TUNE_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "roro_fast" / "triton.json"


def _table() -> dict[str, int]:
    global _chosen
    if _chosen is None:
        try:
            raw = json.loads(cache_file().read_text(encoding="utf-8"))
            _chosen = {str(k): int(v) for k, v in raw.items()}
        except (OSError, ValueError, AttributeError, TypeError):  # absent or damaged: tune again
            _chosen = {}
    return _chosen


def _save(table: dict[str, int]) -> None:
    path = cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=path.parent, suffix=".part")
        with os.fdopen(handle, "w", encoding="utf-8") as f:
            json.dump(table, f, indent=1, sort_keys=True)
        os.replace(part, path)
    except OSError:  # a read-only home: the choice lives as long as the process
        pass
