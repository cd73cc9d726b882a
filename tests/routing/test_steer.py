"""STEER: the mixture, its posterior, and whose confidence counts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from roro_fast.errors import DataError
from roro_fast.routing.steer import Mixture, Steer, fit_mixture, step_confidence
from tests.routing.batches import batch

EVEN = Mixture((0.5, 0.5), (-2.0, 0.0), (1.0, 1.0))


def test_posterior_of_two_unit_gaussians_is_a_sigmoid() -> None:
    x = torch.tensor([-1.0, 0.0, -2.0])
    torch.testing.assert_close(EVEN.confident(x), torch.sigmoid(2 * x + 2))
    shifted = Mixture((0.25, 0.75), EVEN.mean, EVEN.std)
    torch.testing.assert_close(shifted.confident(x), torch.sigmoid(2 * x + 2 + math.log(3)))


def test_the_wider_component_wins_far_out() -> None:
    m = Mixture((0.5, 0.5), (-1.0, 0.0), (1.0, 0.1))
    density = [math.exp(-0.5 * 0.5**2) / 1.0, math.exp(-0.5 * 5.0**2) / 0.1]
    assert m.confident(torch.tensor([-0.5])).item() == pytest.approx(density[1] / sum(density), rel=1e-4)


def test_em_finds_the_components() -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate((rng.normal(-3, 0.5, 1200), rng.normal(0, 0.2, 2800)))
    m = fit_mixture(rng.permutation(x))
    np.testing.assert_allclose(m.weight, (0.3, 0.7), atol=0.02)
    np.testing.assert_allclose(m.mean, (-3, 0), atol=0.05)
    np.testing.assert_allclose(m.std, (0.5, 0.2), atol=0.03)
    with pytest.raises(DataError, match="calibrate"):
        fit_mixture(np.zeros(50))


def test_small_writes_while_confident() -> None:
    b = batch(3, mean_logprob=torch.tensor([-1.01, -0.99, 0.0]))
    assert Steer(EVEN, 0.5, "regenerate").decide(b).actions.tolist() == [1, 0, 0]
    assert Steer(EVEN, 0.9, "regenerate").decide(b).actions.tolist() == [1, 1, 1], "sigmoid(2) = 0.881"


def test_the_scout_speaks_for_steps_of_the_large_model() -> None:
    b = batch(3, mean_logprob=torch.tensor([0.0, -1.5, -0.1]), last_model=torch.tensor([-1, 0, 1]))
    b.scout_maxprob = torch.tensor([0.5, 0.5, 0.25])
    torch.testing.assert_close(step_confidence(b, "next"), torch.tensor([0.0, -1.5, math.log(0.25)]))
    torch.testing.assert_close(step_confidence(b, "regenerate"), b.mean_logprob)
    policy = Steer(EVEN)
    assert policy.needs_scout and not Steer(EVEN, action_space="regenerate").needs_scout
    assert policy.decide(b).actions.tolist() == [0, 1, 1]
