"""The twin that TRL trains computes what the decoder computes, and what it learns reaches the engine."""

from __future__ import annotations

import pytest
import torch

from roro_fast.config_io import load_config
from roro_fast.config_trl import TrlConfig
from roro_fast.errors import ConfigError
from roro_fast.models.loading import load_decoder
from roro_fast.rubric.rubricor import Rubricor
from roro_fast.train.trl.actor import attention_of, liger_of, load_actor, lora_config, merged, sync
from tests.tiny import save_tiny

peft = pytest.importorskip("peft")
IDS = torch.tensor([[5, 9, 11, 40, 3, 17, 22, 8]])


@pytest.fixture
def rubricor(tmp_path):
    return Rubricor.load(save_tiny(tmp_path / "model", hidden=16, layers=2))


def logits(decoder) -> torch.Tensor:
    return decoder.logits(decoder.dense(IDS))


def test_a_shared_twin_is_the_decoder(rubricor, tmp_path):
    decoder = rubricor.model
    actor = load_actor(decoder, tmp_path / "start", TrlConfig())
    torch.testing.assert_close(actor(IDS).logits, logits(decoder), atol=1e-5, rtol=1e-5)
    before = logits(decoder)
    with torch.no_grad():
        for p in actor.parameters():
            p.mul_(1.1)
    assert not torch.allclose(logits(decoder), before)  # nothing was copied: the memory is one
    torch.testing.assert_close(actor(IDS).logits, logits(decoder), atol=1e-5, rtol=1e-5)


def test_the_engine_writes_with_the_weights_of_this_step(rubricor, tmp_path):
    prompts = ["Lena's ledger of shells starts at 7 #0 pays 3 #1 Total?"]
    actor = load_actor(rubricor.model, tmp_path / "start", TrlConfig())
    stale = rubricor.write(prompts, max_new_tokens=12)[0][0].ids
    with torch.no_grad():
        for p in actor.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)), alpha=0.3)
    sync(actor, rubricor.model)
    actor.save_pretrained(tmp_path / "after")
    fresh = Rubricor(load_decoder(tmp_path / "after"), rubricor.tokenizer)
    want = fresh.write(prompts, max_new_tokens=12)[0][0].ids
    assert rubricor.write(prompts, max_new_tokens=12)[0][0].ids == want != stale


def test_adapters_arrive_merged_and_leave_the_base_alone(rubricor, tmp_path):
    decoder = rubricor.model
    config = TrlConfig(lora_rank=4, lora_alpha=8)
    base = load_actor(decoder, tmp_path / "start", config)
    actor = peft.get_peft_model(base, lora_config(config))
    before = logits(decoder)
    with torch.no_grad():
        for name, p in actor.named_parameters():
            if "lora_B" in name:
                p.normal_(generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(logits(decoder), before)
    sync(actor, decoder)
    assert not torch.allclose(logits(decoder), before, atol=1e-2)
    torch.testing.assert_close(actor(IDS).logits, logits(decoder), atol=1e-4, rtol=1e-4)
    with actor.disable_adapter():
        torch.testing.assert_close(actor(IDS).logits, before, atol=1e-5, rtol=1e-5)
    assert "model.layers.0.mlp.up_proj.weight" in merged(actor) and not any("lora" in n for n in merged(actor))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (TrlConfig(attention="flash_attention_2"), r"trl\.attention.*'auto'"),
        (TrlConfig(liger="on"), r"trl\.liger.*liger-kernel"),
    ],
)
def test_what_cannot_run_is_refused_by_name(config, words):
    cpu = torch.device("cpu")
    with pytest.raises(ConfigError, match=words):
        attention_of(config, cpu)
        liger_of(config, cpu)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rubric.trainer=trainer", r"rubric\.trainer.*native, trl"),
        ("trl.rollouts=hf", r"trl\.rollouts.*engine, transformers, vllm"),
        ("trl.vllm_mode=remote", r"trl\.vllm_mode.*colocate, server"),
        ("trl.dtype=bfloat16", r"trl\.dtype.*trl\.lora_rank"),
        ("trl.micro_batch=0", r"trl\.micro_batch.*1 or more"),
        ("trl.lora_rank=-1", r"trl\.lora_rank.*0 or more"),
        ("trl.vllm_memory=2", r"trl\.vllm_memory.*\[0, 1\]"),
    ],
)
def test_bad_settings_are_refused_by_name(override, words):
    with pytest.raises(ConfigError, match=words):
        load_config("nano", [override])


def test_auto_takes_what_is_there():
    cpu = torch.device("cpu")
    assert attention_of(TrlConfig(), cpu) == "sdpa" and not liger_of(TrlConfig(), cpu)
    assert attention_of(TrlConfig(attention="eager"), cpu) == "eager"
