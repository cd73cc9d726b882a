"""The decoder equals `transformers` on tiny random-weight configurations of every supported family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3TextConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from roro_fast.errors import CheckpointError
from roro_fast.models.config import DecoderConfig, pairs
from roro_fast.models.decoder import Decoder, DenseAttention
from roro_fast.models.loading import load_decoder

TOLERANCE = 1e-4
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}


def llama(**kw: Any) -> LlamaConfig:
    return LlamaConfig(**(SHAPE | kw))


def qwen2(**kw: Any) -> Qwen2Config:
    return Qwen2Config(**(SHAPE | kw))


def qwen3(**kw: Any) -> Qwen3Config:
    return Qwen3Config(**(SHAPE | {"head_dim": 16} | kw))


def gemma3(**kw: Any) -> Gemma3TextConfig:
    """Local and global layers, a window shorter than the texts, and a query scale that is not the head's."""
    gemma = {
        "head_dim": 16,
        "sliding_window": 8,
        "query_pre_attn_scalar": 24,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 50000.0, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
        "tie_word_embeddings": True,
    }
    return Gemma3TextConfig(**(SHAPE | gemma | kw))


ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 5000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}
CASES: dict[str, PretrainedConfig] = {
    "llama-gqa": llama(),
    "llama-mha": llama(num_key_value_heads=4),
    "llama-mqa": llama(num_key_value_heads=1),
    "llama-tied": llama(tie_word_embeddings=True),
    "llama-attention-bias": llama(attention_bias=True),
    "llama-mlp-bias": llama(mlp_bias=True),
    "llama-all-bias-mqa-tied": llama(
        attention_bias=True, mlp_bias=True, num_key_value_heads=1, tie_word_embeddings=True
    ),
    "llama-head-dim": llama(head_dim=16),
    "llama-eps": llama(rms_norm_eps=1e-2),
    "qwen2": qwen2(),
    "qwen2-tied-mqa": qwen2(tie_word_embeddings=True, num_key_value_heads=1),
    "qwen3": qwen3(),
    "qwen3-tied": qwen3(tie_word_embeddings=True),
    "qwen3-narrow-heads": qwen3(head_dim=4),
    "qwen3-attention-bias": qwen3(attention_bias=True),
    **{f"llama-rope-{name}": llama(rope_parameters=rope) for name, rope in ROPES.items()},
    "qwen2-rope-yarn": qwen2(rope_parameters=ROPES["yarn"]),
    "qwen3-rope-yarn": qwen3(rope_parameters=ROPES["yarn"]),
    "gemma3": gemma3(),
    "gemma3-mqa-untied-bias": gemma3(num_key_value_heads=1, tie_word_embeddings=False, attention_bias=True),
    "gemma3-all-local": gemma3(layer_types=["sliding_attention"] * 3, sliding_window=1),
    "gemma3-all-global": gemma3(layer_types=["full_attention"] * 3),
    "qwen3-rope-linear": qwen3(rope_parameters=ROPES["linear"]),
}


