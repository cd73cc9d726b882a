"""Run cells on several engines, one engine at a time, round by round, and summarise what each did."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from bench.e2e import workload
from bench.e2e.cells import Cell
from bench.e2e.workload import Workload
from bench.peers.catalogue import CATALOGUE, OURS, Remote
from roro_fast.models.config import DecoderConfig


@dataclass
class Engine:
    """A running process; `failed` says why it takes no further part. `speed`: tokens per second by cell."""

    name: str
    remote: Remote
    about: dict[str, Any] = field(default_factory=dict)
    one_by_one: bool = False
    failed: str = ""
    speed: dict[str, float] = field(default_factory=dict)


@dataclass
class Run:
    work: Workload
    outcome: dict[str, Any]
    peak_rss: int
    peak_device: int = 0
    bandwidth: float = 0.0  # bytes read per second right before and after it, 0: not measured

    @property
    def seconds(self) -> float:
        return float(self.outcome["seconds"])

    @property
    def tokens_per_second(self) -> float:
        return self.work.new_tokens / self.seconds


class Bench:
    """`runs[cell][engine]` collects one Run per round. An engine that takes one sequence after another is given as many
    as fit `slow_seconds`, at least one: its rate does not depend on how many there are. Where the warm-up of a cell
    takes an engine more than `cell_seconds` it is not repeated: that one run is what counts. `bandwidth` is called
    around each run of a cell that reads."""

    def __init__(
        self,
        engines: list[Engine],
        slow_seconds: float,
        cell_seconds: float,
        say: Callable[[str], None],
        bandwidth: Callable[[], float] | None = None,
    ) -> None:
        self.engines, self.slow_seconds, self.cell_seconds, self.say = engines, slow_seconds, cell_seconds, say
        self.bandwidth = bandwidth
        self.runs: dict[str, dict[str, list[Run]]] = {}
        self.once_only: set[tuple[str, str]] = set()

    def alive(self) -> list[Engine]:
        return [e for e in self.engines if not e.failed]

    def once(self, engine: Engine, work: Workload) -> Run | None:
        if engine.one_by_one and len(work.sequences) > 1:
            per = work.sequences[0].new_tokens
            fit = int(self.slow_seconds * engine.speed.get(work.name, 0.0) / per)
            work = work.first(max(1, min(fit, len(work.sequences))))
        try:
            answer = engine.remote.run(work)
        except RuntimeError as e:
            engine.failed = str(e)
            self.say(f"{engine.name}: out: {engine.failed}")
            engine.remote.close()
            return None
        run = Run(work, answer["outcome"], answer["peak_rss"], answer["peak_device"])
        engine.speed[work.name] = run.tokens_per_second
        return run

    def round(self, cells: list[Cell], number: int, keep: bool) -> dict[str, dict[str, Run]]:
        """One round over all cells and engines; the order of engines rotates with the round."""
        out: dict[str, dict[str, Run]] = {}
        for cell in cells:
            work = cell.make(number)
            engines = self.alive()
            turn = number % max(len(engines), 1)
            for engine in engines[turn:] + engines[:turn]:
                if cell.kind == "plain" and engine.one_by_one and len(work.sequences) > 1:
                    continue
                if cell.kind == "plain" and CATALOGUE[engine.name].ablation:
                    continue
                if (cell.name, engine.name) in self.once_only:
                    continue
                begin = time.perf_counter()
                read = self.bandwidth if cell.reads else None
                before = read() if read else 0.0
                run = self.once(engine, work)
                if run is None:
                    continue
                if read:
                    run.bandwidth = (before + read()) / 2
                out.setdefault(cell.name, {})[engine.name] = run
                # Figures of plain cells are differences: a cold run beside a warm one would not do.
                if not keep and run.seconds > self.cell_seconds and cell.kind != "plain":
                    self.once_only.add((cell.name, engine.name))
                if keep or (cell.name, engine.name) in self.once_only:
                    self.runs.setdefault(cell.name, {}).setdefault(engine.name, []).append(run)
                self.say(
                    f"round {number} {cell.name:24s} {engine.name:15s} {run.tokens_per_second:8.1f} tokens/s "
                    f"({time.perf_counter() - begin:.1f} s)"
                )
        return out


def flops(configs: list[DecoderConfig], tokens: list[int], pairs: list[float]) -> float:
    """2N per token through a model and 4 * layers * heads * head_dim per attended pair."""
    return sum(
        2.0 * c.num_params * n + 4.0 * c.num_layers * c.num_heads * c.head_dim * p
        for c, n, p in zip(configs, tokens, pairs, strict=True)
    )


def spent_flops(configs: list[DecoderConfig], outcome: dict[str, Any]) -> float:
    """FLOPs of all forwards of an outcome that says what was run."""
    known = outcome.get("forward_flops")
    return flops(configs, outcome["forward_tokens"], outcome["forward_pairs"]) if known is None else float(known)


def layers_flops(c: DecoderConfig, layers: int, tokens: float, pairs: float) -> float:
    """FLOPs of some of a model's layers."""
    return 2.0 * layer_params(c) * layers * tokens + 4.0 * layers * c.num_heads * c.head_dim * pairs


