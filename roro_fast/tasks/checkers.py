"""Persistent worker processes for math-verify and reasoning-gym scorers, with a hard time limit per answer.

math-verify's own limit rests on SIGALRM: it works in the main thread only and cannot interrupt a long big-integer
operation; reasoning-gym's scorers have none. Here a worker that overruns is killed and replaced.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import selectors
import subprocess
import sys
import threading
import time
from pathlib import Path
from queue import LifoQueue
from typing import Any

from roro_fast.errors import RoroError

WORKERS = 2
_STARTUP_SECONDS = 120.0
_MODULES = {"math": "math_verify", "gym": "reasoning_gym"}
_SCRIPT = Path(__file__).with_name("checker_process.py")


class WorkerTimeout(Exception):
    """The answer was not judged within its limit; its worker is gone."""


class WorkerDied(Exception):
    """The worker ended by itself, as it does when it runs out of memory."""


class Worker:
    """One subprocess. Not thread-safe: the pool lends it to one caller at a time."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.ready = False
        self.buffer = b""
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(_SCRIPT), kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C in the terminal is the parent's to handle
        )

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def wait_ready(self) -> None:
        """Return once the worker has imported its checker; no answer's limit pays for that."""
        if not self.ready:
            try:
                self._receive(time.monotonic() + _STARTUP_SECONDS)
            except (WorkerTimeout, WorkerDied):
                module = _MODULES[self.kind]
                raise RoroError(
                    f"{module}: its worker process does not start; check that `python -c 'import {module}'` works"
                ) from None
            self.ready = True

    def ask(self, request: dict[str, Any], timeout: float) -> dict[str, Any]:
        """The checker's reply; raises WorkerTimeout or WorkerDied, after which the worker is of no more use."""
        line = json.dumps({**request, "limit": timeout + 1.0}).encode() + b"\n"
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(line)
            return self._receive(time.monotonic() + timeout)
        except (OSError, ValueError) as e:  # the process is gone, or another thread closed the pool
            raise WorkerDied from e

    def _receive(self, deadline: float) -> dict[str, Any]:
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while b"\n" not in self.buffer:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise WorkerTimeout
                chunk = os.read(self.process.stdout.fileno(), 65536)
                if not chunk:
                    raise WorkerDied
                self.buffer += chunk
        line, _, self.buffer = self.buffer.partition(b"\n")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def kill(self) -> None:
        """End the process now and reap it."""
        self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self.process.wait()


class CheckerPool:
    """Up to `size` workers of one kind ("math" or "gym"), started when first needed, usable from any thread."""

    def __init__(self, kind: str, size: int = WORKERS) -> None:
        self.kind = kind
        self._idle: LifoQueue[Worker | None] = LifoQueue()
        for _ in range(size):
            self._idle.put(None)
        self._lock = threading.Lock()
        self._all: set[Worker] = set()
        self._closed = False

    def ask(self, request: dict[str, Any], timeout: float) -> tuple[float, str]:
        """(score, error) of one request. Raises WorkerTimeout or WorkerDied for an answer that cannot be judged."""
        worker = self._idle.get()
        try:
            if worker is None or not worker.alive:
                worker = self._replace(worker)
            worker.wait_ready()
            reply = worker.ask(request, timeout)
        except (WorkerTimeout, WorkerDied):
            worker = self._replace(worker)  # warms up while the caller goes on
            raise
        except BaseException:
            self._discard(worker)
            worker = None
            raise
        finally:
            self._idle.put(worker)
        return float(reply["score"]), str(reply["error"])

    def close(self) -> None:
        """Kill and reap every worker; a later call is refused."""
        with self._lock:
            self._closed = True
            workers, self._all = self._all, set()
        for worker in workers:
            worker.kill()

    def _replace(self, worker: Worker | None) -> Worker:
        self._discard(worker)
        with self._lock:
            if self._closed:
                raise RoroError(f"{_MODULES[self.kind]}: the pool of answer checkers is closed")
            fresh = Worker(self.kind)
            self._all.add(fresh)
            return fresh

    def _discard(self, worker: Worker | None) -> None:
        if worker is not None:
            with self._lock:
                self._all.discard(worker)
            worker.kill()


_shared: dict[str, CheckerPool] = {}
_shared_lock = threading.Lock()


def shared_pool(kind: str) -> CheckerPool:
    """The process-wide pool of a kind, closed at exit."""
    with _shared_lock:
        if kind not in _shared:
            _shared[kind] = CheckerPool(kind)
        return _shared[kind]


def close_shared_pools() -> None:
    """Close the process-wide pools; the next `shared_pool` makes a new one."""
    with _shared_lock:
        pools = list(_shared.values())
        _shared.clear()
    for pool in pools:
        pool.close()


def _after_fork() -> None:
    # a forked child must not talk through its parent's pipes, nor kill its parent's workers
    global _shared_lock
    _shared_lock = threading.Lock()
    _shared.clear()


atexit.register(close_shared_pools)
os.register_at_fork(after_in_child=_after_fork)
