"""From config to pool: what fits is loaded, what does not is refused by key and model."""

from __future__ import annotations

import json
import shutil

import huggingface_hub
import pytest
import torch

from roro_fast import cli_check
from roro_fast.config import ModelsConfig
from roro_fast.config_io import load_config
from roro_fast.engine import Request
from roro_fast.errors import CheckpointError, ConfigError
from roro_fast.models.loading import load_decoder
from roro_fast.tasks.base import Query
from roro_fast.tasks.prompting import Prompt
from roro_fast.train import setup
from roro_fast.train.setup import Workbench, fingerprint, load_pool, load_task, load_tokenizer, resolve_model
from tests import chat
from tests.engine.pairs import Planned
from tests.tiny import overrides, save_adapter, save_pair, save_random, save_tiny
from tests.two_tokenizers import byte_fallback


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pair"))


def config(tmp_path, pair, *more):
    return load_config("nano", [*overrides(tmp_path, *pair), *more])


def test_workbench_loads_pool_engine_and_prompts(tmp_path, pair):
    bench = Workbench(config(tmp_path, pair))
    assert [m.config.hidden_size for m in bench.models] == [16, 32]
    assert bench.engine.num_models == 2 and bench.engine.models is bench.models
    query = bench.queries("train")[0]
    assert len(bench.queries("train")) == 24 and len(bench.queries("test")) == 6 and len(bench.queries("test", 2)) == 2
    assert bench.tokenizer.decode(bench.encode(query)) == query.prompt


def test_layers_keeps_the_first_ones(pair):
    small = str(pair[1])
    models, _ = load_pool(ModelsConfig(paths=[small, small], layers=[1, 0]))
    assert [m.config.num_layers for m in models] == [1, 2]
    assert torch.equal(models[0].layers[0].qkv.weight, models[1].layers[0].qkv.weight)
    listed = load_config("nano", [f"models.paths=[{small},{small}]", "models.layers=[[1],0]"]).models
    models, _ = load_pool(listed)
    assert torch.equal(models[0].layers[0].qkv.weight, models[1].layers[1].qkv.weight)


def test_different_tokenizers_are_refused_naming_both(tmp_path, pair):
    other = save_tiny(tmp_path / "other", hidden=32, seed=3)
    spec = json.loads((other / "tokenizer.json").read_text())
    vocab = spec["model"]["vocab"]
    a, b = list(vocab)[20:22]
    vocab[a], vocab[b] = vocab[b], vocab[a]  # same words, two ids swapped
    (other / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(ConfigError, match=rf"models\.paths: .*{pair[0]} and {other} have different tokenizers"):
        load_pool(ModelsConfig(paths=[str(pair[0]), str(other)]))
    assert fingerprint(load_tokenizer(pair[0])) == fingerprint(load_tokenizer(pair[1]))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (["models.paths=[nowhere, nope]"], CheckpointError, ["models.paths", "'nowhere'", "nano/small"]),
        (["engine.max_new_tokens=512"], ConfigError, ["engine.max_new_tokens", "'small'", "512"]),
        (['engine.delimiter="@@"'], ConfigError, ["engine.delimiter", "@@"]),
        (["models.device=gpu9"], ConfigError, ["models.device", "gpu9"]),
        (["task.name=gsm8k", "task.split_by=moon"], ConfigError, ["split_by"]),
    ],
)
def test_bad_set_up_is_one_clear_error(tmp_path, pair, change, error, words):
    with pytest.raises(error) as e:
        bench = Workbench(config(tmp_path, pair, *change))
        bench.encode(bench.queries("train")[0])
        _ = bench.engine
    assert all(w in str(e.value) for w in words), str(e.value)


