"""The summary table of each stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from roro_fast.cli_ui import table
from roro_fast.engine.projection import KVProjection

Summary = Mapping[str, Any]


def percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def collect(summary: Summary) -> Table:
    arms = summary["arms"]
    large = arms.get("all_large", {})

    def share(arm: Summary, key: str) -> str:
        return percent(arm[key] / large[key]) if large.get(key) else number(arm, key, ".3g")

    def number(arm: Summary, key: str, form: str) -> str:
        return format(arm[key], form) if key in arm else "-"  # runs of older versions

    rows = [
        (name, a["trajectories"], percent(a["accuracy"]), share(a, "generated_flops"), share(a, "total_flops"),
         number(a, "seconds", ".2f"), number(a, "tokens", ".0f"), number(a, "discarded", ".1f"))
        for name, a in arms.items()
    ]  # fmt: skip
    finish = ", ".join(f"{k} {v}" for k, v in summary["finish"].items())
    if summary["skipped_rows"]:
        finish += f"; {len(summary['skipped_rows'])} malformed rows skipped, first: {summary['skipped_rows'][0]}"
    title = f"{summary['trajectories']} trajectories, {summary['tokens']:,} tokens (finished by {finish})"
    title += "; FLOPs of kept tokens and of all forwards" + " as shares of all-large" * bool(large)
    heads = ("arm", "n", "correct", "kept", "all", "s", "tokens", "discarded")
    return table(title, heads, rows)


def pairs(summary: Summary) -> Table:
    rows = [
        ("pairs", summary["pairs"]),
        *((f"decided by {rule}", n) for rule, n in sorted(summary["rules"].items())),
        ("held out", summary["heldout"]),
        ("queries", summary["queries"]),
        ("all arms correct", summary["agreed_correct"]),
        ("all arms wrong", summary["agreed_wrong"]),
    ]
    return table("preference pairs", ("", "count"), rows)


def rubric(summary: Summary) -> Table:
    def share(row: Summary, key: str) -> str:
        return "-" if row.get(key) is None else percent(row[key])

    keys = ("accuracy", "accuracy_outcome", "accuracy_cost", "accuracy_process", "heldout_malformed")
    rows = [(f"{r['round']} {r['phase']}", *(share(r, k) for k in keys)) for r in summary["history"]]
    title = f"Judge on held-out pairs; {summary['rubrics']} rubrics written, {summary['malformed']} malformed"
    return table(title, ("round", "pairs right", "by outcome", "by cost", "by process", "malformed"), rows)


def router(summary: Summary) -> Table:
    keys = ("outcome", "cost_share", "process", "large_share", "entropy")
    (arm,) = {k.partition(".")[0] for k in summary}
    rows = [(k.replace("_", " "), f"{summary[f'{arm}.{k}']:.3f}") for k in keys]
    return table(f"{arm} at its last training step", ("", "mean"), rows)


def evaluate(summary: Summary) -> Table:
    def write(estimate: Summary | None, scale: float, unit: str) -> str:
        if estimate is None or estimate["mean"] is None:
            return "-"
        mean, lo, hi = (estimate[k] for k in ("mean", "lo", "hi"))
        span = "" if lo is None or hi is None else f" [{scale * lo:.3g}, {scale * hi:.3g}]"
        return f"{scale * mean:.3g}{unit}{span}"

    rows = []
    for name, m in summary["arms"].items():
        rows.append(
            (
                name,
                write(m.get("area"), 1, ""),
                write(m.get("acc_at_60") or m.get("accuracy"), 100, "%"),
                write(m.get("flops_at_98"), 100, "%"),
            )
        )
    title = f"frontier on {summary['queries']} test queries, 95 % intervals (anchors: plain accuracy)"
    return table(title, ("arm", "area", "acc @ 60% FLOPs", "FLOPs @ 98% acc"), rows)


def projection(p: KVProjection) -> Table:
    g, settings = p.gate, p.fit["settings"]
    assert g is not None
    rows = [
        ("next-token KL, mean", f"{g.kl_mean:.4g} nats per token (allowed: {g.bound:g})"),
        ("next-token KL, 99th percentile", f"{g.kl_p99:.4g} nats per token"),
        ("same most likely token", percent(g.top1)),
        ("unexplained variance of keys", f"{sum(k for k, _ in p.fit['error']) / len(p.fit['error']):.3g}"),
        ("unexplained variance of values", f"{sum(v for _, v in p.fit['error']) / len(p.fit['error']):.3g}"),
        ("FLOPs per token", f"{p.maps.flops_per_token:,.0f}"),
    ]
    title = f"fitted on {p.fit['texts']} texts from {settings['sources']} source layers, gated on {g.tokens:,} tokens"
    return table(title, ("", "held out"), rows)


TABLES: dict[str, Callable[[Summary], Table]] = {
    "collect": collect,
    "pairs": pairs,
    "rubric": rubric,
    "router": router,
    "outcome_only": router,
    "evaluate": evaluate,
}


def show(console: Console, stage: str, summary: Summary) -> None:
    """Print the table of `stage` under its title, which is not folded to the table's width."""
    found = TABLES[stage](summary)
    title, found.title = found.title, None
    console.print(title, style="bold", highlight=False, markup=False, soft_wrap=True)
    console.print(found)
