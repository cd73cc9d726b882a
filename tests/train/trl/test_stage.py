"""`rubric.trainer=trl` inside a run: one alternation, logs and results where the native trainer leaves them."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from roro_fast.cli_stages import run_stages
from roro_fast.config_io import load_config
from roro_fast.errors import ConfigError
from roro_fast.runs import RunDirectory
from roro_fast.train import rubric_stage
from roro_fast.train.alternate import STATE
from roro_fast.train.context import Context
from roro_fast.train.setup import Workbench
from tests.tiny import save_tiny

pytest.importorskip("trl")
SMALL = [
    "run.name=r", "task.n_train=32", "task.n_calibrate=3", "task.n_test=3", "collect.n_queries=32",
    "engine.max_num_seqs=64", "engine.kv_bytes=8MiB", "rubric.sft_steps=2", "rubric.steps=1", "rubric.rounds=1",
    "rubric.group_size=2", "rubric.batch_size=4", "rubric.max_tokens=24", "rubric.trainer=trl", "trl.bf16=false",
    "router.queries_per_step=4",
]  # fmt: skip


def run_of(tmp_path, reader) -> RunDirectory:
    overrides = [f"run.dir={tmp_path}", *SMALL, f"rubric.judge={reader}", f"rubric.rubricor={reader}"]
    run = RunDirectory.for_config(load_config("nano", overrides))
    run_stages(run, "pairs", Console(quiet=True))
    return run


class Stop(Exception):
    """Stands for a crash between two phases."""


def test_the_stage_resumes_logs_and_leaves_plain_checkpoints(tmp_path):
    reader = save_tiny(tmp_path / "reader", hidden=16, seed=5)
    run = run_of(tmp_path, reader)

    def crash(done, total, **info):
        if "pair_accuracy" in info:
            raise Stop

    with pytest.raises(Stop), run:
        rubric_stage.rubric(Context(run, Workbench(run.config), crash))
    first = json.loads((run.path / "rubric" / STATE).read_text())["history"]
    assert len(first) == 1 and first[0]["rubricor_sft_loss"] > 0 and first[0]["judge_sft_loss"] > 0
    run_stages(RunDirectory(run.path), "rubric", Console(quiet=True))
    history = json.loads((run.path / "stages" / "rubric.json").read_text())["summary"]["history"]
    assert history[:1] == first and [r["phase"] for r in history] == ["warm-up", "judge", "rubricor"]
    assert history[2]["malformed"] == 1.0 and history[2]["reward"] == -1.0  # an untrained Rubricor writes no rubric
    logged = {p.parent.name.rpartition("-")[0] for p in (run.logs / "rubric").glob("*/events.*")}
    assert logged == {
        "judge-sft",
        "rubricor-sft",
        "rubricor",
    }  # without a rubric there is nothing to train the Judge on
    assert not (run.path / "rubric" / rubric_stage.TRL_STATE).exists()
    assert rubric_stage.load_judge(run).verdicts == (" true", " false")


def test_verdicts_of_several_tokens_are_refused_before_any_training(tmp_path):
    reader = save_tiny(tmp_path / "reader", hidden=16, seed=5)
    (reader / "roro.json").write_text(json.dumps({"role": "reader", "verdicts": [" true", " switches line"]}))
    run = run_of(tmp_path, reader)
    with pytest.raises(ConfigError, match=r"judge\.verdicts: ' switches line' is 2 tokens.*single tokens"), run:
        rubric_stage.rubric(Context(run, Workbench(run.config)))
    assert not (run.path / "rubric").exists() and not (run.logs / "rubric").exists()
