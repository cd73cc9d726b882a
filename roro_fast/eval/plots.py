"""The report's charts as inline SVG."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from roro_fast.eval import catalogue
from roro_fast.eval.bootstrap import Estimate
from roro_fast.eval.catalogue import write
from roro_fast.eval.metrics import ArmSummary, EvalSummary
from roro_fast.eval.report_data import Curve, JudgeRound
from roro_fast.eval.svg import COLOURS, SHAPES, Axes, marker, padded, wrap

ANCHOR_COLOUR = "#1f2937"
PANELS = {
    "outcome_reward": "Outcome reward",
    "process_reward": "Process reward",
    "cost": "Cost (share of all-large)",
    "entropy": "Policy entropy (nats)",
    "kl": "KL to the behaviour policy",
}


@dataclass(frozen=True, slots=True)
class Look:
    """How one arm is drawn everywhere on the page."""

    colour: str
    shape: str
    dash: str
    width: float
    hidden: bool

    @property
    def swatch(self) -> Markup:
        """Legend symbol."""
        line = f'<line x1="0" x2="26" y1="7" y2="7" stroke="{self.colour}" stroke-width="{self.width}"'
        dash = f' stroke-dasharray="{self.dash}"' if self.dash else ""
        return Markup(f'<svg class="swatch" viewBox="0 0 26 14" aria-hidden="true">{line}{dash}/>{self.mark}</svg>')

    @property
    def mark(self) -> Markup:
        return marker(self.shape, 13, 7, self.colour)


def looks(arms: Sequence[tuple[str, str]]) -> dict[str, Look]:
    """Look of each (name, kind), palette in the given order; anchors have none, controls are switched off at first."""
    out = {}
    for i, (name, kind) in enumerate(a for a in arms if a[1] != "anchor"):
        dash = {"baseline": "6 4", "oracle": "2 3", "control": "4 2 1 2"}.get(kind, "")
        out[name] = Look(
            COLOURS[i % len(COLOURS)], SHAPES[i % len(SHAPES)], dash, 3.0 if name == "roro" else 2.0, kind == "control"
        )
    return out


def frontier(e: EvalSummary, axis: str, style: dict[str, Look], width: int, height: int) -> Markup:
    """Accuracy against the share of all-large FLOPs; `axis` is "generated" or "total"."""
    routers = [a for a in e.arms if axis in a.bands]
    anchors = [a for a in e.arms if a.kind == "anchor"]
    points = [(a, p) for a in routers + anchors for p in a.points]
    shares = [p.values[axis].mean for _, p in points]
    heights = [v for a in routers for v in (*a.bands[axis].lo, *a.bands[axis].hi)]
    heights += [p.values["accuracy"].mean for _, p in points]
    low, high = padded(heights)
    edge = padded([*shares, 1.0], 0.03)
    axes = Axes(width, height, (max(0.0, edge[0]), edge[1]), (max(0.0, low), min(1.02, high)), left=60)
    name = "generated" if axis == "generated" else "total"
    body = [axes.frame(f"{name} FLOPs, share of all-large", "accuracy", (True, True)), _coin_toss(axes, anchors, axis)]
    ranked = sorted(routers, key=lambda a: a.name == "roro")
    body += [_group(axes, a, axis, style[a.name], "bands") for a in ranked]
    body += [_group(axes, a, axis, style[a.name], "marks") for a in ranked]
    body += [_anchor(axes, a, axis) for a in anchors]
    return wrap(axes, body, f"Accuracy against {name} FLOPs for {len(routers)} routers; arrow keys visit the points")


def _group(axes: Axes, a: ArmSummary, axis: str, look: Look, part: str) -> Markup:
    b = a.bands[axis]
    if part == "bands":
        inner = axes.band(b.x, b.lo, b.hi, look.colour)
    else:
        inner = axes.line(b.x, b.mean, look.colour, look.dash, look.width)
        for p in a.points:
            inner += axes.point(
                p.values[axis].mean, p.values["accuracy"].mean, look.shape, look.colour, _tip(a, p.knob, p.values, axis)
            )
    off = " off" if look.hidden else ""
    return Markup('<g class="arm{}" data-arm="{}">{}</g>').format(off, a.name, inner)


def _anchor(axes: Axes, a: ArmSummary, axis: str) -> Markup:
    v = a.points[0].values
    x, y = v[axis].mean, v["accuracy"].mean
    left = axes.px(x) > axes.width / 2
    place = {"x": f"{axes.px(x) + (-9 if left else 9):.1f}", "y": f"{axes.py(y) + (-9 if left else 16):.1f}"}
    text = Markup('<text class="label" x="{}" y="{}" text-anchor="{}">{}</text>').format(
        place["x"], place["y"], "end" if left else "start", a.label
    )
    return axes.point(x, y, "circle", ANCHOR_COLOUR, _tip(a, math.nan, v, axis)) + text


def _coin_toss(axes: Axes, anchors: Sequence[ArmSummary], axis: str) -> Markup:
    ends = sorted((a.points[0].values[axis].mean, a.points[0].values["accuracy"].mean) for a in anchors)
    return axes.line([x for x, _ in ends], [y for _, y in ends], "#9ca3af", "3 3", 1.5)


def _tip(a: ArmSummary, knob: float, v: dict[str, Estimate], axis: str) -> str:
    where = "" if math.isnan(knob) else f", setting {knob:g}"
    rows = [f"{a.label}{where}"]
    for key in ("accuracy", axis):
        m, x = catalogue.POINT_VALUES[key], v[key]
        span = f" ({write(x.lo, m.unit)} to {write(x.hi, m.unit)})" if math.isfinite(x.lo) else ""
        rows.append(f"{m.label} {write(x.mean, m.unit)}{span}")
    rows.append(f"{write(v['tokens'].mean, 'ratio')} tokens, {write(v['discarded'].mean, 'ratio')} discarded")
    return "\n".join(rows)


def curves(data: Sequence[Curve], style: dict[str, Look]) -> list[tuple[str, Markup]]:
    """(title, chart) per metric: one line per arm, the mean over seeds, with the spread of the seeds behind it."""
    by_metric: dict[str, dict[str, list[Curve]]] = defaultdict(lambda: defaultdict(list))
    for c in data:
        by_metric[c.metric][c.arm].append(c)
    order = [m for m in PANELS if m in by_metric] + sorted(set(by_metric) - set(PANELS))
    return [(PANELS.get(m, m), _panel(by_metric[m], style, PANELS.get(m, m))) for m in order]


def _panel(arms: dict[str, list[Curve]], style: dict[str, Look], title: str) -> Markup:
    rows = {arm: _over_seeds(cs) for arm, cs in arms.items()}
    xs = [x for steps, *_ in rows.values() for x in steps]
    ys = [y for _, _, lo, hi in rows.values() for y in (*lo, *hi)]
    axes = Axes(330, 210, padded(xs, 0.01), padded(ys), left=50, bottom=38)
    body = [axes.frame("optimiser step", "")]
    for arm, (steps, mean, lo, hi) in rows.items():
        look = style[arm]
        inner = axes.band(steps, lo, hi, look.colour) + axes.line(steps, mean, look.colour, look.dash, 2)
        last = next((i for i in reversed(range(len(mean))) if math.isfinite(mean[i])), None)
        if last is not None:
            tip = f"{catalogue.arm(arm).label}: {mean[last]:.3f} at step {steps[last]:g}"
            inner += axes.point(steps[last], mean[last], look.shape, look.colour, tip)
        body.append(Markup('<g class="arm{}" data-arm="{}">{}</g>').format(" off" if look.hidden else "", arm, inner))
    return wrap(axes, body, title)


def _over_seeds(cs: Sequence[Curve]) -> tuple[list[float], list[float], list[float], list[float]]:
    at: dict[float, list[float]] = defaultdict(list)
    for c in cs:
        for s, v in zip(c.steps, c.values, strict=True):
            if math.isfinite(v):
                at[s].append(v)
    steps = sorted(at)
    mean = [sum(at[s]) / len(at[s]) for s in steps]
    return steps, mean, [min(at[s]) for s in steps], [max(at[s]) for s in steps]


def judge(rounds: Sequence[JudgeRound], style: dict[str, Look]) -> Markup:
    """Held-out pair accuracy per round with binomial 95 % bars; the dashed line is a coin toss."""
    last = max(r.round for r in rounds)
    ends = [(r, *wilson(r.accuracy, r.n_pairs)) for r in rounds]
    axes = Axes(460, 260, (-0.4, last + 0.4), padded([0.5, *(v for _, lo, hi in ends for v in (lo, hi))]), whole=True)
    body = [axes.frame("alternation round (0: after warm-up)", "held-out pair accuracy", (False, True))]
    body.append(axes.line(list(axes.x), [0.5, 0.5], "#6b7280", "3 3", 1.5))
    names = list(dict.fromkeys((r.arm, r.seed) for r in rounds))
    for i, (arm, seed) in enumerate(names):
        look = style[arm]
        shift = (i - (len(names) - 1) / 2) * min(0.08, 0.6 / len(names))
        mine = sorted((e for e in ends if (e[0].arm, e[0].seed) == (arm, seed)), key=lambda e: e[0].round)
        inner = axes.line([r.round + shift for r, *_ in mine], [r.accuracy for r, *_ in mine], look.colour, "", 1.5)
        for r, lo, hi in mine:
            x = r.round + shift
            inner += axes.line([x, x], [lo, hi], look.colour, "", 1.5)
            tip = f"{catalogue.arm(arm).label}, seed {seed}, round {r.round}"
            tip += f"\n{write(r.accuracy, 'share')} of {r.n_pairs} pairs"
            inner += axes.point(x, r.accuracy, look.shape, look.colour, tip)
        body.append(Markup('<g class="arm" data-arm="{}">{}</g>').format(arm, inner))
    return wrap(axes, body, "Judge accuracy on held-out preference pairs per alternation round")


def wilson(p: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson interval of a proportion; [0, 1] for an empty sample."""
    if n <= 0 or not math.isfinite(p):
        return 0.0, 1.0
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def whisker(x: Estimate, reach: float) -> Markup:
    """A row of a forest plot: the difference with its interval on [-reach, reach], zero in the middle."""
    width, height = 220, 22
    at = lambda v: width / 2 + max(-1.0, min(1.0, v / reach)) * (width / 2 - 8)  # noqa: E731
    body = Markup(f'<line class="axis" x1="{width / 2}" x2="{width / 2}" y1="0" y2="{height}"/>')
    if math.isfinite(x.lo) and math.isfinite(x.hi):
        ends = f'x1="{at(x.lo):.1f}" x2="{at(x.hi):.1f}" y1="11" y2="11"'
        body += Markup(f'<line {ends} stroke="{COLOURS[0]}" stroke-width="2.5"/>')
    if math.isfinite(x.mean):
        body += marker("circle", at(x.mean), 11, COLOURS[0])
    return Markup(f'<svg class="whisker" viewBox="0 0 {width} {height}" aria-hidden="true">{body}</svg>')
