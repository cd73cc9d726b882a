"""README tables, generated from committed results: `python -m roro_fast.eval.tables README.md [--check]`.

A table lives between `<!-- table:NAME -->` and `<!-- /table -->`; what stands there is replaced, everything else kept.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roro_fast.errors import DataError, RoroError
from roro_fast.eval import (
    ablation_tables,
    baseline_tables,
    bench_tables,
    catalogue,
    projection_tables,
    rollout_tables,
    smol_study_tables,
    smol_tables,
)
from roro_fast.eval.bootstrap import Estimate
from roro_fast.eval.catalogue import AFTER, METRICS, write
from roro_fast.eval.plain import from_plain
from roro_fast.files import read_json, write_text

_BLOCK = re.compile(r"(<!-- table:([\w.-]+) -->\n)(.*?)(<!-- /table -->)", re.S)
_OPEN = re.compile(r"<!-- table:")
STUDY_METRICS = ("area", "acc_at_60", "flops_at_98")
KINDS = {"trained": 0, "baseline": 1, "oracle": 2, "control": 3}


@dataclass(frozen=True, slots=True)
class Table:
    """`source` is a file under the results folder, or several by a pattern; `render` turns its JSON document, or the
    list of them by file name, into Markdown without a final newline."""

    source: str
    render: Callable[[Any], str]


def nano_study(study: Mapping[str, Any]) -> str:
    """Arms against area, Acc@60 %, FLOPs@98 % and the paired difference in area to outcome-only GRPO."""
    reference = study["differences"].get("outcome_only", {})
    heads = ["router", *(f"{METRICS[m].label} {'↑' if METRICS[m].higher else '↓'}" for m in STUDY_METRICS)]
    rows = []
    for name in sorted(study["arms"], key=lambda n: (KINDS.get(catalogue.arm(n).kind, 9), n != "roro")):
        found = study["arms"][name]
        if found and AFTER not in name:
            cells = [_cell(found[m], METRICS[m].unit, f"arms.{name}.{m}") for m in STUDY_METRICS]
            d = reference.get(name, {}).get("area")
            cells.append(_cell(d, "ratio", f"differences.outcome_only.{name}", signed=True) if d else "–")
            rows.append([_name(name), *cells])
    meta = study["meta"]
    lines = [_row([*heads, "area − outcome-only"]), _row(["---"] + ["--:"] * (len(heads)))]
    lines += [_row(r) for r in rows]
    ends = []
    for name in (meta["small"], meta["large"]):
        p = study["points"][name][0]
        ends.append(f"{_name(name)} {write(p['accuracy']['mean'], 'share')} correct")
    note = (
        f"{meta['task']}, {meta['split']} split, {meta['n_queries']} queries, {len(meta['seeds'])} seeds; in brackets "
        f"{100 * meta['level']:.0f} % bootstrap intervals over queries and seeds; FLOPs are generated FLOPs as a share "
        f"of all-large; a coin toss between the two models has area 0.5. {'; '.join(ends)}."
    )
    return "\n".join([*lines, "", note])


def nano_curve(study: Mapping[str, Any]) -> str:
    """Area after a few steps of training, of outcome-only GRPO and of RoRo, and their paired difference."""
    counts = sorted(int(n.partition(AFTER)[2]) for n in study["arms"] if n.startswith(f"roro{AFTER}"))
    config = study["meta"]["config"]["router"]
    rows = []
    for n in [*counts, config["steps"]]:
        pair = [f"{arm}{AFTER}{n}" if n in counts else arm for arm in ("outcome_only", "roro")]
        cells = [_cell(study["arms"][name]["area"], "ratio", f"arms.{name}.area") for name in pair]
        d = study["differences"][pair[0]][pair[1]]["area"]
        answers = n * config["queries_per_step"] * config["group_size"]
        rows.append([str(n), f"{answers:,}", *cells, _cell(d, "ratio", f"differences.{pair[0]}", signed=True)])
    heads = ["GRPO steps", "routed answers seen", "outcome-only GRPO", "RoRo", "RoRo − outcome-only"]
    return "\n".join([_row(heads), _row(["--:"] * len(heads)), *(_row(r) for r in rows)])


def nano_early(study: Mapping[str, Any]) -> str:
    """All trained arms, controls among them, at the last step count at which more than two were measured early."""
    measured = [name.partition(AFTER) for name in study["arms"] if AFTER in name]
    steps = max(n for _, _, n in measured if sum(m == n for _, _, m in measured) > 2)
    reference = f"outcome_only{AFTER}{steps}"
    rows = []
    for arm in sorted((a for a, _, n in measured if n == steps), key=lambda a: (a != "roro", a != "outcome_only")):
        name = f"{arm}{AFTER}{steps}"
        area = _cell(study["arms"][name]["area"], "ratio", f"arms.{name}.area")
        d = study["differences"][reference].get(name, {}).get("area")
        rows.append([_name(arm), area, _cell(d, "ratio", f"differences.{reference}.{name}", signed=True) if d else "–"])
    heads = [f"after {steps} steps", "Area ↑", "area − outcome-only"]
    return "\n".join([_row(heads), _row(["---", "--:", "--:"]), *(_row(r) for r in rows)])


def nano_pair(figures: Mapping[str, Any]) -> str:
    """The nano pair against its required shape, and the small model's error by kind of step."""
    kinds = figures["step_errors"]["small"]
    checks = [_row(["required", "measured"]), _row(["---", "--:"])]
    checks += [_row([name, value]) for name, (value, _) in figures["checks"].items()]
    errors = [_row(["step kind", *kinds]), _row(["---"] + ["--:"] * len(kinds))]
    for model, rates in figures["step_errors"].items():
        errors.append(_row([f"error of {model}", *(f"{100 * rates[k]:.1f} %" for k in kinds)]))
    small, large = figures["parameters"]
    note = f"{figures['queries']} test queries, greedy; {small:,} and {large:,} parameters."
    return "\n".join([*checks, "", *errors, "", note])


