"""Measure the nano pair against its required shape and say PASS or FAIL per requirement.

    python -m roro_fast.models.check_nano [--queries 500] [--small DIR] [--large DIR]

Every completion is decoded greedily, step by step, and really switches models on the shared token prefix: a model that
takes over first catches up on the tokens it has not seen.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from roro_fast.models import nano, nano_tokenizer
from roro_fast.models.decoder import Decoder
from roro_fast.models.loading import load_decoder
from roro_fast.tasks.base import Query
from roro_fast.tasks.ledger import DELIMITER, KINDS, Ledger

SMALL, LARGE = 0, 1
MAX_NEW_TOKENS, MAX_STEPS = 160, 12


class Cache:
    """Keys and values of one model for B sequences; `forward` extends chosen rows by one token each."""

    def __init__(self, model: Decoder, rows: int, length: int) -> None:
        c = model.config
        self.model = model
        self.filled = torch.zeros(rows, dtype=torch.int64)
        self.kv = torch.zeros(2, c.num_layers, rows, length, c.num_kv_heads, c.head_dim)

    def forward(self, rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Hidden states [R, hidden] of tokens `ids` [R], appended to sequences `rows` [R]."""
        at = self.filled[rows]
        reach = int(at.max()) + 1
        seen = (torch.arange(reach) <= at.unsqueeze(1))[:, None, None]  # [R, 1, 1, reach]

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            self.kv[0, layer, rows, at], self.kv[1, layer, rows, at] = k, v
            keys, values = (self.kv[i, layer, rows, :reach].transpose(1, 2) for i in (0, 1))
            out = F.scaled_dot_product_attention(
                q.unsqueeze(2), keys, values, attn_mask=seen, enable_gqa=q.shape[1] != k.shape[1]
            )
            return out.squeeze(2)

        hidden = self.model(ids, at, attend)
        self.filled[rows] += 1
        return hidden


@dataclass(slots=True)
class Run:
    """One routed completion: tokens so far, closed steps, the model of each and tokens written per model."""

    tokens: list[int]
    prompt: int
    steps: list[str] = field(default_factory=list)
    models: list[int] = field(default_factory=list)
    written: Counter[int] = field(default_factory=Counter)
    discarded: int = 0
    start: int = 0
    active: int = SMALL
    done: bool = False


@torch.no_grad()
def decode(models: list[Decoder], tokenizer: Tokenizer, queries: list[Query], mode: str) -> list[Run]:
    """Greedy completions under `mode`: "small", "large" or "oracle" (small drafts, large rewrites each wrong step)."""
    task = Ledger()
    delimiter, eos = tokenizer.token_to_id(DELIMITER), tokenizer.token_to_id("<eos>")
    runs = []
    for q in queries:
        ids = tokenizer.encode(q.prompt).ids
        runs.append(Run(ids, len(ids), start=len(ids), active=LARGE if mode == "large" else SMALL))
    length = max(r.prompt for r in runs) + MAX_NEW_TOKENS
    caches = [Cache(m, len(runs), length) for m in models]
    while not all(r.done for r in runs):
        for m, cache in enumerate(caches):
            rows = [i for i, r in enumerate(runs) if not r.done and r.active == m]
            if not rows:
                continue
            at = cache.filled[rows].tolist()
            last = torch.tensor([runs[i].tokens[a] for i, a in zip(rows, at, strict=True)])
            hidden = cache.forward(torch.tensor(rows), last)
            ready = [j for j, (i, a) in enumerate(zip(rows, at, strict=True)) if a == len(runs[i].tokens) - 1]
            chosen = models[m].logits(hidden[ready]).argmax(-1).tolist()
            for j, token in zip(ready, chosen, strict=True):
                run = runs[rows[j]]
                run.tokens.append(token)
                full = len(run.tokens) - run.prompt >= MAX_NEW_TOKENS
                if token in (delimiter, eos) or full:
                    _close_step(task, tokenizer, queries[rows[j]], run, mode, ended=token == eos or full)
                    for c in caches:
                        c.filled[rows[j]].clamp_(max=len(run.tokens) - 1)
    return runs


