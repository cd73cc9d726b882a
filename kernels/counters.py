"""Arrival counters for kernels whose last program finishes the work of the others.

Each kernel leaves its counters at zero, so one zeroed block per device and stream serves every launch on it. A launch
that is being captured into a CUDA graph gets counters of its own: the graph may be replayed on any stream.
"""

from __future__ import annotations

import torch

_PER_STREAM = 1 << 16
_ARENA = 1 << 23  # enough for the launches of some hundreds of captured forwards
_blocks: dict[tuple[torch.device, int], torch.Tensor] = {}
_arenas: dict[torch.device, tuple[torch.Tensor, int]] = {}


def counters(n: int, device: torch.device) -> torch.Tensor:
    """[>= n] int32 zeros on `device`, for one launch on the current stream."""
    if device.type != "cuda":
        return _block(n, device, 0)
    if torch.cuda.is_current_stream_capturing():
        return _captured(n, device)
    if device not in _arenas:  # before any capture, so that capture finds zeroed memory
        _arenas[device] = (torch.zeros(_ARENA, dtype=torch.int32, device=device), 0)
    return _block(n, device, torch.cuda.current_stream(device).cuda_stream)


def _block(n: int, device: torch.device, stream: int) -> torch.Tensor:
    found = _blocks.get((device, stream))
    if found is None or len(found) < n:
        found = torch.zeros(max(n, _PER_STREAM), dtype=torch.int32, device=device)
        _blocks[device, stream] = found
    return found


def _captured(n: int, device: torch.device) -> torch.Tensor:
    arena, used = _arenas.get(device, (None, 0))
    if arena is None or used + n > len(arena):
        return torch.zeros(n, dtype=torch.int32, device=device)  # adds a memset to the graph
    _arenas[device] = (arena, used + n)
    return arena[used : used + n]