def hf_step_loop(result: Mapping[str, Any]) -> str:
    """Tokens per second of both, and the ratio."""
    speed = result["tokens_per_second"]
    rows = [_row(["", "tokens/s"]), _row(["---", "--:"])]
    rows += [_row([name, f"{v:,.0f}"]) for name, v in speed.items()]
    spread = f"{min(result['ratios']):.1f}-{max(result['ratios']):.1f}"
    host = result["provenance"]["host"]
    note = (
        f"{result['ratio']:.1f}x (median of {len(result['ratios'])} interleaved rounds, {spread}); nano pair, "
        f"{result['queries']} queries, the writer changes at a step with probability {result['switch_rate']:g}, one "
        f"thread of {host['cpu']}, fp32. The loop runs one question at a time and prefills anew at each step."
    )
    return "\n".join([*rows, "", note])


TABLES: dict[str, Table] = {
    "nano_study": Table("nano_study.json", nano_study),
    "nano_curve": Table("nano_study.json", nano_curve),
    "nano_early": Table("nano_study.json", nano_early),
    "ablations": Table("ablations_nano.json", ablation_tables.ablations),
    "transfer": Table("transfer_nano_*.json", ablation_tables.transfer),
    "smol_hidden": Table("hidden_smol.json", ablation_tables.hidden),
    "nano_quickstart": Table("nano_quickstart.json", nano_study),
    "nano_pair": Table("nano_pair.json", nano_pair),
    "smol_pair": Table("smol_pair.json", smol_tables.pair),
    "smol_gsm_pair": Table("smol_gsm_pair.json", smol_tables.pair),
    "smol_study": Table("smol_study.json", smol_study_tables.arms),
    "smol_rubric": Table("smol_study.json", smol_study_tables.rubric),
    "smol_judge": Table("smol_study.json", smol_study_tables.judge),
    "hf_step_loop": Table("hf_step_loop.json", hf_step_loop),
    "baselines_nano": Table("baselines_nano.json", baseline_tables.baselines),
    "kernels_cpu": Table("ops/*_cpu.json", bench_tables.kernels_cpu),
    "trace": Table("trace.json", bench_tables.trace),
    "rollout": Table("e2e/rollout_smol_cpu.json", rollout_tables.routed),
    "rollout_plain": Table("e2e/rollout_smol_cpu.json", rollout_tables.plain),
    "rollout_targets": Table("e2e/rollout_smol_cpu.json", rollout_tables.targets),
    "rollout_fastest": Table("e2e/rollout_smol_fastest.json", rollout_tables.routed),
    "rollout_fastest_plain": Table("e2e/rollout_smol_fastest.json", rollout_tables.plain),
    "rollout_fastest_targets": Table("e2e/rollout_smol_fastest.json", rollout_tables.targets),
    "rollout_zen5": Table("e2e/rollout_smol_fastest_zen5.json", rollout_tables.routed),
    "rollout_zen5_plain": Table("e2e/rollout_smol_fastest_zen5.json", rollout_tables.plain),
    "rollout_zen5_targets": Table("e2e/rollout_smol_fastest_zen5.json", rollout_tables.targets),
    "rollout_nano": Table("e2e/rollout_nano_cpu.json", rollout_tables.routed),
    "rollout_busy": Table("e2e/rollout_smol_cpu_busy.json", rollout_tables.routed),
    "rollout_sweep": Table("e2e/rollout_smol_cpu_sweep.json", rollout_tables.sweep),
    "scaling": Table("e2e/scaling_*.json", rollout_tables.scaling),
    "projection_maps": Table("projection_study.json", projection_tables.maps),
    "projection_answers": Table("projection_study.json", projection_tables.answers),
    "projection_bound": Table("projection_study.json", projection_tables.bound),
    "projection_times": Table("projection_study.json", projection_tables.times),
    "projection_smol": Table("projection_smol.json", projection_tables.smol),
}


