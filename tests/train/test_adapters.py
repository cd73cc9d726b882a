"""Adapter training: its data, exact resuming, PEFT's own reading of what is written, and shared layers left alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from roro_fast.errors import CheckpointError, ConfigError
from roro_fast.models.loading import load_decoder
from roro_fast.train.adapter_data import Corpus
from roro_fast.train.adapters import Recipe, Trainer
from roro_fast.train.lm import IGNORE
from roro_fast.train.lora_layers import LoraDecoder, common_prefix
from tests import chat
from tests.tiny import save_random

pytest.importorskip("reasoning_gym")
TINY = Recipe(
    upper="", rank=2, alpha=4, steps=8, batch=2, lr=0.01, first=1, warmup=2, decay=0.5, log_every=1, eval_every=4,
    eval_batches=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A three-layer decoder with a byte-level tokenizer that chats."""
    directory = tmp_path_factory.mktemp("base")
    tokenizer = chat.tokenizer()
    tokenizer.save_pretrained(directory)
    return save_random(
        directory, len(tokenizer), tokenizer.eos_token_id, hidden=16, layers=3, seed=1, context=2048
    )  # fmt: skip


def log_of(out: Path) -> list[dict[str, float]]:
    drop = ("time", "cpu_s")
    rows = [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in drop} for r in rows]


def test_batches_are_worked_solutions_of_train_questions():
    tokenizer = chat.tokenizer()
    corpus = Corpus(tokenizer, batch=4, seed=3, pool=2)
    queries = {q.prompt: q for q in corpus.queries(0, 8)}
    assert all(q.split == "train" for q in queries.values())
    seen = 0
    for batch in (corpus(0), corpus(1)):
        assert batch.tokens == sum(len(r) - r[::-1].index(True) for r in (batch.targets != IGNORE).tolist())
        for ids, targets in zip(batch.ids.tolist(), batch.targets.tolist(), strict=True):
            completion = [t for t in targets if t != IGNORE]
            first = targets.index(completion[0])
            prompt, text = tokenizer.decode(ids[: first + 1]), tokenizer.decode(completion)
            query = next(q for p, q in queries.items() if f"<|user|>{p}<eos>" in prompt)
            assert prompt.startswith("<|system|>Work step by step.<eos>") and prompt.endswith("<|assistant|>")
            assert text.endswith(f"\n\n#### {query.answer}<eos>")
            assert ids[first + 1 : first + len(completion)] == completion[:-1]
            seen += 1
    assert seen == 8
    again = Corpus(tokenizer, batch=4, seed=3, pool=2)
    assert torch.equal(again(1).ids, corpus(1).ids)
    assert not torch.equal(Corpus(tokenizer, batch=4, seed=4, pool=2)(1).ids, corpus(1).ids)


def test_word_problems_bring_their_own_solutions():
    tokenizer = chat.tokenizer()
    corpus = Corpus(tokenizer, batch=4, seed=3, pool=2, data="gsm")
    queries = corpus.queries(0, 40)
    families = [q.task.removeprefix("gym:") for q in queries]
    assert set(families) == {"gsm_symbolic", "chain_sum", "leg_counting"} and families.count("gsm_symbolic") > 24
    for query in queries:
        prompt, completion, family = corpus.encode(query)
        text = tokenizer.decode(completion)
        assert text.endswith(f"\n\n#### {query.answer}<eos>") and "\n\n\n" not in text
        if query.task == "gym:gsm_symbolic":
            assert family == [] and text.split("\n")[0] == query.meta["solution"].split("\n")[0].strip()
        else:
            assert family == prompt[: len(family)] != []
    assert corpus(0).ids.shape[0] == 4 and corpus(0).tokens > 0
    with pytest.raises(ConfigError, match=r"^data: "):
        Corpus(tokenizer, batch=4, seed=3, data="sums")


