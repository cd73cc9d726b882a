"""The shipped pair: readable by transformers, one tokenizer, small, and of the required shape on a sample."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from roro_fast.errors import CheckpointError
from roro_fast.models import nano, nano_tokenizer
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
