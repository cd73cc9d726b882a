"""What projecting KV between the nano models costs and saves, against exact catch-up.

    python bench/studies/projection_study.py    # a few minutes; writes bench/results/projection_study.json

Maps are fitted on routed answers of the train split, gated on the calibrate split, and used for routed answers to the
test split. Every map here is above the default bound, so the gate is told to let them pass; a run would refuse them.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from roro_fast.config import ProjectionConfig
from roro_fast.config_io import load_config
from roro_fast.engine import RoutingPolicy, StepEngine, Trajectory
from roro_fast.engine.projection import KVProjection, fit, measure
from roro_fast.engine.projection.gate import maps_on, rotary
from roro_fast.engine.projection.record import Sheet, sheets
from roro_fast.eval.sweep import Runner
from roro_fast.files import write_json
from roro_fast.models.decoder import Decoder
from roro_fast.models.inference import logits
from roro_fast.ops.kv_project import LinearMaps, kv_project
from roro_fast.routing import ConfidenceThreshold, Oracle, RandomRouter
from roro_fast.runs.meta import provenance
from roro_fast.train.projection import Texts, routed_texts
from roro_fast.train.setup import Workbench

RESULT = Path(__file__).parents[1] / "results" / "projection_study.json"
SIZES = (25, 100, 400, 1600)
DIRECTIONS = {"small to large": (0, 1), "large to small": (1, 0)}
NOISE = (0.0, 0.2, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7)
UNBOUNDED = 1e9  # nats per token; any map passes


@torch.inference_mode()
def kl_of_the_other_model(source: Decoder, target: Decoder, texts: Texts) -> float:
    """KL(receiver || source) over answers, nats per token: what it would cost to let the source write instead."""
    found = []
    for i, sheet in enumerate(sheets(target, [t[:-1] for t in texts.tokens], 1)):  # a text at a time
        at = np.zeros(1, np.int64)
        q, p = (logits(m, sheet.run(m, sheet.pages(m), at)).double().log_softmax(-1) for m in (source, target))
        found.append((p.exp() * (p - q)).sum(-1)[texts.starts[i] - 1 :])
    return float(torch.cat(found).mean())


def fits(bench: Workbench, train: Texts, held_out: Texts) -> list[dict[str, Any]]:
    rows = []
    for name, (i, j) in DIRECTIONS.items():
        pair = bench.models[i], bench.models[j]
        for sources in (1, 2):
            for n in SIZES:
                settings = ProjectionConfig(sources=sources)
                start = time.perf_counter()
                p = fit(*pair, train.tokens[:n], settings)
                seconds = time.perf_counter() - start
                g = measure(p, *pair, *held_out)
                rows.append({
                    "direction": name, "sources": sources, "texts": n, "tokens": p.fit["tokens"],
                    "fit_seconds": seconds,
                    "kl_mean": g.kl_mean, "kl_p99": g.kl_p99, "top1": g.top1, "held_out_tokens": g.tokens,
                    "error": p.fit["error"], "layers": p.maps.layers.tolist(), "ridge": p.fit["ridge"],
                    "map_flops_per_token": p.maps.flops_per_token, "passes": g.kl_mean <= settings.max_kl,
                })  # fmt: skip
                print(f"{name}, {sources} layers, {n} texts: KL {g.kl_mean:.3f}, top-1 {g.top1:.3f}", flush=True)
    return rows


def use(bench: Workbench, projections: dict[str, dict[tuple[int, int], KVProjection]], queries: int) -> list[dict]:
    """Routed answers to the same questions with exact and with projected catch-up."""
    e = bench.config.engine
    prompts = [(q, bench.encode(q)) for q in bench.queries("test", queries)]
    policies: dict[str, RoutingPolicy] = {
        "random 50 %": RandomRouter(0.5),
        "confidence threshold 0.9": ConfidenceThreshold(0.9),
        "oracle": Oracle(bench.task),
    }
    rows = []
    for policy_name, policy in policies.items():
        exact: list[Trajectory] = []
        for name, found in projections.items():
            limits = {"max_new_tokens": e.max_new_tokens, "max_steps": e.max_steps}
            engine = StepEngine(bench.models, bench.tokenizer, projections=found or None)
            start = time.perf_counter()
            done = Runner(engine, bench.task, prompts, limits).trajectories(policy, policy_name)
            seconds = time.perf_counter() - start
            exact = exact or done
            rows.append({
                "policy": policy_name, "catch_up": name, "accuracy": float(np.mean([bool(t.correct) for t in done])),
                "same_answer": float(np.mean([a.token_ids == b.token_ids for a, b in zip(done, exact, strict=True)])),
                "total_flops": float(np.mean([t.cost.total_flops for t in done])),
                "generated_flops": float(np.mean([t.cost.generated_flops for t in done])),
                "projected_tokens": np.mean([t.meta.get("projected_tokens", [0, 0]) for t in done], 0).tolist(),
                "forward_tokens": np.mean([t.cost.forward_tokens for t in done], 0).tolist(),
                "large_steps": float(np.mean([m for t in done for m in t.models])), "seconds": seconds,
            })  # fmt: skip
            print(f"{policy_name}, {name}: {100 * rows[-1]['accuracy']:.1f} % right", flush=True)
    return rows


def harm_by_kl(bench: Workbench, train: Texts, held_out: Texts, queries: int) -> list[dict[str, Any]]:
    """What a given KL does to answers: the large model handed over to itself, through the identity with noise added."""
    large = bench.models[1]
    pool = [large, copy.deepcopy(large)]
    exact = fit(pool[0], pool[1], train.tokens[:100], ProjectionConfig(sources=1))
    e = bench.config.engine
    limits = {"max_new_tokens": e.max_new_tokens, "max_steps": e.max_steps}
    prompts = [(q, bench.encode(q)) for q in bench.queries("test", queries)]
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(exact.maps.weight.shape, generator=g) / exact.maps.weight.shape[3] ** 0.5
    rows = []
    for size in NOISE:
        p = replace(exact, maps=exact.maps._replace(weight=exact.maps.weight + size * noise))
        figures = measure(p, pool[0], pool[1], *held_out)
        p = p.gated(replace(figures, bound=UNBOUNDED))
        engine = StepEngine(pool, bench.tokenizer, projections={(0, 1): p, (1, 0): p})
        done = Runner(engine, bench.task, prompts, limits).trajectories(RandomRouter(0.5), "noise")
        accuracy = float(np.mean([bool(t.correct) for t in done]))
        kl = {"kl_mean": figures.kl_mean, "kl_p99": figures.kl_p99, "top1": figures.top1}
        rows.append({"noise": size, "accuracy": accuracy, **kl})
        print(f"noise {size}: KL {figures.kl_mean:.2g}, {100 * accuracy:.1f} % right", flush=True)
    return rows


def medians(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Median seconds of each call, interleaved."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[next(iter(calls))]) < 5:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


@torch.inference_mode()
def one_handoff(sheet: Sheet, source: Decoder, target: Decoder, maps: LinearMaps) -> dict[str, float]:
    """Seconds for the receiver's forward over all tokens of the sheet, and for projecting them."""
    start = np.zeros(len(sheet.texts), np.int64)
    there, here = sheet.pages(source), sheet.pages(target)
    sheet.run(source, there, start)
    slots, positions = (torch.from_numpy(a) for a in sheet.index(start, sheet.lengths))
    args = there, slots, rotary(source), here, slots, rotary(target), positions, maps
    return medians({"exact": lambda: sheet.run(target, here, start), "projected": lambda: kv_project(*args)}, 1.0)


