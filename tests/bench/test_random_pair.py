"""Random models are the same in every process and end steps as often as they should."""

from __future__ import annotations

import statistics

import pytest
import torch

from bench.e2e import random_pair
from roro_fast.engine import Request, StepEngine


@pytest.mark.parametrize("size", ["tiny", "qwen3"])
def test_shapes(size: str) -> None:
    params = [random_pair.config_of(s).num_params for s in random_pair.SIZES[size]]
    assert params == sorted(params)
    if size == "qwen3":
        assert [round(p / 1e9, 1) for p in params] == [0.6, 8.2]


def test_engine_and_transformers_hold_equal_weights() -> None:
    spec = random_pair.SIZES["tiny"][2]
    ids = torch.randint(0, 512, (1, 30))
    ours, theirs = random_pair.decoder(spec, torch.float32, "cpu"), random_pair.hf_model(spec, torch.float32, "cpu")
    torch.testing.assert_close(ours.logits(ours.dense(ids)), theirs(ids).logits)
    again = random_pair.hf_model(spec, torch.float32, "cpu").state_dict()
    assert all(torch.equal(v, again[k]) for k, v in theirs.state_dict().items())
    assert not torch.equal(theirs.model.layers[0].mlp.up_proj.weight, theirs.model.layers[1].mlp.up_proj.weight)


@pytest.mark.parametrize("probability", [1 / 16, 1 / 4])
def test_steps_end_with_the_known_probability(probability: float) -> None:
    """Steps of sampled text are geometric: 1 / p tokens long on average."""
    spec = random_pair.SIZES["tiny"][1]
    model = random_pair.decoder(spec, torch.float32, "cpu")
    engine = StepEngine([model], random_pair.tokenizer(512, probability), max_num_seqs=32)
    requests = [Request([5 + i, 9], seed=i, max_new_tokens=200, max_steps=1 << 30, temperature=1.0) for i in range(48)]
    steps = [s for t in engine.rollout(requests) for s in t.steps if s.closed]
    ends = set(random_pair.delimiter_ids(512, probability))
    assert len(ends) == 512 * probability
    lengths = [s.end - s.start for s in steps]
    error = 4 * statistics.stdev(lengths) / len(lengths) ** 0.5
    assert statistics.mean(lengths) == pytest.approx(1 / probability, abs=error + 0.05 / probability)
