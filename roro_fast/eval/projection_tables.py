"""README tables of the projection study (bench/studies/projection_study.py): null results read as such."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from roro_fast.eval.bench_tables import row


def maps(study: Mapping[str, Any]) -> str:
    """Held-out error of maps by direction, source layers per map and amount of text, against the default bound."""
    rows = []
    for direction in dict.fromkeys(f["direction"] for f in study["fits"]):
        own = study["kl_of_the_source_itself"][direction]
        for f in (f for f in study["fits"] if f["direction"] == direction):
            verdict = "passes" if f["kl_mean"] <= study["default_bound"] else "refused"
            cells = [f"{f['kl_mean']:.2f}", f"{f['kl_p99']:.1f}", f"{100 * f['top1']:.1f} %", verdict]
            rows.append([direction, str(f["sources"]), f"{f['texts']:,}", *cells])
        rows.append([direction, "–", "–", f"{own:.2f}", "–", "–", "the source writing itself"])
    heads = ["KV handed from", "source layers", "texts", "KL, mean", "KL, p99", "same top token", "gate"]
    note = (
        f"KL(exact || projected) of the next token in nats, on {study['fits'][0]['held_out_tokens']:,} tokens of "
        f"held-out answers; the gate's default bound is {study['default_bound']:g}."
    )
    return table(heads, rows, note)


def answers(study: Mapping[str, Any]) -> str:
    """Accuracy and work of routed answers with exact and with projected catch-up, the gate overruled."""
    rows = []
    exact: Mapping[str, Any] = {}
    for r in study["use"]:
        exact = r if r["catch_up"] == "exact" else exact
        share = f"{100 * r['total_flops'] / exact['total_flops']:.0f} %"
        same = f"{100 * r['same_answer']:.1f} %"
        name = r["catch_up"] if r["catch_up"] == "exact" else f"projected, {r['catch_up']}"
        right, tokens = f"{100 * r['accuracy']:.1f} %", f"{sum(r['projected_tokens']):.0f}"
        rows.append([r["policy"], name, right, same, share, tokens])
    heads = ["routing", "catch-up", "accuracy", "same answer", "FLOPs of all forwards", "tokens projected"]
    note = f"{study['queries']} test queries, greedy, means per answer; maps from 2 source layers and the most texts."
    return table(heads, rows, note)


def bound(study: Mapping[str, Any]) -> str:
    """Accuracy against KL, for the large model handed over to itself through ever noisier maps."""
    rows = [
        [f"{r['kl_mean']:.1e}", f"{r['kl_p99']:.1e}", f"{100 * r['top1']:.1f} %", f"{100 * r['accuracy']:.1f} %"]
        for r in study["harm_by_kl"]
    ]
    note = f"Half of all steps begin with a hand-over; {study['queries']} test queries."
    return table(["KL, mean", "KL, p99", "same top token", "accuracy"], rows, note)


def times(study: Mapping[str, Any]) -> str:
    """Time and FLOPs of one hand-over: the receiver's forward over the missing tokens, or the map."""
    rows = []
    for r in study["times"]:
        ratio = r["exact_us"] / r["projected_us"], r["exact_flops"] / r["projected_flops"]
        us = [f"{r[k]:,.0f} us" for k in ("exact_us", "projected_us")]
        what = f"{r['sequences']} x {r['missing']} tokens"
        rows.append([r["direction"], what, *us, f"{ratio[0]:.1f}x", f"{ratio[1]:.1f}x"])
    host = study["provenance"]["host"]
    heads = ["KV handed from", "missing", "exact", "projected", "faster", "fewer FLOPs"]
    return table(heads, rows, f"Medians of interleaved calls, fp32, one thread of {host['cpu']}.")


def smol(study: Mapping[str, Any]) -> str:
    """Maps between a real model and its own first layers: shared layers are exact, the others are not."""
    rows = []
    for r in study["rows"]:
        source, target = r["layers"]
        exact = sum(max(e) < 1e-6 for e in r["error"])
        kl = [f"{r[k]:.1e}" if r[k] < 0.01 else f"{r[k]:.2f}" for k in ("kl_mean", "kl_p99")]
        share = f"{100 * r['map_flops_per_token'] / r['forward_flops_per_token']:.1f} %"
        rows.append([f"{source} to {target}", f"{exact} of {target}", *kl, f"{100 * r['top1']:.1f} %", share])
    heads = ["layers", "exact layers", "KL, mean", "KL, p99", "same top token", "FLOPs of the map"]
    first = study["rows"][0]
    note = (
        f"SmolLM2-135M-Instruct and its own first layers; fitted on {study['texts']} worked solutions, measured on "
        f"{first['held_out_tokens']:,} tokens of others; FLOPs as a share of the receiver's forward."
    )
    return table(heads, rows, note)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], note: str) -> str:
    lines = [heads, ["---"] + ["--:"] * (len(heads) - 1), *rows]
    return "\n".join([*map(row, lines), "", note])
