"""Suites: fixed lists of benchmarks that are measured together and averaged with equal weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from roro_fast.errors import ConfigError, DataError
from roro_fast.tasks.base import Task
from roro_fast.tasks.benchmarks import file_benchmark, hub_benchmark
from roro_fast.tasks.gym import PREFIX, Gym

GYM_QUERIES = 200  # per setting of the gym suite, whose tasks have no end


@dataclass(frozen=True, slots=True)
class Entry:
    """One benchmark of a suite: `task` is a name of `benchmarks.HUB`, or `gym:<task>` with its `options`."""

    name: str
    task: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def default_queries(self) -> int | None:
        """How many queries are asked when no limit is given; None: all there are."""
        return GYM_QUERIES if self.task.startswith(PREFIX) else None


def _gym(name: str, task: str, **options: Any) -> Entry:
    return Entry(name, PREFIX + task, options)


SUITES: dict[str, tuple[Entry, ...]] = {
    "math5": tuple(Entry(name, name) for name in ("gsm8k", "math500", "aime24", "amc23", "olympiadbench")),
    "gym": (
        _gym("chain_sum_short", "chain_sum", min_terms=2, max_terms=3, min_digits=1, max_digits=2),
        _gym("chain_sum_long", "chain_sum", min_terms=4, max_terms=6, min_digits=2, max_digits=3),
        _gym("basic_arithmetic", "basic_arithmetic", min_terms=2, max_terms=4, min_digits=1, max_digits=2),
        _gym("products", "products", min_terms=2, max_terms=2, min_digits=1, max_digits=3),
        _gym("simple_equations", "simple_equations"),
        _gym("gsm_symbolic", "gsm_symbolic"),
        _gym("leg_counting", "leg_counting"),
        _gym("gcd", "gcd"),
        _gym("number_sequence", "number_sequence"),
        _gym("letter_counting", "letter_counting"),
    ),
}


def suite(name: str) -> tuple[Entry, ...]:
    """The entries of a suite; ConfigError names the choices."""
    if name not in SUITES:
        raise ConfigError(f"--suite: unknown suite {name!r}; choose one of {', '.join(SUITES)}")
    return SUITES[name]


def load_entry(entry: Entry, data_dir: str = "", timeout: float = 2.0) -> Task:
    """The task of an entry; malformed rows, repeated ids and missing answers are refused: it is measured whole or not.

    With `data_dir` a benchmark is read from <name>.jsonl there, or <name>_test.jsonl, instead of the hub.

    Raises:
        DataError: there is no such file; what is in it is checked when its queries are first asked for.
    """
    if entry.task.startswith(PREFIX):
        return Gym(entry.task.removeprefix(PREFIX), timeout, **entry.options)
    if not data_dir:
        return hub_benchmark(entry.task, strict=True, timeout=timeout)
    for name in (f"{entry.name}.jsonl", f"{entry.name}_test.jsonl"):
        if (path := Path(data_dir).expanduser() / name).is_file():
            return file_benchmark(path, strict=True, timeout=timeout)
    raise DataError(f"suite.data_dir: {data_dir} has no {entry.name}.jsonl; add it, or leave suite.data_dir empty")
