"""Train the nano process reward models: a head on a packaged model's prefill, from the task's own step verification.

    python -m roro_fast.train.train_prm small --out runs/prm-small     # seconds on one CPU thread
    python -m roro_fast.train.train_prm large --out runs/prm-large

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

from roro_fast.engine import Request, StepEngine
from roro_fast.models import nano
from roro_fast.models.decoder import Decoder
from roro_fast.routing import Constant, RandomRouter
from roro_fast.routing.probe import ProbeScorer, step_logits
from roro_fast.routing.scoring import Trace
from roro_fast.tasks.base import Task
from roro_fast.tasks.ledger import Ledger
from roro_fast.train.rollout import verify

LIMITS: dict[str, Any] = {"max_new_tokens": 128, "max_steps": 16}


def labelled(
    engine: StepEngine, task: Task, split: str, n: int, seed: int
) -> tuple[list[Trace], torch.Tensor, torch.Tensor]:
    """Traces of all-small and coin-routed answers; per step over all traces in order, [S] bool: right, by small."""
    queries = {q.id: q for q in task.queries(split, n, seed)}
    requests = [
        Request(engine.tokenizer(q.prompt)["input_ids"], query=q, policy=policy, arm=policy.name, seed=seed, **LIMITS)
        for policy in (Constant(0, "all_small"), RandomRouter(0.5))
        for q in queries.values()
    ]
    found = {(t.arm, t.query_id): verify(t, queries[t.query_id], task) for t in engine.rollout(requests)}
    done = [found[key] for key in sorted(found)]
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


def train(size: str, out: Path, n: int = 400, seed: int = 7, iterations: int = 200) -> dict[str, Any]:
    """Write the head for the packaged model `size` to `out`; returns the record that goes into its prm.json."""
    from transformers import AutoTokenizer

    start = time.process_time()
    tokenizer = AutoTokenizer.from_pretrained(nano.path(size))
    pool, task = nano.load_pair(), Ledger()
    engine = StepEngine(pool, tokenizer)
    body: Decoder = pool[nano.SIZES.index(size)]
    scorer = ProbeScorer(body, tokenizer, torch.zeros(body.config.hidden_size + 2), torch.zeros(()))
    traces, right, drafted = labelled(engine, task, "train", n, seed)
    x, step, _ = scorer.features(traces)
    weight, bias, loss = fit_head(x, step, right, drafted, iterations)
    scorer = ProbeScorer(body, tokenizer, weight, bias)
    held, verdicts, by_small = labelled(engine, task, "calibrate", max(n // 2, 1), seed)
    p = np.array([v for s in scorer.score(held) for v in s.values])[by_small.numpy()]
    y = verdicts[by_small].numpy()
    record = {
        "body": f"nano/{size}",
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
    scorer.save(out, record)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a nano process reward head.")
    parser.add_argument("size", choices=nano.SIZES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--queries", type=int, default=400)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(train(args.size, args.out, args.queries, args.seed)))


if __name__ == "__main__":
    main()
