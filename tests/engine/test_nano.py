"""The exactness contract on the packaged pair: trained models, real questions, real step boundaries."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from roro_fast.engine import Request, StepEngine
from roro_fast.models import nano
from roro_fast.tasks.ledger import Ledger
from tests.engine import pairs
from tests.engine.pairs import Constant, Drawn, Planned, audit, run

QUERIES = Ledger().queries("test", 12)


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(nano.path("large"))


def nano_engine(**settings: Any) -> StepEngine:
    defaults: dict[str, Any] = {"max_num_seqs": 16, "kv_bytes": 8 << 20}
    return StepEngine(nano.load_pair(), tokenizer(), **(defaults | settings))


def questions(**settings: Any) -> list[Request]:
    return [
        Request(
            tokenizer()(q.prompt).input_ids, query=q, max_new_tokens=200, tag={"id": i, "plan": [0, 1, 1]}, **settings
        )
        for i, q in enumerate(QUERIES)
    ]


@pytest.mark.parametrize("m", [0, 1])
def test_one_model_equals_hugging_face_greedy(m: int) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(nano.path(nano.SIZES[m]), dtype=torch.float32)
    got = run(nano_engine(), questions(), Constant(m))
    for r in questions():
        ids = torch.tensor([r.prompt_ids])
        with torch.no_grad():
            out = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=200, do_sample=False)
        assert got[r.tag["id"]].token_ids == out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("space", ["next", "regenerate"])
def test_routed_answers_are_audited_and_verified(space: str) -> None:
    e = nano_engine()
    for t in run(e, questions(), Drawn(space, True)).values():
        audit(e, t, greedy=True)
        assert t.finish_reason == "eos" and all(s.closed for s in t.steps)
        outcome = Ledger().verify(QUERIES[t.meta["id"]], t.step_texts)
        assert outcome.steps is not None and len(outcome.steps) <= len(t.steps)
    right = [Ledger().verify(QUERIES[i], t.step_texts).correct for i, t in run(e, questions(), Constant(1)).items()]
    assert sum(right) >= 9


@pytest.mark.parametrize("space", ["next", "regenerate"])
def test_memory_and_batching_change_nothing(space: str) -> None:
    policy = Planned(space, True)
    want = run(nano_engine(max_num_seqs=1), questions(), policy)
    pages = 240 * max(m.config.kv_bytes_per_token(4) for m in nano.load_pair())
    e = nano_engine(kv_bytes=pages, page_size=4, max_batch_tokens=24)
    for i, t in run(e, questions(), policy).items():
        pairs.assert_same(t, want[i])
    assert e.kv.stats.idle_drops + e.kv.stats.preemptions > 0
