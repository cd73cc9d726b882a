"""GRPO: advantages by hand, gradient, clipping, the pull to the reference."""

from __future__ import annotations

import pytest
import torch

from roro_fast.train.grpo import group_advantages, grpo_loss


def test_group_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0.0], [0.5, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(group_advantages(rewards, eps=1e-12).tolist(), [[1.0, -1.0], [0.0, 0.0]])
    assert group_advantages(rewards, "none").tolist() == [[0.5, -0.5], [0, 0]]
    torch.testing.assert_close(group_advantages(rewards, "batch", eps=0.0), (rewards - 0.5) / 0.125**0.5)
    assert group_advantages(torch.tensor([[2.0], [3.0]])).tolist() == [[0.0], [0.0]]


def test_scaling_by_group_blows_up_small_differences_and_by_batch_does_not():
    rewards = torch.tensor([[1.0, 0.0], [0.51, 0.49]])
    by_group, by_batch = group_advantages(rewards), group_advantages(rewards, "batch")
    assert by_group[1, 0] > 0.9 and by_batch[1, 0] < 0.05 and by_batch[0, 0] > 1


def test_without_weights_all_actions_count_alike():
    logp, old, advantage, ref = torch.randn(4, 5)
    weighted, plain = (grpo_loss(logp, old, advantage, w, reference=ref, kl=0.3) for w in (torch.full((5,), 0.2), None))
    torch.testing.assert_close(torch.tensor(weighted), torch.tensor(plain))


def test_grpo_on_policy_gradient_is_reinforce():
    logp = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    advantage, weight = torch.tensor([1.0, -1.0, 0.5]), torch.tensor([0.25, 0.25, 0.5])
    out = grpo_loss(logp, logp.detach(), advantage, weight, kl=0.0)
    out.loss.backward()
    torch.testing.assert_close(logp.grad, -advantage * weight)
    assert out.clipped == 0 and out.kl == 0


@pytest.mark.parametrize(
    ("ratio", "advantage", "moves"),
    [
        (1.27, 1.0, True),
        (1.29, 1.0, False),
        (0.7, 1.0, True),
        (0.81, -1.0, True),
        (0.79, -1.0, False),
        (1.4, -1.0, True),
    ],
)
def test_grpo_clips_asymmetrically(ratio, advantage, moves):
    logp = torch.tensor([ratio]).log().requires_grad_()
    out = grpo_loss(logp, torch.zeros(1), torch.tensor([advantage]), torch.ones(1), kl=0.0)
    out.loss.backward()
    assert bool(logp.grad.abs() > 0) is moves and (out.clipped > 0) is not moves


def test_grpo_kl_pulls_to_the_reference():
    logp = torch.tensor([-1.0, -3.0], requires_grad=True)
    ref = torch.tensor([-2.0, -2.0])
    zero, half = torch.zeros(2), torch.full((2,), 0.5)
    out = grpo_loss(logp, logp.detach(), zero, half, reference=ref, kl=0.1)
    d = ref - logp.detach()
    assert out.kl == pytest.approx((0.5 * (d.exp() - d - 1)).sum().item())
    out.loss.backward()
    assert logp.grad[0] > 0 > logp.grad[1]  # descending lowers the first log-prob and raises the second
