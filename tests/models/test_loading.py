"""Checkpoint directories: round trips readable by `transformers`, shards, and one clear error per kind of damage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from roro_fast.errors import CheckpointError
from roro_fast.models.decoder import Decoder
from roro_fast.models.loading import (
    assign,
    first_layers,
    load_config,
    load_decoder,
    read_tensors,
    save_decoder,
    tensors_of,
)

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama-biased": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True, tie_word_embeddings=False),
    "qwen2-tied": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHAPE, head_dim=8, tie_word_embeddings=False),
}
IDS = torch.arange(10).unsqueeze(0)


def make(directory: Path, case: str = "qwen3", shard: str = "1GB") -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[case]).float()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    model.save_pretrained(directory, max_shard_size=shard)
    return directory


def rewrite(directory: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def reconfigure(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def logits(model: Decoder, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model.dense(ids))


@pytest.mark.parametrize("case", CONFIGS)
def test_round_trip_is_exact_and_readable_by_transformers(case: str, tmp_path: Path) -> None:
    first = load_decoder(make(tmp_path / "a", case))
    save_decoder(first, tmp_path / "b")
    again = load_decoder(tmp_path / "b")
    assert torch.equal(logits(first), logits(again))
    a, b = read_tensors(tmp_path / "a"), read_tensors(tmp_path / "b")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "b", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        torch.testing.assert_close(theirs.float()(IDS).logits, logits(first), atol=1e-4, rtol=1e-4)
    assert not list(tmp_path.rglob("*.part"))


def test_sharded_equals_single_file(tmp_path: Path) -> None:
    single, sharded = make(tmp_path / "single"), make(tmp_path / "sharded", shard="6KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 1 and not (sharded / "model.safetensors").exists()
    assert torch.equal(logits(load_decoder(single)), logits(load_decoder(sharded)))


def test_missing_shard_is_named(tmp_path: Path) -> None:
    sharded = make(tmp_path, shard="6KB")
    gone = sorted(sharded.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(CheckpointError, match=gone.name):
        load_decoder(sharded)


@pytest.mark.parametrize("text", ["{", "{}", "[]"])
def test_damaged_shard_index_is_named(text: str, tmp_path: Path) -> None:
    sharded = make(tmp_path, shard="6KB")
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        load_decoder(sharded)


def test_shard_outside_the_directory_is_refused(tmp_path: Path) -> None:
    sharded = make(tmp_path / "m", shard="6KB")
    index = sharded / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../elsewhere.safetensors"}}))
    with pytest.raises(CheckpointError, match="elsewhere"):
        load_decoder(sharded)


def test_loaded_model_is_frozen_and_in_the_asked_dtype(tmp_path: Path) -> None:
    model = load_decoder(make(tmp_path), dtype=torch.bfloat16)
    assert not model.training and model.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in model.parameters())


def test_tied_head_in_the_file_is_tolerated(tmp_path: Path) -> None:
    path = make(tmp_path, "qwen2-tied")
    want = logits(load_decoder(path))
    rewrite(path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert torch.equal(logits(load_decoder(path)), want)


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_decoder(tmp_path / "nowhere")


def test_missing_weights(tmp_path: Path) -> None:
    (make(tmp_path) / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        load_decoder(tmp_path)


def test_pickled_weights_are_refused_unread(tmp_path: Path) -> None:
    (make(tmp_path) / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"only pickled weights \(pytorch_model\.bin\).*safetensors"):
        load_decoder(tmp_path)


@pytest.mark.parametrize("size", [0, 4, 100, -10])
def test_corrupt_weights(size: int, tmp_path: Path) -> None:
    path = make(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: corrupt"):
        load_decoder(tmp_path)


def test_garbage_weights(tmp_path: Path) -> None:
    (make(tmp_path) / "model.safetensors").write_bytes(b"\x80\x04not a safetensors file" * 100)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: corrupt"):
        load_decoder(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model_type": "qwen3", "num_attention_heads": "many"}'])
def test_damaged_config(text: str, tmp_path: Path) -> None:
    (make(tmp_path) / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_decoder(tmp_path)


def test_missing_tensor(tmp_path: Path) -> None:
    rewrite(make(tmp_path), lambda t: t.pop("model.layers.1.self_attn.k_proj.weight"))
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.self_attn\.k_proj\.weight is missing"):
        load_decoder(tmp_path)


def test_extra_tensor(tmp_path: Path) -> None:
    rewrite(make(tmp_path), lambda t: t.update({"model.layers.9.mlp.up_proj.weight": torch.zeros(2)}))
    with pytest.raises(CheckpointError, match=r"unexpected tensor model\.layers\.9\.mlp\.up_proj\.weight"):
        load_decoder(tmp_path)


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.up_proj.weight"]
)
def test_wrong_shape(name: str, tmp_path: Path) -> None:
    rewrite(make(tmp_path), lambda t: t.update({name: torch.zeros(5, 7)}))
    with pytest.raises(CheckpointError, match=f"{name}.* has shape .*config asks for"):
        load_decoder(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.int64])
def test_quantised_and_other_wrong_dtypes_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    rewrite(make(tmp_path), lambda t: t.update({name: t[name].to(dtype)}))
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(CheckpointError, match=rf"{name} is {kind}; only float32, bfloat16.* not quantised"):
        load_decoder(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_float_weights_of_any_width_are_read(dtype: torch.dtype, tmp_path: Path) -> None:
    path = make(tmp_path)
    want = logits(load_decoder(path))
    rewrite(path, lambda t: t.update({k: v.to(dtype) for k, v in t.items()}))
    torch.testing.assert_close(logits(load_decoder(path)), want, atol=0.2, rtol=0.1)


def test_a_quantised_checkpoint_is_named_by_its_method(tmp_path: Path) -> None:
    reconfigure(make(tmp_path), quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(CheckpointError, match=r"config\.json: quantization_config: .*'gptq' are not supported"):
        load_decoder(tmp_path)


def test_swapped_halves_of_a_fused_tensor_are_noticed(tmp_path: Path) -> None:
    """q and k exchanged keep the fused row count, so each part must be checked by itself."""

    def swap(t: dict[str, torch.Tensor]) -> None:
        q, k = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"
        t[q], t[k] = t[k], t[q]

    rewrite(make(tmp_path), swap)
    with pytest.raises(CheckpointError, match=r"q_proj\.weight has shape"):
        load_decoder(tmp_path)


def test_unknown_architecture(tmp_path: Path) -> None:
    reconfigure(make(tmp_path), model_type="mamba", architectures=["MambaForCausalLM"])
    with pytest.raises(CheckpointError, match="model_type 'mamba' is not supported; use one of llama, qwen2, qwen3"):
        load_decoder(tmp_path)


def test_unheard_of_architecture(tmp_path: Path) -> None:
    reconfigure(make(tmp_path), model_type="perpetuum")
    with pytest.raises(CheckpointError, match="perpetuum"):
        load_decoder(tmp_path)


def test_sliding_window(tmp_path: Path) -> None:
    reconfigure(make(tmp_path), use_sliding_window=True, sliding_window=8, layer_types=["sliding_attention"] * 3)
    with pytest.raises(CheckpointError, match="use_sliding_window"):
        load_decoder(tmp_path)


def test_first_layers_is_the_truncated_model(tmp_path: Path) -> None:
    path = make(tmp_path / "full", "qwen2-tied")
    two = load_decoder(path, layers=2)
    assert two.config.num_layers == 2 and len(two.layers) == 2
    theirs = AutoModelForCausalLM.from_pretrained(path).float()
    theirs.model.layers = theirs.model.layers[:2]
    theirs.config.num_hidden_layers = 2
    with torch.no_grad():
        torch.testing.assert_close(logits(two), theirs(IDS).logits, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(two), logits(load_decoder(path)), atol=1e-2)
    save_decoder(two, tmp_path / "two")
    assert torch.equal(logits(load_decoder(tmp_path / "two")), logits(two))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "two").config.num_hidden_layers == 2


def test_first_layers_leaves_the_source_alone(tmp_path: Path) -> None:
    config, tensors = load_config(make(tmp_path)), read_tensors(tmp_path)
    names = set(tensors)
    smaller, kept = first_layers(config, tensors, 1)
    assert smaller.num_layers == 1 and config.num_layers == 3 and config.hf.num_hidden_layers == 3
    assert set(tensors) == names and kept.keys() < names
    assert {k.split(".")[2] for k in kept if k.startswith("model.layers.")} == {"0"}


@pytest.mark.parametrize("layers", [0, -1, 4])
def test_first_layers_out_of_range(layers: int, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"layers: .* is not in 1\.\.3"):
        load_decoder(make(tmp_path), layers=layers)


def test_listed_layers_are_the_model_without_the_others(tmp_path: Path) -> None:
    path = make(tmp_path / "full", "qwen2-tied")
    outer = load_decoder(path, layers=[0, 2])
    theirs = AutoModelForCausalLM.from_pretrained(path).float()
    del theirs.model.layers[1]
    theirs.config.num_hidden_layers = 2
    with torch.no_grad():
        torch.testing.assert_close(logits(outer), theirs(IDS, use_cache=False).logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(logits(load_decoder(path, layers=range(2))), logits(load_decoder(path, layers=2)))
    save_decoder(outer, tmp_path / "outer")
    assert torch.equal(logits(load_decoder(tmp_path / "outer")), logits(outer))


@pytest.mark.parametrize("layers", [[], [0, 3], [-1, 0], [1, 0], [1, 1]])
def test_listed_layers_must_exist_in_order(layers: list[int], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"layers: \[.*\] is not an ascending choice of 0\.\.2"):
        load_decoder(make(tmp_path), layers=layers)


def test_assign_inverts_tensors_of(tmp_path: Path) -> None:
    source = load_decoder(make(tmp_path, "llama-biased"))
    target = Decoder(source.config)
    assert not torch.equal(logits(target), logits(source))
    assign(target, tensors_of(source))
    assert torch.equal(logits(target), logits(source))


def test_failed_save_keeps_the_old_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_decoder(make(tmp_path / "a"))
    save_decoder(model, tmp_path / "b")
    want = (tmp_path / "b" / "model.safetensors").read_bytes()

    def full_disk(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("roro_fast.models.loading.save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_decoder(model, tmp_path / "b")
    assert (tmp_path / "b" / "model.safetensors").read_bytes() == want
