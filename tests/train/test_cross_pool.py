"""A pool whose models do not share a tokenizer, through every stage of a run and a suite."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from roro_fast.cli import app
from roro_fast.eval.records import load_points
from roro_fast.runs import RunDirectory
from tests.two_tokenizers import save_pair

ARMS = ["all_small", "all_large", "random", "confidence", "outcome_only", "roro", "spec_reason", "r2r", "trim_thr"]
WHOLE = "oracle_query"  # made of the two anchors' answers


def roro(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    root = tmp_path_factory.mktemp("cross")
    small, large = save_pair(root)
    prm = root / "prm"
    prm.mkdir()
    (prm / "prm.json").write_text(json.dumps({"kind": "verdict", "model": str(large), "labels": ["+", "-"]}))
    return [
        f"run.dir={root}", "run.name=r", f"models.paths=[{small}, {large}]", "task.name=gym:chain_sum",
        "task.n_train=12", "task.n_calibrate=4", "task.n_test=5", "task.instruction=Add.", "engine.max_new_tokens=16",
        "engine.max_steps=6", "engine.max_num_seqs=32", "engine.kv_bytes=8MiB", "collect.n_queries=8",
        "router.process_reward=formula", "router.hidden=true", "router.queries_per_step=4", "router.group_size=4",
        "router.steps=2", f"eval.arms=[{WHOLE}, {', '.join(ARMS)}]", f"eval.prm={prm}", "eval.n_boot=10",
        "eval.n_fit=6", "eval.budgets=[0.4, 0.8]", "calibrate.budgets=[0.4, 0.8]", "models.prices=[1, 10]",
    ]  # fmt: skip


@pytest.mark.parametrize("space", ["regenerate", "next"])
def test_every_stage_of_a_run(settings: list[str], space: str) -> None:
    result = roro("quickstart", *settings, f"run.name={space}", f"router.action_space={space}")
    assert result.exit_code == 0, result.output
    run = RunDirectory(Path(settings[0].partition("=")[2]) / space)
    rows = list(run.store("collect"))
    assert {m for r in rows for s in r["steps"] for m in [s["model"]]} == {0, 1}
    for r in rows:
        (track,) = r["meta"]["tracks"]
        assert track["models"] == [1] and len(track["ends"]) == len(r["steps"]) == len(r["step_texts"])
        assert sum(r["cost"]["generated_tokens"]) <= 16 and r["prompt_ids"] != track["prompt_ids"]
    policy = load_file(run.path / "routers" / "roro" / "model.safetensors")
    history = json.loads((run.path / "routers" / "roro" / "history.json").read_text())
    assert all(v.isfinite().all() for v in policy.values()) and all(h["cost_share"] > 0 for h in history)
    for arm in ARMS:
        for p in load_points(run.path / "eval" / f"{arm}.safetensors"):
            assert (p.price > 0).all() and (p.total_flops > p.generated_flops).all()
    assert WHOLE in {a["name"] for a in json.loads((run.path / "eval.json").read_text())["arms"]}
    report = json.loads((run.path / "report.json").read_text())
    assert {t["arm"] for t in report["trajectories"]} == set(ARMS)


def test_a_suite(settings: list[str]) -> None:
    args = ["--suite", "gym", "--limit", 1, "suite.shares=[0.5]", "suite.thresholds=[0.9]"]
    result = roro("eval", *args, *settings, "run.name=suite", "suite.arms=[all_small, all_large, random, rsd]")
    assert result.exit_code == 0, result.output
    points = json.loads((Path(settings[0].partition("=")[2]) / "suite" / "suite_gym.json").read_text())["points"]
    assert [p["arm"] for p in points] == ["all_small", "all_large", "random", "rsd", "rsd"]
