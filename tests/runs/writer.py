"""A writer to be killed: stores numbered records under the run lock, printing each key once it is appended."""

from __future__ import annotations

import sys
import time

from roro_fast.runs import RunDirectory


def record(i: int) -> dict[str, object]:
    return {"query_id": f"q{i // 4}", "arm": "a", "sample": i % 4, "seed": 0, "text": "x" * 20000, "i": i}


def main(path: str, total: int, chunk: int, pause: float) -> None:
    from roro_fast.config import Config

    with RunDirectory(path, Config()) as run, run.store("collect", chunk=chunk) as store:
        for i in range(total):
            store.append(record(i))
            print(i, flush=True)
            time.sleep(pause)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
