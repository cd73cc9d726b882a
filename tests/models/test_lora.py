"""Adapters that PEFT wrote give, merged, the logits that PEFT computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from roro_fast.errors import CheckpointError
from roro_fast.models import lora
from roro_fast.models.loading import load_decoder
from tests.models.test_decoder import SHAPE, llama, qwen3, save_random

CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        {"r": 3, "lora_alpha": 5, "target_modules": "all-linear", "use_rslora": True},
        {
            "r": 2, "lora_alpha": 2, "target_modules": ["k_proj", "o_proj", "down_proj", "up_proj"],
            "rank_pattern": {"down_proj": 5}, "alpha_pattern": {"layers.1.self_attn.k_proj": 9},
        },
    ],
    ids=["attention", "rank-stabilised", "patterns"],
)  # fmt: skip
def test_merged_logits_equal_pefts(settings: dict[str, Any], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    theirs = save_random(qwen3(), tmp_path / "base")
    plain = load_decoder(tmp_path / "base")
    adapted = peft.get_peft_model(theirs, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(7)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    adapted.peft_config["default"].base_model_name_or_path = "../base"
    adapted.save_pretrained(tmp_path / "adapter")
    ids = torch.randint(0, SHAPE["vocab_size"], (2, 30), generator=torch.Generator().manual_seed(1))
    ours = load_decoder(tmp_path / "adapter")
    with torch.no_grad():
        want, got = adapted(ids).logits, ours.logits(ours.dense(ids))
        assert not torch.allclose(want, plain.logits(plain.dense(ids)), atol=1e-2)
    torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)


def adapter(directory: Path, config: dict[str, Any] | None = None, **tensors: torch.Tensor) -> Path:
    """A hand-made adapter on the first query projection of llama() beside it."""
    save_random(llama(), directory / "base")
    parts = {"A": torch.ones(2, 32), "B": torch.ones(32, 2)} | tensors
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    (directory / "adapter").mkdir()
    save_file({name.format(k): v for k, v in parts.items()}, directory / "adapter" / lora.WEIGHTS)
    text = json.dumps({"base_model_name_or_path": "../base", **CONFIG, **(config or {})})
    (directory / "adapter" / lora.CONFIG).write_text(text)
    return directory / "adapter"


def test_a_merge_touches_what_it_names_and_nothing_else(tmp_path: Path) -> None:
    path = adapter(tmp_path)
    base = load_file(tmp_path / "base" / "model.safetensors")
    merged = dict(base)
    lora.merge(merged, path)
    changed = [k for k in base if not torch.equal(base[k], merged[k])]
    assert changed == ["model.layers.0.self_attn.q_proj.weight"]
    torch.testing.assert_close(merged[changed[0]] - base[changed[0]], torch.full((32, 32), 4.0))  # 4 / 2 * (1 + 1)


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"use_dora": True}, {}, "use_dora True is not supported; merge the adapter"),
        ({"peft_type": "IA3"}, {}, "peft_type 'IA3'"),
        ({"modules_to_save": ["lm_head"]}, {}, "modules_to_save"),
        ({"r": 0}, {}, "r is 0; expected a positive number"),
        ({"base_model_name_or_path": ""}, {}, "base_model_name_or_path is missing"),
        ({}, {"A": torch.ones(2, 31)}, r"A \(2, 31\) and B \(32, 2\) do not fit the base weight \(32, 32\)"),
        ({}, {"embedding_A": torch.ones(2, 32)}, "unexpected tensor .*lora_embedding_A"),
    ],
)
def test_what_cannot_be_merged_is_named(
    config: dict[str, Any], tensors: dict[str, torch.Tensor], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_decoder(adapter(tmp_path, config, **tensors))


def test_half_an_adapter_is_named(tmp_path: Path) -> None:
    path = adapter(tmp_path)
    parts = load_file(path / lora.WEIGHTS)
    save_file({k: v for k, v in parts.items() if "lora_A" in k}, path / lora.WEIGHTS)
    with pytest.raises(CheckpointError, match="lora_B.weight is missing beside"):
        load_decoder(path)
    (path / lora.WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="no adapter_model.safetensors; save the adapter with safe_serialization"):
        load_decoder(path)


def test_an_adapter_of_another_model_is_named(tmp_path: Path) -> None:
    path = adapter(tmp_path)
    save_random(llama(num_hidden_layers=1), tmp_path / "other")
    parts = {k.replace("layers.0", "layers.2"): v for k, v in load_file(path / lora.WEIGHTS).items()}
    save_file(parts, path / lora.WEIGHTS)
    with pytest.raises(CheckpointError, match="adapts model.layers.2.self_attn.q_proj, which the base model does not"):
        load_decoder(path, base=tmp_path / "other")