def handoff_times(bench: Workbench, maps: dict[str, KVProjection], texts: list[list[int]]) -> list[dict[str, Any]]:
    """One hand-over of `sequences` x `missing` tokens: the receiver's forward over them against the map."""
    rows = []
    for name, p in maps.items():
        source, target = (bench.models[i] for i in DIRECTIONS[name])
        projected = maps_on(p.maps, target)
        for sequences, missing in ((1, 16), (1, 64), (32, 16), (32, 64)):
            long = [t for t in texts if len(t) >= missing][:sequences]
            sheet = Sheet([np.asarray(t[:missing], np.int64) for t in long], missing)
            times = one_handoff(sheet, source, target, projected)
            tokens = sequences * missing
            rows.append({
                "direction": name, "sequences": sequences, "missing": missing,
                "exact_us": 1e6 * times["exact"], "projected_us": 1e6 * times["projected"],
                "exact_flops": sequences * target.config.forward_flops(missing, missing),
                "projected_flops": tokens * p.maps.flops_per_token,
            })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=400)
    parser.add_argument("--held-out", type=int, default=400)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    bench = Workbench(load_config("nano", []))
    train, held_out = routed_texts(bench, "train", max(SIZES)), routed_texts(bench, "calibrate", args.held_out)
    rows = fits(bench, train, held_out)
    best = {}
    for name, (i, j) in DIRECTIONS.items():
        pair = bench.models[i], bench.models[j]
        p = fit(*pair, train.tokens, ProjectionConfig(sources=2))
        g = measure(p, *pair, *held_out)
        best[name] = p.gated(replace(g, bound=UNBOUNDED))
    one = {name: {DIRECTIONS[name]: p} for name, p in best.items()}
    both = {pair: p for found in one.values() for pair, p in found.items()}
    document = {
        "study": "projection",
        "default_bound": ProjectionConfig().max_kl,
        "queries": args.queries,
        "fits": rows,
        "kl_of_the_source_itself": {
            d: kl_of_the_other_model(bench.models[i], bench.models[j], held_out) for d, (i, j) in DIRECTIONS.items()
        },
        "use": use(bench, {"exact": {}, **one, "both ways": both}, args.queries),
        "harm_by_kl": harm_by_kl(bench, train, held_out, args.queries),
        "times": handoff_times(bench, best, train.tokens),
        "provenance": provenance(),
    }
    write_json(args.out, document)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
