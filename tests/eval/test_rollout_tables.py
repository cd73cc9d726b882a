"""README tables of the end-to-end benches."""

from __future__ import annotations

from pathlib import Path

import pytest

from roro_fast.eval.tables import fill
from roro_fast.files import write_json

ROW = {
    "tokens_per_second": 1234.5, "trajectories_per_second": 12.5, "step_ms_p50": 300.0, "step_ms_p99": 1900.0,
    "peak_rss_mb": 1381, "fraction_of_ceiling": 0.61, "forward_flops_over_least": 1.0,
}  # fmt: skip
PEER = ROW | {"tokens_per_second": 500.0, "ours_over_this": 2.469, "forward_flops_over_least": None}
FOUND = {
    "pair": "smol", "dtype": "bfloat16", "threads": 2, "rounds": 3,
    "ceiling": {"bytes_per_second": 24.5e9, "flops": 8e11},
    "absent": {"vllm_cpu": "no environment"},
    "provenance": {"host": {"cpu": "some CPU"}},
    "workloads": {
        "c32": {
            "sequences": 32, "new_tokens": 3072, "steps": 220, "switches": 40,
            "engines": {"roro_fast": ROW, "openvino_genai": PEER},
        }
    },
    "plain": {
        "units": {"decode_1": "tokens/s", "warm": "ms"},
        "engines": {"roro_fast": {"decode_1": 80.0, "warm": 250.0}, "hf_cached": {"decode_1": 25.0}},
        "bandwidth_fraction": {"roro_fast": 0.88, "hf_cached": 0.27},
        "bandwidth_limit_decode_1": 100.0,
    },
    "targets": [{"what": "answers/s over x", "wanted": ">= 2", "got": 1.9, "reached": False}],
}  # fmt: skip


@pytest.fixture
def results(tmp_path: Path) -> Path:
    write_json(tmp_path / "e2e/rollout_smol_cpu.json", FOUND)
    for pair in ("nano", "smol"):
        bounds = {"switch": f"{pair} is bound by arithmetic."}
        write_json(
            tmp_path / f"e2e/scaling_{pair}.json", {"pair": pair, "dtype": "float32", "threads": 2, "bounds": bounds}
        )
    return tmp_path


def table(name: str, results: Path) -> list[str]:
    return fill(f"<!-- table:{name} -->\n<!-- /table -->\n", results).splitlines()[1:-1]


def test_engines_side_by_side(results: Path) -> None:
    rows = table("rollout", results)
    assert rows[0] == "`c32`: 32 answers of 96 tokens, 220 steps, 40 switches."
    assert rows[4] == "| **roro_fast** | 1,234 | 12.50 | 300 / 1,900 ms | 1,381 MB | 1.00x least | 61 % |  |"
    assert rows[5].startswith("| openvino-genai | 500 |") and rows[5].endswith("| not said | 61 % | 2.47x |")
    assert "24.5 GB/s read, 800 GFLOP/s." in rows[-1] and rows[-1].endswith("two vLLM engines: no environment.")


def test_a_sweep_has_a_row_for_every_workload(tmp_path: Path) -> None:
    alone = {"roro_fast": ROW, "hf_cached": PEER | {"ours_over_this": 5.0}}
    both = {**alone, "openvino_genai": PEER}
    workloads = {"c32_s0.2_p100_n96_g1": {"engines": both}, "c1_s0.5_p1000_n96_g8": {"engines": alone}}
    write_json(tmp_path / "e2e/rollout_smol_cpu_sweep.json", FOUND | {"workloads": workloads, "neighbours": 1})
    rows = table("rollout_sweep", tmp_path)
    assert rows[0].endswith("| over HF loop, cache per model, batched | over openvino-genai |")
    assert rows[2] == "| 32, 0.2, 100, 1 | 1,234 | 300 / 1,900 ms | 1,381 MB | 5.00x | 2.47x |"
    assert rows[3] == "| 1, 0.5, 1000, 8 | 1,234 | 300 / 1,900 ms | 1,381 MB | 5.00x |  |"
    assert "Busy processes beside every run: 1." in rows[-1]


def test_plain_figures_leave_gaps_open(results: Path) -> None:
    rows = table("rollout_plain", results)
    assert rows[2:] == [
        "| **roro_fast** | 80.0 | 250.0 | 88 % | 80 % |",
        "| HF loop, cache per model, batched | 25.0 |  | 27 % | 25 % |",
    ]


def test_misses_are_said(results: Path) -> None:
    assert table("rollout_targets", results)[2] == "| answers/s over x | >= 2 | 1.9 | **missed** |"


def test_every_pair_has_its_sentences(results: Path) -> None:
    rows = table("scaling", results)
    assert rows[0] == "nano pair, float32, 2 threads:" and rows[2] == "- switch: nano is bound by arithmetic."
    assert "- switch: smol is bound by arithmetic." in rows
