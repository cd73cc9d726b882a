"""Training a process reward head: the fit, the AUC, and the command's record."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from roro_fast.config_io import load_config
from roro_fast.routing.probe import step_logits
from roro_fast.train.setup import Workbench
from roro_fast.train.train_prm import auc, fit_head, train


def test_auc_by_hand() -> None:
    score, right = np.array([0.9, 0.5, 0.5, 0.1]), np.array([True, True, False, False])
    assert auc(score, right) == pytest.approx((1 + 1 + 0.5 + 1) / 4)


def test_the_fit_finds_the_guilty_token() -> None:
    """A step is wrong iff one of its tokens has a large second input; offsets and scales must not matter."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 3, generator=g)
    step = torch.arange(2000) // 4
    bad = (x[:, 1].view(-1, 4) > 1.3).any(1)
    x = x * torch.tensor([1.0, 50.0, 1.0]) + torch.tensor([0.0, 300.0, 0.0])
    used = torch.arange(500) % 5 > 0
    lies = torch.where(used, ~bad, bad)  # what is not used must not be learned from
    weight, bias, loss = fit_head(x, step, lies, used)
    assert ((step_logits(x @ weight + bias, step, 500) > 0) == ~bad).float().mean() > 0.95 and loss < 0.25


def test_the_command_s_work(tmp_path: Path) -> None:
    record = train(Workbench(load_config("nano")), 0, tmp_path, n=60)
    assert record["calibrate"]["auc"] > 0.9 and record["body"] == "nano/small"
    assert json.loads((tmp_path / "prm.json").read_text())["calibrate"] == record["calibrate"]
    assert {p.name for p in tmp_path.iterdir()} == {"prm.json", "model.safetensors"}
