from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from roro_fast.errors import DataError
from roro_fast.eval import bench_tables
from roro_fast.eval.study import build_study
from roro_fast.eval.tables import fill, main
from roro_fast.files import write_json
from tests.eval.samples import study

ROOT = Path(__file__).parents[2]
README = "# Title\n\n<!-- table:nano_study -->\nold\n<!-- /table -->\n\nafter | text\n"


@pytest.fixture(scope="module")
def document():
    return build_study(study(60, 3), meta={"git": "abc", "command": "make study"}, resamples=60)


@pytest.fixture
def repo(tmp_path, document):
    write_json(tmp_path / "bench/results/nano_study.json", document)
    (tmp_path / "README.md").write_text(README)
    return tmp_path


def test_the_document_follows_its_schema(document):
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert document["meta"]["seeds"] == [0, 1, 2] and document["meta"]["n_queries"] == 60
    assert document["meta"]["git"] == "abc"
    roro = document["arms"]["roro"]["area"]
    assert set(roro) == {"mean", "lo", "hi", "per_seed"} and len(roro["per_seed"]) == 3
    assert roro["mean"] == pytest.approx(sum(roro["per_seed"]) / 3)
    d = document["differences"]["outcome_only"]["roro"]["area"]
    assert d["mean"] == pytest.approx(roro["mean"] - document["arms"]["outcome_only"]["area"]["mean"])
    assert document["arms"]["all_small"] == {}
    assert [p["knob"] for p in document["points"]["roro"]] == [0.2, 0.4, 0.6, 0.8]


def test_the_table_is_generated_checked_and_stable(repo, document, capsys):
    readme = str(repo / "README.md")
    assert main([readme, "--check"]) == 1
    assert "tables are out of date" in capsys.readouterr().err
    assert (repo / "README.md").read_text() == README
    assert main([readme]) == 0 and main([readme, "--check"]) == 0
    text = (repo / "README.md").read_text()
    assert text.startswith("# Title\n\n<!-- table:nano_study -->\n| router |") and text.endswith("after | text\n")
    assert "\nold\n" not in text
    rows = [r for r in text.splitlines() if r.startswith("|")]
    assert len(rows) == 2 + 10 and len({r.count("|") for r in rows}) == 1
    roro = document["arms"]["roro"]["area"]
    assert rows[2].startswith("| **RoRo** |") and f"{roro['mean']:.3f} [{roro['lo']:.3f}, {roro['hi']:.3f}]" in rows[2]


def test_a_changed_result_makes_the_check_fail(repo, document):
    readme = str(repo / "README.md")
    assert main([readme]) == 0
    changed = json.loads(json.dumps(document))
    changed["arms"]["random"]["area"]["mean"] += 0.01
    write_json(repo / "bench/results/nano_study.json", changed)
    assert main([readme, "--check"]) == 1


def test_as_a_module(repo):
    command = [sys.executable, "-m", "roro_fast.eval.tables", str(repo / "README.md")]
    assert subprocess.run([*command, "--check"], capture_output=True).returncode == 1
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert subprocess.run([*command, "--check"], capture_output=True).returncode == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table:speed -->\n<!-- /table -->\n", "table:speed: no such table; known are nano_study"),
        ("<!-- table:nano_study -->\nno end\n", "has no '<!-- /table -->'"),
        ("<!-- table:nano_study --> x\n<!-- /table -->\n", "not alone on its line"),
    ],
)
def test_bad_markers_are_named(repo, text, message):
    with pytest.raises(DataError, match=message):
        fill(text, repo / "bench/results")


def test_absent_and_malformed_results_are_named(repo, capsys):
    results = repo / "bench/results/nano_study.json"
    write_json(results, {"meta": {}})
    assert main([str(repo / "README.md")]) == 1
    assert "nano_study.json does not follow its schema" in capsys.readouterr().err
    results.write_text("{")
    assert main([str(repo / "README.md")]) == 1
    assert "not valid JSON" in capsys.readouterr().err
    results.unlink()
    assert main([str(repo / "README.md")]) == 1
    assert "nano_study.json does not exist" in capsys.readouterr().err
    assert main([str(repo / "nothing.md")]) == 1
    assert "no such file" in capsys.readouterr().err
    assert (repo / "README.md").read_text() == README


def test_the_curve_table_pairs_each_arm_with_the_other_after_as_many_steps(repo, document):
    changed = json.loads(json.dumps(document))
    for arm, area in (("outcome_only@2", 0.5), ("roro@2", 0.6)):
        changed["arms"][arm] = {"area": {"mean": area, "lo": area - 0.01, "hi": area + 0.01}}
    changed["differences"]["outcome_only@2"] = {"roro@2": {"area": {"mean": 0.1, "lo": 0.09, "hi": 0.11}}}
    changed["meta"]["config"] = {"router": {"steps": 20, "queries_per_step": 8, "group_size": 4}}
    write_json(repo / "bench/results/nano_study.json", changed)
    text = fill("<!-- table:nano_curve -->\n<!-- /table -->\n", repo / "bench/results")
    rows = [[c.strip() for c in r.split("|")[1:-1]] for r in text.splitlines() if r.startswith("|")]
    assert rows[2] == ["2", "64", "0.500 [0.490, 0.510]", "0.600 [0.590, 0.610]", "+0.100 [+0.090, +0.110]"]
    assert rows[3][:2] == ["20", "640"] and len(rows) == 4
    changed["arms"]["shuffled@2"] = {"area": {"mean": 0.4, "lo": 0.3, "hi": 0.5}}
    changed["differences"]["outcome_only@2"]["shuffled@2"] = {"area": {"mean": -0.1, "lo": -0.2, "hi": 0.0}}
    write_json(repo / "bench/results/nano_study.json", changed)
    early = fill("<!-- table:nano_early -->\n<!-- /table -->\n", repo / "bench/results").splitlines()
    assert [r.split("|")[1].strip() for r in early[3:6]] == ["**RoRo**", "outcome-only GRPO", "shuffled Judge scores"]
    assert early[5].endswith("| 0.400 [0.300, 0.500] | −0.100 [−0.200, +0.000] |")
    assert "steps" not in fill("<!-- table:nano_study -->\n<!-- /table -->\n", repo / "bench/results")


def test_speed_tables_follow_from_the_committed_results(tmp_path):
    text = "".join(f"<!-- table:{name} -->\n<!-- /table -->\n" for name in ("kernels_cpu", "trace"))
    filled = fill(text, ROOT / "bench" / "results")
    assert "| `router_score` | eager bf16 | 2x |" in filled and "between the ranges" in filled
    assert fill(filled, ROOT / "bench" / "results") == filled


def test_required_ratios_are_counted():
    host = {"provenance": {"host": {"cpu": "CPU"}}, "isa": "avx2", "threads": 1, "load_before": [0.5, 0, 0]}
    cases = [
        {"speedup": {"eager": 3.0, "other": 9.0}, "targets": {"eager": 2.0}},
        {"speedup": {"eager": 1.5}, "targets": {"eager": 2.0}},
        {"speedup": {"eager": 12.4}, "targets": {"eager": 2.0, "absent": 3.0}},
        {"speedup": {"eager": 1.0}},
    ]
    table = bench_tables.kernels_cpu([{**host, "op": "dot", "cases": cases}])
    assert "| `dot` | eager | 2x | 1.5x | 3.0x | 2 of 3 |" in table and "absent" not in table
    assert bench_tables.times(1143.2) == "1,143x" and bench_tables.times(12.4) == "12x"
