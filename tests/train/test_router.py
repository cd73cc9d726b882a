"""Router GRPO on really routed answers of the packaged pair."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from roro_fast.config import RouterConfig
from roro_fast.engine import Cost, Decision, Request, StepEngine, Trajectory
from roro_fast.models import nano
from roro_fast.routing import Constant, PolicyConfig, PolicyNetwork
from roro_fast.tasks.ledger import Ledger
from roro_fast.train.rewards import ProcessReward
from roro_fast.train.router import DecisionBatch, RouterTrainer, decision_loss

LIMITS: dict[str, Any] = {"max_new_tokens": 128, "max_steps": 16}


@cache
def world() -> tuple[StepEngine, list, dict[str, float]]:
    tokenizer = AutoTokenizer.from_pretrained(nano.path("small"))
    engine = StepEngine(nano.load_pair(), tokenizer)
    prompts = [(q, tokenizer(q.prompt)["input_ids"]) for q in Ledger().queries("train", 24)]
    requests = [Request(ids, query=q, policy=Constant(1, "large"), **LIMITS) for q, ids in prompts]
    return engine, prompts, {t.query_id: t.cost.generated_flops for t in engine.rollout(requests)}


def trainer(process: ProcessReward | None = None, seed: int = 0, **changes: Any) -> RouterTrainer:
    engine, prompts, large = world()
    settings = {"action_space": "regenerate", "queries_per_step": 4, "group_size": 4, "lr": 1e-2, "beta": 0.3}
    config = RouterConfig(**{**settings, **changes})
    hidden = engine.models[0].config.hidden_size
    policy = PolicyNetwork(PolicyConfig(hidden_size=hidden, width=16, action_space=config.action_space), seed=seed)
    return RouterTrainer(policy, engine, Ledger(), prompts, large, config, process, LIMITS, seed)


def decisions(n: int = 6) -> tuple[torch.Tensor, DecisionBatch]:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(n, 2, generator=g)
    actions = torch.tensor([0, 1] * (n // 2))
    logprobs = torch.log_softmax(logits, -1).gather(1, actions[:, None]).squeeze(1)
    advantages = torch.tensor([1.0, -1.0, 0.5, 2.0, -0.5, 0.0])
    return logits, DecisionBatch(torch.zeros(n, 1), actions, logprobs, advantages)


def test_loss_on_policy_is_minus_the_mean_advantage() -> None:
    logits, b = decisions()
    loss, stats = decision_loss(logits, b, 0.2, 0.28, entropy=0.0, kl=0.0)
    assert loss.item() == pytest.approx(-b.advantages.mean().item(), abs=1e-6)
    assert stats["kl"] == pytest.approx(0, abs=1e-6) and stats["clip_fraction"] == 0


def test_clipping_is_asymmetric_and_stops_the_gradient() -> None:
    logits, b = decisions()
    for ratio, advantage, moved in ((1.25, 1.0, True), (1.3, 1.0, False), (0.85, -1.0, True), (0.75, -1.0, False)):
        one = DecisionBatch(b.features[:1], b.actions[:1], b.logprobs[:1] - math.log(ratio), torch.tensor([advantage]))
        x = logits[:1].clone().requires_grad_()
        decision_loss(x, one, 0.2, 0.28, 0.0, 0.0)[0].backward()
        assert x.grad is not None and bool(x.grad.abs().sum() > 1e-6) is moved, (ratio, advantage)


def test_entropy_and_kl_terms() -> None:
    logits, b = decisions()
    p = torch.softmax(logits, -1)
    h = -(p * p.log()).sum(-1).mean().item()
    base = decision_loss(logits, b, 0.2, 0.28, 0.0, 0.0)[0].item()
    assert decision_loss(logits, b, 0.2, 0.28, 0.5, 0.0)[0].item() == pytest.approx(base - 0.5 * h, abs=1e-6)
    off = DecisionBatch(b.features, b.actions, b.logprobs - 0.1, b.advantages * 0)
    k3 = math.exp(-0.1) + 0.1 - 1
    assert decision_loss(logits, off, 0.2, 0.28, 0.0, 2.0)[0].item() == pytest.approx(2 * k3, abs=1e-5)


def test_only_decisions_are_trained_on_and_each_carries_its_trajectorys_advantage() -> None:
    def of(n: int) -> Trajectory:
        rows = [Decision(i, i % 2, -0.5 - i, [0.5, 0.5], features=[float(n), float(i)]) for i in range(n)]
        return Trajectory("q", [1], [2] * 50, [], rows, Cost(), "eos")

    b = DecisionBatch.of([of(2), of(0), of(3)], torch.tensor([1.0, 9.0, -2.0]))
    assert b.advantages.tolist() == [1, 1, -2, -2, -2]
    assert b.features.tolist() == [[2, 0], [2, 1], [3, 0], [3, 1], [3, 2]]
    assert b.actions.tolist() == [0, 1, 0, 1, 0]


def test_a_step_reports_both_rewards_apart_and_repeats() -> None:
    class Cheap:
        name = "cheap"

        def score(self, trajectories: Any) -> np.ndarray:
            return np.array([1 - 2 * np.mean(t.models) for t in trajectories], np.float32)

    first = [trainer(Cheap()).train_step() for _ in range(2)]
    assert first[0] == first[1]
    m = first[0]
    assert m["reward"] == pytest.approx(m["outcome"] - 0.3 * m["cost_share"] + 0.3 * m["process"], abs=1e-6)
    assert trainer(Cheap(), seed=1).train_step() != m


def test_resumed_training_is_bit_identical() -> None:
    whole = trainer()
    history = [whole.train_step() for _ in range(4)]
    part = trainer()
    before = [part.train_step() for _ in range(2)]
    saved, step = part.tensors(), part.step
    again = trainer(seed=0)
    again.load_tensors(saved, step)
    assert before + [again.train_step() for _ in range(2)] == history
    for k, v in whole.tensors().items():
        assert torch.equal(v, again.tensors()[k]), k


def test_an_epoch_visits_every_query_once() -> None:
    t = trainer(queries_per_step=5)
    seen: list[str] = []
    for t.step in range(4):
        ids = {r.query.id for r in t._requests() if r.query}
        assert len(ids) == 5
        seen += ids
    assert len(set(seen)) == 20
    t.step = 4
    assert {r.seed for r in t._requests()}.isdisjoint({r.seed for r in trainer(queries_per_step=5)._requests()})


def test_training_learns_to_be_cheap_when_cost_is_all() -> None:
    t = trainer(lambda_cost=5.0, lr=3e-2)
    first = t.train_step()["large_share"]
    for _ in range(7):
        last = t.train_step()["large_share"]
    assert last < 0.6 * first
