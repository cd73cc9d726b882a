from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from roro_fast.errors import RoroError
from roro_fast.tasks import checkers
from roro_fast.tasks.checkers import CheckerPool, WorkerDied, WorkerTimeout

RIGHT = {"gold": "x+2", "predicted": "x+1+1"}
ENDLESS = {"gold": "7", "predicted": "9^{9^{9^9}}"}


@pytest.fixture
def pool():
    pool = CheckerPool("math", size=1)
    assert pool.ask(RIGHT, 60) == (1.0, "")
    yield pool
    pool.close()


def worker_of(pool: CheckerPool) -> checkers.Worker:
    (worker,) = pool._all
    return worker


def is_zombie_or_gone(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rsplit(") ", 1)[1][0]
    except FileNotFoundError:
        return "gone"


def test_a_worker_is_kept_between_answers(pool):
    pid = worker_of(pool).process.pid
    assert pool.ask({"gold": "1", "predicted": "2"}, 60) == (0.0, "")
    assert worker_of(pool).process.pid == pid


def test_an_overrun_kills_reaps_and_replaces_the_worker(pool):
    pid = worker_of(pool).process.pid
    with pytest.raises(WorkerTimeout):
        pool.ask(ENDLESS, 0.3)
    assert is_zombie_or_gone(pid) == "gone"
    assert pool.ask(RIGHT, 60) == (1.0, "")
    assert worker_of(pool).process.pid != pid


def test_a_worker_killed_while_idle_is_replaced(pool):
    os.kill(worker_of(pool).process.pid, signal.SIGKILL)
    time.sleep(0.2)
    assert pool.ask(RIGHT, 60) == (1.0, "")


def test_a_worker_that_dies_at_work_is_reported(pool):
    os.kill(worker_of(pool).process.pid, signal.SIGSTOP)
    import threading

    threading.Timer(0.3, os.kill, (worker_of(pool).process.pid, signal.SIGKILL)).start()
    with pytest.raises(WorkerDied):
        pool.ask(RIGHT, 60)
    assert pool.ask(RIGHT, 60) == (1.0, "")


def test_a_checker_exception_is_a_verdict(pool):
    score, error = pool.ask({"gold": "1", "nonsense": "2"}, 60)
    assert (score, error) == (0.0, "not judged (TypeError)")


def test_a_closed_pool_refuses(pool):
    pid = worker_of(pool).process.pid
    pool.close()
    assert is_zombie_or_gone(pid) == "gone"
    with pytest.raises(RoroError, match="closed"):
        pool.ask(RIGHT, 60)


def test_a_worker_that_cannot_start_says_so(monkeypatch):
    monkeypatch.setattr(checkers, "_SCRIPT", "/nonexistent/checker.py")
    pool = CheckerPool("math", size=1)
    with pytest.raises(RoroError, match="import math_verify"):
        pool.ask(RIGHT, 5)
    pool.close()


def test_a_busy_worker_ends_by_itself_when_its_parent_is_killed():
    code = f"""
import threading, time
from roro_fast.tasks.checkers import CheckerPool
pool = CheckerPool("math", size=1)
pool.ask({RIGHT!r}, 60)
print(next(iter(pool._all)).process.pid, flush=True)
pool.ask({ENDLESS!r}, 1.0)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    time.sleep(0.3)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 15
    while is_zombie_or_gone(pid) not in ("gone", "Z") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert is_zombie_or_gone(pid) in ("gone", "Z")


def test_a_forked_child_starts_its_own_workers():
    mine = checkers.shared_pool("math")
    assert mine.ask(RIGHT, 60) == (1.0, "")
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        fresh = checkers.shared_pool("math")
        os.write(write, b"1" if fresh is not mine and fresh.ask(RIGHT, 60) == (1.0, "") else b"0")
        checkers.close_shared_pools()
        os._exit(0)
    os.close(write)
    assert os.read(read, 1) == b"1"
    os.close(read)
    os.waitpid(child, 0)
    assert mine.ask(RIGHT, 60) == (1.0, "")
    checkers.close_shared_pools()
