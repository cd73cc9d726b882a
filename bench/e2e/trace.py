"""Where an iteration of the engine goes, phase by phase, from a torch.profiler trace; and what the ranges cost.

    python -m bench.e2e.trace [--queries 128] [--trace build/trace.json] [--rounds 9]

The nano pair under a learned router that sees hidden states, one thread. The Chrome trace opens in ui.perfetto.dev.
Ranges without a profiler are timed by rounds with and without them, interleaved. The last line of stdout is one JSON
document, also written to bench/results/trace.json.
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
PHASES = ("schedule", "forward/0", "forward/1", "catch-up/0", "catch-up/1", "sample", "route", "record")


class Workload:
    """One engine and its requests; `run` rolls them all out with an empty prefix cache and returns the tokens made."""

    def __init__(self, queries: int) -> None:
        tokenizer = AutoTokenizer.from_pretrained(nano.path("large"))
        self.engine = StepEngine(nano.load_pair(), tokenizer, max_num_seqs=queries)
        hidden = self.engine.models[0].config.hidden_size
        self.policy = PolicyNetwork(PolicyConfig(hidden_size=hidden, action_space="regenerate"))
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


def traced(work: Workload, path: Path | None) -> dict[str, dict[str, float]]:
    """Calls and milliseconds of each phase, children left out, and the whole run under "total"."""
    ranges("torch", work)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        start = time.perf_counter()
        work.run()
        total = time.perf_counter() - start
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))
    events = {e.key: e for e in profiler.key_averages()}
    out = {
        name: {"calls": events[name].count, "ms": events[name].cpu_time_total / 1e3}
        for name in PHASES
        if name in events
    }
    sampled = out.get("sample", {"ms": 0.0})["ms"]  # its ranges lie inside the forwards'
    inside = sum(v["ms"] for k, v in out.items() if k.startswith(("forward", "catch-up")))
    for k, v in out.items():
        if k.startswith(("forward", "catch-up")):
            v["ms"] -= sampled * v["ms"] / inside
    out["record"]["ms"] -= out["route"]["ms"]
    out["total"] = {"calls": work.engine.iterations, "ms": total * 1e3}
    return out


def overhead(work: Workload, rounds: int) -> dict[str, list[float]]:
    """Seconds of `rounds` rollouts with NVTX ranges and without any, taken in turn."""
    seconds: dict[str, list[float]] = {"nvtx": [], "off": []}
    for _ in range(rounds):
        for kind, times in seconds.items():
            ranges(kind, work)
            start = time.perf_counter()
            work.run()
            times.append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--trace", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    work = Workload(args.queries)
    work.run()
    seconds = overhead(work, args.rounds)
    before = work.engine.iterations
    phases = traced(work, args.trace)
    phases["total"]["calls"] -= before
    ratios = [a / b for a, b in zip(seconds["nvtx"], seconds["off"], strict=True)]
    result = {
        "bench": "trace",
        "queries": args.queries,
        "phases": phases,
        "range_overhead": {"median": statistics.median(ratios), "best_of": min(seconds["nvtx"]) / min(seconds["off"])},
        "seconds": seconds,
        "provenance": provenance(),
    }
    total = phases["total"]["ms"]
    for name, v in phases.items():
        print(f"{name:12s} {v['calls']:6.0f} calls {v['ms']:9.1f} ms {v['ms'] / total:6.1%}")
    print(f"ranges without a profiler: {result['range_overhead']['median'] - 1:+.2%} (median of {args.rounds} pairs)")
    write_json(RESULT, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
