"""The README's table of the smol pair, from what `eval.check_smol` measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

ARMS = ("small", "random", "large")
NAMES = {"+": "sums", "-": "differences", "*": "products", "answer": "the answer line", "other": "anything else"}


def pair(found: Mapping[str, Any]) -> str:
    """Accuracy by family and writer, and how often either model's steps are wrong, by what the step does."""
    lines = ["| questions | n | small | coin per step | large |", "| --- | --: | --: | --: | --: |"]
    for name, arms in found["mixtures"].items():
        for family, measured in arms["large"]["families"].items():
            cells = [_percent(arms[a]["families"][family]["accuracy"]) for a in ARMS]
            label = family.removeprefix("gym:")
            label = label if label == name.removeprefix("gym:") else f"{name}: {label}"
            lines.append(f"| {label} | {measured['n']} | {' | '.join(cells)} |")
    lines += _steps([arms for arms in found["mixtures"].values() if "step_errors" in arms["large"]])
    (a, b), (p, q) = found["layers"], found["parameters"]
    lines += [
        "",
        f"{found['split'].capitalize()} split, greedy, {found['dtype']}; {a} of {b} layers, {p / 1e6:.0f} and "
        f"{q / 1e6:.0f} million parameters.",
    ]
    return "\n".join(lines)


def _steps(verified: Sequence[Mapping[str, Any]]) -> list[str]:
    """How often the steps of the first of these mixtures are wrong; nothing where there is none."""
    if not verified:
        return []
    kinds = [k for k in NAMES if k in verified[0]["large"]["step_errors"]]
    lines = ["", f"| wrong steps | {' | '.join(NAMES[k] for k in kinds)} |", f"| --- {'| --: ' * len(kinds)}|"]
    for arm in ("small", "large"):
        errors = verified[0][arm]["step_errors"]
        lines.append(f"| {arm} | {' | '.join(_percent(errors[k]['rate']) if k in errors else '–' for k in kinds)} |")
    return lines


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
