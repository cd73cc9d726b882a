"""StepEngine against the loop that research code writes: Hugging Face `generate`, one question and one step at a time.

    python bench/e2e/bench_hf_step_loop.py [--queries 64] [--rounds 3] [--switch 0.5]

Both get the nano pair, the same ledger questions and the same routing decisions, greedy, in fp32, on one thread. The
gate comes first: every token must agree, or no time is printed. Rounds interleave the two; the ratio is the median.
The last line of stdout is one JSON document, also written to bench/results/hf_step_loop.json.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path

import torch

from roro_fast.engine import Request, StepEngine
from roro_fast.files import write_json
from roro_fast.models import nano
from roro_fast.models.loading import load_decoder
from roro_fast.routing import Scripted
from roro_fast.runs.meta import provenance
from roro_fast.tasks.ledger import Ledger

RESULT = Path(__file__).parents[1] / "results" / "hf_step_loop.json"
MAX_NEW_TOKENS, MAX_STEPS = 128, 16


def plans(n: int, switch: float) -> list[list[int]]:
    """Per query a list of writers; each step changes the writer with probability `switch`."""
    rng = random.Random(0)
    out = []
    for _ in range(n):
        plan = [rng.randrange(2)]
        while len(plan) < MAX_STEPS:
            plan.append(plan[-1] ^ (rng.random() < switch))
        out.append(plan)
    return out


def hf_loop(models: list, tokenizer: object, prompt: list[int], plan: list[int], ends: list[int]) -> list[int]:
    """Write step after step with `generate`, which prefills the whole text anew at every step."""
    eos, delimiter = ends
    ids = list(prompt)
    for writer in plan:
        left = MAX_NEW_TOKENS - (len(ids) - len(prompt))
        out = models[writer].generate(
            torch.tensor([ids]), max_new_tokens=left, do_sample=False, eos_token_id=[eos, delimiter], pad_token_id=0
        )
        ids = out[0].tolist()
        if ids[-1] == eos or len(ids) - len(prompt) >= MAX_NEW_TOKENS:
            break
    return ids[len(prompt) :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--switch", type=float, default=0.5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    paths = [nano.path("small"), nano.path("large")]
    tokenizer = AutoTokenizer.from_pretrained(paths[0])
    hf = [AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32).eval() for p in paths]
    engine = StepEngine([load_decoder(p) for p in paths], tokenizer, max_num_seqs=args.queries)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("\n\n")]
    prompts = [tokenizer(q.prompt)["input_ids"] for q in Ledger().queries("test", args.queries)]
    routes = plans(args.queries, args.switch)

    def ours() -> list[list[int]]:
        out: list[list[int]] = [[] for _ in prompts]
        requests = (
            Request(p, max_new_tokens=MAX_NEW_TOKENS, max_steps=MAX_STEPS, tag={"plan": plan, "at": i})
            for i, (p, plan) in enumerate(zip(prompts, routes, strict=True))
        )
        for t in engine.rollout(requests, Scripted()):
            out[t.meta["at"]] = t.token_ids
        for m in range(2):
            engine.kv.clear_prefixes(m)
        return out

    @torch.inference_mode()
    def theirs() -> list[list[int]]:
        return [hf_loop(hf, tokenizer, p, plan, ends) for p, plan in zip(prompts, routes, strict=True)]

    mine, other = ours(), theirs()
    if mine != other:
        bad = sum(a != b for a, b in zip(mine, other, strict=True))
        raise SystemExit(f"gate: {bad} of {len(mine)} answers differ; no times")
    tokens = sum(map(len, mine))
    seconds: dict[str, list[float]] = {"roro_fast": [], "hf_generate_loop": []}
    for _ in range(args.rounds):
        for name, fn in (("roro_fast", ours), ("hf_generate_loop", theirs)):
            start = time.perf_counter()
            fn()
            seconds[name].append(time.perf_counter() - start)
    ratios = [b / a for a, b in zip(seconds["roro_fast"], seconds["hf_generate_loop"], strict=True)]
    result = {
        "bench": "hf_step_loop",
        "queries": args.queries,
        "switch_rate": args.switch,
        "tokens": tokens,
        "tokens_per_second": {k: tokens / statistics.median(v) for k, v in seconds.items()},
        "seconds": seconds,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "provenance": provenance(),
    }
    for name, v in seconds.items():
        print(f"{name:18s} {tokens / statistics.median(v):9.0f} tokens/s   {min(v):.2f}-{max(v):.2f} s")
    print(f"ratio {result['ratio']:.1f}x")
    write_json(RESULT, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
