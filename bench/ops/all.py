"""Every op bench, one after the other, and what misses its target.

    python -m bench.ops.all [--threads 1] [--seconds 0.4] [--only router_score,kv_handoff] [--out FOLDER] [...]

Each bench runs in a process of its own and writes its JSON (load average, threads, instruction set, versions) to
bench/results/ops or to FOLDER; further arguments go to every bench. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def benches(only: str) -> list[str]:
    found = [p.stem.removeprefix("bench_") for p in sorted(HERE.glob("bench_*.py"))]
    wanted = only.split(",") if only else found
    unknown = sorted(set(wanted) - set(found))
    if unknown:
        sys.exit(f"--only: no bench of {', '.join(unknown)}; choose among {', '.join(found)}")
    return wanted


def run(op: str, args: argparse.Namespace, further: list[str]) -> dict[str, Any]:
    """{"seconds", "document" or "error"} of one bench, whose table goes to stdout as it comes."""
    command = [sys.executable, "-m", f"bench.ops.bench_{op}", "--threads", str(args.threads)]
    command += ["--seconds", str(args.seconds), *further]
    if args.out:
        command += ["--out", str(args.out / f"{op}.json")]
    threads = str(args.threads)
    env = {**os.environ, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
    begin, last = time.perf_counter(), ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env, cwd=HERE.parents[1]) as process:
        assert process.stdout is not None
        for line in process.stdout:
            last = line
            if not line.startswith("{"):
                print(line, end="", flush=True)
    out: dict[str, Any] = {"seconds": round(time.perf_counter() - begin, 1)}
    if process.returncode:
        return out | {"error": f"exit status {process.returncode}"}
    return out | {"document": json.loads(last)}


def misses(op: str, document: dict[str, Any]) -> list[dict[str, Any]]:
    """Cases whose ratio to a peer is below what is wanted, by medians; `bests` is the ratio of the fastest calls."""
    return [
        {"op": op, "case": c["case"], "peer": peer, "wanted": wanted, "medians": c["speedup"][peer],
         "bests": c["speedup_of_bests"][peer]}
        for c in document["cases"]
        for peer, wanted in c.get("targets", {}).items()
        if c.get("speedup", {}).get(peer, wanted) < wanted
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.4, help="per case, after warm-up")
    parser.add_argument("--only", default="", help="ops, separated by commas")
    parser.add_argument("--out", type=Path)
    args, further = parser.parse_known_args()
    summary: dict[str, Any] = {"threads": args.threads, "seconds": {}, "errors": {}, "misses": []}
    for op in benches(args.only):
        print(f"== {op}", flush=True)
        result = run(op, args, further)
        summary["seconds"][op] = result["seconds"]
        print(f"{op}: {result['seconds']:.0f} s", flush=True)
        if "error" in result:
            summary["errors"][op] = result["error"]
        else:
            summary["misses"] += misses(op, result["document"])
    summary["load"] = os.getloadavg()
    for m in summary["misses"]:
        found = f"{m['medians']} x {m['peer']} (bests {m['bests']}, wanted {m['wanted']})"
        print(f"below target: {m['op']}, {m['case']}: {found}")
    print(f"{sum(summary['seconds'].values()):.0f} s")
    print(json.dumps(summary))
    if summary["errors"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
