"""The plain figures of an engine (decode, prefill, warm prefix) from the runs of `cells.plain_cells`."""

from __future__ import annotations

import statistics
from typing import Any

from bench.e2e.cells import BATCH, PREFILL, WARM_TOKENS
from bench.e2e.measure import Run
from bench.peers.catalogue import CATALOGUE, OURS
from roro_fast.models.config import DecoderConfig

HIGHER = ("decode_1", f"decode_{BATCH}")  # tokens per second; the others are milliseconds


def figures(runs: dict[str, dict[str, list[Run]]], name: str) -> dict[str, float]:
    """Decode rates are those after the first token: (n - 1) tokens over the time beyond a one-token answer's."""
    seconds = {cell: statistics.median(r.seconds for r in by[name]) for cell, by in runs.items() if by.get(name)}
    out: dict[str, float] = {}
    for n in (1, BATCH):
        if f"decode_{n}" in seconds:
            work = runs[f"decode_{n}"][name][-1].work
            after = seconds[f"decode_{n}"] - seconds[f"start_{n}"]
            if after > 0:  # else noise is all there is
                out[f"decode_{n}"] = (work.new_tokens - len(work.sequences)) / after
    for cell in ("prefill", "warm"):
        if cell in seconds:
            out[cell] = 1e3 * seconds[cell]
    return out


def bandwidth_fractions(runs: dict[str, dict[str, list[Run]]], weights: int, limit: float) -> dict[str, float]:
    """Per engine the median over decode_1's runs of tokens/s times `weights` bytes over the bandwidth around the run.

    `limit` bytes per second serve where none was measured around it.
    """
    out: dict[str, float] = {}
    for name, decodes in runs.get("decode_1", {}).items():
        if not runs.get("start_1", {}).get(name):
            continue
        start = statistics.median(r.seconds for r in runs["start_1"][name])
        out[name] = statistics.median(
            (r.work.new_tokens - 1) / max(r.seconds - start, 1e-9) * weights / (r.bandwidth or limit) for r in decodes
        )
    return out


def summary(
    runs: dict[str, dict[str, list[Run]]], config: DecoderConfig, itemsize: int, ceiling: dict[str, float]
) -> dict[str, Any]:
    """{"engines": figures per engine, "best_peer": per figure, "bandwidth_fraction": decode_1's share of reading the
    weights once per token at the bandwidth measured around each run, "bandwidth_around": its median}."""
    names = [name for name in CATALOGUE if any(name in by for by in runs.values())]
    engines = {name: {k: round(v, 3) for k, v in figures(runs, name).items()} for name in names}
    weights = config.num_params * itemsize
    limit = ceiling["bytes_per_second"]
    fractions = bandwidth_fractions(runs, weights, limit)
    around = [r.bandwidth or limit for by in runs.get("decode_1", {}).values() for r in by]
    return {
        "units": {
            "decode_1": "tokens/s",
            f"decode_{BATCH}": "tokens/s",
            "prefill": f"ms for {PREFILL} tokens",
            "warm": f"ms for {WARM_TOKENS} tokens after {PREFILL} cached ones",
        },
        "engines": engines,
        "best_peer": best_peers(engines),
        "bandwidth_limit_decode_1": round(limit / weights, 2),
        "bandwidth_around": statistics.median(around) if around else None,
        "bandwidth_fraction": {n: round(fractions[n], 4) for n in names if n in fractions},
    }


def best_peers(engines: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Per figure the peer that is best at it, its figure and ours."""
    best: dict[str, Any] = {}
    for figure in (*HIGHER, "prefill", "warm"):
        peers = {n: f[figure] for n, f in engines.items() if n != OURS and figure in f}
        if peers and figure in engines.get(OURS, {}):
            pick = max if figure in HIGHER else min
            who = pick(peers, key=lambda n: peers[n])
            mine = engines[OURS][figure]
            ratio = mine / peers[who] if figure in HIGHER else peers[who] / mine
            best[figure] = {"peer": who, "its": peers[who], "ours": mine, "ours_is_faster_by": round(ratio, 3)}
    return best
