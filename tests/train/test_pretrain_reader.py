"""The reader's pretraining: resumable to the identical weights, and the shipped reader is what the recipe gives."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from roro_fast.errors import CheckpointError, ConfigError
from roro_fast.models.loading import assign, read_tensors
from roro_fast.models.training_run import override
from roro_fast.rubric.grammar import NUMBERED
from roro_fast.rubric.judge import Judge
from roro_fast.rubric.rubricor import Rubricor
from roro_fast.train.pretrain_reader import Pretraining, Recipe
from roro_fast.train.setup import resolve_model

TINY = Recipe(
    hidden=16,
    layers=1,
    heads=2,
    kv_heads=2,
    head_dim=8,
    intermediate=32,
    steps=4,
    read=2,
    write=2,
    warmup=1,
    eval_every=100,
)


READER = resolve_model("nano/reader")


@pytest.fixture
def _quick(monkeypatch):
    """The held-out measurement takes seconds; these tests are about the loop around it."""
    measure = Pretraining.accuracy
    monkeypatch.setattr(Pretraining, "accuracy", lambda self: measure(self, batches=1, size=2))


@pytest.mark.usefixtures("_quick")
def test_resume_gives_identical_weights_and_log(tmp_path):
    whole, parts = Pretraining(TINY, tmp_path / "a"), Pretraining(TINY, tmp_path / "b")
    whole.run(quiet=True)
    parts.run(until=2, quiet=True)
    assert not (tmp_path / "b" / "model").exists()
    Pretraining(TINY, tmp_path / "b").run(quiet=True)
    a, b = (load_file(tmp_path / x / "model" / "model.safetensors") for x in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    logs = []
    for x in "ab":
        rows = [json.loads(r) for r in (tmp_path / x / "train_log.jsonl").read_text().splitlines()]
        logs.append([{k: v for k, v in r.items() if k != "cpu_s"} for r in rows])
    assert logs[0] == logs[1] and [r["step"] for r in logs[0]] == [1, 2, 3, 4]


@pytest.mark.usefixtures("_quick")
def test_exports_a_base_for_both_roles(tmp_path):
    Pretraining(TINY, tmp_path).run(quiet=True)
    judge, rubricor = Judge.load(tmp_path / "model"), Rubricor.load(tmp_path / "model")
    assert judge.encoder.labels == rubricor.encoder.labels == ("small", "large")
    assert json.loads((tmp_path / "model" / "train.json").read_text())["recipe"]["steps"] == 4


@pytest.mark.usefixtures("_quick")
def test_another_recipe_is_not_resumed(tmp_path):
    Pretraining(TINY, tmp_path).run(until=1, quiet=True)
    with pytest.raises(CheckpointError, match="another recipe"):
        Pretraining(replace(TINY, seed=1), tmp_path)


def test_recipe_keys_are_checked():
    assert override(Recipe(), ["read=3"]).read == 3
    with pytest.raises(ConfigError, match="reed"):
        override(Recipe(), ["reed=3"])


def test_the_loss_falls(tmp_path):
    run = Pretraining(replace(TINY, hidden=32, steps=60, lr=1e-2), tmp_path)
    with run.trainer:
        rows = [run.train_step() for _ in range(60)]
    assert rows[-1]["format"] < 0.6 * rows[0]["format"] and rows[-1]["recital"] < 0.6 * rows[0]["recital"]


def test_the_shipped_reader_is_reproducible(tmp_path):
    """Retrained for three steps it follows the recorded losses."""
    record = json.loads((READER / "train.json").read_text())
    log = [json.loads(line) for line in (READER / "train_log.jsonl").read_text().splitlines()]
    assert Recipe(**record["recipe"]) == Recipe()
    run = Pretraining(Recipe(), tmp_path)
    with run.trainer:
        for want in log[:3]:
            row = run.train_step()
            assert row == pytest.approx({k: want[k] for k in row}, abs=2e-3)
    assert log[-1]["step"] == record["recipe"]["steps"] and log[-1]["tokens"] == record["tokens"]


def test_the_shipped_reader_reads(tmp_path):
    run = Pretraining(Recipe(seed=5), tmp_path)
    assign(run.model, read_tensors(READER))
    found = run.accuracy(batches=2, size=32)
    assert found["all"] >= 0.95
    assert min(found[k] for k in NUMBERED) >= 0.98