def save_random(config: PretrainedConfig, directory: Path, seed: int = 0) -> Any:
    """A transformers model whose every parameter, biases and norms too, is random; saved as safetensors."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(mean=1.0 if "norm" in name else 0.0, std=0.3)
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    theirs = save_random(CASES[case], tmp_path)
    ours = load_decoder(tmp_path)
    ids = torch.randint(0, SHAPE["vocab_size"], (3, 100), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = theirs(ids).logits
        got = ours.logits(ours.dense(ids))
    assert want.std() > 0.5
    torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=TOLERANCE)
    assert ours.config.num_params == sum(p.numel() for p in theirs.parameters())


def test_rope_scalings_differ(tmp_path: Path) -> None:
    """The rotary cases above are told apart by their tables (dynamic is the default inside the trained context)."""
    tables = {name: Decoder(DecoderConfig.from_hf(llama(rope_parameters=rope))).cos for name, rope in ROPES.items()}
    names = [n for n in ROPES if n != "dynamic"]
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert not torch.allclose(tables[a], tables[b], atol=1e-2), (a, b)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "longrope"}, "rope_type.*longrope"),
        ({"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}, "factor"),
    ],
)
def test_unsupported_rope_is_refused_by_field(rope: dict[str, Any], message: str) -> None:
    config = llama()
    config.rope_parameters = rope | {"rope_theta": 1e4}
    with pytest.raises(CheckpointError, match=message):
        Decoder(DecoderConfig.from_hf(config))


@pytest.mark.parametrize("case", ["qwen3", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_follows_transformers(dtype: torch.dtype, case: str, tmp_path: Path) -> None:
    theirs = save_random(CASES[case], tmp_path)
    ours = load_decoder(tmp_path, dtype=dtype)
    ids = torch.randint(0, SHAPE["vocab_size"], (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        truth = theirs(ids).logits
        naive = theirs.to(dtype)(ids).logits.float()
        got = ours.logits(ours.dense(ids))
    assert got.dtype == dtype
    allowed = (naive - truth).abs().mean() * 1.5 + 1e-3
    assert (got.float() - truth).abs().mean() <= allowed


def test_rows_are_independent_of_padding_and_batch(tmp_path: Path) -> None:
    save_random(qwen3(), tmp_path)
    model = load_decoder(tmp_path)
    ids = torch.randint(0, SHAPE["vocab_size"], (4, 12), generator=torch.Generator().manual_seed(2))
    padded = torch.cat((ids, torch.zeros(4, 5, dtype=torch.int64)), dim=1)
    with torch.no_grad():
        alone = torch.cat([model.dense(row.unsqueeze(0)) for row in ids])
        together = model.dense(padded)[:, :12]
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_positions_matter_and_flat_batch_equals_dense(tmp_path: Path) -> None:
    save_random(llama(), tmp_path)
    model = load_decoder(tmp_path)
    ids = torch.randint(0, SHAPE["vocab_size"], (2, 9), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        dense = model.dense(ids)
        flat = model(ids.flatten(), torch.arange(9).repeat(2), DenseAttention(2, 9)).view(2, 9, -1)
        stretched = model(ids.flatten(), torch.arange(9).repeat(2) * 2, DenseAttention(2, 9)).view(2, 9, -1)
    torch.testing.assert_close(flat, dense)
    assert not torch.allclose(stretched, dense, atol=1e-3)


def test_gradients_reach_every_parameter() -> None:
    model = Decoder(DecoderConfig.from_hf(qwen3(attention_bias=True)))
    ids = torch.randint(0, SHAPE["vocab_size"], (2, 8), generator=torch.Generator().manual_seed(4))
    model.logits(model.dense(ids)).square().mean().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_costs_count_attention_pairs_and_kv_bytes() -> None:
    c = DecoderConfig.from_hf(llama())
    token = 4.0 * c.num_layers * c.num_heads * c.head_dim
    assert c.forward_flops(1, 10) == 2.0 * c.num_params + token * 10
    assert c.forward_flops(3, 10) == 3 * 2.0 * c.num_params + token * (8 + 9 + 10)
    assert c.kv_bytes_per_token(2) == 2 * 3 * 2 * 8 * 2


@pytest.mark.parametrize(("tokens", "context"), [(1, 5), (1, 8), (1, 9), (1, 40), (5, 5), (10, 12), (30, 30), (7, 15)])
def test_a_windowed_layer_is_charged_for_the_keys_it_looks_at(tokens: int, context: int) -> None:
    c = DecoderConfig.from_hf(gemma3())
    near = sum(min(p, 8) for p in range(context - tokens + 1, context + 1))
    far = sum(range(context - tokens + 1, context + 1))
    assert pairs(tokens, context, 8) == near and pairs(np.array([tokens]), np.array([context])).tolist() == [far]
    assert c.forward_flops(tokens, context) == 2.0 * c.num_params * tokens + c.flops_per_pair * (2 * near + far)


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (qwen2(use_sliding_window=True, sliding_window=16), "use_sliding_window"),
        (llama(hidden_act="gelu"), "hidden_act"),
        (gemma3(hidden_activation="silu"), "hidden_activation"),
        (gemma3(final_logit_softcapping=30.0), "final_logit_softcapping"),
        (gemma3(use_bidirectional_attention=True), "use_bidirectional_attention"),
        (Gemma3Config(), "model_type: 'gemma3' is not supported; of a multimodal Gemma 3 only the text model"),
        (PretrainedConfig(), "model_type"),
    ],
)
def test_unsupported_configs_are_refused_by_field(config: PretrainedConfig, field: str) -> None:
    with pytest.raises(CheckpointError, match=f"config.{field}"):
        DecoderConfig.from_hf(config)
