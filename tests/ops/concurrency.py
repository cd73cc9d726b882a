"""A kernel must give the same bits on any number of threads, from several Python threads, and in a forked child."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence

import torch


def same(a: Sequence[torch.Tensor | None], b: Sequence[torch.Tensor | None]) -> bool:
    pairs = zip(a, b, strict=True)
    return all(x is y if x is None or y is None else torch.equal(x, y) for x, y in pairs)


def check(run: Callable[[], Sequence[torch.Tensor | None]], *, repeats: int = 20) -> None:
    want = run()
    before = torch.get_num_threads()
    try:
        for threads in (8, 2):
            torch.set_num_threads(threads)
            assert all(same(run(), want) for _ in range(repeats)), "depends on the number of threads or on the run"
            time.sleep(0.002)  # long enough for helping threads to fall asleep
            assert same(run(), want), "depends on whether threads have to be woken"
        _in_python_threads(run, want)
        _in_a_forked_child(run, want)
    finally:
        torch.set_num_threads(before)


def _in_python_threads(run: Callable[[], Sequence[torch.Tensor | None]], want: Sequence[torch.Tensor | None]) -> None:
    good: list[bool] = []
    threads = [
        threading.Thread(target=lambda: good.append(all(same(run(), want) for _ in range(10)))) for _ in range(4)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert good == [True] * 4, "differs or hangs when several Python threads call it"


def _in_a_forked_child(run: Callable[[], Sequence[torch.Tensor | None]], want: Sequence[torch.Tensor | None]) -> None:
    """`run` has used threads of this process, none of which exist in the child."""
    ready = threading.Event()
    pid = os.fork()
    if pid == 0:
        os._exit(0 if same(run(), want) else 1)
    status: list[int] = []

    def wait() -> None:
        status.append(os.waitpid(pid, 0)[1])
        ready.set()

    threading.Thread(target=wait, daemon=True).start()
    if not ready.wait(30):
        os.kill(pid, 9)
        raise AssertionError("a forked child hangs in the kernel")
    assert status == [0], "a forked child computes something else"
