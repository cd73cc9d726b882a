"""The studies' figures: every committed result draws, and what is drawn is the study's own numbers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from roro_fast.files import read_json

pytest.importorskip("matplotlib", reason="the bench extra is not installed")
from bench.studies import figures  # noqa: E402


@pytest.mark.parametrize("name", figures.FIGURES)
def test_every_committed_study_draws(tmp_path: Path, name: str) -> None:
    result = figures.RESULTS / f"{name}.json"
    if not result.is_file():
        pytest.skip(f"{name} is not measured yet")
    shutil.copy(result, tmp_path)
    assert figures.draw(name, tmp_path).read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{name}.json", f"{name}.png"]


def lines(draw: Any, *args: Any) -> dict[str, tuple[list[float], list[float]]]:
    figure = figures.Figure()
    at = figure.subplots()
    draw(at, *args)
    handles, labels = at.get_legend_handles_labels()
    data = [getattr(h, "lines", [h])[0] for h in handles]
    return {label: (list(d.get_xdata()), list(d.get_ydata())) for label, d in zip(labels, data, strict=True)}


def test_a_frontier_and_a_learning_curve_are_the_study_s_numbers() -> None:
    study = read_json(figures.RESULTS / "nano_study.json")
    drawn = lines(figures.frontier, study, figures.MAIN)
    x, y = drawn["RoRo"]
    want = sorted((p["generated"]["mean"], p["accuracy"]["mean"]) for p in study["points"]["roro"])
    assert list(zip(x, y, strict=True)) == want and len(drawn) == 1 + len(figures.MAIN)
    _, areas = lines(figures.learning, study)["outcome-only GRPO"]
    assert areas[-1] == study["arms"]["outcome_only"]["area"]["mean"] and len(areas) == 4
