"""NVTX ranges at phase level, always on: without a profiler a range costs less than a tenth of a microsecond.

Nsight Systems shows them (`bench/profile.sh`). RORO_PROFILE=torch turns them into `torch.profiler` ranges instead, for
machines without Nsight, RORO_PROFILE=times adds up wall-clock seconds by name (`seconds`), RORO_PROFILE=off takes them
out. Without the `nvtx` package they do nothing.
"""

from __future__ import annotations

import os
from functools import cache
from time import perf_counter
from typing import Any, Protocol

import torch

from roro_fast.errors import ConfigError

DOMAIN = "roro_fast"
COLORS = {
    "schedule": "blue", "forward": "green", "catch-up": "yellow", "sample": "orange", "route": "red",
    "judge": "purple", "train": "brown",
}  # fmt: skip


class Range(Protocol):
    """A reusable context manager; entering it opens the range on the current thread."""

    def __enter__(self) -> Any: ...

    def __exit__(self, *exc: object) -> Any: ...


class _Silent:
    __slots__ = ()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc: object) -> None:
        pass


class _Nvtx:
    __slots__ = ("_attributes", "_domain")

    def __init__(self, domain: Any, attributes: Any) -> None:
        self._domain, self._attributes = domain, attributes

    def __enter__(self) -> None:
        self._domain.push_range(self._attributes)

    def __exit__(self, *exc: object) -> None:
        self._domain.pop_range()


class _Torch:
    """torch.profiler ranges nest, so each entry makes its own."""

    __slots__ = ("_name", "_open")

    def __init__(self, name: str) -> None:
        self._name = name
        self._open: list[Any] = []

    def __enter__(self) -> None:
        self._open.append(torch.profiler.record_function(self._name))
        self._open[-1].__enter__()

    def __exit__(self, *exc: object) -> None:
        self._open.pop().__exit__(None, None, None)


class _Times:
    """Wall-clock seconds between entering and leaving, added up; a name must not nest in itself."""

    __slots__ = ("_since", "seconds")

    def __init__(self) -> None:
        self.seconds = self._since = 0.0

    def __enter__(self) -> None:
        self._since = perf_counter()

    def __exit__(self, *exc: object) -> None:
        self.seconds += perf_counter() - self._since


_times: dict[str, _Times] = {}


def seconds() -> dict[str, float]:
    """Seconds spent in each range since the process began; empty unless RORO_PROFILE=times. Nested ranges overlap."""
    return {name: t.seconds for name, t in _times.items()}


@cache
def mark(name: str) -> Range:
    """The range `name`, one object per name: "forward/large" is coloured as a "forward"."""
    kind = os.environ.get("RORO_PROFILE", "") or "nvtx"
    if kind not in ("nvtx", "torch", "times", "off"):
        raise ConfigError(f"RORO_PROFILE: {kind!r}; use nvtx, torch, times or off")
    if kind == "torch":
        return _Torch(name)
    if kind == "times":
        return _times.setdefault(name, _Times())
    if kind == "off":
        return _Silent()
    try:
        import nvtx
    except ImportError:
        return _Silent()
    domain = nvtx.get_domain(DOMAIN)
    color = COLORS.get(name.partition("/")[0], "gray")
    return _Nvtx(domain, domain.get_event_attributes(message=name, color=color))
