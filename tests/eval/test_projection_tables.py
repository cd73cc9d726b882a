"""The README tables of the committed projection study."""

from __future__ import annotations

from pathlib import Path

import pytest

from roro_fast.errors import DataError
from roro_fast.eval.tables import TABLES, fill
from roro_fast.files import read_json, write_json

RESULTS = Path(__file__).parents[2] / "bench" / "results"
NAMES = [name for name in TABLES if name.startswith("projection_")]


def cells(name: str, results: Path) -> list[list[str]]:
    text = fill(f"<!-- table:{name} -->\n<!-- /table -->\n", results)
    return [[c.strip() for c in r.split("|")[1:-1]] for r in text.splitlines() if r.startswith("|")][2:]


def test_every_row_of_the_study_is_shown() -> None:
    study = read_json(RESULTS / "projection_study.json")
    directions = {f["direction"] for f in study["fits"]}
    counts = {"maps": len(study["fits"]) + len(directions), "answers": len(study["use"])}
    counts |= {"bound": len(study["harm_by_kl"]), "times": len(study["times"])}
    counts["smol"] = len(read_json(RESULTS / "projection_smol.json")["rows"])
    assert {n.removeprefix("projection_"): len(cells(n, RESULTS)) for n in NAMES} == counts
    for name in NAMES:
        assert len({len(row) for row in cells(name, RESULTS)}) == 1


def test_the_verdict_is_the_gates(tmp_path: Path) -> None:
    study = read_json(RESULTS / "projection_study.json")
    study["fits"][0]["kl_mean"] = study["default_bound"]
    write_json(tmp_path / "projection_study.json", study)
    verdicts = [row[-1] for row in cells("projection_maps", tmp_path)]
    assert verdicts[0] == "passes" and verdicts[1] == "refused"
    study["fits"] = [{}]
    write_json(tmp_path / "projection_study.json", study)
    with pytest.raises(DataError, match="does not follow its schema"):
        cells("projection_maps", tmp_path)
