"""One engine in its own process, driven over stdin and stdout by JSON lines: `python -m bench.peers.worker NAME`.

Requests: {"op": "load", "pool": ...}, {"op": "run", "work": ...}, {"op": "close"}. Whatever libraries print goes to
stderr. Between requests the process waits on its input and uses no core.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from bench.e2e.workload import Workload
from bench.peers.base import Pool

STATUS = Path("/proc/self/status")


def memory(field: str) -> int:
    """Bytes of VmHWM (the peak) or VmRSS; 0 where the system does not tell."""
    if STATUS.is_file():
        for line in STATUS.read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    return 0


def device_peak() -> int:
    """Bytes of GPU memory at the peak since the last call, of the torch that the engine loaded; 0 without a GPU."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0
    peak = int(torch.cuda.max_memory_allocated())
    torch.cuda.reset_peak_memory_stats()
    return peak


def forget_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def serve(name: str) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    peer = importlib.import_module(f"bench.peers.{name}").PEER()
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any]
        try:
            if request["op"] == "load":
                answer = {"about": peer.load(Pool(**request["pool"])), "max_concurrency": peer.max_concurrency}
            elif request["op"] == "run":
                forget_peak()
                device_peak()
                outcome = peer.run(Workload.from_dict(request["work"])).to_dict()
                answer = {"outcome": outcome, "peak_rss": memory("VmHWM"), "peak_device": device_peak()}
            else:
                peer.close()
                answer = {"closed": True}
        except Exception as e:
            traceback.print_exc()
            answer = {"error": f"{type(e).__name__}: {e}".splitlines()[0][:300]}
        print(json.dumps(answer), file=answers, flush=True)
        if request["op"] == "close":
            break
    os._exit(0)  # engines leave threads behind that would keep the process


if __name__ == "__main__":
    serve(sys.argv[1])