def layer_params(c: DecoderConfig) -> int:
    return c.num_params - replace(c, num_layers=c.num_layers - 1, windows=c.windows[:-1]).num_params


def saved(work: Workload, configs: list[DecoderConfig], itemsize: int, shared: int) -> tuple[float, float]:
    """(FLOPs, bytes of weights) that no engine needs when the first `shared` layers of all models are the same.

    These run once for each token, whoever writes it, and of a model without others only the head runs, for its own.
    """
    one = workload.as_one(work)
    (once,), (once_pairs,) = workload.needed(one)
    flops_, passes = -layers_flops(configs[0], shared, once, once_pairs), -float(workload.weight_passes(one)[0])
    written = [sum(n for s in work.sequences for model, n in s.steps if model == m) for m in range(len(configs))]
    for c, n, p, reads, own in zip(configs, *workload.needed(work), workload.weight_passes(work), written, strict=True):
        flops_ += layers_flops(c, shared, n, p)
        passes += reads
        if c.num_layers == shared:
            flops_ += 2.0 * (c.num_params - shared * layer_params(c)) * (n - own)
    return flops_, passes * shared * layer_params(configs[0]) * itemsize


def floor(
    work: Workload, configs: list[DecoderConfig], itemsize: int, ceiling: dict[str, float], shared: int = 0
) -> dict[str, float]:
    """The least time any exact engine needs: FLOPs of needed tokens, bytes of weights and keys and values.

    A model's weights are read at least once per token of the sequence that it writes most of; keys and values of the
    context once per written token. What is `saved` by layers that all models share is not needed.
    """
    tokens, pairs = workload.needed(work)
    passes = workload.weight_passes(work)
    contexts = [0.0] * work.num_models
    for s in work.sequences:
        at = len(s.prompt)
        for model, n in s.steps:
            contexts[model] += workload.span_pairs(at, at + n)
            at += n
    moved = sum(
        n * c.num_params * itemsize + ctx * c.kv_bytes_per_token(itemsize)
        for n, c, ctx in zip(passes, configs, contexts, strict=True)
    )
    work_flops = flops(configs, tokens, pairs)
    if shared:
        less = saved(work, configs, itemsize, shared)
        work_flops, moved = work_flops - less[0], moved - less[1]
    seconds = {"bytes": moved / ceiling["bytes_per_second"], "flops": work_flops / ceiling["flops"]}
    return {
        "flops": work_flops,
        "bytes": moved,
        "seconds": max(seconds.values()),
        **{f"{k}_s": v for k, v in seconds.items()},
    }


def summary(
    runs: dict[str, list[Run]],
    configs: list[DecoderConfig],
    itemsize: int,
    ceiling: dict[str, float],
    shared: int = 0,
) -> dict[str, Any]:
    """Per engine: medians over rounds, percentiles over all steps, ratio of ours to it, fraction of the ceiling."""
    out: dict[str, Any] = {}
    ours = [r.tokens_per_second for r in runs.get(OURS, [])]
    for name, mine in sorted(runs.items(), key=lambda item: list(CATALOGUE).index(item[0])):
        rates = [r.tokens_per_second for r in mine]
        work = mine[-1].work
        least = floor(work, configs, itemsize, ceiling, shared)
        steps = sorted(s for r in mine for s in r.outcome["step_seconds"])
        seconds = statistics.median(r.seconds for r in mine)
        row: dict[str, Any] = {
            "rounds": len(mine),
            "sequences": len(work.sequences),
            "seconds": [round(r.seconds, 4) for r in mine],
            "tokens_per_second": round(statistics.median(rates), 2),
            "trajectories_per_second": round(len(work.sequences) / seconds, 4),
            "step_ms_p50": round(1e3 * percentile(steps, 0.5), 2),
            "step_ms_p99": round(1e3 * percentile(steps, 0.99), 2),
            "peak_rss_mb": round(max(r.peak_rss for r in mine) / 2**20),
            "peak_device_mb": round(max(r.peak_device for r in mine) / 2**20),
            "fraction_of_ceiling": round(least["seconds"] / seconds, 4),
            "least_flops": least["flops"],
            "forward_flops": None,
        }
        if mine[-1].outcome["forward_tokens"] is not None:
            spent = [spent_flops(configs, r.outcome) for r in mine]
            row["forward_flops"] = statistics.median(spent)
            row["forward_flops_over_least"] = round(row["forward_flops"] / least["flops"], 4)
        if ours and name != OURS:
            ratios = [a / b for a, b in zip(ours, rates, strict=False)]
            row["ours_over_this"] = round(statistics.median(ratios), 3)
            row["ours_over_this_spread"] = [round(min(ratios), 3), round(max(ratios), 3)]
        if mine[-1].outcome["extra"]:
            row["extra"] = dict(mine[-1].outcome["extra"])
            shares = [r.outcome["extra"].get("outside_forward") for r in mine]
            if None not in shares:
                row["extra"]["outside_forward"] = round(statistics.median(shares), 4)
        out[name] = row
    return out


def percentile(ordered: list[float], q: float) -> float:
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else 0.0


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
