"""Rows of the README's tables about speed, from the JSON documents of bench/."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any


def row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"


def times(x: float) -> str:
    """A ratio such as 2.4x, 17x or 1,143x."""
    return f"{x:,.0f}x" if x >= 10 else f"{x:.1f}x"


def kernels_cpu(documents: Sequence[Mapping[str, Any]]) -> str:
    """Per op and peer with a required ratio: the least and the median ratio over its cases, and how many reach it."""
    rows = []
    for d in documents:
        ratios: dict[str, list[tuple[float, float]]] = {}
        for case in d["cases"]:
            for peer, required in case.get("targets", {}).items():
                if peer in case["speedup"]:
                    ratios.setdefault(peer, []).append((case["speedup"][peer], required))
        for peer, found in ratios.items():
            reached = sum(ratio >= required for ratio, required in found)
            values = [ratio for ratio, _ in found]
            asked = " or ".join(dict.fromkeys(f"{required:g}x" for _, required in found))
            cells = [times(min(values)), times(statistics.median(values)), f"{reached} of {len(found)}"]
            rows.append([f"`{d['op']}`", peer, asked, *cells])
    heads = ["op", "against", "required", "least", "median", "cases that reach it"]
    first = documents[0]
    threads, loads = sorted({d["threads"] for d in documents}), [d["load_before"][0] for d in documents]
    note = (
        f"{first['provenance']['host']['cpu']}, {first['isa']}, {' or '.join(map(str, threads))} thread(s), medians of "
        f"interleaved rounds; load of the machine when an op's bench began: {min(loads):.1f} to {max(loads):.1f}."
    )
    return "\n".join([row(heads), row(["---", "---", "--:", "--:", "--:", "--:"]), *map(row, rows), "", note])


def trace(result: Mapping[str, Any]) -> str:
    """Where the time of an engine's iterations goes."""
    phases = dict(result["phases_ms"])
    total = phases.pop("total")
    phases["between the ranges"] = total - sum(phases.values())
    rows = [row([name, f"{ms:.0f}", f"{ms / total:.0%}"]) for name, ms in phases.items()]
    change = result["range_overhead"]["median"] - 1
    note = (
        f"{result['queries']} ledger questions on the nano pair, learned router, `regenerate`, one thread, "
        f"{result['iterations']:,} iterations, {total:.0f} ms (RORO_PROFILE=times). The ranges themselves, nobody "
        f"profiling: {change:+.1%} of a rollout's time (median of {len(result['seconds']['nvtx'])} interleaved pairs)."
    )
    return "\n".join([row(["range", "ms", "share"]), row(["---", "--:", "--:"]), *rows, "", note])
