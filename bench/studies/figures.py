"""The studies' figures from their committed JSON, PNGs beside it: `python -m bench.studies.figures [NAME ...]`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from roro_fast.eval import catalogue
from roro_fast.eval.ablation_tables import BASE, LABELS
from roro_fast.eval.catalogue import AFTER
from roro_fast.eval.svg import COLOURS
from roro_fast.files import read_json

RESULTS = Path(__file__).parents[1] / "results"
MARKERS = "osD^vP*X<>hp"
MAIN = ("roro", "outcome_only", "confidence", "random", "oracle")
SMOL = ("roro", "outcome_only", "formula", "confidence", "r2r", "spec_reason", "steer_regenerate", "trim_agg", "random")


def frontier(at: Axes, study: Mapping[str, Any], arms: Sequence[str], axis: str = "generated") -> None:
    """Accuracy and its interval against the share of all-large's FLOPs; dotted: the coin toss between the two ends."""
    ends = [study["points"][study["meta"][k]][0] for k in ("small", "large")]
    line = [[p[v]["mean"] for p in ends] for v in (axis, "accuracy")]
    at.plot(*line, color="#1f2937", linestyle=":", marker="s", markersize=4, linewidth=1, label="all-small, all-large")
    for i, name in enumerate(a for a in arms if a in study["points"]):
        points = sorted(study["points"][name], key=lambda p: p[axis]["mean"])
        x, y = ([p[v]["mean"] for p in points] for v in (axis, "accuracy"))
        spread = [[abs(p["accuracy"][end] - p["accuracy"]["mean"]) for p in points] for end in ("lo", "hi")]
        at.errorbar(
            x, y, yerr=spread, color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)], markersize=3.5,
            linewidth=2 if name == BASE else 1, elinewidth=0.5, alpha=0.9, label=catalogue.arm(name).label,
        )  # fmt: skip
    at.set_xlabel(f"{axis} FLOPs, share of all-large")
    at.set_ylabel("accuracy")
    at.grid(alpha=0.3)


def learning(at: Axes, study: Mapping[str, Any]) -> None:
    """Area after so many steps of GRPO, of every arm that was measured before its training had ended."""
    last = study["meta"]["config"]["router"]["steps"]
    arms = sorted({n.partition(AFTER)[0] for n in study["arms"] if AFTER in n}, key=lambda a: (a != BASE, a))
    for i, arm in enumerate(arms):
        counts = sorted(int(n.partition(AFTER)[2]) for n in study["arms"] if n.startswith(f"{arm}{AFTER}"))
        areas = [study["arms"][f"{arm}{AFTER}{n}"]["area"] for n in counts] + [study["arms"][arm]["area"]]
        spread = [[abs(a[end] - a["mean"]) for a in areas] for end in ("lo", "hi")]
        x = [n + 0.12 * i for n in (*counts, last)]
        at.errorbar(
            x, [a["mean"] for a in areas], yerr=spread, color=COLOURS[i % len(COLOURS)], marker=MARKERS[i],
            markersize=3.5, linewidth=2 if arm == BASE else 1, elinewidth=0.7, label=catalogue.arm(arm).label,
        )  # fmt: skip
    at.set_xlabel("GRPO steps")
    at.set_ylabel("area")
    at.grid(alpha=0.3)


def differences(at: Axes, study: Mapping[str, Any], reference: str) -> None:
    """Difference in area of every variant to RoRo after the same number of steps."""
    suffix = reference.removeprefix(BASE)
    names = [n for n in reversed(LABELS) if f"{n}{suffix}" in study["differences"][reference]]
    found = [study["differences"][reference][f"{n}{suffix}"]["area"] for n in names]
    spread = [[abs(d[end] - d["mean"]) for d in found] for end in ("lo", "hi")]
    at.errorbar([d["mean"] for d in found], range(len(names)), xerr=spread, fmt="o", markersize=4, color=COLOURS[0])
    at.axvline(0, color="#1f2937", linewidth=0.8)
    at.set_yticks(range(len(names)), [LABELS[n] for n in names])
    at.set_xlabel(f"area − {catalogue.arm(reference).label}")
    at.grid(alpha=0.3)


def nano_study(figure: Figure, study: Mapping[str, Any]) -> None:
    left, right = figure.subplots(1, 2)
    frontier(left, study, MAIN)
    learning(right, study)
    left.legend(fontsize=7)
    right.legend(fontsize=7)


def baselines_nano(figure: Figure, study: Mapping[str, Any]) -> None:
    arms = [a for a in study["arms"] if catalogue.arm(a).kind != "anchor"]
    panels = figure.subplots(1, 2, sharey=True)
    for at, axis in zip(panels, ("generated", "total"), strict=True):
        frontier(at, study, arms, axis)
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=7, loc="outside right upper")


def smol_study(figure: Figure, document: Mapping[str, Any]) -> None:
    panels = figure.subplots(1, len(document["sets"]))
    for at, (name, study) in zip(panels, document["sets"].items(), strict=True):
        frontier(at, study, SMOL)
        at.set_title(name, fontsize=9)
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=7, loc="outside right upper")


def ablations_nano(figure: Figure, study: Mapping[str, Any]) -> None:
    early = min(int(n.partition(AFTER)[2]) for n in study["arms"] if n.startswith(f"{BASE}{AFTER}"))
    panels = figure.subplots(1, 2, sharey=True)
    for at, reference in zip(panels, (f"{BASE}{AFTER}{early}", BASE), strict=True):
        differences(at, study, reference)


FIGURES: dict[str, tuple[Callable[[Figure, Any], None], tuple[float, float]]] = {
    "nano_study": (nano_study, (9, 3.6)),
    "baselines_nano": (baselines_nano, (10.5, 4.2)),
    "smol_study": (smol_study, (12, 3.8)),
    "ablations_nano": (ablations_nano, (9, 3.8)),
}


def draw(name: str, results: Path = RESULTS) -> Path:
    """NAME.png from NAME.json, both in `results`."""
    make, size = FIGURES[name]
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    make(figure, read_json(results / f"{name}.json"))
    target = results / f"{name}.png"
    part = target.with_name(target.name + ".part")
    figure.savefig(part, dpi=110, format="png")
    part.replace(target)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(FIGURES)}; default: all that have a result")
    args = parser.parse_args()
    if unknown := sorted(set(args.names) - set(FIGURES)):
        parser.error(f"no figure of {', '.join(unknown)}; choose among {', '.join(FIGURES)}")
    for name in args.names or [n for n in FIGURES if (RESULTS / f"{n}.json").is_file()]:
        print(draw(name))


if __name__ == "__main__":
    main()
