"""What the Judge sees of a trajectory: each step's text, the model that wrote it and what it cost. Nothing else.

Left out on purpose: the gold answer and the outcome (the Judge must not grade correctness) and every confidence,
entropy and probability of models or router (a Judge that reads the router's own signals can be gamed by a threshold).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from roro_fast.engine.trajectory import Trajectory
from roro_fast.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True)
class Pool:
    """The models as a Judge knows them, smallest first: a one-word label each, and parameter counts for the cost."""

    labels: tuple[str, ...] = ("small", "large")
    params: tuple[int, ...] = (1, 10)

    def __post_init__(self) -> None:
        if len(self.labels) != len(self.params) or len(set(self.labels)) != len(self.labels) or len(self.labels) < 2:
            raise ConfigError(
                f"models.labels: {list(self.labels)} must be distinct, at least two, one per model ({len(self.params)})"
            )


@dataclass(frozen=True, slots=True)
class View:
    """The Judge's view. Per step: text without the delimiter, pool index of the writer, cost.

    A step's cost is its generated FLOPs (2N per token) as an integer percent of what the whole answer would have cost
    had the largest model written all of it.
    """

    texts: tuple[str, ...]
    models: tuple[int, ...]
    costs: tuple[int, ...]

    @property
    def switches(self) -> int:
        """Changes of writer between neighbouring steps."""
        return sum(a != b for a, b in zip(self.models, self.models[1:], strict=False))


def view_of(trajectory: Trajectory, pool: Pool) -> View:
    """The part of a trajectory a Judge may see."""
    steps = trajectory.steps
    if len(trajectory.step_texts) != len(steps):
        raise DataError(
            f"trajectory {trajectory.query_id}/{trajectory.arm}: step_texts has {len(trajectory.step_texts)} entries "
            f"for {len(steps)} steps; fill it before rendering"
        )
    tokens = sum(s.end - s.start for s in steps)
    whole = max(1, tokens * pool.params[-1])
    return View(
        texts=tuple(t.strip() for t in trajectory.step_texts),
        models=tuple(s.model for s in steps),
        costs=tuple(min(100, round(100 * (s.end - s.start) * pool.params[s.model] / whole)) for s in steps),
    )


def render(view: View, labels: Sequence[str]) -> str:
    """One line per step: `- line #2 large cost 12: banks 48: 42 gives 90 #2`, each closed by a newline."""
    rows = zip(view.texts, view.models, view.costs, strict=True)
    return "".join(f"- line #{i} {labels[m]} cost {c}: {t}\n" for i, (t, m, c) in enumerate(rows, 1))
