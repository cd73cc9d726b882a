"""`report.html`: one self-contained page, no network, no external file; safe against any text a model wrote."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from dataclasses import replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from roro_fast.eval import catalogue, plots
from roro_fast.eval.catalogue import METRICS, POINT_VALUES, write
from roro_fast.eval.headline import HERO, headline, hero
from roro_fast.eval.metrics import EvalSummary
from roro_fast.eval.plain import to_plain
from roro_fast.eval.report_data import ReportData
from roro_fast.eval.viewer import ViewTrajectory
from roro_fast.files import write_text

MAX_TRAJECTORIES = 120


def write_report(path: str | Path, data: ReportData) -> Path:
    """Render `data` to `path` (atomically) and return it. A missing part is replaced by a sentence that says so."""
    path = Path(path)
    write_text(path, render(data))
    return path


def render(data: ReportData) -> str:
    """The page as a string."""
    e = _ordered(data.evaluation)
    arms = [(a.name, a.kind) for a in e.arms] if e else []
    known = {name for name, _ in arms}
    extra = {*(c.arm for c in data.curves), *(r.arm for r in data.judge)} - known
    style = plots.looks([*arms, *((name, catalogue.arm(name).kind) for name in sorted(extra))])
    shown = data.trajectories[:MAX_TRAJECTORIES]
    script = _asset("report.js")
    return _template().render(
        data=data,
        e=e,
        style=style,
        sentences=headline(e) if e else [],
        hero=hero(e) if e else None,
        frontiers=_frontiers(e, style) if e else [],
        metrics=METRICS,
        point_values=_measured(data),
        controls=_controls(e) if e else [],
        curves=plots.curves(data.curves, style),
        curve_arms=_labels({c.arm for c in data.curves}, e, style),
        judge_arms=_labels({r.arm for r in data.judge}, e, style),
        judge=plots.judge(data.judge, style) if data.judge else None,
        pair_rows=_pair_rows(data),
        viewer=_embed(_viewer(data, shown)) if shown else None,
        omitted=len(data.trajectories) - len(shown),
        css=Markup(_asset("report.css")),
        js=Markup(script),
        js_hash=_hash(script),
    )


def _ordered(e: EvalSummary | None) -> EvalSummary | None:
    """The arms in reading order: what was trained, what it has to beat, the bound, the controls, the two models."""
    if e is None:
        return None
    rank = {"trained": 0, "baseline": 1, "oracle": 2, "control": 3}
    arms = sorted(e.arms, key=lambda a: (rank.get(a.kind, 4), a.name != HERO))
    return replace(e, arms=arms)


def _measured(data: ReportData) -> dict[str, catalogue.Metric]:
    """The values that any operating point has: prices, for one, only a run with a price table."""
    points = [p.values for a in (data.evaluation.arms if data.evaluation else []) for p in a.points]
    return {k: m for k, m in POINT_VALUES.items() if k != "price" or any(k in v and v[k].mean >= 0 for v in points)}


def _frontiers(e: EvalSummary, style: dict[str, plots.Look]) -> list[tuple[str, Markup, Markup]]:
    if not any(a.bands for a in e.arms):
        return []
    return [
        (axis, plots.frontier(e, axis, style, 780, 440), plots.frontier(e, axis, style, 370, 380))
        for axis in ("generated", "total")
    ]


def _controls(e: EvalSummary) -> list[dict[str, Any]]:
    """Hero minus every other router, frontier area: one row of the forest plot each."""
    top = hero(e)
    if top is None:
        return []
    rows = [(a, e.difference(top.name, a.name, "area")) for a in e.arms if a.metrics and a is not top]
    found = [(a, d) for a, d in rows if d is not None]
    ends = [abs(v) for _, d in found for v in (d.mean, d.lo, d.hi) if math.isfinite(v)]
    reach = 1.1 * max(ends, default=1.0) or 1.0
    return [{"arm": a, "d": d, "plot": plots.whisker(d, reach)} for a, d in found]


def _labels(names: set[str], e: EvalSummary | None, style: dict[str, plots.Look]) -> dict[str, str]:
    """arm -> label of `names`, in the order of the legend."""
    known = {a.name: a.label for a in e.arms} if e else {}
    return {n: known.get(n, catalogue.arm(n).label) for n in style if n in names}


def _pair_rows(data: ReportData) -> list[tuple[str, int, float]]:
    rules = data.pairs.by_rule if data.pairs else {}
    total = sum(rules.values())
    return [(rule, n, n / total if total else 0.0) for rule, n in rules.items()]


def _viewer(data: ReportData, shown: list[ViewTrajectory]) -> dict[str, Any]:
    known = {a.name: a.label for a in data.evaluation.arms} if data.evaluation else {}
    labels = {t.arm: known.get(t.arm, catalogue.arm(t.arm).label) for t in shown}
    return {"models": data.models, "arms": labels, "trajectories": to_plain(shown)}


def _embed(value: Any) -> Markup:
    """JSON that is inert inside a <script> element, whatever strings it holds."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for ch in "<>&\u2028\u2029":
        text = text.replace(ch, f"\\u{ord(ch):04x}")
    return Markup(text)


@cache
def _template() -> Any:
    env = Environment(
        loader=PackageLoader("roro_fast.eval", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.globals.update(write=write, isfinite=math.isfinite)
    return env.get_template("report.html.jinja")


@cache
def _asset(name: str) -> str:
    return resources.files("roro_fast.eval").joinpath("templates", name).read_text(encoding="utf-8").strip()


def _hash(script: str) -> str:
    """The page's content security policy runs this script and no other."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
