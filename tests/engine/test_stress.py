"""Sizes that users reach and unit tests do not: ten thousand requests, one very long prompt among short ones."""

from __future__ import annotations

import copy
import time
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from roro_fast.engine import Request, RoutingPolicy, StepEngine
from roro_fast.models.config import DecoderConfig
from roro_fast.models.decoder import Decoder
from roro_fast.ops import native
from tests.engine import pairs
from tests.engine.pairs import Constant, Drawn, Planned, assert_clean, prompt, run

pytestmark = pytest.mark.timeout(240)


def decoder(context: int, seed: int, layers: int = 1) -> Decoder:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(pairs.tokenizer()), hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=context, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    return Decoder(DecoderConfig.from_hf(config)).eval().requires_grad_(False)


def test_ten_thousand_queued_requests() -> None:
    e = pairs.engine([pairs.model_pair(i)[1] for i in (0, 1)], max_num_seqs=256, kv_bytes=32 << 20)
    policy = Drawn("next")
    for i in range(10_000):
        e.add(Request(prompt(i % 97, 1 + i % 7), seed=i, temperature=1.0, max_new_tokens=3, tag={"id": i}), policy)
    done = [t.meta["id"] for _ in range(20_000) if e.has_work for t in e.step()]
    assert sorted(done) == list(range(10_000))
    assert_clean(e)


def test_one_long_prompt_does_not_hold_up_the_short_ones() -> None:
    """8,000 tokens are run in chunks beside the others' decode rows, and come out as they would alone."""
    models = [decoder(8192, 1), decoder(8192, 2, layers=2)]
    settings: dict[str, Any] = {"max_num_seqs": 8, "kv_bytes": 16 << 20, "max_batch_tokens": 512}
    limits: dict[str, Any] = {"max_new_tokens": 40, "max_step_tokens": 4, "ignore_eos": True}
    long = Request(prompt(0, 8000), tag={"id": 0, "plan": [1, 0]}, **limits)
    short = [Request(prompt(i, 20), tag={"id": i, "plan": [0, 1]}, **limits) for i in range(1, 30)]
    order = [t.meta["id"] for t in StepEngine(models, pairs.tokenizer(), **settings).rollout([long, *short], Planned())]
    assert sorted(order) == list(range(30)) and order.index(0) >= 7
    cold = StepEngine(models, pairs.tokenizer(), **(settings | {"max_num_seqs": 1, "max_batch_tokens": 8192}))
    alone = run(cold, [long], Planned())[0]
    assert cold.kv.stats.hit_tokens == 0, "every token of it computed, the prompt in one piece"
    together = run(StepEngine(models, pairs.tokenizer(), **settings), [long, *short], Planned())[0]
    pairs.assert_same(together, alone)
    assert together.models == [1, 0] * 5 and (together.steps == alone.steps or not native.available())


def test_four_models_with_vocabularies_of_different_padding() -> None:
    """Padding that would win every draw, were it looked at: every token is what its writer's cold prefill says."""
    models = [copy.deepcopy(pairs.model_pair(i)[1]) for i in range(4)]
    assert len({m.config.vocab_size for m in models}) == 4
    size = len(pairs.tokenizer())
    for m in models:
        for row in m.head.weight.data[size:]:
            row.copy_(m.head.weight.data[:size].norm(dim=1).max() * torch.sign(torch.randn(len(row))))
    assert any(int(pairs.cold_logits(m, prompt(1, 9))[-1].argmax()) >= size for m in models)
    for greedy in (True, False):
        e = pairs.engine(models, max_num_seqs=6)
        got = run(e, pairs.requests(20, temperature=0.0 if greedy else 1.5), Drawn("next", True))
        assert {m for t in got.values() for m in t.models} == {0, 1, 2, 3}
        assert max(x for t in got.values() for x in t.token_ids) < size
        for t in got.values():
            pairs.audit(e, t, greedy=greedy)


