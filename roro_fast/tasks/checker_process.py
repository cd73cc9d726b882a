"""The process that runs third-party answer checkers: one JSON request per line in, one JSON reply per line out.

Run as a script by `checkers`, so it imports nothing of roro_fast. It limits its own memory and lets an alarm kill it,
so that a hostile expression ends with it even when its parent is gone.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

MEMORY = 4 << 30


def math(gold: str, predicted: str) -> dict[str, Any]:
    """math-verify's verdict on two LaTeX or plain expressions: {"score": 0.0 or 1.0, "error": what did not parse}."""
    from math_verify import parse, verify

    # its own limits need SIGALRM, which is the process's last resort here
    want = parse(f"\\boxed{{{gold}}}", parsing_timeout=None)
    if not want:
        return {"score": 0.0, "error": "gold answer not parsable"}
    got = parse(f"\\boxed{{{predicted}}}", parsing_timeout=None)
    if not got:
        return {"score": 0.0, "error": "not parsable"}
    return {"score": float(verify(want, got, timeout_seconds=None)), "error": ""}


@functools.lru_cache(maxsize=64)
def _dataset(name: str, config: str, seed: int, size: int) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(name, seed=seed, size=size, **json.loads(config))


def gym(name: str, config: str, seed: int, size: int, index: int, predicted: str) -> dict[str, Any]:
    """reasoning-gym's own score of an answer to one item, which is generated again from its seed."""
    data = _dataset(name, config, seed, size)
    return {"score": float(data.score_answer(answer=predicted, entry=data[index])), "error": ""}


CHECKERS: dict[str, tuple[Callable[..., dict[str, Any]], dict[str, Any]]] = {
    "math": (math, {"gold": "1", "predicted": "\\frac{2}{2}"}),
    "gym": (gym, {"name": "chain_sum", "config": "{}", "seed": 0, "size": 1, "index": 0, "predicted": "1"}),
}


def main(kind: str) -> None:
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # stray prints must not reach the protocol
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY if hard == resource.RLIM_INFINITY else min(MEMORY, hard), hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    check, warm_up = CHECKERS[kind]
    check(**warm_up)  # imports the library, which no answer's limit should pay for
    replies.write('{"ready": true}\n')
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, request.pop("limit"))
        try:
            reply = check(**request)
        except Exception as e:  # whatever a checker raises is a verdict on the answer, not on the run
            reply = {"score": 0.0, "error": f"not judged ({type(e).__name__})"}
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(json.dumps(reply) + "\n")


if __name__ == "__main__":
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    with contextlib.suppress(BrokenPipeError, KeyboardInterrupt):
        main(sys.argv[1])
