"""The baselines' table: order, differences, and null results named."""

from __future__ import annotations

from typing import Any

from roro_fast.eval.baseline_tables import baselines, cell
from roro_fast.eval.tables import TABLES

NONE = {"mean": None, "lo": None, "hi": None}


def est(mean: float, spread: float = 0.01) -> dict[str, float]:
    return {"mean": mean, "lo": mean - spread, "hi": mean + spread}


def study() -> dict[str, Any]:
    def arm(area: float) -> dict[str, Any]:
        return {"area": est(area), "area_total": est(area / 2), "acc_at_60": est(0.9), "flops_at_98": NONE}

    arms = {"all_small": {}, "all_large": {}, "confidence": arm(0.8), "trim_thr": arm(0.805), "r2r": arm(0.9)}
    meta = {
        "task": "ledger",
        "split": "test",
        "n_queries": 150,
        "seeds": [0, 1, 2],
        "level": 0.95,
        "small": "all_small",
    }
    return {
        "arms": arms,
        "meta": meta | {"large": "all_large", "fitting": {"train": 200, "calibrate": 60}},
        "points": {"all_small": [{"accuracy": est(0.3)}], "all_large": [{"accuracy": est(1.0)}]},
        "differences": {"confidence": {"trim_thr": {"area": est(0.005)}, "r2r": {"area": est(0.1)}}},
    }


def test_arms_fall_by_area_and_null_results_are_named() -> None:
    lines = baselines(study()).split("\n")
    assert [line.split(" |")[0] for line in lines[2:5]] == [
        "| R2R-style, every token",
        "| TRIM-Thr",
        "| confidence threshold",
    ]
    assert "| 0.900 [0.890, 0.910] | 0.450 [0.440, 0.460] |" in lines[2] and "+0.100 [+0.090, +0.110]" in lines[2]
    assert lines[4].endswith("| – | – |"), "never reaches 98 %; no difference to itself"
    assert lines[-1].endswith("No difference to the confidence threshold is established for: TRIM-Thr.")
    assert "all-small 30.0" in lines[-1] and "200 train queries" in lines[-1]


def test_cells() -> None:
    assert cell(NONE, "ratio") == "–" and cell({"mean": 0.5, "lo": None, "hi": None}, "ratio") == "0.500"
    assert TABLES["baselines_nano"].render is baselines and TABLES["baselines_nano"].source == "baselines_nano.json"
