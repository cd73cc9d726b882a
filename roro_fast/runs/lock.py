"""One writer per run directory; the lock of a dead process falls away by itself."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout

from roro_fast.errors import ConfigError


class RunLock:
    """Context manager around `<directory>/lock`, held through the kernel, with its owner named in `lock.owner`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._lock = FileLock(directory / "lock", timeout=0)

    def acquire(self) -> RunLock:
        """Raises ConfigError naming the owner when a live process writes here."""
        self.directory.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except Timeout:
            raise ConfigError(
                f"run.dir: {self.directory} is being written by {self._owner()}; wait for it or choose another run.name"
            ) from None
        owner = {"pid": os.getpid(), "host": socket.gethostname()}
        (self.directory / "lock.owner").write_text(json.dumps(owner))
        return self

    def _owner(self) -> str:
        try:
            owner = json.loads((self.directory / "lock.owner").read_text())
            return f"process {owner['pid']} on {owner['host']}"
        except (OSError, json.JSONDecodeError, KeyError, TypeError):
            return "another process"

    def release(self) -> None:
        if self._lock.is_locked:
            (self.directory / "lock.owner").unlink(missing_ok=True)
            self._lock.release()

    def __enter__(self) -> RunLock:
        return self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
