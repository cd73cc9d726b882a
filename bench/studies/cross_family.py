"""Route between families: SmolLM2-135M-Instruct and Gemma 3 270M, which share no tokenizer.

    python -m roro_fast.models.gemma_270m     # fetches the weights; Google's Gemma Terms of Use apply
    python bench/studies/cross_family.py      # about three minutes on one core

Every answer has a fixed length, so that arms differ by who writes and not by when they stop. Reports what a switch
costs beyond the tokens themselves: tokens caught up, and the time to tokenise a step for the other model. Says nothing
of accuracy: the larger one is a base model. Results go to bench/results/cross_family.json.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from roro_fast.engine import Request, StepEngine, Trajectory
from roro_fast.files import write_json
from roro_fast.models import gemma_270m, smol
from roro_fast.models.loading import load_decoder
from roro_fast.models.token_bytes import TokenBytes
from roro_fast.routing.baselines import Constant, RandomRouter
from roro_fast.runs.meta import provenance
from roro_fast.tasks.base import Query
from roro_fast.tasks.prompting import encode_prompts
from roro_fast.train.setup import load_tokenizer

RESULT = Path(__file__).parents[1] / "results" / "cross_family.json"
PROBLEMS = ["A box holds 12 pens. How many pens are in {} boxes?", "A train goes {} km an hour. How far in 4 hours?"]


def tokenise(codecs: list[TokenBytes], done: list[Trajectory], repeats: int = 20) -> float:
    """Microseconds to tokenise a step for the other model, best of `repeats`."""
    steps = [(1 - s.model, text.encode()) for t in done for s, text in zip(t.steps, t.step_texts, strict=True)]
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        for m, text in steps:
            codecs[m].encode(text)
        best = min(best, time.perf_counter() - start)
    return 1e6 * best / len(steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--step-tokens", type=int, default=16)
    args = parser.parse_args()
    torch.set_num_threads(1)
    paths = [smol.ensure(), gemma_270m.ensure()]
    tokenizers = [load_tokenizer(p) for p in paths]
    engine = StepEngine([load_decoder(p) for p in paths], tokenizers, kv_bytes=512 << 20, max_num_seqs=8)
    codecs = [TokenBytes(t) for t in tokenizers]
    queries = [Query(str(i), PROBLEMS[i % 2].format(3 + i), "", "bench") for i in range(args.queries)]
    limits: dict[str, Any] = {"max_new_tokens": args.tokens, "max_step_tokens": args.step_tokens, "ignore_eos": True}
    prompts = [encode_prompts(tokenizers, q) for q in queries]
    rows = []
    for policy in (Constant(0, "all_small"), Constant(1, "all_large"), RandomRouter(0.5, "next")):
        start = time.perf_counter()
        requests = [Request(p, query=q, **limits) for p, q in zip(prompts, queries, strict=True)]
        done = list(engine.rollout(requests, policy))
        seconds = time.perf_counter() - start
        for m in range(2):  # the next arm computes its prompts anew
            engine.kv.clear_prefixes(m)
        written = sum(sum(t.cost.generated_tokens) for t in done)
        switches = sum(a != b for t in done for a, b in zip(t.models, t.models[1:], strict=False))
        rows.append(
            {
                "arm": policy.name,
                "tokens_per_second": written / seconds,
                "generated_tokens": [sum(t.cost.generated_tokens[m] for t in done) for m in range(2)],
                "forward_tokens": [sum(t.cost.forward_tokens[m] for t in done) for m in range(2)],
                "total_flops": sum(t.cost.total_flops for t in done),
                "switches": switches,
                "tokenise_us_per_step": tokenise(codecs, done),
            }
        )
        print(rows[-1])
    write_json(RESULT, {"study": "cross_family", "settings": vars(args), "rows": rows, "provenance": provenance()})


if __name__ == "__main__":
    main()
