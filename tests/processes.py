"""`roro` in a process of its own, for tests that interrupt it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

# A suite started in the background hands its children an ignored SIGINT.
RUN = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from roro_fast.cli import app
from roro_fast.engine import StepEngine
dawdle_after, step = sys.argv.pop(1), StepEngine.step
def dawdling(engine, **how):
    time.sleep(0.1 * os.path.exists(dawdle_after))
    return step(engine, **how)
StepEngine.step = dawdling
app(prog_name='roro')
"""


def spawn(*args: object, dawdle_after: Path | None = None) -> subprocess.Popen[str]:
    """Start `roro args`; once `dawdle_after` exists its engine slows down, so that it cannot end before a signal."""
    command = [sys.executable, "-c", RUN, str(dawdle_after or ""), *map(str, args)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def interrupt(process: subprocess.Popen[str], sign: int, when: Path) -> str:
    """Send `sign` once the path `when` exists; what the process then wrote to stderr."""
    while not when.exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(sign)
    return process.communicate(timeout=60)[1]
