"""Operating points on the packaged pair: anchors, settings kept apart, calibration to a budget."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from roro_fast.engine import StepEngine
from roro_fast.eval.sweep import Runner, at_bias, baseline_settings, calibrate, learned_settings
from roro_fast.models import nano
from roro_fast.routing import PolicyConfig, PolicyNetwork, RandomRouter
from roro_fast.routing.state import SIGNALS
from roro_fast.tasks.ledger import Ledger

LIMITS = {"max_new_tokens": 128, "max_steps": 16}


@cache
def runner(n: int = 24) -> Runner:
    tokenizer = AutoTokenizer.from_pretrained(nano.path("small"))
    engine = StepEngine(nano.load_pair(), tokenizer)
    prompts = [(q, tokenizer(q.prompt)["input_ids"]) for q in Ledger().queries("calibrate", n)]
    return Runner(engine, Ledger(), prompts, LIMITS)


def confident() -> PolicyNetwork:
    """A router that likes the large model the more, the less sure the draft's least token is."""
    policy = PolicyNetwork(PolicyConfig(width=1, action_space="regenerate"), temperature=0.0)
    with torch.no_grad():
        policy.w1.zero_()
        policy.w1[0, SIGNALS.index("min_conf")] = -8.0
        policy.b1.fill_(8.0)
        policy.w2.copy_(torch.tensor([[0.0], [1.0]]))
    return policy


def test_anchors_and_oracle() -> None:
    r = runner()
    small, large, oracle = (r.run(a, baseline_settings(a, r.task, 2))[0] for a in ("all_small", "all_large", "oracle"))
    assert small.correct.mean() < large.correct.mean() == 1.0
    assert (small.large_tokens == 0).all() and (large.large_tokens == large.tokens).all()
    assert oracle.correct.mean() == 1.0 and oracle.generated_flops.mean() < 0.4 * large.generated_flops.mean()
    assert oracle.discarded.sum() > 0


def test_settings_in_one_batch_equal_settings_alone() -> None:
    """Answers and costs of a point must not depend on what shares the engine's batch and caches."""
    r = runner()
    settings = [(p, RandomRouter(p)) for p in (0.2, 0.5, 0.8)]
    together = r.run("random", settings, seed=3)
    for setting, point in zip(settings, together, strict=True):
        for m in range(2):
            r.engine.kv.clear_prefixes(m)
        alone = r.run("random", [setting], seed=3)[0]
        for field in ("correct", "generated_flops", "total_flops", "tokens", "discarded"):
            assert np.array_equal(getattr(alone, field), getattr(point, field)), field
    assert (
        not np.array_equal(together[0].tokens, together[2].tokens) or (together[0].correct != together[2].correct).any()
    )
    assert not np.array_equal(r.run("random", settings[1:2], seed=4)[0].generated_flops, together[1].generated_flops)


def test_calibration_meets_its_budgets_and_a_request_can_ask_for_one() -> None:
    r, policy = runner(), confident()
    large = r.run("all_large", baseline_settings("all_large", r.task, 2))[0]
    flops = dict(zip(large.query_ids, large.generated_flops.tolist(), strict=True))
    budgets = [0.2, 0.35, 0.6]
    sweep = calibrate(policy, r, flops, budgets)
    assert len(sweep) > 5 and [b for b, _ in policy.config.calibration] == budgets
    shares = []
    for budget in budgets:
        bias = float(policy.budget_bias(torch.tensor([budget]))[0])
        point = r.run("roro", learned_settings(policy, [bias]))[0]
        shares.append(float((point.generated_flops / large.generated_flops).mean()))
    assert shares == pytest.approx(budgets, abs=0.08)
    asked = Runner(r.engine, r.task, r.prompts, {**LIMITS, "budget": 0.35}).run("roro", [(0.0, policy)])[0]
    assert float((asked.generated_flops / large.generated_flops).mean()) == pytest.approx(shares[1], abs=1e-9)


def test_a_biased_view_shares_the_weights() -> None:
    policy = confident()
    policy.standardize(torch.rand(50, len(SIGNALS)))
    view = at_bias(policy, 2.0)
    features = torch.rand(5, len(SIGNALS))
    assert torch.equal(view.logits(features), policy.logits(features))
    assert view.w1 is policy.w1 and view.bias == 2.0 and policy.bias == 0.0
