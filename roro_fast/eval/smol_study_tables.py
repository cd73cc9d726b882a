"""README tables of the smol study (bench/studies/smol_study.py): arms in and out of distribution, rubric and Judge."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from roro_fast.eval import catalogue
from roro_fast.eval.baseline_tables import cell
from roro_fast.eval.bench_tables import row
from roro_fast.eval.catalogue import write

KINDS = {"trained": 0, "control": 1, "baseline": 2, "oracle": 3}
REFERENCE = "outcome_only"
PAIRS = (("roro", "outcome_only"), ("roro", "formula"), ("roro", "shuffled"), ("roro", "fixed_rubric"),
         ("formula", "outcome_only"), ("roro", "confidence"))  # fmt: skip


def arms(document: Mapping[str, Any]) -> str:
    """Area of every arm on every test set, its area by total FLOPs, and the difference to outcome-only GRPO."""
    sets = document["sets"]
    first, *others = sets
    found = {name: m for name, m in sets[first]["arms"].items() if m}
    order = sorted(found, key=lambda n: (KINDS.get(catalogue.arm(n).kind, 9), -(found[n]["area"]["mean"] or 0.0)))
    differences = sets[first]["differences"].get(REFERENCE, {})
    heads = ["router", "Area ↑", "FLOPs@98 % ↓", "Area (total) ↑", "area − outcome-only", *(f"{s} ↑" for s in others)]
    lines = [row(heads), row(["---"] + ["--:"] * (len(heads) - 1))]
    for name in order:
        m, d = found[name], differences.get(name, {}).get("area")
        cells = [cell(m["area"], "ratio"), cell(m["flops_at_98"], "share"), cell(m["area_total"], "ratio")]
        cells.append(cell(d, "ratio", signed=True) if d else "–")
        away = [sets[s]["arms"].get(name) for s in others]
        cells += [cell(a["area"], "ratio") if a else "–" for a in away]
        label = catalogue.arm(name).label
        lines.append(row([f"**{label}**" if name == "roro" else label, *cells]))
    return "\n".join([*lines, "", _note(document)])


def _note(document: Mapping[str, Any]) -> str:
    meta, sets = document["meta"], document["sets"]
    asked, ends = [], []
    for name, study in sets.items():
        m = study["meta"]
        asked.append(f"{m['n_queries']} of {name}")
        small, large = (write(study["points"][m[k]][0]["accuracy"]["mean"], "share") for k in ("small", "large"))
        ends.append(f"{small} and {large} ({name})")
    first = next(iter(sets.values()))
    routed = [
        (p["total"]["mean"], p["accuracy"]["mean"])
        for n, found in first["points"].items()
        if catalogue.arm(n).kind not in ("anchor", "oracle")
        for p in found
    ]
    cheaper = [a for total, a in routed if total < 1]
    text = (
        f"{_seeds(document)}, test queries: {', '.join(asked)}; all-small and all-large answer "
        f"{', '.join(ends)} correctly. In brackets {100 * first['meta']['level']:.0f} % bootstrap intervals over "
        f"queries and, where an arm draws or learns at random, seeds. Areas are over the generated FLOPs between "
        f"all-small and all-large; a coin toss has 0.5. Counting every forward pass, {len(cheaper)} of {len(routed)} "
        f"operating points are cheaper than all-large"
    )
    text += f", the best of them with {write(max(cheaper), 'share')} correct." if cheaper else "."
    differences = {n: d["area"] for n, d in first["differences"].get(REFERENCE, {}).items()}
    if null := [n for n, d in differences.items() if d["lo"] is not None and d["lo"] <= 0 <= d["hi"]]:
        text += f" No difference to outcome-only GRPO is established for: {_labels(null)}."
    if meta["missing"]:
        text += f" Not measured yet: {_labels(meta['missing'])}."
    return text


def rubric(document: Mapping[str, Any]) -> str:
    """Paired differences in area that say what rubric and Judge add, on every test set; null results are named."""
    if not document["meta"]["judge"]:
        return "No seed has come to the arms with a Judge yet."
    sets = document["sets"]
    lines = [row(["area", *sets]), row(["---"] + ["--:"] * len(sets))]
    null, shown = 0, 0
    for a, b in PAIRS:
        cells = []
        for study in sets.values():
            d = study["differences"].get(b, {}).get(a, {}).get("area")
            if d is None:  # only some arms are references, and a difference reads both ways
                d = _turned(study["differences"].get(a, {}).get(b, {}).get("area"))
            cells.append(cell(d, "ratio", signed=True) if d else "–")
            if d and d["lo"] is not None:
                shown, null = shown + 1, null + (d["lo"] <= 0 <= d["hi"])
        lines.append(row([f"{catalogue.arm(a).label} − {catalogue.arm(b).label}", *cells]))
    note = f"{_seeds(document)}. Of these {shown} differences {null} are not significant at "
    return "\n".join([*lines, "", note + "the 95 % level, with no correction for their number."])


def _labels(arms: Iterable[str]) -> str:
    return "; ".join(catalogue.arm(a).label for a in arms)


def _seeds(document: Mapping[str, Any]) -> str:
    n = len(document["meta"]["seeds"])
    return f"{n} seed{'s' * (n != 1)}"


def _turned(d: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The difference the other way round."""
    if d is None or d["mean"] is None:
        return None
    lo, hi = (None if d[k] is None else 0.0 - d[k] for k in ("hi", "lo"))  # from 0, since -0 would be written as such
    return {"mean": 0.0 - d["mean"], "lo": lo, "hi": hi}


def judge(document: Mapping[str, Any]) -> str:
    """Per seed and phase of the alternation: held-out pairs ordered right, verdicts right, malformed rubrics."""
    if not document["meta"]["judge"]:
        return "No seed has come to the alternation yet."
    heads = ["seed", "phase", "pairs ordered right", "outcome", "cost", "process", "verdicts right", "malformed"]
    lines = [row(heads), row(["---"] * 2 + ["--:"] * 6)]
    pairs = []
    for seed, summary in document["meta"]["judge"].items():
        for r in summary["history"]:
            pairs.append(r["heldout_pairs"])
            keys = ("accuracy", "accuracy_outcome", "accuracy_cost", "accuracy_process", "reading", "heldout_malformed")
            shares = [_percent(r.get(k)) for k in keys]
            phase = r["phase"] if r["round"] == 0 else f"round {r['round']}, {r['phase']}"
            lines.append(row([seed.removeprefix("seed-"), phase, *shares]))
    reader = document["meta"]["reader"]
    note = f"{min(pairs)} to {max(pairs)} held-out pairs a seed."
    if reader:
        last = reader[-1]
        kinds = ", ".join(f"{k} {_percent(v)}" for k, v in last["verdict_accuracy"].items() if k != "all")
        right = _percent(last["verdict_accuracy"]["all"])
        note += (
            f" The reader they start from was taught for {last['step']} steps ({last['cpu_s'] / 60:.0f} CPU minutes) "
            f"and reads {right} of balanced claims about calibrate questions right: {kinds}."
        )
    return "\n".join([*lines, "", note])


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f} %"
