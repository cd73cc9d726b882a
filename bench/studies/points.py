"""What the studies share: arms trained and measured once, whatever interrupted an earlier call, and read back."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from rich.console import Console

from roro_fast.config import RouterConfig
from roro_fast.eval.records import PointResult, load_points, save_points
from roro_fast.train.context import Context
from roro_fast.train.rewards import ProcessReward
from roro_fast.train.router_stage import ROUTERS, Reference, train_arm


def once(path: Path, make: Callable[[], list[PointResult]], console: Console) -> None:
    """Operating points of one arm in `path`, made unless they are there; says how good they are and what they took."""
    if path.is_file():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    points = make()
    save_points(path, points)
    best = max(float(p.correct.mean()) for p in points)
    seconds = time.perf_counter() - start
    console.print(f"{path.parent}: {path.stem}: best accuracy {best:.3f}, {seconds:.0f} s", soft_wrap=True)


def trained(ctx: Context, arm: str, config: RouterConfig, reward: ProcessReward | None, ref: Reference) -> None:
    """The router `arm` of a run, trained to the end unless it is already."""
    if not (ctx.run.path / ROUTERS / arm / "history.json").is_file():
        train_arm(ctx, arm, config, reward, ref)


def gather(paths: Iterable[Path], once_for_all: Collection[str] = ()) -> list[PointResult]:
    """The points of all files; of an arm that no seed changes the first ones found, as seed 0."""
    found: dict[tuple[str, int, float], PointResult] = {}
    for path in paths:
        for p in load_points(path):
            p = dataclasses.replace(p, seed=0) if p.arm in once_for_all else p
            found.setdefault((p.arm, p.seed, p.knob), p)
    return list(found.values())
