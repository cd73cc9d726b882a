"""Small building blocks of the report's inline SVG; every piece of text is escaped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

# dark enough for 4.5:1 on white, told apart by colour-blind readers together with the marker shapes
COLOURS = ("#0b5cad", "#b8400a", "#00735a", "#8a2f86", "#6b5200", "#0e6f88", "#a31f5c", "#4b5563", "#3f6212", "#5b3fc4")
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "plus", "wedge", "bar")
OUTLINES: dict[str, list[tuple[float, float]]] = {
    "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
    "triangle": [(0, -1.2), (1.1, 0.9), (-1.1, 0.9)],
    "wedge": [(0, 1.2), (1.1, -0.9), (-1.1, -0.9)],
    "diamond": [(0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)],
    "bar": [(-1.3, -0.5), (1.3, -0.5), (1.3, 0.5), (-1.3, 0.5)],
}


def ticks(lo: float, hi: float, about: int = 5) -> list[float]:
    """Round tick values inside [lo, hi]."""
    span = hi - lo
    if not span > 0:
        return [lo]
    raw = span / about
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if raw <= m * power * (1 + 1e-9))
    first = math.ceil(lo / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(hi / step + 1e-9) + 1)]


@dataclass(frozen=True, slots=True)
class Axes:
    """Maps data to pixels of one chart of `width` x `height`."""

    width: int
    height: int
    x: tuple[float, float]
    y: tuple[float, float]
    left: int = 52
    bottom: int = 44
    top: int = 12
    right: int = 14
    whole: bool = False  # x counts things: ticks at integers only

    def px(self, x: float) -> float:
        return self.left + (x - self.x[0]) / (self.x[1] - self.x[0]) * (self.width - self.left - self.right)

    def py(self, y: float) -> float:
        low = self.height - self.bottom
        return low - (y - self.y[0]) / (self.y[1] - self.y[0]) * (low - self.top)

    def frame(self, x_label: str, y_label: str, percent: tuple[bool, bool] = (False, False)) -> Markup:
        """Grid lines, tick labels and axis titles."""
        low, end = self.height - self.bottom, self.width - self.right
        out = []
        for v in ticks(*self.y, about=4 if self.height < 260 else 6):
            y = self.py(v)
            out.append(f'<line class="grid" x1="{self.left}" x2="{end}" y1="{y:.1f}" y2="{y:.1f}"/>')
            out.append(_text("tick", f'x="{self.left - 6}" y="{y + 4:.1f}" text-anchor="end"', _number(v, percent[1])))
        for v in ticks(*self.x, about=4 if self.width < 420 else 8):
            if self.whole and v % 1:
                continue
            at = f'x="{self.px(v):.1f}" y="{low + 17}" text-anchor="middle"'
            out.append(_text("tick", at, _number(v, percent[0])))
        out.append(f'<line class="axis" x1="{self.left}" x2="{end}" y1="{low}" y2="{low}"/>')
        out.append(
            _text("title", f'x="{(self.left + end) / 2:.0f}" y="{self.height - 8}" text-anchor="middle"', x_label)
        )
        turned = f'transform="translate(13 {(self.top + low) / 2:.0f}) rotate(-90)" text-anchor="middle"'
        out.append(_text("title", turned, y_label))
        return Markup("".join(out))

    def line(self, xs: Sequence[float], ys: Sequence[float], colour: str, dash: str = "", width: float = 2) -> Markup:
        """Polyline through the defined points."""
        d = " ".join(f"{self.px(x):.1f},{self.py(y):.1f}" for x, y in zip(xs, ys, strict=True) if math.isfinite(y))
        style = f' stroke-dasharray="{dash}"' if dash else ""
        return Markup(f'<polyline fill="none" stroke="{colour}" stroke-width="{width}"{style} points="{d}"/>')

    def band(self, xs: Sequence[float], lo: Sequence[float], hi: Sequence[float], colour: str) -> Markup:
        """Filled interval between two curves."""
        rows = [(x, a, b) for x, a, b in zip(xs, lo, hi, strict=True) if math.isfinite(a) and math.isfinite(b)]
        up = [f"{self.px(x):.1f},{self.py(b):.1f}" for x, _, b in rows]
        down = [f"{self.px(x):.1f},{self.py(a):.1f}" for x, a, _ in reversed(rows)]
        return Markup(f'<polygon class="band" fill="{colour}" points="{" ".join(up + down)}"/>')

    def point(self, x: float, y: float, shape: str, colour: str, tip: str) -> Markup:
        """A marker whose `tip` shows on hover and on keyboard focus."""
        cx, cy = self.px(x), self.py(y)
        body = marker(shape, cx, cy, colour)
        return Markup(f'<g class="pt" data-tip="{escape(tip)}">{body}</g>')


def marker(shape: str, x: float, y: float, colour: str, r: float = 4.5) -> Markup:
    """One of SHAPES centred at (x, y)."""
    if shape == "circle":
        return Markup(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}" fill="{colour}"/>')
    if shape in ("cross", "plus"):
        a, b = (r, 0.0) if shape == "plus" else (r * 0.8, r * 0.8)
        d = f"M{x - a:.1f},{y - b:.1f}L{x + a:.1f},{y + b:.1f}M{x - b:.1f},{y + a:.1f}L{x + b:.1f},{y - a:.1f}"
        return Markup(f'<path d="{d}" stroke="{colour}" stroke-width="2.5" fill="none"/>')
    points = " ".join(f"{x + r * a:.1f},{y + r * b:.1f}" for a, b in OUTLINES[shape])
    return Markup(f'<polygon points="{points}" fill="{colour}"/>')


def wrap(axes: Axes, body: Iterable[Markup], label: str, css: str = "chart") -> Markup:
    """The <svg> element around chart content; `label` is read out by screen readers."""
    inner = "".join(body)
    return Markup(
        f'<svg class="{css}" viewBox="0 0 {axes.width} {axes.height}" role="img" tabindex="0" '
        f'aria-label="{escape(label)}">{inner}</svg>'
    )


def padded(values: Iterable[float], share: float = 0.06) -> tuple[float, float]:
    """[lo, hi] around the defined values with some air; never empty."""
    known = [v for v in values if math.isfinite(v)] or [0.0, 1.0]
    lo, hi = min(known), max(known)
    air = (hi - lo) * share or max(abs(hi), 1.0) * 0.05
    return lo - air, hi + air


def _text(css: str, attributes: str, text: str) -> str:
    return f'<text class="{css}" {attributes}>{escape(text)}</text>'


def _number(v: float, percent: bool) -> str:
    if percent:
        return f"{100 * v:g}\u00a0%"
    return f"{v:.3g}".replace("-", "−")
