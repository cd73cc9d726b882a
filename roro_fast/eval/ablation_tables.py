"""README tables of the ablations (bench/studies/ablation_study.py): one change at a time, and other kinds of step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from roro_fast.eval.baseline_tables import cell
from roro_fast.eval.bench_tables import row
from roro_fast.eval.catalogue import AFTER

BASE, OUTCOME_ONLY = "roro", "outcome_only"
LABELS = {
    BASE: "**RoRo**",
    OUTCOME_ONLY: "outcome only",
    "beta_0.1": "β 0.1",
    "beta_0.45": "β 0.45",
    "next": "action space `next`",
    "next_outcome_only": "`next`, outcome only",
    "signals_only": "signals, no hidden state",
    "scaled_hidden": "hidden state scaled down",
    "hidden_only": "hidden state, no signals",
    "one_round": "one round of alternation",
    "warm_up_only": "warm-up, no alternation",
    "three_criteria": "at most 3 criteria",
    "no_outcome_rule": "no outcome pairs",
    "no_cost_rule": "no cost pairs",
    "no_process_rule": "no process pairs",
}


def ablations(study: Mapping[str, Any]) -> str:
    """Per variant: area early and at the end, paired differences to RoRo, and how its Judge orders held-out pairs."""
    arms, meta = study["arms"], study["meta"]
    early = min(int(n.partition(AFTER)[2]) for n in arms if n.startswith(f"{BASE}{AFTER}"))
    heads = ["RoRo with", f"Area after {early} steps ↑", "− RoRo", "Area ↑", "− RoRo", "pairs ordered right ↑"]
    lines = [row(heads), row(["---"] + ["--:"] * 5)]
    null = []
    for name in (n for n in LABELS if n in arms):
        cells = []
        for arm, base in ((f"{name}{AFTER}{early}", f"{BASE}{AFTER}{early}"), (name, BASE)):
            d = study["differences"].get(base, {}).get(arm, {}).get("area")
            cells += [cell(arms[arm]["area"], "ratio"), cell(d, "ratio", signed=True) if d else "–"]
        if d and d["lo"] is not None and d["lo"] <= 0 <= d["hi"]:
            null.append(LABELS[name])
        lines.append(row([LABELS[name], *cells, _ordered(meta["judge"].get(name, {}))]))
    note = f"{_asked(study)} Pairs: held-out ones of the same variant after its last phase, mean over seeds."
    if null:
        note += f" At the end of training no difference to RoRo is established for: {', '.join(null)}."
    return "\n".join([*lines, "", note])


def _ordered(histories: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    last = [h[-1]["accuracy"] for h in histories.values() if h]
    return f"{100 * sum(last) / len(last):.1f} %" if last else "–"


def _asked(study: Mapping[str, Any]) -> str:
    meta = study["meta"]
    n = len(meta["seeds"])
    over = "queries and seeds" if n > 1 else "queries: how much one training differs from the next is not in them"
    return (
        f"{meta['task']}, test split, {meta['n_queries']} queries, {n} seed{'s' * (n != 1)}; in brackets "
        f"{100 * meta['level']:.0f} % bootstrap intervals over {over}."
    )


def transfer(documents: Sequence[Mapping[str, Any]]) -> str:
    """Routers trained on some kinds of step, measured on those and on the others."""
    trained, others = sorted(documents, key=lambda d: d["meta"]["task"] != f"ledger:{d['meta']['trained_on']}")
    names = [n for n in LABELS if n in trained["arms"]]
    early = [n for n in trained["arms"] if AFTER in n and n.partition(AFTER)[0] in (BASE, OUTCOME_ONLY)]
    heads = ["trained on the first, area on", trained["meta"]["task"], others["meta"]["task"]]
    lines = [row(heads), row(["---", "--:", "--:"])]
    for name in [*names, *sorted(early), "confidence"]:
        base, _, steps = name.partition(AFTER)
        label = LABELS.get(base, "confidence threshold") + (f" after {steps} steps" if steps else "")
        lines.append(row([label, *(cell(d["arms"][name]["area"], "ratio") for d in (trained, others))]))
    differences = [d["differences"][OUTCOME_ONLY][BASE]["area"] for d in (trained, others)]
    lines.append(row(["RoRo − outcome only", *(cell(d, "ratio", signed=True) for d in differences)]))
    return "\n".join([*lines, "", _asked(others)])


VIEWS = {"signals_only": "signals alone", "scaled_hidden": "hidden state scaled down", "plain_hidden": "hidden state"}


def hidden(study: Mapping[str, Any]) -> str:
    """What a router of a pretrained model sees of the scout: area, and the paired difference to signals alone."""
    base, arms = "signals_only", study["arms"]
    lines = [row(["outcome-only GRPO sees", "Area ↑", "− signals alone"]), row(["---", "--:", "--:"])]
    for name, label in [*VIEWS.items(), ("confidence", "confidence threshold")]:
        d = study["differences"][base].get(name, {}).get("area")
        lines.append(row([label, cell(arms[name]["area"], "ratio"), cell(d, "ratio", signed=True) if d else "–"]))
    return "\n".join([*lines, "", _asked(study)])
