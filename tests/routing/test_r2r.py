"""Token-level routing: what the router sees, how it learns, and an engine that asks it at every token."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

from roro_fast.engine import Request, StepEngine
from roro_fast.errors import ConfigError
from roro_fast.models import nano
from roro_fast.routing.r2r import R2R, fit
from roro_fast.tasks.ledger import Ledger
from roro_fast.train.rollout import reasoning_steps, verify
from tests.routing.batches import batch


def entropy_router(threshold: float) -> R2R:
    """Large model iff the scout's entropy exceeds the threshold."""
    router = R2R(32, width=1)
    with torch.no_grad():
        router.w1.zero_()
        router.w1[0, 32] = 1e-3  # tanh is straight down here
        router.w2.fill_(-1e3)
    return router.at(-threshold)


def test_the_state_and_the_next_token_are_the_features() -> None:
    b = batch(2, hidden=3)
    b.scout_entropy, b.scout_maxprob = torch.tensor([0.1, 2.0]), torch.tensor([0.9, 0.2])
    x = R2R(3).features(b)
    assert b.hidden is not None and torch.equal(x[:, :3], b.hidden)
    assert torch.equal(x[:, 3], b.scout_entropy) and torch.equal(x[:, 4], b.scout_maxprob)
    b32 = batch(2, hidden=32)
    b32.scout_entropy, b32.scout_maxprob = b.scout_entropy, b.scout_maxprob
    assert entropy_router(1.0).decide(b32).actions.tolist() == [0, 1]
    with pytest.raises(ConfigError, match="scout"):
        R2R(3).decide(batch(1))


def test_fitting_separates_rare_divergent_tokens() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3000, 6, generator=g)
    divergent = x[:, 2] > 1.6  # about one token in twenty
    router = R2R(4, width=8)
    fit(router, x, divergent)
    with torch.no_grad():
        called = router.logit(x) < 0
    assert called[divergent].float().mean() > 0.9 and called[~divergent].float().mean() < 0.1


def test_the_engine_routes_every_token_and_counts_every_forward() -> None:
    tokenizer = AutoTokenizer.from_pretrained(nano.path("small"))
    engine, task = StepEngine(nano.load_pair(), tokenizer), Ledger()
    queries = {q.id: q for q in task.queries("calibrate", 16)}
    router = entropy_router(0.05)
    requests = [
        Request(tokenizer(q.prompt)["input_ids"], query=q, max_new_tokens=128, max_steps=128, max_step_tokens=1)
        for q in queries.values()
    ]
    done = [verify(t, queries[t.query_id], task) for t in engine.rollout(requests, router)]
    assert {m for t in done for m in t.models} == {0, 1}
    assert sum(bool(t.correct) for t in done) > len(done) / 2, "numbers are where the small model is unsure"
    for t in done:
        n = len(t.token_ids)
        assert len(t.steps) == len(t.decisions) == n and all(s.end - s.start == 1 for s in t.steps)
        texts, owner = reasoning_steps(t)
        assert "".join(texts) == "".join(t.step_texts) and len(owner) == n
        assert all(text.endswith("\n\n") for text in texts[:-1])
        assert t.step_correct is not None and len(t.step_correct) == n
        assert t.cost.generated_tokens == [t.models.count(0), t.models.count(1)]
        last = max((i for i, m in enumerate(t.models) if m), default=-1)
        caught_up = len(t.prompt_ids) + last if last >= 0 else 0
        assert t.cost.forward_tokens == [len(t.prompt_ids) + n - 1, caught_up], "the scout sees every token"
        assert t.cost.discarded_tokens == 0
