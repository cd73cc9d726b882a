"""Policy-guided routing: confidence features, the scout's where the step is not yet written."""

from __future__ import annotations

import torch

from roro_fast.routing.policy_guided import PolicyGuided
from roro_fast.routing.state import SIGNALS, signals
from tests.routing.batches import batch


def test_features_are_the_signals() -> None:
    b = batch(4)
    b.scout_entropy, b.scout_maxprob = torch.rand(4), torch.rand(4)
    policy = PolicyGuided()
    assert policy.needs_scout and not PolicyGuided("regenerate").needs_scout
    x = policy.features(b)
    assert x.shape == (4, len(SIGNALS)) and torch.equal(x, signals(b))
    assert torch.equal(x[:, SIGNALS.index("scout_entropy")], b.scout_entropy)


def test_the_threshold_moves_along_one_ranking() -> None:
    policy = PolicyGuided("regenerate", width=1)
    with torch.no_grad():
        policy.w1.zero_()
        policy.w1[0, SIGNALS.index("min_conf")] = 1.0
        policy.w2.fill_(1.0)
    b = batch(3, min_logprob=torch.tensor([0.2, 0.5, 0.8]).log())
    expected = torch.tensor([0.2, 0.5, 0.8]).tanh()
    torch.testing.assert_close(policy.score(b), expected)
    for cut, actions in ((0.1, [0, 0, 0]), (0.3, [1, 0, 0]), (0.5, [1, 1, 0]), (0.9, [1, 1, 1])):
        assert policy.at(cut).decide(b).actions.tolist() == actions
