"""Tasks by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from roro_fast.errors import ConfigError
from roro_fast.tasks.base import Task
from roro_fast.tasks.benchmarks import HUB, file_benchmark, hub_benchmark
from roro_fast.tasks.gym import PREFIX, Gym
from roro_fast.tasks.ledger import Ledger
from roro_fast.tasks.mixture import MIXTURES, Mixture

CHOICES = ("ledger", "ledger:<kind>+<kind>...", *HUB, f"{PREFIX}<reasoning-gym task>", *MIXTURES, "path/to/file.jsonl")


def load_task(name_or_path: str, **options: Any) -> Task:
    """The task a config's `task.name` selects; see `CHOICES`.

    Options of a file: `split_by` ("test", "train", "calibrate" or "hash"), `strict`, `timeout`; of a hub benchmark:
    `split_by` ("" or "hash"), `strict`, `timeout`; of a gym task: `timeout` and the task's own; of a
    mixture: `timeout`.

    Raises:
        ConfigError: the name is unknown or an option does not fit it.
        DataError: a file or hub data set cannot be read; raised when its queries are first asked for.
    """
    name = str(name_or_path)
    base, _, kinds = name.partition(":")
    if base == Ledger.name:
        return _build(Ledger, name, (kinds.split("+") if kinds else (),), options)
    if name in HUB:
        return _build(hub_benchmark, name, (name,), options)
    if name.startswith(PREFIX):
        return Gym(name.removeprefix(PREFIX), **options)
    if name in MIXTURES:
        return _build(Mixture, name, (name,), options)
    path = Path(name).expanduser()
    if path.suffix == ".jsonl" or path.is_file():
        if not path.is_file():
            raise ConfigError(f"task.name: there is no file {name}; give the path of a JSONL file")
        return _build(file_benchmark, name, (path,), options)
    raise ConfigError(f"task.name: unknown task {name!r}; choose one of {', '.join(CHOICES)}")


def _build(make: Callable[..., Task], name: str, args: tuple[Any, ...], options: dict[str, Any]) -> Task:
    allowed = list(inspect.signature(make).parameters)[len(args) :]
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        known = ", ".join(allowed) or "it takes none"
        raise ConfigError(f"task.options.{unknown[0]}: not an option of {name}; known: {known}")
    return make(*args, **options)
