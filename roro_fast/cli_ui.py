"""What a person sees while a run goes on: one progress bar per stage, then a table."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

_LINE_EVERY = 10.0  # seconds between progress lines where there is no terminal to animate


def show(name: str, value: float) -> str:
    """A figure in the form people read: accuracies in per cent, rates without decimals."""
    if name.endswith(("accuracy", "share")) or name == "outcome":
        return f"{100 * value:.1f}%"
    if name == "tok_s":
        return f"{value:,.0f} tok/s"
    return f"{value:.4g}"


def describe(info: Mapping[str, float]) -> str:
    return "  ".join(show(k, v) if k == "tok_s" else f"{k.replace('_', ' ')} {show(k, v)}" for k, v in info.items())


class StageView:
    """A Progress callback that draws a bar on a terminal, and prints a line now and then elsewhere."""

    def __init__(self, console: Console, title: str, bars: Progress | None, task: TaskID | None) -> None:
        self.console, self.title, self.bars, self.task = console, title, bars, task
        self.printed = time.monotonic()

    def __call__(self, done: int, total: int, **info: float) -> None:
        if self.bars is not None and self.task is not None:
            self.bars.update(self.task, completed=done, total=total, info=describe(info))
        elif done >= total or time.monotonic() - self.printed >= _LINE_EVERY:
            self.printed = time.monotonic()
            self.console.print(f"{self.title}: {done}/{total}  {describe(info)}", highlight=False, markup=False)


@contextmanager
def stage_view(console: Console, title: str) -> Iterator[StageView]:
    """Progress of one stage; the bar stays on screen, at its last state, when the stage ends."""
    if not console.is_terminal:
        yield StageView(console, title, None, None)
        return
    columns = (
        TextColumn("[bold]{task.description:<16}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("[cyan]{task.fields[info]}"),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, refresh_per_second=4) as bars:
        yield StageView(console, title, bars, bars.add_task(title, total=None, info=""))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """A plain table, first column left, the rest right."""
    out = Table(title=title)
    for i, name in enumerate(columns):
        out.add_column(name, justify="left" if i == 0 else "right", overflow="fold", no_wrap=i == 0)
    for row in rows:
        out.add_row(*(str(c) for c in row))
    return out


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
