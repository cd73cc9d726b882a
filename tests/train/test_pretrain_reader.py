"""The reader's pretraining: resumable to the identical weights, and the shipped reader is what the recipe gives."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from roro_fast.errors import CheckpointError, ConfigError
from roro_fast.models import train_nano
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
    assert train_nano.override(Recipe(), ["read=3"]).read == 3
    with pytest.raises(ConfigError, match="reed"):
        train_nano.override(Recipe(), ["reed=3"])


def test_the_loss_falls(tmp_path):
    run = Pretraining(replace(TINY, hidden=32, steps=60, lr=1e-2), tmp_path)
    with run.trainer:
        rows = [run.train_step() for _ in range(60)]
    assert rows[-1]["format"] < 0.6 * rows[0]["format"] and rows[-1]["recital"] < 0.6 * rows[0]["recital"]


@pytest.mark.usefixtures("_quick")
def test_a_second_stage_starts_from_the_first(tmp_path):
    Pretraining(TINY, tmp_path / "a").run(quiet=True)
    second = Pretraining(replace(TINY, seed=1), tmp_path / "b", init=tmp_path / "a" / "model")
    first = load_file(tmp_path / "a" / "model" / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(second.model.embed.weight, first)
    second.run(quiet=True)
    record = json.loads((tmp_path / "b" / "model" / "train.json").read_text())
    assert record["started_from"]["recipe"]["seed"] == 0 and record["recipe"]["seed"] == 1
    assert (tmp_path / "b" / "model" / "init_log.jsonl").read_text() == (tmp_path / "a" / "train_log.jsonl").read_text()


def logged(name: str) -> list[dict]:
    return [json.loads(line) for line in (READER / name).read_text().splitlines()]


def test_the_shipped_reader_is_reproducible(tmp_path):
    """Its first stage, retrained for three steps, follows the recorded losses; both stages fit their records."""
    record = json.loads((READER / "train.json").read_text())
    first = record["started_from"]
    run = Pretraining(Recipe(**first["recipe"]), tmp_path)
    with run.trainer:
        again = [run.train_step() for _ in range(3)]
    for row, want in zip(again, logged("init_log.jsonl"), strict=False):
        for key in ("verdict", "recital", "format"):
            assert row[key] == pytest.approx(want[key], abs=2e-3)
    for part, log in ((first, "init_log.jsonl"), (record, "train_log.jsonl")):
        assert logged(log)[-1]["step"] == part["recipe"]["steps"] and logged(log)[-1]["tokens"] == part["tokens"]


def test_the_shipped_reader_reads(tmp_path):
    run = Pretraining(replace(Recipe(), seed=5), tmp_path, init=READER)
    found = run.accuracy(batches=2, size=32)
    assert found["all"] >= 0.95 and found["writes line"] >= 0.98
