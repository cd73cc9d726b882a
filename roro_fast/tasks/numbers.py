"""Plain numbers as people and models write them: signs, thousands separators, currency, units, simple LaTeX."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.[0-9]+)?|\.[0-9]+)"
# a minus counts as a sign only where it cannot be a subtraction or a list bullet
NUMBER = re.compile(rf"(?:(?<![\w.)\]}}])[-+\u2212])?(?:\\?\$-?)?{_DECIMAL}(?:/[0-9]+)?(?:\\?%)?")

ROUNDING = 6  # decimals, as math-verify compares floats
_MAX_CHARS = 400  # keeps integer parsing linear in practice and far below Python's digit limit
_SPACING = re.compile(r"\\[;: ]|\\q?quad|\\left|\\right|~|\u00a0")
_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mbox|mathbf)\{([^{}]*)\}")
_FRACTION = re.compile(r"([-+]?)\\frac\{([^{}]+)\}\{([^{}]+)\}")
_PLAIN = re.compile(rf"[-+]?{_DECIMAL}\.?")
_UNIT = re.compile(r"([^A-Za-z^]*?)\s*(\\?%|\^?\{?\\circ\}?|\u00b0|\s[A-Za-z][A-Za-z. ]+(?:\^\{?[0-9]\}?)?)")
_NOT_UNITS = re.compile(
    r"hundred|thousand|illion|dozen|percent|squared|cubed|\b(?:pi|tau|or|and|mod|base)\b", re.IGNORECASE
)


class Quantity(NamedTuple):
    """An exact number with the unit that was written behind it ("" when none)."""

    value: Fraction
    unit: str


def plain(text: str) -> str:
    """`text` without math delimiters, LaTeX spacing, currency signs, emphasis and a closing full stop."""
    text = text.replace("\\$", "").replace("$", "").replace("\u2212", "-")
    text = text.replace("{,}", ",").replace("\\!", "").replace("\\,", "")
    text = _SPACING.sub(" ", text).replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    text = text.strip(" \t\n*`")
    for left, right in (("\\(", "\\)"), ("\\[", "\\]")):
        if text.startswith(left) and text.endswith(right):
            text = text[2:-2]
    text = text.strip().removesuffix(".").strip()
    inner = _TEXT.fullmatch(text)
    return inner.group(1).strip() if inner else text


def same_text(a: str, b: str) -> bool:
    """Equality of `plain` texts up to white space; up to case too when they are words."""
    a, b = "".join(a.split()), "".join(b.split())
    return a == b or (len(a) > 2 and a.isalpha() and a.casefold() == b.casefold())


def parse_quantity(text: str) -> Quantity | None:
    """The number a `plain` text consists of, or None: "-1,200.50", "3/4", r"\\frac{3}{4}", "50%", "18 dollars"."""
    if len(text) > _MAX_CHARS:
        return None
    text = _TEXT.sub(r" \1", text).strip()
    value = _parse(text)
    if value is not None:
        return Quantity(value, "")
    split = _UNIT.fullmatch(text)
    if split is None or _NOT_UNITS.search(split.group(2)):
        return None
    value = _parse(split.group(1))
    return None if value is None else Quantity(value, split.group(2).strip("\\^{} .").lower())


def comparable(a: Quantity, b: Quantity) -> bool:
    """Whether comparing the values settles it: equal units, or one side has none and the other is no percentage."""
    return a.unit == b.unit or (not (a.unit and b.unit) and "%" not in (a.unit, b.unit))


def same_value(a: Fraction, b: Fraction) -> bool:
    """Exact for integers; other numbers agree when they round to the same six decimals."""
    if a == b:
        return True
    return not (a.denominator == b.denominator == 1) and round(a, ROUNDING) == round(b, ROUNDING)


def _parse(text: str) -> Fraction | None:
    fraction = _FRACTION.fullmatch(text)
    if fraction:
        sign, top, bottom = fraction.groups()
        top = sign + top if not top.startswith(("-", "+")) or not sign else ""
    else:
        top, _, bottom = text.partition("/")
    parts = [p.strip() for p in (top, bottom or "1")]
    if not all(_PLAIN.fullmatch(p) for p in parts):
        return None
    numerator, denominator = (Fraction(p.replace(",", "").removesuffix(".")) for p in parts)
    return numerator / denominator if denominator else None
