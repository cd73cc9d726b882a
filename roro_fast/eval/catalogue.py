"""What the metrics and arms are called, which way is better, and how a number is written."""

from __future__ import annotations

import math
from dataclasses import dataclass

TARGET_SHARE = 0.60
KEEP = 0.98
AFTER = "@"  # "roro@5" is the arm "roro" after 5 steps of training
NBSP = "\u00a0"


@dataclass(frozen=True, slots=True)
class Metric:
    """`unit`: "share" is written as per cent, "points" as percentage points, "ratio" as a plain number."""

    name: str
    label: str
    unit: str
    higher: bool
    help: str


_GENERATED = "generated FLOPs of all-large"
_TOTAL = "total FLOPs of all-large (prefill, catch-up, scout, discarded drafts and attention included)"

METRICS: dict[str, Metric] = {
    m.name: m
    for m in (
        Metric("area", "Area", "ratio", True, "Share of the accuracy gap between small and large that is recovered, "
               f"mean over all budgets up to the {_GENERATED}; a coin toss between the two models gives 0.5."),
        Metric("acc_at_60", "Acc@60 %", "share", True, f"Accuracy at 60 % of the {_GENERATED}."),
        Metric("flops_at_98", "FLOPs@98 %", "share", False,
               f"Share of the {_GENERATED} needed for 98 % of its accuracy."),
        Metric("a_per_f", "A/F", "ratio", True, "Accuracy at the 60 % budget divided by that share of FLOPs."),
        Metric("cpt50", "CPT50", "share", False,
               "Large-model tokens, as a share of what all-large writes, that recover 50 % of the accuracy gap."),
        Metric("cpt80", "CPT80", "share", False, "The same for 80 % of the gap."),
        Metric("cpt95", "CPT95", "share", False, "The same for 95 % of the gap."),
        Metric("pgr", "PGR", "share", True, "Performance gap recovered at the 60 % budget."),
        Metric("dibc", "ΔIBC", "share", True, "Incremental benefit per cost at the 60 % budget, relative to the "
               "straight line from all-small to all-large (AutoMix, arXiv 2310.12963)."),
        Metric("area_total", "Area (total)", "ratio", True, f"As Area, over the {_TOTAL}."),
        Metric("acc_at_60_total", "Acc@60 % (total)", "share", True, "Accuracy at 60 % of all-large's total FLOPs."),
        Metric("flops_at_98_total", "FLOPs@98 % (total)", "share", False,
               "Share of the total FLOPs of all-large needed for 98 % of its accuracy."),
    )
}  # fmt: skip

POINT_VALUES: dict[str, Metric] = {
    m.name: m
    for m in (
        Metric("accuracy", "Accuracy", "share", True, "Share of answers that are correct."),
        Metric("generated", "FLOPs, generated", "share", False, "2N per kept token, as a share of all-large."),
        Metric("total", "FLOPs, total", "share", False, "Every forward pass, as a share of all-large."),
        Metric("large_share", "Large tokens", "share", False, "Tokens by larger models over all tokens of all-large."),
        Metric("a_per_f", "A/F", "ratio", True, "Accuracy divided by the share of generated FLOPs."),
        Metric("pgr", "PGR", "share", True, "Share of the small-to-large accuracy gap recovered."),
        Metric("dibc", "ΔIBC", "share", True, "Slope from all-small to this point over that to all-large, minus 1."),
        Metric("seconds", "Seconds / query", "ratio", False, "Wall clock from admission to finish."),
        Metric("tokens", "Tokens / query", "ratio", False, "Tokens generated, discarded ones included."),
        Metric("discarded", "Discarded / query", "ratio", False, "Tokens drafted and thrown away."),
        Metric("price", "Price / 1000 queries", "ratio", False,
               "By models.prices, in its currency: tokens generated, discarded ones included, and tokens read."),
        Metric("decision_us", "µs / decision", "ratio", False, "Time spent on routing alone, per decision."),
    )
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Arm:
    """`kind`: "anchor", "baseline", "trained", "control" or "oracle"; an anchor has no frontier of its own."""

    name: str
    label: str
    kind: str


ARMS: dict[str, Arm] = {
    a.name: a
    for a in (
        Arm("all_small", "all-small", "anchor"),
        Arm("all_large", "all-large", "anchor"),
        Arm("random", "random(p)", "baseline"),
        Arm("confidence", "confidence threshold", "baseline"),
        Arm("trim_thr", "TRIM-Thr", "baseline"),
        Arm("trim_agg", "TRIM-Agg", "baseline"),
        Arm("trim_pomdp", "TRIM-POMDP", "baseline"),
        Arm("policy_guided", "policy-guided", "baseline"),
        Arm("policy_guided_regenerate", "policy-guided (regenerate)", "baseline"),
        Arm("steer", "STEER", "baseline"),
        Arm("steer_regenerate", "STEER (regenerate)", "baseline"),
        Arm("glimp_router", "GlimpRouter", "baseline"),
        Arm("glimp_router_regenerate", "GlimpRouter (regenerate)", "baseline"),
        Arm("spec_reason", "SpecReason", "baseline"),
        Arm("rsd", "RSD", "baseline"),
        Arm("speculative_thinking", "Speculative Thinking", "baseline"),
        Arm("r2r", "R2R-style, every token", "baseline"),
        Arm("oracle", "oracle", "oracle"),
        Arm("oracle_next", "oracle (next)", "oracle"),
        Arm("oracle_query", "oracle (whole answers)", "oracle"),
        Arm("outcome_only", "outcome-only GRPO", "trained"),
        Arm("roro", "RoRo", "trained"),
        Arm("fixed_rubric", "fixed rubric", "control"),
        Arm("random_rubric", "random rubric", "control"),
        Arm("shuffled", "shuffled Judge scores", "control"),
        Arm("formula", "quality formula, no LM", "control"),
        Arm("rubricor_first", "Rubricor first", "control"),
    )
}


def arm(name: str) -> Arm:
    """The catalogue entry of an arm; an unknown name is a baseline under its own name."""
    base, _, steps = name.partition(AFTER)
    if steps and base in ARMS:
        return Arm(name, f"{ARMS[base].label} after {steps} steps", ARMS[base].kind)
    return ARMS.get(name, Arm(name, name, "baseline"))


def write(value: float, unit: str, signed: bool = False) -> str:
    """A number in its unit ("–" when undefined); `signed` writes a difference, shares then in points."""
    if not math.isfinite(value):
        return "–"
    sign = "+" if signed else ""
    if unit == "share":
        text = f"{100 * value:{sign}.1f}" + (f"{NBSP}pt" if signed else f"{NBSP}%")
    else:
        size = abs(value)
        digits = 3 if size < 10 else 1 if size < 100 else 0
        text = f"{value:{sign}.{digits}f}" if size >= 0.001 or value == 0 or signed else f"{value:.1e}"
    return text.replace("-", "−") if value < 0 else text