def test_unknown_task_is_refused():
    with pytest.raises(ConfigError, match=r"task\.name: unknown task 'chess'"):
        load_task(load_config("nano", ["task.name=chess"]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_missing_gpu_is_said_plainly(tmp_path, pair):
    with pytest.raises(ConfigError, match=r"models\.device.*no GPU"):
        load_pool(config(tmp_path, pair, "models.device=cuda").models)


def test_larger_model_first_is_refused(tmp_path, pair):
    with pytest.raises(ConfigError, match=r"models\.paths: must be listed smallest first"):
        load_pool(ModelsConfig(paths=[str(pair[1]), str(pair[0])]))


def test_directory_without_tokenizer_is_named(tmp_path, pair):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((pair[0] / name).read_bytes())
    with pytest.raises(CheckpointError, match="bare has no readable tokenizer"):
        load_pool(ModelsConfig(paths=[str(bare), str(pair[1])]))


@pytest.mark.parametrize("family", ["mamba", "frobnicator"])
def test_an_unknown_architecture_is_named_before_its_tokenizer_is_read(tmp_path, pair, family):
    shutil.copytree(pair[1], other := tmp_path / "other")
    spec = json.loads((other / "config.json").read_text()) | {"model_type": family}
    (other / "config.json").write_text(json.dumps(spec))
    with pytest.raises(CheckpointError, match=f"other/config.json: model_type '{family}'.*llama, qwen2, qwen3, gemma"):
        load_pool(ModelsConfig(paths=[str(pair[0]), str(other)]))
    with pytest.raises(CheckpointError, match="rubric.judge: .*other has no readable tokenizer"):
        (other / "tokenizer.json").write_text("{")
        load_tokenizer(other, "rubric.judge")


def test_a_directory_wins_over_a_packaged_name(tmp_path, monkeypatch, pair):
    (tmp_path / "nano" / "small").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("nano/small").absolute() == tmp_path / "nano" / "small"


def test_an_adapter_takes_weights_and_tokenizer_from_its_base(tmp_path, pair):
    adapter, base = save_adapter(tmp_path / "adapter", pair[1]), load_decoder(pair[1])
    models, _ = load_pool(ModelsConfig(paths=[str(pair[0]), str(adapter)]))
    torch.testing.assert_close(models[1].layers[0].down.weight, base.layers[0].down.weight + 1)
    found = {f.name: f for f in cli_check.models([str(pair[0]), str(adapter)], "\n\n")}
    assert found[str(adapter)].detail.startswith("LoRA adapter on ") and found[str(adapter)].status == "ok"


def test_a_hub_id_without_a_hub_says_what_to_do(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        CheckpointError, match=r"models.paths: no directory 'nobody/nothing', .*hf download nobody/noth"
    ):
        resolve_model("nobody/nothing")


def test_qwen3_presets_on_tiny_stand_ins(tmp_path, monkeypatch, pair):
    """Everything of the recipes but their size and their GPU, one tokenizer or two."""
    qwen, r1 = chat.save_pair(tmp_path, context=16384), tmp_path / "r1"
    byte_fallback().save_pretrained(r1)
    save_random(r1, len(byte_fallback()), 1, hidden=64, layers=1, seed=3, context=16384)
    local = {"Qwen/Qwen3-1.7B": qwen[0], "Qwen/Qwen3-14B": qwen[1], "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B": r1}
    whole = []

    def fetch(name, key, weights):
        whole.extend([name] * weights)
        return local[name]

    monkeypatch.setattr(setup, "fetch", fetch)
    here = ["models.device=cpu", "engine.kv_bytes=64MiB", "engine.max_num_seqs=2"]
    bench = Workbench(load_config("qwen3", here))
    assert bench.config.models.dtype == "bfloat16" and bench.config.rubric.judge == "Qwen/Qwen3-8B"
    text = bench.tokenizer.decode(bench.encode(Query("q", "1 + 1?", "2", "gsm8k")))
    assert text.endswith("<|assistant|>") and "1 + 1?" in text
    assert bench.engine.num_models == 2 and {m.dtype for m in bench.models} == {torch.bfloat16}
    assert whole == ["Qwen/Qwen3-1.7B", "Qwen/Qwen3-14B"]
    cross = Workbench(load_config("qwen3_r1", here))
    prompt = cross.encode(Query("q", "1 + 1?", "2", "gsm8k"))
    assert bench.tokenizer.decode(prompt) == text and isinstance(prompt, Prompt)
    assert cross.tokenizers[1].decode(prompt.others[0][1:]).startswith("1 + 1?")
    (t,) = cross.engine.rollout(
        [Request(prompt, max_new_tokens=12, max_step_tokens=4, tag={"plan": [0, 1]})], Planned()
    )
    assert set(t.models) == {0, 1} and t.meta["tracks"][0]["models"] == [1]
    assert whole == ["Qwen/Qwen3-1.7B", "Qwen/Qwen3-14B", "Qwen/Qwen3-1.7B", "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B"]
    local["deepseek-ai/DeepSeek-R1-Distill-Qwen-14B"] = pair[1]  # whole words only: it cannot spell what the other says
    with pytest.raises(ConfigError, match=r"have different tokenizers; .*byte for byte"):
        load_pool(load_config("qwen3_r1", here).models)
    assert len(whole) == 4  # refused before the weights were fetched


def test_a_hub_model_without_safetensors_is_not_fetched_as_a_pickle(tmp_path, monkeypatch):
    asked = {}

    def snapshot(name, allow_patterns):
        asked[name] = allow_patterns
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(
        CheckpointError, match=r"models\.paths: some/old on .* no safetensors, and pickled .*save_pretrained"
    ):
        resolve_model("some/old")
    assert "*.safetensors" in asked["some/old"] and not [
        p for p in asked["some/old"] if p.endswith((".bin", ".pt", "*"))
    ]
    assert resolve_model("some/old", weights=False) == tmp_path and "*.safetensors" not in asked["some/old"]
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert resolve_model("some/old") == tmp_path


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path, pair):
    small, large = chat.save_pair(tmp_path)
    for path in (small, large):
        spec = json.loads((path / "tokenizer.json").read_text())
        vocab = spec["model"]["vocab"]
        vocab |= {f"extra{i}": len(vocab) + 100 + i for i in range(20)}
        (path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(ConfigError, match=r"models\.paths: the tokenizer of .*small has 276 tokens, the model 259"):
        load_pool(ModelsConfig(paths=[str(small), str(large)]))


def test_an_unknown_chat_variable_is_refused_with_the_pool(tmp_path):
    small, large = chat.save_pair(tmp_path)
    settings = [f"models.paths=[{small}, {large}]", "task.chat.enable_thoughts=true"]
    with pytest.raises(ConfigError, match=r"task\.chat\.enable_thoughts: .*does not read it"):
        _ = Workbench(load_config("nano", [*settings, "task.name=gsm8k"])).pool
    _ = Workbench(load_config("nano", settings)).pool  # the ledger has prompts of its own
