"""The smol study's tables: order and kinds of arms, test sets side by side, null results and missing arms named."""

from __future__ import annotations

from typing import Any

from roro_fast.eval.smol_study_tables import arms, judge, rubric
from roro_fast.eval.tables import TABLES

NONE = {"mean": None, "lo": None, "hi": None}


def est(mean: float, spread: float = 0.01) -> dict[str, float]:
    return {"mean": mean, "lo": mean - spread, "hi": mean + spread}


def one(names: dict[str, float], small: float, large: float) -> dict[str, Any]:
    def arm(area: float) -> dict[str, Any]:
        return {"area": est(area), "area_total": est(area / 2), "flops_at_98": NONE}

    points = {n: [{"accuracy": est(0.7), "total": est(1.2)}, {"accuracy": est(0.6), "total": est(0.9)}] for n in names}
    ends = {"all_small": [{"accuracy": est(small), "total": est(0.6)}]}
    ends["all_large"] = [{"accuracy": est(large), "total": est(1.0)}]
    outcome = {n: {"area": est(a - names["outcome_only"])} for n, a in names.items() if n != "outcome_only"}
    return {
        "meta": {"n_queries": 40, "level": 0.95, "small": "all_small", "large": "all_large"},
        "arms": {"all_small": {}, "all_large": {}} | {n: arm(a) for n, a in names.items()},
        "points": points | ends,
        "differences": {"outcome_only": outcome, "formula": {"roro": {"area": est(-0.05)}}},
    }


def document() -> dict[str, Any]:
    names = {"confidence": 0.8, "roro": 0.705, "outcome_only": 0.7, "formula": 0.75, "oracle": 0.9}
    away = {n: a for n, a in names.items() if n != "oracle"}
    phase = {"heldout_pairs": 30, "accuracy": 0.6, "accuracy_outcome": None, "reading": 0.97, "heldout_malformed": 0.0}
    history = [{"round": 0, "phase": "warm-up", **phase}, {"round": 1, "phase": "judge", **phase, "heldout_pairs": 50}]
    reader = [{"step": 40, "cpu_s": 120.0, "verdict_accuracy": {"all": 0.91, "switches": 0.8}}]
    meta = {"seeds": [0, 1], "missing": ["r2r"], "judge": {"seed-0": {"history": history}}, "reader": reader}
    return {"meta": meta, "sets": {"arithmetic": one(names, 0.58, 0.91), "sums": one(away, 0.3, 0.8)}}


def test_arms_by_kind_then_area_with_every_test_set() -> None:
    lines = arms(document()).split("\n")
    names = [line.split(" | ")[0].removeprefix("| ") for line in lines[2:7]]
    assert names == ["**RoRo**", "outcome-only GRPO", "quality formula, no LM", "confidence threshold", "oracle"]
    assert lines[0].endswith("| sums ↑ |") and "+0.005 [−0.005, +0.015]" in lines[2]
    assert lines[6].endswith("| – |"), "no oracle where steps are not verified"
    assert "4 of 8 operating points are cheaper than all-large, the best of them with 60.0" in lines[-1], "no oracles"
    assert "No difference to outcome-only GRPO is established for: RoRo." in lines[-1]
    assert "2 seeds" in lines[-1] and lines[-1].endswith("Not measured yet: R2R-style, every token.")


def test_differences_read_both_ways_and_null_results_are_counted() -> None:
    text = rubric(document())
    rows = {line.split(" | ")[0]: line for line in text.split("\n")}
    assert "−0.050 [−0.060, −0.040]" in rows["| RoRo − quality formula, no LM"]
    assert "+0.050 [+0.040, +0.060]" in rows["| quality formula, no LM − outcome-only GRPO"]
    assert rows["| RoRo − shuffled Judge scores"].endswith("| – | – |")
    assert "Of these 6 differences 2 are not significant" in text
    turned = document()
    for study in turned["sets"].values():
        study["differences"] = {"roro": {"outcome_only": {"area": {"mean": -0.2, "lo": -0.3, "hi": -0.1}}}}
    assert "+0.200 [+0.100, +0.300]" in rubric(turned)


def test_the_judge_s_phases() -> None:
    lines = judge(document()).split("\n")
    assert lines[2] == "| 0 | warm-up | 60 % | – | – | – | 97 % | 0 % |" and "| round 1, judge |" in lines[3]
    assert "30 to 50 held-out pairs" in lines[-1] and "91 % of balanced claims" in lines[-1]
    assert {TABLES[t].source for t in ("smol_study", "smol_rubric", "smol_judge")} == {"smol_study.json"}


def test_before_the_first_seed() -> None:
    early = document()
    early["meta"] |= {"judge": {}, "seeds": []}
    assert "No seed" in rubric(early) and "No seed" in judge(early) and "0 seeds" in arms(early)
