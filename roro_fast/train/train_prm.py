"""Train process reward models: a head on the prefill of a model of the pool, from the task's own step verification.

    python -m roro_fast.train.train_prm small --out runs/prm-small     # the nano pair's: seconds on one CPU thread
    python -m roro_fast.train.train_prm large --out runs/prm-large
    python -m roro_fast.train.train_prm small --config smol --queries 96 --out runs/smol-prm-small

Labels are the verdicts on small-model steps of small and randomly routed answers to train queries; calibrate queries
tell how good it is. Steps of the large model are read but not learned from: they are right wherever the small model
finds them unlikely, and a head would learn who wrote a step instead. The head on the large model is what SpecReason
asks for, the one on the small model a cheap, imperfect process reward model.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from roro_fast.config_io import load_config
from roro_fast.engine import Request
from roro_fast.errors import ConfigError
from roro_fast.routing import Constant, RandomRouter
from roro_fast.routing.probe import ProbeScorer, step_logits
from roro_fast.routing.scoring import Trace
from roro_fast.train.rollout import verify
from roro_fast.train.setup import Workbench


def labelled(bench: Workbench, split: str, n: int, seed: int) -> tuple[list[Trace], torch.Tensor, torch.Tensor]:
    """Traces of all-small and coin-routed answers; per step over all traces in order, [S] bool: right, by small."""
    e = bench.config.engine
    queries = {q.id: q for q in bench.asked(bench.task.queries(split, n, seed))}
    requests = [
        Request(
            bench.encode(q), query=q, policy=policy, arm=policy.name, seed=seed, max_new_tokens=e.max_new_tokens,
            max_steps=e.max_steps,
        )
        for policy in (Constant(0, "all_small"), RandomRouter(0.5))
        for q in queries.values()
    ]  # fmt: skip
    found = {(t.arm, t.query_id): verify(t, queries[t.query_id], bench.task) for t in bench.engine.rollout(requests)}
    done = [found[key] for key in sorted(found)]
    if any(t.step_correct is None for t in done):
        raise ConfigError(f"task.name: {bench.task.name!r} does not verify steps, which the head learns from")
    right = torch.tensor([f for t in done for f in t.step_correct or ()])
    drafted = torch.tensor([m == 0 for t in done for m in t.models])
    return [Trace(queries[t.query_id].prompt, tuple(t.step_texts)) for t in done], right, drafted


def fit_head(
    x: torch.Tensor,
    step: torch.Tensor,
    right: torch.Tensor,
    used: torch.Tensor,
    iterations: int = 200,
    decay: float = 1e-3,
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """(weight [D], bias [], loss): logistic regression through the soft minimum over each step's tokens, by Adam.

    x [T, D], step [T] int64; right, used [S] bool: the labels, and which steps to learn from. Inputs are standardised;
    the result takes them as they are.
    """
    y = right[used].float()
    std, mean = torch.std_mean(x, 0, correction=0)
    std = std.clamp_min(1e-6)
    inputs = (x - mean) / std
    w = torch.zeros(x.shape[1])
    w[0] = 1.0  # a surprising token is a suspicious one
    w.requires_grad_(True)
    b = torch.tensor(3.0, requires_grad=True)
    optimizer = torch.optim.Adam([w, b], lr=0.05)
    loss = torch.zeros(())
    for _ in range(iterations):
        logits = step_logits(inputs @ w + b, step, len(right))[used]
        loss = F.binary_cross_entropy_with_logits(logits, y)
        optimizer.zero_grad()
        (loss + decay * w.square().sum()).backward()
        optimizer.step()
    weight = (w / std).detach()
    return weight, (b - weight @ mean).detach(), float(loss.detach())


def auc(score: np.ndarray, right: np.ndarray) -> float:
    """Probability that a right step scores above a wrong one; ties count half."""
    low, high = np.sort(score[~right]), score[right]
    below = np.searchsorted(low, high, "left") + np.searchsorted(low, high, "right")
    return float(below.mean() / 2 / len(low))


def train(
    bench: Workbench, at: int, out: Path, n: int = 400, seed: int = 7, iterations: int = 200, decay: float = 1e-3
) -> dict[str, Any]:
    """Write the head for model `at` of the pool to `out`; returns the record that goes into its prm.json."""
    start = time.process_time()
    c, body, tokenizer = bench.config, bench.models[at], bench.tokenizers[at]
    zeros = torch.zeros(body.config.hidden_size + 2)
    scorer = ProbeScorer(body, tokenizer, zeros, torch.zeros(()), system=c.task.system)
    traces, right, drafted = labelled(bench, "train", n, seed)
    x, step, _ = scorer.features(traces)
    weight, bias, loss = fit_head(x, step, right, drafted, iterations, decay)
    scorer = ProbeScorer(body, tokenizer, weight, bias, system=c.task.system)
    held, verdicts, by_small = labelled(bench, "calibrate", max(n // 2, 1), seed)
    p = np.array([v for s in scorer.score(held) for v in s.values])[by_small.numpy()]
    y = verdicts[by_small].numpy()
    record: dict[str, Any] = {
        "body": c.models.paths[at],
        "recipe": {"queries": n, "seed": seed, "iterations": iterations, "steps": int(drafted.sum())},
        "loss": round(loss, 4),
        "calibrate": {
            "steps": len(y),
            "right": round(float(y.mean()), 4),
            "auc": round(auc(p, y), 4),
            "accuracy": round(float(((p > 0.5) == y).mean()), 4),
        },
        "cpu_seconds": round(time.process_time() - start, 1),
        "torch": torch.__version__,
    }
    if c.models.layers and c.models.layers[at]:
        record["layers"] = c.models.layers[at]
    if c.task.system:
        record["system"] = c.task.system
    scorer.save(out, record)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a process reward head.")
    parser.add_argument("model", help="a label of models.labels, such as small")
    parser.add_argument("--config", default="nano")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--queries", type=int, default=400)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    bench = Workbench(load_config(args.config))
    labels = bench.config.models.labels
    if args.model not in labels:
        parser.error(f"{args.model!r} is no label of this pool; choose {', '.join(labels)}")
    print(json.dumps(train(bench, labels.index(args.model), args.out, args.queries, args.seed)))


if __name__ == "__main__":
    main()
