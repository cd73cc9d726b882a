"""Counter-based uniforms: the random number of (seed, sequence, position) depends on nothing else in the batch."""

from __future__ import annotations

import numpy as np

_STEP, _MASK = 0x9E3779B97F4A7C15, (1 << 64) - 1
_GAMMA = np.uint64(_STEP)
_M1 = np.uint64(0xBF58476D1CE4E5B9)
_M2 = np.uint64(0x94D049BB133111EB)


def mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64 finaliser on uint64 (Steele, Lea, Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * _M1
    x = (x ^ (x >> np.uint64(27))) * _M2
    return x ^ (x >> np.uint64(31))


def stream_key(*parts: int) -> int:
    """One 64-bit key from integers such as (seed, sample, stream): `mix`, in plain integers for speed on a few."""
    key = 0
    for p in parts:
        x = (key + _STEP + p) & _MASK
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
        key = x ^ (x >> 31)
    return key


def uniforms(keys: np.ndarray, counters: np.ndarray) -> np.ndarray:
    """float32 in [0, 1), one per (key, counter) pair; keys uint64 [N], counters int64 [N]."""
    x = mix(keys + (counters.astype(np.uint64) + np.uint64(1)) * _GAMMA)
    return ((x >> np.uint64(40)).astype(np.float64) * 2.0**-24).astype(np.float32)
