"""Checks of config values: each names the key and what to write instead."""

from __future__ import annotations

from collections.abc import Sequence

from roro_fast.errors import ConfigError


def require(ok: bool, key: str, problem: str) -> None:
    """Raise ConfigError `key: problem` unless `ok`; `problem` says what is wrong and what to write instead."""
    if not ok:
        raise ConfigError(f"{key}: {problem}")


def choose(value: str, key: str, choices: Sequence[str]) -> None:
    require(value in choices, key, f"{value!r} is not one of {', '.join(choices)}")


def choose_all(values: Sequence[str], key: str, choices: Sequence[str]) -> None:
    require(len(values) > 0, key, f"is empty; list at least one of {', '.join(choices)}")
    for v in values:
        choose(v, key, choices)
    require(len(set(values)) == len(values), key, f"{list(values)} repeats a name; name each once")


def at_least(value: float, low: float, key: str) -> None:
    require(value >= low, key, f"{value} is too small; use {low} or more")


def share(value: float, key: str) -> None:
    require(0.0 <= value <= 1.0, key, f"{value} is not in [0, 1]")


def positive(value: float, key: str) -> None:
    require(value > 0, key, f"{value} must be greater than 0")


def clip_range(low: float, high: float, section: str) -> None:
    require(0 < low < 1, f"{section}.clip_low", f"{low} is not in (0, 1); the usual value is 0.2")
    require(high >= low, f"{section}.clip_high", f"{high} is below clip_low {low}; use {low} or more")


def check_budgets(budgets: Sequence[float], key: str) -> None:
    require(len(budgets) > 0, key, "is empty; list cost shares in (0, 1]")
    require(all(0 < b <= 1 for b in budgets), key, f"{list(budgets)} holds a value outside (0, 1]")
    require(list(budgets) == sorted(set(budgets)), key, f"{list(budgets)} must rise strictly")
