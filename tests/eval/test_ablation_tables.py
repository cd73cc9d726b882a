"""The ablation tables: variants in a fixed order against RoRo, null results named, kinds of step side by side."""

from __future__ import annotations

from typing import Any

from roro_fast.eval.ablation_tables import LABELS, VIEWS, ablations, hidden, transfer


def est(mean: float, spread: float = 0.01) -> dict[str, float]:
    return {"mean": mean, "lo": mean - spread, "hi": mean + spread}


def study(areas: dict[str, float], **meta: Any) -> dict[str, Any]:
    references = {n: a for n, a in areas.items() if n.partition("@")[0] in ("roro", "outcome_only")}
    return {
        "meta": {"task": "ledger", "n_queries": 40, "seeds": [0, 1], "level": 0.95, **meta},
        "arms": {n: {"area": est(a)} for n, a in areas.items()},
        "differences": {
            r: {n: {"area": est(a - b)} for n, a in areas.items() if n != r} for r, b in references.items()
        },
    }


def test_variants_against_roro_early_and_at_the_end() -> None:
    areas = {"roro": 0.9, "roro@5": 0.8, "one_round": 0.895, "one_round@5": 0.7, "beta_0.1": 0.6, "beta_0.1@5": 0.81}
    histories = {"roro": {"0": [{"accuracy": 0.1}, {"accuracy": 0.7}], "1": [{"accuracy": 0.8}]}}
    lines = ablations(study(areas, judge=histories)).split("\n")
    assert [line.split(" | ")[0] for line in lines[2:5]] == ["| **RoRo**", "| β 0.1", "| one round of alternation"]
    assert lines[2].endswith("| 0.900 [0.890, 0.910] | – | 75.0 % |"), "the last phase of each seed"
    assert "−0.100 [−0.110, −0.090] | 0.895 [0.885, 0.905] | −0.005 [−0.015, +0.005] | – |" in lines[4]
    assert lines[-1].endswith("no difference to RoRo is established for: one round of alternation.")
    assert "2 seeds" in lines[-1] and "over queries and seeds." in lines[-1] and "after 5 steps" in lines[0]
    alone = ablations(study(areas, judge={}, seeds=[0]))
    assert "1 seed;" in alone and "over queries: how much one training differs from the next is not in them." in alone


def test_every_variant_of_the_study_has_a_name() -> None:
    from bench.studies.ablation_study import BASE, VARIANTS

    assert set(LABELS) == {BASE, *VARIANTS}


def test_transfer_puts_the_kinds_trained_on_first() -> None:
    areas = {"roro": 0.9, "outcome_only": 0.88, "roro@5": 0.8, "outcome_only@5": 0.7, "confidence": 0.6}
    here = study(areas, task="ledger:add1+mul", trained_on="add1+mul")
    there = study({n: a - 0.2 for n, a in areas.items()}, task="ledger:swap", trained_on="add1+mul")
    for documents in ([here, there], [there, here]):
        lines = transfer(documents).split("\n")
        assert "| ledger:add1+mul | ledger:swap |" in lines[0]
        assert lines[2] == "| **RoRo** | 0.900 [0.890, 0.910] | 0.700 [0.690, 0.710] |"
        assert lines[7] == "| RoRo − outcome only | +0.020 [+0.010, +0.030] | +0.020 [+0.010, +0.030] |"
        assert "**RoRo** after 5 steps" in "\n".join(lines) and "confidence threshold" in lines[6]


def test_what_a_router_sees_against_signals_alone() -> None:
    from bench.studies.hidden_study import BASE, VARIANTS

    assert list(VIEWS) == list(VARIANTS) and BASE == "signals_only"
    areas = {"signals_only": 0.8, "scaled_hidden": 0.75, "plain_hidden": 0.6, "confidence": 0.85}
    document = study(areas)
    document["differences"] = {"signals_only": {n: {"area": est(a - 0.8)} for n, a in areas.items() if n != BASE}}
    lines = hidden(document).split("\n")
    assert lines[2] == "| signals alone | 0.800 [0.790, 0.810] | – |"
    assert lines[4] == "| hidden state | 0.600 [0.590, 0.610] | −0.200 [−0.210, −0.190] |"
    assert lines[5].startswith("| confidence threshold | 0.850") and "40 queries, 2 seeds" in lines[-1]
