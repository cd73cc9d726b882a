"""Where an iteration of the engine goes, phase by phase, and what the ranges cost that tell.

    python -m bench.e2e.trace [--queries 128] [--trace build/trace.json] [--rounds 9] [--device cuda] [--out FILE]

The nano pair under a learned router that sees hidden states, one thread. --trace also writes a torch.profiler trace,
which opens in ui.perfetto.dev.
Ranges without a profiler are timed by rounds with and without them, interleaved. The last line of stdout is one JSON
document, also written to bench/results/trace.json or to --out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer

from roro_fast import profiling
from roro_fast.engine import Request, StepEngine
from roro_fast.files import write_json
from roro_fast.models import nano
from roro_fast.routing import PolicyConfig, PolicyNetwork
from roro_fast.runs.meta import provenance
from roro_fast.tasks.ledger import Ledger

RESULT = Path(__file__).parents[1] / "results" / "trace.json"


class Workload:
    """One engine and its requests; `run` rolls them all out with an empty prefix cache and returns the tokens made."""

    def __init__(self, queries: int, device: str = "cpu") -> None:
        tokenizer = AutoTokenizer.from_pretrained(nano.path("large"))
        self.engine = StepEngine(nano.load_pair(device=device), tokenizer, max_num_seqs=queries)
        hidden = self.engine.models[0].config.hidden_size
        self.policy = PolicyNetwork(PolicyConfig(hidden_size=hidden, action_space="regenerate")).to(device)
        self.prompts = [tokenizer(q.prompt)["input_ids"] for q in Ledger().queries("test", queries)]
        self.engine.forward.name_ranges()

    def run(self) -> int:
        tokens = 0
        for t in self.engine.rollout((Request(p, max_new_tokens=128) for p in self.prompts), self.policy):
            tokens += len(t.token_ids)
        for m in range(self.engine.num_models):
            self.engine.kv.clear_prefixes(m)
        return tokens


def ranges(kind: str, work: Workload) -> None:
    """Let every range of the process be of this kind from now on."""
    os.environ["RORO_PROFILE"] = kind
    profiling.mark.cache_clear()
    work.engine.forward.name_ranges()


def phases(work: Workload) -> dict[str, float]:
    """Milliseconds of each range, inner ranges left out, and of the whole run under "total"."""
    ranges("times", work)
    before, start = profiling.seconds(), time.perf_counter()
    work.run()
    total = time.perf_counter() - start
    out = {k: 1e3 * (v - before.get(k, 0.0)) for k, v in sorted(profiling.seconds().items())}
    forwards = [k for k in out if k.startswith(("forward", "catch-up"))]
    inside = sum(out[k] for k in forwards)
    for k in forwards:  # sampling is a range within each of them
        out[k] -= out["sample"] * out[k] / inside
    out["record"] -= out["route"]
    return out | {"total": 1e3 * total}


def traced(work: Workload, path: Path) -> None:
    """A Chrome trace of one run; on a GPU with its kernels."""
    ranges("torch", work)
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if work.engine.models[0].device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profiler:
        work.run()
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))


def overhead(work: Workload, rounds: int) -> dict[str, list[float]]:
    """Seconds of `rounds` rollouts with NVTX ranges and without any, taken in turn."""
    seconds: dict[str, list[float]] = {"nvtx": [], "off": []}
    for i in range(rounds):
        for kind in list(seconds)[:: 1 - 2 * (i % 2)]:  # either goes first as often: the second run is the slower one
            ranges(kind, work)
            start = time.perf_counter()
            work.run()
            seconds[kind].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    work = Workload(args.queries, args.device)
    work.run()
    seconds = overhead(work, args.rounds)
    iterations = work.engine.iterations
    table = phases(work)
    iterations = work.engine.iterations - iterations
    if args.trace is not None:
        traced(work, args.trace)
    ratios = [a / b for a, b in zip(seconds["nvtx"], seconds["off"], strict=True)]
    result = {
        "bench": "trace",
        "device": args.device,
        "queries": args.queries,
        "iterations": iterations,
        "phases_ms": table,
        "range_overhead": {"median": statistics.median(ratios), "best_of": min(seconds["nvtx"]) / min(seconds["off"])},
        "seconds": seconds,
        "provenance": provenance(),
    }
    for name, ms in table.items():
        print(f"{name:12s} {ms:9.1f} ms {ms / table['total']:6.1%}")
    print(f"ranges without a profiler: {result['range_overhead']['median'] - 1:+.2%} (median of {args.rounds} pairs)")
    write_json(args.out, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
