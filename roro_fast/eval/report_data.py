"""Everything `report.html` shows, as a JSON-serialisable record; a run directory keeps it as eval.json."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from roro_fast.errors import DataError
from roro_fast.eval.metrics import EvalSummary
from roro_fast.eval.plain import from_plain, to_plain
from roro_fast.eval.viewer import ViewTrajectory
from roro_fast.files import read_json, write_json

FORMAT = 1


@dataclass(slots=True)
class Curve:
    """One training curve: `metric` of `arm` trained with `seed`, at optimiser steps `steps`.

    Metrics the page knows by name: outcome_reward, process_reward, cost, entropy, kl; any other gets its own panel.
    """

    arm: str
    seed: int
    metric: str
    steps: list[float]
    values: list[float]


@dataclass(slots=True)
class JudgeRound:
    """Held-out pair accuracy of the Judge after alternation round `round` (0: after the SFT warm-up)."""

    round: int
    accuracy: float
    n_pairs: int
    arm: str = "roro"
    seed: int = 0
    valid_rubrics: float = math.nan


@dataclass(slots=True)
class PairStats:
    """Preference pairs by the rule that decided them, and the queries they came from."""

    by_rule: dict[str, int]
    n_queries: int
    n_trajectories: int
    without_signal: int = 0


@dataclass(slots=True)
class ReportData:
    """`provenance` maps a heading ("config", "versions", "git", ...) to text or a flat table of text."""

    title: str
    created: str = ""
    models: list[str] = field(default_factory=lambda: ["small", "large"])
    evaluation: EvalSummary | None = None
    curves: list[Curve] = field(default_factory=list)
    judge: list[JudgeRound] = field(default_factory=list)
    pairs: PairStats | None = None
    trajectories: list[ViewTrajectory] = field(default_factory=list)
    provenance: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    format: int = FORMAT

    def save(self, path: str | Path) -> None:
        """Write the record as JSON, atomically."""
        write_json(Path(path), to_plain(self))

    @classmethod
    def load(cls, path: str | Path) -> ReportData:
        """Read what `save` wrote; DataError names the file and the field that does not fit."""
        path = Path(path)
        if not path.is_file():
            raise DataError(f"{path}: not found; run `roro eval` first")
        raw = read_json(path)
        if isinstance(raw, dict) and raw.get("format") != FORMAT:
            raise DataError(f"{path}: format {raw.get('format')!r}, this version reads {FORMAT}; run `roro eval` again")
        return from_plain(cls, raw, path.name)
