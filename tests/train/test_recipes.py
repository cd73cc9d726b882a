"""The GPU recipe's whole loop on tiny stand-ins of its models: chat template and thinking, adapters trained by TRL."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from roro_fast.cli import app
from roro_fast.runs import RunDirectory
from roro_fast.train import rubric_stage, setup
from tests import chat, two_tokenizers
from tests.tiny import save_tiny

pytest.importorskip("trl")
pytest.importorskip("peft")
SIZES = [
    "models.device=cpu", "engine.kv_bytes=64MiB", "engine.max_num_seqs=16", "engine.max_new_tokens=24",
    "engine.max_steps=8", "task.n_train=24", "task.n_calibrate=6", "task.n_test=6", "collect.n_queries=24",
    "rubric.sft_steps=2", "rubric.steps=1", "rubric.rounds=1", "rubric.group_size=2", "rubric.batch_size=2",
    "rubric.max_tokens=16", "trl.bf16=false", "trl.lora_rank=2", "router.queries_per_step=4", "router.group_size=2",
    "router.steps=1", "eval.n_boot=5", "eval.n_view=1", "eval.budgets=[0.5]", "calibrate.budgets=[0.5]",
    "pairs.equal_cost=1.0", "pairs.quality_margin=0.0",
]  # fmt: skip


@pytest.mark.parametrize("recipe", ["qwen3", "qwen3_r1"])
def test_the_loop_of_a_recipe(tmp_path, monkeypatch, recipe):
    small, large = chat.save_pair(tmp_path / "qwen")
    local = {
        "Qwen/Qwen3-1.7B": small,
        "Qwen/Qwen3-14B": large,
        "Qwen/Qwen3-8B": save_tiny(tmp_path / "reader", hidden=16, context=2048),
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B": two_tokenizers.save_pair(tmp_path / "r1", context=2048)[1],
    }
    monkeypatch.setattr(setup, "fetch", lambda name, key, weights: local[name])
    data = tmp_path / "questions.jsonl"
    data.write_text(
        "".join(json.dumps({"id": i, "problem": f"What is {i} + 1?", "answer": i + 1}) + "\n" for i in range(90))
    )
    args = ["quickstart", "-c", recipe, f"run.dir={tmp_path}", f"task.name={data}", *SIZES]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0, result.output
    run = RunDirectory(tmp_path / recipe)
    assert (run.path / "report.html").is_file() and run.config.rubric.trainer == "trl"
    assert rubric_stage.load_judge(run).model.dtype == torch.bfloat16
    assert list((run.logs / "rubric").glob("judge-sft-*/events.*"))
    rows = list(run.store("collect"))
    assert {s["model"] for r in rows for s in r["steps"]} == {0, 1}
    assert all(("tracks" in r["meta"]) == (recipe == "qwen3_r1") for r in rows)