def fill(text: str, results: Path, tables: Mapping[str, Table] = TABLES) -> str:
    """`text` with every marked table made anew; DataError names an unknown table, a lost marker or an absent result."""

    def one(m: re.Match[str]) -> str:
        name = m.group(2)
        table = tables.get(name)
        if table is None:
            raise DataError(f"table:{name}: no such table; known are {', '.join(tables)}")
        path = results / table.source
        found = sorted(results.glob(table.source))
        if not found:
            raise DataError(f"table:{name}: {path} does not exist; make it or remove the markers")
        documents = [read_json(p) for p in found]
        try:
            body = table.render(documents if "*" in table.source else documents[0])
        except (KeyError, TypeError, IndexError) as e:
            raise DataError(f"table:{name}: {path} does not follow its schema ({type(e).__name__}: {e})") from e
        return f"{m.group(1)}{body}\n{m.group(4)}"

    if len(_OPEN.findall(text)) != len(_BLOCK.findall(text)):
        raise DataError("a '<!-- table:NAME -->' marker has no '<!-- /table -->' after it, or is not alone on its line")
    return _BLOCK.sub(one, text)


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite the file, or with --check only say whether it is up to date. Exit status 1: it is not, or bad input."""
    parser = argparse.ArgumentParser(prog="python -m roro_fast.eval.tables", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--check", action="store_true", help="fail instead of writing")
    parser.add_argument("--results", type=Path, help="default: bench/results beside the file")
    args = parser.parse_args(argv)
    try:
        if not args.file.is_file():
            raise DataError(f"{args.file}: no such file")
        old = args.file.read_text(encoding="utf-8")
        new = fill(old, args.results or args.file.resolve().parent / "bench" / "results")
    except RoroError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    if new == old:
        return 0
    if args.check:
        print(
            f"error: {args.file}: tables are out of date; run: python -m roro_fast.eval.tables {args.file}",
            file=sys.stderr,
        )
        return 1
    write_text(args.file, new)
    return 0


def _cell(value: Any, unit: str, where: str, signed: bool = False) -> str:
    x = from_plain(Estimate, value, where)
    if not (math.isfinite(x.lo) and math.isfinite(x.hi)):
        return write(x.mean, unit, signed)
    lo, hi = (write(v, unit, signed).split(catalogue.NBSP)[0] for v in (x.lo, x.hi))
    return f"{write(x.mean, unit, signed)} [{lo}, {hi}]"


def _name(arm: str) -> str:
    label = catalogue.arm(arm).label
    return f"**{label}**" if arm == "roro" else label


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"


if __name__ == "__main__":
    raise SystemExit(main())
