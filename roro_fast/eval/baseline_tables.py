"""README table of the published baselines on one pair (bench/studies/baselines_study.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from roro_fast.eval import catalogue
from roro_fast.eval.bench_tables import row
from roro_fast.eval.catalogue import METRICS, NBSP, write

SHOWN = ("area", "area_total", "acc_at_60", "flops_at_98")
AGAINST = "confidence"


def baselines(study: Mapping[str, Any]) -> str:
    """Arms by falling area, each with its paired difference to the confidence threshold; null results read as such."""
    heads = ["router", *(f"{METRICS[m].label} {'↑' if METRICS[m].higher else '↓'}" for m in SHOWN)]
    lines = [row([*heads, "area − confidence"]), row(["---"] + ["--:"] * (len(SHOWN) + 1))]
    arms = {name: m for name, m in study["arms"].items() if m}
    null = []
    for name in sorted(arms, key=lambda n: -(arms[n]["area"]["mean"] or 0.0)):
        found, d = arms[name], study["differences"][AGAINST].get(name, {}).get("area")
        label = catalogue.arm(name).label
        cells = [cell(found[m], METRICS[m].unit) for m in SHOWN]
        lines.append(row([label, *cells, cell(d, "ratio", signed=True) if d else "–"]))
        if d and d["lo"] is not None and d["lo"] <= 0 <= d["hi"]:
            null.append(label)
    meta = study["meta"]
    ends = [
        f"{catalogue.arm(n).label} {write(study['points'][n][0]['accuracy']['mean'], 'share')} correct"
        for n in (meta["small"], meta["large"])
    ]
    note = (
        f"{meta['task']}, {meta['split']} split, {meta['n_queries']} queries, {len(meta['seeds'])} seeds; in brackets "
        f"{100 * meta['level']:.0f} % bootstrap intervals over queries and seeds; fitted on {meta['fitting']['train']} "
        f"train queries, thresholds set on {meta['fitting']['calibrate']} calibrate queries. Total FLOPs include the "
        f"scout, discarded drafts and what a process reward model that keeps its KV has to read. {'; '.join(ends)}."
    )
    if null:
        note += f" No difference to the confidence threshold is established for: {', '.join(null)}."
    return "\n".join([*lines, "", note])


def cell(x: Mapping[str, Any], unit: str, signed: bool = False) -> str:
    """mean [lo, hi] in the unit; "–" where undefined."""
    if x["mean"] is None:
        return "–"
    mean = write(x["mean"], unit, signed)
    if x["lo"] is None or x["hi"] is None:
        return mean
    lo, hi = (write(v, unit, signed).split(NBSP)[0] for v in (x["lo"], x["hi"]))
    return f"{mean} [{lo}, {hi}]"
