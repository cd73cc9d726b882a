"""The whole loop through the command line, and training that resumes to the identical result."""

from __future__ import annotations

import json
import signal

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from roro_fast.cli import app
from tests.processes import interrupt, spawn

SMALL = [
    "run.name=r",
    "task.n_train=24",
    "task.n_calibrate=4",
    "task.n_test=6",
    "collect.n_queries=12",
    "engine.max_num_seqs=64",
    "engine.kv_bytes=8MiB",
    "router.process_reward=formula",
    "router.queries_per_step=6",
    "router.group_size=4",
    "router.steps=6",
    "eval.n_boot=20",
    "eval.n_view=3",
    "eval.budgets=[0.3, 0.6]",
    "calibrate.budgets=[0.3, 0.6]",
    "models.prices=[1, 10]",
]


def roro(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    result = roro("quickstart", f"run.dir={root}", *SMALL)
    assert result.exit_code == 0, result.output
    return root / "r", result


def test_quickstart_leaves_everything_a_run_should_have(whole):
    run, result = whole
    stages = ["collect", "reference", "router", "outcome_only", "evaluate", "report"]
    assert sorted(p.stem for p in (run / "stages").glob("*.json")) == sorted(stages)
    for name in (
        "config.yaml",
        "meta.json",
        "eval.json",
        "report.html",
        "report.json",
        "routers/roro/model.safetensors",
    ):
        assert (run / name).is_file(), name
    assert not list(run.rglob("*.part"))
    assert list((run / "logs" / "router" / "roro").glob("events.*"))
    assert "frontier on 6 test queries" in result.output and "report.html" in result.output


def test_the_report_shows_real_answers_of_every_arm(whole):
    run, _ = whole
    data = json.loads((run / "report.json").read_text())
    arms = {t["arm"] for t in data["trajectories"]}
    assert arms == {"all_small", "all_large", "random", "confidence", "oracle", "outcome_only", "roro"}
    assert len({t["query_id"] for t in data["trajectories"]}) == 3
    large = [t for t in data["trajectories"] if t["arm"] == "all_large"]
    assert all(t["flops_share"] == 1.0 and t["steps"] for t in large)
    assert {c["arm"] for c in data["curves"]} == {"roro", "outcome_only"}
    assert "router:" in data["provenance"]["config"]


def test_a_price_table_prices_every_operating_point(whole):
    run, _ = whole
    arms = {a["name"]: a["points"] for a in json.loads((run / "eval.json").read_text())["arms"]}
    prices = {name: [p["values"]["price"]["mean"] for p in points] for name, points in arms.items()}
    assert all(0 < v <= 2 * prices["all_large"][0] for found in prices.values() for v in found)
    assert prices["all_small"][0] < prices["all_large"][0]
    assert "Price / 1000 queries" in (run / "report.html").read_text()


def test_every_stage_is_skipped_the_second_time(whole):
    run, _ = whole
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*.safetensors")}
    result = roro("report", "--run", run)
    assert result.exit_code == 0 and result.output.count("done before") == 6
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*.safetensors")} == before


def test_redo_forgets_the_stage_and_what_came_from_it(whole, tmp_path):
    import shutil

    run = tmp_path / "r"
    shutil.copytree(whole[0], run)
    result = roro("train", "--run", run, "router.steps=2")
    assert result.exit_code == 2 and "router.steps" in result.stderr
    result = roro("train", "--run", run, "router.steps=2", "--redo", "router")
    assert result.exit_code == 0, result.output
    assert len(json.loads((run / "routers" / "roro" / "history.json").read_text())) == 2
    assert not (run / "eval.json").exists() and not (run / "report.html").exists()
    assert "collect: done before" in result.output


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
def test_training_resumed_after_an_interruption_is_identical(whole, tmp_path, sign):
    args = ["train", f"run.dir={tmp_path}", *SMALL]
    run = tmp_path / "r"
    checkpoint = run / "checkpoints" / "router" / "roro" / "step-000002"
    p = spawn(*args, dawdle_after=checkpoint)
    err = interrupt(p, sign, checkpoint)
    assert p.returncode == (130 if sign == signal.SIGINT else -9), err
    assert not (run / "routers" / "roro" / "model.safetensors").exists()
    result = roro(*args, "--resume")
    assert result.exit_code == 0, result.output
    for arm in ("roro", "outcome_only"):
        got = load_file(run / "routers" / arm / "model.safetensors")
        want = load_file(whole[0] / "routers" / arm / "model.safetensors")
        assert all((got[k] == want[k]).all() for k in want)
        got, want = (json.loads((d / "routers" / arm / "history.json").read_text()) for d in (run, whole[0]))
        assert got == want


def test_a_trained_router_collects_in_another_run(whole, tmp_path):
    args = [f"run.dir={tmp_path}", *SMALL, "collect.arms=[all_small, policy]", "collect.samples=3"]
    result = roro("rollout", *args, f"collect.policy={whole[0] / 'routers' / 'roro'}")
    assert result.exit_code == 0, result.output
    arms = json.loads((tmp_path / "r" / "stages" / "collect.json").read_text())["summary"]["arms"]
    assert arms["policy"]["trajectories"] == 36 and arms["all_small"]["trajectories"] == 12
    result = roro("rollout", *args, f"collect.policy={tmp_path}", "run.name=bad")
    assert result.exit_code == 2 and "not a readable router directory" in result.stderr


def test_same_seed_same_run_other_seed_other_run(whole, tmp_path):
    assert roro("train", f"run.dir={tmp_path}", *SMALL, "run.seed=1", "run.name=other").exit_code == 0
    a, b = (load_file(d / "routers" / "roro" / "model.safetensors") for d in (whole[0], tmp_path / "other"))
    assert any((a[k] != b[k]).any() for k in a)
