"""Exploration with stored scores, and the network that learned baselines share."""

from __future__ import annotations

import torch

from roro_fast.routing.policy_guided import PolicyGuided
from roro_fast.routing.r2r import R2R
from roro_fast.routing.state import SIGNALS
from roro_fast.routing.threshold import Explore
from roro_fast.routing.trim import TrimThr
from tests.routing.batches import Written, batch, traced


def test_exploring_tosses_a_coin_and_keeps_the_score() -> None:
    out = Explore(TrimThr(Written(), 0.0)).decide(traced("0.1", "0.9", uniforms=torch.tensor([0.6, 0.4])))
    assert out.actions.tolist() == [0, 1] and out.probs.tolist() == [[0.5, 0.5]] * 2
    assert out.features is not None
    torch.testing.assert_close(out.features, torch.tensor([[0.1], [0.9]]))
    wrapped = Explore(R2R(4))
    assert wrapped.step_tokens == 1 and wrapped.needs_scout and wrapped.action_space == "next"


def test_an_untrained_network_is_a_fair_coin() -> None:
    b = batch(2, uniforms=torch.tensor([0.49, 0.51]))
    policy = PolicyGuided("regenerate").at(0.0, sample=True)
    out = policy.decide(b)
    assert out.actions.tolist() == [1, 0] and out.probs.tolist() == [[0.5, 0.5]] * 2
    assert torch.equal(policy.value(policy.features(b)), torch.zeros(2))


def test_sampling_follows_the_logit() -> None:
    policy = PolicyGuided("regenerate")
    with torch.no_grad():
        policy.b2.fill_(1.0)
    b = batch(2, uniforms=torch.tensor([0.26, 0.27]))  # p(large) = sigmoid(-1) = 0.2689
    out = policy.at(0.0, sample=True).decide(b)
    assert out.actions.tolist() == [1, 0]
    torch.testing.assert_close(out.logprobs, torch.tensor([0.268941, 0.731059]).log())
    assert policy.decide(b).actions.tolist() == [0, 0] and policy.at(1.5).decide(b).actions.tolist() == [1, 1]


def test_views_share_weights_and_standardisation_leaves_constants_out() -> None:
    policy = PolicyGuided("regenerate")
    view = policy.at(3.0)
    assert view.w1 is policy.w1 and policy.threshold == 0.0
    x = torch.rand(50, len(SIGNALS))
    x[:, 3] = 7.0
    policy.standardize(x)
    y = (x - policy.shift) / policy.scale
    torch.testing.assert_close(y.std(0, correction=0)[4:], torch.ones(len(SIGNALS) - 4))
    assert y[:, 3].abs().max() == 0
