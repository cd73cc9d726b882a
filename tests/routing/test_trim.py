"""TRIM-Thr's rule and what TRIM-Agg sees, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from roro_fast.errors import ConfigError
from roro_fast.routing.scoring import METER, rate
from roro_fast.routing.trim import AGGREGATE, TrimAgg, TrimThr, aggregate
from tests.routing.batches import Written, batch, traced


def test_thr_rewrites_what_scores_below() -> None:
    out = TrimThr(Written(), 0.5).decide(traced("0.9|0.49", "0.1|0.5", "0.7"))
    assert out.actions.tolist() == [1, 0, 0], "the draft alone counts, and 0.5 is not below 0.5"
    assert out.features is not None
    torch.testing.assert_close(out.features, torch.tensor([[0.49], [0.5], [0.7]]))
    assert TrimThr(Written(), 0.5).at(0.95).decide(traced("0.94", "0.96")).actions.tolist() == [1, 0]


def test_agg_sees_the_draft_the_past_and_the_position() -> None:
    x = aggregate([(0.5, 0.8, 0.9), (0.25,)], torch.tensor([6, 2]), 16)
    assert len(AGGREGATE) == 5
    torch.testing.assert_close(x[0], torch.tensor([0.9, 0.5, math.log(0.4), math.log(7), 2 / 16]))
    torch.testing.assert_close(x[1], torch.tensor([0.25, 1.0, 0.0, math.log(3), 0.0]))


def test_agg_decides_by_its_network() -> None:
    policy = TrimAgg(Written(), width=1)
    with torch.no_grad():
        policy.w1.copy_(torch.tensor([[1.0, 0, 0, 0, 0]]))
        policy.w2.fill_(2.0)
        policy.b2.fill_(-1.0)
    b = traced("0.54", "0.56", "0.1|0.9")  # 2 tanh(r) - 1 crosses zero at r = artanh(0.5) = 0.549
    out = policy.decide(b)
    assert out.actions.tolist() == [1, 0, 0]
    torch.testing.assert_close(policy.score(b), 2 * torch.tensor([0.54, 0.56, 0.9]).tanh() - 1)


def test_scoring_is_charged_to_the_request() -> None:
    b = traced("0.5", "0.5|0.5", "0.5|0.5|0.5", actions=[[], [0], [0, 1]])
    rate(Written(), b)
    assert [t[METER]["flops"] for t in b.tags] == [10, 10, 20], "the draft, and the step that replaced a draft"
    rate(Written(), b)
    assert [t[METER]["tokens"] for t in b.tags] == [2, 2, 4]
    with pytest.raises(ConfigError, match=r"Request\.query"):
        TrimThr(Written()).decide(batch(2))
