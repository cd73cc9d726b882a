"""A run directory: resumable, self-describing, written by one process at a time."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from roro_fast.config import Config
from roro_fast.config_io import load_config, save_config
from roro_fast.errors import ConfigError
from roro_fast.files import read_json, write_json
from roro_fast.runs.lock import RunLock
from roro_fast.runs.meta import provenance
from roro_fast.runs.store import JsonlStore, Record, trajectory_key

# Keys that may change between sessions without changing any result.
_FREE = ("run.name", "run.dir", "run.threads")


@dataclasses.dataclass(frozen=True, slots=True)
class StageMark:
    """What `stages/<name>.json` holds: the settings the stage ran under, and its summary once done."""

    name: str
    done: bool
    settings: dict[str, Any]
    summary: dict[str, Any]
    seconds: float


class RunDirectory:
    """The files of one run.

        config.yaml             the latest config          trajectories/<stage>/part-*.jsonl
        meta.json               one record per session     checkpoints/<stage>/step-*/
        stages/<stage>.json     progress marks             logs/   TensorBoard

    Use as a context manager to write; reading needs no lock.
    """

    def __init__(self, path: str | Path, config: Config | None = None) -> None:
        self.path = Path(path)
        if config is None:
            if not (self.path / "config.yaml").is_file():
                raise ConfigError(f"run.dir: {self.path} is not a run directory (no config.yaml); check the path")
            config = load_config(self.path / "config.yaml")
        self.config = config
        self._lock = RunLock(self.path)

    @classmethod
    def for_config(cls, config: Config) -> RunDirectory:
        return cls(config.run.path, config)

    def __enter__(self) -> RunDirectory:
        self._lock.acquire()
        try:
            save_config(self.config, self.path / "config.yaml")
            meta = self.path / "meta.json"
            sessions = read_json(meta)["sessions"] if meta.is_file() else []
            write_json(meta, {"seed": self.config.run.seed, "sessions": [*sessions, provenance()]})
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def store(self, stage: str, key: Callable[[Record], Hashable] = trajectory_key, chunk: int = 64) -> JsonlStore:
        """The record store of a stage; reads what is there, so a resumed stage sees its own past."""
        return JsonlStore(self.path / "trajectories" / stage, key, chunk)

    def checkpoints(self, stage: str) -> Path:
        return self.path / "checkpoints" / stage

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def mark(self, stage: str) -> StageMark | None:
        path = self.path / "stages" / f"{stage}.json"
        return StageMark(**read_json(path)) if path.is_file() else None

    def forget(self, stage: str, outputs: Sequence[str] = ()) -> None:
        """Delete what a stage wrote (its stores, checkpoints and `outputs`, relative paths), so that it runs anew."""
        self._mark_path(stage).unlink(missing_ok=True)
        for name in (f"trajectories/{stage}", f"checkpoints/{stage}", f"logs/{stage}", *outputs):
            path = self.path / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    @contextmanager
    def stage(self, name: str, sections: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Run the body as stage `name`; what it puts in the yielded dict becomes the stage's summary.

        `sections` are the config sections (or dotted keys) the stage depends on. A stage begun under other settings is
        refused, naming the key: mixing the two would give a result that no config describes.
        """
        settings = self._settings(sections)
        before = self.mark(name)
        if before is not None:
            self._refuse_change(name, before.settings, settings)
        summary: dict[str, Any] = {}
        spent = before.seconds if before is not None else 0.0
        write_json(self._mark_path(name), dataclasses.asdict(StageMark(name, False, settings, {}, spent)))
        start = time.perf_counter()
        try:
            yield summary
        except BaseException:
            spent += time.perf_counter() - start
            write_json(self._mark_path(name), dataclasses.asdict(StageMark(name, False, settings, {}, spent)))
            raise
        spent += time.perf_counter() - start
        write_json(self._mark_path(name), dataclasses.asdict(StageMark(name, True, settings, summary, spent)))

    def done(self, name: str, sections: Sequence[str]) -> StageMark | None:
        """The mark of a finished stage, None when it has to run; refuses one that ran under other settings."""
        mark = self.mark(name)
        if mark is not None:
            self._refuse_change(name, mark.settings, self._settings(sections))
        return mark if mark is not None and mark.done else None

    def _mark_path(self, name: str) -> Path:
        return self.path / "stages" / f"{name}.json"

    def _settings(self, sections: Sequence[str]) -> dict[str, Any]:
        """{"section.key": value} of the named sections and keys."""
        flat: dict[str, Any] = {}
        for entry in sections:
            section, _, key = entry.partition(".")
            values = dataclasses.asdict(getattr(self.config, section))
            flat |= {f"{section}.{k}": v for k, v in values.items() if key in ("", k)}
        return {k: v for k, v in flat.items() if k not in _FREE}

    def _refuse_change(self, stage: str, before: dict[str, Any], now: dict[str, Any]) -> None:
        changed = [k for k in now if before.get(k, now[k]) != now[k]]
        if changed:
            key = changed[0]
            more = f" (and {', '.join(changed[1:])})" if changed[1:] else ""
            raise ConfigError(
                f"{key}: stage {stage!r} in {self.path} ran with {before[key]!r}, now {now[key]!r}{more}; "
                f"choose another run.name, or run the stage anew with --redo {stage}"
            )
