"""PPO: the loss by hand, dual ascent on the budget, and a short run that learns."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from transformers import AutoTokenizer

from roro_fast.engine import Request, StepEngine
from roro_fast.models import nano
from roro_fast.routing import Constant
from roro_fast.routing.policy_guided import PolicyGuided
from roro_fast.tasks.ledger import Ledger
from roro_fast.train.ppo import PPOConfig, PPOTrainer, ppo_loss

LIMITS = {"max_new_tokens": 128, "max_steps": 16}


def test_loss_of_clipped_ratios() -> None:
    logit = torch.zeros(4)  # new log-prob log 0.5 whoever is chosen
    large = torch.tensor([False, True, False, True])
    old = torch.tensor([0.25, 0.25, 1.0, 0.5]).log()  # ratios 2, 2, 0.5, 1
    advantages = torch.tensor([1.0, -1.0, 1.0, 3.0])  # gains 1.2 (clipped), -2, 0.5, 3
    value, returns = torch.tensor([1.0, 0, 0, 0]), torch.tensor([0.0, 0, 0, 2])
    loss = ppo_loss(logit, value, large, old, returns, advantages, PPOConfig(entropy=0.1, value=0.5))
    assert loss.item() == pytest.approx(-(1.2 - 2 + 0.5 + 3) / 4 + 0.5 * (1 + 4) / 4 - 0.1 * math.log(2))


@cache
def bench() -> tuple[StepEngine, tuple, dict[str, float]]:  # type: ignore[type-arg]
    tokenizer = AutoTokenizer.from_pretrained(nano.path("small"))
    engine = StepEngine(nano.load_pair(), tokenizer)
    prompts = tuple((q, tokenizer(q.prompt)["input_ids"]) for q in Ledger().queries("train", 48))
    requests = [Request(ids, query=q, policy=Constant(1, "all_large"), **LIMITS) for q, ids in prompts]  # type: ignore[arg-type]
    return engine, prompts, {t.query_id: t.cost.generated_flops for t in engine.rollout(requests)}


def trainer(config: PPOConfig) -> PPOTrainer:
    engine, prompts, costs = bench()
    return PPOTrainer(PolicyGuided("regenerate"), engine, Ledger(), prompts, costs, config, LIMITS, seed=1)


def test_the_multiplier_follows_the_budget() -> None:
    tight, loose = trainer(PPOConfig(steps=1, budget=0.2)), trainer(PPOConfig(steps=1, budget=0.95))
    for t in (tight, loose):
        t.train()
        spent = t.history[0]["cost_share"]
        assert t.multiplier == pytest.approx(0.3 + 0.5 * (spent - t.config.budget))
    assert tight.multiplier > 0.3 > loose.multiplier
    fixed = trainer(PPOConfig(steps=1))
    fixed.train()
    assert fixed.multiplier == 0.3 and fixed.history == [{**tight.history[0]}], "same seed, same round"


def test_rounds_learn_to_pay_for_wrong_drafts_only() -> None:
    t = trainer(PPOConfig(steps=10, queries_per_step=32))
    t.train()
    reward = [h["outcome"] - 0.3 * h["cost_share"] for h in t.history]
    assert sum(reward[-3:]) / 3 > sum(reward[:3]) / 3 + 0.02
    again = trainer(PPOConfig(steps=10, queries_per_step=32))
    assert torch.equal(again.train().w1, t.policy.w1), "repeatable"
