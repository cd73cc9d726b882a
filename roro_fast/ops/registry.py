"""Which implementation serves an op: frozen records, an `(ok, reason)` check each, and no silent fallback.

`auto` (the default) takes the usable implementation of highest priority. A name given as `impl=` or in the environment
variable `RORO_IMPL` ("reference" for every op that has one, or "sample_step=reference,router_score=cpu") is an order:
if it cannot serve the call, that is an error, and so is a name that nothing has.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch

from roro_fast.errors import ConfigError

Usable = Callable[[torch.device, torch.dtype], tuple[bool, str]]


FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def one_of(dtype: torch.dtype, dtypes: tuple[torch.dtype, ...]) -> tuple[bool, str]:
    """The dtype half of a `usable` check; no `dtypes` means any."""
    if not dtypes or dtype in dtypes:
        return True, ""
    return False, f"{dtype} is not one of {', '.join(str(d).removeprefix('torch.') for d in dtypes)}"


def always(device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    return True, ""


@dataclass(frozen=True, slots=True)
class Implementation:
    """One way to compute an op. Higher `priority` wins under auto; the reference has 0.

    Auto considers it on the device types of `auto_on` only; elsewhere it serves by name, if usable. Where gradients are
    needed, only a `differentiable` one serves.
    """

    op: str
    name: str
    fn: Callable[..., Any]
    usable: Usable = always
    priority: int = 0
    auto_on: tuple[str, ...] = ("cpu", "cuda", "meta")
    differentiable: bool = False


_TABLE: dict[str, dict[str, Implementation]] = {}
_MODULES = (
    "decoder_forward",
    "judge_score",
    "kv_handoff",
    "kv_plan",
    "kv_project",
    "linear",
    "norm_rope_store",
    "paged_attention",
    "router_score",
    "sample_step",
)  # each registers its ops when it is imported


def register(impl: Implementation) -> None:
    _TABLE.setdefault(impl.op, {})[impl.name] = impl
    _select.cache_clear()
    check_order.cache_clear()


def ops() -> list[str]:
    return sorted(_TABLE)


def implementations(op: str) -> list[Implementation]:
    """All registered implementations of `op`, best first."""
    return sorted(_TABLE[op].values(), key=lambda i: -i.priority)


def requested(op: str, value: str | None = None) -> str | None:
    """What RORO_IMPL (or `value`) asks for `op`; None means auto. A bare name asks it of the ops that have it."""
    for item in filter(None, (os.environ.get("RORO_IMPL", "") if value is None else value).split(",")):
        name, _, impl = item.partition("=")
        if not impl and name in _TABLE[op]:
            return name
        if impl and name == op:
            return None if impl == "auto" else impl
    return None


@lru_cache(maxsize=16)
def check_order(order: str) -> None:
    """Raise ConfigError if a value of RORO_IMPL names an op or an implementation that does not exist."""
    for module in _MODULES:
        import_module(f"roro_fast.ops.{module}")
    known = {name for table in _TABLE.values() for name in table}
    for item in filter(None, order.split(",")):
        name, _, impl = item.partition("=")
        if impl and name not in _TABLE:
            raise ConfigError(f"RORO_IMPL: there is no op {name!r}; choose one of {', '.join(ops())}")
        if not impl and name not in known | {"auto"}:
            raise ConfigError(f"RORO_IMPL: nothing is called {name!r}; choose one of auto, {', '.join(sorted(known))}")


def select(
    op: str, device: torch.device, dtype: torch.dtype, impl: str | None = None, grad: bool = False
) -> Callable[..., Any]:
    """The function that serves `op` on tensors of this device and dtype. Raises ConfigError for an impossible order.

    `grad`: the result will be differentiated.
    """
    return _select(op, device, dtype, impl, os.environ.get("RORO_IMPL", ""), grad)


@lru_cache(maxsize=512)
def _select(
    op: str, device: torch.device, dtype: torch.dtype, impl: str | None, order: str, grad: bool
) -> Callable[..., Any]:
    def check(i: Implementation) -> tuple[bool, str]:
        if grad and not i.differentiable:
            return False, "it has no gradients; call it under torch.no_grad(), or let auto choose"
        return i.usable(device, dtype)

    check_order(order)
    wanted = impl or requested(op, order)
    if wanted is None:
        return next(i for i in implementations(op) if device.type in i.auto_on and check(i)[0]).fn
    found = _TABLE[op].get(wanted)
    if found is None:
        raise ConfigError(f"impl: op {op!r} has no implementation {wanted!r}; choose one of {', '.join(_TABLE[op])}")
    ok, reason = check(found)
    if not ok:
        raise ConfigError(f"impl: {op}:{wanted} cannot serve {device.type}/{dtype}: {reason}")
    return found.fn


def needs_grad(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
