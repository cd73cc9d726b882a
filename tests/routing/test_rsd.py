"""RSD's three weightings of a process reward."""

from __future__ import annotations

import pytest
import torch

from roro_fast.errors import ConfigError
from roro_fast.routing.rsd import RSD
from roro_fast.routing.trim import TrimThr
from tests.routing.batches import Written, traced


def test_accept_from_the_threshold_on() -> None:
    b = traced("0.69", "0.7", "0.2|0.71")
    assert RSD(Written()).decide(b).actions.tolist() == [1, 0, 0]
    assert torch.equal(RSD(Written()).decide(b).actions, TrimThr(Written(), 0.7).decide(b).actions)


def test_clip_accepts_with_the_reward_as_probability() -> None:
    out = RSD(Written(), weight="clip").decide(traced("0.7", "0.7", "0.0", uniforms=torch.tensor([0.29, 0.31, 0.99])))
    assert out.actions.tolist() == [1, 0, 1]
    torch.testing.assert_close(out.probs, torch.tensor([[0.7, 0.3], [0.7, 0.3], [0.0, 1.0]]))


def test_sigmoid_never_trusts_fully() -> None:
    out = RSD(Written(), weight="sigmoid").decide(traced("1.0", uniforms=torch.tensor([0.26])))
    assert out.actions.tolist() == [1] and out.probs[0, 0].item() == pytest.approx(0.7310586)
    with pytest.raises(ConfigError, match=r"rsd\.weight"):
        RSD(Written(), weight="square")
