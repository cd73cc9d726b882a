"""Sizes that users reach and unit tests do not: ten thousand requests, one very long prompt among short ones."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from roro_fast.engine import Request, StepEngine
from roro_fast.models.config import DecoderConfig
from roro_fast.models.decoder import Decoder
from roro_fast.ops import native
from tests.engine import pairs
from tests.engine.pairs import Drawn, Planned, assert_clean, prompt, run

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
    settings = {"max_num_seqs": 8, "kv_bytes": 16 << 20, "max_batch_tokens": 512}
    limits = {"max_new_tokens": 40, "max_step_tokens": 4, "ignore_eos": True}
    long = Request(prompt(0, 8000), tag={"id": 0, "plan": [1, 0]}, **limits)
    short = [Request(prompt(i, 20), tag={"id": i, "plan": [0, 1]}, **limits) for i in range(1, 30)]
    order = [t.meta["id"] for t in StepEngine(models, pairs.tokenizer(), **settings).rollout([long, *short], Planned())]
    assert sorted(order) == list(range(30)) and order.index(0) >= 7
    alone = run(StepEngine(models, pairs.tokenizer(), **settings), [long], Planned())[0]
    together = run(StepEngine(models, pairs.tokenizer(), **settings), [long, *short], Planned())[0]
    assert together.token_ids == alone.token_ids and together.models == alone.models == [1, 0] * 5


def test_four_models_with_vocabularies_of_different_padding() -> None:
    models = [pairs.model_pair(i)[1] for i in range(4)]
    assert len({m.config.vocab_size for m in models}) == 4
    got = run(pairs.engine(models, max_num_seqs=6), pairs.requests(20, temperature=1.5), Drawn("next", True))
    assert {m for t in got.values() for m in t.models} == {0, 1, 2, 3}
    assert max(x for t in got.values() for x in t.token_ids) < len(pairs.tokenizer())


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
