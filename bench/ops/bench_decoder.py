"""A decoder's whole forward in C++ against the same forward op by op with torch's products, and against transformers.

Decode steps of the nano pair and of SmolLM2-135M's shapes (random weights), single-stream and batched, a prefill of
800 tokens, and 20 tokens on a warm prefix of 800. The ceiling of a decode step is the weights' bytes over the read
bandwidth, which is a variant of its own where the weights do not fit the caches. Logits of each sequence's last token
are part of every variant.

python -m bench.ops.bench_decoder [--threads 2] [--seconds 3] [--no-hf] [--only NAME] [--out FILE]
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

from bench.ops.harness import RESULTS, cache_bytes, interleave
from roro_fast.files import write_json
from roro_fast.models.config import DecoderConfig
from roro_fast.models.decoder import Decoder
from roro_fast.models.inference import PagedBatch, infer, logits, reference
from roro_fast.models.nano import load_pair
from roro_fast.ops import decoder_forward, native
from roro_fast.runs.meta import provenance

PAGE = 16
SMOL = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
READ_BYTES = 256 << 20


def smol(dtype: torch.dtype) -> tuple[Decoder, Any]:
    """(our decoder, transformers' model) with the same random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    hf = LlamaForCausalLM(LlamaConfig(**SMOL)).to(dtype).eval()
    model = Decoder(DecoderConfig.from_hf(hf.config)).to(dtype)
    source = hf.state_dict()
    with torch.no_grad():
        model.embed.weight.copy_(source["model.embed_tokens.weight"])
        for i, layer in enumerate(model.layers):
            take = lambda *names, at=f"model.layers.{i}.": torch.cat([source[f"{at}{n}.weight"] for n in names])  # noqa: E731
            layer.qkv.weight.copy_(take("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
            layer.o.weight.copy_(take("self_attn.o_proj"))
            layer.gate_up.weight.copy_(take("mlp.gate_proj", "mlp.up_proj"))
            layer.down.weight.copy_(take("mlp.down_proj"))
    return model, hf


def batch(model: Decoder, sequences: int, context: int, new: int) -> PagedBatch:
    """`new` tokens on top of `context` cached ones, for each sequence."""
    c, total = model.config, context + new
    per = -(-total // PAGE)
    table = torch.arange(sequences * per).view(sequences, per)
    positions = torch.arange(context, total)
    shape = sequences * per, c.num_layers, 2, PAGE, c.num_kv_heads, c.head_dim
    return PagedBatch(
        ids=torch.randint(0, c.vocab_size, (sequences * new,)),
        positions=positions.repeat(sequences),
        slots=(table[:, positions // PAGE] * PAGE + positions % PAGE).flatten(),
        pages=torch.randn(shape).to(model.dtype),
        page_table=table,
        kv_lens=torch.full((sequences,), total),
        cu_seqlens=torch.arange(0, sequences * new + 1, new),
    )


def ours(model: Decoder, b: PagedBatch) -> torch.Tensor:
    return logits(model, infer(model, b)[b.cu_seqlens[1:] - 1])


def op_by_op(model: Decoder, b: PagedBatch) -> torch.Tensor:
    return model.logits(reference(model, b)[b.cu_seqlens[1:] - 1])


def transformers_step(hf: Any, b: PagedBatch) -> Callable[[int], Any]:
    """The same step with transformers' dynamic cache, cut back to the context after every call."""
    from transformers import DynamicCache

    n, total = len(b.kv_lens), int(b.kv_lens[0])
    new = len(b.ids) // n
    context = total - new
    ids = torch.randint(0, hf.config.vocab_size, (n, total))
    warm = DynamicCache(config=hf.config)
    if context:
        hf(ids[:, :context], past_key_values=warm, logits_to_keep=1)

    def step(_: int) -> Any:
        cache = warm if context else DynamicCache(config=hf.config)
        out = hf(ids[:, context:], past_key_values=cache, logits_to_keep=1).logits
        if context:
            cache.crop(-new)
        return out

    return step


def gate(model: Decoder, b: PagedBatch) -> None:
    got, want = ours(model, b), op_by_op(model, b).float()
    error, scale = (got - want).abs().mean(), want.abs().mean()
    limit = 1e-4 if model.dtype == torch.float32 else 5e-2
    assert error <= limit * scale, f"logits differ by {error / scale:.3g} of their mean size"


def measure(name: str, model: Decoder, hf: Any, shape: tuple[int, int, int], seconds: float) -> dict[str, Any]:
    sequences, context, new = shape
    b = batch(model, sequences, context, new)
    gate(model, b)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    memory = torch.ones(READ_BYTES // 4)
    variants: dict[str, Callable[[int], Any]] = {"cpu": lambda _: ours(model, b), "torch": lambda _: op_by_op(model, b)}
    if hf is not None:
        variants["transformers"] = transformers_step(hf, b)
    if streamed := weights > cache_bytes():  # a small model's weights would be swept out of the caches they live in
        variants["read"] = lambda _: memory.sum()
    times = interleave(variants, seconds)
    read = times.pop("read", [])
    best = {k: min(v) for k, v in times.items()}
    median = {k: statistics.median(v) for k, v in times.items()}
    flops = sequences * model.config.forward_flops(new, context + new)
    speedup = {k: round(v / median["cpu"], 2) for k, v in median.items() if k != "cpu"}
    shown = ", ".join(f"{k} {v:.2f}x" for k, v in speedup.items())
    rate = f"{sequences * new / median['cpu']:9.1f} tok/s {flops / median['cpu'] / 1e9:6.1f} GF/s"
    took = f"{1e3 * median['cpu']:9.3f} ms (best {1e3 * best['cpu']:.3f})"
    out: dict[str, Any] = {
        "case": name,
        "sequences": sequences,
        "context": context,
        "new_tokens": new,
        "median_ms": {k: round(1e3 * v, 3) for k, v in median.items()},
        "best_ms": {k: round(1e3 * v, 3) for k, v in best.items()},
        "tokens_per_s": {k: round(sequences * new / v, 1) for k, v in median.items()},
        "speedup": speedup,
        "speedup_of_bests": {k: round(v / best["cpu"], 2) for k, v in best.items() if k != "cpu"},
        "gflop_per_s": round(flops / median["cpu"] / 1e9, 1),
        "weight_bytes": weights,
    }
    if streamed:
        out["read_gb_per_s"] = {
            "median": round(READ_BYTES / statistics.median(read) / 1e9, 2),
            "best": round(READ_BYTES / min(read) / 1e9, 2),
        }
        out["share_of_read_bandwidth"] = {
            "median": round(weights / median["cpu"] * statistics.median(read) / READ_BYTES, 3),
            "best": round(weights / best["cpu"] * min(read) / READ_BYTES, 3),
        }
        shown += f", {100 * out['share_of_read_bandwidth']['best']:.0f} % of read"
    print(f"{name:40} {took} {rate}, {shown}", flush=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--no-hf", action="store_true", help="leave transformers out")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    before = os.getloadavg()
    results = []
    with torch.inference_mode():
        for dtype in (torch.bfloat16, torch.float32):
            kind = str(dtype).removeprefix("torch.")
            models: list[tuple[str, Decoder, Any]] = []
            pair = load_pair(dtype)
            models += [(f"nano-{size}", m, None) for size, m in zip(("small", "large"), pair, strict=True)]
            if dtype == torch.bfloat16:
                models.append(("smol-135M", *smol(dtype)))
            for label, model, hf in models:
                shapes = [(1, 200, 1), (32, 200, 1), (256, 200, 1)]
                if hf is not None:
                    shapes = [(1, 100, 1), (8, 100, 1), (32, 100, 1), (128, 100, 1), (1, 0, 800), (1, 800, 20)]
                for s in shapes:
                    name = f"{label} {kind} {s[0]} x {s[2]} on {s[1]}"
                    if args.only in name:
                        found = None if args.no_hf else hf
                        results.append(measure(name, model, found, s, args.seconds))
                decoder_forward.forget(model)
    document = {
        "op": "decoder_forward",
        "device": "cpu",
        "threads": args.threads,
        "load_before": before,
        "load_after": os.getloadavg(),
        "isa": native.isa(),
        "cases": results,
        "provenance": provenance(),
    }
    write_json(args.out or RESULTS / f"decoder_cpu_{args.threads}.json", document)
    print(json.dumps(document))


if __name__ == "__main__":
    main()