def _close_step(task: Ledger, tokenizer: Tokenizer, query: Query, run: Run, mode: str, ended: bool) -> None:
    new = run.tokens[run.start :]
    text = tokenizer.decode(new)
    if mode == "oracle" and run.active == SMALL:
        verdict = task.verify(query, [*run.steps, text]).steps
        if verdict is not None and not verdict[-1]:
            run.discarded += len(new)
            run.tokens = run.tokens[: run.start]
            run.active = LARGE
            return
    run.steps.append(text)
    run.models.append(run.active)
    run.written[run.active] += len(new)
    run.start = len(run.tokens)
    run.done = ended or len(run.steps) >= MAX_STEPS
    if mode == "oracle":
        run.active = SMALL


def accuracy(queries: list[Query], runs: list[Run]) -> float:
    task = Ledger()
    return sum(task.verify(q, r.steps).correct for q, r in zip(queries, runs, strict=True)) / len(queries)


def flops(models: list[Decoder], runs: list[Run]) -> float:
    """2N per kept token, in FLOPs."""
    return sum(2.0 * models[m].config.num_params * n for r in runs for m, n in r.written.items())


def step_errors(queries: list[Query], runs: list[Run]) -> dict[str, tuple[float, int]]:
    """(share of locally wrong steps, steps) per kind; "total" is the last step."""
    task = Ledger()
    wrong: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for q, r in zip(queries, runs, strict=True):
        kinds = [*q.meta["kinds"], "total"]
        for kind, right in zip(kinds, task.verify(q, r.steps).steps or (), strict=False):
            count[kind] += 1
            wrong[kind] += not right
    return {k: (wrong[k] / count[k], count[k]) for k in [*(k.name for k in KINDS), "total"] if count[k]}


def measure(models: list[Decoder], queries: list[Query]) -> dict[str, object]:
    """All required figures of a [small, large] pool, and under "checks" name -> (figure as text, passed)."""
    tokenizer = nano_tokenizer.build()
    runs = {mode: decode(models, tokenizer, queries, mode) for mode in ("small", "large", "oracle")}
    acc = {mode: accuracy(queries, r) for mode, r in runs.items()}
    errors = {mode: step_errors(queries, runs[mode]) for mode in ("small", "large")}
    rates = [rate for kind, rate in errors["small"].items() if kind != "total"]
    lowest, count = min(rates)
    span = max(rates)[0] / max(lowest, 1 / count)  # no error seen: at most one in `count`
    share = flops(models, runs["oracle"]) / flops(models, runs["large"])
    drafts = sum(r.discarded for r in runs["oracle"]) * 2.0 * models[SMALL].config.num_params
    escalated = [m for r in runs["oracle"] for m in r.models]
    relative = acc["oracle"] / acc["large"] if acc["large"] else 0.0
    return {
        "queries": len(queries),
        "parameters": [m.config.num_params for m in models],
        "accuracy": acc,
        "step_errors": {mode: {k: round(e, 4) for k, (e, _) in v.items()} for mode, v in errors.items()},
        "small_error_span": span,
        "oracle_relative_accuracy": relative,
        "oracle_flops_share": share,
        "oracle_flops_share_with_drafts": share + drafts / flops(models, runs["large"]),
        "oracle_escalated_steps": sum(escalated) / len(escalated),
        "checks": {
            "large accuracy >= 90 %": (f"{acc['large']:.1%}", acc["large"] >= 0.90),
            "small accuracy in 30-65 %": (f"{acc['small']:.1%}", 0.30 <= acc["small"] <= 0.65),
            "small error span over kinds >= 5x": (f"{span:.1f}x", span >= 5),
            "oracle accuracy >= 97 % of large": (f"{relative:.1%}", relative >= 0.97),
            "oracle FLOPs <= 45 % of large": (f"{share:.1%}", share <= 0.45),
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Check the nano pair on the test split of the ledger task.")
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--split", default="test")
    parser.add_argument("--small", type=Path, default=nano.path("small"))
    parser.add_argument("--large", type=Path, default=nano.path("large"))
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON document as the last line")
    args = parser.parse_args()
    models = [load_decoder(args.small), load_decoder(args.large)]
    figures = measure(models, Ledger().queries(args.split, args.queries))
    checks = figures["checks"]
    assert isinstance(checks, dict)
    for key, value in figures.items():
        if key != "checks":
            print(f"{key}: {value}")
    for name, (value, passed) in checks.items():
        print(f"{'PASS' if passed else 'FAIL'}  {name}: {value}")
    if args.json:
        print(json.dumps(figures))
    return 0 if all(passed for _, passed in checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
