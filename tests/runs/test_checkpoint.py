"""Checkpoints: training resumed from one equals training never stopped, and a torn one is never picked up."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from roro_fast.errors import CheckpointError
from roro_fast.runs import checkpoints, load_checkpoint, save_checkpoint


def train(steps, root=None, save_at=None, resume=False):
    """A noisy regression that draws from all three generators; returns the weights."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    start = 0
    if resume:
        start, tensors, _ = load_checkpoint(checkpoints(root)[-1])
        model.load_state_dict(tensors)
    for step in range(start, steps):
        x = torch.randn(8, 4) + float(np.random.rand()) + random.random() + random.gauss(0, 1)
        optimizer.zero_grad()
        (model(x) - x[:, :2]).pow(2).mean().backward()
        optimizer.step()
        if save_at == step + 1:
            save_checkpoint(root, step + 1, model.state_dict(), {})
            return None
    return model.state_dict()


def test_resumed_training_is_bit_identical(tmp_path):
    whole = train(9)
    assert train(9, tmp_path, save_at=4) is None
    torch.manual_seed(99)
    resumed = train(9, tmp_path, resume=True)
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_random_states_come_back(tmp_path):
    torch.manual_seed(1)
    np.random.seed(2)
    random.seed(3)
    random.gauss(0, 1)
    np.random.normal()
    save_checkpoint(tmp_path, 1, {}, {})
    first = (torch.rand(3), np.random.normal(size=3), random.gauss(0, 1), random.random())
    load_checkpoint(tmp_path / "step-000001")
    again = (torch.rand(3), np.random.normal(size=3), random.gauss(0, 1), random.random())
    assert torch.equal(first[0], again[0]) and (first[1] == again[1]).all() and first[2:] == again[2:]


def test_keeps_the_newest_and_ignores_torn_folders(tmp_path):
    for step in (5, 10, 15):
        save_checkpoint(tmp_path, step, {"w": torch.full((2,), float(step))}, {"n": step}, keep=2)
    (tmp_path / "step-000020.part").mkdir()
    assert [p.name for p in checkpoints(tmp_path)] == ["step-000010", "step-000015"]
    step, tensors, state = load_checkpoint(checkpoints(tmp_path)[-1])
    assert step == 15 and state == {"n": 15} and set(tensors) == {"w"} and tensors["w"].tolist() == [15.0, 15.0]


def test_tied_tensors_are_saved(tmp_path):
    w = torch.arange(4.0)
    save_checkpoint(tmp_path, 1, {"a": w, "b": w, "c": w.view(2, 2).T}, {})
    _, tensors, _ = load_checkpoint(tmp_path / "step-000001")
    assert torch.equal(tensors["a"], tensors["b"]) and torch.equal(tensors["c"], w.view(2, 2).T)


@pytest.mark.parametrize("name", ["state.json", "tensors.safetensors"])
def test_corrupt_checkpoint_is_named(tmp_path, name):
    folder = save_checkpoint(tmp_path, 1, {"w": torch.ones(2)}, {})
    (folder / name).write_bytes((folder / name).read_bytes()[:20])
    with pytest.raises(CheckpointError, match="step-000001.*delete it"):
        load_checkpoint(folder)
