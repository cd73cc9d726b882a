"""`roro eval --suite`: run it, show the macro averages, say what is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.console import Console

from roro_fast.cli_ui import stage_view, table
from roro_fast.eval.suite import evaluate_suite
from roro_fast.eval.suite_table import COLUMNS, cell
from roro_fast.runs import RunDirectory
from roro_fast.tasks.prompting import check_chats
from roro_fast.tasks.suites import suite
from roro_fast.train.context import Context
from roro_fast.train.setup import Workbench, distinct

_SHOWN = {"accuracy": "accuracy", "generated": "FLOPs", "seconds": "s", "price": "price", "discarded": "discarded"}


def run_suite(run: RunDirectory, name: str, console: Console, redo: Sequence[str] = ()) -> bool:
    """Evaluate suite `name` in `run`; False when a benchmark of it could not be measured."""
    suite(name)
    c = run.config
    if c.run.threads:
        torch.set_num_threads(c.run.threads)
    bench = Workbench(c)
    check_chats(distinct(bench.tokenizers), c.task.chat)  # what will be refused is refused before anything is written
    with run, stage_view(console, f"suite {name}") as view:
        result = evaluate_suite(Context(run, bench, view), name, redo)
    if result["points"]:
        console.print(macro_table(result))
    for benchmark, reason in result["missing"].items():
        console.print(f"missing: {benchmark}: {reason}", style="red", highlight=False, markup=False, soft_wrap=True)
    console.print(f"table: {run.path / f'suite_{name}.md'}", highlight=False, soft_wrap=True)
    return not result["missing"]


def macro_table(result: Mapping[str, Any]) -> Any:
    """Macro averages of every operating point; their intervals are in the files."""
    keys = [k for k in _SHOWN if any(p["macro"][k]["mean"] is not None for p in result["points"])]

    def mean(values: Mapping[str, Any], key: str) -> str:
        return cell({**values[key], "lo": None}, COLUMNS[key][1])

    rows = [(p["label"], f"{p['knob']:g}", *(mean(p["macro"], k) for k in keys)) for p in result["points"]]
    title = (
        f"{result['suite']}: macro average over {', '.join(result['queries'])}; generated FLOPs as a share of "
        "all-large, seconds and discarded tokens per answer, price per 1000"
    )
    return table(title, ("arm", "setting", *(_SHOWN[k] for k in keys)), rows)
