"""What the smol study does to points: which arms are whole, and a test set cut into its families."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from bench.studies import points
from bench.studies.smol_study import ONCE, SEEDED, TRAINED, complete, config_of, restricted
from roro_fast.config import BASELINE_ARMS
from roro_fast.eval.catalogue import ARMS
from roro_fast.eval.records import ARRAYS, save_points
from tests.eval.samples import point


def test_every_baseline_is_in_the_study_and_has_a_name() -> None:
    assert {*BASELINE_ARMS, "random", "confidence", "outcome_only", "roro"} <= {*ONCE, *SEEDED, *TRAINED} <= {*ARMS}
    c = config_of("seed-1", 1)
    assert c.run.seed == 1 and c.eval.prm.endswith("heads/small") and min(c.eval.budgets) > 85 / 135


def test_only_arms_that_all_seeds_measured_are_whole() -> None:
    arms = [("roro", 0), ("roro", 1), ("roro", 2), ("r2r", 0), ("confidence", 0), ("random", 0), ("random", 1)]
    kept = complete([point(a, [1, 0], 0.5, seed=s) for a, s in arms], [0, 1])
    assert [(p.arm, p.seed) for p in kept] == [
        ("roro", 0),
        ("roro", 1),
        ("confidence", 0),
        ("random", 0),
        ("random", 1),
    ]


def test_a_point_on_some_of_its_queries() -> None:
    p = restricted(point("roro", [1, 0, 1, 1], np.array([0.1, 0.2, 0.3, 0.4])), lambda q: q in ("q1", "q3"))
    assert p.query_ids == ("q1", "q3") and p.correct.tolist() == [0, 1] and p.generated_flops.tolist() == [20, 40]
    assert all(len(getattr(p, n)) == 2 for n in ARRAYS)


def test_points_are_made_once_and_of_fixed_arms_the_first_is_taken(tmp_path: Path) -> None:
    made: list[int] = []

    def make() -> list:
        made.append(1)
        return [point("roro", [1, 0], 0.5, seed=3), point("confidence", [1, 1], 0.5, seed=3)]

    for _ in range(2):
        points.once(tmp_path / "a" / "x.safetensors", make, Console(quiet=True))
    assert made == [1]
    save_points(tmp_path / "a" / "y.safetensors", [point("confidence", [0, 0], 0.5, seed=1)])
    found = points.gather(sorted((tmp_path / "a").iterdir()), ("confidence",))
    assert [(p.arm, p.seed, p.correct.mean()) for p in found] == [("roro", 3, 0.5), ("confidence", 0, 1.0)]
    with pytest.raises(Exception, match="cannot read"):
        points.gather([tmp_path / "none"])
