"""LM training: losses against direct formulas, what an update reaches."""

from __future__ import annotations

import pytest
import torch

from roro_fast.engine.packing import pack
from roro_fast.models.inference import infer
from roro_fast.models.lm_trainer import LMTrainer
from roro_fast.models.loading import load_decoder
from roro_fast.train.lm import (
    IGNORE,
    completion_batch,
    reference_of,
    sft_loss,
    token_logprobs,
)
from tests.tiny import save_tiny


@pytest.fixture
def model(tmp_path):
    return load_decoder(save_tiny(tmp_path, hidden=16))


def batch():
    return completion_batch([[5, 6, 7], [8]], [[9, 10, 2], [11, 2]], 0)


def test_an_update_reaches_the_paged_forward(model):
    """Which may run on packed copies of the weights, as it does in C++."""
    (packed,) = pack([[5, 6, 7]], 100)

    def states():
        return infer(model, packed.on(model)), model.dense(torch.tensor([[5, 6, 7]]))[0].detach()

    before = states()
    with LMTrainer(model, 1e-2) as trainer:
        trainer.step(sft_loss(model, *batch()))
    after = states()
    torch.testing.assert_close(*before, atol=1e-5, rtol=0)
    torch.testing.assert_close(*after, atol=1e-5, rtol=0)
    assert not torch.allclose(after[0], before[0], atol=1e-3)


def test_completion_batch_trains_completions_only():
    ids, targets = batch()
    assert ids.tolist() == [[5, 6, 7, 9, 10], [8, 11, 0, 0, 0]]
    assert targets.tolist() == [[IGNORE, IGNORE, 9, 10, 2], [11, 2, IGNORE, IGNORE, IGNORE]]


def test_token_logprobs_match_the_full_softmax(model):
    ids, targets = batch()
    full = torch.log_softmax(model.logits(model.dense(ids)) / 0.7, -1)
    want = [full[0, 2, 9], full[0, 3, 10], full[0, 4, 2], full[1, 0, 11], full[1, 1, 2]]
    torch.testing.assert_close(token_logprobs(model, ids, targets, 0.7), torch.stack(want))
    assert sft_loss(model, ids, targets).item() == pytest.approx(-token_logprobs(model, ids, targets).mean().item())


def test_sft_learns_and_leaves_the_model_frozen(model):
    ids, targets = batch()
    before = sft_loss(model, ids, targets).item()
    with LMTrainer(model, 1e-2) as trainer:
        for _ in range(40):
            trainer.step(sft_loss(model, ids, targets))
    assert sft_loss(model, ids, targets).item() < 0.3 * before
    assert not any(p.requires_grad for p in model.parameters())


def test_reference_does_not_follow(model):
    ids, targets = batch()
    ref = reference_of(model)
    before = token_logprobs(ref, ids, targets)
    with LMTrainer(model, 1e-2) as trainer:
        trainer.step(sft_loss(model, ids, targets))
    torch.testing.assert_close(token_logprobs(ref, ids, targets), before, rtol=0, atol=0)
    assert not torch.equal(token_logprobs(model, ids, targets), before)


def test_frozen_layers_stay_and_bf16_steps_resemble_float32_ones(model, tmp_path):
    untouched = load_decoder(save_tiny(tmp_path / "again", hidden=16))
    with LMTrainer(model, 1e-3, frozen=1, bf16=True) as trainer:
        in_half = model.dense(batch()[0])
        trainer.step(sft_loss(model, *batch()))
    assert not model.autocast and not any(p.requires_grad for p in model.parameters())
    whole = untouched.dense(batch()[0])
    assert 0 < (in_half - whole).abs().max() < 0.1, "bfloat16, and only that"
    same = {n for (n, a), b in zip(model.named_parameters(), untouched.parameters(), strict=True) if torch.equal(a, b)}
    frozen = {n for n, _ in model.named_parameters() if n.startswith(("embed", "head", "layers.0."))}
    assert same == frozen and frozen
    assert all(p.dtype == torch.float32 for p in model.parameters())