def beginning_with(token: int, ids: list[int]) -> list[Decoder]:
    """Two models whose greedy answer to `ids` begins with `token`."""
    models = [copy.deepcopy(pairs.model_pair(i)[1]) for i in (0, 1)]
    for m in models:
        first = int(pairs.cold_logits(m, ids)[-1, : len(pairs.tokenizer())].argmax())
        m.head.weight.data[[token, first]] = m.head.weight.data[[first, token]]
    return models


POLICIES = [None, Constant(1), Drawn("next", True), Drawn("regenerate"), Drawn("regenerate", True)]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p and f"{p.name}-{p.action_space}-{p.needs_scout}")
def test_a_stop_before_the_first_token(policy: RoutingPolicy | None) -> None:
    """EOS at once: an empty answer in one closed step, beside others that go on."""
    ids = prompt(4, 21)
    e = pairs.engine(beginning_with(2, ids), max_num_seqs=4)
    stops = [Request(ids, sample=i, max_new_tokens=20, tag={"id": i}) for i in range(5)]
    others = [Request(prompt(90 + i, 9), max_new_tokens=8, ignore_eos=True, tag={"id": 5 + i}) for i in range(3)]
    done = run(e, [*stops, *others], policy)
    assert len(done) == 8 and all(len(done[i].token_ids) == 8 for i in (5, 6, 7))
    for i in range(5):
        t = done[i]
        assert (t.token_ids, t.step_texts, t.finish_reason) == ([2], [""], "eos")
        assert [(s.start, s.end, s.closed) for s in t.steps] == [(0, 1, True)]
        assert len(t.decisions) == (policy is not None) and sum(t.cost.generated_tokens) == 1
    assert e.kv.leaked_pages() == 0


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p and f"{p.name}-{p.action_space}-{p.needs_scout}")
def test_a_delimiter_as_the_first_token(policy: RoutingPolicy | None) -> None:
    """The first step is the blank line alone; with one step allowed it is the whole answer."""
    (blank,), ids = pairs.tokenizer()("\n\n", add_special_tokens=False)["input_ids"], prompt(4, 21)
    e = pairs.engine(beginning_with(blank, ids), max_num_seqs=4)
    rows = [Request(ids, sample=i, max_new_tokens=12, max_steps=1 + 63 * i, tag={"id": i}) for i in range(2)]
    for t in run(e, rows, policy).values():
        assert t.token_ids[0] == blank and t.step_texts[0] == "\n\n"
        assert (t.steps[0].start, t.steps[0].end, t.steps[0].closed) == (0, 1, True)
        if t.meta["id"] == 0:
            assert t.token_ids == [blank] and t.finish_reason == "steps"
        else:
            assert t.finish_reason in ("eos", "length") and len(t.token_ids) > 1
    assert e.kv.leaked_pages() == 0


@pytest.mark.skipif(not native.available(), reason="needs the C++ kernels")
def test_host_work_per_iteration_hardly_grows_with_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode iterations of 8 and of 64 sequences, the models' own time taken out: arrays, not loops over sequences."""

    inside = 0.0
    op = native.op

    def timed(name: str):
        real = op(name)

        def call(*args):
            nonlocal inside
            start = time.perf_counter()
            out = real(*args)
            inside += time.perf_counter() - start
            return out

        return call

    def host_seconds(n: int) -> float:
        nonlocal inside
        e = pairs.engine([pairs.model_pair(0)[1]], max_num_seqs=n, kv_bytes=32 << 20)
        for i in range(n):
            e.add(Request(prompt(i, 8), max_new_tokens=100, ignore_eos=True, tag={"id": i}))
        e.step()
        best = np.inf
        for _ in range(60):
            start, inside = time.perf_counter(), 0.0
            e.step()
            best = min(best, time.perf_counter() - start - inside)
        return best

    monkeypatch.setattr(native, "op", timed)
    few, many = host_seconds(8), host_seconds(64)
    assert many - few < 56 * 0.4e-6, (few, many)  # a few C++ instructions a row; a line of Python takes longer
