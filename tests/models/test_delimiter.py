from __future__ import annotations

import random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from roro_fast.errors import ConfigError
from roro_fast.models import nano_tokenizer
from roro_fast.models.delimiter import StepBoundary, delimiter_ids

BLANK = "\n\n"


def byte_level(tokens: list[str]) -> Tokenizer:
    """A byte-level vocabulary holding `tokens` whole, as GPT-2-style checkpoints store them."""
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocab = {"".join(piece for piece, _ in spell.pre_tokenize_str(t)): i for i, t in enumerate(tokens)}
    tok = Tokenizer(models.WordLevel(vocab, unk_token=tokens[0]))
    tok.decoder = decoders.ByteLevel()
    return tok


def test_nano_has_one_blank_line_token():
    tok = nano_tokenizer.build()
    assert delimiter_ids(tok, BLANK) == {tok.token_to_id(BLANK)}


def test_transformers_and_tokenizers_agree(tmp_path):
    from transformers import AutoTokenizer

    nano_tokenizer.save(tmp_path)
    assert delimiter_ids(AutoTokenizer.from_pretrained(tmp_path), BLANK) == delimiter_ids(nano_tokenizer.build(), BLANK)


def test_every_token_that_contains_the_delimiter_counts():
    tok = byte_level(["x", "\n", "\n\n", ".\n\n", "\n\n  ", "\n\n\n", "\r\n", " \n", "é\n\n"])
    assert delimiter_ids(tok, BLANK) == {2, 3, 4, 5, 8}


def test_added_tokens_count_and_special_ones_do_not():
    tok = byte_level(["x", "\n"])
    tok.add_tokens(["\n\n"])
    tok.add_special_tokens(["<end>\n\n"])
    assert delimiter_ids(tok, BLANK) == {2}
    assert delimiter_ids(PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<end>\n\n"), BLANK) == {2}


@pytest.mark.parametrize("delimiter", ["", "\n\n\n\n\n\n", "<step>"])
def test_impossible_delimiter_names_the_field(delimiter):
    with pytest.raises(ConfigError, match=r"engine\.delimiter"):
        delimiter_ids(nano_tokenizer.build(), delimiter)


def test_boundary_spans_tokens():
    tok = byte_level(["x", "\n", "\n\n", ".\n", "\ny", " ", "\n\n\n"])
    boundary = StepBoundary(tok, BLANK)
    assert boundary.ends([0, 1, 1, 0]) == [3]
    assert boundary.ends([0, 3, 4, 0]) == [3]
    assert boundary.ends([0, 1, 5, 1, 0]) == []
    assert boundary.ends([0, 2, 1, 0, 6]) == [2, 5]
    assert boundary.ends([1, 1, 1, 1, 1]) == [2, 4]


def test_boundary_equals_splitting_the_text():
    """Against an independent definition: decode each step so far and look for the delimiter."""
    texts = ["a", "\n", "\n\n", "b\n", "\nc", " \n\n ", "-", "\n\n\n", "--"]
    tok, rng = byte_level(texts), random.Random(0)
    for delimiter in (BLANK, "\n", "-\n-", "---"):
        boundary = StepBoundary(tok, delimiter)
        for _ in range(300):
            ids = [rng.randrange(len(texts)) for _ in range(rng.randrange(12))]
            want, step = [], ""
            for i, token in enumerate(ids):
                step += texts[token]
                if delimiter in step:
                    want.append(i + 1)
                    step = ""
            assert boundary.ends(ids) == want


def test_advance_equals_ends():
    tok = byte_level(["x", "\n", "\n\n", ".\n", "\ny"])
    boundary = StepBoundary(tok, BLANK, vocab_size=8)
    assert boundary.table.shape == (2, 8)
    rows = torch.randint(0, 8, (16, 40), generator=torch.Generator().manual_seed(0))
    states, closed = torch.zeros(16, dtype=torch.int64), []
    for column in rows.T:
        states, hit = boundary.advance(states, column)
        closed.append(hit)
    for row, hits in zip(rows, torch.stack(closed, 1), strict=True):
        assert boundary.ends(row.tolist()) == (hits.nonzero().flatten() + 1).tolist()


def test_control_tokens_break_a_match():
    tok = byte_level(["x", "\n"])
    tok.add_special_tokens(["<end>\n"])
    assert StepBoundary(tok, BLANK).ends([0, 1, 2, 1, 1]) == [5]


@pytest.mark.parametrize("delimiter", ["", "<step>"])
def test_boundary_that_cannot_be_reached_names_the_field(delimiter):
    with pytest.raises(ConfigError, match=r"engine\.delimiter"):
        StepBoundary(nano_tokenizer.build(), delimiter)
