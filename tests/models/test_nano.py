"""The shipped pair: readable by transformers, one tokenizer, small, and of the required shape on a sample."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from roro_fast.errors import CheckpointError
from roro_fast.models import nano, nano_tokenizer
from roro_fast.models.check_nano import LARGE, SMALL, accuracy, decode, measure, step_errors
from roro_fast.models.decoder import Decoder
from roro_fast.tasks.ledger import Ledger

ASSETS_LIMIT = 16 * 2**20


@pytest.fixture(scope="module")
def pair() -> list[Decoder]:
    return nano.load_pair()


@pytest.mark.parametrize("size", nano.SIZES)
def test_transformers_reads_the_shipped_directory(size: str, pair: list[Decoder]) -> None:
    directory = nano.path(size)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    query = Ledger().queries("test", 1)[0]
    ids = tokenizer(query.prompt, return_tensors="pt").input_ids
    assert ids[0].tolist() == nano_tokenizer.build().encode(query.prompt).ids
    assert tokenizer.decode(ids[0]) == query.prompt
    theirs, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ours = pair[nano.SIZES.index(size)]
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ours.dense(ids)), theirs.float()(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", nano.SIZES)
def test_transformers_generate_equals_our_greedy_decode(size: str, pair: list[Decoder]) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(nano.path(size)).float()
    queries = Ledger().queries("test", 3)
    for run in decode(pair, nano_tokenizer.build(), queries, size):
        ids = torch.tensor([run.tokens[: run.prompt]])
        out = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=160)
        assert out[0].tolist() == run.tokens


def test_shipped_tokenizer_is_the_one_in_the_code() -> None:
    want = json.loads(nano_tokenizer.build().to_str())
    for size in nano.SIZES:
        assert json.loads((nano.path(size) / "tokenizer.json").read_text())["model"] == want["model"]


def test_assets_are_small_and_free_of_pickle() -> None:
    found = [p for p in nano.path("small").parent.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in found) <= ASSETS_LIMIT
    assert {p.suffix for p in found} <= {".json", ".jsonl", ".safetensors", ".md"}


def test_unknown_size_is_refused() -> None:
    with pytest.raises(CheckpointError, match="medium"):
        nano.path("medium")


def test_required_shape_on_a_sample(pair: list[Decoder]) -> None:
    """Bounds widened for 100 queries; `python -m roro_fast.models.check_nano` measures the real ones."""
    figures = measure(pair, Ledger().queries("test", 100, seed=7))
    acc = figures["accuracy"]
    assert isinstance(acc, dict)
    assert acc["large"] >= 0.88
    assert 0.2 <= acc["small"] <= 0.75
    assert acc["oracle"] >= 0.95 * acc["large"]
    assert 0 < figures["oracle_flops_share"] <= 0.5  # type: ignore[operator]
    assert pair[LARGE].config.num_params >= 8 * pair[SMALL].config.num_params


def test_oracle_keeps_only_locally_right_small_steps(pair: list[Decoder]) -> None:
    queries = Ledger().queries("test", 40, seed=11)
    runs = decode(pair, nano_tokenizer.build(), queries, "oracle")
    task = Ledger()
    written = {SMALL: 0, LARGE: 0}
    for q, r in zip(queries, runs, strict=True):
        flags = task.verify(q, r.steps).steps
        assert flags is not None and len(flags) == len(r.models)
        for model, right in zip(r.models, flags, strict=True):
            written[model] += 1
            assert right or model == LARGE
        assert nano_tokenizer.build().decode(r.tokens[r.prompt :]) == "".join(r.steps)
        assert sum(r.written.values()) == len(r.tokens) - r.prompt
    assert written[SMALL] > 0 and written[LARGE] > 0


def test_switched_tokens_equal_a_cold_forward(pair: list[Decoder]) -> None:
    """Each token of a mixed completion is the argmax of its writer on the whole prefix: catch-up loses nothing."""
    tokenizer = nano_tokenizer.build()
    queries = Ledger().queries("test", 12, seed=5)
    mixed = 0
    for run in decode(pair, tokenizer, queries, "oracle"):
        ids = torch.tensor([run.tokens])
        best = [m.logits(m.dense(ids))[0].argmax(-1).tolist() for m in pair]
        at = run.prompt
        for model, text in zip(run.models, run.steps, strict=True):
            for _ in tokenizer.encode(text).ids:
                assert best[model][at - 1] == run.tokens[at]
                at += 1
        mixed += len(set(run.models)) == 2
    assert mixed >= 3


def test_error_rates_follow_the_verifier(pair: list[Decoder]) -> None:
    queries = Ledger().queries("test", 30, seed=3)
    runs = decode(pair, nano_tokenizer.build(), queries, "large")
    assert accuracy(queries, runs) >= 0.8
    for run in runs:
        run.steps[0] = " earns 0: 0 gives 0 #9\n\n"
    spoilt = step_errors(queries, runs)
    firsts = [q.meta["kinds"][0] for q in queries]
    for kind in set(firsts):
        rate, count = spoilt[kind]
        assert rate * count >= firsts.count(kind) - 1e-9
