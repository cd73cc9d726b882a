"""Dataclasses to plain JSON values and back, with errors that name the field. NaN is written as null."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from roro_fast.errors import DataError

T = TypeVar("T")


def to_plain(value: Any) -> Any:
    """JSON form of a (nested) dataclass: dicts, lists and scalars; an undefined float becomes null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def from_plain(kind: type[T], value: Any, where: str = "") -> T:
    """Inverse of `to_plain` for type `kind`; DataError names the path of the first field that does not fit."""
    built: T = _build(kind, value, where or getattr(kind, "__name__", "value"))
    return built


def _build(kind: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        return _build(next(a for a in args if a is not type(None)), value, where)
    if origin is list:
        _expect(isinstance(value, list), where, "a list", value)
        return [_build(args[0], v, f"{where}[{i}]") for i, v in enumerate(value)]
    if origin is dict:
        _expect(isinstance(value, dict), where, "an object", value)
        return {k: _build(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, where)
    if kind is float:
        _expect(
            value is None or (isinstance(value, int | float) and not isinstance(value, bool)), where, "a number", value
        )
        return math.nan if value is None else float(value)
    _expect(isinstance(value, kind) and (kind is not int or not isinstance(value, bool)), where, kind.__name__, value)
    return value


def _build_dataclass(kind: Any, value: Any, where: str) -> Any:
    _expect(isinstance(value, dict), where, "an object", value)
    hints = typing.get_type_hints(kind)
    known = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(value) - set(known))
    if unknown:
        raise DataError(f"{where}.{unknown[0]}: unknown field; known are {', '.join(known)}")
    for f in known.values():
        if f.name not in value and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise DataError(f"{where}.{f.name}: missing")
    return kind(**{k: _build(hints[k], v, f"{where}.{k}") for k, v in value.items()})


def _expect(ok: bool, where: str, what: str, value: Any) -> None:
    if not ok:
        raise DataError(f"{where}: expected {what}, got {value!r:.60}")
