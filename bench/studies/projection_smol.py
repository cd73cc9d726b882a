"""Projection between SmolLM2-135M-Instruct and its own first layers, on worked solutions.

    python bench/studies/projection_smol.py gsm8k_train.jsonl    # rows of {"problem", "solution"}; about ten minutes

Layers that the two share need no map: those of the smaller model must come out exact, which checks the fit; the rest
shows what a linear map makes of real weights. Results go to bench/results/projection_smol.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from roro_fast.config import ProjectionConfig
from roro_fast.engine.projection import fit, measure
from roro_fast.files import write_json
from roro_fast.models import smol
from roro_fast.models.loading import load_decoder
from roro_fast.runs.meta import provenance

RESULT = Path(__file__).parents[1] / "results" / "projection_smol.json"
MAX_TOKENS = 220
RIDGE = [1e-6, 1e-4, 1e-2, 1e-1]


def worked_solutions(path: Path, tokenizer: Any, n: int) -> tuple[list[list[int]], list[int]]:
    """Token ids of the first `n` rows that are short enough, and where each solution begins."""
    texts, starts = [], []
    with path.open(encoding="utf-8") as file:
        for row in map(json.loads, file):
            question = tokenizer(row["problem"])["input_ids"]
            ids = question + tokenizer("\n\n" + row["solution"])["input_ids"]
            if len(ids) <= MAX_TOKENS:
                texts.append(ids)
                starts.append(len(question))
            if len(texts) == n:
                break
    return texts, starts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--texts", type=int, default=60)
    parser.add_argument("--held-out", type=int, default=24)
    parser.add_argument("--layers", type=int, nargs="*", default=[8, 20])
    args = parser.parse_args()
    torch.set_num_threads(1)
    from transformers import AutoTokenizer

    path = smol.ensure()
    texts, starts = worked_solutions(args.file, AutoTokenizer.from_pretrained(path), args.texts + args.held_out)
    train, held_out = texts[: args.texts], (texts[args.texts :], starts[args.texts :])
    large = load_decoder(path)
    rows = []
    for layers in args.layers:
        small = load_decoder(path, layers=layers)
        for source, target in ((small, large), (large, small)):
            begin = time.perf_counter()
            p = fit(source, target, train, ProjectionConfig(sources=1, ridge=RIDGE))
            seconds = time.perf_counter() - begin
            g = measure(p, source, target, *held_out)
            shape = source.config.num_layers, target.config.num_layers
            rows.append({
                "layers": shape, "tokens": p.fit["tokens"], "kl_mean": g.kl_mean, "kl_p99": g.kl_p99, "top1": g.top1,
                "held_out_tokens": g.tokens, "error": p.fit["error"], "chosen": p.maps.layers.flatten().tolist(),
                "map_flops_per_token": p.maps.flops_per_token,
                "forward_flops_per_token": target.config.forward_flops(1, 1),
                "seconds": seconds,
            })  # fmt: skip
            print(f"{shape[0]} layers to {shape[1]}: KL {g.kl_mean:.3g}, same top token {g.top1:.3f}", flush=True)
    facts = provenance()
    facts["command"] = [Path(part).name for part in facts["command"]]  # where the file lies is nobody's business
    write_json(RESULT, {"study": "projection_smol", "texts": args.texts, "rows": rows, "provenance": facts})
    print(f"wrote {RESULT}")


if __name__ == "__main__":
    main()
