"""README tables of the end-to-end benches: engines side by side, the large model alone, and what bounds the curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from roro_fast.eval.bench_tables import row

OURS = "roro_fast"
NAMES = {
    OURS: "**roro_fast**",
    "roro_fast_apart": "roro_fast, no layers shared",
    "hf_reprefill": "HF `generate`, prefill at every switch",
    "hf_cached": "HF loop, cache per model, batched",
    "vllm_cpu": "two vLLM engines",
    "llama_cpp": "llama.cpp",
    "hf_continuous": "transformers continuous batching",
    "openvino_genai": "openvino-genai",
}


def routed(found: Mapping[str, Any]) -> str:
    """Every workload of a rollout result: rates, step times, memory, FLOPs, share of the ceiling and our ratio."""
    out: list[str] = []
    for name, w in found["workloads"].items():
        out += [
            f"`{name}`: {w['sequences']} answers of {w['new_tokens'] // w['sequences']} tokens, {w['steps']} steps, "
            f"{w['switches']} switches.",
            "",
            row(["engine", "tokens/s", "answers/s", "step p50 / p99", "memory", "FLOPs", "of ceiling", "ours is"]),
            row(["---", *["--:"] * 7]),
        ]
        for engine, r in w["engines"].items():
            ratio = f"{r['ours_over_this']:.2f}x" if "ours_over_this" in r else ""
            flops = f"{r['forward_flops_over_least']:.2f}x least" if r.get("forward_flops_over_least") else "not said"
            out.append(
                row([
                    NAMES[engine], f"{r['tokens_per_second']:,.0f}", f"{r['trajectories_per_second']:.2f}",
                    f"{r['step_ms_p50']:,.0f} / {r['step_ms_p99']:,.0f} ms", f"{r['peak_rss_mb']:,} MB", flops,
                    f"{100 * r['fraction_of_ceiling']:.0f} %", ratio,
                ])
            )  # fmt: skip
        out.append("")
    return "\n".join([*out, _note(found)])


def sweep(found: Mapping[str, Any]) -> str:
    """One row a workload: our rate, step times and memory, and our ratio to every peer."""
    peers = list(dict.fromkeys(n for w in found["workloads"].values() for n in w["engines"] if n != OURS))
    heads = ["in flight, switch rate, prompt, group", "tokens/s", "step p50 / p99", "memory"]
    rows = [row([*heads, *(f"over {NAMES[n]}" for n in peers)]), row(["---", *["--:"] * (len(peers) + 3)])]
    for name, w in found["workloads"].items():
        if (r := w["engines"].get(OURS)) is None:
            continue
        fields = {part[0]: part[1:] for part in name.split("_")}
        times = f"{r['step_ms_p50']:,.0f} / {r['step_ms_p99']:,.0f} ms"
        over = [w["engines"].get(n, {}).get("ours_over_this") for n in peers]
        shape = ", ".join(fields[k] for k in "cspg")
        ratios = ["" if x is None else f"{x:.2f}x" for x in over]
        rows.append(row([shape, f"{r['tokens_per_second']:,.0f}", times, f"{r['peak_rss_mb']:,} MB", *ratios]))
    return "\n".join([*rows, "", _note(found)])


def plain(found: Mapping[str, Any]) -> str:
    """Decode, prefill and warm-prefix figures of the large model alone, per engine."""
    p = found["plain"]
    heads = ["decode_1 of the bandwidth around it", "of the best reading"]
    rows = [row(["large model alone", *(f"{k}, {u}" for k, u in p["units"].items()), *heads])]
    rows.append(row(["---", *["--:"] * (len(p["units"]) + len(heads))]))
    for engine, figures in p["engines"].items():
        around = p["bandwidth_fraction"].get(engine)
        best = figures["decode_1"] / p["bandwidth_limit_decode_1"] if "decode_1" in figures else None
        cells = [f"{figures[k]:,.1f}" if k in figures else "" for k in p["units"]]
        rows.append(row([NAMES[engine], *cells, *("" if x is None else f"{100 * x:.0f} %" for x in (around, best))]))
    return "\n".join(rows)


def targets(found: Mapping[str, Any]) -> str:
    """What was promised, what was measured, and whether that is reached."""
    rows = [row(["", "wanted", "measured", ""]), row(["---", "--:", "--:", "---"])]
    for t in found["targets"]:
        rows.append(row([t["what"], t["wanted"], f"{t['got']:g}", "reached" if t["reached"] else "**missed**"]))
    return "\n".join(rows)


def scaling(documents: Sequence[Mapping[str, Any]]) -> str:
    """One sentence per curve and pair."""
    lines = []
    for d in documents:
        lines.append(f"{d['pair']} pair, {d['dtype']}, {d['threads']} threads:")
        lines += ["", *(f"- {curve}: {text}" for curve, text in d["bounds"].items()), ""]
    return "\n".join(lines).rstrip()


def _note(found: Mapping[str, Any]) -> str:
    limits, host = found["ceiling"], found["provenance"]["host"]
    text = (
        f"{found['pair']} pair, {found['dtype']}, {found['threads']} threads of {host['cpu']}; medians of "
        f"{found['rounds']} interleaved rounds; ceilings of the same run: "
        f"{limits['bytes_per_second'] / 1e9:.1f} GB/s read, {limits['flops'] / 1e9:.0f} GFLOP/s."
    )
    if found.get("neighbours"):
        text += f" Busy processes beside every run: {found['neighbours']}."
    absent = "".join(f" {NAMES[name]}: {why}." for name, why in found["absent"].items())
    return text + (f" Absent:{absent}" if absent else "")
