"""GlimpRouter: the entropy of the first token, glimpsed or drafted."""

from __future__ import annotations

import pytest
import torch

from roro_fast.errors import ConfigError
from roro_fast.routing.glimp import GlimpRouter
from tests.routing.batches import batch


def test_a_glimpse_of_high_entropy_calls_the_large_model() -> None:
    b = batch(3, first_entropy=torch.tensor([9.0, 0.0, 0.0]))
    b.scout_entropy = torch.tensor([0.9, 1.0, 1.1])
    policy = GlimpRouter(tau=1.0)
    assert policy.needs_scout and policy.decide(b).actions.tolist() == [0, 0, 1], "the scout's entropy, above tau"
    torch.testing.assert_close(policy.score(b), torch.tensor([-0.9, -1.0, -1.1]))


def test_regenerate_judges_the_draft_s_own_first_token() -> None:
    b = batch(3, first_entropy=torch.tensor([0.2, 0.4, 0.3]))
    policy = GlimpRouter(0.3, "regenerate")
    assert not policy.needs_scout and policy.decide(b).actions.tolist() == [0, 1, 0]


def test_misuse() -> None:
    with pytest.raises(ConfigError, match=r"glimp_router\.action_space"):
        GlimpRouter(action_space="rewrite")
    with pytest.raises(ConfigError, match="scout"):
        GlimpRouter().decide(batch(1))
