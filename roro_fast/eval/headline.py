"""The report's first sentences: what the trained router bought, in plain words, with its uncertainty."""

from __future__ import annotations

import math

from roro_fast.eval.bootstrap import Estimate
from roro_fast.eval.catalogue import KEEP, METRICS, NBSP, write
from roro_fast.eval.metrics import ArmSummary, EvalSummary

HERO = "roro"


def hero(e: EvalSummary) -> ArmSummary | None:
    """The arm the page is about: RoRo, else the first trained arm, else the best baseline by area."""
    routers = [a for a in e.arms if a.metrics]
    for pick in (
        [a for a in routers if a.name == HERO],
        [a for a in routers if a.kind == "trained"],
        sorted((a for a in routers if a.kind == "baseline"), key=lambda a: -_known(a.metrics["area"].mean)),
    ):
        if pick:
            return pick[0]
    return None


def headline(e: EvalSummary) -> list[str]:
    """Plain sentences, most important first; a null result reads as one."""
    a, large, small = hero(e), e.arm(e.large), e.arm(e.small)
    if a is None or large is None or small is None:
        return ["No router was evaluated: this page shows the two models alone."]
    top, base = (x.points[0].values["accuracy"].mean for x in (large, small))
    out = [_bought(a, e.level), _in_total(a, e.level)]
    out.append(f"The large model alone answers {write(top, 'share')} correctly, the small one {write(base, 'share')}.")
    rival = _best_rival(e, a)
    if rival is not None:
        d = e.difference(a.name, rival.name, "area")
        out.append(_against(a, rival, d, e.level) + _needs(a, rival))
    outcome = e.arm("outcome_only")
    if outcome is not None and outcome is not a and outcome is not rival:
        out.append(_against(a, outcome, e.difference(a.name, outcome.name, "area"), e.level))
    if a.kind != "trained":
        out.append("No trained router was evaluated; this is the best of the baselines.")
    return [s[0].upper() + s[1:] for s in out]


def _bought(a: ArmSummary, level: float) -> str:
    need = a.metrics["flops_at_98"]
    if not math.isfinite(need.mean):
        return f"{a.label} never reaches {100 * KEEP:.0f}{NBSP}% of the large model's accuracy."
    saved = Estimate(1 - need.mean, 1 - need.hi, 1 - need.lo)
    return (
        f"{a.label} keeps {100 * KEEP:.0f}{NBSP}% of the large model's accuracy and saves {write(saved.mean, 'share')} "
        f"of its FLOPs{_span(saved, 'share', level)}."
    )


def _in_total(a: ArmSummary, level: float) -> str:
    need = a.metrics["flops_at_98_total"]
    what = "Counting every forward pass (prefill, catch-up, discarded drafts)"
    if not math.isfinite(need.mean):
        return f"{what}, it never gets there."
    saved = Estimate(1 - need.mean, 1 - need.hi, 1 - need.lo)
    return f"{what}, it saves {write(saved.mean, 'share')}{_span(saved, 'share', level)}."


def _needs(a: ArmSummary, rival: ArmSummary) -> str:
    x, y = a.metrics["flops_at_98"].mean, rival.metrics["flops_at_98"].mean
    if not (math.isfinite(x) and math.isfinite(y)):
        return ""
    level = f"{100 * KEEP:.0f}{NBSP}% of the accuracy"
    return f" For {level} {a.label} needs {write(x, 'share')} of the FLOPs, {rival.label} {write(y, 'share')}."


def _against(a: ArmSummary, b: ArmSummary, d: Estimate | None, level: float) -> str:
    if d is None:
        return f"No paired comparison with {b.label} was made."
    span = f"{write(d.mean, METRICS['area'].unit, signed=True)}{_span(d, METRICS['area'].unit, level, signed=True)}"
    if not (math.isfinite(d.lo) and math.isfinite(d.hi)):
        return f"Against {b.label} the frontier area differs by {span}; too few replicates are defined for an interval."
    if d.lo > 0:
        return f"It is better than {b.label}: frontier area {span}."
    if d.hi < 0:
        return f"It is worse than {b.label}: frontier area {span}."
    return f"Against {b.label} no difference is established: frontier area {span}."


def _best_rival(e: EvalSummary, a: ArmSummary) -> ArmSummary | None:
    rivals = [r for r in e.arms if r.metrics and r.kind == "baseline" and r is not a]
    return max(rivals, key=lambda r: _known(r.metrics["area"].mean), default=None)


def _span(x: Estimate, unit: str, level: float, signed: bool = False) -> str:
    if not (math.isfinite(x.lo) and math.isfinite(x.hi)):
        return ""
    return f" ({100 * level:.0f}{NBSP}% interval {write(x.lo, unit, signed)} to {write(x.hi, unit, signed)})"


def _known(v: float) -> float:
    return v if math.isfinite(v) else -math.inf