def test_an_interrupted_run_continues_to_the_identical_curve(base, tmp_path):
    Trainer(TINY, tmp_path / "whole", base).run(quiet=True)
    broken = Trainer(TINY, tmp_path / "parts", base)
    broken.run(until=3, quiet=True)
    broken.train_step()  # what is lost when a run is cut between checkpoints
    Trainer(TINY, tmp_path / "parts", base).run(quiet=True)
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")
    a, b = (load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("parts", "whole"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert any(t.abs().max() > 0 for k, t in a.items() if "lora_B" in k)


def test_a_run_may_be_shortened_until_its_rate_decays(base, tmp_path):
    run = Trainer(replace(TINY, steps=100), tmp_path, base)
    run.run(until=4, quiet=True)
    shorter = Trainer(TINY, tmp_path, base)
    assert shorter.step == 4 and [TINY.learning_rate(i) for i in (3, 4, 7)] == [0.01, 0.01, 0.0025]
    shorter.run(until=5, quiet=True)
    for other in (replace(TINY, steps=100), replace(TINY, steps=6), replace(TINY, lr=0.02)):
        with pytest.raises(CheckpointError, match=r"state\.safetensors: belongs to another recipe, or its learning"):
            Trainer(other, tmp_path, base)
    (tmp_path / "state.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"corrupt training state .*delete the directory"):
        Trainer(TINY, tmp_path, base)


def trained(base: Path, directory: Path, dtype: torch.dtype = torch.float32) -> LoraDecoder:
    """An adapter with factors of some size, exported to `directory`."""
    model = LoraDecoder(load_decoder(base), first=1, rank=3, alpha=5, seed=0)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.factors():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    model.export(directory, str(base), dtype)
    return model


def test_merged_and_pefts_logits_are_those_that_were_trained(base, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    model = trained(base, tmp_path)
    ids = torch.randint(0, 200, (2, 30), generator=torch.Generator().manual_seed(1))
    targets = ids.roll(-1, 1)
    targets[:, -1] = IGNORE
    with torch.no_grad():
        want = model.token_losses(ids, targets, IGNORE)
        merged = load_decoder(tmp_path)
        ours = merged.logits(merged.dense(ids))[:, :-1].log_softmax(-1)
        theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path)
        peft_logits = theirs(ids).logits[:, :-1].log_softmax(-1)
    for logits in (ours, peft_logits):
        got = -logits.gather(-1, targets[:, :-1, None]).flatten()
        torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)


def test_layers_below_the_first_adapted_stay_bit_for_bit(base, tmp_path):
    trained(base, tmp_path, torch.bfloat16)
    plain, adapted = (load_decoder(d).state_dict() for d in (base, tmp_path))
    changed = {k.split(".")[1] for k in plain if not torch.equal(plain[k], adapted[k])}
    assert changed == {"1", "2"}  # the second part of a name: embedding, norm and head are not among them


def test_a_smaller_model_of_the_same_base_takes_its_own_adapter(base, tmp_path):
    out = tmp_path / "run"
    run = Trainer(replace(TINY, upper="2", steps=2), out, base, named=str(base))
    run.run(quiet=True)
    assert {k.split(".")[4] for k in load_file(out / "adapter" / "adapter_model.safetensors")} == {"2"}
    merged, ids = load_decoder(out / "adapter", torch.bfloat16, layers=[0, 2]), torch.arange(20)[None]
    with torch.no_grad():
        want = run.model.token_losses(ids, ids.roll(-1, 1), IGNORE)
        got = -merged.logits(merged.dense(ids)).float().log_softmax(-1).gather(-1, ids.roll(-1, 1)[..., None]).flatten()
    assert merged.config.num_layers == 2
    torch.testing.assert_close(got, want, atol=0.1, rtol=0.05)  # rounded to bfloat16 at other places
    record = json.loads((out / "adapter" / "train.json").read_text())
    assert record["steps"] == 2 and record["tokens"] == log_of(out / "adapter")[-1]["tokens"]


def test_a_run_may_start_from_anothers_factors(base, tmp_path):
    Trainer(TINY, tmp_path / "large", base).run(quiet=True)
    start = replace(TINY, upper="2", init=str(tmp_path / "large" / "adapter"))
    factors = dict(Trainer(start, tmp_path / "small", base).model.named_factors())
    theirs = load_file(tmp_path / "large" / "adapter" / "adapter_model.safetensors")
    assert factors and all(torch.equal(t.bfloat16(), theirs[k]) for k, t in factors.items())
    with pytest.raises(CheckpointError, match=r"not an adapter of these layers of rank 3"):
        Trainer(replace(start, rank=3), tmp_path / "other", base)


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_a_shared_prefix_changes_nothing(base, tmp_path, prefix):
    model = trained(base, tmp_path)
    ids = torch.randint(0, 200, (3, 9), generator=torch.Generator().manual_seed(2))
    ids[:, :prefix] = ids[0, :prefix]
    ids[1, prefix] = ids[0, prefix] + 1
    targets = ids.roll(-1, 1)
    targets[:, :prefix] = IGNORE
    assert common_prefix(ids, targets, IGNORE) == prefix
    want = F.cross_entropy(
        model.model.logits(model.model.dense(ids)).flatten(0, 1), targets.flatten(), reduction="none"
    )
    losses = model.token_losses(ids, targets, IGNORE)
    torch.testing.assert_close(losses, want[targets.flatten() != IGNORE])
    grads = [torch.autograd.grad(x.sum(), model.factors(), retain_graph=True) for x in (losses, want)]
    assert all(g.abs().max() > 0 for g in grads[1])
    torch.testing.assert_close(*grads, atol=2e-4, rtol=1e-3)


def test_targets_are_never_part_of_the_prefix():
    ids = torch.arange(6).repeat(2, 1)
    targets = torch.tensor([[IGNORE, IGNORE, 1, 1, 1, 1], [IGNORE, IGNORE, IGNORE, 1, 1, 1]])
    assert common_prefix(ids, targets, IGNORE) == 2
